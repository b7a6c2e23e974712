"""Figure 3: learning one kernel principal component of a batch of digits, by networks of growing width."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ntkit.data import load
from ntkit.measures.spectra import spectrum
from ntkit.studies.jacot2018.setting import BETA, Part, Work, descend, limit, network, sizes
from ntkit.studies.judged import device

DEPTHS = (4, 5)  # the paper does not say: its eigenvalues decide
DEPTH = 5  # of the networks trained
WIDE_BETA = 1.0
TOP = 3
SIZE = 0.5  # of the component that is learned
PAPER = (0.0457, 0.00108, 0.00078)
POINTS = 100  # of the curves


def digits(work: Work, name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of images with pixels in [0, 1], [N, pixels] float64, and their labels."""
    data = load(name, None if name == "digits" else work.data_dir)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))[: sizes(work).batch]
    return data.x_train[order].flatten(1).double().to(device()), data.y_train[order]


def components(x: Tensor, depth: int, beta: float = BETA) -> tuple[Tensor, Tensor, float]:
    """Top eigenvalues of Theta_inf / N, [3], eigenvectors with mean square 1, [N, 3], and their largest residual."""
    found = spectrum(limit(depth, x, beta=beta), k=TOP)
    return found.eigenvalues / len(x), found.eigenvectors * len(x) ** 0.5, float(found.residuals.max())


def eigenvalues(work: Work, name: str) -> Part:
    """Eigenvalues for both depths and betas over random batches; of the first batch the components themselves."""
    return work.kept(f"eigenvalues-{name}", f"{name}: eigenvalues of the limit", lambda: _eigenvalues(work, name))


def _eigenvalues(work: Work, name: str) -> Part:
    s = sizes(work)
    values: dict[str, list[list[float]]] = {f"{d} {b}": [] for d in DEPTHS for b in (BETA, WIDE_BETA)}
    residual = 0.0
    for seed in range(s.batches):
        x, _ = digits(work, name, seed)
        for depth in DEPTHS:
            for beta in (BETA, WIDE_BETA):
                found, _, off = components(x, depth, beta)
                values[f"{depth} {beta}"].append(found.tolist())
                residual = max(residual, off)
    x, labels = digits(work, name)
    vectors = components(x, DEPTH)[1]
    numbers = {"values": values, "residual": residual, "mean_1": float(vectors[:, 0].mean().abs())}
    return Part(numbers, {"components": vectors.cpu().numpy(), "labels": labels.numpy()})


def learned(work: Work, name: str, width: int, seed: int) -> Part:
    """One network on its way from f_0 to f_0 + f^(2) / 2: what is left along the component, and beside it.

    With r_t = f_t - f* and <.,.> the mean over the batch, g_t = <r_t, f^(2)> and |h_t|^2 = |r_t|^2 - g_t^2.
    """
    return work.kept(
        f"component-{name}-{width}-seed-{seed}",
        f"{name}: one component, width {width}, seed {seed}",
        lambda: _learned(work, name, width, seed),
    )


def _learned(work: Work, name: str, width: int, seed: int) -> Part:
    s = sizes(work)
    x, _ = digits(work, name)
    second = components(x, DEPTH)[1][:, 1]
    x = x.float()
    twin = network(x, width, DEPTH, seed)
    with torch.no_grad():
        target = twin.model(x)[:, 0] + SIZE * second.float()
    every = max(1, s.component_steps // POINTS)
    steps: list[int] = []
    left: list[Tensor] = []

    def watch(step: int, out: Tensor) -> None:
        if step % every == 0 or step == s.component_steps:
            steps.append(step)
            left.append((out - target).double().cpu())

    rates = [_along(twin(x), second)]
    descend(twin, x, target, s.component_steps, watch)
    rates.append(_along(twin(x), second))
    rest = torch.stack(left)
    g = rest @ second.cpu() / len(x)
    beside = rest - g[:, None] * second.cpu()
    h = beside.square().mean(1).sqrt()
    certified = float((g.square() + h.square() - rest.square().mean(1)).abs().max())
    numbers = {"steps": steps, "rates": rates, "pythagoras": certified}
    return Part(numbers, {"g": g.abs().numpy(), "h": h.numpy()})


def _along(K: Tensor, f: Tensor) -> float:
    """Rate at which a kernel learns a component, <f, K f> / N^2 with <f, f> = N; lambda for its own."""
    return float(f @ K.double() @ f) / len(f) ** 2


def expected(rate: float, steps: np.ndarray) -> np.ndarray:
    """What is left of the component at infinite width, SIZE exp(-rate t)."""
    return SIZE * np.exp(-rate * steps)
