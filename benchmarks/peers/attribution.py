"""Attribution by dattri 0.3.0, captum 0.9.0 and traker 0.3.2: scores of one recorded run, with the peers' environment.

`measure` writes a run to a safetensors file and starts this script once per library; `benchmarks.attribution` calls it.
Every method is called twice, and the second call counts. Scores are [m, n], positive where a training example
raises the margin.

What it takes to give the peers their best form:

- Methods with a damping, a ridge or a dimension run with several; the table names the best one of each.
- What is explained is the margin wherever a library lets the test function differ from the loss: dattri's
  ``target_func`` and captum's ``test_loss_fn`` are minus the margin. Their scores then are about minus the margin, and
  rise where an example lowers it. captum's influence functions ignore ``test_loss_fn`` (the scores are the same): they
  explain the loss. Its TracIn runs on both.
- dattri wants functions of a batch for influence functions and of one sample for TRAK. Its Arnoldi gives NaN as it
  comes: a projection of 20 dimensions does not.
- dattri's LiSSA turns labels to float; the loss turns them back.
- TRAK is noise where the projection has as many dimensions as there are examples and the ridge is 0: so 128
  dimensions, or a ridge. The libraries scale projections in their own ways, so each has its own ridges.
- TRAK is meant for several networks: besides the run's end it gets its 10 snapshots, and 10 other runs.
- captum 0.9.0 keeps `ArnoldiInfluenceFunction` in a private module.
- traker scores only what lies in its folder: ``load_from_save_dir=False`` fails at scoring. With 64 dimensions and one
  network its projector loses its matrix.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import job as jobs
from benchmarks.peers.setup import interpreter

LIBRARIES = {"captum": "captum", "dattri": "dattri", "traker": "traker"}  # name -> distribution
Method = tuple[str, str, Callable[[], Tensor]]  # method, its settings, work


# ---------------------------------------------------------------- the child


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Log-odds of class y: f_y - log sum_{c != y} exp f_c, one per sample."""
    own = y[..., None] == torch.arange(outputs.shape[-1])
    return (outputs * own).sum(-1) - torch.logsumexp(outputs.masked_fill(own, -torch.inf), -1)


