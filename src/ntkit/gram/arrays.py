"""Arrays as users pass them (torch or numpy, any real dtype): checks, products in float64, and the way back."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import Refused, refusal
from ntkit.base.numbers import check_dense, few_enough_for_labels, refuse_masked

Matrix = np.ndarray | Tensor
AnyMatrix = TypeVar("AnyMatrix", np.ndarray, Tensor)  # numpy in, numpy out; torch in, torch out

BLOCK = 2**18  # float64 values worked on at once: 2 MiB, which stays in cache


def as_tensor(value: Any, name: str) -> Tensor:
    """Take real numbers of any kind as a detached tensor, copied only where torch cannot share their memory.

    Raises
    ------
    Refused
        For complex values, values that are no numbers, rows of unequal length, masked arrays, and tensors that are
        sparse, quantized, nested or without values (device "meta").
    """
    fix = "Pass a real array or tensor."
    if isinstance(value, Tensor):
        if value.is_complex():
            raise refusal(name, got="complex values", expected="real numbers", fix=fix)
        check_dense(value, name)
        return value.detach().cpu() if value.device.type == "mps" else value.detach()  # that device has no float64
    array = as_array(value, name, "real numbers", fix)
    if array.dtype.kind not in "fiub":
        got = "complex values" if array.dtype.kind == "c" else f"{array.dtype} values"
        got = type(value).__name__ if array.dtype.kind == "O" and array.ndim == 0 else got
        raise refusal(name, got=got, expected="real numbers", fix=fix)
    torch_has_it = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    return shared(np.asarray(array, array.dtype if torch_has_it else np.float64))


def shared(array: np.ndarray) -> Tensor:
    """The array as a tensor over the same memory, read-only or on disk too; copied where torch has no such layout."""
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if any(s < 0 or s % array.itemsize for s in array.strides):  # torch has no such strides
        array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Readable(array)))


class _Readable:
    """The memory of a read-only array, not marked so: torch has no such mark, warns, and nothing of ours writes."""

    def __init__(self, array: np.ndarray):
        self.array = array  # kept alive by whoever reads it from here
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def as_array(value: Any, name: str, expected: str, fix: str) -> np.ndarray:
    """Take what numpy takes; refuse rows of unequal length, sparse and masked arrays, and what numpy cannot read."""
    if hasattr(value, "toarray"):
        raise refusal(
            name, got=f"a sparse {type(value).__name__}", expected="a dense array", fix="Pass its .toarray()."
        )
    refuse_masked(value, name)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise refusal(name, got="rows of unequal length", expected=expected, fix=fix) from error
    except (TypeError, RuntimeError) as error:
        got = f"{type(value).__name__} that numpy cannot read ({error})"
        raise refusal(name, got=got, expected=expected, fix=fix) from error


def as_floats(value: Any, name: str) -> Tensor:
    """Take real numbers as `as_tensor` does; boolean and integer values become float64, 8-bit floats float32."""
    tensor = as_tensor(value, name)
    if tensor.is_floating_point():
        return tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return tensor.to(torch.float64)


def not_finite(name: str, value: float, index: list[int]) -> Refused:
    """Build the refusal of a value that is not finite: of a kernel's, or of targets and vectors (`y`, `v`)."""
    fix = "Look for overflow in the network, and in the data of that row and column."
    if name in ("y", "v"):
        fix = f"Correct that value of {name}, or leave its sample out."
    return refusal(name, got=f"{value} at index {index}", expected="finite values", fix=fix)


def check_finite(values: Tensor, name: str) -> Tensor:
    """Refuse values that are not finite, by the index of the first; block by block, without a copy."""
    step = max(1, 4 * BLOCK * len(values) // max(1, values.numel()))
    for start in range(0, len(values), step):
        good = values[start : start + step].isfinite()
        if not good.all():
            first, *rest = (~good).nonzero()[0].tolist()
            index = [start + first, *rest]
            raise not_finite(name, values[tuple(index)].item(), index)
    return values


def as_matrix(value: Any, name: str, fix: str) -> Tensor:
    """Take a finite real matrix with at least one row and column, in its own floating dtype.

    Raises
    ------
    Refused
        As `as_tensor`; for another number of dimensions, no entries, or a value that is not finite.
    """
    tensor = as_floats(value, name)
    if tensor.ndim != 2 or tensor.numel() == 0:
        expected = "a matrix with at least one row and column"
        raise refusal(name, got=f"shape {list(tensor.shape)}", expected=expected, fix=fix)
    return check_finite(tensor, name)


def float64_product(matrix: Tensor, v: Tensor) -> Tensor:
    """Compute matrix @ v in float64, for a matrix of any dtype, converted by blocks of rows; v may be a stack."""
    if matrix.dtype == torch.float64:
        return matrix @ v
    step = max(1, BLOCK // matrix.shape[1])
    result = v.new_empty([*v.shape[:-2], len(matrix), *v.shape[-1:]] if v.ndim > 1 else [len(matrix)])
    for start in range(0, len(matrix), step):
        place = (..., slice(start, start + step), slice(None)) if v.ndim > 1 else slice(start, start + step)
        result[place] = matrix[start : start + step].to(torch.float64) @ v
    return result


@overload
def same_kind(tensor: Tensor, like: AnyMatrix) -> AnyMatrix: ...
@overload
def same_kind(tensor: Tensor, like: Any) -> Any: ...
def same_kind(tensor: Tensor, like: Any) -> Any:
    """Return a torch tensor where `like` is one (or a Gram of one), else a numpy array."""
    return tensor if getattr(like, "on_torch", isinstance(like, Tensor)) else tensor.cpu().numpy()


def refuse_labels(value: Any, name: str, *, centered: bool = False) -> None:
    """Refuse class labels where numbers are asked for: a class is no quantity, and its number would count as one.

    Labels are integers or booleans, [n] or [n, 1], of at most 20 different values that recur. Signs (-1 and 1) are
    numbers; and where the mean is taken off (`centered`), how two classes are numbered makes no difference.

    Raises
    ------
    Refused
        Says how to write the classes as numbers.
    """
    tensor = as_tensor(value, name)
    array = value if isinstance(value, Tensor) else np.asarray(value)
    is_float = tensor.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if is_float or tensor.ndim not in (1, 2) or tensor.shape[1:].numel() > 1:
        return
    distinct = tensor.unique().tolist()
    recur = few_enough_for_labels(len(distinct), tensor.numel())
    if set(distinct) <= {-1, 1} or len(distinct) <= (2 if centered else 1) or not recur:
        return
    fix = "Two classes: give 2.0 * y - 1 for labels 0 and 1."
    if len(distinct) > 2:
        fix = "Give a column per class, such as torch.nn.functional.one_hot(y) of labels from 0."
    raise refusal(
        name,
        got=f"integers of {len(distinct)} values ({distinct[0]:g} to {distinct[-1]:g}) that recur, as class labels do",
        expected="numbers to compare the kernel with",
        fix=f"{fix} If they are quantities, give them as floats.",
    )
