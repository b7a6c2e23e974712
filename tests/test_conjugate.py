"""The conjugate kernel: features found without hooks or names, laws, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import make, tiny_mlp, vectors
from torch import nn

import ntkit
from ntkit.testing import assert_equal, check_kernel


@pytest.mark.parametrize(
    "name", ["mlp", "conv", "one output", "attention, sequence first", "tied", "lstm", "two inputs"]
)
def test_laws(name):
    model, x1, x2 = make(name)
    check_kernel(ntkit.ConjugateKernel(model), x1, x2)


def test_is_the_input_of_the_last_weight_layer():
    model, x1, x2 = make("mlp")
    phi1, phi2 = model[:4](x1), model[:4](x2)
    assert_equal(ntkit.ConjugateKernel(model)(x1, x2), (phi1 @ phi2.T).detach(), 1e-12, "MLP")
    model, x1, _ = make("conv")
    phi = model[:4](x1).detach()
    assert_equal(ntkit.ConjugateKernel(model).features(x1), phi, 1e-12, "CNN")


def test_a_last_convolution_gives_its_whole_input():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3), nn.Flatten()).double()
    x = torch.randn(4, 1, 6, 6).double()
    assert_equal(ntkit.ConjugateKernel(model).features(x), model[:2](x).detach().flatten(1), 1e-12, "features")


def test_a_layer_by_name():
    model, x1, _ = make("mlp")
    assert_equal(ntkit.ConjugateKernel(model, layer="1").features(x1), model[:2](x1).detach(), 1e-12, "layer 1")
    with pytest.raises(ntkit.Refused, match=r"layer: got '9'; expected a submodule's name.*Options"):
        ntkit.ConjugateKernel(model, layer="9")
    assert not any(m._forward_hooks for m in model.modules())


def test_is_the_last_layers_share_of_the_tangent_kernel():
    """For one output, d f / d (last weight) is phi: two definitions meet."""
    model, x1, x2 = make("one output")
    share = ntkit.TangentKernel(model).layers(x1, x2)["2.weight"][:, :, 0, 0]
    assert_equal(ntkit.ConjugateKernel(model)(x1, x2), share, 1e-12, "last layer")


def test_a_frozen_head_still_has_its_features():
    model, x1, _ = make("mlp")
    model[4].requires_grad_(False)
    assert_equal(ntkit.ConjugateKernel(model).features(x1), model[:4](x1).detach(), 1e-12, "frozen head")


class Beside(nn.Module):
    """A weight layer of the hidden features, and another beside it."""

    def __init__(self, second: str):
        super().__init__()
        self.hidden, self.head, self.wide = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(4, 3)
        self.second = second

    def forward(self, x):
        h = torch.relu(self.hidden(x))
        if self.second == "same input":
            return torch.cat([self.head(h), self.head(h).exp()], 1)
        if self.second == "other steps":
            return torch.stack([self.head(h), self.head(h * 2)], 1)
        return self.wide(x) + self.head(h) if self.second == "first" else self.head(h) + self.wide(x)


@pytest.mark.parametrize("second", ["first", "last", "other steps"])
def test_of_several_layers_beside_each_other_none_is_the_last(second):
    with pytest.raises(
        ntkit.Refused, match=r"last weight layer: got AddmmBackward0 beside another weight layer .*layer="
    ):
        ntkit.ConjugateKernel(Beside(second))(torch.randn(4, 4))


def test_heads_with_one_input_and_skips_have_a_last_layer():
    model, x = Beside("same input"), torch.randn(6, 4)
    h = torch.relu(model.hidden(x)).detach()
    assert_equal(ntkit.ConjugateKernel(model)(x), h @ h.T, 1e-6, "two heads")

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            return h + self.last(torch.relu(h))

    model = Skip()
    h = torch.relu(model.first(x)).detach()
    assert_equal(ntkit.ConjugateKernel(model)(x), h @ h.T, 1e-6, "a skip over the last layer")


def test_refusals():
    with pytest.raises(ntkit.Refused, match=r"last weight layer: got NativeLayerNormBackward0, whose weight.*layer="):
        ntkit.ConjugateKernel(nn.LayerNorm(5).double())(vectors(3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    with pytest.raises(ntkit.Refused, match="got AddmmBackward0, whose weight is not a parameter of a dense"):
        ntkit.ConjugateKernel(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), normed).double())(vectors(3))
    with pytest.raises(ntkit.Refused, match=r"features: got shape \(3, 7, 6\) for 7 samples.*Name a layer"):
        ntkit.ConjugateKernel(nn.Sequential(Transposed(), nn.Linear(5, 6)).double(), layer="1")(
            torch.randn(7, 3, 5).double()
        )
    model = tiny_mlp()
    with pytest.raises(ntkit.Refused, match="an empty set"):
        ntkit.ConjugateKernel(model)(vectors(0))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)
