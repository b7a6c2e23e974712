"""How far the network of an analysis is from the limit of infinite width: its first-order network, and its kernel."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import NoLimit, Refused, defined, fault
from ntkit.commands.kernel_measures import paired
from ntkit.commands.network_measures import TrainingTask, finite, outputs_of, rate, spread
from ntkit.commands.settings import Settings
from ntkit.jacobian.structure import SelfCheckError
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.spectra import alignment
from ntkit.networks.larger_copies import hidden_width
from ntkit.networks.linearization import linearized
from ntkit.trajectory import Trajectory, train

TESTS = 1_000  # test examples on which two networks are compared, at most
COST = 0.3  # of the first-order network's training, per example of every batch, in gradients of a sample
SAMPLES = {"closed form": 100, "maps": 24, "sampled": 12}  # on which the kernel is compared with its limit
NETWORKS = 8  # random wide networks where the limit has no closed form
LARGEST = 3e7  # parameters of those networks, at most
_NARROWEST = 256  # as `InfiniteKernel(sample=)` widens


def first_order(
    task: TrainingTask, model: nn.Module, trajectory: Trajectory, settings: Settings, affordable: float
) -> dict[str, Any]:
    """The network of first order in its parameters, trained with the same batches and optimizer, beside the real one.

    In the limit of infinite width, trained by gradient descent, both have the same outputs (Lee et al. 2019).

    Parameters
    ----------
    model : the network at initialization.
    affordable : gradients of a sample that this may take.

    Returns
    -------
    dict
        By snapshot, on test examples: ``distance`` = ||f_lin - f|| / ||f - f_0||, None where the latter is 0;
        ``test_loss``, and ``test_error`` unless it is a regression, of the first-order network (``first_order``) and
        of the real one (``network``); ``paired``, McNemar's test of their last errors. Or, under ``absent``, why not.
    """
    steps, batch = trajectory.stop["step"], trajectory.settings["batch_size"]
    if COST * steps * (batch or len(task.data.x_train)) > affordable:
        return {"absent": "training it would take longer than the rest of the report"}
    if trajectory.stop["reason"] == "diverged":
        return {"absent": "training diverged"}
    try:
        linear = linearized(model)
    except Refused as error:
        return {"absent": fault(error)}
    data, rows = task.data, spread(len(task.data.x_test), TESTS)
    x, y = data.x_test[rows], data.y_test[rows]
    try:
        run = train(
            linear, (data.x_train, data.y_train), task.loss, settings.make_optimizer, steps,
            batch_size=batch, seed=settings.seed,
        )  # fmt: skip
    except Refused as error:
        return {"absent": fault(error)}
    real, start = copy.deepcopy(model), outputs_of(model, x).double()
    result: dict[str, Any] = {"steps": [], "distance": [], "tests": len(x)}
    names = {"network": real, "first_order": linear}
    losses: dict[str, list[float | None]] = {name: [] for name in names}
    errors: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    wrong: dict[str, Tensor] = {}
    for step in sorted(set(trajectory.steps) & set(run.steps)):
        trajectory.load(real, step)
        run.load(linear, step)
        with torch.no_grad():
            outputs = {"network": outputs_of(real, x).double(), "first_order": _outputs(linear, x).double()}
        moved = float((outputs["network"] - start).norm())
        apart = float((outputs["network"] - outputs["first_order"]).norm())
        result["steps"].append(step)
        result["distance"].append(finite(apart / moved) if moved else None)
        for name, out in outputs.items():
            losses[name].append(finite(float(task.loss(out, y))))
            if data.targets is None:
                wrong[name] = (task.predict(out) != y).cpu()
                errors[name].append(rate(wrong[name], "test examples"))
    result["test_loss"] = losses
    if data.targets is None:
        result["test_error"] = errors
        result["paired"] = paired(wrong["first_order"].numpy(), wrong["network"].numpy())
    return result


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs [n, C] in batches."""
    return torch.cat([model(part).reshape(len(part), -1) for part in x.split(256)])


def kernel_beside_limit(task: TrainingTask, models: dict[str, nn.Module], affordable: float) -> dict[str, Any]:
    """The tangent kernel of the network beside that of infinitely wide ones, on a few training examples.

    Parameters
    ----------
    models : the network at initialization (``init``) and after training (``after``).
    affordable : gradients of a sample that the rest of the report takes; random wide networks may take half of that.

    Returns
    -------
    dict
        ``distance`` = ||K / C - limit|| / ||limit|| of the initial kernel K, the sum over C outputs, and ``cosines``
        with the limit before and after training, centered; ``error``, the limit's standard error over its norm, where
        ``networks`` random wide networks stand for it. Or, under ``absent``, why not.
    """
    model, x = copy.deepcopy(models["init"]).eval().cpu(), task.data.x_train.cpu()
    told: dict[str, Any] = {"networks": None, "error": None, "notes": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            maps = x.dim() > 2
            few = x[spread(len(x), SAMPLES["maps" if maps else "closed form"])]
            limit = InfiniteKernel(model)(_double(few))
        except NoLimit as error:
            told["why"] = fault(error)
            few = x[spread(len(x), SAMPLES["sampled"])]
            growth = _growth(model, few[:3])
            large = growth * sum(p.numel() for p in model.parameters()) > LARGEST
            if large or NETWORKS * len(few) * growth > affordable / 2:
                instead = "random wide networks would take too long here; ntkit infinite --sample 16 takes them"
                return {"absent": f"there is no closed form for it ({told['why']}), and {instead}"}
            try:
                estimate = InfiniteKernel(model, sample=NETWORKS).estimate(_double(few))
            except (Refused, SelfCheckError) as refused:
                return {"absent": fault(refused)}
            limit = estimate.mean
            told |= {"networks": NETWORKS, "error": finite(estimate.error), "biased": estimate.biased}
        except (Refused, SelfCheckError) as error:
            return {"absent": fault(error)}
    told["notes"] = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
    own = {
        key: TangentKernel(network, outputs="trace")(few.to(task.data.x_train.device)).double().cpu()
        for key, network in models.items()
    }
    told["samples"] = len(few)
    told["distance"] = finite(float((own["init"] / task.outputs - limit).norm() / limit.norm()))
    told["cosines"] = {key: defined(alignment, K, limit, centered=True) for key, K in own.items()}
    return told


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _growth(model: nn.Module, example: Tensor) -> float:
    """About how many times as many parameters a copy has whose narrowest hidden layer has `_NARROWEST` features."""
    try:
        return 4.0 ** max(1, math.ceil(math.log2(_NARROWEST / hidden_width(model, example))))
    except Refused:
        return 0.0  # what is wrong is said where the copies are made
