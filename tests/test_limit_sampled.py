"""The limit by random wide networks: against closed forms, against recursions and networks written independently."""

from __future__ import annotations

import math

import infinite_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkit.base.checks import NoLimit, Refused
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.kernels.infinite.sampled import SampledLimit, Sampling

TOKENS, LENGTH = 11, 5
WORDS = torch.tensor([[1, 4, 0, 3, 3], [1, 4, 0, 3, 7], [9, 2, 2, 10, 5], [6, 6, 6, 6, 6]])
ERRORS = 4  # standard errors within which a mean over all entries must lie


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def images(n=4, channels=2, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, side, side, generator=generator)


def distance(estimate, exact):
    """Norm of the difference in units of the standard error's norm."""
    return float((estimate.mean - exact.double()).norm() / estimate.standard_error.norm())


def sampled(model, x, kind="ntk", stds=None, networks=24):
    """The sampled limit, even where there is a closed form."""
    return Sampling(kind, networks, None).limit(model, x, stds)


class Residual(nn.Module):
    """A stem, a norm, a skip connection."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(5, 32), nn.Linear(32, 32), nn.Linear(32, 2)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        h = self.stem(x)
        h = h + self.inner(torch.relu(self.norm(h)))
        return self.last(torch.relu(h))


CLOSED = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 2)), 1),
    "residual": (Residual, 1),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1),
            nn.GroupNorm(1, 16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
        ), 2,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 2, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 2),
        ), 2,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 32, 2, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
        ), 2,
    ),
    "frozen": (
        lambda: nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16).requires_grad_(False), nn.ReLU(), nn.Linear(16, 1),
        ), 1,
    ),
}  # fmt: skip


@pytest.fixture
def narrow(monkeypatch):
    """Copies that are a quarter as wide as usual: their errors are larger, and so is what a test allows."""
    from ntkit.kernels.infinite import sampled as module

    monkeypatch.setattr(module, "_WIDTH", 64)


@pytest.mark.parametrize("name", CLOSED)
def test_sampled_limits_are_the_closed_forms_within_their_error(narrow, name):
    build, rank = CLOSED[name]
    model = seeded(build)
    x = images() if rank == 2 else images(4, 5, 1).flatten(1)
    for stds in (None, (1.3, 0.4)):
        for kind in ("ntk", "nngp"):
            exact = InfiniteKernel(model, kind, *(stds or (None, None)))(x)
            limit = sampled(model, x, kind, stds)
            found = limit.gram(x, None)
            assert found.error < 0.1
            assert distance(found, exact) < ERRORS, (kind, stds)
            other = InfiniteKernel(model, kind, 1.8, 0.6)(x)  # the same test tells other parameters apart
            assert distance(found, other) > ERRORS
            if name != "dense":
                continue
            torch.testing.assert_close(limit.gram(x[:2], x[2:]).mean, found.mean[:2, 2:], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(limit.pairs(x, None).mean, found.mean.diagonal(), rtol=1e-4, atol=1e-6)
            aligned = limit.pairs(x[:2], x[2:]).mean
            torch.testing.assert_close(aligned, found.mean[:2, 2:].diagonal(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- recurrent networks


class Recurrent(nn.Module):
    """A character network that keeps its number of units as an attribute."""

    def __init__(self, hidden=24, activation=torch.relu):
        super().__init__()
        self.hidden, self.activation = hidden, activation
        self.of_word, self.of_state = nn.Linear(TOKENS, hidden), nn.Linear(hidden, hidden, bias=False)
        self.last = nn.Linear(hidden, 3)

    def forward(self, words):
        x = F.one_hot(words, TOKENS).to(self.last.weight.dtype)
        h = x.new_zeros(len(x), self.hidden)
        for t in range(x.shape[1]):
            h = self.activation(self.of_word(x[:, t]) + self.of_state(h))
        return self.last(h)


def recurrent_limit(words, w, b, kind):
    """The limit of `Recurrent` by its recursion over time: one weight matrix, the same step on both sides."""
    x = F.one_hot(words, TOKENS).double()
    n = len(words)
    S = T = torch.zeros(n, n, dtype=torch.float64)
    for t in range(words.shape[1]):
        own = w**2 * (x[:, t] @ x[:, t].T) / TOKENS + b**2
        z = own + w**2 * S
        a = z.diagonal()
        value, slope = oracle.gaussian(torch.relu, a[:, None], a[None, :], z)
        T = (z + w**2 * T) * slope
        S = value
    S, T = w**2 * S + b**2, w**2 * T + w**2 * S + b**2
    return T if kind == "ntk" else S


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_a_recurrent_network_tends_to_its_recursion(kind):
    w, b = 1.3, 0.3
    limit = sampled(seeded(Recurrent), WORDS, kind, (w, b), 40)
    found, exact = limit.gram(WORDS, None), recurrent_limit(WORDS, w, b, kind)
    assert found.error < 0.05
    assert distance(found, exact) < ERRORS
    assert distance(found, recurrent_limit(WORDS, w * 1.1, b, kind)) > ERRORS
    assert "the model: 'hidden' grows with the factor" in limit.describe()


class Gated(nn.Module):
    """A network without a closed form."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.last = nn.Embedding(TOKENS, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, words):
        return self.last(self.gru(self.embed(words))[0][:, -1])


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_torch_s_recurrent_layers_have_a_limit(layer):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(TOKENS, 16)
            self.layers = layer(16, 32, num_layers=2, batch_first=True, bidirectional=layer is nn.GRU)
            self.last = nn.Linear(64 if layer is nn.GRU else 32, 2)

        def forward(self, words):
            return self.last(self.layers(self.embed(words))[0].mean(1))

    limit = sampled(seeded(Network), WORDS, networks=6)
    assert 0 < limit.gram(WORDS, None).error < 0.2
    # the covariance of a word with itself is that of the module's own embedding at any width
    law = limit.copies[-1].laws
    assert law["embed.weight"].std == pytest.approx(1, abs=0.2)
    assert law["embed.weight"].factor == 1
    grown = limit.factor
    std = dict(seeded(Network).named_parameters())["layers.weight_hh_l0"].detach().std()
    assert law["layers.weight_hh_l0"].std == pytest.approx(float(std) / math.sqrt(grown), rel=0.1)
    assert law["layers.weight_ih_l1"].factor == pytest.approx(grown**-0.5)


