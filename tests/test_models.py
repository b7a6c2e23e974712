"""Built-in networks and the user's factory."""

from __future__ import annotations

import pytest
import torch

import ntkit
from ntkit.networks.built_in import BUILT_IN, build


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_the_papers_networks_have_the_papers_sizes():
    """Long 2021: VGG widths 38 (MNIST) and 37 (CIFAR-10), MLP widths 94 and 32, with exactly these parameter counts."""
    assert size(build("vgg", (1, 28, 28), 1, 0)) == 95_267
    assert size(build("vgg", (3, 32, 32), 1, 0)) == 92_205
    assert size(build("mlp", (1, 28, 28), 1, 0)) == 100_675
    assert size(build("mlp", (3, 32, 32), 1, 0)) == 101_537
    assert build("vgg", (1, 28, 28), 1, 0)[-1].in_features == 3_724


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"textcnn"}))  # for sentences: tests/test_text.py
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
def test_every_network_takes_every_image(name, shape):
    model = build(name, shape, 3, seed=1)
    assert model(torch.rand(2, *shape)).shape == (2, 3)
    assert not model.training


def test_weights_are_a_function_of_the_seed():
    before = torch.get_rng_state()
    a, b, c = (build("cnn", (1, 8, 8), 2, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.weight"], c["0.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_gets_what_it_names(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def none(): return nn.Flatten()\n"
        "def both(shape, outputs, width=7): return nn.Linear(shape[0], outputs)\n"
        "class Net(nn.Module): pass\n"
    )
    assert isinstance(build(f"{tmp_path}/nets.py:none", (5,), 3, 0), torch.nn.Flatten)
    made = build(f"{tmp_path}/nets.py:both", (5,), 3, 0)
    assert (made.in_features, made.out_features) == (5, 3)
    assert type(build(f"{tmp_path}/nets.py:Net", (5,), 3, 0)).__name__ == "Net"
    assert isinstance(build("torch.nn:Identity", (5,), 3, 0), torch.nn.Identity)


def test_a_network_in_place_of_its_factory_is_refused(tmp_path):
    (tmp_path / "nets.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))\n")
    message = (
        r"nets.py:net: got a network \(Sequential\); expected a function that makes the network.*def make\(outputs\)"
    )
    with pytest.raises(ntkit.Refused, match=message):
        build(f"{tmp_path}/nets.py:net", (5,), 3, 0)


def test_convolutions_want_images():
    with pytest.raises(ntkit.Refused, match=r"--model cnn: got inputs of shape \(5,\); expected images"):
        build("cnn", (5,), 2, 0)
