"""One law over all public names: nothing global, and nothing of the model, is left changed by any call."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import jinja2
import numpy as np
import plotly.offline
import pytest
import scipy.sparse.linalg
import sklearn.datasets
import sympy
import torch
import zarr
from torch import nn

import ntkit
from ntkit.jacobian import model_calls
from ntkit.probes import rotate, shift, shuffle_patches, swap_quadrants, zoom
from ntkit.studies import kopitkov2019
from ntkit.studies.part import Sizes

# Importing these adds warning filters and draws random numbers, once a process and by no doing of ours: done before.
IMPORTED = (jinja2, plotly.offline, scipy.sparse.linalg, sklearn.datasets, sympy, zarr)


class Model(nn.Module):
    """Batch norm in eval mode, dropout off, a frozen layer, a buffer that the forward writes to, mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.frozen, self.head = nn.Linear(108, 6), nn.Linear(6, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.frozen(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))))


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Model().eval()
    made.head.train()  # modes are a mixture, to be kept as they are
    made.head.weight.grad = torch.ones_like(made.head.weight)
    return made


X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 0, 1, 0, 1])
K = X.flatten(1) @ X.flatten(1).T + torch.eye(6)


def train(m, tmp):
    ntkit.train(m, (X, Y), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), 3, batch_size=4)


def kernel_calls(kernel):
    kernel(X)
    kernel(X[:4], X)
    kernel.diagonal(X)
    kernel.paired(X, X.flip(-1))
    kernel.operator(X) @ torch.ones(kernel.operator(X).shape[0])


def tangent(m, tmp):
    kernel_calls(ntkit.TangentKernel(m))
    ntkit.TangentKernel(m, outputs="trace").layers(X)
    ntkit.TangentKernel(m, params=["frozen.weight"]).plan(X)


def refused(m, tmp):
    wrong = {"an empty": X[:0], "nan": X * torch.nan, "2 channels": X.expand(6, 2, 8, 8), "int64": X.long()}
    for why, x in wrong.items():
        with pytest.raises(ntkit.Refused, match=why):
            ntkit.TangentKernel(m)(x)


def weights(m, tmp):
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in m.state_dict().items()}, tmp / "w.safetensors")
    ntkit.load_weights(m, tmp / "w.safetensors")


def analysis(m, tmp, **changed):
    settings = {"classes": ("3", "8"), "train": 20, "test": 10, "model": "linear", "epochs": 1, "track_points": 8}
    run = ntkit.analyze(ntkit.Settings(**settings, **changed), out=tmp / "-".join(["run", *changed]))
    ntkit.report.render(run)
    return run


def comparison(m, tmp):
    ntkit.compare([analysis(m, tmp), analysis(m, tmp, seed=1)], points=4, out=tmp / "compared")


def record(m, tmp):
    other = model()  # the loop is the user's own and leaves gradients
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with ntkit.record(other, optimizer, path=tmp / "run") as rec:
        for _ in range(2):
            (optimizer.zero_grad(), other(X).sum().backward(), optimizer.step(), rec.step())
    assert not optimizer._optimizer_step_pre_hooks


def track(m, tmp):
    other = model()
    train(other, tmp)
    run = ntkit.train(
        other, (X, Y), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), 2, path=tmp / "run"
    )
    tracked = ntkit.track(run, X, Y, model=m, k=2, path=tmp / "track")
    ntkit.Tracked.open(tmp / "track").eigenvectors(tracked.steps[0])
    ntkit.track(run, X, Y, model=m, k=2, memory="1 kB")


def path(m, tmp):
    """Dropout, batch norm and a counting buffer have no path kernel: m without them."""
    net = nn.Sequential(m.conv, nn.ReLU(), nn.Flatten(), m.frozen, nn.Tanh(), m.head)
    own = copy.deepcopy(net)
    run = ntkit.train(own, (X, Y), nn.functional.cross_entropy, lambda p: torch.optim.AdamW(p, lr=0.1), 3)
    before = state(own, True)
    for integration in ("secant", "quadrature"):
        kernel = ntkit.PathKernel(run, integration=integration)
        found = kernel.decompose(X[:2], layers=True, steps=True)
        found.top(2), found.by_class(Y), found.over_time(), kernel(X[:2]), kernel.diagonal(X[:2])
    assert state(own, True) == before
    ntkit.PathKernel(
        ntkit.Trajectory.open(run.path), model=net, data=(X, Y), loss=nn.functional.cross_entropy
    ).decompose(X)
    with pytest.raises(ntkit.Refused, match=r"got '0\.weight' absent"):
        ntkit.PathKernel(run, model=m).decompose(X)


