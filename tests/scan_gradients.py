"""Which gradients of PyTorch are wrong: every operation of `layout_ops` alone, in every layout, against differences.

`python tests/scan_gradients.py [FIRST LETTERS]` prints what is wrong with the installed version; needs PyTorch only.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator

import layout_moves
import torch
from layout_ops import OPS, Draw, Step
from torch import Tensor, nn

SHAPES = {
    2: ((3, 4), (1, 3), (2, 1)),
    3: ((2, 3, 2), (1, 2, 3), (3, 1, 2), (2, 4, 1)),
    4: ((2, 2, 2, 3), (1, 3, 2, 2), (2, 3, 4, 1), (2, 3, 1, 2), (3, 1, 2, 2)),
}
STEP = 2e-4
DRAWS = 2  # of an operation's parameters and numbers


class Leaf(nn.Module):
    """An operation of a leaf in some layout."""

    def __init__(self, x: Tensor, layout: str, step: Step) -> None:
        super().__init__()
        self.x, self.step, self.layout = nn.Parameter(x), step, layout_moves.LAYOUTS[layout]

    def forward(self) -> Tensor:
        return self.step(self.layout(self.x))


@torch.no_grad()
def differences(model: Leaf, p: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Derivative of every output by the entries of `p`, [outputs, entries], and its error."""
    middle, columns, errors = model(), [], []
    for i in range(p.numel()):
        place = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), p.shape))
        own, values = p[place].item(), []
        for change in (STEP, -STEP, STEP / 2, -STEP / 2):
            p[place] = own + change
            values.append(model())
        p[place] = own
        up, down, up2, down2 = values
        wide, narrow = (up - down) / (2 * STEP), (up2 - down2) / STEP
        columns.append((4 * narrow - wide) / 3)
        errors.append((wide - narrow).abs() + (up + down - 4 * (up2 + down2) + 6 * middle).abs() / STEP)
    return torch.stack(columns, -1).flatten(0, -2), torch.stack(errors, -1).flatten(0, -2)


def cotangents(out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A random cotangent in several memory layouts."""
    g = torch.randn(out.shape, dtype=out.dtype)
    yield "plain", g
    yield "last axis first", g.movedim(-1, 0).contiguous().movedim(0, -1)
    yield "channels last", g.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "expanded", g[..., :1].expand_as(g)
    yield "every second", torch.stack([g, g], -1).flatten(-2)[..., ::2]
    if out.dim() > 2:
        yield "samples last", g.movedim(0, -1).contiguous().movedim(-1, 0)


def wrong(name: str, layout: str, shape: tuple[int, ...], seed: int) -> Iterator[str]:
    """Describe each wrong gradient of one operation in one layout."""
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64)
    draw = Draw(random.Random(seed))
    step = OPS[name][1](draw, x).double().eval()
    for module in step.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = Leaf(x, layout, step)
    params = {n: p for n, p in model.named_parameters()}
    found = {n: differences(model, p) for n, p in params.items()}
    out = model()
    for how, g in cotangents(out):
        grads = torch.autograd.grad(out, list(params.values()), g, retain_graph=True, allow_unused=True)
        for (n, (j, error)), grad in zip(found.items(), grads, strict=True):
            flat = g.reshape(-1)
            expected, bound = (
                flat @ j,
                flat.abs() @ (2 * error) + 1e-7 * float(flat.abs().sum() * j.abs().max()) + 1e-10,
            )
            kinks = (error > 1e-5 * max(1.0, float(j.abs().max()))).any(0)
            got = torch.zeros_like(expected) if grad is None else grad.reshape(-1)
            off = ((got - expected).abs() - bound).masked_fill(kinks, -1).nan_to_num(nan=torch.inf).max()
            if off > 0:
                size = float((got - expected).abs().masked_fill(kinks, 0).max())
                where = f"input {shape} '{layout}', cotangent '{how}'"
                yield f"{name}({', '.join(draw.notes)}) {where}: {n} off by {size:.2g}"


def main(first: str) -> None:
    warnings.simplefilter("ignore")
    print(torch.__version__)
    total = 0
    for name, (axes, _) in OPS.items():
        if not name.startswith(first):
            continue
        lines, raised = [], set()
        for layout in layout_moves.LAYOUTS:
            for shape in (s for a in axes for s in SHAPES[int(a)]):
                for seed in range(DRAWS):
                    total += 1
                    try:
                        lines += wrong(name, layout, shape, seed)
                    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                        raised.add(str(error).splitlines()[0][:100])
        if lines:
            print(f"{name}: {len(lines)} wrong")
            print(*(f"   {line}" for line in lines[:12]), sep="\n", flush=True)
        if raised:
            print(f"{name}: raised {sorted(raised)}", flush=True)
    print(f"{total} combinations")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
