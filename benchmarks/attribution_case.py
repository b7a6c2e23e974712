"""The case of `benchmarks.attribution` and our methods: 300 digits, an MLP 64-32-10 in float64, SGD in batches of 50.

What is explained is the margin (log-odds of the right class) of 40 test points. Methods give scores [m, n], positive
where a training example raises the margin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot

import ntkit

TRAIN, TEST, BATCH, STEPS, SNAPSHOTS, OTHERS = 300, 40, 50, 300, 10, 10
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Setting(NamedTuple):
    """How the network is trained."""

    activation: type[nn.Module]
    lr: float
    momentum: float

    def __str__(self) -> str:
        momentum = f", momentum {self.momentum:g}" if self.momentum else ""
        return f"{self.activation.__name__}, learning rate {self.lr:g}{momentum}"


SETTINGS = {
    "tanh": Setting(nn.Tanh, 0.1, 0.0),
    "momentum": Setting(nn.ReLU, 0.03, 0.9),
    "chaotic": Setting(nn.ReLU, 1.0, 0.0),
}


class Method(NamedTuple):
    """One way to get scores, by the library or by a formula of this benchmark."""

    by: str
    name: str
    settings: str
    scores: Callable[[], Tensor]


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Log-odds of class y: f_y - log sum_{c != y} exp f_c, one per sample."""
    own = y[..., None] == torch.arange(outputs.shape[-1])
    value = (outputs * own).sum(-1)
    return value - torch.logsumexp(outputs.masked_fill(own, -torch.inf), -1)


@dataclass
class Case:
    """A setting's data and its recorded run."""

    setting: Setting
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    run: ntkit.Trajectory
    model: nn.Module

    @classmethod
    def of(cls, setting: Setting, test: int = TEST) -> Case:
        """Train the setting's network."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(images / 16)[order], torch.from_numpy(labels)[order]
        parts = (x[:TRAIN], y[:TRAIN], x[TRAIN : TRAIN + test], y[TRAIN : TRAIN + test])
        model = network(setting, 0)
        return cls(setting, *parts, train(setting, model, parts[0], parts[1], 0, STEPS), model)

    def others(self, steps: int) -> list[tuple[nn.Module, ntkit.Trajectory]]:
        """Runs from other initializations, in other orders."""
        result = []
        for seed in range(1, OTHERS + 1):
            model = network(self.setting, 1000 + seed)
            result.append((model, train(self.setting, model, self.x, self.y, 1000 + seed, steps)))
        return result

    def write(self, path: Path) -> None:
        """Write what the peers get: see `benchmarks.peers.attribution.measure`."""
        tensors = {"x": self.x, "y": self.y, "x_test": self.x_test, "y_test": self.y_test}
        tensors["lr"] = torch.tensor(self.setting.lr / (1 - self.setting.momentum))
        tensors["tanh"] = torch.tensor(int(self.setting.activation is nn.Tanh))
        states = {"initial": self.run.state(0), "final": self.run.state(STEPS)}
        for step in snapshots():
            states[f"snapshot-{step:03d}"] = self.run.state(step)
        for k, (model, _) in enumerate(self.others(STEPS)):
            states[f"other-{k:02d}"] = model.state_dict()
        for name, state in states.items():
            tensors |= {f"{name}:{parameter}": value.clone() for parameter, value in state.items()}
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)


def network(setting: Setting, seed: int) -> nn.Module:
    """A new network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), setting.activation(), nn.Linear(32, 10)).double()


def train(setting: Setting, model: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int) -> ntkit.Trajectory:
    """Train it, and record every step."""
    _, lr, momentum = setting
    sgd = lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)
    return ntkit.train(model, (x, y), cross_entropy, sgd, steps=steps, batch_size=BATCH, record="all", seed=seed)


