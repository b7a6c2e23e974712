"""The methods that are compared: importances times similarities, sums over checkpoints, and exact influence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.explanations.importances import Importance, target_importance, tracking_importance
from ntkit.explanations.influence import influence
from ntkit.explanations.representers import explain
from ntkit.explanations.surrogate import surrogate_importance
from ntkit.explanations.tracin import tracin
from ntkit.kernels.conjugate import ConjugateKernel
from ntkit.kernels.influence_kernel import InfluenceKernel
from ntkit.kernels.kernel import Kernel
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.tsai2023.tsai_setting import Trained, file_of, logistic, signed, tasks, trained

L2 = 3e-3  # of the surrogate
DAMPING = 0.01  # of the classical influence function
RIDGE = 1e-3  # of TRAK, relative to the mean of the kernel's diagonal

IMPORTANCES = ("surrogate", "target", "tracking")
KERNELS = ("last layer", "tangent kernel at the start", "tangent kernel at the end", "influence kernel")
NEW = "tracking x tangent kernel at the end"
EXISTING = ("TracIn", "representer points", "influence function", "TRAK")
EXACT = ("exact influence", "exact influence at weights 1/2")
METHODS = (
    *(f"{importance} x {KERNELS[2]}" for importance in IMPORTANCES),
    *(f"tracking x {kernel}" for kernel in KERNELS if kernel != KERNELS[2]),
    *EXISTING, "path kernel", *EXACT, "random",
)  # fmt: skip


class Scores:
    """Scores [m, n] of every method for one trained network, for the output in favor of the predicted class."""

    def __init__(self, at: Trained) -> None:
        self.at = at
        self.certificates: dict[str, float] = {}

    @cached_property
    def outputs(self) -> Tensor:
        """The network's outputs on the training set, [n, 1]."""
        with torch.no_grad():
            return self.at.network(self.at.x)

    @cached_property
    def importances(self) -> dict[str, Callable[[Kernel], Importance]]:
        """Global importance by name, given the kernel that it goes with."""
        at = self.at

        def soft(g: Tensor, f: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(g, f.sigmoid())

        return {
            "surrogate": lambda kernel: surrogate_importance(
                kernel(at.x).flatten(1), self.outputs.double(), loss=soft, l2=L2
            ),
            "target": lambda kernel: target_importance(at.network, at.x, at.y, logistic),
            "tracking": lambda kernel: tracking_importance(at.run),
        }

    @cached_property
    def start(self) -> torch.nn.Module:
        """The network before training."""
        import copy

        network = copy.deepcopy(self.at.network)
        self.at.run.load(network, 0)
        return network

    def kernel(self, name: str) -> Kernel:
        """A similarity by name."""
        if name == "last layer":
            return ConjugateKernel(self.at.network)
        if name == "influence kernel":
            return InfluenceKernel(self.at.network, (self.at.x, self.at.y), logistic, time=self.at.run, outputs=first)
        return TangentKernel(self.start if name.endswith("start") else self.at.network, first)

    def product(self, importance: str, kernel: str) -> Tensor:
        """Scores of a generalized representer."""
        similarity = self.kernel(kernel)
        alpha = self.importances[importance](similarity)
        for name, value in alpha.certificate.items():
            self.certificates[f"{importance} x {kernel}: {name}"] = value
        return explain(similarity, alpha, self.at.x, self.at.x_test, output=0).scores

    def of(self, method: str) -> Tensor:
        """Scores of a method for the output in favor of the predicted class, float64 [m, n]."""
        if method in EXACT:
            result = influence(
                self.at.run, self.at.x_test, self.at.sign, measure=signed, at=0.5 if method == EXACT[1] else 1.0
            )
            self.certificates |= {f"{method}: {name}": v for name, v in result.record().items() if isinstance(v, float)}
            return result.scores
        if method == "path kernel":
            path = PathKernel(self.at.run).decompose(self.at.x_test)
            self.certificates["path kernel: error"] = path.error
            scores = path.contributions[:, 0]
        elif method == "TracIn":
            scores = tracin(self.at.run, self.at.x_test, output=0).scores
        elif method == "TRAK":
            scores = self._trak()
        elif method == "random":
            scores = torch.randn(
                len(self.at.x_test), len(self.at.x), generator=torch.Generator().manual_seed(self.at.seed)
            )
        else:
            importance, kernel = {
                "representer points": ("surrogate", "last layer"),
                "influence function": ("target", "damped"),
            }.get(method) or tuple(method.split(" x "))
            scores = self._damped() if kernel == "damped" else self.product(importance, kernel)
        return scores.double() * self.at.sign.double()[:, None]

    def _damped(self) -> Tensor:
        """The influence function of Koh and Liang with the Gauss-Newton matrix and one damping."""
        at = self.at
        kernel = InfluenceKernel(at.network, (at.x, at.y), logistic, damping=DAMPING, outputs=first)
        return explain(kernel, target_importance(at.network, at.x, at.y, logistic), at.x, at.x_test, output=0).scores

    def _trak(self) -> Tensor:
        """TRAK of one model, with exact gradients instead of projected ones.

        Features are gradients of the margin of an example's own class, s_i f(x_i); scores
        k(x, X) (K + ridge)^-1 (1 - p), p the probability of the own class.
        """
        at, kernel = self.at, TangentKernel(self.at.network, first)
        own = torch.where(at.y > 0, 1.0, -1.0).double()
        K, across = kernel(at.x).double(), kernel(at.x_test, at.x).double()
        ridge = RIDGE * K.diagonal().mean() * torch.eye(len(K), dtype=torch.float64)
        solved = torch.linalg.solve(own[:, None] * K * own + ridge, (across * own).T).T
        return solved * (1 - (own * self.outputs[:, 0].double()).sigmoid())


def first(outputs: Tensor) -> Tensor:
    """The only output."""
    return outputs[:, 0]


def score_part(task: str, seed: int) -> StudyPart:
    """Scores of all methods for one trained network."""
    return StudyPart("scores", task, f"{file_of(task, seed)}-scores", _scores, (task, seed))


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each task and seed."""
    for task, seed in tasks(work):
        yield score_part(task, seed)


def _scores(work: Work, task: str, seed: int) -> Result:
    """Scores of each method, with the seconds it took, and what the run is like."""
    at = trained(work, task, seed)
    scores, seconds, arrays = Scores(at), {}, {}
    for method in METHODS:
        begin = time.process_time()
        arrays[method] = scores.of(method).float().numpy()
        seconds[method] = time.process_time() - begin
    test = at.network(at.x_test)[:, 0]
    right = (test > 0) == (at.data.y_test > 0)
    numbers = {
        "seconds": seconds,
        "certificates": scores.certificates,
        "steps": at.run.stop["step"],
        "loss": float(logistic(scores.outputs, at.y)),
        "train_error": float(((scores.outputs[:, 0] > 0) != (at.y > 0)).double().mean()),
        "test_error": 1 - float(right.double().mean()),
        "parameters": sum(p.numel() for p in at.network.parameters()),
    }
    return Result(numbers, {**arrays, "outputs": test.detach().numpy(), "right": right.numpy()})
