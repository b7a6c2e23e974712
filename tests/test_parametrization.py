"""The NTK parametrization: the same function, other gradients; and wider networks of the same kind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, spectral_norm

import ntkit
from ntkit.base.checks import Refused
from ntkit.networks.initialization import initial_std
from ntkit.networks.parametrization import Scaled, plain, stds, to_ntk_parametrization
from ntkit.networks.widening import widened


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 2, bias=False),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.hidden, self.again = nn.Linear(8, 8), nn.Conv1d(1, 4, 3, padding=1)
        self.back, self.last = nn.Conv1d(4, 1, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        x = x + self.hidden(torch.relu(self.norm(x)))
        return self.last(x + self.hidden(x))


class Tied(nn.Module):
    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, n), nn.Linear(n, 6)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Reshaping(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down, self.size = nn.Linear(5, 8), nn.Linear(size, 2), size

    def forward(self, x):
        return self.down(self.up(x).reshape(-1, self.size))


class Gained(nn.Linear):
    """A layer of the user's own, with more than weight and bias."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(1))


def weight_norm(layer):
    """In the form before parametrizations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Computed(nn.Linear):
    """A layer whose weight is a tensor, no parameter."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        value = 2 * self.weight.detach()
        del self.weight
        self.weight = value


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.layer(x) + self.shift


DRAW = torch.Generator().manual_seed(3)
FLAT = torch.randn(4, 5, dtype=torch.float64, generator=DRAW)
IMAGES = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=DRAW)
CASES = {
    "mlp": (mlp, FLAT),
    "cnn": (cnn, IMAGES),
    "residual": (Residual, FLAT),
    "tied": (Tied, FLAT[:, [0, 1, 2, 3, 4, 0]]),
}
SCALED = (nn.Linear, nn.Conv1d, nn.Conv2d)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("w_std", "b_std"), [(None, None), (1.3, 0.2), (None, 0.1)])
def test_the_same_function_and_scaled_gradients(case, w_std, b_std):
    make, x = CASES[case]
    model = seeded(make)
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = to_ntk_parametrization(model, w_std, b_std)
    torch.testing.assert_close(made(x), model(x), rtol=1e-13, atol=1e-14)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # the model itself is untouched
    model(x).square().sum().backward()
    made(x).square().sum().backward()
    named = dict(made.named_modules())
    checked = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, SCALED):
            continue
        for what in ("weight", "bias"):
            p = getattr(layer, what)
            if p is None or p.grad is None:
                continue
            held = named[name].parametrizations[what]
            factor = float(held[0].factor)
            torch.testing.assert_close(held.original.grad, factor * p.grad, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(factor * held.original, p, rtol=1e-14, atol=0)
            fan = layer.weight[0].numel()
            if what == "weight":
                own = initial_std(layer.weight, fan, layer.weight.shape[0] * layer.weight[0, 0].numel()).std
                assert factor == pytest.approx(own if w_std is None else w_std / fan**0.5, rel=1e-14)
            elif b_std is not None:
                assert factor == b_std
            checked += 1
    assert checked >= 3


def test_torch_own_initialization_has_its_known_stds():
    made = to_ntk_parametrization(seeded(mlp))
    found = [stds(layer) for layer in made if isinstance(layer, nn.Linear)]
    for (w_std, b_std), fan in zip(found, (5, 7, 11), strict=True):
        assert w_std == pytest.approx(3**-0.5, rel=1e-14)
        assert b_std == pytest.approx((3 * fan) ** -0.5, rel=1e-14)


def test_the_tangent_kernel_is_that_of_scaled_parameters():
    model = seeded(mlp)
    made = to_ntk_parametrization(model, 1.4, 0.3)
    shares = ntkit.TangentKernel(model, outputs="trace").layers(FLAT)
    expected = sum(
        share * (0.09 if name.endswith("bias") else 1.96 / model.get_parameter(name)[0].numel())
        for name, share in shares.items()
    )
    torch.testing.assert_close(ntkit.TangentKernel(made, outputs="trace")(FLAT), expected, rtol=1e-12, atol=0)


def test_zero_biases():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    own = to_ntk_parametrization(model)
    assert stds(own[0])[1] == 0
    assert [name for name, p in own.named_parameters() if not p.requires_grad] == ["0.bias", "2.bias"]
    given = to_ntk_parametrization(model, b_std=0.1)
    assert stds(given[0])[1] == 0.1
    assert given[0].parametrizations.bias.original.requires_grad
    assert not given[0].bias.any()


def test_copies_states_and_back(tmp_path):
    model = seeded(cnn)
    made = to_ntk_parametrization(model)
    twin = copy.deepcopy(made)
    back = plain(made)
    torch.testing.assert_close(back(IMAGES), model(IMAGES), rtol=1e-13, atol=1e-14)
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(made(IMAGES), twin(IMAGES))  # going back leaves other copies as they were
    assert parametrize.is_parametrized(made[0])
    other = to_ntk_parametrization(seeded(cnn, 1), w_std=3.0)  # the factors are loaded, too
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(IMAGES), made(IMAGES))
    path = tmp_path / "w.safetensors"
    save_file(made.state_dict(), path)
    third = to_ntk_parametrization(seeded(cnn, 2))
    ntkit.load_weights(third, path)
    assert torch.equal(third(IMAGES), made(IMAGES))
    single = copy.deepcopy(made).float()
    assert single[0].weight.dtype == torch.float32
    assert stds(single.double()[0]) == stds(made[0])  # the factors are not rounded with the weights
    assert made[0].weight.dtype == torch.float64
    assert not made.training


