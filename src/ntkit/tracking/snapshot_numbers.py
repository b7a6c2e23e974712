"""Numbers of one kernel on one set of points, whether it is a matrix or only products with vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.kernel import KernelOperator
from ntkit.measures.spectra import Spectrum, alignment, spectrum

_PROBES = 32  # random vectors for Frobenius products of kernels that are not formed


def finite(value: float | None) -> float | None:
    """A number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def columns_of(shown: dict[str, Tensor | None], c: int) -> dict[str, Tensor | None]:
    """One output's column of each [n, C]."""
    return {name: None if v is None else v[:, c : c + 1] for name, v in shown.items()}


def _spectral(found: Spectrum, k: int, shown: dict[str, Tensor | None]) -> tuple[dict[str, Any], np.ndarray]:
    """Eigenvalues, what is derived from them, and energies of [n, C] values."""
    # up to `noise` an eigenvalue is rounding of K's own precision, and so is the direction of its vector
    real = int((found.eigenvalues[:k] > found.noise).sum())
    values = found.eigenvalues[:k].tolist()
    first, last = values[0], values[real - 1] if real else 0.0
    numbers = {
        "eigenvalues": [*values[:real], *[None] * (k - real)],
        "residual": finite(float(found.residuals[:k].max())),
        "trace": found.trace,
        "tail": None if found.trace is None else found.trace - sum(values),
        "effective_rank": None if found.trace is None or first <= 0 else found.trace / first,
        "condition": first / last if last > 0 else None,
        "status": found.status,
    }
    for name, v in shown.items():
        if v is not None:
            energy = found.energy(v)[:k].tolist()
            numbers[f"energy_{name}"] = [finite(e) if j < real else None for j, e in enumerate(energy)]
    return numbers, found.eigenvectors[:, :k].cpu().numpy()


def _nothing(k: int, N: int, shown: dict[str, Tensor | None]) -> tuple[dict[str, Any], np.ndarray]:
    """A dead network: its kernel is zero, and nothing else can be said of it."""
    names = ("residual", "tail", "effective_rank", "condition", "alignment", "alignment_centered")
    numbers: dict[str, Any] = dict.fromkeys(names)
    numbers |= {"eigenvalues": [None] * k, "trace": 0.0, "status": "the kernel is zero"}
    numbers |= {f"energy_{name}": [None] * k for name, v in shown.items() if v is not None}
    return numbers, np.full((N, k), np.nan)


class Dense:
    """A Gram matrix [n, n], [n, n, C, C] or, `diagonal`, [n, n, C], and its shares by parameter."""

    def __init__(self, K: Tensor, shares: dict[str, Tensor] | None = None, diagonal: bool = False) -> None:
        self.K, self._shares, self._diagonal = K, shares, diagonal

    def split(self) -> list[Dense]:
        """Each output's own kernel, of [n, n, C]."""
        return [Dense(self.K[:, :, c]) for c in range(self.K.shape[2])]

    def double(self) -> Tensor:
        """The matrix in float64."""
        return self.K.double()

    def spectral(self, k: int, shown: dict[str, Tensor | None], center: int) -> tuple[dict[str, Any], np.ndarray]:
        """Top k eigenpairs, energies, alignment with the targets."""
        n, N = len(self.K), len(self.K) * center
        if not bool(self.K.any()):
            return _nothing(k, N, shown)
        numbers, vectors = _spectral(spectrum(self.K, k if 3 * k <= N else None), k, shown)
        target = shown.get("target")
        if target is not None:
            numbers["alignment"] = finite(alignment(self.K, target))
            numbers["alignment_centered"] = finite(alignment(self.K, target, centered=True))
            if target.shape[1] > 1:
                own = [_only(target, c) if center > 1 else target[:, c] for c in range(target.shape[1])]
                numbers["class_alignment"] = [_aligned(self.K, t) for t in own]
        assert vectors.shape[0] == n * center
        return numbers, vectors

    def layered(self, target: Tensor | None) -> dict[str, Any]:
        """Each layer's share of the trace and its centered alignment."""
        if self._shares is None:
            return {}
        layers: dict[str, Tensor] = {}
        for name, share in self._shares.items():
            share = share.diagonal(dim1=2, dim2=3).sum(2) if share.dim() == 4 else share
            share = share.sum(2) if share.dim() == 3 else share
            layer = name.rpartition(".")[0] or name
            layers[layer] = layers[layer] + share if layer in layers else share
        numbers: dict[str, Any] = {
            "layer_trace": {name: float(K.diagonal().double().sum()) for name, K in layers.items()}
        }
        if target is not None:
            numbers["layer_alignment"] = {name: _aligned(K, target) for name, K in layers.items()}
        return numbers

    def signature(self) -> Tensor:
        """What changes are measured on: the matrix itself."""
        return self.K.sum(2) if self._diagonal else self.K


