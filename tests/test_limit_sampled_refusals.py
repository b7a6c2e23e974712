"""What sampling cannot grow is refused by name; so are wrong arguments."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_limit_sampled import TOKENS, WORDS, Encoder, Gated, Recurrent, images, seeded
from torch import nn

from ntkit.base.checks import Refused
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": 1}, "sample: got 1; expected a number of networks, at least 2"),
        ({"sample": 2.5}, "sample: got 2.5"),
        ({"make": Recurrent}, "make: .*Pass sample=16, too"),
        ({"make": 3, "sample": 4}, "make: got 3.*Pass a function"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(Refused, match=message):
        InfiniteKernel(seeded(Gated), **arguments)


class Tied(nn.Module):
    """An embedding whose weights are those of the last layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, words):
        return self.last(torch.relu(self.embed(words)).amax(1))


class Joined(nn.Module):
    """A layer beside the input, into one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.both, self.last = nn.Linear(5, 8), nn.Linear(13, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.both(torch.cat([self.stem(x), x], 1)).softmax(1))


class Literal(nn.Module):
    """A constant size in the forward pass."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.stem(x).view(len(x), 2, 4).softmax(1).reshape(len(x), 8))


class Ambiguous(nn.Module):
    """A number that equals an axis that grows and one that stays."""

    def __init__(self):
        super().__init__()
        self.number = 8
        self.stem, self.last = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.stem(x)
        return self.last((h[:, None] * torch.arange(8.0)[:, None]).softmax(1).mean(1) / self.number)


class Towers(nn.Module):
    """Two towers, whose features are multiplied and summed without weights."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(5, 8), nn.Softmax(1), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x):
        return (self.one(x) * self.two(x)).sum(1, keepdim=True)


REFUSED = {
    "towers": (Towers, "6 features behind the last weight layer, for 1 outputs"),
    "per position": (lambda: nn.Sequential(nn.Embedding(TOKENS, 8), nn.Softmax(1), nn.Linear(8, 2)), "vector"),
    "no hidden layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 2), nn.Softmax(1)), "no hidden layer"),
    "tied": (Tied, "shared with layer 'embed'"),
    "joined": (Joined, "part of which grow"),
    "literal": (Literal, "Pass make="),
    "ambiguous": (Ambiguous, "the number 'number' = 8"),
    "no last layer": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten()), "End with nn.Linear"),
    "parametrized": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Softmax(1), nn.Linear(8, 1)
        ), "parametrized weight",
    ),
    "trained norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), changed(nn.LayerNorm(8)), nn.Softmax(1), nn.Linear(8, 1)),
        "parameter '1.weight'.*differ between features",
    ),
}  # fmt: skip


def changed(norm):
    with torch.no_grad():
        norm.weight[0] = 2.0
    return norm


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_refused_by_name(name):
    build, message = REFUSED[name]
    x = {"per position": WORDS, "tied": WORDS, "no last layer": images()}.get(name, images(4, 5, 1).flatten(1))
    if name == "no hidden layer":
        x = images(3, 5, 2).flatten(1)
    kernel = InfiniteKernel(seeded(build), sample=3)
    with pytest.raises(Refused, match=message):
        kernel(x)


def test_make_must_build_the_same_network():
    model = seeded(lambda: Encoder(style="number"))
    for make, message in (
        (lambda factor: Recurrent(), "make: got other parameters"),
        (lambda factor: 3, "make: got int; expected an nn.Module"),
        (lambda factor: Encoder(24, style="number"), "expected axes 1 or"),
    ):
        with pytest.raises(Refused, match=message):
            InfiniteKernel(model, sample=3, make=make)(WORDS)


class Routed(nn.Module):
    """Four experts by a softmax over scores, and a raw parameter that may be summed over the features."""

    def __init__(self, width=8, scores=4, summed=False):
        super().__init__()
        self.stem, self.route, self.last = nn.Linear(5, width), nn.Linear(width, scores), nn.Linear(width, 1)
        self.raw, self.summed = nn.Parameter(torch.ones(width)), summed
        with torch.no_grad():
            self.raw.normal_()

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        share = self.route(h).softmax(1)[:, :1]
        h = h * (h @ self.raw)[:, None] if self.summed else h * self.raw
        return self.last(h * share)


def test_a_width_that_make_does_not_grow_is_named():
    x = images(4, 5, 1).flatten(1)
    model = seeded(Routed)
    with pytest.warns(UserWarning, match="make: the outputs of 'route.weight' do not grow"):
        InfiniteKernel(model, sample=2, make=lambda factor: Routed(8 * factor)).estimate(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="make")
        InfiniteKernel(model, sample=2, make=lambda factor: Routed(8 * factor, 4 * factor)).estimate(x)
    with pytest.raises(Refused, match=r"make: got hidden widths as before .'stem.weight', 'route.weight'"):
        InfiniteKernel(model, sample=2, make=lambda factor: Routed()).estimate(x)


def test_a_sum_of_a_raw_parameter_over_features_that_grow_is_refused_of_make_too():
    model = seeded(lambda: Routed(summed=True))
    make = lambda factor: Routed(8 * factor, 4 * factor, summed=True)
    with pytest.raises(Refused, match="parameter 'raw': got a sum over features that grow"):
        InfiniteKernel(model, sample=2, make=make).estimate(images(4, 5, 1).flatten(1))


def test_make_must_keep_the_layers():
    class Other(nn.Linear):
        pass

    def make(factor):
        larger = Routed(8 * factor, 4 * factor)
        larger.route = Other(8 * factor, 4 * factor)
        return larger

    with pytest.raises(Refused, match="make: got Other as layer 'route'; expected Linear"):
        InfiniteKernel(seeded(Routed), sample=2, make=make).estimate(images(4, 5, 1).flatten(1))
