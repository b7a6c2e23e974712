"""The sampled limit on networks as users write them: against networks built by hand, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkit.base.checks import Refused
from ntkit.kernels.infinite import sampled
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel

WORDS = torch.tensor([[1, 4, 0, 3, 3], [1, 4, 0, 0, 0], [9, 2, 2, 10, 5]])
ERRORS = 4  # standard errors within which a mean over all entries must lie


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


ROWS, TEXT, IMAGES = normal(4, 5), normal(3, 6, 5), normal(3, 3, 8, 8)


def seeded(build, *arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*arguments).eval()


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(sampled, "_WIDTH", 64)


class Parts(nn.Module):
    """Submodules, and a forward pass given by a function."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def by_hand(build, factor, laws, seed, x):
    """Kernel of one network of a width; laws: parameter -> (std, factor of its gradient), None for what is zero."""
    network = seeded(build, factor)
    generator = torch.Generator().manual_seed(seed)
    kernel, scales = 0.0, []
    for name, p in network.named_parameters():
        std, scale = laws(name, p)
        p.data = torch.randn(p.shape, generator=generator) * std
        if name == "embed.weight" and network.embed.padding_idx is not None:
            p.data[network.embed.padding_idx] = 0
        scales.append(scale)
    out = network(x)
    for c in range(out.shape[1]):
        rows = []
        for i in range(len(x)):
            gradients = torch.autograd.grad(out[i, c], list(network.parameters()), retain_graph=True)
            rows.append(torch.cat([(g * s).flatten() for g, s in zip(gradients, scales, strict=True)]))
        rows = torch.stack(rows).double()
        kernel = kernel + rows @ rows.T / out.shape[1]
    return kernel


def standard(w, b, fans):
    """Laws of the NTK parametrization; fans: parameter -> inputs of one output."""

    def laws(name, p):
        std = b if "bias" in name else w / math.sqrt(fans(name, p))
        return std, std

    return laws


