"""What weights were drawn from: every distribution told from every other, and from what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkit.base.checks import Refused
from ntkit.networks.initialization import DEFAULT, NORMAL, ZEROS, Initial, drawn, initial_std

FAN_IN, FAN_OUT = 300, 700
SCHEMES = {
    DEFAULT: (lambda w: nn.init.kaiming_uniform_(w, a=5**0.5), (3 * FAN_IN) ** -0.5),
    NORMAL: (nn.init.normal_, 1.0),
    "Kaiming normal, gain √2, fan in": (lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), (2 / 300) ** 0.5),
    "Kaiming uniform, gain √2, fan in": (lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"), (2 / 300) ** 0.5),
    "Kaiming normal, gain 1, fan in": (lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"), 300**-0.5),
    "Kaiming uniform, gain 1, fan in": (lambda w: nn.init.kaiming_uniform_(w, nonlinearity="linear"), 300**-0.5),
    "Kaiming normal, gain √2, fan out": (lambda w: nn.init.kaiming_normal_(w, mode="fan_out"), (2 / 700) ** 0.5),
    "Kaiming uniform, gain √2, fan out": (lambda w: nn.init.kaiming_uniform_(w, mode="fan_out"), (2 / 700) ** 0.5),
    "Xavier normal": (nn.init.xavier_normal_, 500**-0.5),
    "Xavier uniform": (nn.init.xavier_uniform_, 500**-0.5),
}  # fmt: skip


def weight(name: str, seed: int, shape: tuple[int, ...] = (FAN_OUT, FAN_IN)) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SCHEMES[name][0](torch.empty(shape))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("seed", range(4))
def test_torch_own_initializers_are_recognized_exactly(name, seed):
    found = initial_std(weight(name, seed), FAN_IN, FAN_OUT)
    assert found.name == name
    assert found.std == pytest.approx(SCHEMES[name][1], rel=1e-14)
    assert (found.error, found.mean) == (0, 0)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("scale", [0.98, 1.02])
def test_two_per_cent_off_is_another_distribution(name, scale):
    w = scale * weight(name, 0)
    found = initial_std(w, FAN_IN, FAN_OUT)
    assert found.name == "measured"
    assert found.std == pytest.approx(float(w.double().square().mean()) ** 0.5, rel=1e-12)
    assert abs(found.std / (scale * SCHEMES[name][1]) - 1) < 5 * found.error < 0.02


def test_layers_as_torch_makes_them():
    torch.manual_seed(0)  # a single bias entry near zero does not look like a draw of the default
    for layer, fan in (
        (nn.Linear(784, 100), 784),
        (nn.Linear(2, 500), 2),
        (nn.Conv2d(16, 32, 3), 144),
        (nn.Conv1d(3, 8, 5), 15),
        (nn.Linear(50, 1), 50),
    ):
        out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        for p in (layer.weight, layer.bias):
            assert initial_std(p, fan, out) == Initial((3 * fan) ** -0.5, DEFAULT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [DEFAULT, "Kaiming normal, gain √2, fan in"])
def test_in_every_precision(name, dtype):
    assert initial_std(weight(name, 5).to(dtype), FAN_IN, FAN_OUT).name == name


def test_biases():
    draw = torch.Generator().manual_seed(0)
    assert initial_std(torch.zeros(9), 4, 9) == Initial(0.0, ZEROS)
    assert initial_std(torch.randn(500, generator=draw), 400, 500).name == NORMAL
    measured = initial_std(0.1 * torch.randn(500, generator=draw), 400, 500)
    assert measured.name == "measured"
    assert abs(measured.std / 0.1 - 1) < 4 * measured.error


def test_a_few_small_values_are_not_standard_normal():
    draw = torch.Generator().manual_seed(0)
    found = [initial_std(0.05 * torch.randn(3, generator=draw), 400, 3).name for _ in range(100)]
    assert found.count(NORMAL) < 5
    found = [initial_std(torch.randn(3, generator=draw), 400, 3).name for _ in range(100)]
    assert found.count(NORMAL) > 95


def test_trained_weights_are_measured():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[3] *= 4  # a few rows have grown
    found = initial_std(layer.weight, 64, 64)
    assert found.name == "measured"
    assert found.std > (3 * 64) ** -0.5


def test_the_standard_error_is_that_of_the_root_mean_square():
    draw = torch.Generator().manual_seed(1)
    rms, told = [], []
    for _ in range(400):
        found = initial_std(0.37 * torch.rand(20, 15, generator=draw) ** 2 - 0.3, 15, 20)
        rms.append(found.std)
        told.append(found.error)
    spread = float(torch.tensor(rms).std() / torch.tensor(rms).mean())
    assert spread < float(torch.tensor(told).mean()) < 2.5 * spread  # never less than a normal's


def test_a_mean_that_is_not_zero_is_told():
    draw = torch.Generator().manual_seed(2)
    w = torch.randn(40, 50, generator=draw) * 0.1
    assert initial_std(w, 50, 40).mean == 0
    found = initial_std(w + 0.05, 50, 40)
    assert found.name.startswith("measured, mean 0.05")
    assert found.mean == pytest.approx(float(w.mean()) + 0.05, rel=1e-4)
    assert found.std == pytest.approx(float(w.std(unbiased=False)), rel=1e-4)  # about the mean


def test_drawn_again_at_another_size():
    g = torch.Generator().manual_seed(0)
    wide = drawn(Initial(0.1, "Kaiming normal, gain √2, fan in"), (900, 800), 800, 900, 300, g)
    assert initial_std(wide, 800, 900).name == "Kaiming normal, gain √2, fan in"
    measured = drawn(Initial(0.1, "measured"), (900, 800), 800, 900, 200, g)
    assert float(measured.std()) == pytest.approx(0.05, rel=0.01)  # sqrt(200 / 800)
    assert float(drawn(Initial(0.1, "measured"), (90_000,), 800, 900, 200, g).std()) == pytest.approx(0.1, rel=0.02)
    assert not drawn(Initial(0.0, ZEROS), (5,), 4, 5, 4, g).any()
    uniform = drawn(Initial(0.1, DEFAULT), (900, 800), 800, 900, 300, g)
    assert initial_std(uniform, 800, 900).name == DEFAULT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((3, 4), 0.5), r"the weight: got 12 entries that are all 0\.5; expected values drawn at random"),
        (torch.tensor([[0.1, float("nan")]]), r"the weight: got values that are not finite; expected finite"),
        (torch.empty(0, 3), r"the weight: got none"),
        (torch.ones(2, 2, dtype=torch.int64), r"the weight: got torch\.int64"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(Refused, match=message):
        initial_std(values, 4, 3, subject="the weight")


@pytest.mark.parametrize("unit", [2.0**-700, 2.0**-400, 2.0**400, 2.0**900])
def test_values_whose_fourth_powers_do_not_exist(unit):
    draw = torch.Generator().manual_seed(3)
    w = 0.3 * torch.randn(40, 50, generator=draw, dtype=torch.float64)
    one, far = initial_std(w + 0.1, 50, 40), initial_std((w + 0.1) * unit, 50, 40)
    assert (far.std, far.error, far.mean) == (one.std * unit, one.error, one.mean * unit)  # a power of two is exact


def test_a_spread_far_below_the_mean():
    """The mean square less the square of the mean has no digit of it: it was 0, or below."""
    draw = torch.Generator().manual_seed(4)
    for size in (1e-9, 1e-11, 1e-13):
        w = 1 + size * torch.randn(30, 20, generator=draw, dtype=torch.float64)
        found = initial_std(w, 20, 30)
        assert found.std == pytest.approx(float((w - 1).std(unbiased=False)), rel=1e-2)
        assert found.mean == pytest.approx(1.0)