class MinusMargin(nn.Module):
    """A loss for captum, which asks losses for their reduction."""

    reduction = "sum"

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Sum over the samples."""
        return -margin(outputs, y).sum()


class Run:
    """A recorded run as read from the file: data, networks at its end, at its snapshots and at the end of others."""

    def __init__(self, path: str) -> None:
        from safetensors.torch import load_file

        tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        self.x, self.y, self.x_test, self.y_test = (tensors[name] for name in ("x", "y", "x_test", "y_test"))
        self.n, self.m, self.rate = len(self.x), len(self.x_test), float(tensors["lr"])
        self._activation = nn.Tanh if int(tensors["tanh"]) else nn.ReLU
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if ":" in name:
                group, parameter = name.split(":")
                groups.setdefault(group, {})[parameter] = value
        self._states = groups
        self.model = self.network("final")
        self.snapshots = [self.network(name) for name in sorted(groups) if name.startswith("snapshot")]
        self.others = [self.network(name) for name in sorted(groups) if name.startswith("other")]
        self.train = DataLoader(TensorDataset(self.x, self.y), batch_size=100, shuffle=False)
        self.test = DataLoader(TensorDataset(self.x_test, self.y_test), batch_size=self.m, shuffle=False)

    def network(self, name: str) -> nn.Module:
        """A network with the weights of that name."""
        state = self._states[name]
        hidden, inputs = state["0.weight"].shape
        model = nn.Sequential(nn.Linear(inputs, hidden), self._activation(), nn.Linear(hidden, len(state["2.bias"])))
        model.load_state_dict(state)
        return model.eval()


def of_dattri(run: Run) -> Iterator[Method]:
    """Influence functions, TracIn and its kin, TRAK, representer points."""
    from dattri.algorithm import influence_function as functions
    from dattri.algorithm.rps import RPSAttributor
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = run.model

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, batch[0]), batch[1].long())

    def target(params: Any, batch: Any) -> Tensor:
        return -margin(torch.func.functional_call(model, params, batch[0]), batch[1]).mean()

    def one_margin(params: Any, sample: Any) -> Tensor:
        return margin(torch.func.functional_call(model, params, sample[0][None]), sample[1][None]).sum()

    def correct(params: Any, sample: Any) -> Tensor:
        outputs = torch.func.functional_call(model, params, sample[0][None])
        return torch.exp(-F.cross_entropy(outputs, sample[1][None]))

    def task(networks: list[nn.Module], function: Any = loss, of_test: Any = target) -> Any:
        states = [network.state_dict() for network in networks]
        return AttributionTask(loss_func=function, model=model, checkpoints=states, target_func=of_test)

    def scores(attributor: Any, cached: bool = True) -> Tensor:
        if cached:
            attributor.cache(run.train)
        with torch.no_grad():
            return attributor.attribute(run.train, run.test).T

    def inverse(kind: Any, **options: Any) -> Callable[[], Tensor]:
        return lambda: scores(kind(task=task([model]), device="cpu", **options))

    def tracin(networks: list[nn.Module], weight: float, normalized: bool) -> Callable[[], Tensor]:
        weights = torch.full((len(networks),), weight)
        return lambda: scores(
            TracInAttributor(task=task(networks), weight_list=weights, normalized_grad=normalized, device="cpu"), False
        )

    def trak(networks: list[nn.Module], dimensions: int, ridge: float) -> Callable[[], Tensor]:
        def work() -> Tensor:
            attributor = TRAKAttributor(
                task=task(networks, one_margin, one_margin), correct_probability_func=correct, regularization=ridge,
                projector_kwargs={"proj_dim": dimensions, "device": "cpu"}, device="cpu",
            )  # fmt: skip
            attributor.cache(run.train)
            with torch.no_grad():
                return attributor.attribute(run.test).T

        return work

    def representers(l2: float) -> Callable[[], Tensor]:
        def work() -> Tensor:
            of_outputs = AttributionTask(loss_func=F.cross_entropy, model=model, checkpoints=model.state_dict())
            attributor = RPSAttributor(
                task=of_outputs, final_linear_layer_name="2", normalize_preactivate=False, l2_strength=l2, epoch=200,
                device="cpu",
            )  # fmt: skip
            attributor.cache(run.train)
            return attributor.attribute(run.train, run.test).T

        return work

    for damping in (1e-2, 3e-2, 1e-1, 3e-1):
        yield "IF explicit", f"{damping:g}", inverse(functions.IFAttributorExplicit, regularization=damping)
        yield (
            "IF CG",
            f"{damping:g}, 30 iterations",
            inverse(functions.IFAttributorCG, max_iter=30, regularization=damping),
        )
        yield "EK-FAC", f"{damping:g}", inverse(functions.IFAttributorEKFAC, module_name=["0", "2"], damping=damping)
        yield "DataInf", f"{damping:g}", inverse(functions.IFAttributorDataInf, regularization=damping)
        yield (
            "IF Arnoldi",
            f"{damping:g}, dimension 20",
            inverse(functions.IFAttributorArnoldi, proj_dim=20, max_iter=20, regularization=damping),
        )
    for damping in (1e-2, 1e-1):
        yield (
            "IF LiSSA",
            f"{damping:g}",
            inverse(functions.IFAttributorLiSSA, recursion_depth=100, batch_size=50, damping=damping),
        )
    yield "TracIn", "10 snapshots", tracin(run.snapshots, run.rate, False)
    yield "Grad-Dot", "", tracin([model], 1.0, False)
    yield "Grad-Cos", "", tracin([model], 1.0, True)
    for what, networks in (("1 network", [model]), ("10 snapshots", run.snapshots), ("10 other runs", run.others)):
        for dimensions, ridge in ((128, 0.0), (512, 0.01), (512, 0.03), (512, 0.1), (512, 0.3), (2048, 0.1)):
            yield f"TRAK, {what}", f"dimension {dimensions}, ridge {ridge:g}", trak(networks, dimensions, ridge)
    for l2 in (3e-4, 3e-3, 3e-2):
        yield "representer points", f"L2 {l2:g}", representers(l2)


def of_captum(run: Run) -> Iterator[Method]:
    """Influence functions and TracIn, for the loss and for the margin of the test points."""
    from captum.influence import NaiveInfluenceFunction, TracInCP, TracInCPFast
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    folder = tempfile.mkdtemp()
    names = [f"{folder}/{k}.pt" for k in range(len(run.snapshots))]
    for name, network in zip(names, run.snapshots, strict=True):
        torch.save(network.state_dict(), name)
    data, points = TensorDataset(run.x, run.y), (run.x_test, run.y_test)

    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return run.rate

    def influences(kind: Any, margins: bool, checkpoints: Any, **options: Any) -> Callable[[], Tensor]:
        def work() -> Tensor:
            model, loss = run.network("final"), nn.CrossEntropyLoss(reduction="sum")
            layer = (model[2],) if kind is TracInCPFast else ()
            of_test = {"test_loss_fn": MinusMargin() if margins else loss}
            return kind(
                model, *layer, data, checkpoints, checkpoints_load_func=load, loss_fn=loss, batch_size=100, **of_test,
                **options,
            ).influence(points)  # fmt: skip

        return work

    each = {"sample_wise_grads_per_batch": True}
    for margins, what in ((False, "loss"), (True, "margin")):
        yield "TracInCP", f"10 snapshots, {what}", influences(TracInCP, margins, names, **each)
        yield "TracInCPFast", f"10 snapshots, {what}", influences(TracInCPFast, margins, names)
    for damping, dimension in ((1e-3, 60), (1e-3, 100), (1e-3, 200), (10.0, 1000), (30.0, 1000)):
        yield (
            "NaiveInfluenceFunction",
            f"{damping:g}, dimension {dimension}",
            influences(NaiveInfluenceFunction, False, names[-1], projection_dim=dimension, hessian_reg=damping, **each),
        )
    for dimension in (40, 80):
        yield (
            "ArnoldiInfluenceFunction",
            f"dimension {dimension}",
            influences(
                ArnoldiInfluenceFunction, False, names[-1], arnoldi_dim=2 * dimension, projection_dim=dimension, **each
            ),
        )


def of_traker(run: Run) -> Iterator[Method]:
    """TRAK."""
    from trak import TRAKer

    def trak(networks: list[nn.Module], dimensions: int, ridge: float) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with tempfile.TemporaryDirectory() as folder:
                traker = TRAKer(
                    model=run.model, task="image_classification", train_set_size=run.n, save_dir=folder, device="cpu",
                    proj_dim=dimensions, use_half_precision=False, lambda_reg=ridge, logging_level=50,
                )  # fmt: skip
                for k, network in enumerate(networks):
                    traker.load_checkpoint(network.state_dict(), model_id=k)
                    for batch in run.train:
                        traker.featurize(batch=batch, num_samples=len(batch[0]))
                traker.finalize_features()
                for k, network in enumerate(networks):
                    traker.start_scoring_checkpoint(
                        exp_name="scores", checkpoint=network.state_dict(), model_id=k, num_targets=run.m
                    )
                    for batch in run.test:
                        traker.score(batch=batch, num_samples=len(batch[0]))
                return torch.tensor(np.array(traker.finalize_scores(exp_name="scores"))).T

        return work

    for what, networks in (("1 network", [run.model]), ("10 snapshots", run.snapshots), ("10 other runs", run.others)):
        for dimensions, ridge in ((128, 0.0), (512, 1.0), (512, 10.0), (512, 30.0), (512, 100.0), (2048, 30.0)):
            yield f"TRAK, {what}", f"dimension {dimensions}, ridge {ridge:g}", trak(networks, dimensions, ridge)


def child() -> None:
    """All methods of one library; a method that fails gets its message."""
    job = jobs.read_job()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run = Run(job["inputs"])
    library = {"captum": of_captum, "dattri": of_dattri, "traker": of_traker}[job["library"]]
    methods = list(library(run))
    found: list[dict[str, Any]] = [{"method": name, "settings": settings} for name, settings, _ in methods]

    def work() -> np.ndarray:
        values = np.full((len(methods), run.m, run.n), np.nan, np.float32)
        for place, (_, _, method) in enumerate(methods):
            torch.manual_seed(0)
            start = time.process_time()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    values[place] = method().detach().numpy()
                found[place] |= {"status": "ok", "seconds": time.process_time() - start}
            except Exception as error:
                found[place]["status"] = f"failed: {type(error).__name__}: {str(error)[:150]}"
        return values

    versions = {LIBRARIES[job["library"]]: version(LIBRARIES[job["library"]]), "torch": version("torch")}
    jobs.report(job, work, methods=found, versions=versions)


# ---------------------------------------------------------------- the parent


def measure(library: str, inputs: Path, limit: float = 1200) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of all methods of one library.

    Parameters
    ----------
    library : "captum", "dattri" or "traker".
    inputs : safetensors file: ``x``, ``y``, ``x_test``, ``y_test``, ``lr`` and ``tanh`` (0 or 1) as tensors, and
        weights of the MLP as ``final:NAME``, ``snapshot-K:NAME``, ``other-K:NAME``.
    limit : seconds for all its methods.

    Returns
    -------
    tuple
        The record of the process (``status``, ``versions``, ``peak_gb``), and for each method a dict with ``method``,
        ``settings``, ``status`` and, where it succeeded, ``seconds`` (CPU) and ``scores``, float64 [m, n].
    """
    import psutil

    with tempfile.TemporaryDirectory() as name:
        job = {"library": library, "inputs": str(inputs), "seconds": 0}
        memory = int(psutil.virtual_memory().available * 0.7)
        record = jobs.run("attribution", interpreter("attribution"), job, Path(name), limit, memory, 1)
        methods = record.pop("methods", [])
        if path := record.pop("values", None):
            for method, values in zip(methods, np.load(path), strict=True):
                if method["status"] == "ok":
                    method["scores"] = torch.from_numpy(values).double()
    return {key: record[key] for key in ("status", "versions", "peak_gb") if key in record}, methods


if __name__ == "__main__":
    if sys.argv[1:]:
        child()
