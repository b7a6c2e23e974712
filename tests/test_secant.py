"""The secant Jacobian: f(after) - f(before) = J (after - before), exactly, at any distance, or refused by name.

Long because of its tables: hard numbers, ways to use a parameter, what is refused.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from secant_ops import AVERAGED, DECIDE, HOLDS, OTHER_GRADIENT, REFUSED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.families import FAMILIES

import ntkit
from ntkit.base.batch import count
from ntkit.jacobian.model_calls import call
from ntkit.jacobian.model_outputs import reduce_outputs
from ntkit.secant import secant_tensor as module
from ntkit.secant.secant_jacobian import Secant, SecantMode
from ntkit.secant.secant_tensor import DISPATCH_KEYS, SECANT_RULES, NoSecant, SecantTensor, aten

Values = Mapping[str, Tensor]
QUICK = [name for name, family in FAMILIES.items() if not family.slow and not family.refused]
ROUTED = ("Mixtral", "mixture of experts")
BOUND = 1e-12

# ---------------------------------------------------------------------- the law


def plainly(model: nn.Module, values: Values, x: Any, outputs: Any = "full") -> Tensor:
    """What the model itself gives at these parameters, [n, C], with its graph."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    return reduce_outputs(call(model, x), outputs, count(x))


def cotangents(f: Tensor, most: int) -> Iterator[Tensor]:
    """A random one, and outputs one by one: all, or some."""
    g = torch.Generator().manual_seed(0)
    yield torch.randn(f.shape, generator=g, dtype=f.dtype)
    for k in torch.randperm(f.numel(), generator=g)[:most]:
        yield F.one_hot(k, f.numel()).view(f.shape).to(f)


