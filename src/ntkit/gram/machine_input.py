"""What every machine checks at its door: the kernel matrix, and the way back to the caller's kind of array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkit.base.checks import refusal

_ONE_OUTPUT = 'A kernel with outputs="full" has one block per pair of outputs: choose "trace" or "sum".'
_ROWS = 1024  # rows looked at together: the checks never make a second n x n array


def as_matrix(K: Any, name: str, fix: str = _ONE_OUTPUT) -> torch.Tensor:
    """Take a real matrix of any kind as a float64 tensor (no copy where it is one already).

    Raises
    ------
    Refused
        For complex or non-numeric values, another number of dimensions, no rows, or a value that is not finite.
    """
    tensor = as_tensor(K, name)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise refusal(
            name,
            got=f"shape {list(tensor.shape)}",
            expected="a matrix with at least one row and column",
            fix=fix,
        )
    tensor = tensor.to(torch.float64)
    for start in range(0, len(tensor), _ROWS):
        bad = ~torch.isfinite(tensor[start : start + _ROWS])
        if bad.any():
            i, j = torch.nonzero(bad)[0].tolist()
            raise refusal(
                name,
                got=f"{tensor[start + i, j].item()} at index ({start + i}, {j})",
                expected="finite values",
                fix="Look for overflow in the network or in the data of that row and column.",
            )
    return tensor


def as_gram(K: Any) -> tuple[torch.Tensor, bool, float]:
    """Take a symmetric kernel matrix: its float64 tensor, whether it is exactly symmetric, and the eps of its dtype.

    Raises
    ------
    Refused
        As `as_matrix`; also for a matrix that is not square, not symmetric to rounding, or has a negative diagonal.
    """
    given = as_tensor(K, "K")
    eps = torch.finfo(given.dtype).eps if given.is_floating_point() else torch.finfo(torch.float64).eps
    matrix = as_matrix(given, "K")
    if matrix.shape[0] != matrix.shape[1]:
        raise refusal(
            "K",
            got=f"shape {list(matrix.shape)}",
            expected="a square matrix: the kernel of the training set with itself",
            fix="Pass k(x_train) to fit, and k(x_test, x_train) to predict.",
        )
    diagonal = matrix.diagonal()
    worst = int(diagonal.argmin())
    if diagonal[worst] < 0:
        raise refusal(
            "K",
            got=f"{diagonal[worst].item():.6g} on the diagonal at index {worst}",
            expected="a kernel: K[i, i] = |phi(x_i)|^2 >= 0",
            fix="Check that K is a kernel matrix, not a distance or centred cross matrix.",
        )
    asymmetry, at = 0.0, (0, 0)
    for start in range(0, len(matrix), _ROWS):
        stop = start + _ROWS
        difference = (matrix[start:stop] - matrix[:, start:stop].T).abs()
        value = difference.max().item()
        if value > asymmetry:
            i, j = divmod(int(difference.argmax()), len(matrix))
            asymmetry, at = value, (start + i, j)
    if asymmetry > max(1e-5, 32 * eps) * diagonal.max().item():
        i, j = at
        raise refusal(
            "K",
            got=f"K[{i}, {j}] = {matrix[i, j].item():.6g} but K[{j}, {i}] = {matrix[j, i].item():.6g}",
            expected="a symmetric matrix",
            fix="Pass k(x_train), the kernel of the training set with itself, in one order.",
        )
    return matrix, asymmetry == 0.0, eps


def as_test_matrix(K_test: Any, n: int, like: torch.Tensor) -> torch.Tensor:
    """Take the kernel of test points with the `n` training points, [m, n], on the device of `like`.

    Raises
    ------
    Refused
        As `as_matrix`; also for another number of columns.
    """
    matrix = as_matrix(K_test, "K_test")
    if matrix.shape[1] != n:
        raise refusal(
            "K_test",
            got=f"shape {list(matrix.shape)}",
            expected=f"[m, {n}]: one column per training point",
            fix="Pass k(x_test, x_train), test points along the rows.",
        )
    return matrix.to(like.device)


def check_length(y: Any, n: int) -> None:
    """Refuse `y` unless it has one entry per row of K."""
    if len(y) != n:
        raise refusal(
            "y", got=f"{len(y)} entries", expected=f"{n}, one per row of K", fix="Pass the labels of the same points."
        )


def unfitted(name: str) -> Exception:
    """Build the refusal of a machine that is asked before it was fitted."""
    return refusal(name, got="no fitted machine", expected="fit(K, y) first", fix="Call fit before predicting.")


def same_kind(tensor: torch.Tensor, like: Any) -> Any:
    """Return a torch tensor where `like` is one, else a numpy array."""
    return tensor if isinstance(like, torch.Tensor) else tensor.cpu().numpy()


def as_tensor(value: Any, name: str) -> torch.Tensor:
    """Take real numbers of any kind as a detached tensor, copied only where torch cannot share them."""
    fix = "Pass a real array or tensor."
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise refusal(name, got="complex values", expected="real numbers", fix=fix)
        return value.detach().cpu() if value.device.type == "mps" else value.detach()  # that device has no float64
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise refusal(name, got="rows of unequal length", expected="real numbers", fix=fix) from error
    if array.dtype.kind not in "fiub":
        raise refusal(name, got=f"{array.dtype} values", expected="real numbers", fix=fix)
    known = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    dtype = array.dtype.newbyteorder("=") if known else np.float64
    # torch takes no negative strides, and warns of read-only arrays: those are copied
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))
