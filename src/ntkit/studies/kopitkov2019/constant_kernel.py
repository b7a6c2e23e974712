"""Whether alignment improves the optimization: the same steps with a kernel that does not change, in closed form."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.tangent import TangentKernel
from ntkit.studies.claim import FALLS, Claim, Condition, mean
from ntkit.studies.kopitkov2019.kopitkov_setting import DEPTHS, DISPLACED, LearnedPicture, displaced, text
from ntkit.studies.part import Result
from ntkit.studies.study import Results


def losses(K: Tensor, residual: Tensor, steps: Sequence[int], lr: float, decay: int) -> list[float]:
    """Half the mean square of prod_t (I - lr_t K / n) residual, with lr_t = lr, halved from step `decay` on.

    Parameters
    ----------
    K : [n, n], float64.
    residual : [n], before the first step.
    steps : where the loss is wanted.

    Examples
    --------
    >>> K = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> losses(K, torch.ones(2, dtype=torch.float64), [0, 1, 2], lr=1.0, decay=1)
    [0.5, 0.0625, 0.03515625]
    """
    n = len(K)
    values, vectors = torch.linalg.eigh((K + K.T) / 2)
    parts = vectors.T @ residual
    found = []
    for step in steps:
        early = min(step, decay)
        factors = (1 - lr * values / n) ** early * (1 - 0.5 * lr * values / n) ** (step - early)
        found.append(float(((factors * parts) ** 2).sum()) / (2 * n))
    return found


def constant_kernel(at: LearnedPicture, steps: Sequence[int], lr: float, decay: int) -> dict[str, Any]:
    """Losses along the steps with the first kernel and with the last one, scaled to the trace of the first.

    The last kernel at the first one's size shows what its directions alone do. Both for the learned picture and for
    the displaced one, from the network's initial outputs.
    """
    x, side = at.x.double(), math.isqrt(len(at.x))
    kernels, start = {}, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for name, step in (("first", steps[0]), ("last", steps[-1])):
        at.run.load(at.model, step)
        network = copy.deepcopy(at.model).double()
        K = TangentKernel(network, "trace")(x)
        assert isinstance(K, Tensor)
        kernels[name] = K
        if name == "first":
            start = network(x).detach().squeeze(1)
    kernels["last"] = kernels["last"] * (kernels["first"].trace() / kernels["last"].trace())
    targets = {"learned": at.y.double(), DISPLACED: displaced(at.y.double(), side)}
    return {
        name: {what: losses(K, start - y.squeeze(1), steps, lr, decay) for what, y in targets.items()}
        for name, K in kernels.items()
    }


def ratios(runs: Sequence[Result], kernel: str, what: str = "learned") -> np.ndarray:
    """Logarithm (base 10) of a loss at the end over that with the first kernel; `kernel` "changing": the run's own."""
    found = []
    for r in runs:
        told = r.numbers["constant_kernel"]
        end = r.numbers["series"]["loss"][-1] if kernel == "changing" else told[kernel][what][-1]
        found.append(math.log10(end / told["first"][what][-1]))
    return np.array(found)


def claims(results: Results) -> Iterator[Claim]:
    """The run against the constant first kernel; the last kernel's directions at the first one's size."""
    deep = DEPTHS[-1]
    by_picture = {name: runs for (name, depth), runs in results["picture"].items() if depth == deep}
    for name, runs in by_picture.items():
        end = mean([r.numbers["series"]["loss"][-1] for r in runs]).value
        constant = mean([r.numbers["constant_kernel"]["first"]["learned"][-1] for r in runs]).value
        change = ratios(runs, "changing")
        yield Claim(
            f"The change of the kernel improves the optimization: {name}",
            f"loss at the end {end:.2g}, with the constant first kernel {constant:.2g}; logarithm of the ratio "
            f"{text(change)}",
            [Condition("it is", [mean(change)], FALLS)],
            f"depth {deep}; the same steps and learning rates, base 10, closed form in function space",
        )
    for name, runs in by_picture.items():
        own, copied = ratios(runs, "last"), ratios(runs, "last", DISPLACED)
        yield Claim(
            f"Its new directions alone improve it, for the function that was learned: {name}",
            f"logarithm of the loss with the last kernel, scaled to the trace of the first, over that with the first: "
            f"{text(own)}; for the same picture displaced {text(copied)}",
            [
                Condition("it is", [mean(own)], FALLS),
                Condition("less that of the displaced picture it is", [mean(own - copied)], FALLS),
            ],
            f"depth {deep}; constant kernels, same steps and learning rates, closed form",
        )