def gradients(out: Tensor, params: Any, v: Tensor) -> list[Tensor]:
    params = list(params)
    found = torch.autograd.grad(out, params, v, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def error(
    model: nn.Module, x: Any, before: Values, after: Values, outputs: Any = "full", most: int = 3, least: float = 0.0
) -> float:
    """Largest of |v . (f(after) - f(before)) - sum_p <grad_p, after_p - before_p>|, relative to its terms and v . f.

    `least` is a size below which outputs are all rounding.
    """
    f0, f1 = (plainly(model, values, x, outputs).detach() for values in (before, after))
    secant = Secant(model, dict(model.named_parameters()), outputs).at(before, after)
    out, worst = call(secant, x), 0.0
    for found, f in zip(secant.ends, (f0, f1), strict=True):
        assert (found - f).abs().max() <= 1e3 * torch.finfo(f.dtype).eps * max(f.abs().max(), 1e-3)
    for v in cotangents(f0, most):
        grads = gradients(out, secant.params.values(), v)
        assert all(g.isfinite().all() for g in grads)
        steps = [after[name] - before[name] for name in secant.params]
        terms = torch.cat([(g.double() * s.double()).flatten() for g, s in zip(grads, steps, strict=True)])
        change, size = (v * (f1 - f0)).double().sum(), (v * f0).sum().abs() + (v * f1).sum().abs()
        worst = max(worst, float((change - terms.sum()).abs() / (terms.abs().sum() + size + least + 1e-300)))
    return worst


def apart(before: Values, distance: float, seed: int = 1) -> dict[str, Tensor]:
    """Parameters at a distance, relative to their own size."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: p + distance * p.abs() * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
        for name, p in before.items()
    }


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def holds(model: nn.Module, x: Any, *distances: float) -> None:
    for distance in distances or (1e-9, 1e-3, 0.1, 1.0):
        before = own(model)
        assert error(model, x, before, apart(before, distance)) <= BOUND, distance


class Net(nn.Module):
    """A function of two tensors, which the parameters and the samples move."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        g = torch.Generator().manual_seed(0)
        for name in "abcd":
            setattr(self, name, nn.Parameter(torch.randn(4, 6, generator=g, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x * self.a + self.b, x.flip(0) * self.c + self.d)
        return y.reshape(len(x), -1) if y.dim() else y * x[:, 0]


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pairs(before: Values) -> dict[str, tuple[Values, Values]]:
    """Ends that coincide, nearly coincide, lie apart, are unrelated, or coincide in most entries; whole numbers."""
    g = torch.Generator().manual_seed(2)
    other = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in before.items()}
    some = {name: torch.where(torch.rand(p.shape, generator=g) < 0.8, p, other[name]) for name, p in before.items()}
    whole = [{name: p.round() for name, p in end.items()} for end in (before, other)]
    near = {f"{d:g}": (before, apart(before, d)) for d in (0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 1.0)}
    return {**near, "unrelated": (before, other), "mostly the same": (before, some), "whole": (whole[0], whole[1])}


# ---------------------------------------------------------------------- operations


# these divide by a whole number that is 0
NOT_FINITE = {(name, "whole") for name in ("two: div, sign changes", "two: plain / h", "product: complex exp")}


@pytest.mark.parametrize("name", HOLDS)
def test_the_law_holds_for(name):
    model = Net(HOLDS[name])
    for kind, (before, after) in pairs(own(model)).items():
        if (name, kind) in NOT_FINITE:
            assert not all(torch.isfinite(plainly(model, end, X)).all() for end in (before, after))
        else:
            assert error(model, X, before, after) <= BOUND, kind


@pytest.mark.parametrize("name", [name for name in HOLDS if name not in OTHER_GRADIENT])
def test_where_the_ends_coincide_it_is_the_gradient_of(name):
    model = Net(HOLDS[name])
    if (
        name.endswith("aminmax")
        and "NotImplemented" in type(X.clone().requires_grad_().aminmax(dim=-1)[1].grad_fn).__name__
    ):
        pytest.skip("autograd of this torch, with which the secant is compared, has no derivative of aminmax")
    f, secant = plainly(model, own(model), X), Secant(model, dict(model.named_parameters()))
    out = secant(X)
    for v in cotangents(f.detach(), 3):
        grads, wanted = gradients(out, secant.params.values(), v), gradients(f, model.parameters(), v)
        for g, w in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", DECIDE)
def test_a_decision_is_exact_or_refused(name):
    function, culprit = DECIDE[name]
    model, refused = Net(function), []
    for kind, (before, after) in pairs(own(model)).items():
        try:
            assert error(model, X, before, after) <= BOUND, kind
        except NoSecant as refusal:
            refused.append(str(refusal))
    assert refused
    assert all(culprit in text for text in refused)


@pytest.mark.parametrize("name", AVERAGED)
def test_the_law_holds_for_the_averaged_jacobian_or_it_is_refused(name):
    function, culprit = AVERAGED[name]
    model, refused = Net(function), {}
    for kind, (before, after) in pairs(own(model)).items():
        try:
            assert error(model, X, before, after) <= BOUND, kind
        except NoSecant as refusal:
            refused[kind] = str(refusal)
    assert all(culprit in text for text in refused.values())
    # a step of training is as short as the others
    assert refused.keys() <= {"0.1", "1", "unrelated", "mostly the same", "whole"}


@pytest.mark.parametrize("name", REFUSED)
def test_no_rule_no_number(name):
    function, culprit = REFUSED[name]
    model = Net(function)
    secant = Secant(model, dict(model.named_parameters()))
    for before, after in pairs(own(model)).values():
        with pytest.raises(NoSecant) as refusal:
            secant.at(before, after)(X)
        assert culprit in str(refusal.value)


ON_A_GPU = {aten.cudnn_batch_norm, aten._thnn_fused_lstm_cell, aten._thnn_fused_gru_cell}  # tested below, by hand


def test_every_rule_is_reached(monkeypatch):
    seen, apply = set(), module.apply

    def watched(func, args, kwargs):
        seen.add(func._overloadpacket)
        return apply(func, args, kwargs)

    monkeypatch.setattr(module, "apply", watched)
    functions = [
        *HOLDS.values(),
        *(function for function, _ in (*DECIDE.values(), *AVERAGED.values(), *REFUSED.values())),
    ]
    for function in functions:
        model = Net(function)
        before, after = pairs(own(model))["unrelated"]
        try:
            Secant(model, dict(model.named_parameters())).at(before, after)(X)
        except NoSecant:
            continue
    assert SECANT_RULES.keys() - {None, "other"} - seen == ON_A_GPU


def by_rule(packet: Any, *args: Any) -> Any:
    """What a rule makes of an operation that only a GPU has; the operation itself where nothing moves."""
    return SECANT_RULES[packet](packet.default, args, {})


def test_batch_norm_of_a_gpu():
    def function(h, k):
        mean, var, w, b = torch.arange(4).double(), torch.arange(4).double() + 1, h[0, :, 0], h[0, :, 1]
        outs = []
        for training in (False, True):
            if isinstance(h, SecantTensor):
                y, *rest = by_rule(aten.cudnn_batch_norm, h, w, b, mean, var, training, 0.1, 1e-5)
                assert len(rest) == 3
            else:
                y = F.batch_norm(h, mean, var, w, b, training, 0.0)
            outs.append(y)
        return torch.cat(outs, 1)

    holds(Net(function), X)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_cells_of_a_gpu(kind):
    def function(h, k):
        state, memory, width = h[:, 0, :2], k[:, 0, :2], {"LSTM": 8, "GRU": 6}[kind]
        w, u, b, c = (t.flatten()[: 2 * width].view(width, 2) for t in (h[0], h[1], k[0], k[1]))
        b, c, x = b[:, 0], c[:, 1], X[:, 0, :2]
        if not isinstance(h, SecantTensor):
            plain = {"LSTM": torch._VF.lstm_cell, "GRU": torch._VF.gru_cell}[kind]
            found = plain(x, (state, memory) if kind == "LSTM" else state, w, u, b, c)
            return torch.cat(found, 1) if kind == "LSTM" else found
        if kind == "LSTM":
            return torch.cat(by_rule(aten._thnn_fused_lstm_cell, x @ w.t() + b, state @ u.t() + c, memory)[:2], 1)
        return by_rule(aten._thnn_fused_gru_cell, x @ w.t(), state @ u.t(), state, b, c)[0]

    holds(Net(function), X)


# ---------------------------------------------------------------------- numbers that are hard


def with_numbers(function: Callable[[Tensor], Tensor], z0: list[Any], z1: list[Any]) -> float:
    """Error of the law for a function of one parameter that goes from z0 to z1."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.zeros_like(torch.tensor(z0, dtype=torch.float64)))

        def forward(self, x: Tensor) -> Tensor:
            return function(self.z).reshape(1, -1)

    ends = [{"z": torch.tensor(z, dtype=torch.float64)} for z in (z0, z1)]
    return error(One(), torch.zeros(1), *ends, most=100)


TRAPS: dict[str, tuple[Callable[[Tensor], Tensor], list[Any], list[Any]]] = {
    "relu at 0": (torch.relu, [0.0, 0.0, 0.0, -1.0, 1.0], [0.0, 1.0, -1.0, 0.0, 0.0]),
    "abs at 0": (torch.abs, [0.0, 0.0, 0.0, -1.0, 1.0], [0.0, 1.0, -1.0, 0.0, 0.0]),
    "square root at 0": (torch.sqrt, [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]),
    "power at 0": (lambda z: torch.cat([z**0.5, z**1.5, z**3, z**0]), [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]),
    "norm at 0": (torch.linalg.vector_norm, [0.0, 0.0], [0.0, 0.0]),
    "norm to 0": (torch.linalg.vector_norm, [3.0, 4.0], [0.0, 0.0]),
    "normalized zeros": (lambda z: F.normalize(z, dim=0), [0.0, 0.0], [0.0, 0.0]),
    "zero at the end": (lambda z: F.normalize(z, dim=0), [3.0, 4.0], [0.0, 0.0]),
    "divisor changes sign": (lambda z: z[0] / z[1:], [2.0, -1.0, 3.0, -1e-3], [-5.0, 1.0, -3.0, 1e3]),
    "reciprocal changes sign": (torch.reciprocal, [-1.0, 1e-3], [1.0, -1e3]),
    "logits of 1e4": (lambda z: z.softmax(0), [1e4, -1e4, 0.0], [-1e4, 1e4, 9.0]),
    "log-odds of 1e4": (lambda z: z.log_softmax(0), [1e4, -1e4, 0.0], [-1e4, 1e4, 9.0]),
    "shift by 1e5": (lambda z: z.softmax(0), [1.0, 2.0, 3.0], [1e5 + 2, 1e5 + 2, 1e5 - 1]),
    "log of a shifted sum": (lambda z: z.logsumexp(0), [1.0, 2.0, 3.0], [1e5 + 2, 1e5 + 2, 1e5 - 1]),
    "one entry": (lambda z: z.log_softmax(0), [3.0], [5.0]),
    "ties of a softmax": (lambda z: z.softmax(0), [1.0, 1.0, 0.0], [2.0, 2.0, 2.0]),
    "ties of a maximum": (torch.amax, [1.0, 1.0, 0.0], [2.0, 3.0, 3.0]),
    "ties of two": (lambda z: torch.maximum(z[:2], z[2:]), [1.0, 1.0, 1.0, 1.0], [2.0, 3.0, 2.0, 4.0]),
    "huge and not taken": (lambda z: torch.maximum(z[:2], z[2:]), [1.0, 1.0, -1e12, -1e12], [1.0, 2.0, 5.0, -1e9]),
    "passed in a sort": (lambda z: z.sort().values, [1.0, 0.0, 5.0], [3.0, 2.0, 0.0]),
    "passed in a median": (lambda z: z.median(), [1.0, 0.0, 5.0], [3.0, 2.0, 0.0]),
    "huge branch": (lambda z: torch.where(z > 0, z, torch.expm1(z)), [60.0, -1.0, 3.0], [-1.0, 60.0, 3.0]),
    "exp far apart": (torch.exp, [-700.0, 0.0, 300.0], [300.0, 1e-9, 300.0]),
    "sigmoid far apart": (torch.sigmoid, [-700.0, 0.0, 30.0], [300.0, 1e-9, 31.0]),
    "step functions": (lambda z: torch.cat([z.floor(), z.sign()]), [0.4, -0.5, 2.0], [0.6, 0.5, 2.9]),
    "atan2 at 0": (lambda z: torch.atan2(z[:2], z[2:]), [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, -2.0]),
    "tiny numbers": (lambda z: (z * 1e-200).tanh() * 1e200, [1.0, -2.0], [3.0, 5.0]),
}


@pytest.mark.parametrize("name", TRAPS)
def test_hard_numbers(name):
    function, z0, z1 = TRAPS[name]
    assert with_numbers(function, z0, z1) <= BOUND


def test_a_sign_of_zero_is_a_decision():
    with pytest.raises(NoSecant, match="atan2"):
        with_numbers(lambda z: torch.atan2(z[0], z[1]), [0.0, -1.0], [-0.0, -1.0])


def test_slopes_stay_smooth_where_the_ends_nearly_coincide():
    """A chord over a step of the size of rounding would be noise."""
    functions = [F.softplus, F.elu, F.hardswish, F.celu, torch.erfinv, torch.log1p, torch.logit, torch.asin]
    for function in (*functions, lambda z: 1e5 * F.gelu(z - 5)):
        model = Net(lambda h, k, f=function: f(h.sigmoid() / 2 + 0.2))
        f, before = plainly(model, own(model), X), own(model)
        for distance in (1e-15, 1e-12, 1e-9):
            secant = Secant(model, dict(model.named_parameters())).at(before, apart(before, distance))
            v = torch.ones_like(f)
            grads, wanted = gradients(secant(X), secant.params.values(), v), gradients(f, model.parameters(), v)
            for g, w in zip(grads, wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["MLP", "LeNet", "Llama-like blocks", "LSTM", "RMSNorm", "state-space model"])
def test_float32(name):
    model, x, _ = FAMILIES[name].draw()
    model, x = model.float(), x.float() if x.is_floating_point() else x
    for distance in (1e-7, 1e-3, 0.3):
        before = own(model)
        assert error(model, x, before, apart(before, distance), FAMILIES[name].outputs) <= 1e-5


# ---------------------------------------------------------------------- models


def needed(name: str) -> tuple[nn.Module, Any, Any]:
    if reason := FAMILIES[name].missing():
        pytest.skip(reason)
    model, x, _ = FAMILIES[name].draw()
    return model, x, FAMILIES[name].outputs


@pytest.mark.parametrize("name", QUICK)
def test_family(name):
    model, x, outputs = needed(name)
    before = own(model)
    f, secant = plainly(model, before, x, outputs), Secant(model, dict(model.named_parameters()), outputs)
    out = call(secant, x)
    for v in cotangents(f.detach(), 1):
        wanted = gradients(f, [p for p in model.parameters() if p.requires_grad], v)
        params = [q for q, p in zip(secant.params.values(), model.parameters(), strict=True) if p.requires_grad]
        scale = max(float(w.abs().max()) for w in wanted)
        for g, w in zip(gradients(out, params, v), wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=BOUND * scale)
    for distance in (1e-9, 1e-3, 1.0):
        try:
            found = error(
                model, x, before, apart(before, distance), outputs, most=20, least=float(f.detach().abs().max())
            )
            assert found <= BOUND, distance
            assert distance < 1 or name not in ROUTED
        except NoSecant:
            assert name in ROUTED
            assert distance > 1e-9


class Written(nn.Module):
    """A linear layer, with something done by `change` before it is used."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = nn.Linear(5, 5).double(), change
        self.raw, self.part = [self.inner.weight], self.inner.weight.detach()[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x)


def energy(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.softplus(m.inner(x)).square().sum(), x, create_graph=True)[0]


def inside(m: Any, x: Tensor) -> Tensor:
    weights = {"weight": m.inner(x).mean(0) * m.inner.weight}
    return torch.func.functional_call(m.inner, weights, x)


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a parameter that the model holds elsewhere, too": lambda m, x: torch.tanh(x @ m.raw[0]) + m.inner(x),
    "data of a parameter": lambda m, x: torch.tanh(x @ m.inner.weight.data) + m.inner(x),
    "a gradient in the forward": energy,
    "a gradient by functions": lambda m, x: torch.vmap(torch.func.grad(lambda t: m.inner(t).tanh().sum()))(x),
    "a functional call": inside,
    "vmap": lambda m, x: torch.vmap(lambda w: torch.tanh(x @ w))(m.inner.weight).t(),
    "a checkpoint": lambda m, x: checkpoint(lambda t: m.inner(t).tanh(), x, use_reentrant=False),
    "a conjugate view": lambda m, x: torch.view_as_real(torch.complex(m.inner(x), m.inner(x * x)).conj() * 2j),
    "a buffer of zeros": lambda m, x: torch.eye(5, dtype=x.dtype)[:, None].mul(m.inner(x)).sum(0),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_a_parameter_is_used(way):
    holds(Written(WAYS[way]), X[:, 0, :5])


WRONG: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view of it from before the model": lambda m, x: m.inner(x)[:, :2] + x @ m.part.t(),
    "a write into a parameter": lambda m, x: (m.inner.weight.data.clamp_(-0.1, 0.1), m.inner(x))[1],
    "that does not": lambda m, x: x.add_(m.inner(x)),
    "cannot be evaluated": lambda m, x: m.inner(x) * len(m.inner(x).tolist()),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_followed_is_refused_and_harms_nothing(why):
    model = Written(WRONG[why])
    before, after = own(model), apart(own(model), 1.0)
    kept = {name: p.clone() for name, p in (before | {"x" + n: p for n, p in after.items()}).items()}
    with pytest.raises(NoSecant, match=why):
        Secant(model, dict(model.named_parameters())).at(before, after)(X[:, 0, :5].clone())
    assert all(torch.equal(kept[n], p) for n, p in (before | {"x" + n: p for n, p in after.items()}).items())


def test_layers_of_the_library():
    torch.manual_seed(0)
    x, padded = torch.randn(3, 6, 4, dtype=torch.float64), torch.arange(6).expand(3, 6) > 3

    class Attention(nn.Module):
        def __init__(self, **more: Any) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True, **more).double().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x, key_padding_mask=padded, need_weights=False)[0]

    class First(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    layers = [Attention(), Attention(add_bias_kv=True, add_zero_attn=True)]
    layers += [First(kind(4, 3, 2, batch_first=True, bidirectional=True)) for kind in (nn.LSTM, nn.GRU, nn.RNN)]
    layers.append(First(nn.LSTM(4, 5, batch_first=True, proj_size=2)))
    for layer in layers:
        holds(layer, x, 1e-3, 1.0)


def test_tied_weights_and_a_module_under_two_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
            self.b.weight, self.again = self.a.weight, self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.b(self.a(x).tanh()).tanh())

    holds(Tied(), X[:, 0, :5])


