"""The interface of every kernel: values on two sets, a diagonal, pairs, and matrix-free products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ntkit.base.batch import Batch, checked, count, has_infinity
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Refused, refusal
from ntkit.base.numbers import check_dense
from ntkit.data.streamed_samples import in_memory
from ntkit.jacobian.model_outputs import refuse_infinite_input

Values = TypeVar("Values", Tensor, dict[str, Tensor])


class Kernel(ABC):
    """A kernel k(x, x'). Subclasses implement `_gram`, `_pairs` and `operator`; input is checked here, once."""

    _infinite = False  # whether infinite input may lead to finite values (masks); the kernel then checks the outputs
    _computed = "gradients"  # what must be finite, too
    _differentiable = False  # whether values stay in the autograd graph of samples that require a gradient

    @own_context()
    def __call__(self, x1: Batch, x2: Batch | None = None, out: Any = None) -> Tensor:
        """Kernel values between two sets.

        Parameters
        ----------
        x1, x2 : samples along the first axis: a tensor or numpy array; a tuple or any mapping of such, passed as
            model(*x), model(**x), with None, flags, numbers and texts passed on as they are; or a torch dataset or
            DataLoader in the order of its samples, which is read into memory. ``x2=None`` means the same set: then the
            symmetric half is computed once and the result is exactly symmetric.
        out : a tensor or numpy array (a memmap, too) of the result's shape and dtype, on any device: the values are
            written into it, tile by tile where the kernel has tiles.

        Returns
        -------
        Tensor
            [n1, n2] or with output axes behind, as the kernel's class says; shares its memory with `out`.

        Raises
        ------
        Refused
            For empty, ragged or non-finite input, an `out` that does not fit, and a model whose samples are not
            independent.
        """
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        return self._finite(self._gram(x1, x2, _writable(out)), x1, x2)

    @own_context()
    def diagonal(self, x: Batch) -> Tensor:
        """k(x_i, x_i) for every i: what ``k(x)[i, i]`` is, at the cost of n values."""
        x = self._checked(x, "x")
        return self._finite(self._pairs(x, None), x)

    @own_context()
    def paired(self, x1: Batch, x2: Batch) -> Tensor:
        """k(x1_i, x2_i) for every i, at the cost of n values; both sets have n samples."""
        x1, x2 = self._checked(x1, "x1"), self._checked(x2, "x2")
        if count(x1) != count(x2):
            fix = "Give both sets the same number of samples."
            raise refusal("x2", got=f"{count(x2)} samples", expected=f"{count(x1)}, as x1", fix=fix)
        return self._finite(self._pairs(x1, x2), x1, x2)

    def _finite(self, values: Values, x1: Batch, x2: Batch | None = None, given: Iterable[Tensor] = ()) -> Values:
        """Refuse infinite input that made values infinite or undefined, though the outputs are finite: tanh(inf).

        `given` are vectors of the caller's, which may be so themselves.
        """
        infinite = self._infinite and (has_infinity(x1) or (x2 is not None and has_infinity(x2)))
        results = values.values() if isinstance(values, dict) else [values]
        if infinite and not _all_finite(results) and _all_finite(given):
            raise refuse_infinite_input(self._computed)
        return values

    def _checked(self, x: Any, name: str) -> Batch:
        return checked(in_memory(x), name, self._infinite)

    def settings(self) -> dict[str, Any]:
        """What the values depend on beside the samples: modules, plain values, functions; for `Gram.identity`."""
        return vars(self)

    @abstractmethod
    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x, x)."""

    @abstractmethod
    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor: ...


def _all_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in values)


def _writable(out: Any) -> Tensor | None:
    """The user's array as a tensor over the same memory."""
    if isinstance(out, Tensor):
        check_dense(out, "out")
        if out.requires_grad:
            fix = "Allocate it with requires_grad=False."
            raise refusal("out", got="a tensor that requires grad", expected="one to write into", fix=fix)
    if out is None or isinstance(out, Tensor):
        return out
    if isinstance(out, np.ndarray) and out.flags.writeable and out.dtype.kind in "fiubc":
        with suppress(TypeError, ValueError):  # other orders of bytes, strides and floats than torch has
            return torch.from_numpy(out)
        fix = "Allocate it: np.empty(shape), in the dtype of the values."
        got = f"an array of {out.dtype.str} with strides {out.strides}"
        raise refusal("out", got=got, expected="an array whose memory torch can write into", fix=fix)
    got = type(out).__name__
    if isinstance(out, np.ndarray):
        got = f"an array of {out.dtype}" if out.flags.writeable else "a read-only array"
    expected = "a tensor or a writable numpy array"
    raise refusal("out", got=got, expected=expected, fix='Open a memmap with mode "r+" or "w+".')