def _only(target: Tensor, c: int) -> Tensor:
    own = torch.zeros_like(target)
    own[:, c] = target[:, c]
    return own


def _aligned(K: Tensor, target: Tensor) -> float | None:
    return finite(alignment(K, target, centered=True)) if bool(K.any()) and bool(target.any()) else None


class MatrixFree:
    """A kernel known by its products; Frobenius products of two are estimated from the same random vectors."""

    def __init__(self, operator: KernelOperator, n: int) -> None:
        self._operator, self._n, self._size = operator, n, operator.shape[0]

    def spectral(self, k: int, shown: dict[str, Tensor | None], center: int) -> tuple[dict[str, Any], np.ndarray]:
        """Top k eigenpairs, energies, alignment with the targets (its norm of K estimated)."""
        found = spectrum(self._operator, k)
        if not float(found.eigenvalues.abs().max()) > 0:
            return _nothing(k, self._size, shown)
        numbers, vectors = _spectral(found, k, shown)
        target = shown.get("target")
        if target is not None:
            columns = target.reshape(self._size, -1)
            plain, centered = self.signature()
            for name, probes, Y in (
                ("alignment", plain, columns),
                ("alignment_centered", centered, self._center(columns)),
            ):
                square = float((probes**2).sum(0).mean())
                if name == "alignment":  # of the top pairs |K|^2 is known; only the rest is estimated
                    V = found.eigenvectors.to(probes)
                    square = float((found.eigenvalues**2).sum()) + float(
                        ((probes - V @ (V.T @ probes)) ** 2).sum(0).mean()
                    )
                norm = square**0.5 * float((Y.T @ Y).norm())
                numbers[name] = finite(float((Y * self._times(Y)).sum()) / norm) if norm > 0 else None
        return numbers, vectors

    def signature(self) -> tuple[Tensor, Tensor]:
        """K z and H K H z for random signs z: E |K z|^2 = |K|_F^2."""
        if not hasattr(self, "_signature"):
            draw = torch.Generator().manual_seed(0)
            Z = torch.randint(0, 2, (self._size, _PROBES), generator=draw).double() * 2 - 1
            Z = Z.to(self._operator.device)
            self._signature = self._times(Z), self._center(self._times(self._center(Z)))
        return self._signature

    def _times(self, v: Tensor) -> Tensor:
        return (self._operator @ v).double()

    def _center(self, v: Tensor) -> Tensor:
        """Without the mean over samples, per output."""
        v3 = v.reshape(self._n, -1, v.shape[1])
        return (v3 - v3.mean(0)).reshape(v.shape)


@dataclass(frozen=True)
class Change:
    """The kernel now, at first and before, as signatures; `elapsed` steps since the one before."""

    now: Any
    first: Any
    before: Any
    elapsed: int

    def numbers(self) -> dict[str, float | None]:
        """Distance, relative change, centered cosine to the first; velocity."""
        if isinstance(self.now, Tensor):
            if not bool(self.now.any()) or not bool(self.first.any()) or not bool(self.before.any()):
                return dict.fromkeys(("distance", "change", "cka", "velocity", "change_error"))
            difference = (self.now - self.first).double().norm() / self.first.double().norm()
            cosine, cka = alignment(self.now, self.first), alignment(self.now, self.first, centered=True)
            last, error = alignment(self.now, self.before), 0.0
        else:
            squares = ((self.now[0] - self.first[0]) ** 2).sum(0)
            norm = float((self.first[0] ** 2).sum(0).mean())
            if not norm > 0:
                return dict.fromkeys(("distance", "change", "cka", "velocity", "change_error"))
            difference = (squares.mean() / norm) ** 0.5
            cosine, last = _cosine(self.now[0], self.first[0]), _cosine(self.now[0], self.before[0])
            cka = _cosine(self.now[1], self.first[1])
            mean = float(squares.mean())
            error = float(squares.std()) / _PROBES**0.5 / mean if mean > 0 else 0.0
        return {
            "distance": finite(max(0.0, 1 - cosine)),
            "change": finite(float(difference)),
            "cka": finite(cka),
            "velocity": finite(max(0.0, 1 - last) / self.elapsed) if self.elapsed else None,
            "change_error": finite(error),
        }


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = float((a**2).sum() * (b**2).sum()) ** 0.5
    return float((a * b).sum()) / scale if scale > 0 else math.nan
