"""The judge of the networks in `layout_networks`: central differences of a model's own forward pass, no autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEP = 2e-4
KINK = 1e-6  # of the largest entry: where two step sizes differ by more, something jumps or bends between them


@dataclass
class Derivatives:
    """J [n, C, P] by differences, how far off it may be, and which entries say nothing because of a kink nearby."""

    j: Tensor
    error: Tensor
    skipped: Tensor
    scale: float

    def judge_again(self, size: float) -> None:
        """Take another J's size into account where it is larger: what is small beside it says something, too."""
        self.scale = max(self.scale, size)
        self.skipped = ~(self.error <= KINK * self.scale)

    def filled(self, other: Tensor) -> Tensor:
        """J with the skipped entries from elsewhere."""
        return torch.where(self.skipped, other, self.j)

    def off(self, other: Tensor) -> float:
        """The largest difference to another J beyond the allowed one, relative to the largest entry."""
        beyond = (other - self.j).abs() - 2 * self.error - 1e-7 * self.scale
        return float(beyond.masked_fill(self.skipped, -1.0).nan_to_num(nan=torch.inf).max()) / self.scale


def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).reshape(len(x), -1)


@torch.no_grad()
def by_differences(net: nn.Module, x: Tensor, params: list[nn.Parameter]) -> Derivatives:
    """Differentiate every output of every sample by every parameter entry, from forward passes of the whole batch.

    Two step sizes, extrapolated. Their difference bounds the error of a smooth function generously; second differences
    show a kink that lies exactly at the point, where central differences of all sizes agree.
    """
    middle, columns, errors = outputs_of(net, x), [], []
    for p in params:
        flat = p.data.view(-1) if p.data.is_contiguous() else p.data
        for index in range(p.numel()):
            place = (
                index if flat.dim() == 1 else tuple(int(i) for i in torch.unravel_index(torch.tensor(index), p.shape))
            )
            own = flat[place].item()
            values = []
            for change in (STEP, -STEP, STEP / 2, -STEP / 2):
                flat[place] = own + change
                values.append(outputs_of(net, x))
            flat[place] = own
            up, down, up2, down2 = values
            wide, narrow = (up - down) / (2 * STEP), (up2 - down2) / STEP
            bent = (up + down - 2 * middle) - 4 * (up2 + down2 - 2 * middle)
            columns.append((4 * narrow - wide) / 3)
            errors.append((wide - narrow).abs() + bent.abs() / STEP)
    j, error = torch.stack(columns, -1), torch.stack(errors, -1)
    error = error + 1e-12 * middle.abs().max() / STEP * 1e-3  # rounding of the differences
    usual = j.abs().masked_fill(~(error <= 1e-3 * j.abs().max()), 0).max()
    scale = max(float(usual), 1e-6 * float(middle.abs().max()), 1e-9)
    return Derivatives(j, error, ~(error <= KINK * scale), scale)


def by_autograd(net: nn.Module, x: Tensor, params: list[nn.Parameter], alone: bool) -> Tensor:
    """J [n, C, P] by plain autograd, from one graph of the batch or one graph per sample."""
    rows = []
    whole = None if alone else outputs_of(net, x)
    for i in range(len(x)):
        out = outputs_of(net, x[i : i + 1])[0] if whole is None else whole[i]
        rows.append(torch.stack([gradient(value, params) for value in out]))
    return torch.stack(rows)


def gradient(value: Tensor, params: list[nn.Parameter]) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in params])
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, params, strict=True)]
    )


def combined(j1: Tensor, j2: Tensor, mode: str) -> Tensor:
    """The kernel of a mode from two Jacobians, by the definition."""
    if mode == "full":
        return torch.einsum("icp,jdp->ijcd", j1, j2)
    if mode == "diagonal":
        return torch.einsum("icp,jcp->ijc", j1, j2)
    if mode == "sum":
        j1, j2 = (j.sum(1, keepdim=True) / j.shape[1] ** 0.5 for j in (j1, j2))
    return torch.einsum("icp,jcp->ij", j1, j2)
