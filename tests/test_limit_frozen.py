"""Networks of which a single parameter is trained: what each adds to the tangent kernel, in closed form."""

from __future__ import annotations

import pytest
import torch
from test_limit_norms import arc_cosines
from torch import nn
from torch.nn.utils import parametrize

from ntkit import InfiniteKernel
from ntkit.networks.parametrization import Scaled

W, B = 1.3, 0.4
X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Sequence(nn.Module):
    """Features last; a mean over some positions, with weights as of attention."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.layers(x.transpose(1, 2))[:, :2].mean(1))


def vectors():
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def images():
    ends = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)
    return nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), *ends)


CASES = {"vectors": (vectors, [1.0]), "positions": (images, [1 / 3] * 3), "a sequence": (Sequence, [0.5, 0.5, 0.0])}


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_alone_adds_its_part(name):
    make, share = CASES[name]
    model, positions = make().double(), len(share)
    rows = X.flatten(1) if positions == 1 else X.transpose(1, 2).reshape(-1, 6)
    mean = torch.block_diag(*[torch.tensor([share], dtype=torch.float64)] * len(X))
    first = W**2 * rows @ rows.T / rows.shape[1]
    value, slope = arc_cosines(first + B**2)
    second = W**2 * value
    value, second_slope = arc_cosines(second + B**2)
    behind, before = W**2 * second_slope, W**2 * slope
    parts = [first * before * behind, B**2 * before * behind, second * behind, B**2 * behind]
    parts = [mean @ part @ mean.T for part in (*parts, W**2 * value)]
    parts.append(torch.full_like(parts[0], B**2))
    for trained, wanted in zip(model.parameters(), parts, strict=True):
        model.requires_grad_(False)
        trained.requires_grad_(True)
        kernel = InfiniteKernel(model, "ntk", W, B)
        torch.testing.assert_close(kernel(X), wanted, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(kernel.paired(X, X.flip(0)), wanted.flip(1).diagonal(), rtol=1e-7, atol=1e-12)
        if name != "a sequence":  # with weights between positions it has no gradients
            found = kernel(X.clone().requires_grad_()).detach()
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_a_norms_weight_with_a_factor_adds_the_square_of_the_factor():
    """Weight 0.5 p, bias 0.25 p': the parts of the kernel by hand."""
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8, eps=0.5), nn.Linear(8, 1, bias=False)).double()
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    parametrize.register_parametrization(model[1], "weight", Scaled(0.5))
    parametrize.register_parametrization(model[1], "bias", Scaled(0.25))
    with torch.no_grad():
        model[1].parametrizations.weight.original.fill_(3.0)  # a weight of 1.5
    x = X[:, 0]
    S = W**2 * x @ x.T / 3 + B**2
    scale = (S.diagonal() + 0.5).rsqrt()
    correlation = S * scale * scale[:, None]
    expected = {
        "1.parametrizations.weight.original": W**2 * 0.5**2 * correlation,
        "1.parametrizations.bias.original": W**2 * 0.25**2 * torch.ones_like(S),
        "2.weight": W**2 * 1.5**2 * correlation,
    }
    for trained, wanted in expected.items():
        for name, p in model.named_parameters():
            p.requires_grad_(name == trained)
        torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(x), wanted, rtol=1e-12, atol=1e-14)
