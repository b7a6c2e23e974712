"""Networks without a limit in closed form are refused, and the refusal names the layer."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act, Add
from test_infinite import S1, V1, X1, B, R, W, conv, head, mlp
from torch import nn

from ntkit import InfiniteKernel, Refused


class Raw(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1), forward

    def forward(self, x):
        return self.c(self.function(self, x))


class Own(torch.autograd.Function):
    """A sign with the slope of the identity."""

    @staticmethod
    def forward(ctx, z):
        return z.sign()

    @staticmethod
    def backward(ctx, g):
        return g


REFUSED = {
    "max-pool": (
        nn.Sequential(conv(2, 8), R(), nn.MaxPool2d(2), *head()),
        X1,
        r"layer '2' \(MaxPool2d\).*average pool",
    ),
    "batch norm": (
        nn.Sequential(conv(2, 8), nn.BatchNorm2d(8), R(), *head()).eval(),
        X1,
        r"layer '1' \(BatchNorm2d\).*GroupNorm",
    ),
    "batch norm in training": (
        nn.Sequential(conv(2, 8), nn.BatchNorm2d(8), R(), *head()),
        X1,
        r"layer '1' \(BatchNorm2d\)",
    ),
    "instance norm": (nn.Sequential(conv(2, 8), nn.InstanceNorm2d(8), *head()), X1, r"layer '1' \(InstanceNorm2d\)"),
    "softmax": (mlp(nn.Softmax(1)), V1, r"layer '1' \(Softmax\).*mixes channels"),
    "gated": (nn.Sequential(nn.Linear(6, 8), R(), nn.GLU(), nn.Linear(4, 1)), V1, r"layer '2' \(GLU\).*product"),
    "custom": (mlp(Act(lambda z: z.cumsum(1))), V1, r"layer '1' \(Act\).*cumsum.*mixes"),
    "sorted": (mlp(Act(lambda z: z.sort(1)[0])), V1, r"layer '1' \(Act\).*sort"),
    "attention": (
        nn.Sequential(
            nn.Conv1d(2, 8, 1), Act(lambda z: F.scaled_dot_product_attention(z, z, z)), nn.Flatten(), nn.Linear(72, 1)
        ),
        S1,
        r"layer '0' \(Conv1d\).*attention",
    ),
    "alpha dropout": (mlp(nn.AlphaDropout(0.5)), V1, r"layer '1' \(AlphaDropout\).*eval"),
    "dependent": (Raw(lambda m, x: torch.relu(m.a(x)) + m.a.weight.sum() * 0 + m.a(x)), V1, "a"),
    "relu plus itself, two activations": (
        Raw(lambda m, x: torch.tanh(m.b(h := torch.relu(m.a(x)))) + h),
        V1,
        "depend on each other",
    ),
    "product": (Raw(lambda m, x: m.a(x) * m.b(torch.relu(m.a(x)))), V1, "second time|product"),
    "input added": (nn.Sequential(Add(nn.Identity(), nn.Linear(6, 6)), R(), nn.Linear(6, 1)), V1, "input itself"),
    "norm behind": (
        nn.Sequential(nn.Linear(6, 8), R(), nn.LayerNorm(8), nn.Linear(8, 1)),
        V1,
        r"layer '2' \(LayerNorm\).*before the activation",
    ),
    "activation of a pooled activation": (
        nn.Sequential(conv(2, 8), R(), nn.AvgPool2d(2), nn.Tanh(), *head()),
        X1,
        r"layer '3' \(Tanh\).*not Gaussian",
    ),
    "activation of a sum with one": (
        nn.Sequential(nn.Linear(6, 8), R(), Add(nn.Identity(), nn.Linear(8, 8)), R(), nn.Linear(8, 1)),
        V1,
        r"layer '3' \(ReLU\).*not Gaussian",
    ),
    "norm of a sum with one": (
        nn.Sequential(nn.Linear(6, 8), R(), Add(nn.Identity(), nn.Linear(8, 8)), nn.LayerNorm(8), nn.Linear(8, 1)),
        V1,
        r"layer '3' \(LayerNorm\).*not centered",
    ),
    "pool behind a trained norm": (
        nn.Sequential(conv(2, 8), nn.GroupNorm(1, 8), nn.AvgPool2d(2), R(), *head()),
        X1,
        r"layer '3' \(ReLU\).*freeze its weight",
    ),
    "data decide": (
        Raw(lambda m, x: m.b(m.a(x)) if m.a(x).sum() > 0 else m.a(x)),
        V1,
        "number computed from the data|second time",
    ),
    "channel slopes": (mlp(Act(lambda z: z * torch.linspace(0, 1, 8, dtype=z.dtype))), V1, "numbers per channel"),
    "no weights": (nn.Flatten(), X1, "without random weights"),
    "two outputs": (Raw(lambda m, x: m.a(x)), {"x": V1}, "one tensor"),
    "pool over channels, 1d": (
        nn.Sequential(nn.Linear(6, 8), nn.AvgPool1d(2), nn.Linear(4, 1)),
        V1,
        r"layer '1' \(AvgPool1d\).*for channels",
    ),
    "pool over channels, adaptive": (
        nn.Sequential(nn.Linear(6, 8), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 1)),
        V1,
        r"layer '1' \(Adapt.*for channels",
    ),
    "pool over channels, 2d": (
        nn.Sequential(nn.Conv1d(2, 8, 3), nn.AvgPool2d((1, 7)), nn.Flatten(), nn.Linear(8, 1)),
        S1,
        r"layer '1' \(AvgPool2d\).*for channels",
    ),
    "axis dropped": (
        nn.Sequential(conv(2, 8, (3, 4)), R(), nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8, 1)),
        X1,
        r"layer '2' \(Flatten\)",
    ),
    "positions out": (nn.Sequential(conv(2, 8), nn.Flatten()), X1, "output: got flattened positions"),
    "activation of a norm of positions": (
        nn.Sequential(conv(2, 8), nn.Flatten(), nn.LayerNorm(48), R(), nn.Linear(48, 1)),
        X1,
        r"layer '3' \(ReLU\).*flattened",
    ),
    "norm of a sum not centered": (
        nn.Sequential(nn.Linear(6, 8), R(), Add(nn.Identity(), nn.Linear(8, 8)), nn.LayerNorm(8), R(), nn.Linear(8, 1)),
        V1,
        r"layer '3' \(LayerNorm\).*not centered",
    ),
    "pool of a sum not linear": (
        nn.Sequential(
            conv(2, 8),
            R(),
            Add(nn.AvgPool2d(2, 1), nn.Sequential(Add(nn.Identity(), conv(8, 8, padding=1)), nn.AvgPool2d(2, 1))),
            nn.Flatten(),
            nn.Linear(16, 1),
        ),
        X1,
        "depend on each other",
    ),
    "norm shared": (
        nn.Sequential(
            nn.Linear(6, 8),
            n := nn.LayerNorm(8),
            Add(nn.Identity(), nn.Sequential(R(), nn.Linear(8, 8))),
            n,
            R(),
            nn.Linear(8, 1),
        ),
        V1,
        "second time",
    ),
    "weights cut off": (Raw(lambda m, x: F.linear(x, m.a.weight.detach())), V1, "weight computed from a.weight"),
    "weights cut off, data": (Raw(lambda m, x: F.linear(x, m.a.weight.data)), V1, "weight computed from a.weight"),
    "gradients off": (Raw(lambda m, x: torch.no_grad()(m.a)(x)), V1, r"layer 'a' \(Linear\).*no gradients flow"),
    "slope of one's own": (mlp(Act(lambda z: Own.apply(z))), V1, r"layer '1' \(Act\).*no gradients flow"),
    "written behind autograd": (
        mlp(Act(lambda z: (z.data.mul_(3), z)[1])),
        V1,
        r"layer '1' \(Act\).*no gradients flow",
    ),
    "written into a buffer": (
        Raw(lambda m, x: (t := torch.zeros(()), t.__setitem__((), x.mean()), m.a(x) * t)[2]),
        V1,
        "created elsewhere",
    ),
    "input into the input": (Raw(lambda m, x: m.a(torch.mul(x, 2, out=x))), V1, "input changed in place"),
    "other input": (mlp(R()), X1, "model Sequential: got input .3, 2, 5, 4. float64, on which its forward failed"),
    "integers": (mlp(R()), torch.ones(3, 6, dtype=torch.long), "got input .3, 6. int64"),
    "recurrent": (nn.Sequential(nn.RNN(9, 8)), S1, "RNN|one tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer(name):
    model, x, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        InfiniteKernel(model, "ntk", W, B)(x)


def norm_of(weight, bias):
    norm = nn.LayerNorm(8)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.fill_(bias)
    return norm


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(norm_of(torch.arange(1.0, 9.0), 0.0)), "weight '1.weight' that differs between channels"),
        (mlp(norm_of(torch.ones(8), 1.0)), "bias '1.bias' that is not zero"),
    ],
)
def test_norms_that_make_channels_different_are_refused(model, message):
    with pytest.raises(Refused, match=message):
        InfiniteKernel(model, "ntk", W, B)(V1)


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(mlp(R()))
    with pytest.raises(Refused, match="the model: got a scripted module"):
        InfiniteKernel(model, "ntk", W, B)(V1.float())


def test_refusals_at_the_door():
    for bad, message in (
        (("ck",), "kind"),
        (("ntk", 1.0), "b_std"),
        (("ntk", -1.0, 0.0), "w_std"),
        (("ntk", 1.0, math.nan), "b_std"),
    ):
        with pytest.raises(Refused, match=message):
            InfiniteKernel(mlp(R()), *bad)
    with pytest.raises(Refused, match="x2"):
        InfiniteKernel(mlp(R()), "ntk", W, B)(V1, X1.flatten(1))
    model = nn.Sequential(Act(lambda x: x - x.mean(0)), nn.Linear(6, 1))
    with pytest.raises(Refused, match="depends on the other samples in its batch"):
        InfiniteKernel(model, "ntk", W, B)(V1)
