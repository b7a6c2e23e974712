"""One case of the layout fuzzer: a network, the state around the call, hooks, what is asked; and how it is judged."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from layout_judge import Derivatives, by_autograd, by_differences, combined, outputs_of
from layout_networks import LayoutNet, draw_network, inputs
from torch import Tensor, nn

import ntkit
from ntkit.jacobian.oracle import jacobian
from ntkit.jacobian.structure import SelfCheckError

MODES = ("full", "diagonal", "trace", "sum", "callable")
LAWS = ("two sets", "diagonal", "paired", "layers", "vjp", "jvp", "operator", "named", "sketch", "alone")


def squares(out: Tensor) -> Tensor:
    """A scalar of the outputs, whose gradient depends on them."""
    return out.reshape(len(out), -1).sin().sum(1)


# ---------------------------------------------------------------------- the state around a call


@contextlib.contextmanager
def restored(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


def _hooks_on_saved() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)


STATES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled(False)": lambda: torch.set_grad_enabled(False),
    "default float64": lambda: restored(torch.set_default_dtype, torch.float64, torch.get_default_dtype()),
    "default bfloat16": lambda: restored(torch.set_default_dtype, torch.bfloat16, torch.get_default_dtype()),
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, True, False),
    "two threads": lambda: restored(torch.set_num_threads, 2, torch.get_num_threads()),
    "anomaly mode": torch.autograd.detect_anomaly,
    "one backward thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "dual level": torch.autograd.forward_ad.dual_level,
    "saved tensors hooks": _hooks_on_saved,
    "saved on CPU": torch.autograd.graph.save_on_cpu,
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "math attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "saved tensors may be mutated": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "subclass functions off": torch._C.DisableTorchFunctionSubclass,
}


# ---------------------------------------------------------------------- hooks


def _scale_parameter(net: nn.Module, p: nn.Parameter, step: nn.Module) -> None:
    p.register_hook(lambda g: 0.5 * g)


def _mask_parameter(net: nn.Module, p: nn.Parameter, step: nn.Module) -> None:
    mask = (torch.arange(p.numel()) % 2 == 0).view(p.shape)
    p.register_hook(lambda g: g * mask.to(g))


def _scale_features(net: nn.Module, p: nn.Parameter, step: nn.Module) -> None:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad and not out.is_inference():
            out.register_hook(lambda g: 0.5 * g)

    step.register_forward_hook(hook)


def _scale_gradient_input(net: nn.Module, p: nn.Parameter, step: nn.Module) -> None:
    step.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 0.5 * g for g in gi))


HOOKS: dict[str, tuple[bool, Callable[[nn.Module, nn.Parameter, nn.Module], Any]]] = {
    # name -> whether gradients are no longer derivatives, what registers it
    "parameter scaled": (True, _scale_parameter),
    "parameter masked": (True, _mask_parameter),
    "parameter watched": (False, lambda net, p, step: p.register_hook(lambda g: None)),
    "parameter accumulated": (
        False,
        lambda net, p, step: p.register_post_accumulate_grad_hook(lambda p: p.grad.zero_()),
    ),
    "features scaled": (True, _scale_features),
    "features watched": (False, lambda net, p, step: step.register_forward_hook(_watch)),
    "forward hook": (False, lambda net, p, step: step.register_forward_hook(lambda m, a, out: torch.tanh(out))),
    "forward pre-hook": (False, lambda net, p, step: step.register_forward_pre_hook(lambda m, a: (torch.sin(a[0]),))),
    "backward hook": (False, lambda net, p, step: step.register_full_backward_hook(lambda m, gi, go: None)),
    "backward pre-hook": (False, lambda net, p, step: step.register_full_backward_pre_hook(lambda m, go: None)),
    "backward hook scaled": (True, _scale_gradient_input),
}


def _watch(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda g: None)


# ---------------------------------------------------------------------- a case


@dataclass
class Case:
    """What is drawn from one integer."""

    seed: int
    net: LayoutNet
    x: Tensor
    state: str
    hook: str
    mode: str
    law: str
    target: int  # step that the hook is on

    def __str__(self) -> str:
        size, stride = tuple(self.x.shape), self.x.stride()
        return (
            f"seed {self.seed}: state '{self.state}', hook '{self.hook}' at {self.target}, outputs '{self.mode}', law "
            f"'{self.law}', input {size} strides {stride}\n{self.net!r}"
        )


@dataclass
class Outcome:
    """What came of a case."""

    verdict: str  # "equal", "refused: ...", "self-check: ...", "raw: ...", "constant"
    entries: int = 0
    skipped: int = 0
    torch_faults: list[str] = field(default_factory=list)


class Mismatch(AssertionError):
    """Numbers that are wrong without a word."""


def draw_case(seed: int) -> Case:
    rng = random.Random(seed * 7919 + 1)
    net, shape = draw_network(seed)
    x = inputs(seed, shape, rng.choice((1, 2, 3, 3, 4)))
    state = rng.choice(tuple(STATES)) if rng.random() < 0.5 else "nothing"
    hook = rng.choice(tuple(HOOKS)) if rng.random() < 0.2 else ""
    return Case(seed, net, x, state, hook, rng.choice(MODES), rng.choice(LAWS), rng.randrange(len(net.steps)))


def reference(case: Case) -> tuple[Derivatives, Tensor | None, list[str]]:
    """J by differences, J to compare with, and where plain autograd differs from the first.

    Entries near a kink are autograd's; the second is None where its two ways disagree on one of them.
    """
    net, x = case.net, case.x
    params = [p for p in net.parameters() if p.requires_grad]
    found = by_differences(net, x, params)
    rows = {how: by_autograd(net, x, params, how == "alone") for how in ("batch", "alone")}
    # by symmetry all differences may be rounding, while a wrong gradient is not small
    found.judge_again(max(float(j.nan_to_num().abs().max()) for j in rows.values()))
    faults = [f"{how}: {off:.1e}" for how, j in rows.items() if (off := found.off(j)) > 0]
    single = torch.cat([outputs_of(net, x[i : i + 1]) for i in range(len(x))])
    whole = outputs_of(net, x)
    if not torch.allclose(single, whole, rtol=1e-9, atol=1e-11):
        raise RuntimeError("the samples of the network mix")
    unsure = found.skipped & ((rows["batch"] - rows["alone"]).abs() > 1e-7 * found.scale)
    return found, found.filled(rows["batch"]) if not unsure.any() else None, faults


def hooked(case: Case, j: Tensor, changes: bool) -> Tensor | None:
    """J as autograd has it with the hook that the case names; None where batch and sample disagree on it."""
    params = [p for p in case.net.parameters() if p.requires_grad]
    if not changes:
        return j
    if case.hook.startswith("parameter"):
        first, factor = params[0].numel(), torch.ones(j.shape[2], dtype=j.dtype)
        factor[:first] = 0.5 if case.hook.endswith("scaled") else (torch.arange(first) % 2 == 0).to(j)
        return j * factor
    rows = [by_autograd(case.net, case.x, params, alone) for alone in (False, True)]
    return rows[0] if torch.allclose(*rows, rtol=1e-9, atol=1e-11) else None


def check(case: Case) -> Outcome:
    """Judge a case; raises Mismatch where numbers are wrong without a word."""
    net = case.net
    params = [p for p in net.parameters() if p.requires_grad]
    changes = False
    if case.hook:
        changes, register = HOOKS[case.hook]
        if not changes:  # the function itself may change: before the differences
            register(net, params[0], net.steps[case.target])
    found, j, faults = reference(case)
    outcome = Outcome("equal", found.j.numel(), int(found.skipped.sum()), faults)
    if j is None:
        outcome.verdict = "unjudged"
        return outcome
    if changes:
        HOOKS[case.hook][1](net, params[0], net.steps[case.target])
        own = hooked(case, j, changes)
        if own is None:
            return Outcome("hook: batch and sample differ")
        found = Derivatives(torch.where(found.skipped, 0, own), found.error, found.skipped, found.scale)
        j = own
    if not outputs_of(net, case.x).requires_grad or not j.abs().max() > 1e-7:
        outcome.verdict = "constant"
        if outputs_of(net, case.x).requires_grad:
            return outcome
    judge(case, found, j, outcome, changes)
    return outcome


def judge(case: Case, found: Derivatives, j: Tensor, outcome: Outcome, changes: bool) -> None:
    net = case.net
    before = [(p, p.detach().clone(), p.requires_grad, p._version) for p in net.parameters()]
    buffers = [(b, b.clone()) for b in net.buffers()]
    error = torch.where(found.skipped, 0, 2 * found.error) + 1e-7 * found.scale + 1e-14
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compared = [] if changes else by_oracle(case, j, error)
            with STATES[case.state]():
                got = ask(case, j.shape[1])
            compared += expected(case, got, j, error)
    except ntkit.Refused as refused:
        outcome.verdict = f"refused: {refused}"
        return
    except SelfCheckError as failed:
        outcome.verdict = f"self-check: {failed}"
        return
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError, KeyError) as raw:
        outcome.verdict = f"raw: {type(raw).__name__}: {raw}"
        return
    finally:
        for p, value, flag, version in before:
            if not torch.equal(p, value) or p.requires_grad != flag or p.grad is not None or p._version != version:
                raise Mismatch(f"a parameter was touched\n{case}")
        if any(not torch.equal(b, value) for b, value in buffers):
            raise Mismatch(f"a buffer was touched\n{case}")
    for name, value, wanted, bound in compared:
        if value.shape != wanted.shape:
            raise Mismatch(f"{name}: shape {tuple(value.shape)}, expected {tuple(wanted.shape)}\n{case}")
        difference = (value.double() - wanted).abs()
        if bool(((difference - bound).nan_to_num(nan=torch.inf) > 0).any()):
            size = float(wanted.abs().max())
            raise Mismatch(f"{name}: off by {float(difference.max()):.1e} where the largest is {size:.1e}\n{case}")


Compared = list[tuple[str, Tensor, Tensor, Tensor]]  # name, value, expected, largest error allowed


def by_oracle(case: Case, j: Tensor, error: Tensor) -> Compared:
    """The oracle's Jacobian against the differences."""
    rows = torch.cat(list(jacobian(case.net, case.x).values()), -1)
    return [("oracle", rows, j, error)]