def padded(factor):
    embed = nn.Embedding(11, 16 * factor, padding_idx=0)
    layers = nn.LSTM(16 * factor, 8 * factor, 2, batch_first=True, bidirectional=True)
    last = nn.Linear(16 * factor, 2)

    def run(self, x):
        lengths = (x >= 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.last(torch.cat(list(self.layers(packed)[1][0][-2:]), 1))

    return Parts(run, embed=embed, layers=layers, last=last)


def padded_laws(factor):
    """Torch's own initialization at width 8, its weights over the root of the growth of their inputs."""

    def laws(name, p):
        if name == "embed.weight":
            return 1.0, 1.0
        std = (3 * (16 if name.startswith("last") else 8)) ** -0.5
        growth = 1 if "bias" in name else factor
        return std / math.sqrt(growth), growth**-0.5

    return laws


def attention(factor):
    def run(self, x):
        h = self.stem(x)
        return self.last(self.attention(query=h, key=h, value=h)[0].mean(1))

    width = 16 * factor
    inner = nn.MultiheadAttention(width, 2, batch_first=True, add_bias_kv=True)
    return Parts(run, stem=nn.Linear(5, width), attention=inner, last=nn.Linear(width, 2))


def groups(factor):
    def run(self, x):
        h = F.max_pool2d(self.up(torch.relu(self.stem(x))), 2)
        return self.last(torch.relu(self.depthwise(h)).mean((2, 3)))

    n = 16 * factor
    return Parts(
        run, stem=nn.Conv2d(3, n, 3), up=nn.ConvTranspose2d(n, n, 2, stride=2, groups=4),
        depthwise=nn.Conv2d(n, 2 * n, 3, groups=n), last=nn.Linear(2 * n, 1),
    )  # fmt: skip


def fans_of_groups(name, p):
    return 4 * p.shape[0] // 4 if name == "up.weight" else p[0].numel()


FANS = standard(1.2, 0.3, lambda name, p: p.shape[1])
BY_HAND = {
    "padding, packed, two directions": (padded, WORDS, None, 8, padded_laws(8)),
    "attention with biases of keys": (attention, TEXT, (1.2, 0.3), 4, FANS),
    "groups of a transposed convolution": (groups, IMAGES, (1.2, 0.3), 4, standard(1.2, 0.3, fans_of_groups)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_mean_is_that_of_networks_built_by_hand(name):
    build, x, stds, factor, laws = BY_HAND[name]
    kernel = InfiniteKernel(seeded(build, 1), "ntk", *(stds or (None, None)), sample=24)
    found = kernel.estimate(x)
    assert kernel._sampled(x).factor == factor
    kernels = torch.stack([by_hand(build, factor, laws, seed, x) for seed in range(24)])
    mean, error = kernels.mean(0), kernels.std(0) / math.sqrt(24)
    together = (found.standard_error.square() + error.square()).sqrt().norm()
    assert (found.mean - mean).norm() / together < ERRORS
    assert (found.mean - 1.7 * mean).norm() / together > ERRORS


def test_a_norm_of_the_input_keeps_its_statistics():
    def build(norm):
        layers = [nn.Linear(5, 8), nn.Softmax(1), nn.Linear(8, 1)]
        return nn.Sequential(nn.BatchNorm1d(5, eps=0.0, affine=False) if norm else nn.Identity(), *layers)

    with_norm = seeded(build, True)
    with_norm[0].running_var.copy_(torch.tensor([1.0, 4.0, 0.25, 9.0, 1.0]))
    with_norm[0].running_mean.copy_(torch.arange(5.0))
    x = (ROWS - torch.arange(5.0)) / with_norm[0].running_var.sqrt()
    values = InfiniteKernel(seeded(build, False), "ntk", 1.5, 0.1, sample=3)(x)
    torch.testing.assert_close(InfiniteKernel(with_norm, "ntk", 1.5, 0.1, sample=3)(ROWS), values)


class Attention(nn.Module):
    """One layer of attention; `style` is how the heads' size is known."""

    def __init__(self, factor=1, style="shape", heads=2):
        super().__init__()
        d = 16 * factor
        self.heads, self.style = heads, style
        self.stem, self.q, self.k, self.v = nn.Linear(5, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.last = nn.Linear(d, 1)
        size = d // heads
        if style in ("heads of a size", "both"):
            self.head_dim = size
        if style == "both":
            self.scale = size**-0.5
        if style == "root":
            self.scale = math.sqrt(size)
        if style == "buffer":
            self.register_buffer("scale", torch.tensor(size**0.5))
        if style == "tensor":
            self.scale = torch.sqrt(torch.FloatTensor([size]))
        if style == "parameter":
            self.scale = nn.Parameter(torch.tensor(size**0.5))
        self.config = SimpleNamespace(size=size)

    def forward(self, x):
        h = self.stem(x)
        n, length, width = h.shape
        shape = (n, length, -1, self.head_dim) if self.style == "heads of a size" else (n, length, self.heads, -1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (self.q(h), self.k(h), self.v(h)))
        root = math.sqrt(q.shape[-1])
        if self.style in ("root", "buffer", "tensor", "parameter"):
            root = self.scale
        if self.style == "config":
            root = math.sqrt(self.config.size)
        if self.style == "constant":
            root = 8**0.5
        scores = q @ k.transpose(-1, -2)
        self.scores = (scores * self.scale if self.style == "both" else scores / root).softmax(-1)  # kept, as users do
        return self.last((self.scores @ v).transpose(1, 2).reshape(n, length, width).mean(1))


@pytest.mark.parametrize(("style", "heads"), [("heads of a size", 2), ("root", 2), ("both", 2), ("both", 4)])
def test_sizes_of_heads_and_their_roots_grow(style, heads):
    limit = InfiniteKernel(seeded(Attention, 1, "shape", heads), sample=3)(TEXT)
    other = InfiniteKernel(seeded(Attention, 1, style, heads), sample=3)(TEXT)
    torch.testing.assert_close(other, limit, rtol=1e-4, atol=1e-5)
    made = InfiniteKernel(
        seeded(Attention, 1, style, heads), sample=3, make=lambda factor: Attention(factor, style, heads)
    )
    torch.testing.assert_close(made(TEXT), limit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["config", "buffer", "tensor", "parameter", "constant"])
def test_a_factor_that_may_be_a_root_of_a_width_is_refused(style):
    with pytest.raises(Refused, match=r"factor 2\.82843 in its forward pass.*Pass make="):
        InfiniteKernel(seeded(Attention, 1, style), sample=3)(TEXT)


def latents(factor):
    """Cross attention from constant queries: keys and values alone depend on the sample."""
    d = 8 * factor

    def run(self, x):
        h, q = self.stem(x), self.latents.expand(len(x), -1, -1)
        return self.last(self.attention(q, h, h)[0].mean(1))

    latents, attention = nn.Parameter(torch.ones(1, 3, d)), nn.MultiheadAttention(d, 2, batch_first=True)
    return Parts(run, latents=latents, stem=nn.Linear(5, d), attention=attention, last=nn.Linear(d, 1))


def first_state(factor):
    """A recurrent layer whose first state another layer computes."""
    d = 8 * factor

    def run(self, x):
        return self.last(self.rnn(x, torch.tanh(self.init(x[:, 0]))[None])[1][0])

    return Parts(run, init=nn.Linear(5, d), rnn=nn.GRU(5, d, batch_first=True), last=nn.Linear(d, 1))


def of_no_use(factor):
    """A last block whose residual is computed and not used, a layer that is not called."""
    d = 8 * factor

    def run(self, x):
        h = self.stem(x.transpose(1, 2))
        skip = 0
        for inner in self.inner:
            z = torch.tanh(h)
            h, skip = h + inner(z), skip + z
        return self.last(skip.amax(2))

    inner = nn.ModuleList([nn.Conv1d(d, d, 1), nn.Conv1d(d, d, 1)])
    return Parts(run, stem=nn.Conv1d(5, d, 1), inner=inner, last=nn.Linear(d, 1), not_called=nn.Linear(7, 3))


def two_names(factor):
    """A parameter that belongs to two modules."""
    d = 8 * factor
    gain = nn.Parameter(torch.full((d,), 0.7))
    stem, last, inner = nn.Linear(5, d), nn.Linear(d, 1), Parts(lambda self, x: x * self.gain, gain=gain)
    return Parts(
        lambda self, x: self.last(self.inner((self.stem(x.mean(1)) * self.gain).cumsum(1).tanh())),
        gain=gain, stem=stem, inner=inner, last=last,
    )  # fmt: skip


def mean_by_hand(factor):
    """A sum over six words divided by their number, beside a width of 36."""
    d = 36 * factor
    return Parts(
        lambda self, x: self.last(self.rnn(x)[0].sum(1) / x.shape[1]),
        rnn=nn.GRU(5, d, batch_first=True), last=nn.Linear(d, 1),
    )  # fmt: skip


@pytest.mark.parametrize("build", [mean_by_hand, latents, first_state, of_no_use, two_names])
def test_ordinary_networks_grow_as_the_user_would_make_them(build):
    values = InfiniteKernel(model := seeded(build, 1), sample=3)(TEXT)
    torch.testing.assert_close(InfiniteKernel(model, sample=3, make=build)(TEXT), values, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The mean of the sampled networks:UserWarning")
def test_make_may_draw_and_freeze_as_it_likes():
    def build(factor):
        return nn.Sequential(nn.Linear(5, 8 * factor), nn.Softmax(1), nn.Linear(8 * factor, 1))

    def other(factor):
        network = build(factor)
        for p in network.parameters():
            nn.init.constant_(p, 3.0)
        return network.double()

    model = seeded(build, 1)
    model[0].requires_grad_(False)
    values = InfiniteKernel(model, sample=3)(ROWS)
    state = torch.get_rng_state()
    for make in (build, other):
        assert torch.equal(InfiniteKernel(model, sample=3, make=make)(ROWS), values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(InfiniteKernel(seeded(build, 1), sample=3)(ROWS), values)


def test_a_constant_bias_stays():
    def build(factor):
        network = nn.Sequential(nn.Linear(5, 8 * factor), nn.Softmax(1), nn.Linear(8 * factor, 1))
        nn.init.constant_(network[0].bias, 0.1)
        return network

    assert "parameter '0.bias': 0.1, shape" in InfiniteKernel(seeded(build, 1), sample=3).describe(ROWS)


def test_the_second_samples_may_have_another_dtype():
    kernel = InfiniteKernel(seeded(Attention), sample=3)
    torch.testing.assert_close(kernel(TEXT, TEXT[:2].double()), kernel(TEXT, TEXT[:2]))


def with_statistics():
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Softmax(1), nn.Linear(8, 1))
    network[1].running_var[0] = 2.0
    return network


def slope(name="slope"):
    parts = {"stem": nn.Linear(5, 100), "last": nn.Linear(100, 1)}
    model = Parts(lambda self, x: self.last(F.leaky_relu(self.stem(x), getattr(self, name)).sort(1)[0]), **parts)
    setattr(model, name, 0.1)
    return model


def steps():
    def run(self, x):
        h = self.stem(x)
        for _ in range(self.steps):
            h = h * torch.tanh(self.inner(h))
        return self.last(h)

    return Parts(run, stem=nn.Linear(5, 8), inner=nn.Linear(8, 8), last=nn.Linear(8, 1), steps=8)


def experts():
    def run(self, x):
        h = torch.relu(self.stem(x))
        shares = self.gate(h).softmax(-1)
        return self.last(sum(shares[:, i : i + 1] * expert(h) for i, expert in enumerate(self.experts)))

    inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    return Parts(run, stem=nn.Linear(5, 8), gate=nn.Linear(8, 2), experts=inner, last=nn.Linear(8, 1))


def tied():
    parts = {"stem": nn.Linear(5, 8), "inner": nn.Linear(8, 8)}
    return Parts(lambda self, x: self.inner(torch.tanh(self.stem(x))) @ self.stem.weight, **parts)


def functional():
    parts = {"stem": nn.Linear(5, 8), "last": nn.Linear(8, 1)}
    return Parts(lambda self, x: self.last(F.linear(x, self.stem.weight).softmax(1)), **parts)


def scores(how):
    def run(self, x):
        h = torch.tanh(self.stem(x))
        scores = h @ self.query if how == "product" else (h * self.query).sum(-1)
        return self.last((scores.softmax(1)[..., None] * h).sum(1))

    return Parts(run, stem=nn.Linear(5, 8), query=nn.Parameter(normal(8)), last=nn.Linear(8, 1))


def gated():
    """A layer of one feature: its own width times 64 would be that of the others, too."""
    parts = {"stem": nn.Linear(5, 4096), "gate": nn.Linear(4096, 1), "last": nn.Linear(4096, 1)}
    return Parts(lambda self, x: self.last(torch.sigmoid(self.gate(h := self.stem(x))) * h), **parts)


def joined():
    def run(self, x):
        h = x.new_zeros(len(x), self.hidden)
        for t in range(x.shape[1]):
            h = torch.softmax(self.both(torch.cat([x[:, t], h], 1)), 1)
        return self.last(h)

    return Parts(run, both=nn.Linear(13, 8), last=nn.Linear(8, 1), hidden=8)


REFUSED = {
    "statistics": (with_statistics, ROWS, r"layer '1' \(BatchNorm1d\): got a running_var that differs"),
    "slope": (slope, ROWS, "the number 'slope' = 0.1, which may depend"),
    "scale": (lambda: slope("res_scale"), ROWS, "the number 'res_scale' = 0.1, which may depend"),
    "steps": (steps, ROWS, "the number 'steps' = 8, which may depend"),
    "experts": (experts, ROWS, "a fixed number of features out of those that grow"),
    "tied": (tied, ROWS, r"layer 'stem' \(Linear\): got its weights in a sum outside"),
    "function": (functional, ROWS, r"layer 'stem' \(Linear\): got its weights in a sum outside"),
    "product": (lambda: scores("product"), TEXT, "parameter 'query': got a sum over features that grow"),
    "sum": (lambda: scores("sum"), TEXT, "parameter 'query': got a sum over features that grow"),
    "gate": (gated, ROWS, "Pass make="),
    "joined": (joined, TEXT, "add up a layer on each of them"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 8)), nn.Softmax(1), nn.Linear(8, 1)), ROWS,
        "no weight_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_may_grow_in_two_ways_is_refused(name):
    build, x, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        InfiniteKernel(seeded(build), sample=3)(x)
