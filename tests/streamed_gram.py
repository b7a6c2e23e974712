"""A Gram that cannot be formed and counts what is read of it; and the largest tensor that some work creates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntkit.gram.gram_matrix import Gram


class StreamedGram(Gram):
    """Like a matrix on disk: products and rows only; whoever asks for all of it fails."""

    def __init__(self, K: Tensor) -> None:
        super().__init__(K)
        self.products = self.rows_read = self.entries_read = self.most_rows = self.widest = 0

    def tile(self, rows: Any, columns: Any) -> Tensor:
        result = super().tile(rows, columns)
        self.rows_read += len(result)
        self.entries_read += result.numel()
        self.most_rows = max(self.most_rows, len(result))
        return result

    def _product(self, block: Tensor) -> Tensor:
        self.products += 1
        self.widest = max(self.widest, block.shape[1] if block.ndim == 2 else 1)
        step = 64
        parts = [self._values[i : i + step, :, 0, 0].to(torch.float64) @ block for i in range(0, len(self), step)]
        return torch.cat(parts)

    def dense(self) -> Tensor:
        raise AssertionError("the matrix is formed")

    def numpy(self) -> Any:
        raise AssertionError("the matrix is formed")


class LargestTensor(TorchDispatchMode):
    """Most numbers in one tensor that an operation created, those that share the memory of `given` left out."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.numbers, self._given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self._given:
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return result