def outputs_and_jacobian(case: Case, j: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The Jacobian of the outputs that are asked for, and its error."""
    if case.mode == "sum":
        return j.sum(1, keepdim=True) / j.shape[1] ** 0.5, error.sum(1, keepdim=True) / j.shape[1] ** 0.5
    if case.mode == "callable":
        with torch.no_grad():
            slope = outputs_of(case.net, case.x).cos()[:, :, None]
        return (slope * j).sum(1, keepdim=True), (slope.abs() * error).sum(1, keepdim=True)
    return j, error


def subset(case: Case) -> Tensor:
    """Another set of samples, in another layout, whose Jacobian is known: some of the first, backwards."""
    return case.x.flip(0)[: max(1, len(case.x) - 1)]


def random_like(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ask(case: Case, c: int) -> dict[str, Any]:
    """What the engine gives: the kernel, and what the law of the case needs. Runs inside the case's state."""
    outputs = squares if case.mode == "callable" else case.mode
    kernel = ntkit.TangentKernel(case.net, outputs=outputs)
    x, law, n = case.x, case.law, len(case.x)
    got: dict[str, Any] = {"kernel": kernel(x)}
    c = 1 if case.mode in ("sum", "callable") else c
    if law == "two sets":
        got[law] = kernel(x, subset(case))
    elif law == "diagonal":
        got[law] = kernel.diagonal(x)
    elif law == "paired":
        other = subset(case)
        got[law] = kernel.paired(x[: len(other)], other)
    elif law == "layers":
        got[law] = kernel.layers(x)
    elif law == "vjp":
        got[law] = [kernel.vjp(x, unit(n, c, k)) for k in range(n * c)]
    elif law == "jvp":
        named = {name: random_like(*p.shape) for name, p in case.net.named_parameters() if p.requires_grad}
        got[law] = kernel.jvp(x, named)
    elif law == "operator" and case.mode != "diagonal":
        got[law] = kernel.operator(x) @ random_like(n * c if case.mode == "full" else n)
    elif law == "alone":
        got[law] = torch.cat([kernel(x[i : i + 1], x) for i in range(n)])
    elif law in ("named", "sketch"):
        name = last_name(case)
        one = ntkit.TangentKernel(case.net, outputs, params=[name])
        got[law] = (one if law == "named" else ntkit.SketchedKernel(case.net, dim=128, outputs=outputs, params=[name]))(
            x
        )
    return got


def last_name(case: Case) -> str:
    return [name for name, p in case.net.named_parameters() if p.requires_grad][-1]


def unit(n: int, c: int, k: int) -> Tensor:
    return torch.eye(n * c, dtype=torch.float64)[k].view(n, c)


def expected(case: Case, got: dict[str, Any], j: Tensor, error: Tensor) -> Compared:
    """What each of these should be by the Jacobian, and how far off it may be."""
    j, error = outputs_and_jacobian(case, j, error)
    mode, n, compared = case.mode, len(j), []
    inner = {"callable": "trace", "sum": "trace"}.get(mode, mode)

    def add(name: str, value: Tensor, rows: Tensor, others: Tensor, e: Tensor, f: Tensor) -> None:
        bound = combined(rows.abs() + e, f, inner) + combined(e, others.abs(), inner)
        compared.append((name, value, combined(rows, others, inner), bound))

    add("kernel", got["kernel"], j, j, error, error)
    law, value = case.law, got.get(case.law)
    if value is None:
        return compared
    back = slice(None) if n == 1 else slice(1, None)
    other, other_error = j[back].flip(0), error[back].flip(0)
    if law == "two sets":
        add(law, value, j, other, error, other_error)
    elif law == "alone":
        add(law, value, j, j, error, error)
    elif law in ("diagonal", "paired"):
        add(law, value, j, j if law == "diagonal" else other, error, error if law == "diagonal" else other_error)
        few = range(len(value))
        name, value, wanted, bound = compared.pop()
        compared.append((name, value, wanted[few, few], bound[few, few]))
    elif law in ("layers", "named", "sketch"):
        at, spans = 0, {}
        for name, p in case.net.named_parameters():
            if p.requires_grad:
                spans[name] = slice(at, at := at + p.numel())
        for name, span in spans.items() if law == "layers" else [(last_name(case), spans[last_name(case)])]:
            share = value[name] if law == "layers" else value
            add(f"{law} {name}", share, j[..., span], j[..., span], error[..., span], error[..., span])
    elif law == "vjp":
        rows = torch.stack([torch.cat([g.reshape(-1) for g in pulled.values()]) for pulled in value])
        compared.append((law, rows, j.flatten(0, 1), error.flatten(0, 1)))
    elif law == "jvp":
        u = torch.cat([random_like(*p.shape).reshape(-1) for p in case.net.parameters() if p.requires_grad])
        compared.append((law, value, j @ u, error @ u.abs()))
    elif law == "operator":
        v = random_like(len(value))
        _, _, K, bound = compared[0]
        if mode == "full":
            K, bound = (t.permute(0, 2, 1, 3).reshape(len(v), len(v)) for t in (K, bound))
        compared.append((law, value, K @ v, bound @ v.abs()))
    return compared


# ---------------------------------------------------------------------- autocast in single precision


def check_autocast(case: Case) -> str:
    """Judge a case under autocast in float32: by per-sample autograd under the same autocast, products in float64.

    Both round to bfloat16 inside the network, in another order; so the bound is the error of that rounding, measured by
    the distance of autocast's own gradients from exact ones. What does not round is exact: the kernel is positive
    semidefinite to float32, as no matrix of products in bfloat16 would be.
    """
    net, x = case.net.float(), case.x.float()
    exact = torch.cat(list(jacobian(net, x).values()), -1)
    params = [p for p in net.parameters() if p.requires_grad]
    if not outputs_of(net, x).requires_grad:
        return "constant"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            alone = by_autograd(net, x, params, True).double()
        except (RuntimeError, NotImplementedError):
            return "unsupported"  # by PyTorch: some function takes no mixed types
        try:
            K = ntkit.TangentKernel(net)(x).double()
        except ntkit.Refused as refused:
            return f"refused: {refused}"
        except SelfCheckError as failed:
            return f"self-check: {failed}"
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as raw:
            return f"raw: {type(raw).__name__}: {raw}"
    rounding, size = (alone - exact).norm(), alone.norm()
    if not rounding < 0.1 * size:
        return "too coarse"  # bfloat16 decides on which side of a kink a value lies
    wanted = combined(alone, alone, "full")
    bound = 8 * float((rounding + 2**-8 * size) * size)
    if not float((K - wanted).norm()) <= bound:
        raise Mismatch(f"under autocast: off by {float((K - wanted).norm()):.1e}, allowed {bound:.1e}\n{case}")
    flat = K.permute(0, 2, 1, 3).reshape(len(x) * K.shape[2], -1)
    spectrum = torch.linalg.eigvalsh(flat)
    if not spectrum[0] >= -1e-5 * spectrum[-1]:
        raise Mismatch(f"under autocast: eigenvalue {spectrum[0]:.1e} of {spectrum[-1]:.1e}\n{case}")
    return "equal"
