"""Infinite numbers in the input, as in a mask that is added to attention scores: the same as of a large finite one."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.explanations.importances import tracking_importance

INFINITE = "x: got an infinite input, on which the outputs are finite and {} are not; expected finite {}"


class Attending(nn.Module):
    """Attention with one query; the mask is added to its scores."""

    def __init__(self):
        super().__init__()
        self.a, self.scores, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x, mask):
        h = torch.tanh(self.a(x))
        weights = (self.scores(h)[..., 0] + mask).softmax(1)
        return self.b((weights[..., None] * h).sum(1))


def points(n, least):
    """Sequences of 5 places of which some are masked by `least`: None leaves out the last two instead."""
    draw = torch.Generator().manual_seed(n)
    x, lengths = torch.randn(n, 5, 3, dtype=torch.float64, generator=draw), torch.randint(1, 5, (n, 1), generator=draw)
    if least is None:
        return x[:, :3], torch.zeros(n, 3, dtype=torch.float64)
    lengths = lengths if least != "last" else torch.full((n, 1), 3)
    value = -torch.inf if least == "last" else least
    return x, torch.zeros(n, 5, dtype=torch.float64).masked_fill(torch.arange(5) >= lengths, value)


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.5)


@cache
def trained(least):
    torch.manual_seed(0)
    x, y = points(6, least), torch.arange(6) % 2
    return ntkit.train(Attending().double(), (x, y), F.cross_entropy, sgd, steps=4, batch_size=3)


def numbers(least):
    """Everything that is computed from a run and two test points."""
    run, test, y = trained(least), points(2, least), torch.tensor([0, 1])
    model, (x, labels), loss = run.origin
    model.eval()
    found = {"parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}
    influence = ntkit.influence(run, test, y, checks=1)
    found |= {"influence": influence.scores, "differences": influence.check.values}
    found |= {"path": ntkit.PathKernel(run).decompose(test).contributions}
    found |= {"without": ntkit.Retrainings(run, test, y).without([[0], [1, 2]])}
    found |= {"tracking": tracking_importance(run).values, "tracin": ntkit.tracin(run, test).scores}
    importance = ntkit.target_importance(model, x, labels, loss)
    conjugate = ntkit.ConjugateKernel(model)
    hidden = ntkit.ConjugateKernel(model, layer="scores")
    kernels = {"tangent": ntkit.TangentKernel(model), "conjugate": conjugate, "hidden": hidden}
    for curvature, params in (("gauss-newton", None), ("gauss-newton", ["b.weight"]), ("hessian", ["a.weight"])):
        kernel = ntkit.InfluenceKernel(model, (x, labels), loss, curvature=curvature, damping=2.0, params=params)
        kernels[f"{curvature} {params}"] = kernel
    for name, kernel in kernels.items():
        operator = kernel.operator(test)
        found[name], found[f"{name}, diagonal"] = kernel(test, x), kernel.diagonal(test)
        found[f"{name}, operator"] = operator @ torch.ones(operator.shape[0], dtype=torch.float64)
        if name != "hidden":  # it has one feature for each place
            found[f"{name}, explained"] = ntkit.explain(kernel, importance, x, test, output=0).scores
    explainer = ntkit.Explainer(lambda x_test, _: ntkit.explain(conjugate, importance, x, x_test, output=0), x)
    return found | {"explainer": explainer.influence(test)}


@pytest.mark.parametrize(("infinite", "finite"), [(-torch.inf, -1e4), ("last", None)], ids=["large", "left out"])
def test_infinite_masks(infinite, finite):
    found, expected = numbers(infinite), numbers(finite)
    for name, value in found.items():
        other = expected[name]
        if name.startswith("hidden") and finite is None:
            continue  # features of places that are left out
        bound = 1e-6 if name == "differences" else 1e-9
        assert float((value - other).abs().max()) <= bound * float(other.abs().max()), name
        assert float(other.abs().max()) > 1e-9, name


class Sum(nn.Module):
    """Its outputs are finite on infinite input, its gradients are not."""

    def __init__(self, added=False):
        super().__init__()
        self.one, self.two, self.added = nn.Linear(2, 2), nn.Linear(2, 2), added

    def forward(self, a, b):
        return torch.tanh(self.one(a)) + (b if self.added else torch.tanh(self.two(b)))


def inputs(place, n=9, value=torch.inf):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, 2, dtype=torch.float64, generator=draw)
    a[place, 0] = value
    return a, b


def calls(net, x):
    """Every way to numbers of these samples."""
    n, tangent, sketch = len(x[0]), ntkit.TangentKernel(net), ntkit.SketchedKernel(net, 8)
    plain, v = inputs(0, n, 1.0), torch.ones(2 * n)
    data = (plain, torch.arange(n) % 2)
    run = ntkit.train(copy.deepcopy(net), data, F.cross_entropy, sgd, steps=2)
    kernels = {
        by: ntkit.InfluenceKernel(net, data, F.cross_entropy, damping=1.0, params=params)
        for by, params in (("samples", None), ("parameters", ["one.weight"]))
    }
    return {
        "k": lambda: tangent(x),
        "diagonal": lambda: tangent.diagonal(x),
        "paired": lambda: tangent.paired(plain, x),
        "operator": lambda: tangent.operator(x) @ v,
        "trace operator": lambda: ntkit.TangentKernel(net, "trace").operator(x) @ v[:n],
        "jvp": lambda: tangent.jvp(x, {"one.weight": torch.ones(2, 2)}),
        "vjp": lambda: tangent.vjp(x, v.view(n, 2)),
        "layers": lambda: tangent.layers(plain, x),
        "tile": lambda: tangent.tile(x, None, tangent.plan(plain)),
        "sketch": lambda: sketch(x),
        "sketched features": lambda: sketch.features(x),
        "standard error": lambda: sketch.standard_error(x),
        **{by: (lambda kernel=kernel: kernel(x)) for by, kernel in kernels.items()},
        **{f"{by}, operator": (lambda kernel=kernel: kernel.operator(x) @ v) for by, kernel in kernels.items()},
        "hessian": lambda: ntkit.InfluenceKernel(
            net, (x, data[1]), F.cross_entropy, curvature="hessian", damping=9.0, params=["one.weight"]
        )(plain),
        "gauss-newton": lambda: ntkit.InfluenceKernel(
            net, (x, data[1]), F.cross_entropy, damping=9.0, params=["one.weight"]
        )(plain),
        "conjugate": lambda: ntkit.ConjugateKernel(net, layer="one")(x),
        "influence": lambda: ntkit.influence(run, x, data[1]),
    }


NAMES = list(calls(Sum().double(), inputs(0)))


@pytest.mark.parametrize("place", [0, 1, 4, 5, 8])
def test_infinite_input_without_finite_gradients_is_refused(place):
    torch.manual_seed(0)
    net = Sum().double()
    for name, call in calls(net, inputs(place)).items():
        what = "features" if name == "conjugate" else "gradients"
        with pytest.raises(ntkit.Refused) as refused:
            call()
        assert INFINITE.format(what, what) in str(refused.value), name
    assert torch.isfinite(ntkit.TangentKernel(net).operator(inputs(place, value=3.0)) @ torch.ones(18)).all()


def test_a_vector_that_is_not_finite_is_the_callers():
    torch.manual_seed(0)
    x, v = points(4, -torch.inf), torch.ones(8, dtype=torch.float64)
    v[0] = torch.nan
    assert torch.isnan(ntkit.TangentKernel(Attending().double()).operator(x) @ v).any()


@pytest.mark.parametrize("name", NAMES)
def test_undefined_numbers_in_the_input_are_refused(name):
    call = calls(Sum().double(), inputs(0, value=torch.nan))[name]
    with pytest.raises(ntkit.Refused, match=r"x\d?(_test)?: got nan at index \[?\(?0, 0"):
        call()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "conjugate"])
def test_infinite_outputs_are_refused(name):
    torch.manual_seed(0)
    a, b = inputs(0, value=1.0)
    b[3] = torch.inf
    with pytest.raises(ntkit.Refused, match=r"model Sum: got an output that is not finite \(sample"):
        calls(Sum(added=True).double(), (a, b))[name]()