def test_constants_stay_constants():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    chosen = {"2.weight": model[2].weight}
    before, after = own(model), own(model) | {"2.weight": model[2].weight.detach() + 1}
    secant = Secant(model, chosen).at(before, after)
    x = X[:, 0, :5]
    (g,) = gradients(secant(x)[:, :1].sum(), secant.params.values(), torch.tensor(1.0, dtype=x.dtype))
    change = plainly(model, after, x)[:, :1].sum() - plainly(model, before, x)[:, :1].sum()
    torch.testing.assert_close(g.sum(), change)
    with pytest.raises(ntkit.Refused, match="depend on no parameter"):
        Secant(nn.Sequential(model, Constant()), chosen)(x)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class Fails(nn.Module):
    """Keeps what it computes, then fails if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fail, self.last, self.calls = nn.Linear(5, 3).double(), False, None, 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.mean = self.inner(x)
        self.inner.new, self.calls = self.last, self.calls + 1
        if self.fail:
            raise KeyError("own")
        return self.last.tanh()


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model = Fails()
    model.fail = fail
    held = [(module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    secant = Secant(model, dict(model.named_parameters())).at(own(model), apart(own(model), 1.0))
    if fail:
        with pytest.raises(KeyError, match="own"):
            secant(X[:, 0, :5])
    else:
        secant(X[:, 0, :5])
    for module_, *before in held:
        for now, then in zip((vars(module_), module_._parameters, module_._buffers), before, strict=True):
            assert now.keys() == then.keys()
            assert all(now[key] is then[key] for key in then)
    assert not DISPATCH_KEYS
    assert torch.backends.mha.get_fastpath_enabled()


def test_ends_in_another_layout():
    model = nn.Conv2d(2, 3, 3).double()
    before, after = own(model), apart(own(model), 1.0)
    after["weight"] = after["weight"].to(memory_format=torch.channels_last)
    assert error(model, X[:, :, :, None].expand(-1, -1, -1, 4)[:, :2], before, after) <= BOUND


@pytest.mark.parametrize(
    "function",
    [F.relu, F.relu6, F.leaky_relu, torch.abs, lambda z: z.clamp(-2e-5, 4e-5), lambda z: F.softshrink(z, 3e-5)],
)
def test_values_below_the_normal_numbers_of_float16(function):
    """Some units stay, some move by the smallest normal number, 2^-14, by which the slope was infinite."""

    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(600, dtype=torch.float16))

        def forward(self, x):
            return function(self.w)[None] * x

    draw = torch.Generator().manual_seed(0)
    before, after = ((6e-5 * torch.randn(600, generator=draw)).half() for _ in range(2))
    after[:200], after[200:300] = before[:200], before[200:300] - 2.0**-14
    model = Units()
    secant = Secant(model, dict(model.named_parameters())).at({"w": before}, {"w": after})
    (slope,) = torch.autograd.grad(secant(torch.ones(1, 600).half()).sum(), list(secant.params.values()))
    before, after = before.double().requires_grad_(), after.double()
    error = slope * (after - before) - (function(after) - function(before))
    assert error.abs().max() < 1e-6  # of changes up to 2e-4; 6e-8 is the smallest number
    (own,) = torch.autograd.grad(function(before).sum(), before)
    assert (slope - own)[:200].abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 400.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision(dtype, scale):
    """The squares of values of 1e-3 and of 400 are no numbers of float16."""

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(scale * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
            self.layer, self.group, self.batch = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8)
            self.sphere = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

        def forward(self, x):
            z = x @ self.w
            parts = [
                self.layer(z), self.group(z), self.batch(z), F.normalize(z), z / z.std(1, keepdim=True),
                F.instance_norm(z.view(-1, 2, 4)).flatten(1), z.norm(dim=1, keepdim=True) / scale,
                self.sphere(z) / scale,
            ]  # fmt: skip
            return torch.cat(parts, 1)

    model = Norms().eval()
    with torch.no_grad():
        for p in (model.batch.running_var, model.sphere.parametrizations.weight.original1):
            p.mul_(scale)
    model.to(dtype)
    params, draw = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    before = {name: p.detach().clone() for name, p in params.items()}
    noise = {name: 0.05 * torch.randn(p.shape, generator=draw) * p.float().abs().mean() for name, p in params.items()}
    after = {name: (1.1 * p.float() + noise[name]).to(dtype) for name, p in before.items()}
    x = torch.randn(5, 4, generator=draw).to(dtype)
    secant = Secant(model, params).at(before, after)
    out, eps = secant(x), torch.finfo(dtype).eps
    for end, values in zip(secant.ends, (before, after), strict=True):
        own = plainly(model, values, x).detach().double()
        assert (end.double() - own).abs().max() < 4 * eps * own.abs().max()
    wide = copy.deepcopy(model).double()
    ends = [plainly(wide, {k: t.double() for k, t in end.items()}, x.double()).detach() for end in (before, after)]
    for c in range(out.shape[1]):
        slopes = gradients(out[:, c], secant.params.values(), torch.ones_like(out[:, c]))
        steps = [after[name].double() - before[name].double() for name in params]
        terms = [slope.double() * step for slope, step in zip(slopes, steps, strict=True)]
        change, size = (ends[1] - ends[0])[:, c].sum(), sum(t.abs().sum() for t in terms)
        assert abs(sum(t.sum() for t in terms) - change) < 8 * eps * (size + ends[0][:, c].abs().sum())


def test_inverse_roots_in_float16():
    """The fourth power of 1 / sqrt(z) is 0 there from z = 4100 on."""
    before, after = torch.tensor([4.0, 0.01, 9e3, 4e4]).half(), torch.tensor([5.0, 0.04, 1.2e4, 6e4]).half()

    class Roots(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(before.clone())

        def forward(self, x):
            return torch.rsqrt(self.w)[None] * x

    model = Roots()
    secant = Secant(model, dict(model.named_parameters())).at({"w": before}, {"w": after})
    (slope,) = torch.autograd.grad(secant(torch.ones(1, 4).half()).sum(), list(secant.params.values()))
    a, b = before.double(), after.double()
    expected = (b.rsqrt() - a.rsqrt()) / (b - a)
    assert ((slope - expected).abs() < 4e-3 * expected.abs() + 2.0**-24).all()


def test_a_rule_that_loses_the_gradient_is_noticed():
    with SecantMode([], []), pytest.raises(AssertionError, match="lost the gradient"):
        SecantTensor(torch.zeros(2), torch.ones(2), torch.full((2,), 0.5))


# ---------------------------------------------------------------------- random networks

PARTS = [name for name in HOLDS if name not in ("product: spectrum",)]


class Drawn(nn.Module):
    """Operations of the table, in a random graph."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        after = ("as it is", "tanh", "residual", "scaled", "joined")
        self.steps = [
            (r.choice(PARTS), r.randint(0, k), r.randint(0, k), r.choice(after)) for k in range(r.randint(2, 7))
        ]

    def forward(self, h: Tensor, k: Tensor) -> Tensor:
        made = [h]
        for name, i, j, after in self.steps:
            y = HOLDS[name](made[i], made[j] if i != j else k).reshape(len(h), -1)
            y = y.repeat(1, -(-24 // y.shape[1]))[:, :24].reshape(len(h), 4, 6)
            if after == "tanh":
                y = torch.tanh(y / 3)
            elif after == "residual":
                y = made[i] + torch.tanh(y)
            elif after == "scaled":
                y = y / (1 + y.abs().amax((1, 2), keepdim=True))
            elif after == "joined":
                y = torch.cat([y[:, :2], h[:, 2:]], 1)
            made.append(y)
        return made[-1]


def test_random_networks():
    refused = finite = 0
    for seed in range(150):
        model = Net(Drawn(seed))
        kind, (before, after) = random.Random(seed).choice(list(pairs(own(model)).items()))
        if not all(torch.isfinite(plainly(model, end, X)).all() for end in (before, after)):
            continue
        finite += 1
        try:
            assert error(model, X, before, after, most=1, least=1.0) <= 10 * BOUND, (seed, kind, model.function.steps)
        except NoSecant:
            refused += 1
    assert finite > 120
    assert refused < finite / 6
