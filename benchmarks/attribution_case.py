"""The case of `benchmarks.attribution` and our methods: 300 digits, an MLP 64-32-10 in float64, SGD in batches of 50.

What is explained is the margin (log-odds of the right class) of 40 test points. Methods give scores [m, n], positive
where a training example raises the margin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import ntkit

TRAIN, TEST, BATCH, STEPS, SNAPSHOTS, OTHERS = 300, 40, 50, 300, 10, 10
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


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


def _flat(tree: dict[str, Tensor], kept: int) -> Tensor:
    return torch.cat([value.flatten(kept) for value in tree.values()], -1)


def tracin(case: Case) -> Tensor:
    """Products of the gradients of margin and loss, summed over snapshots: Pruthi et al. 2020."""
    total = torch.zeros(len(case.x_test), TRAIN, dtype=torch.float64)
    for step in snapshots():
        at = Derivatives(case, step)
        total -= case.setting.lr * at.margins() @ at.losses().T
    return total


# ---------------------------------------------------------------- all of ours


def of_other_runs(case: Case) -> Tensor:
    """The mean influence over runs from other initializations of half the steps, their training included."""
    every = [ntkit.influence(run, case.x_test, case.y_test).scores for _, run in case.others(STEPS // 2)]
    return torch.stack(every).mean(0)


def representers(case: Case, kernel: ntkit.Kernel, importance: ntkit.Importance) -> Tensor:
    """Scores of `ntkit.explain` for each output, times the derivative of the margin by that output, summed up."""
    outputs = case.model(case.x_test).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(margin(outputs, case.y_test).sum(), outputs)
    values = kernel(case.x_test, case.x)
    if values.dim() == 2:
        return values * (slopes @ importance.values.T)
    return torch.einsum("jc,jicd,id->ji", slopes, values, importance.values)


def influence_function(case: Case, **filtered: Any) -> Tensor:
    """Influence kernel and target importance."""
    kernel = ntkit.InfluenceKernel(case.model, (case.x, case.y), cross_entropy, **filtered)
    return representers(case, kernel, ntkit.target_importance(case.model, case.x, case.y, cross_entropy)) / TRAIN


def last_layer(case: Case, l2: float) -> Tensor:
    """Last-layer kernel and surrogate importance: representer points."""
    kernel = ntkit.ConjugateKernel(case.model)
    outputs = case.model(case.x).detach()
    return representers(case, kernel, ntkit.surrogate_importance(kernel(case.x), outputs, l2=l2))


def methods(case: Case) -> list[Method]:
    """Methods of the library, and two formulas for comparison."""
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
    add("ntkit", "influence kernel, early-stopped", lambda: influence_function(case, time=run))
    for d in DAMPINGS:
        add("ntkit", "influence kernel", lambda d=d: influence_function(case, damping=d), f"damping {d:g}")
    tracked = lambda: representers(case, ntkit.TangentKernel(case.model), ntkit.tracking_importance(run))
    add("ntkit", "tangent kernel, tracking importance", tracked)
    for l2 in (3e-3, 3e-2):
        add("ntkit", "last-layer kernel, surrogate importance", lambda l2=l2: last_layer(case, l2), f"L2 {l2:g}")
    add("formula", "TracIn", lambda: tracin(case), f"{SNAPSHOTS} snapshots")
    add("formula", "random scores", lambda: torch.randn(len(x), TRAIN, generator=generator).double())
    return found