def toy_study(m, tmp):
    toy = Sizes(seeds=2, side=4, width=4, steps=4, lr=0.05, decay=2, k=12, top=2, points=12, digit_steps=2)
    replace(kopitkov2019.STUDY, scales={"quick": toy}, seeds=(0, 1)).run("quick", tmp / "run")


def plain(m):
    """A module with a limit, of the model's own layers."""
    return nn.Sequential(m.conv, nn.Tanh(), nn.Flatten(), m.frozen, nn.ReLU(), m.head)


def limit(m, tmp):
    kernel_calls(ntkit.InfiniteKernel(plain(m)))
    with pytest.raises(ntkit.Refused, match="BatchNorm"):
        ntkit.InfiniteKernel(m)(X)


FLAT = X.flatten(1).numpy()


def explained(m, tmp):
    """On a copy that is trained first, and whose forward pass writes to no buffer: else it cannot be replayed."""
    net = copy.deepcopy(plain(m))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)
    run = ntkit.train(net, (X, Y), nn.functional.cross_entropy, sgd, 3, batch_size=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    scores = ntkit.influence(run, X[:2], Y[:2]).scores
    again = ntkit.Retrainings(run, X[:2], Y[:2])
    ntkit.leave_one_out(scores, again, examples=[0, 1, 2])
    ntkit.datamodeling_score(scores, again, share=0.5, sets=3)
    ntkit.case_deletion(scores, again, shares=(0.2,))
    ntkit.query_loss_difference(scores, again, share=0.2, sets=2)
    ntkit.mislabeled(scores[0], Y > 0)
    tangent = ntkit.TangentKernel(net)
    ntkit.explain(tangent, ntkit.tracking_importance(run), X, X[:2])
    ntkit.explain(tangent, ntkit.target_importance(net, X, Y, nn.functional.cross_entropy), X, X[:2])
    ntkit.surrogate_importance(tangent(X).double(), net(X).detach(), l2=1.0)
    ntkit.check_axioms(ntkit.tracin(run, X).scores)
    kernel_calls(ntkit.InfluenceKernel(net, (X, Y), nn.functional.cross_entropy, time=1.0))
    ntkit.Explainer(lambda x, targets: ntkit.tracin(run, x), X).self_influence()
    ntkit.TrackingImportance(6, 2).importance()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]


def stored(m, tmp):
    kernel = ntkit.TangentKernel(m, outputs="trace")
    K = ntkit.GramStore.create(tmp / "kernel", kernel, X, tile=4)
    K @ torch.ones(6), K.rows([1]), K.verify(), K.to_dask().compute(scheduler="synchronous")
    K.export(tmp / "kernel.npy")
    with pytest.raises(ntkit.Refused, match=r"another data .*, samples \(6, not 5\)"):
        ntkit.GramStore.create(tmp / "kernel", kernel, X[:5])