# ---------------------------------------------------------------------- attention


class Block(nn.Module):
    """A block of a transformer as users write it; `style` is how it knows the size of its heads."""

    def __init__(self, width=16, heads=2, style="shape"):
        super().__init__()
        self.heads, self.style = heads, style
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        if style != "shape":
            self.head_dim = width // heads
            self.scale = self.head_dim**-0.5

    def forward(self, x):
        n, length, width = x.shape
        size = width // self.heads if self.style == "shape" else self.head_dim
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        if self.style == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = size**-0.5 if self.style == "shape" else self.scale
            mixed = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Two blocks, an embedding, positions, the mean over words."""

    def __init__(self, width=16, heads=2, style="shape"):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, width))
        self.blocks = nn.Sequential(Block(width, heads, style), Block(width, heads, style))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, words):
        return self.last(self.norm(self.blocks(self.embed(words) + self.positions)).mean(1))


def independent_kernel(width, w, b, seed, words):
    """Kernel of one wide `Encoder` in the NTK parametrization, by torch.func on the standard normal parameters."""
    model = seeded(lambda: Encoder(width))
    generator = torch.Generator().manual_seed(seed)
    normal, scales = {}, {}
    for name, p in model.named_parameters():
        normal[name] = torch.randn(p.shape, generator=generator)
        scales[name] = w / math.sqrt(p.shape[-1]) if name.endswith("weight") else b
        if "embed" in name or "positions" in name:
            scales[name] = 1.0
        elif "norm" in name:
            normal[name], scales[name] = p.detach().clone(), 1.0

    def outputs(normal, word):
        values = {name: scales[name] * t for name, t in normal.items()}
        return torch.func.functional_call(model, values, (word[None],))[0]

    rows = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(normal, words)
    return sum(torch.einsum("icp,jcp->ij", r, r) for r in (t.flatten(2) for t in rows.values())).double() / 2


def test_a_transformer_is_the_mean_of_wide_networks_written_independently():
    w, b, networks = 1.2, 0.2, 40
    kernel = InfiniteKernel(seeded(lambda: fixed_stds(Encoder())), "ntk", w, b, sample=40)
    found = kernel.estimate(WORDS)
    kernels = torch.stack([independent_kernel(256, w, b, seed, WORDS) for seed in range(networks)])
    mean, error = kernels.mean(0), kernels.std(0) / math.sqrt(networks)
    apart = (found.mean - mean).norm() / (found.standard_error.square() + error.square()).sqrt().norm()
    assert found.error < 0.1
    assert apart < ERRORS
    assert (found.mean - 1.3 * mean).norm() / (found.standard_error.square() + error.square()).sqrt().norm() > ERRORS


def fixed_stds(model):
    """With entries of exactly unit variance where they are measured: embeddings and positions."""
    with torch.no_grad():
        for p in (model.embed.weight, model.positions):
            p.sub_(p.mean()).div_(p.square().mean().sqrt())
    return model


def test_every_way_to_write_attention_has_the_same_limit(narrow):
    limits = []
    for style in ("shape", "number", "fused"):
        kernel = InfiniteKernel(seeded(lambda style=style: Encoder(style=style)), "ntk", 1.2, 0.2, sample=3)
        limits.append(kernel(WORDS))
        text = kernel.describe(WORDS)
        assert ("'head_dim' grows with the factor" in text) == (style != "shape")
        assert ("'scale' grows with the factor to the power -0.5" in text) == (style == "number")
        made = InfiniteKernel(
            seeded(lambda style=style: Encoder(style=style)), "ntk", 1.2, 0.2, sample=3,
            make=lambda factor, style=style: Encoder(16 * factor, style=style),
        )  # fmt: skip
        torch.testing.assert_close(made(WORDS), limits[-1], rtol=1e-5, atol=1e-6)
    for other in limits[1:]:
        torch.testing.assert_close(other, limits[0], rtol=1e-4, atol=1e-5)


def test_torch_s_encoder_layers_grow(narrow):
    class Network(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.embed = nn.Embedding(TOKENS, width)
            layer = nn.TransformerEncoderLayer(width, 2, 3 * width, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.last = nn.Linear(width, 2)

        def forward(self, words):
            return self.last(self.encoder(self.embed(words)).mean(1))

    model = seeded(Network).eval()
    kernel = InfiniteKernel(model, sample=4)
    made = InfiniteKernel(model, sample=4, make=lambda factor: Network(16 * factor))
    torch.testing.assert_close(kernel(WORDS), made(WORDS), rtol=1e-5, atol=1e-6)


def test_one_attention_layer_is_the_mean_over_its_scores():
    """Covariance of its outputs, by sampling the Gaussian scores alone: q k^T / sqrt(d) as the head's size grows."""

    class Attention(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.stem = nn.Linear(3, width, bias=False)
            self.attention = nn.MultiheadAttention(width, 1, bias=False, batch_first=True)
            self.last = nn.Linear(width, 1, bias=False)

        def forward(self, x):
            h = self.stem(x)
            return self.last(self.attention(h, h, h, need_weights=False)[0].mean(1))

    w, x = 1.5, torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    found = InfiniteKernel(seeded(Attention), "nngp", w, 0.0, sample=60).estimate(x)
    points = x.reshape(12, 3).double()
    S = w**2 * points @ points.T / 3  # of the stem, at all positions of all samples
    generator = torch.Generator().manual_seed(2)
    root = torch.linalg.cholesky(w**2 * S + 1e-10 * torch.eye(12))
    draws = 20_000
    # scores of all pairs of positions: Gaussian with covariance (w^2 S) x (w^2 S), the same for a query and a key
    scores = root @ torch.randn(draws, 12, 12, generator=generator, dtype=torch.float64) @ root.T
    weights = torch.stack([scores[:, i : i + 4, i : i + 4].softmax(-1).mean(1) for i in (0, 4, 8)], 1)  # [draws, 3, 4]
    blocks = (w**2 * S).reshape(3, 4, 3, 4)
    values = w**4 * torch.einsum("dip,ipjq,djq->dij", weights, blocks, weights)
    exact, error = values.mean(0), values.std(0) / math.sqrt(draws)
    apart = (found.mean - exact).norm() / (found.standard_error.square() + error.square()).sqrt().norm()
    assert found.error < 0.1
    assert apart < ERRORS


# ---------------------------------------------------------------------- pools, shared weights, batch norm


def test_a_max_pool_is_the_mean_over_its_gaussian_field():
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 1))
    )
    x, w, b = images(), 1.3, 0.3
    found = InfiniteKernel(model, "nngp", w, b, sample=40).estimate(x)
    with torch.no_grad():  # many channels of the field at once
        field = nn.Conv2d(2, 100_000, 3, padding=1)
        generator = torch.Generator().manual_seed(5)
        field.weight.copy_(torch.randn(field.weight.shape, generator=generator) * w / math.sqrt(18))
        field.bias.copy_(torch.randn(field.bias.shape, generator=generator) * b)
        features = F.max_pool2d(field(x), 2).double()
    exact = w**2 * torch.einsum("ncij,mcij->nm", features, features) / (4 * 100_000) + b**2
    assert found.error < 0.1
    assert distance(found, exact) < ERRORS


