"""Recurrent networks and other vectors that depend on each other: their limit against recursions over all pairs."""

from __future__ import annotations

import infinite_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkit.base.checks import NoLimit, Refused
from ntkit.kernels.infinite import shared_weights
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.kernels.infinite.sampled import Sampling

TOKENS, LENGTH = 11, 4
WORDS = torch.tensor([[1, 4, 0, 3], [1, 4, 0, 7], [9, 2, 2, 10], [6, 6, 6, 6], [1, 4, 0, 3]])
X = torch.randn(5, LENGTH, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
W, B = 1.3, 0.4


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def layer_of_rnn(S, T, function, biases=2):
    """One recurrent layer: S, T [L, L, n, n] over times and samples, of its inputs; the same of its states."""
    length, _, n, _ = S.shape
    K, G = torch.zeros_like(S), torch.zeros_like(S)
    variance = torch.zeros(length, n, dtype=S.dtype)  # of the sums before the activation
    same = [(t, t) for t in range(length)]
    for t, s in [*same, *((t, s) for t in range(length) for s in range(length) if t != s)]:
        zero = torch.zeros(n, n, dtype=S.dtype)
        before, grad = (K[t - 1, s - 1], G[t - 1, s - 1]) if t and s else (zero, zero)
        z = W**2 * S[t, s] + W**2 * before + biases * B**2
        if t == s:
            variance[t] = z.diagonal()
        value, slope = oracle.gaussian(function, variance[t][:, None], variance[s][None, :], z)
        K[t, s], G[t, s] = value, (z + W**2 * T[t, s] + W**2 * grad) * slope
    return K, G


def readout(K, G, weights, kind):
    """A linear layer behind a weighted sum of states."""
    S = torch.einsum("t,s,tsij->ij", weights, weights, K)
    T = torch.einsum("t,s,tsij->ij", weights, weights, G)
    S, T = W**2 * S + B**2, W**2 * T + W**2 * S + B**2
    return T if kind == "ntk" else S


def of_inputs(x):
    S = torch.einsum("ntc,msc->tsnm", x, x) / x.shape[2]
    return S, torch.zeros_like(S)


class Recurrent(nn.Module):
    """`nn.RNN` in several layers, and what becomes of its states."""

    def __init__(self, out, nonlinearity="relu", layers=1, words=False, batch_first=True, bias=True):
        super().__init__()
        self.out, self.batch_first = out, batch_first
        self.embed = nn.Embedding(TOKENS, 3) if words else nn.Identity()
        self.rnn = nn.RNN(3, 8, layers, nonlinearity, bias, batch_first)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        h = self.embed(x)
        return self.last(self.out(*self.rnn(h if self.batch_first else h.transpose(0, 1))))


LAST = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
MEAN = torch.full((LENGTH,), 0.25, dtype=torch.float64)
READ = {
    "last output": (lambda o, h: o[:, -1], LAST, True),
    "last state": (lambda o, h: h[-1], LAST, True),
    "squeezed": (lambda o, h: h.squeeze(0), LAST, True),
    "mean": (lambda o, h: o.mean(1), MEAN, True),
    "a difference": (lambda o, h: o[:, 3] - 2 * o[:, 1], torch.tensor([0.0, -2, 0, 1], dtype=torch.float64), True),
    "time first": (lambda o, h: o.mean(0), MEAN, False),
    "transposed": (lambda o, h: o.transpose(0, 1)[:, 2], torch.tensor([0.0, 0, 1, 0], dtype=torch.float64), False),
}


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("read", READ)
def test_recurrent_layers_equal_the_recursion_over_all_pairs_of_times(read, kind):
    out, weights, batch_first = READ[read]
    model = seeded(lambda: Recurrent(out, batch_first=batch_first)).double()
    expected = readout(*layer_of_rnn(*of_inputs(X), torch.relu), weights, kind)
    kernel = InfiniteKernel(model, kind, W, B)
    torch.testing.assert_close(kernel(X), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kernel(X[:2], X[2:]), expected[:2, 2:], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kernel.diagonal(X), expected.diagonal(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kernel.paired(X[:2], X[2:4]), expected[:2, 2:4].diagonal(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_layers_of_recurrent_layers_over_words(nonlinearity):
    model = seeded(lambda: Recurrent(lambda o, h: o.mean(1), nonlinearity, layers=2, words=True))
    with torch.no_grad():  # a standard normal embedding, to the last digit
        model.embed.weight.copy_(torch.randn(TOKENS, 3, generator=torch.Generator().manual_seed(1)))
    S = (WORDS[:, :, None, None] == WORDS).permute(1, 3, 0, 2).double()
    function = torch.relu if nonlinearity == "relu" else torch.tanh
    first = layer_of_rnn(S, S, function)
    expected = readout(*layer_of_rnn(*first, function), MEAN, "ntk")
    found = InfiniteKernel(model, "ntk", W, B)(WORDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_an_embedding_adds_its_variance_and_its_gain(trained):
    """Words of standard deviation 0.5: their covariance falls by its square, the gradients by words do not."""
    model = seeded(lambda: Recurrent(lambda o, h: o.mean(1), words=True)).double()
    p = model.embed.weight.data
    p.sub_(p.mean()).div_(2 * p.square().mean().sqrt())
    model.embed.requires_grad_(trained)
    same = (WORDS[:, :, None, None] == WORDS).permute(1, 3, 0, 2).double()
    expected = readout(*layer_of_rnn(0.25 * same, trained * same, torch.relu), MEAN, "ntk")
    found = InfiniteKernel(model, "ntk", W, B)(WORDS)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_cells_and_loops_are_the_recurrent_layer():
    whole = seeded(lambda: Recurrent(lambda o, h: o[:, -1])).double()

    class Cells(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.cell, self.last, self.start = nn.RNNCell(3, 8, nonlinearity="relu"), nn.Linear(8, 2), start

        def forward(self, x):
            h = x.new_zeros(len(x), 8) if self.start else None
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.last(h)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_input, self.of_state, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h, states = x.new_zeros(len(x), 8), []
            for t in range(x.shape[1]):
                h = torch.relu(self.of_input(x[:, t]) + self.of_state(h))
                states.append(h)
            return self.last(torch.stack(states, 1)[:, -1])

    expected = InfiniteKernel(whole, "ntk", W, B)(X)
    for model in (Cells(start=False), Cells(start=True), Loop()):
        found = InfiniteKernel(seeded(lambda model=model: model).double(), "ntk", W, B)(X)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Tutorial(nn.Module):
    """The character network of many tutorials: one layer takes the input and the state side by side."""

    def __init__(self, state_first=False):
        super().__init__()
        self.hidden, self.state_first = 8, state_first
        self.both, self.last = nn.Linear(TOKENS + 8, 8), nn.Linear(TOKENS + 8, 2)

    def forward(self, words):
        x = F.one_hot(words, TOKENS).to(self.last.weight)
        h = torch.zeros(len(x), self.hidden).to(x)
        for t in range(x.shape[1]):
            parts = [h, x[:, t]] if self.state_first else [x[:, t], h]
            joined = torch.cat(parts, 1)
            h, out = torch.tanh(self.both(joined)), self.last(joined)
        return out


@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_input_and_state_side_by_side_keep_their_shares(kind, state_first):
    x = F.one_hot(WORDS, TOKENS).double()
    of_x, of_h = TOKENS / (TOKENS + 8), 8 / (TOKENS + 8)
    S = T = torch.zeros(5, 5, dtype=torch.float64)
    for t in range(LENGTH):
        inputs = of_x * x[:, t] @ x[:, t].T / TOKENS
        z = W**2 * (inputs + of_h * S) + B**2
        g = z + W**2 * of_h * T
        if t == LENGTH - 1:
            expected = g if kind == "ntk" else z
        v = z.diagonal()
        S, slope = oracle.gaussian(torch.tanh, v[:, None], v[None, :], z)
        T = g * slope
    model = seeded(lambda: Tutorial(state_first)).double()
    found = InfiniteKernel(model, kind, W, B)(WORDS)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


class Again(nn.Module):
    """One hidden layer used at three depths, and a skip between Gaussians that depend on each other."""

    def __init__(self, skip=False):
        super().__init__()
        self.first, self.inner, self.last, self.skip = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1), skip

    def forward(self, x):
        z = self.inner(torch.relu(self.first(x)))
        y = self.inner(torch.relu(z))
        return self.last(torch.relu(z + y if self.skip else y))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_a_layer_at_several_depths(kind, skip):
    x = X[:, 0]
    S = W**2 * x @ x.T / 3 + B**2
    T = S.clone()

    def relu(S, T, U=None):
        v = S.diagonal()
        value, slope = oracle.gaussian(torch.relu, v[:, None], v[None, :], S)
        return value, T * slope

    h, g = relu(S, T)
    z, zg = W**2 * h + B**2, W**2 * h + B**2 + W**2 * g
    a, ag = relu(z, zg)
    y, yg = W**2 * a + B**2, W**2 * a + B**2 + W**2 * ag
    if skip:  # z and y are outputs of one matrix: covariance w^2 E[relu(first) relu(z)] + b^2
        v, u = S.diagonal(), z.diagonal()
        zero = torch.zeros_like(S)  # the first layer and z have weights of their own
        cross, _ = oracle.gaussian(torch.relu, v[:, None], u[None, :], zero)
        zy = W**2 * cross + B**2
        y, yg = z + y + zy + zy.T, zg + yg + (zy + zy.T)
    out, og = relu(y, yg)
    expected = W**2 * out + B**2 + (W**2 * og if kind == "ntk" else 0)
    model = seeded(lambda: Again(skip)).double()
    torch.testing.assert_close(InfiniteKernel(model, kind, W, B)(x), expected, rtol=1e-7, atol=1e-9)


def test_the_limit_is_that_of_wide_networks():
    for build, x in (
        (lambda: Recurrent(lambda o, h: h[-1], "tanh", words=True), WORDS),
        (lambda: Again(skip=True), X[:, 0].float()),
    ):
        model = seeded(build)
        for stds in (None, (W, B)):
            found = Sampling("ntk", 24, None).limit(model, x, stds).gram(x, None)
            exact = InfiniteKernel(model, "ntk", *(stds or (None, None)))(x).double()
            assert found.error < 0.1
            assert float((found.mean - exact).norm() / found.standard_error.norm()) < 4
            assert float((found.mean - 1.3 * exact).norm() / found.standard_error.norm()) > 4


def test_no_tiling_changes_a_value(monkeypatch):
    for nonlinearity in ("relu", "tanh"):
        model = seeded(lambda n=nonlinearity: Recurrent(lambda o, h: o.mean(1), n)).double()
        expected = InfiniteKernel(model)(X)
        monkeypatch.setattr(shared_weights, "_TILE", 2)
        found = InfiniteKernel(model)(X)
        monkeypatch.undo()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(found, found.T)
        operator = InfiniteKernel(model).operator(X)
        torch.testing.assert_close(operator @ torch.ones(5).double(), expected.sum(1), rtol=1e-10, atol=1e-10)


class Tied(nn.Module):
    """Two layers with weights of their own and one bias, or two, whose outputs are added."""

    def __init__(self, add, tied):
        super().__init__()
        self.first, self.one, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.other, self.add = nn.Linear(8, 8), add
        if tied:
            self.other.bias = self.one.bias

    def forward(self, x):
        z = self.one(torch.relu(self.first(x)))
        return self.last(torch.relu(self.add(z, self.other(torch.relu(z)))))


ADDED = {
    "sum": (torch.add, 1.0, 1.0),
    "alpha": (lambda z, y: torch.add(z, y, alpha=-0.5), 1.0, -0.5),
    "a difference with alpha": (lambda z, y: torch.sub(z, y, alpha=0.5), 1.0, -0.5),
    "a difference the other way round": (lambda z, y: z.__rsub__(y), -1.0, 1.0),
    "factors": (lambda z, y: 2 * z - y / 4, 2.0, -0.25),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained bias", "frozen bias"])
@pytest.mark.parametrize("tied", [True, False], ids=["one bias", "two"])
@pytest.mark.parametrize("name", ADDED)
def test_sums_of_layers_that_share_no_more_than_their_bias(name, tied, trained):
    """Of p z + q y: if they share it, z and y have the covariance of the bias, and its gradients are in both."""
    add, p, q = ADDED[name]
    x = X[:, 0]

    def relu(S, T):
        v = S.diagonal()
        value, slope = oracle.gaussian(torch.relu, v[:, None], v[None, :], S)
        return value, T * slope

    def dense(S, T, gain=B**2):
        return W**2 * S + B**2, W**2 * (S + T) + gain

    gain = B**2 * trained
    z = dense(*relu(*dense(x @ x.T / 3, 0.0)), gain)
    y = dense(*relu(*z), gain)
    both = [p * p * a + q * q * b + 2 * p * q * c for a, b, c in zip(z, y, (B**2 * tied, gain * tied), strict=True)]
    expected = dense(*relu(*both))
    model = seeded(lambda: Tied(add, tied)).double()
    for layer in (model.one, model.other):
        layer.bias.requires_grad_(trained)
    for kind, wanted in zip(("nngp", "ntk"), expected, strict=True):
        torch.testing.assert_close(InfiniteKernel(model, kind, W, B)(x), wanted, rtol=1e-7, atol=1e-9)


class Twice(nn.Module):
    """One layer at two depths."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.relu(self.inner(torch.relu(self.first(x))))
        return self.last(torch.relu(self.inner(h)))


def test_values_beyond_the_dtype_are_refused():
    x, kernel = X[:, 0], InfiniteKernel(seeded(Twice), "ntk", W, 0.0)
    for scale in (1e25, 1e-25):
        for call in (kernel, kernel.diagonal, lambda x: kernel.paired(x, x.flip(0))):
            with pytest.raises(Refused, match=r"the kernel: got values up to .*float32.*float64"):
                call((scale * x).float())
        torch.testing.assert_close(kernel(scale * x), scale**2 * kernel(x), rtol=1e-12, atol=0)


def test_long_sequences_do_not_exceed_the_stack():
    x = torch.randn(2, 400, 3, dtype=torch.float64)
    model = seeded(lambda: Recurrent(lambda o, h: o[:, -1])).double()
    value = InfiniteKernel(model, "nngp", 1.0, 0.1)(x)
    assert torch.isfinite(value).all()


def test_description_and_changes_of_the_model():
    model = seeded(lambda: Recurrent(lambda o, h: o[:, -1])).double()
    kernel = InfiniteKernel(model)
    text = kernel.describe(X)
    assert "layer 'rnn' (RNN): piecewise linear, slopes 1 and 0, 4 times" in text
    assert "layer 'last' (Linear)" in text
    before = kernel(X)
    with torch.no_grad():
        model.last.weight.normal_(0, 3.0)
    assert (kernel(X) - before).abs().max() > 1


class Mixed(nn.Module):
    """Vectors without a closed form."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.first, self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.rnn = nn.RNN(3, 3, batch_first=True)
        self.state = nn.Parameter(torch.randn(1, 3))

    def forward(self, x):
        v = x[:, 0]
        if self.what == "lstm":
            return self.last(self.lstm(x)[0][:, -1])
        if self.what == "initial state":
            return self.last(self.rnn(x, x[:, :1].transpose(0, 1) + 1)[0][:, -1])
        if self.what == "trained state":
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(self.state + 0 * v)))))
        if self.what == "input and layer":
            return self.last(torch.relu(self.inner(torch.relu(self.inner(v)))))
        if self.what in ("cast", "comparison"):
            z = self.inner(torch.relu(self.inner(torch.relu(self.first(v)))))
            whole = z.to(torch.int) if self.what == "cast" else z > 0
            return self.last(whole.to(z.dtype))
        if self.what == "two activations":
            return self.last(self.inner(torch.relu(self.first(v))) + self.inner(torch.tanh(self.first(v))))
        if self.what == "not Gaussian":
            h = torch.relu(self.first(v))
            return self.last(torch.relu(self.inner(torch.relu(h + self.inner(h)))))
        h = self.first(v)  # an activation and its own input, into one matrix
        return self.last(torch.tanh(self.inner(h) + self.inner(torch.tanh(h))))


@pytest.mark.parametrize(
    "what",
    [
        "cast",
        "comparison",
        "lstm",
        "initial state",
        "trained state",
        "input and layer",
        "two activations",
        "not Gaussian",
        "own input",
    ],
)
def test_what_has_no_closed_form_is_refused(what):
    with pytest.raises(NoLimit, match="sample=16"):
        InfiniteKernel(seeded(lambda: Mixed(what)).double(), "ntk", W, B)(X)


def test_a_word_whose_row_is_zero_or_not_trained_is_refused():
    model = seeded(lambda: Recurrent(lambda o, h: o[:, -1], words=True))
    model.embed = nn.Embedding(TOKENS, 3, padding_idx=0)
    with pytest.raises(NoLimit, match=r"layer 'embed' \(Embedding\): got embedding of a parameter"):
        InfiniteKernel(model, "ntk", W, B)(WORDS)
    assert F.embedding(torch.tensor([0]), model.embed.weight).abs().max() == 0
    torch.nn.init.normal_(model.embed.weight)  # no zeros, but no gradient of this row, either
    with pytest.raises(NoLimit, match=r"layer 'embed' \(Embedding\)"):
        InfiniteKernel(model, "ntk", W, B)(WORDS)
    sequence = nn.Sequential(model.embed, nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))  # a value per position
    with pytest.raises(NoLimit, match="Embedding"):
        InfiniteKernel(sequence, "ntk", W, B)(WORDS)
    frozen = InfiniteKernel(model.requires_grad_(False), "nngp", W, B)(WORDS)
    model.embed.padding_idx = None
    torch.testing.assert_close(InfiniteKernel(model, "nngp", W, B)(WORDS), frozen)
    whole = seeded(lambda: Recurrent(lambda o, h: o[:, -1], words=True))
    assert InfiniteKernel(whole, "ntk", W, B)(WORDS).diagonal().min() > 0  # the same network is taken otherwise