EXPLANATIONS = (
    "Deletion", "Evaluation", "Explainer", "Explanation", "Importance", "Influence", "InfluenceKernel", "Retrainings",
    "TrackingImportance", "case_deletion", "check_axioms", "datamodeling_score", "explain", "influence",
    "leave_one_out", "mislabeled", "query_loss_difference", "surrogate_importance", "target_importance", "tracin",
    "tracking_importance",
)  # fmt: skip
CALLS = {
    **dict.fromkeys(EXPLANATIONS, explained),
    "record": record,
    "track": track,
    "Tracked": track,
    "study": toy_study,
    "grid": lambda m, tmp: ntkit.grid(3),
    "bandwidth": lambda m, tmp: ntkit.bandwidth(X),
    "novelty": lambda m, tmp: ntkit.novelty(ntkit.TangentKernel(m, outputs="trace"), X[:4], X),
    "eigenfunctions": lambda m, tmp: ntkit.eigenfunctions(
        ntkit.TangentKernel(m, "trace"), ntkit.spectrum(ntkit.TangentKernel(m, "trace")(X), k=1), X, X[:2]
    ),
    "TangentKernel": tangent,
    "Kernel": refused,
    "KernelOperator": tangent,
    "Refused": refused,
    "SelfCheckError": refused,
    "ConjugateKernel": lambda m, tmp: (
        kernel_calls(ntkit.ConjugateKernel(m)) or ntkit.ConjugateKernel(m, layer="norm")(X)
    ),
    "PathKernel": path,
    "PathDecomposition": path,
    "NoSecant": path,
    "InfiniteKernel": limit,
    "to_ntk_parametrization": lambda m, tmp: ntkit.to_ntk_parametrization(plain(m)),
    "widened": lambda m, tmp: ntkit.widened(plain(m), 6, X),
    "convergence": lambda m, tmp: ntkit.convergence(plain(m), X, widths=(4, 8), seeds=2),
    "monte_carlo": lambda m, tmp: ntkit.monte_carlo(plain(m), X, width=4, seeds=2, kind="nngp"),
    "linearized": lambda m, tmp: ntkit.linearized(m)(X).sum().backward(),
    "NTKClassifier": lambda m, tmp: ntkit.NTKClassifier().fit(FLAT, Y.numpy()).predict(FLAT),
    "NTKRegressor": lambda m, tmp: ntkit.NTKRegressor(machine="gp").fit(FLAT, Y.numpy()).predict(FLAT, return_std=True),
    "GradientFlow": lambda m, tmp: ntkit.GradientFlow().fit(K, Y.float()).predict(K, t=1.0),
    "GaussianProcess": lambda m, tmp: ntkit.GaussianProcess(0.1).fit(K, Y.float()).predict(K, K).sample(2),
    "Posterior": lambda m, tmp: ntkit.GaussianProcess(0.1).fit(K, Y.float()).predict(K, K).percentiles(10),
    "SketchedKernel": lambda m, tmp: (
        kernel_calls(ntkit.SketchedKernel(m, 16)) or ntkit.SketchedKernel(m, 16, outputs="trace").standard_error(X)
    ),
    "HardMarginSVM": lambda m, tmp: ntkit.HardMarginSVM().fit(K, Y).predict(K),
    "KernelRidge": lambda m, tmp: ntkit.KernelRidge(0.1).fit(K, Y.float()).predict(K),
    "Spectrum": lambda m, tmp: ntkit.spectrum(K, k=1).extend(K),
    "spectrum": lambda m, tmp: ntkit.spectrum(K).energy(Y.float()),
    "alignment": lambda m, tmp: ntkit.alignment(K, Y.float(), centered=True),
    "effective_rank": lambda m, tmp: ntkit.effective_rank(K),
    "invariance": lambda m, tmp: ntkit.invariance(ntkit.TangentKernel(m, outputs="trace"), X, shift()),
    "probes": lambda m, tmp: [t(X) for t in (shift(), rotate(0.2), zoom(0.75), swap_quadrants(), shuffle_patches())],
    "data": lambda m, tmp: ntkit.data.load("digits", train=30, test=20, seed=1),
    "train": train,
    "Trajectory": train,
    "load_weights": weights,
    "Gram": lambda m, tmp: (
        ntkit.Gram(ntkit.TangentKernel(m, "trace")(X[:4]), ntkit.TangentKernel(m, "trace"), X[:4]).identity
    ),
    "GramStore": stored,
    "testing": lambda m, tmp: ntkit.testing.check_kernel(ntkit.TangentKernel(m), X[:4], X[:3], tolerance=1e-3),
    "Settings": analysis,
    "analyze": analysis,
    "report": analysis,
    "compare": comparison,
    "verify": lambda m, tmp: ntkit.verify(analysis(m, tmp)),
}

RETURNED = {  # classes of what the others return and raise
    "BadTile": "GramStore", "BestTime": "GradientFlow", "Convergence": "convergence", "Damaged": "Refused",
    "FileRecord": "verify", "FiniteDifferences": "Influence", "LimitEstimate": "InfiniteKernel",
    "Linearized": "linearized", "MonteCarlo": "monte_carlo", "NoLimit": "Refused", "Novelty": "novelty",
    "Recorder": "record", "Top": "PathDecomposition", "Undefined": "Refused",
}  # fmt: skip
CALLS |= {name: CALLS[other] for name, other in RETURNED.items()}