def test_tied_weights_stay_tied():
    made = to_ntk_parametrization(seeded(Tied))
    assert made.up.parametrizations.weight.original is made.down.parametrizations.weight.original
    assert len(list(made.parameters())) == 3
    back = plain(made)
    assert back.up.weight is back.down.weight

    shared = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6))  # biases of different fan in
    shared[1].bias = shared[0].bias
    with pytest.raises(Refused, match=r"layer '1' \(Linear\): got bias tied to 0\.bias, with factor"):
        to_ntk_parametrization(shared, w_std=1.0)
    made = to_ntk_parametrization(shared, w_std=1.0, b_std=0.1)
    assert len(list(made.parameters())) == 3
    x = torch.randn(4, 3)
    torch.testing.assert_close(made(x), shared(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)), r"layer '0' \(Embedding\): got parameters of its own"),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), r"layer '0' \(ConvTranspose2d\)"),
        (nn.LSTM(3, 2), r"layer '' \(LSTM\): got parameters of its own \(weight_ih_l0"),
        (nn.TransformerEncoderLayer(4, 2, 4), r"layer 'self_attn' \(MultiheadAttention\)"),
        (Raw(), r"layer '' \(Raw\): got parameters of its own \(shift\)"),
        (to_ntk_parametrization(nn.Linear(3, 2)), r"layer '' \(ParametrizedLinear\): got .* parametrized already"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "parametrized already"),
        (Gained(3, 2), r"layer '' \(Gained\): got parameters of its own \(gain\)"),
        (nn.Sequential(weight_norm(nn.Linear(3, 2))), r"layer '0' \(Linear\): got .* own \(weight_g, weight_v\)"),
        (nn.Sequential(spectral_norm(nn.Linear(3, 2))), r"layer '0' \(Linear\): got .* own \(weight_orig\)"),
        (nn.Sequential(Computed(3, 2)), r"layer '0' \(Computed\): got a weight that is computed from other tensors"),
    ],
)
def test_refused_by_name(model, message):
    with pytest.raises(Refused, match=message):
        to_ntk_parametrization(model)


def test_refused_weights():
    zero = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.zeros_(zero[1].weight)
    with pytest.raises(Refused, match=r"layer '1' \(Linear\): got weights that are all zero"):
        to_ntk_parametrization(zero)
    assert stds(to_ntk_parametrization(zero, w_std=1.0)[1])[0] == 1
    nn.init.constant_(zero[0].bias, 0.01)
    with pytest.raises(Refused, match=r"layer '0' \(Linear\), bias: got 4 entries that are all 0\.01"):
        to_ntk_parametrization(zero, w_std=1.0)
    for bad in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(Refused, match="b_std: got"):
            to_ntk_parametrization(nn.Linear(3, 2), b_std=bad)


# ---------------------------------------------------------------------- wider


@pytest.mark.parametrize("ntk", [False, True])
@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_wider_networks_keep_architecture_and_initialization(case, ntk):
    make, x = CASES[case]
    model = seeded(make)
    source = to_ntk_parametrization(model) if ntk else model
    made = widened(source, 40, x)
    assert made(x).shape == model(x).shape
    assert made.training == model.training
    weights = [layer for layer in made if isinstance(layer, SCALED)]
    own = [layer for layer in model if isinstance(layer, SCALED)]
    assert [layer.weight.shape[0] for layer in weights[:-1]] == [40] * (len(weights) - 1)
    assert weights[-1].weight.shape[0] == own[-1].weight.shape[0]
    assert weights[0].weight.shape[1] == own[0].weight.shape[1]
    for i, layer in enumerate(weights):
        fan = layer.weight[0].numel()
        was = stds(source[list(made).index(layer)])
        if ntk:
            assert stds(layer)[0] == pytest.approx(was[0], rel=1e-13)  # w_std and b_std do not change with the width
            assert stds(layer)[1] == was[1]
            assert (
                abs(float(layer.parametrizations.weight.original.detach().std()) - 1) < 5 / layer.weight.numel() ** 0.5
            )
        elif i:  # torch's own at the new fan in
            w = layer.weight.detach()
            assert float(w.abs().max()) <= fan**-0.5
            assert abs(float(w.std()) * (3 * fan) ** 0.5 - 1) < 5 / layer.weight.numel() ** 0.5
    if case == "cnn":
        assert (made[1].num_channels, made[1].num_groups, made[3].groups, made[8].in_features) == (40, 2, 40, 160)
        assert made[4].running_mean.shape == (40,)
        assert not made[4].running_mean.any()


