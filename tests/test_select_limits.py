"""``select=`` where a model becomes wide or linear: the same numbers as of a module that returns that part alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ntkit


class Rich(nn.Module):
    """Returns its hidden layer, two outputs and three others in an object of the user's."""

    def __init__(self, form, width=6, layer=nn.Linear):
        super().__init__()
        self.hidden, self.first, self.second = layer(3, width), layer(width, 2), layer(width, 3)
        self.form, self.training_scale = form, 1.0

    def forward(self, x):
        h = torch.relu(self.hidden(x))
        return self.form(h, self.first(h), self.training_scale * torch.tanh(self.second(h)))


class Out:
    """An output with logits, which are meant where nothing is said."""

    def __init__(self, h, first, second):
        self.hidden, self.logits, self.other = h, first, second


def as_dict(h, first, second):
    return {"hidden": h, "first": first, "second": second}


def as_tuple(h, first, second):
    return second, h


CASES = {
    "logits": (Out, None, lambda out: out.logits),
    "another part": (Out, lambda out: out.other, lambda out: out.other),
    "a dict": (as_dict, lambda out: out["first"], lambda out: out["first"]),
    "a tuple": (as_tuple, lambda out: out[0], lambda out: out[0]),
}


class Picks(nn.Module):
    """The oracle: the model behind a module that returns the part."""

    def __init__(self, net, select):
        super().__init__()
        self.net, self.select = net, select

    def forward(self, x):
        return self.select(self.net(x))


def networks(case, seed=0):
    form, select, meant = CASES[case]
    torch.manual_seed(seed)
    net = Rich(form).double()
    return net, select, Picks(copy.deepcopy(net), meant), meant


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("case", CASES)
def test_limits(case, kind):
    net, select, oracle, _ = networks(case)
    for stds in ({}, {"w_std": 1.2, "b_std": 0.3}):
        found = ntkit.InfiniteKernel(net, kind, select=select, **stds)(X)
        assert torch.equal(found, ntkit.InfiniteKernel(oracle, kind, **stds)(X))
        assert found.diagonal().min() > 1e-3
    assert not net._forward_hooks  # the user's model is as it was


def test_a_limit_follows_the_model_after_changes():
    net, select, oracle, _ = networks("another part")
    kernel = ntkit.InfiniteKernel(net, select=select)
    before = kernel(X)
    for one in (net, oracle.net):
        one.training_scale = 2.0
    assert torch.equal(kernel(X), ntkit.InfiniteKernel(oracle)(X))
    assert not torch.equal(kernel(X), before)


class Pooled(nn.Module):
    """A max-pool: no closed form."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.pool, self.last = nn.Conv1d(1, width, 2), nn.MaxPool1d(2), nn.Linear(width, 2)

    def forward(self, x):
        h = self.pool(torch.relu(self.first(x[:, None])))
        return h, self.last(h.flatten(1))


@pytest.mark.parametrize("make", [False, True])
def test_sampled_limits(make):
    torch.manual_seed(0)
    net = Pooled().double()
    oracle = Picks(copy.deepcopy(net), lambda out: out[1])
    own = {"make": lambda factor: Pooled(8 * factor)} if make else {}
    other = {"make": lambda factor: Picks(Pooled(8 * factor), lambda out: out[1])} if make else {}
    found = ntkit.InfiniteKernel(net, sample=3, select=lambda out: out[1], **own)
    expected = ntkit.InfiniteKernel(oracle, sample=3, **other)
    a, b = found.estimate(X), expected.estimate(X)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.standard_error, b.standard_error)


@pytest.mark.parametrize("case", CASES)
def test_random_wide_networks(case):
    net, select, oracle, meant = networks(case)
    found = ntkit.monte_carlo(net, X, width=20, seeds=3, select=select)
    assert torch.equal(found.mean, ntkit.monte_carlo(oracle, X, width=20, seeds=3).mean)
    found = ntkit.convergence(net, X, widths=(8, 32), seeds=3, select=select)
    expected = ntkit.convergence(oracle, X, widths=(8, 32), seeds=3)
    assert torch.equal(found.limit, expected.limit)
    assert torch.equal(found.distance, expected.distance)
    wide = ntkit.widened(net, 20, X, select=select)  # its hidden layer is returned, too, and may change
    assert torch.equal(meant(wide(X)), ntkit.widened(oracle, 20, X)(X))


@pytest.mark.parametrize("case", CASES)
def test_linearized(case):
    net, select, oracle, _ = networks(case)
    lin, expected = ntkit.linearized(net, select=select), ntkit.linearized(oracle)
    for one in (lin, expected):
        with torch.no_grad():
            for p in one.parameters():
                p.add_(0.1)
    out: Tensor = lin(X)
    assert torch.equal(out, expected(X))
    assert not torch.equal(out, oracle(X))


@pytest.mark.parametrize("case", CASES)
def test_conversion_to_the_ntk_parametrization(case):
    """In it, too, the part that is looked at is the oracle's."""
    net, select, oracle, _ = networks(case)
    net, oracle = (ntkit.to_ntk_parametrization(one, 1.2, 0.3) for one in (net, oracle))
    found = ntkit.monte_carlo(net, X, width=20, seeds=2, select=select)
    assert torch.equal(found.mean, ntkit.monte_carlo(oracle, X, width=20, seeds=2).mean)


def calls(net, select):
    return {
        "limit": lambda: ntkit.InfiniteKernel(net, select=select)(X),
        "sampled limit": lambda: ntkit.InfiniteKernel(net, sample=2, select=select)(X),
        "Monte Carlo": lambda: ntkit.monte_carlo(net, X, width=8, seeds=2, select=select),
        "convergence": lambda: ntkit.convergence(net, X, widths=(4, 8), seeds=2, select=select),
        "widened": lambda: ntkit.widened(net, 8, X, select=select),
        "linearized": lambda: ntkit.linearized(net, select=select)(X),
    }


@pytest.mark.parametrize("name", calls(None, None))
def test_what_picks_no_tensor_is_refused(name):
    net = Rich(as_tuple).double()
    for select, message in (
        (lambda out: None, "select: got a function that returned None; expected a tensor"),
        (lambda out: out.absent, "select: got a function that failed on the model's output, tuple"),
        ("scores", "select: got 'scores'; expected a function of the model's output"),
        (None, "output.*: got (a )?tuple; .* select="),
    ):
        with pytest.raises(ntkit.Refused, match=message):
            calls(net, select)[name]()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_has_no_part_to_pick():
    script = torch.jit.trace(nn.Linear(3, 2).double(), X)
    for select in (None, lambda out: out):
        with pytest.raises(ntkit.Refused, match="Pass the module from which it was scripted"):
            ntkit.InfiniteKernel(script, select=select)(X)