def snapshots() -> range:
    """Steps whose networks TracIn looks at."""
    return range(STEPS // SNAPSHOTS, STEPS + 1, STEPS // SNAPSHOTS)


# ---------------------------------------------------------------- formulas that are compared


class Derivatives:
    """Derivatives of a network of the case at one state, with the parameters in one vector of P numbers."""

    def __init__(self, case: Case, step: int) -> None:
        self._case = case
        self._state = {name: value.detach() for name, value in case.run.state(step).items()}

    def _outputs(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self._case.model, state, (x[None],))[0]

    def margins(self) -> Tensor:
        """Of the test points' margins, [m, P]."""
        own = lambda state, x, y: margin(self._outputs(state, x)[None], y[None])[0]
        return _flat(vmap(grad(own), (None, 0, 0))(self._state, self._case.x_test, self._case.y_test), 1)

    def losses(self) -> Tensor:
        """Of the training examples' losses, [n, P]."""
        own = lambda state, x, y: cross_entropy(self._outputs(state, x), y)
        return _flat(vmap(grad(own), (None, 0, 0))(self._state, self._case.x, self._case.y), 1)

    def outputs(self) -> Tensor:
        """Of the outputs for the training examples, [n, C, P]."""
        return _flat(vmap(jacrev(self._outputs), (None, 0))(self._state, self._case.x), 2)

    def probabilities(self) -> Tensor:
        """Of the classes, [n, C]."""
        return torch.softmax(functional_call(self._case.model, self._state, (self._case.x,)), -1)


def _flat(tree: dict[str, Tensor], kept: int) -> Tensor:
    return torch.cat([value.flatten(kept) for value in tree.values()], -1)


def inverse_curvature(case: Case, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Influence function: margins^T f(G) losses / n, f a function of the eigenvalues of the Gauss-Newton matrix G."""
    end = Derivatives(case, STEPS)
    p, J = end.probabilities(), end.outputs()
    root = p.sqrt()[:, :, None] * (J - torch.einsum("nc,ncp->np", p, J)[:, None])  # diag(p) - p p^T = root^T root
    values, vectors = torch.linalg.eigh(root.flatten(0, 1).T @ root.flatten(0, 1) / TRAIN)
    return -((end.margins() @ vectors) * factor(values.clamp_min(0))) @ (end.losses() @ vectors).T / TRAIN


def early_stopped(case: Case) -> Tensor:
    """The influence function with (1 - exp(-t e)) / e for 1 / e, t the sum of the learning rates: Bae et al. 2024."""
    time = case.setting.lr / (1 - case.setting.momentum) * STEPS
    return inverse_curvature(case, lambda e: torch.where(e > 1e-12, -torch.expm1(-time * e) / e.clamp_min(1e-12), time))


def tracin(case: Case) -> Tensor:
    """Products of the gradients of margin and loss, summed over snapshots: Pruthi et al. 2020."""
    total = torch.zeros(len(case.x_test), TRAIN, dtype=torch.float64)
    for step in snapshots():
        at = Derivatives(case, step)
        total -= case.setting.lr * at.margins() @ at.losses().T
    return total


def tracking(case: Case) -> Tensor:
    """Summed negative slopes of the loss along the run, times the final kernel: Tsai, Yeh, Ravikumar 2023."""
    importance = torch.zeros(TRAIN, 10, dtype=torch.float64)
    for step in range(STEPS):
        rows = case.run.batch(step)
        p = torch.softmax(functional_call(case.model, case.run.state(step), (case.x[rows],)), -1)
        importance[rows] -= case.setting.lr / (1 - case.setting.momentum) * (p - one_hot(case.y[rows], 10)) / len(rows)
    end = Derivatives(case, STEPS)
    return end.margins() @ torch.einsum("ncp,nc->np", end.outputs(), importance).T


# ---------------------------------------------------------------- all of ours


def of_other_runs(case: Case) -> Tensor:
    """The mean influence over runs from other initializations of half the steps, their training included."""
    every = [ntkit.influence(run, case.x_test, case.y_test).scores for _, run in case.others(STEPS // 2)]
    return torch.stack(every).mean(0)


def methods(case: Case) -> list[Method]:
    """Methods of the library, and formulas for comparison that are not in it as functions of a run."""
    run, x, y = case.run, case.x_test, case.y_test
    generator = torch.Generator().manual_seed(0)
    found = []

    def add(by: str, name: str, scores: Callable[[], Tensor], settings: str = "") -> None:
        found.append(Method(by, name, settings, scores))

    add("ntkit", "influence", lambda: ntkit.influence(run, x, y).scores)
    add("ntkit", "influence, at=0.5", lambda: ntkit.influence(run, x, y, at=0.5).scores)
    add("ntkit", "influence, gauss-newton", lambda: ntkit.influence(run, x, y, curvature="gauss-newton").scores)
    add("ntkit", f"influence, mean of {OTHERS} other runs of half the steps", lambda: of_other_runs(case))
    add("ntkit", "path kernel", lambda: ntkit.PathKernel(run, outputs=margin).decompose(x, y).contributions[:, 0])
    add("formula", "influence function, early-stopped", lambda: early_stopped(case))
    for d in DAMPINGS:
        damped = lambda d=d: inverse_curvature(case, lambda e: 1 / (e + d))
        add("formula", "influence function", damped, f"damping {d:g}")
    add("formula", "TracIn", lambda: tracin(case), f"{SNAPSHOTS} snapshots")
    add("formula", "tracking importance, final kernel", lambda: tracking(case))
    add("formula", "random scores", lambda: torch.randn(len(x), TRAIN, generator=generator).double())
    return found
