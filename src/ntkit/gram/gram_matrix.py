"""The kernel matrix as one object: validated once, read by rows, tiles, diagonal and products in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ntkit.base.batch import Batch
from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory
from ntkit.base.notebook_figures import matrix
from ntkit.base.shown import as_table
from ntkit.gram.arrays import BLOCK, Matrix, as_floats, as_tensor, not_finite, shared
from ntkit.gram.gram_identity import identity
from ntkit.kernels.kernel import Kernel

# Largest |K[i, j] - K[j, i]|, relative to the largest |K[i, j]|, that counts as rounding, by the dtype of the entries:
# the one rule of symmetry for all that measures or learns. An entry is a sum over parameters of either sign. In float32
# that sum was measured to 5e-8 between K[i, j] and K[j, i] computed in different tiles, and grows with the square root
# of the number of terms: 1e-4 leaves room for 1e6 times as many. In float64 the same argument gives 1e-13; 1e-10 still
# refuses a matrix that was computed in float32 and converted, whose small eigenvalues would pass for information.
# A mistake (points in two orders, two sets of points, an entry overwritten) is of order 1e-2 and more.
SYMMETRY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_TILE = 256  # rows and columns compared at once: three tiles stay in cache
_DRAWN = 500  # samples of an image
_FAR = 16  # tiles side by side before the next row of tiles: of a file, whole pages are read, and each once
Index = slice | Tensor | np.ndarray | list[int]


class Gram:
    """A kernel's values on data: one symmetric matrix K, in float64 on every access, whatever dtype it is kept in.

    The matrix is the symmetric part (K + K^T) / 2 of what was passed, which may differ from it by rounding only. A
    kernel with C outputs is one [n C, n C] matrix with row i C + c. Whatever learns from or measures a kernel matrix
    uses only what is listed here, so a matrix kept elsewhere can offer the same.

    Parameters
    ----------
    K : [n, n] or [n, n, C, C]; torch or numpy, any real dtype. Its memory is shared, not copied: leave it unchanged.
        A ``numpy.memmap``, writeable or not, stays on disk and is read where it is needed.
    kernel, x : the kernel and the data that K was computed with, for `identity`.

    Attributes
    ----------
    shape : (N, N), N = n C.
    outputs : C; 1 for [n, n].
    dtype, device : those of the entries as kept.
    precision : machine epsilon of `dtype`.
    largest : largest |entry|.
    exact : whether what was passed is symmetric to the last bit; if so, reading a row touches no column.

    Raises
    ------
    Refused
        When K is not square, empty, complex, not finite, or not symmetric: largest |K - K^T| over largest |K| above
        1e-10 in float64, 1e-4 in float32, 1e-2 in float16, 1e-1 in bfloat16.

    Examples
    --------
    >>> G = Gram(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> G.rows([1]), G.diagonal().tolist(), (G @ torch.tensor([1.0, 1.0])).tolist()
    (tensor([[1., 3.]], dtype=torch.float64), [2.0, 3.0], [3.0, 4.0])
    """

    def __init__(self, K: Matrix, kernel: Kernel | None = None, x: Batch | None = None, *, name: str = "K") -> None:
        if (kernel is None) != (x is None):
            fix = "Pass the kernel and the data that K was computed with."
            raise refusal("Gram", got="one of kernel and x", expected="both, or neither", fix=fix)
        if isinstance(K, Gram):
            raise refusal(name, got="a Gram", expected="a tensor or an array", fix="Use it as it is.")
        self.on_torch = isinstance(K, Tensor)
        values = as_floats(K, name)
        shape = list(values.shape)
        if values.ndim not in (2, 4) or shape[0] != shape[1] or shape[2:3] != shape[3:4] or values.numel() == 0:
            got = f"shape {shape}" + ", empty" * (values.numel() == 0)
            fix = "Pass the kernel of one set of points: k(x_train) to fit, and k(x_test, x_train) to predict."
            raise refusal(name, got=got, expected="a square matrix [n, n], or [n, n, C, C], with n >= 1", fix=fix)
        self._values = values if values.ndim == 4 else values[:, :, None, None]
        self._axes = len(shape)
        self.outputs = self._values.shape[2]
        self.shape = (len(values) * self.outputs,) * 2
        self.dtype, self.device = values.dtype, values.device
        self.precision = torch.finfo(values.dtype).eps
        self.largest, self.exact = self._validate(name)
        # now, not when asked: the kernel's model may be trained later
        self._identity = None if kernel is None else identity((kernel, x), self.dtype)

    def _validate(self, name: str) -> tuple[float, bool]:
        """Check finiteness and symmetry, reading each tile once; largest |entry|, and whether the symmetry is exact."""
        n, step = len(self._values), max(1, _TILE // self.outputs)
        values = self._values[:, :, 0, 0] if self.outputs == 1 else self._values
        wide = torch.promote_types(values.dtype, torch.float32)
        largest, gap, at = 0.0, 0.0, [0, 0, 0, 0]
        for i, j in _tiles(n, step):
            upper = values[i : i + step, j : j + step]
            # a contiguous copy, which torch transposes by blocks; the tile itself has a whole row of K between entries
            lower = values[j : j + step, i : i + step].to(wide, copy=True, memory_format=torch.contiguous_format)
            low, high = (float(v) for v in lower.aminmax())
            apart = lower.T.contiguous() if lower.ndim == 2 else lower.permute(1, 0, 3, 2).contiguous()
            least, most = (float(v) for v in apart.sub_(upper).aminmax())
            if not most - least < float("inf"):  # NaN and infinities of either half come out here
                self._refuse_not_finite(name, slice(i, i + step), slice(j, j + step))
            if max(-least, most) > gap:
                place = np.unravel_index(int(apart.abs().argmax()), apart.shape)
                gap = max(-least, most)
                at = [int(a + b) for a, b in zip((i, j, 0, 0), [*place, 0, 0], strict=False)]
            largest = max(largest, -low, high)
        if gap > SYMMETRY[self.dtype] * largest:
            there = [at[1], at[0], at[3], at[2]]
            one, other = (float(self._values[tuple(index)]) for index in (at, there))
            at, there = at[: self._axes], there[: self._axes]
            kind = f"{SYMMETRY[self.dtype]:.0e} in {self.dtype}, relative to the largest entry"
            got = f"{name}{at} = {one:.12g} but {name}{there} = {other:.12g}"
            fix = "Pass k(x), with one set of points in one order; if the difference is rounding, (K + K.T) / 2."
            raise refusal(name, got=got, expected=f"a symmetric matrix (to {kind})", fix=fix)
        return largest, gap == 0.0

    def _refuse_not_finite(self, name: str, rows: slice, columns: slice) -> None:
        for i, j in ((rows, columns), (columns, rows)):
            bad = (~self._values[i, j].isfinite()).nonzero()
            if len(bad):
                a, b, *rest = bad[0].tolist()
                index = [i.start + a, j.start + b, *rest]
                raise not_finite(name, float(self._values[tuple(index)]), index[: self._axes])

    # ------------------------------------------------------------------ access

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, index: Index) -> Tensor:
        """Rows of K in float64, [rows, N]."""
        return self.tile(index, slice(None))

    def tile(self, rows: Index, columns: Index) -> Tensor:
        """``K[rows][:, columns]`` in float64, each index a slice or a list of places; it may share memory with K."""
        rows, columns = (self._places(i) if isinstance(i, slice) and (i.step or 1) < 0 else i for i in (rows, columns))
        if self.outputs > 1:
            return self._tile_of_outputs(self._places(rows), self._places(columns))
        values = self._values[:, :, 0, 0]

        def part(i: Index, j: Index) -> Tensor:
            if isinstance(j, slice):
                return values[:, j][i if isinstance(i, slice) else self._places(i)]
            return (
                values[i][:, self._places(j)]
                if isinstance(i, slice)
                else values[self._places(i)[:, None], self._places(j)]
            )

        one = part(rows, columns).to(torch.float64)
        return one if self.exact else (one + part(columns, rows).T.to(torch.float64)) / 2

    def _tile_of_outputs(self, rows: Tensor, columns: Tensor) -> Tensor:
        C, i, j = self.outputs, rows[:, None], columns
        one = self._values[i // C, j // C, i % C, j % C].to(torch.float64)
        return one if self.exact else (one + self._values[j // C, i // C, j % C, i % C].to(torch.float64)) / 2

    def _places(self, index: Index) -> Tensor:
        if isinstance(index, slice):
            places = range(*index.indices(len(self)))
            return torch.arange(places.start, places.start + len(places) * places.step, places.step, device=self.device)
        try:
            index = shared(index) if isinstance(index, np.ndarray) and index.dtype.kind in "iu" else index
            places = torch.as_tensor(index, device=self.device)
            ok = places.ndim == 1 and not places.is_floating_point() and places.dtype != torch.bool
            places = places.long() if ok else places
            ok = ok and (not len(places) or bool(-len(self) <= places.min() and places.max() < len(self)))
        except (TypeError, ValueError, RuntimeError):
            ok, places = False, torch.empty(0)
        if not ok and not (isinstance(index, list) and not index):
            expected = f"a slice or a list of places from 0 to {len(self) - 1}"
            raise refusal("index", got=repr(index)[:80], expected=expected, fix="Pass e.g. [0, 3].")
        return places.long()  # of an empty list, too

    def diagonal(self) -> Tensor:
        """The diagonal of K in float64, [N]."""
        return self._values.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).reshape(-1).to(torch.float64)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of whole samples' rows in float64, small enough to stay in cache."""
        samples = max(1, BLOCK // (len(self) * self.outputs))
        for start in range(0, len(self), samples * self.outputs):
            index = slice(start, min(start + samples * self.outputs, len(self)))
            yield index, self.rows(index)

    @overload
    def __matmul__(self, v: np.ndarray) -> np.ndarray: ...
    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    def __matmul__(self, v: Any) -> Any:
        """K v in float64 for a vector [N] or a block [N, k]; only the rows that meet nonzero entries of v are read."""
        block = as_tensor(v, "vector").to(self.device, torch.float64)
        block = block.T.contiguous().T if block.ndim == 2 else block  # by columns: up to half the time
        if block.ndim not in (1, 2) or len(block) != len(self):
            fix = "Give one value per row of K."
            raise refusal(
                "vector", got=f"shape {list(block.shape)}", expected=f"[{len(self)}], or [{len(self)}, k]", fix=fix
            )
        result = self._product(block)
        return result if isinstance(v, Tensor) else result.cpu().numpy()

    def _product(self, block: Tensor) -> Tensor:
        """K times a float64 vector [N] or block [N, k]."""
        used = block.nonzero().ravel() if block.ndim == 1 else block.any(1).nonzero().ravel()
        # once: results of blocks kept beside their rows would fragment the heap
        result = torch.zeros_like(block, memory_format=torch.contiguous_format)
        if 2 * len(used) <= len(self):
            for part in used.split(max(1, BLOCK // len(self))):
                result += self.rows(part).T @ block[part]
        else:
            for index, rows in self.blocks():
                result[index] = rows @ block
        return result

    def dense(self) -> Tensor:
        """All of K as a new float64 tensor, [N, N], for algorithms that factorize it; they may overwrite it."""
        result = torch.empty(self.shape, dtype=torch.float64, device=self.device)
        for index, rows in self.blocks():
            result[index] = rows
        return result

    def numpy(self) -> np.ndarray:
        """All of K as a new float64 array, [N, N]."""
        return self.dense().cpu().numpy()

    @property
    def identity(self) -> str:
        """Which matrix this is, as a sha256 digest: of the kernel, its parameters, the data, dtype and ntkit's version.

        Without a kernel: of the values.
        """
        if self._identity is None:
            self._identity = identity(self._values, self.dtype)
        return self._identity

    def plot(self, y: Tensor | None = None) -> Any:
        """The matrix as an image, in a plotly figure: at most 500 samples, evenly chosen.

        Parameters
        ----------
        y : labels [n]: samples are sorted by them, with lines between classes. A kernel with C outputs has C rows for
            each sample, next to each other.
        """
        n = len(self) // self.outputs
        labels = torch.zeros(n) if y is None else torch.as_tensor(y).cpu()
        if labels.shape != (n,):
            fix = "Give one label per sample."
            raise refusal("y", got=f"shape {list(labels.shape)}", expected=f"[{n}]", fix=fix)
        labels = labels.repeat_interleave(self.outputs)
        order = labels.argsort(stable=True)
        chosen = order[torch.linspace(0, len(self) - 1, min(len(self), _DRAWN)).long()]
        own = labels[chosen]
        bounds = (own[1:] != own[:-1]).nonzero().ravel().add(1).tolist()
        values = self.tile(chosen, chosen)
        if values.dim() == 4:
            values = values.diagonal(dim1=2, dim2=3).sum(-1)
        kind = "" if len(chosen) == len(self) else f" of {len(self):,}"
        what = "samples" if self.outputs == 1 else "outputs of samples"
        return matrix(f"Kernel on {len(chosen)}{kind} {what}", values.cpu().numpy(), what.removesuffix("s"), bounds)

    def _repr_html_(self) -> str:
        shape = f"{self.shape[0]:,} x {self.shape[1]:,}"
        return as_table(type(self).__name__, {"size": shape, "outputs": str(self.outputs), "dtype": str(self.dtype)})

    def __repr__(self) -> str:
        kind = f", {self.outputs} outputs" if self.outputs > 1 else ""
        return f"Gram({self.shape[0]} x {self.shape[1]}{kind}, {self.dtype}, {self.device})"


def _tiles(n: int, step: int) -> Iterator[tuple[int, int]]:
    """First row and column of each tile on and above the diagonal, neighbors close together in time."""
    far = _FAR * step
    for top in range(0, n, far):
        for left in range(top, n, far):
            for i in range(top, min(top + far, n), step):
                for j in range(max(i, left), min(left + far, n), step):
                    yield i, j


def fits_dense(K: Gram, copies: int) -> bool:
    """Whether `copies` float64 matrices of K's size fit into the free memory of its device."""
    return copies * 8 * len(K) ** 2 <= free_memory(K.device)


def check_squares(K: Gram, name: str = "K") -> None:
    """Refuse a matrix other than zero whose entries are so small or large that float64 does not hold their squares."""
    if K.largest and not 1e-140 < K.largest < 1e140:
        expected = "between 1e-140 and 1e140: float64 must hold squares"
        fix = "Multiply the kernel, and what is added to its diagonal, by a number; a time is divided by it."
        raise refusal(name, got=f"a largest entry of {K.largest:.3g}", expected=expected, fix=fix)


def as_gram(K: Gram | Matrix, name: str = "K") -> Gram:
    """Take a Gram as it is, and wrap anything else in one; refused under `name` as `Gram` says."""
    return K if isinstance(K, Gram) else Gram(K, name=name)
