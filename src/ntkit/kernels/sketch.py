"""The sketched kernel: per-sample gradients folded to a few numbers by a random projection, with its standard error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, take
from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer
from ntkit.base.progress import task
from ntkit.base.shown import of_model
from ntkit.base.workers import product, workers
from ntkit.jacobian.engine import Engine, Job
from ntkit.jacobian.model_calls import Outputs, Params
from ntkit.jacobian.pairs import Whole
from ntkit.jacobian.structure import SelfCheckError, Structure
from ntkit.kernels.kernel import Kernel, KernelOperator, mirrored, refuse_operator_of_diagonal, written

# Numbers folded at a time: on a CPU they stay in its caches, on a GPU they keep it busy.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 26
_BATCHES = 4  # for each worker, from one report of progress to the next


class SketchedKernel(Kernel):
    """An unbiased estimate of the tangent kernel: phi(x1) phi(x2)^T with phi(x) = S J(x)^T in R^dim for every output.

    S is a random fold: the gradient entries of each parameter get random signs and are cut into blocks of `dim`, each
    block is rolled by a random shift of its own, and all blocks of all parameters are added up. S is never formed.

    Parameters
    ----------
    model, outputs, params, memory, select : as for `TangentKernel`. `memory` bounds the scratch of a batch; the
        features of all samples, n x C x dim numbers, come on top.
    dim : length of a feature vector. Errors shrink with 1 / sqrt(dim).
    seed : of the signs and shifts. These depend on it and on the parameter's name only: not on the data, the batch, the
        device, or which other parameters are chosen.

    Raises
    ------
    Refused
        As `TangentKernel` does, and for a `dim` that is no positive integer.
    SelfCheckError
        On first use of a model, when the sketched gradients of up to three samples do not have the norms that
        `TangentKernel` computes. A correct sketch fails with probability below 1e-9.

    Notes
    -----
    A count sketch (Charikar, Chen, Farach-Colton 2002) in blocks. Let h(p) be the bucket of entry p, s_p its sign, and
    u, v two gradients over all chosen parameters. Then phi_u . phi_v - u . v is the sum of s_p s_q u_p v_q over p != q
    with h(p) = h(q). Signs are independent of each other and of h: its mean is 0, and of its square only those terms
    have a mean in which a pair (p, q) meets itself or (q, p):

        Var = sum over p != q of P(h(p) = h(q)) (u_p^2 v_q^2 + u_p v_p u_q v_q).

    Two entries of one block never meet. Those of two blocks, of the same parameter or not, full or shorter than `dim`,
    meet with probability 1 / dim: the difference of their buckets holds that of two independent uniform shifts. So,
    with u_b the part of u in block b,

        Var = (|u|^2 |v|^2 + (u . v)^2 - sum_b (|u_b|^2 |v_b|^2 + (u_b . v_b)^2)) / dim,

    at most (K_ii K_jj + K_ij^2) / dim.

    A single block (one parameter of at most `dim` entries) is exact. The trace over outputs is a sum under one S; the
    same steps bound its variance by (<K_ii, K_jj> + <K_ij, K_ij^T>) / dim, in the C x C blocks of the exact kernel.

    Use it where the exact kernel's cost is n^2 P: nets with many positions (convolutions, tokens) and many samples; the
    sketch's is n P + n^2 dim. A convolutional net of 1.1 million parameters with 10 outputs, dim = 4096, float32, one
    CPU thread: on 100 images of 16 x 16 the full kernel takes 1.6 times the sketch's processor time, on 400 images 4.5
    times (99 s to 22 s), and so on in proportion to n, for a relative error of 2.6 % in the Frobenius norm. Do not use
    it for dense nets on vectors: nothing of size n x P is formed for their exact kernel.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    >>> SketchedKernel(model, dim=64, outputs="trace")(x)  # three entries in one block: exact
    tensor([[5., 2.],
            [2., 2.]])
    """

    _infinite = True

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        *,
        seed: int = 0,
        outputs: Outputs = "full",
        params: Params = None,
        memory: int | str | None = None,
        select: Callable[[Any], Any] | None = None,
    ) -> None:
        dim = as_integer(dim, "dim", "a positive integer", "Errors decrease as 1 / sqrt(dim).", least=1)
        seed = as_integer(seed, "seed", "an integer", "Each seed is another random projection.")
        self._engine = Engine(model, outputs, params, memory, select=select)
        self._mode, self._dim, self._seed = self._engine.mode, dim, seed
        self._trusted: list[Structure] = []  # graphs on which the self-check has passed

    def __repr__(self) -> str:
        engine = self._engine
        return of_model(type(self), engine.model, engine.params, dim=self._dim, outputs=engine.outputs)

    # ------------------------------------------------------------------ values

    @own_context()
    def features(self, x: Batch) -> Tensor:
        """phi(x), [n, C, dim]: entry (i, j, c, d) of the full kernel is phi(x1)[i, c] . phi(x2)[j, d]."""
        x = self._checked(x, "x")
        return self._finite(self._features(x), x)

    @own_context()
    def standard_error(self, x1: Batch, x2: Batch | None = None) -> Tensor:
        """Standard error of every entry of ``k(x1, x2)``, in its shape.

        The root of the variance bound in the class's notes, with sketched values in place of the exact ones. This is
        right to a relative error of order 1 / sqrt(dim) if there are far fewer outputs than `dim`, and too large where
        few blocks hold most of a gradient. It is for one entry: the errors of all entries come from one S, and are
        correlated.
        """
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        phi1, phi2 = self._both(x1, x2)
        # squares in float64: those of float16 overflow from 256 on and vanish below 2e-4
        own1, own2 = ((phi @ phi.transpose(1, 2)).double() for phi in (phi1, phi2))  # [n, C, C]
        if self._mode == "trace":
            square = own1.flatten(1) @ own2.flatten(1).T
            n2, outputs = phi2.shape[:2]
            step = max(1, int(self._engine.memory() * 0.3 / (3 * 8 * n2 * outputs**2)))
            for i in range(0, len(phi1), step):
                block = torch.einsum("icm,jdm->ijcd", phi1[i : i + step], phi2).double()
                square[i : i + step] += (block * block.transpose(2, 3)).sum((2, 3))
            square = mirrored(square) if x2 is None else square
        else:
            square = self._product(phi1, phi2, symmetric=x2 is None).double().square()
            norm1, norm2 = own1.diagonal(dim1=1, dim2=2), own2.diagonal(dim1=1, dim2=2)  # [n, C]
            full = self._mode == "full"
            square += norm1[:, None, :, None] * norm2[None, :, None] if full else norm1[:, None] * norm2
        return self._finite((square.clamp(min=0) / self._dim).sqrt().to(phi1), x1, x2)

    def settings(self) -> dict[str, Any]:
        """Those of the tangent kernel, and the random projection."""
        return self._engine.settings() | {"dim": self._dim, "seed": self._seed}

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x, x): two products with the features."""
        if self._mode == "diagonal":
            raise refuse_operator_of_diagonal()
        phi = self._flat(self.features(x))
        return KernelOperator(len(phi), lambda v: phi @ (phi.T @ v), lambda: phi.square().sum(1), phi)

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        return written(self._product(*self._both(x1, x2), symmetric=x2 is None), out)

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        phi1, phi2 = self._both(x1, x2)
        if self._mode == "full":
            return phi1 @ phi2.transpose(1, 2)
        return (phi1 * phi2).sum(2 if self._mode == "diagonal" else (1, 2))

    def _product(self, phi1: Tensor, phi2: Tensor, symmetric: bool) -> Tensor:
        if self._mode == "diagonal":
            values = torch.bmm(phi1.transpose(0, 1), phi2.permute(1, 2, 0))  # [C, n1, n2]
        else:
            values = product(self._flat(phi1), self._flat(phi2).T)
        values = mirrored(values) if symmetric else values
        if self._mode == "full":
            return values.unflatten(0, phi1.shape[:2]).unflatten(2, phi2.shape[:2]).transpose(1, 2)
        return values.permute(1, 2, 0) if self._mode == "diagonal" else values

    def _flat(self, phi: Tensor) -> Tensor:
        """The kernel's feature map as a matrix: [n * C, dim] of the full kernel, [n, C * dim] of the trace."""
        return phi.flatten(0, 1) if self._mode == "full" else phi.flatten(1)

    def _both(self, x1: Batch, x2: Batch | None) -> tuple[Tensor, Tensor]:
        phi1 = self._features(x1)
        phi2 = phi1 if x2 is None else self._features(x2)
        if phi1.shape[1] != phi2.shape[1]:
            got = f"{phi2.shape[1]} outputs"
            raise refusal("x2", got=got, expected=f"{phi1.shape[1]}, as for x1", fix="Use inputs of one shape.")
        return phi1, phi2

    # ------------------------------------------------------------------ the sketch

    @torch.inference_mode(False)  # or what is cut out here could not go through the model with grad on
    @torch.no_grad()
    def _features(self, x: Batch) -> Tensor:
        engine, n, done = self._engine.refresh(), count(x), 0
        largest = max(p.numel() for p in engine.params.values())
        shape = (n, engine.structure(x).outputs, self._dim)
        phi = torch.empty(shape, dtype=engine.dtype, device=engine.like.device)

        def next_samples(job: Job) -> int:
            if not any(job.left is trusted for trusted in self._trusted):
                self._self_check(x, job.left)
                self._trusted.append(job.left)
            # the entries of one parameter at a time, twice: some are copied into their order
            size = engine.batch_size(job, 0.3, 2 * largest)
            stop = min(n, done + _BATCHES * workers() * size)
            parts = [slice(i, min(i + size, stop)) for i in range(done, stop, size)]

            def keep(part: slice, factors: dict[str, Whole]) -> None:
                phi[part] = self._sketch(factors)

            engine.each_batch(x, parts, job.left, keep)
            return stop

        with task("sketched kernel", total=n) as progress:
            while done < n:
                last, done = done, engine.run(next_samples, x)
                progress.advance(done - last)
        return phi

    def _sketch(self, factors: dict[str, Whole], squared: bool = False) -> Tensor:
        """Features of a batch, [n, C, dim], or, if `squared`, S * S applied to the squares of the entries."""
        # narrower numbers would lose what is added to a long sum
        wide = torch.promote_types(self._engine.dtype, torch.float32)
        total: Tensor | None = None
        for name, factor in factors.items():  # the entries of one parameter after the other are formed, folded, let go
            rows = factor.rows()
            if total is None:
                total = torch.zeros(*rows.shape[:2], self._dim, dtype=wide, device=rows.device)
            values = rows.flatten(0, 1)
            signs, shifts = _draw(self._seed, name, values.shape[1], self._dim)
            if squared:
                values, signs = values.to(wide).square(), signs.square()
            _fold(values, signs, shifts, total.view(-1, self._dim))
        assert total is not None
        return total

    def _self_check(self, x: Batch, structure: Structure) -> None:
        """Raise unless S has one sign in every column, and the sketched gradients the norms they should have.

        Given the shifts, |phi|^2 is a sum over buckets of Z_b^2, Z_b independent sums of signed entries with mean
        square w_b: the bucket's energy, which (S * S) u^2 gives. Its mean, sum w_b, is |u|^2, exactly. With x > 0,

            P(|phi|^2 > |u|^2 + 2 sqrt(x sum w_b^2) + 2 x max w_b) <= exp(-x),

        since Z_b has no larger exponential moments than a normal variable of its variance (Laurent, Massart 2000), and

            P(|phi|^2 < |u|^2 - sqrt(6 x sum w_b^2)) <= exp(-x),

        since it is a sum of independent terms >= 0 with E Z_b^4 <= 3 w_b^2 (Maurer 2003).
        """
        chosen = sorted({0, count(x) // 2, count(x) - 1})
        single = [self._engine.factors(take(x, [i]), structure) for i in chosen]
        norm = torch.cat([self._sketch(factors).square().sum(2) for factors in single])  # [n, C]
        energy = torch.cat([self._sketch(factors, squared=True) for factors in single])  # [n, C, dim]
        mass, exact = energy.sum(2), self._engine.pairs(take(x, chosen)).to(energy.dtype)
        slack = torch.finfo(self._engine.dtype).eps ** 0.5 * exact.abs().max()
        if self._mode == "full":
            exact = exact.diagonal(dim1=1, dim2=2)
        error = ((mass.sum(1) if self._mode == "trace" else mass) - exact).abs().max()
        if not error <= slack:
            raise SelfCheckError(
                "the sketch does not hold every gradient entry once: squared norms of the samples checked are off by "
                f"{error:.3g} of {exact.max():.3g}. No kernel was computed. Use TangentKernel, and please report the "
                "model."
            )
        rate = math.log(2e9 * mass.numel())  # both sides of all norms together hold but with probability 1e-9
        spread = energy.square().sum(2)
        above = norm - mass - 2 * (rate * spread).sqrt() - 2 * rate * energy.amax(2)
        below = mass - norm - (6 * rate * spread).sqrt()
        if not torch.maximum(above, below).max() <= slack:
            raise SelfCheckError(
                "the sketched gradients of the samples checked have norms that a correct sketch has with probability "
                f"below 1e-9: squared {norm.flatten()[:3].tolist()}, exactly {mass.flatten()[:3].tolist()}. "
                "No kernel was computed. Use TangentKernel, and please report the model."
            )


def _draw(seed: int, name: str, entries: int, dim: int) -> tuple[Tensor, Tensor]:
    """Signs [entries] (+1, -1) and one shift per block of `dim`, from seed and name, on the CPU: 1 ns an entry or less.

    A counter-based generator with a key of 128 bits: no two parameters share a stream, as 32-bit seeds would let them.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    stream = np.random.Philox(key=key)
    bits = np.unpackbits(stream.random_raw(-(-entries // 64)).view(np.uint8), count=entries)
    shifts = stream.random_raw(-(-entries // dim)) % np.uint64(dim)
    return torch.from_numpy(bits.view(np.int8)).mul_(2).sub_(1), torch.from_numpy(shifts.astype(np.int64))


def _fold(values: Tensor, signs: Tensor, shifts: Tensor, total: Tensor) -> None:
    """Add the sketch of `values` [R, entries] to `total` [R, dim]; entry p goes to (p + shift of its block) mod dim."""
    rows, dim = total.shape
    signs, full = signs.to(total.device), values.shape[1] // dim
    ring = torch.arange(dim, device=total.device).repeat(2).unfold(0, dim, 1)  # row r: r, r + 1, ... mod dim
    starts = (dim - shifts).to(total.device)
    step = max(1, _CHUNK.get(total.device.type, _CHUNK_ELSEWHERE) // (rows * dim))
    for first in range(0, full, step):
        last = min(first + step, full)
        cut = slice(first * dim, last * dim)
        signed = values[:, cut].to(total.dtype) * signs[cut].to(total.dtype)
        source = ring[starts[first:last]] + dim * torch.arange(last - first, device=total.device)[:, None]
        total += signed.index_select(1, source.flatten()).view(rows, last - first, dim).sum(1)
    if values.shape[1] > full * dim:  # the last block is shorter: in two pieces, before and after it wraps round
        rest = values[:, full * dim :].to(total.dtype) * signs[full * dim :].to(total.dtype)
        shift = int(shifts[-1])
        before = min(rest.shape[1], dim - shift)
        total[:, shift : shift + before] += rest[:, :before]
        total[:, : rest.shape[1] - before] += rest[:, before:]