def written(values: Tensor, out: Tensor | None) -> Tensor:
    """Values in the user's own tensor, if there is one."""
    if out is None:
        return values
    check_out(out, tuple(values.shape), values.dtype)
    return out.copy_(values)


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that cannot take the result as it is."""
    if tuple(out.shape) != shape or out.dtype != dtype:
        fix = "Allocate it again with that shape and dtype; its values are overwritten."
        raise refusal("out", got=f"shape {tuple(out.shape)}, {out.dtype}", expected=f"shape {shape}, {dtype}", fix=fix)
    reach = 0  # the last place of the axes so far, from that of the smallest stride: the next one begins behind it
    for step, size in sorted((step, size) for step, size in zip(out.stride(), out.shape, strict=True) if size > 1):
        if step <= reach:
            fix = "Allocate it: torch.empty(...), without expand or as_strided."
            got = "an expanded tensor" if step == 0 else f"a tensor of shape {shape} with strides {out.stride()}"
            raise refusal("out", got=got, expected="a place of its own for each value", fix=fix)
        reach += step * (size - 1)


def refuse_operator_of_diagonal() -> Refused:
    """The refusal of a matrix-free product where the kernel is one matrix per output."""
    return refusal(
        'operator of outputs="diagonal"',
        got="one matrix per output",
        expected="one matrix",
        fix='Use outputs="full", or a callable that picks the output: lambda y: y[:, 0].',
    )


def mirrored(values: Tensor) -> Tensor:
    """Exactly symmetric in the last two axes: the upper triangle counts."""
    return values.triu() + values.triu(1).transpose(-1, -2)


class KernelOperator:
    """k(x, x) as a symmetric linear operator, [N, N]: ``op @ v`` for vectors [N] and blocks [N, k]; K is never formed.

    N = n, or n * C with row i * C + c for a kernel with C outputs ("full").
    """

    def __init__(
        self, size: int, apply: Callable[[Tensor], Tensor], diagonal: Callable[[], Tensor], like: Tensor
    ) -> None:
        self.shape = (size, size)
        self._apply, self._diagonal = apply, diagonal
        self.dtype, self.device = like.dtype, like.device

    def __repr__(self) -> str:
        return f"KernelOperator({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"

    @own_context()
    def __matmul__(self, v: Tensor) -> Tensor:
        """K v."""
        if not isinstance(v, Tensor):
            raise refusal("vector", got=type(v).__name__, expected="a tensor", fix="Pass torch.as_tensor(v).")
        check_dense(v, "vector")
        if v.dim() not in (1, 2) or v.shape[0] != self.shape[0]:
            got, expected = f"shape {tuple(v.shape)}", f"({self.shape[0]},) or ({self.shape[0]}, k)"
            raise refusal("vector", got=got, expected=expected, fix="Flatten samples first, outputs second.")
        block = v.to(dtype=self.dtype, device=self.device)
        return self._apply(block[:, None])[:, 0] if v.dim() == 1 else self._apply(block)

    @own_context()
    def diagonal(self) -> Tensor:
        """Diagonal of K, [N]."""
        return self._diagonal()

    def to_scipy(self) -> Any:
        """``scipy.sparse.linalg.LinearOperator`` in float64 numpy, e.g. for ``eigsh``."""
        from scipy.sparse.linalg import LinearOperator

        def apply(v: Any) -> Any:
            return (self @ torch.from_numpy(v)).double().cpu().numpy()

        operator: Any = LinearOperator  # type checkers read its __init__, which takes less than its __new__
        return operator(self.shape, matvec=lambda v: apply(v.reshape(-1)), matmat=apply, dtype="float64")
