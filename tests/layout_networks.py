"""Random networks in unusual memory layouts, drawn from an integer: chains of the operations in `layout_ops`.

Independent of `networks`, which draws whole architectures; here every operation is as likely as any other, and between
any two the features may move to another memory layout.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import layout_moves
import torch
from layout_ops import OPS, Draw, Step, away_from_zero
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYOUTS = layout_moves.LAYOUTS
LARGEST = 40  # numbers per sample between two steps
ENTRIES = 70  # of all parameters
NORMS = [name for name in OPS if "norm" in name and name != "matrix_norm"]
INPUTS = ((5,), (1,), (4, 3), (3, 2), (2, 1), (1, 4), (2, 3, 3), (3, 2, 2), (1, 4, 2), (4, 1, 2))
Shape = tuple[int, ...]


class LayoutNet(nn.Module):
    """A chain of steps; printed, it is one step per line."""

    def __init__(self, steps: list[Step], wrap: list[str]) -> None:
        super().__init__()
        self.steps, self.wrap = nn.ModuleList(steps), wrap

    def forward(self, x: Tensor) -> Tensor:
        for step, wrap in zip(self.steps, self.wrap, strict=True):
            if wrap == "checkpoint":
                x = checkpoint(step, x, use_reentrant=False)
            elif wrap == "residual":
                x = x + step(x)
            else:
                x = step(x)
        return x

    def train(self, mode: bool = True) -> LayoutNet:
        """Stay in eval mode, also while training: with frozen norms, no sample sees another."""
        return super().train(False)

    def __repr__(self) -> str:
        return "\n".join(f"  {s.text}{f' [{w}]' if w else ''}" for s, w in zip(self.steps, self.wrap, strict=True))

    def without(self, i: int) -> LayoutNet:
        """The same network, less one step."""
        keep = [j for j in range(len(self.steps)) if j != i]
        return LayoutNet([self.steps[j] for j in keep], [self.wrap[j] for j in keep])


def with_axes(rng: random.Random, h: Tensor, axes: str) -> Step | None:
    """A step after which the features have an allowed number of axes; None where they do already."""
    if str(h.dim()) in axes:
        return None
    target = int(rng.choice(axes))
    step = {2: to_vector, 3: to_tokens, 4: to_image}[target](rng, h)
    step.text = f"to {target} axes: {step.text}"
    return step


def to_vector(rng: random.Random, h: Tensor) -> Step:
    how = rng.choice(("flatten", "flatten", "mean", "first", "permuted"))
    run = {
        "flatten": lambda m, t: t.flatten(1),
        "mean": lambda m, t: t.mean(tuple(range(2, t.dim()))),
        "first": lambda m, t: t[(slice(None), 0)].reshape(len(t), -1),
        "permuted": lambda m, t: t.movedim(1, -1).reshape(len(t), -1),
    }[how]
    return named(Step(run), how)


def to_tokens(rng: random.Random, h: Tensor) -> Step:
    if h.dim() == 4:
        how = rng.choice(("flatten, transpose", "flatten", "permute, reshape", "row"))
        run = {
            "flatten, transpose": lambda m, t: t.flatten(2).transpose(1, 2),
            "flatten": lambda m, t: t.flatten(2),
            "permute, reshape": lambda m, t: t.permute(0, 2, 3, 1).reshape(len(t), -1, t.shape[1]),
            "row": lambda m, t: t[:, :, 0],
        }[how]
        return named(Step(run), how)
    size = h.shape[1]
    a = rng.choice([k for k in (1, 2, 3, size) if size % k == 0])
    how = rng.choice(("unflatten", "transposed", "outer", "expand"))
    run = {
        "unflatten": lambda m, t: t.unflatten(1, (a, size // a)),
        "transposed": lambda m, t: t.reshape(len(t), a, size // a).transpose(1, 2),
        "outer": lambda m, t: t[:, :, None] * m.w,
        "expand": lambda m, t: t[:, None].expand(-1, 2, -1),
    }[how]
    return named(Step(run, w=away_from_zero(2)), f"{how} {a}")


def to_image(rng: random.Random, h: Tensor) -> Step:
    size = h.shape[1]
    a = rng.choice([k for k in (1, 2, 3, size) if size % k == 0])
    if h.dim() == 3:
        how = rng.choice(("transpose, unflatten", "view, permute", "unflatten", "unsqueeze"))
        run = {
            "transpose, unflatten": lambda m, t: t.transpose(1, 2).unflatten(2, (a, size // a)),
            "view, permute": lambda m, t: t.reshape(len(t), a, size // a, -1).permute(0, 3, 1, 2),
            "unflatten": lambda m, t: t.unflatten(1, (a, size // a)),
            "unsqueeze": lambda m, t: t.unsqueeze(2),
        }[how]
        return named(Step(run), f"{how} {a}")
    how = rng.choice(("unflatten", "outer", "expand"))
    run = {
        "unflatten": lambda m, t: t.unflatten(1, (a, 1, size // a)),
        "outer": lambda m, t: t[:, :, None, None] * m.w,
        "expand": lambda m, t: t[:, :, None, None].expand(-1, -1, 2, 2),
    }[how]
    return named(Step(run, w=away_from_zero(2, 2)), f"{how} {a}")


def named(step: Step, text: str) -> Step:
    step.text = text
    return step


def layout(name: str) -> Step:
    return named(Step(lambda m, t, f=LAYOUTS[name]: f(t)), f"layout {name}")


def smaller(h: Tensor) -> Iterator[Step]:
    """Steps that cut features down to `LARGEST` numbers per sample."""
    shape = list(h.shape[1:])
    while torch.Size(shape).numel() > LARGEST:
        i = max(range(len(shape)), key=lambda a: shape[a])
        keep = (shape[i] + 1) // 2
        shape[i] = keep
        yield named(
            Step(lambda m, t, i=i, keep=keep: t.narrow(i + 1, t.shape[i + 1] - keep, keep)), f"narrow {i + 1}: {keep}"
        )


class Chain:
    """Steps so far, with example features behind the last one."""

    def __init__(self, rng: random.Random, x: Tensor) -> None:
        self.rng, self.h, self.steps, self.wrap, self.entries = rng, x, [], [], 0
        self.draw = Draw(rng)

    def add(self, step: Step, wrap: str = "") -> None:
        with torch.no_grad():
            h = step(self.h)
            if wrap == "residual":
                wrap, h = ("residual", self.h + h) if h.shape == self.h.shape else ("", h)
        self.steps.append(step)
        self.wrap.append(wrap)
        self.h = h

    def op(self, name: str, left: int) -> bool:
        """Add an operation, with what makes the features fit; False where its parameters are too many."""
        axes, build = OPS[name]
        before = len(self.steps), self.h
        if (fit := with_axes(self.rng, self.h, axes)) is not None:
            self.add(fit)
        if self.rng.random() < 0.6:
            self.add(layout(self.rng.choice(tuple(LAYOUTS))))
        self.draw.notes = []
        step = randomized(build(self.draw, self.h).double().eval())
        step.text = f"{name}({', '.join(self.draw.notes)})"
        entries = len({id(p): p for s in (*self.steps, step) for p in s.parameters()}) and sum(
            p.numel() for p in {id(p): p for s in (*self.steps, step) for p in s.parameters()}.values()
        )
        if entries > left:
            del self.steps[before[0] :], self.wrap[before[0] :]
            self.h = before[1]
            return False
        self.add(step, self.rng.choice(("", "", "", "", "residual", "checkpoint")))
        for cut in smaller(self.h):
            self.add(cut)
        if self.h.abs().max() > 6 or self.h.std() > 3:
            self.add(named(Step(lambda m, t: torch.tanh(t)), "tanh"))
        if self.h.dim() not in (2, 3, 4):
            self.add(named(Step(lambda m, t: t.flatten(1)), "flatten"))
        return True


def randomized(step: Step) -> Step:
    """Random statistics of norms, and no parameter at its neutral value."""
    with torch.no_grad():
        for module in step.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.copy_(away_from_zero(*module.weight.shape))
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
    return step


def draw_network(seed: int, ops: int | None = None) -> tuple[LayoutNet, Shape]:
    """A network in float64, in eval mode, and the shape of one sample."""
    rng = random.Random(seed)
    shape = rng.choice(INPUTS)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        x = torch.randn(2, *shape, dtype=torch.float64)
        chain = Chain(rng, x)
        if rng.random() < 0.7:
            chain.op(rng.choice(("linear", "scale", "shift", "matmul", "lerp_weight")), ENTRIES)
        for _ in range(ops or rng.randint(3, 8)):
            for _ in range(4):
                name = rng.choice(NORMS) if rng.random() < 0.12 else rng.choice(tuple(OPS))
                if chain.op(name, ENTRIES):
                    break
        head(chain)
    net = LayoutNet(chain.steps, chain.wrap).eval()
    freeze(rng, net)
    return net, shape


def head(chain: Chain) -> None:
    """At most three outputs: a linear layer, a product by hand, means, or the last few features."""
    rng = chain.rng
    outputs = rng.choice((1, 2, 2, 3))
    how = rng.choice(("linear", "product", "mean", "last"))
    if rng.random() < 0.5:
        chain.add(layout(rng.choice(tuple(LAYOUTS))))
    has = any(True for s in chain.steps for _ in s.parameters())
    if how == "linear" or not has:
        size = chain.h[0].numel()
        chain.add(named(Step(lambda m, t: m.f(t.flatten(1)), f=nn.Linear(size, outputs).double()), "head: linear"))
    elif how == "product":
        w = nn.Parameter(away_from_zero(outputs, *chain.h.shape[1:]))
        chain.add(named(Step(lambda m, t: (t.unsqueeze(1) * m.w).flatten(2).sum(-1), w=w), "head: product"))
    elif how == "mean":
        chain.add(named(Step(lambda m, t: t.flatten(1).mean(1, keepdim=True)), "head: mean"))
    else:
        chain.add(named(Step(lambda m, t: t.flatten(1)[:, -outputs:]), "head: last"))


def freeze(rng: random.Random, net: LayoutNet) -> None:
    """In some networks, some parameters do not require grad; norms are frozen more often, as in fine-tuning."""
    if rng.random() < 0.35:
        params = list(net.parameters())
        keep = rng.choice(params)
        for p in params:
            if p is not keep and rng.random() < 0.4:
                p.requires_grad_(False)


def inputs(seed: int, shape: Shape, n: int) -> Tensor:
    """Samples of a shape, in some layout of their own."""
    rng = random.Random(~seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    name = rng.choice([name for name in LAYOUTS if name != "expanded axis"])
    return LAYOUTS[name](x)