def test_widening_is_seeded_and_leaves_the_random_state_alone():
    model = seeded(Residual)
    del model.again, model.back
    state = torch.get_rng_state()
    a, b, c = (widened(model, 33, FLAT, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a(FLAT), b(FLAT))
    assert not torch.equal(a(FLAT), c(FLAT))
    assert torch.equal(state, torch.get_rng_state())
    assert (a.hidden.in_features, a.norm.normalized_shape) == (33, (33,))


def test_measured_weights_keep_their_variance_per_input():
    model = seeded(mlp)
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(11, 7, generator=DRAW, dtype=torch.float64) * 3)
    made = widened(model, 200, FLAT)
    was = float(model[2].weight.detach().square().mean()) * 7
    assert float(made[2].weight.detach().square().mean()) * 200 == pytest.approx(was, rel=0.05)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(x + self.a(x))


def trained_norm():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.constant_(model[1].bias, 0.1)
    return model


@pytest.mark.parametrize("first", [Gained, Computed, weight_norm, spectral_norm])
def test_a_layer_whose_weights_are_not_its_own_is_not_widened(first):
    layer = first(5, 8) if isinstance(first, type) else first(nn.Linear(5, 8))
    with pytest.raises(Refused, match=r"layer '0' \(\w+\): got (parameters of its own|a weight that is computed)"):
        widened(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2)).eval(), 16, FLAT.float())


class SharedNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.across, self.down, self.norm = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2), norm

    def forward(self, x):
        return self.down(self.norm(self.across(self.norm(self.up(x)))))


class Narrowing(SharedNorm):
    def forward(self, x):
        return self.down(self.norm(self.norm(self.up(x))[:, :8]))


@pytest.mark.parametrize(
    "norm",
    [
        lambda d: nn.LayerNorm(d),
        lambda d: nn.LayerNorm(d, elementwise_affine=False),
        lambda d: nn.RMSNorm(d),
        lambda d: nn.GroupNorm(2, d),
        lambda d: nn.BatchNorm1d(d, affine=False),
    ],
    ids=["layer", "layer without weights", "RMS", "group", "batch without weights"],
)
def test_a_norm_that_is_called_twice(norm):
    made = widened(SharedNorm(norm(8)).double().eval(), 16, FLAT)
    functions = norm(16).double().eval()  # of the new width, as torch makes it
    expected = made.down(functions(made.across(functions(made.up(FLAT)))))
    assert torch.equal(made(FLAT), expected)
    with pytest.raises(Refused, match=r"layer 'norm' \(\w+\): got input of shape"):
        widened(Narrowing(norm(8)).double().eval(), 16, FLAT)


@pytest.mark.parametrize(
    ("make", "width", "message"),
    [
        (lambda: Reshaping(8), 16, r"layer 'down' \(Linear\): got input of shape \(8, 8\), where it was \(4, 8\)"),
        (lambda: Reshaping(8), 11, r"layer 'up' \(Linear\): got an error at or after it \(shape '\[-1, 8\]' is inv"),
        (Skip, 11, r"layer 'a' \(Linear\): got an error at or after it"),
        (trained_norm, 11, r"layer '1' \(LayerNorm\): got a norm that was trained"),
        (Residual, 11, r"layer 'again' \(Conv1d\): got no input: the example does not reach it"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(4, 8), nn.Linear(8, 2)), 10, r"10 features for 4 groups"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 2)), 10, r"layer '1' \(PReLU\)"),
        (mlp, 0, "width: got 0"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), 9, r"on which its forward failed"),
    ],
)  # fmt: skip
def test_what_cannot_be_widened_is_refused_by_name(make, width, message):
    with pytest.raises(Refused, match=message):
        widened(seeded(make), width, FLAT)


def test_grouped_convolutions_and_tied_weights_are_not_widened():
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(Refused, match=r"layer '0' \(Conv2d\): got 2 groups of 4 channels"):
        widened(grouped, 12, torch.randn(2, 4, 3, 3))
    with pytest.raises(Refused, match=r"layer 'down' \(Linear\): got weight tied to up\.weight"):
        widened(seeded(Tied), 12, CASES["tied"][1])


def test_the_factor_is_shown():
    assert "factor=0.5" in repr(Scaled(0.5))
