"""Datasets, loaders and arrays go in wherever tensors do, and give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ntkit

torch.manual_seed(3)
X, Y = torch.randn(12, 3).double(), torch.arange(12) % 2
FORMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "dataset": lambda: (TensorDataset(X, Y), None),
    "loader": lambda: (DataLoader(TensorDataset(X, Y), batch_size=5), None),
    "samples and labels": lambda: (DataLoader(TensorDataset(X), batch_size=5), Y),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="module")
def run() -> ntkit.Trajectory:
    return ntkit.train(_model(), (X, Y), cross_entropy, _sgd, steps=4, batch_size=5)


WORK: dict[str, Callable[[Any, Any, ntkit.Trajectory], Any]] = {
    "kernel": lambda x, y, run: ntkit.TangentKernel(_model())(x),
    "diagonal": lambda x, y, run: ntkit.TangentKernel(_model()).diagonal(x),
    "track": lambda x, y, run: ntkit.track(run, x, y, model=_model(), k=3).series["alignment"],
    "sharpness": lambda x, y, run: ntkit.track(run, x, y, model=_model(), k=3).series["sharpness"],
    "path kernel": lambda x, y, run: ntkit.PathKernel(run).decompose(x).contributions,
    "influence": lambda x, y, run: ntkit.influence(run, x, y).scores,
    "explanation": lambda x, y, run: (
        ntkit.explain(
            ntkit.TangentKernel(_model()), ntkit.target_importance(_model(), x, y, cross_entropy), x, x, output=0
        ).scores
    ),
    "tracin": lambda x, y, run: ntkit.tracin(run, x, output=0).scores,
    "novelty": lambda x, y, run: ntkit.novelty(ntkit.TangentKernel(_model(), outputs="trace"), x, x).deviation,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("work", WORK)
def test_the_same_numbers(work: str, form: str, run: ntkit.Trajectory) -> None:
    expected, got = (torch.as_tensor(WORK[work](*data, run)) for data in ((X, Y), FORMS[form]()))
    assert torch.equal(got, expected) or torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_training_and_what_follows(form: str, run: ntkit.Trajectory) -> None:
    x, y = FORMS[form]()
    data = x if y is None else (x, y)
    again = ntkit.train(_model(), data, cross_entropy, _sgd, steps=4, batch_size=5)
    assert all(torch.equal(a, b) for a, b in zip(run.state(4).values(), again.state(4).values(), strict=True))
    test = X[:2] + 0.1
    assert torch.equal(ntkit.PathKernel(again).decompose(test).contributions,
                       ntkit.PathKernel(run).decompose(test).contributions)  # fmt: skip
    opened = ntkit.influence(run, test, Y[:2], data=data, loss=cross_entropy, model=_model())
    assert torch.equal(opened.scores, ntkit.influence(run, test, Y[:2]).scores)


def test_what_has_no_order_is_refused(run: ntkit.Trajectory) -> None:
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)
    for work in (lambda: ntkit.track(run, shuffled, model=_model(), k=3),
                 lambda: ntkit.train(_model(), shuffled, cross_entropy, _sgd, steps=1),
                 lambda: ntkit.influence(run, shuffled)):  # fmt: skip
        with pytest.raises(ntkit.Refused, match="expected the samples in the order of the dataset"):
            work()
    with pytest.raises(ntkit.Refused, match=r"expected \(x, y\) tensors, or a dataset of such pairs"):
        ntkit.train(_model(), TensorDataset(X), cross_entropy, _sgd, steps=1)
    with pytest.raises(ntkit.Refused, match=r"expected \(x, y\) tensors, or a dataset of such pairs"):
        ntkit.train(_model(), np.zeros(3), cross_entropy, _sgd, steps=1)
