"""Every argument that is an integer takes numpy's, too, and refuses booleans, text and floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit import Refused
from ntkit.commands.settings import CompareSettings, GramSettings, InfiniteSettings, Settings, TrackSettings
from ntkit.measures.eigenfunctions import eigenfunctions, grid
from ntkit.probes.transforms import shift, shuffle_patches, standard

torch.manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64)
IMAGES = torch.randn(2, 1, 4, 4)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
KERNEL = ntkit.TangentKernel(MODEL, "trace")
K = KERNEL(X)
Y = torch.sin(X.sum(1))
PAIRS = ntkit.spectrum(K, k=2)
POSTERIOR = ntkit.GaussianProcess(noise=0.1).fit(K, Y).predict(K, K)

CALLS = {
    "k of spectrum": (2, lambda k: ntkit.spectrum(K, k=k).eigenvalues),
    "k of flow": (2, lambda k: ntkit.GradientFlow(k=k).fit(K, Y).predict(K, 1.0)),
    "n of sample": (2, lambda n: POSTERIOR.sample(n, seed=n)),
    "side": (2, grid),
    "batch of eigenfunction": (4, lambda n: eigenfunctions(KERNEL, PAIRS, X, X, batch_size=n)),
    "batch of novelty": (4, lambda n: ntkit.novelty(KERNEL, X, X[:3] + 0.1, batch_size=n).outside),
    "size": (2, lambda n: torch.tensor(KERNEL.plan_for_tiles(X, n, n).steps[0].bytes_per_sample)),
    "dim": (5, lambda n: ntkit.SketchedKernel(MODEL, dim=n)(X)),
    "seed of sketch": (3, lambda n: ntkit.SketchedKernel(MODEL, dim=5, seed=n)(X)),
    "seeds": (2, lambda n: ntkit.monte_carlo(MODEL, X[:2], width=8, seeds=n).mean),
    "width": (8, lambda n: ntkit.monte_carlo(MODEL, X[:2], width=n, seeds=2).mean),
    "seed of widened": (1, lambda n: ntkit.widened(MODEL, 8, X[:2], seed=n)(X)),
    "sample": (2, lambda n: ntkit.InfiniteKernel(MODEL, sample=n)(X[:2])),
    "dx": (1, lambda n: shift(n, n)(IMAGES)),
    "grid": (2, lambda n: shuffle_patches(n, seed=n)(IMAGES)),
    "image_shape": (4, lambda n: torch.tensor([len(group) for group in standard((1, n, n)).values()])),
    "settings": (3, lambda n: torch.tensor(checked(Settings(epochs=n, seed=n, train=n, probe_points=n)).epochs)),
    "settings of track": (3, lambda n: torch.tensor(checked(TrackSettings(points=n, k=n)).points)),
    "settings of infinite": (3, lambda n: torch.tensor(checked(InfiniteSettings(folds=n, epochs=n)).folds)),
}


def checked(settings):
    settings.check()
    return settings


@pytest.mark.parametrize("name", CALLS)
def test_integers_of_numpy_are_integers_and_nothing_else_is(name):
    value, call = CALLS[name]
    expected = call(value)
    for kind in (np.int64, np.uint8):
        assert torch.equal(call(kind(value)), expected)
    for other in (True, float(value), str(value), [value]):
        with pytest.raises(Refused, match="expected"):
            call(other)


def test_settings_that_are_written_are_plain_integers():
    settings = Settings(epochs=np.int64(3), seed=np.uint8(2))
    assert [type(settings.epochs), type(settings.seed)] == [int, int]
    assert type(GramSettings(tile=np.int64(3)).tile) is int


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", True, None, float("nan"), -1.0])
def test_sizes_are_numbers(name, value):
    with pytest.raises(Refused, match=f"--{name.replace('_', '-')}: got"):
        Settings(**{name: value}).check()


def test_points_of_a_comparison():
    CompareSettings(points=2).check()
    for value in (1, True, "2", None):
        with pytest.raises(Refused, match="--points: got"):
            CompareSettings(points=value).check()


NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
RUN = ntkit.train(
    NETWORK, (X, torch.tensor([0, 1, 0, 1, 1, 0])),
    nn.functional.cross_entropy, lambda params: torch.optim.SGD(params, lr=0.1), steps=3, batch_size=2, record="all",
)  # fmt: skip
PARTS = ntkit.PathKernel(RUN).decompose(X[:3])
STEPS = {
    "batch": lambda step: RUN.batch(step),
    "state": lambda step: RUN.state(step)["0.weight"],
    "eigenvectors": lambda step: torch.as_tensor(ntkit.track(RUN, X, model=NETWORK, k=2).eigenvectors(step)),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_integers(name):
    call = STEPS[name]
    assert torch.equal(call(np.int64(2)), call(2))
    for other in (True, 1.0, 1.7, "1", None, [1], -1, 99):
        with pytest.raises(Refused, match="step"):
            call(other)


def test_outputs_are_integers():
    small = ntkit.Explanation.of_path(PARTS, torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert torch.equal(small.expected, ntkit.Explanation.of_path(PARTS, [1, 0, 1]).expected)
    for call in (PARTS.of, lambda output: ntkit.Explanation.of_path(PARTS, output).scores):
        assert torch.equal(call(np.int64(1)), call(1))
        assert torch.equal(call([1, 1, 1]), call(1))
        assert torch.equal(call(torch.tensor([1, 1, 1], dtype=torch.uint8)), call(1))  # no mask
        for other in (True, 1.0, "1", [True, False, True], [0, 1], 7, 1j):
            with pytest.raises(Refused, match="output: got"):
                call(other)


NUMBERS = {
    "at": (0.5, lambda at: torch.tensor(ntkit.influence(RUN, X[:2], measure="logit", at=at).at)),
    "target_loss": (0.125, lambda loss: torch.tensor(trained(target_loss=loss).stop["step"])),
    "clip": (0.125, lambda clip: trained(clip=clip).state(1)["weight"]),
    "tolerance": (0.125, lambda t: ntkit.PathKernel(RUN, tolerance=t).decompose(X[:1]).prediction),
}


def trained(**given):
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    torch.manual_seed(0)
    return ntkit.train(nn.Linear(3, 1).double(), (X, X[:, :1]), nn.functional.mse_loss, sgd, steps=1, **given)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_kind_are_numbers_and_nothing_else_is(name):
    value, call = NUMBERS[name]
    for kind in (np.float64, torch.tensor):
        assert torch.equal(call(kind(value)), call(value))
    for other in (True, "0.1", float("nan"), [0.1], torch.tensor([0.1])):
        with pytest.raises(Refused, match=f"{name}: got"):
            call(other)
