"""Numbers of one kernel on one set of points, from its matrix or from products with vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import defined
from ntkit.kernels.kernel import KernelOperator
from ntkit.measures.spectra import Spectrum, alignment, spectrum

_PROBES = 32  # random vectors for Frobenius products of kernels that are not formed


def finite(value: float | None) -> float | None:
    """The number if it is finite (JSON has no other), else None."""
    return value if value is not None and math.isfinite(value) else None


def _spectral(pairs: Spectrum, k: int, values: dict[str, Tensor | None]) -> tuple[dict[str, Any], np.ndarray]:
    """Eigenvalues, numbers derived from them, and energies of [n, C] values."""
    # an eigenvalue up to `floor` is rounding in the precision of K, and so is the direction of its vector
    real = int((pairs.eigenvalues[:k] > pairs.floor).sum())
    eigenvalues = pairs.eigenvalues[:k].tolist()
    first, last = eigenvalues[0], eigenvalues[real - 1] if real else 0.0
    numbers = {
        "eigenvalues": [*eigenvalues[:real], *[None] * (k - real)],
        "residual": finite(float(pairs.residuals[:k].max())),
        "trace": pairs.trace,
        "tail": None if pairs.trace is None else pairs.trace - sum(eigenvalues),
        "effective_rank": None if pairs.trace is None or first <= 0 else pairs.trace / first,
        "condition": first / last if last > 0 else None,
        "status": pairs.status,
    }
    for name, v in values.items():
        if v is not None:
            energy = defined(pairs.energy, v)
            shares = [None] * k if energy is None else energy[:k].tolist()
            numbers[f"energy_{name}"] = [e if j < real else None for j, e in enumerate(shares)]
    return numbers, pairs.eigenvectors[:, :k].cpu().numpy()


def _zero_kernel(k: int, N: int, values: dict[str, Tensor | None]) -> tuple[dict[str, Any], np.ndarray]:
    """Numbers of a network whose kernel is zero: nearly all are undefined."""
    names = ("residual", "tail", "effective_rank", "condition", "alignment", "alignment_centered")
    numbers: dict[str, Any] = dict.fromkeys(names)
    numbers |= {"eigenvalues": [None] * k, "trace": 0.0, "status": "the kernel is zero"}
    numbers |= {f"energy_{name}": [None] * k for name, v in values.items() if v is not None}
    return numbers, np.full((N, k), np.nan)


class KernelMatrix:
    """Numbers of a Gram matrix [n, n], [n, n, C, C] or, `diagonal`, [n, n, C], and of its shares by parameter."""

    def __init__(self, K: Tensor, shares: dict[str, Tensor] | None = None, diagonal: bool = False) -> None:
        self.K, self._shares, self._diagonal = K, shares, diagonal

    def spectral(self, k: int, values: dict[str, Tensor | None], outputs: int) -> tuple[dict[str, Any], np.ndarray]:
        """Top k eigenpairs, energies, alignment with the targets."""
        N = len(self.K) * outputs
        if not bool(self.K.any()):
            return _zero_kernel(k, N, values)
        numbers, vectors = _spectral(spectrum(self.K, k if 3 * k <= N else None), k, values)
        target = values.get("target")
        if target is not None:
            numbers["alignment"] = defined(alignment, self.K, target)
            numbers["alignment_centered"] = defined(alignment, self.K, target, centered=True)
            if target.shape[1] > 1:
                place = torch.arange(target.shape[1], device=target.device)
                own = [target.where(place == c, 0) if outputs > 1 else target[:, c] for c in place]
                numbers["class_alignment"] = [defined(alignment, self.K, t, centered=True) for t in own]
        return numbers, vectors

    def layered(self, target: Tensor | None) -> dict[str, Any]:
        """Share of the trace and centered alignment of each layer."""
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
            aligned = {name: defined(alignment, K, target, centered=True) for name, K in layers.items()}
            numbers["layer_alignment"] = aligned
        return numbers

    def signature(self) -> Tensor:
        """The matrix itself, to measure changes."""
        return self.K.sum(2) if self._diagonal else self.K


class KernelProducts:
    """Numbers of a kernel from its products; norms are estimated with the same random vectors for all kernels."""

    def __init__(self, operator: KernelOperator, n: int) -> None:
        self._operator, self._n, self._size = operator, n, operator.shape[0]

    def spectral(self, k: int, values: dict[str, Tensor | None], outputs: int) -> tuple[dict[str, Any], np.ndarray]:
        """Top k eigenpairs, energies, alignment with the targets (its norm of K estimated)."""
        if (pairs := defined(spectrum, self._operator, k)) is None:
            return _zero_kernel(k, self._size, values)
        numbers, vectors = _spectral(pairs, k, values)
        target = values.get("target")
        if target is not None:
            columns = target.reshape(self._size, -1)
            plain, centered = self.signature()
            centered_columns = self._center(columns)
            for name, probes, Y in (("alignment", plain, columns), ("alignment_centered", centered, centered_columns)):
                square = float((probes**2).sum(0).mean())
                if name == "alignment":  # |K|^2 of the top pairs is exact; only the rest is estimated
                    V = pairs.eigenvectors.to(probes)
                    rest = ((probes - V @ (V.T @ probes)) ** 2).sum(0).mean()
                    square = float((pairs.eigenvalues**2).sum()) + float(rest)
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
        """Subtract the mean over samples, per output."""
        v3 = v.reshape(self._n, -1, v.shape[1])
        return (v3 - v3.mean(0)).reshape(v.shape)


def kernel_change(now: Any, first: Any, before: Any, elapsed: int) -> dict[str, float | None]:
    """Distance, relative change and centered cosine to the first kernel; velocity since the one `elapsed` steps before.

    The kernels are signatures of `KernelMatrix` or of `KernelProducts`.
    """
    zero = dict.fromkeys(("distance", "change", "cka", "velocity", "change_error"))
    if isinstance(now, Tensor):
        if not bool(now.any()) or not bool(first.any()) or not bool(before.any()):
            return zero
        change = (now - first).double().norm() / first.double().norm()
        cosine, cka = alignment(now, first), defined(alignment, now, first, centered=True)
        last, error = alignment(now, before), 0.0
    else:
        squares, norms = ((now[0] - first[0]) ** 2).sum(0), (first[0] ** 2).sum(0)
        mean, norm = float(squares.mean()), float(norms.mean())
        if not norm > 0:
            return zero
        change = (mean / norm) ** 0.5
        cosine, last, cka = _cosine(now[0], first[0]), _cosine(now[0], before[0]), _cosine(now[1], first[1])
        # of a ratio of two means from the same vectors, to first order
        error = float((squares / mean - norms / norm).std()) / _PROBES**0.5 if mean > 0 else 0.0
    return {
        "distance": finite(max(0.0, 1 - cosine)),
        "change": finite(float(change)),
        "cka": finite(cka),
        "velocity": finite(max(0.0, 1 - last) / elapsed) if elapsed else None,
        "change_error": finite(error),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = float((a**2).sum() * (b**2).sum()) ** 0.5
    return float((a * b).sum()) / scale if scale > 0 else math.nan
