"""Networks whose limit would be a wrong number: each is refused, by its layer and the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit import InfiniteKernel, Refused

N = 8


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def _images() -> Tensor:
    return torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))


def _head() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(N, 1)]


def _streams() -> list[nn.Module]:
    """A convolution for each channel of the input."""
    return [nn.Conv2d(2, N, 3, padding=1, groups=2), nn.ReLU()]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups behind groups of the input": (
        lambda: nn.Sequential(
            *_streams(), nn.Conv2d(N, N, 3, padding=1, groups=2), nn.ReLU(), *_head()
        ),
        "channels of several kinds",
    ),
    "transposed groups behind groups of the input": (
        lambda: nn.Sequential(
            *_streams(), nn.ConvTranspose2d(N, N, 2, groups=2), nn.ReLU(), *_head()
        ),
        "channels of several kinds",
    ),
    "groups behind a concatenation": (
        lambda: Net(
            lambda m, x: m.head(torch.relu(m.mix(torch.cat([torch.relu(m.a(x)), m.b(x).clamp(-1, 1)], 1)))),
            a=nn.Conv2d(2, N // 2, 1), b=nn.Conv2d(2, N // 2, 1), mix=nn.Conv2d(N, N, 1, groups=2),
            head=nn.Sequential(*_head()),
        ),
        "channels of several kinds",
    ),
    "groups of flattened positions": (
        lambda: Net(
            lambda m, x: m.head(torch.relu(m.mix(torch.relu(m.a(x)).flatten(1).unsqueeze(-1))).flatten(1)),
            a=nn.Conv2d(2, N, 1), mix=nn.Conv1d(20 * N, 20 * N, 1, groups=10 * N), head=nn.Linear(20 * N, 1),
        ),
        "channels of several kinds",
    ),
    "an output of groups": (
        lambda: Net(
            lambda m, x: m.out(torch.relu(m.a(x)).mean((2, 3), keepdim=True)).flatten(1),
            a=nn.Conv2d(2, N, 3, groups=2), out=nn.Conv2d(N, 2, 1, groups=2),
        ),
        "channels of several kinds",
    ),
    "a group norm of flattened positions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, N, 3, padding=1), nn.Flatten(), nn.GroupNorm(N, 20 * N, affine=False), nn.Linear(20 * N, 1)
        ),
        "groups of flattened positions",
    ),
    "an array computed from the data": (
        lambda: Net(
            lambda m, x: m.head(torch.relu(m.a(x)) * float(np.abs(x.detach().numpy()).mean())),
            a=nn.Conv2d(2, N, 1), head=nn.Sequential(*_head()),
        ),
        "computed from the data",
    ),
    "an output that is a product": (
        lambda: Net(
            lambda m, x: (lambda h: m.b(h) * m.c(h))(torch.relu(m.a(x.flatten(1)))),
            a=nn.Linear(40, N), b=nn.Linear(N, 1), c=nn.Linear(N, 1),
        ),
        "product",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    build, reason = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(Refused, match=reason):
        InfiniteKernel(build(), w_std=1.3, b_std=0.2)(_images())


def test_sums_by_keyword_are_sums() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, N, 1), "b": nn.Conv2d(2, N, 1), "head": nn.Sequential(*_head())}
    by_name = Net(lambda m, x: m.head(torch.relu(torch.add(m.a(x), other=m.b(x)))), **layers)
    by_sign = Net(lambda m, x: m.head(torch.relu(m.a(x) + m.b(x))), **layers)
    values = [InfiniteKernel(net, w_std=1.3, b_std=0.2)(_images()) for net in (by_name, by_sign)]
    assert torch.equal(*values)