def test_batch_norm_at_its_first_statistics_changes_nothing():
    def build(norm):
        return nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16, eps=0.0, affine=False) if norm else nn.Identity(), nn.ReLU(),
            nn.Linear(16, 1),
        ).eval()  # fmt: skip

    x = images(4, 5, 1).flatten(1)
    exact = InfiniteKernel(seeded(lambda: build(False)), "ntk", 1.2, 0.3)(x)
    found = InfiniteKernel(seeded(lambda: build(True)), "ntk", 1.2, 0.3, sample=20).estimate(x)
    assert distance(found, exact) < ERRORS


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_an_estimate_is_the_statistics_of_its_networks(kind, monkeypatch):
    """Mean, standard error and bias from the values of all networks, drawn once more."""
    from ntkit.kernels.infinite import sampled as module

    monkeypatch.setattr(module, "_WIDTH", 16)
    model, x, networks = seeded(CLOSED["dense"][0]), images(4, 5, 1).flatten(1).double(), 3
    limit = sampled(model.double(), x, kind, (1.3, 0.4), networks)
    found, pairs = limit.gram(x, None), limit.pairs(x, None)
    means, errors = [], []
    for place, larger in enumerate(limit.copies):
        values = []
        for seed in range(networks):
            larger.draw(100_000 * place + seed)
            values.append(module.WeightedKernel(larger, kind, x[:3]).gram(x, None))
        means.append(torch.stack(values).mean(0))
        errors.append(torch.stack(values).std(0) / math.sqrt(networks))
    wanted = means[1], errors[1], means[1] - means[0], (errors[0] ** 2 + errors[1] ** 2).sqrt()
    for of_gram, of_pairs, expected in zip(vars(found).values(), vars(pairs).values(), wanted, strict=True):
        torch.testing.assert_close(of_gram, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of_pairs, expected.diagonal(), rtol=1e-9, atol=1e-12)


