"""An operation whose result is known: autograd enters it into the graph, and it is not computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Given(TorchDispatchMode):
    """Returns a result that is known, where an operation would compute one.

    Parameters
    ----------
    func : the operation.
    result : a tensor of its own, without a graph.
    """

    def __init__(self, func: Any, result: Tensor) -> None:
        super().__init__()
        self._func, self._result = func, result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result for that operation; others are computed."""
        return self._result if func is self._func else func(*args, **(kwargs or {}))