def test_the_table_holds_every_public_name():
    assert set(CALLS) == set(ntkit.__all__)


def state(m: nn.Module, parameters: bool) -> dict:
    found = {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
        "python rng": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "sdpa": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "warnings": list(warnings.filters),
        "numpy errors": np.geterr(),
        "modes": [(name, module.training) for name, module in m.named_modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in m.modules()],
        "requires_grad": [(name, p.requires_grad) for name, p in m.named_parameters()],
        "grads": [(name, None if p.grad is None else p.grad.tolist()) for name, p in m.named_parameters()],
    }
    if parameters:
        found["parameters"] = {name: t.tolist() for name, t in m.state_dict().items()}
        found["versions"] = {name: p._version for name, p in m.named_parameters()}
    return found


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_changed(name, tmp_path):
    m = model()
    trains = name in (
        "train",
        "Trajectory",
        "record",
    )  # training is asked to change parameters and buffers, nothing else
    before = state(m, not trains)
    CALLS[name](m, tmp_path)
    after = state(m, not trains)
    changed = {k for k in before if before[k] != after[k]}
    assert changed == ({"versions"} if name == "load_weights" else set())  # it writes, here what was there
    assert all(p is q for p, q in zip(m.parameters(), m.parameters(), strict=True))


@pytest.mark.parametrize("name", ["TangentKernel", "ConjugateKernel", "train", "spectrum", "invariance"])
def test_nothing_is_left_changed_without_grad_and_with_another_default_dtype(name, tmp_path):
    m = model()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            before = state(m, False)
            CALLS[name](m, tmp_path)
            assert state(m, False) == before
    finally:
        torch.set_default_dtype(torch.float32)


FIRST_USE = """
import locale, logging, os, random, signal, sys, warnings
import numpy as np, torch
import ntkit

def process():
    return {
        "random": random.getstate(), "numpy": str(np.random.get_state()), "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "environment": dict(os.environ),
        "filters": list(warnings.filters), "signals": [signal.getsignal(s) for s in signal.valid_signals()],
        "locale": locale.setlocale(locale.LC_ALL), "path": list(sys.path), "log": list(logging.root.handlers),
        "finders": list(sys.meta_path),
    }

before = process()
ntkit.data.load("digits")
assert process() == before
for name in ntkit.__all__:
    getattr(ntkit, name)
import ntkit.cli, ntkit.commands.infinite_width, ntkit.trajectory.callbacks
sys.stderr.isatty = lambda: True
from ntkit.base import progress
progress._SILENT = 0.0
with progress.task("work", total=1) as work:
    work.advance(1)
assert "rich" in sys.modules and "sklearn" in sys.modules
after = process()
print(*(key for key in before if after[key] != before[key]))
print(*(key for key in after["environment"] if key not in before["environment"]))
"""


def test_the_first_use_of_every_public_name_leaves_the_process_as_it_was():
    """In a process of its own: only scikit-learn's and SciPy's variables and warning filters stay (docs/limits.md)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    changed, variables = done.stdout.splitlines()[-2:]
    assert set(changed.split()) <= {"environment", "filters"}
    assert set(variables.split()) <= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}


def test_the_law_would_notice():
    m = model()
    before = state(m, True)
    m.eval()
    torch.rand(1)
    after = state(m, True)
    assert {k for k in before if before[k] != after[k]} == {"modes", "torch rng"}


@pytest.mark.parametrize("moment", ["_random_states", "drew"])
def test_an_interrupt_before_or_after_the_forward_passes(moment, monkeypatch):
    """Ctrl-C while what a call changes is read or put back: nothing stays changed, and the next call works."""
    true, calls = getattr(model_calls, moment), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return true(*args)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    x, names = torch.randn(5, 3, dtype=torch.float64), ["2.weight"]  # the others require no gradient inside
    expected = ntkit.TangentKernel(model, params=names)(x)
    kernel = ntkit.TangentKernel(model, params=names)
    flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(model_calls, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernel(x)
    assert calls
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kernel(x), expected)
