"""Norms on values in any order of axes in memory: kernel, operator and oracle equal finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.jacobian import contraction, oracle, product_checks
from ntkit.jacobian.structure import SelfCheckError

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm without weights": lambda: nn.BatchNorm2d(4, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance norm, tracked": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
}
SHAPES = {"image": (3, 2), "one wide": (5, 1), "one high": (1, 5)}  # height, width
LAYOUTS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {  # tokens [n, T, 4] to images [n, 4, *shape]
    "tokens": lambda t, shape: t.transpose(1, 2).reshape(len(t), 4, *shape),
    "tokens, unflattened": lambda t, shape: t.transpose(1, 2).unflatten(2, shape),
    "contiguous": lambda t, shape: t.transpose(1, 2).reshape(len(t), 4, *shape).contiguous(),
    "channels last": lambda t, shape: t.transpose(1, 2).reshape(len(t), 4, *shape).contiguous(
        memory_format=torch.channels_last
    ),
    "every second": lambda t, shape: t.transpose(1, 2).reshape(len(t), 4, *shape).repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda t, shape: t.mean(1)[:, :, None, None].expand(-1, -1, *shape),
    "flipped": lambda t, shape: t.transpose(1, 2).reshape(len(t), 4, *shape).flip(1),
}  # fmt: skip


class Network(nn.Module):
    """Tokens, a parameter with or without a fast rule, a norm over images in some layout, a head."""

    def __init__(self, norm: str, layout: str, shape: tuple[int, int], slow: bool) -> None:
        super().__init__()
        self.layout, self.shape, self.slow = LAYOUTS[layout], shape, slow
        self.weight, self.norm, self.head = nn.Parameter(torch.randn(4)), NORMS[norm](), nn.Linear(4, 2)
        self.double().eval()
        for tensor in (*self.norm.parameters(), *(b for b in self.norm.buffers() if b.is_floating_point())):
            tensor.data.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.lerp(x, x.tanh(), self.weight) if self.slow else x * self.weight  # lerp has no rule
        images = self.norm(self.layout(x, self.shape))
        return self.head((images.tanh() * torch.linspace(-1, 1, self.shape[1], dtype=x.dtype)).sum((2, 3)))


def network(*how: object) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(*how)


def by_finite_differences(model: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """J [n, C, P] by central differences of the forward pass, error about step^2."""
    columns = []
    with torch.no_grad():
        for p in model.parameters():
            for k in range(p.numel()):
                ends = []
                for sign in (1, -1):
                    before = p.view(-1)[k].item()
                    p.view(-1)[k] = before + sign * step
                    ends.append(model(x))
                    p.view(-1)[k] = before
                columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("slow", [False, True], ids=["rule", "fallback"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_layout_has_the_gradient_of_finite_differences(norm, shape, slow):
    for layout in LAYOUTS:
        model = network(norm, layout, SHAPES[shape], slow)
        size = SHAPES[shape][0] * SHAPES[shape][1]
        x = torch.randn(3, size, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole_J = by_finite_differences(model, x)
        for n in (1, 3):
            J = whole_J[:n]
            K, v = torch.einsum("icp,jdp->ijcd", J, J), torch.linspace(-1, 2, 2 * n, dtype=torch.float64)
            kernel, bound = ntkit.TangentKernel(model), 1e-7 * float(K.abs().max())
            assert (kernel(x[:n]) - K).abs().max() < bound, layout
            assert (oracle.tangent_kernel(model, x[:n]) - K).abs().max() < bound, layout
            whole = K.permute(0, 2, 1, 3).reshape(2 * n, 2 * n)
            assert (kernel.operator(x[:n]) @ v - whole @ v).abs().max() < 3 * n * bound, layout


def test_training_takes_the_right_gradient():
    model = network("batch norm", "tokens", (5, 1), False)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = network("batch norm", "contiguous", (5, 1), False)
    for net in (model, plain):
        net.train = lambda mode=True, net=net: net  # stays in eval mode, as when norms are frozen
        loss = lambda out, y: (out - y).square().mean()
        ntkit.train(net, (x, torch.ones(2, 2).double()), loss, lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the self-check bites


@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("slow", [False, True], ids=["rule", "fallback"])
def test_the_self_check_sees_a_gradient_that_depends_on_the_batch(slow, n, monkeypatch):
    """Without the repair PyTorch's gradient of one sample alone is wrong: noticed on both paths."""
    monkeypatch.setattr("ntkit.jacobian.factors.correct_norms", lambda out: None)
    x = torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(SelfCheckError, match="differs from"):
        ntkit.TangentKernel(network("batch norm", "tokens", (3, 2), slow))(x)


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace", "sum"])
def test_the_self_check_sees_a_product_in_a_coarser_precision(outputs, monkeypatch):
    exact = contraction.multiply

    def coarse(*arguments):
        return exact(*arguments).bfloat16().to(torch.float32)

    monkeypatch.setattr(product_checks, "multiply", coarse)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(SelfCheckError, match="products of the gradients"):
        ntkit.TangentKernel(model, outputs)(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