def test_values_beyond_the_dtype_are_refused():
    x = 1e25 * images(3, 5, 1).flatten(1)
    kernel = InfiniteKernel(seeded(Maximum), "ntk", 1.3, 0.0, sample=2)
    for call in (kernel, kernel.diagonal, kernel.estimate):
        with pytest.raises(Refused, match=r"the kernel: got values up to .*float32"):
            call(x)


class Maximum(nn.Module):
    """The larger one of two layers: without a closed form."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 256), nn.Linear(5, 256), nn.Linear(256, 1)

    def forward(self, x):
        return self.last(torch.maximum(self.one(x), self.two(x)))


def test_a_bias_of_the_widths_is_told(monkeypatch):
    """Networks that are too narrow for waves, whose kernel is far from linear in that of the layer before."""
    from ntkit.kernels.infinite import sampled as module

    monkeypatch.setattr(module, "_WIDTH", 8)

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 1)])

        def forward(self, x):
            for layer in self.layers[:-1]:
                x = layer(x).cos()
            return self.layers[-1](x)

    model, x = seeded(Waves), images(4, 5, 1).flatten(1)
    exact = InfiniteKernel(model, "nngp", 2.0, 0.1)(x)
    with pytest.warns(UserWarning, match="half as wide, more than three standard errors"):
        found = sampled(model, x, "nngp", (2.0, 0.1), 1200).gram(x, None)
    assert found.biased
    assert distance(found, exact) > ERRORS


# ---------------------------------------------------------------------- what is asked, and what is refused


def test_a_closed_form_is_taken_where_there_is_one():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))), images(3, 5, 1).flatten(1)
    kernel = InfiniteKernel(model, sample=4)
    torch.testing.assert_close(kernel(x), InfiniteKernel(model)(x), rtol=0, atol=0)
    assert kernel.error == 0
    assert "sampled" not in kernel.describe(x)
    with pytest.raises(Refused, match="estimate: got a limit in closed form"):
        kernel.estimate(x)


def test_the_same_call_gives_the_same_bits_and_leaves_random_states_alone():
    model = seeded(Gated)
    torch.manual_seed(7)
    first = InfiniteKernel(model, sample=3)(WORDS)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(InfiniteKernel(model, sample=3)(WORDS), first)
    assert torch.equal(first, first.T)
    assert first.dtype == torch.float32
    assert not torch.equal(InfiniteKernel(model, sample=4)(WORDS), first)
    diagonal = InfiniteKernel(model, sample=3).diagonal(WORDS)
    torch.testing.assert_close(diagonal, first.diagonal(), rtol=1e-5, atol=1e-6)
    operator = InfiniteKernel(model, sample=3).operator(WORDS)
    torch.testing.assert_close(operator @ torch.ones(4), first.sum(1), rtol=1e-5, atol=1e-6)


def test_a_run_that_cannot_be_recorded_is_sampled():
    class Packed(Gated):
        def forward(self, words):
            h = self.embed(words)
            packed = nn.utils.rnn.pack_padded_sequence(h, torch.full((len(words),), LENGTH), batch_first=True)
            return self.last(self.gru(packed)[1][-1])

    found = InfiniteKernel(seeded(Packed), sample=2)(WORDS)
    torch.testing.assert_close(found, InfiniteKernel(seeded(Gated), sample=2)(WORDS), rtol=1e-4, atol=1e-5)


def test_a_network_without_trained_weights_has_a_tangent_kernel_of_zeros():
    kernel = InfiniteKernel(seeded(Gated).requires_grad_(False), sample=2)
    assert torch.equal(kernel(WORDS[:3], WORDS[2:]), torch.zeros(3, 2))
    assert torch.equal(kernel.diagonal(WORDS), torch.zeros(4))


def test_the_identity_of_a_kernel_knows_its_sample():
    from ntkit.gram.gram_identity import what_it_depends_on

    model = seeded(Gated)
    one, two = (what_it_depends_on(InfiniteKernel(model, sample=n), WORDS) for n in (3, 4))
    assert one != two
    assert what_it_depends_on(InfiniteKernel(model, sample=3), WORDS) == one


def test_a_refused_layer_says_how_to_sample():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(NoLimit, match=r"layer '1' \(MaxPool2d\).*InfiniteKernel\(model, sample=16\)"):
        InfiniteKernel(model)(images())


def test_sampled_limit_names_what_it_did():
    lines = sampled(seeded(Residual), images(3, 5, 1).flatten(1), networks=5)
    assert isinstance(lines, SampledLimit)
    text = lines.describe()
    assert text[0] == "sampled: mean of 5 random networks with hidden widths times 8; as many times 4 show the bias"
    assert "parameter 'norm.weight': 1, shape (256,)" in text
