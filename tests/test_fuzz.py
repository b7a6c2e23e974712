"""Random networks against the oracle.

`pytest -m fuzz` draws the same 500 every time; `NTKIT_FUZZ=10000 pytest -m fuzz` draws that many others and prints
their seed; `NTKIT_FUZZ=10000:SEED` draws them again.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any
from unittest import mock

import pytest
import torch
from cases import softplus_sum
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from networks import OPS, Drawer, Network, Op, draw_network, inputs
from torch import Tensor

import ntkit
from ntkit.base.batch import count, take
from ntkit.jacobian import plan as planning
from ntkit.jacobian import rules
from ntkit.jacobian import self_check as check
from ntkit.jacobian.machine_rates import Rates
from ntkit.jacobian.model_calls import call
from ntkit.jacobian.oracle import jacobian
from ntkit.testing import assert_equal

pytestmark = pytest.mark.fuzz
ASKED, _, AGAIN = os.environ.get("NTKIT_FUZZ", "").partition(":")
SHARDS, EXAMPLES = 4, int(ASKED or 500)
SEED = int(AGAIN) if AGAIN else random.SystemRandom().randrange(10**9) if ASKED else 0
MODES = ("full", "diagonal", "trace", "sum", softplus_sum)
CHOICES = 320  # bytes that decide everything; where they end, the simplest is drawn


@dataclass
class Case:
    """A network, two sets of samples, and how their kernel is asked for."""

    net: Network
    x1: Any
    x2: Any
    mode: Any
    params: list[str] | None
    memory: int | str | None
    rates: Rates
    dtype: torch.dtype
    law: str
    choices: bytes

    @cached_property
    def exact(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The oracle's Jacobians of both sets, by parameter."""
        first = jacobian(self.net, self.x1, self.mode, self.params)
        return first, first if self.x2 is None else jacobian(self.net, self.x2, self.mode, self.params)

    def __repr__(self) -> str:
        n2 = None if self.x2 is None else count(self.x2)
        mode = getattr(self.mode, "__name__", self.mode)
        frozen = [name for name, p in self.net.named_parameters() if not p.requires_grad]
        return (
            f"\n  network: {self.net!r}\n  n1={count(self.x1)}, n2={n2}, mode={mode}, params={self.params}, "
            f"frozen={frozen}, memory={self.memory}, {self.rates}, {self.dtype}, law: {self.law}\n"
            f"  again: compare(draw_case(bytes.fromhex('{self.choices.rstrip(bytes(1)).hex()}')))"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def draw_case(choices: bytes) -> Case:
    """The case that these choices stand for; fewer bytes, a simpler case."""
    d = Drawer(choices[:64])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(d.pick(range(256)))
        net, start, shape = draw_network(choices[64:])
        n1, n2 = d.pick((3, 1, 2, 4, 5) * 6 + (67,)), d.pick((None, None, 2, 1, 3, 5))
        x1, x2 = inputs(start, shape, n1), None if n2 is None else inputs(start, shape, n2)
    if d.pick((False, False, False, True)):
        x1 = take(x1, [*range(n1 - 1), 0])  # equal samples
    mode, law = d.pick(MODES), d.pick(("none", "none", "diagonal", "paired", "layers", "operator"))
    memory = d.pick((None, "1 MB", None, 20000, 3000, 500, 1)) if n1 < 67 else None
    rates = Rates(*(d.pick((1e10, 1e3, 1e15)) for _ in fields(Rates)))  # which decide the routes
    params, select = None, d.pick(("all", "all", "named", "frozen"))
    names = [name for name, _ in net.named_parameters()]
    some = [name for name in names if d.pick((False, True))]
    if select == "named" and depends(net, x1, some):
        params = some
    elif select == "frozen" and depends(net, x1, some):
        for name, p in net.named_parameters():
            p.requires_grad_(name in some)
    dtype = d.pick((torch.float64,) * 4 + (torch.float32,))
    return Case(net.to(dtype), cast(x1, dtype), cast(x2, dtype), mode, params, memory, rates, dtype, law, choices)


def depends(net: Network, x: Any, names: list[str]) -> bool:
    """Whether the outputs depend on any of these parameters: without, there is no kernel."""
    chosen = [p for name, p in net.named_parameters() if name in names]
    out = call(net, x).sum()
    return bool(chosen) and any(g is not None for g in torch.autograd.grad(out, chosen, allow_unused=True))


def cast(x: Any, dtype: torch.dtype) -> Any:
    if x is None or isinstance(x, Tensor):
        return x.to(dtype) if x is not None and x.is_floating_point() else x
    return {k: cast(v, dtype) for k, v in x.items()} if isinstance(x, dict) else tuple(cast(v, dtype) for v in x)


def well_conditioned(case: Case) -> bool:
    """Whether plain autograd in float32, sample by sample, is right to 1e-5, or 1e-2 for a comparison in float64.

    Where it is not, the gradients asked for vanish by symmetry or hang on a difference that rounding decides.
    """
    for x, exact in list(zip((case.x1, case.x2), case.exact, strict=True))[: 1 if case.x2 is None else 2]:
        rough = jacobian(case.net, x, case.mode, case.params, torch.float32)
        coarse, fine = (torch.cat(list(j.values()), -1).double() for j in (rough, exact))
        if (coarse - fine).abs().max() > (1e-5 if case.dtype == torch.float32 else 1e-2) * fine.abs().max():
            return False
    return True


def layers(j1: dict[str, Tensor], j2: dict[str, Tensor], mode: Any) -> dict[str, Tensor]:
    """Each parameter's share of the kernel, by the definition."""
    form = {"full": "icp,jdp->ijcd", "diagonal": "icp,jcp->ijc"}.get(mode, "icp,jcp->ij")
    return {name: torch.einsum(form, j1[name], j2[name]) for name in j1}


def by_definition(j1: dict[str, Tensor], j2: dict[str, Tensor], mode: Any) -> Tensor:
    """The kernel of two Jacobians."""
    whole = [{"": torch.cat(list(j.values()), -1)} for j in (j1, j2)]
    return layers(*whole, mode)[""]


def compare(case: Case) -> None:
    """Raise, with the case in words, where the engine refuses it or is not the oracle."""
    try:
        with mock.patch.object(planning, "rates_for", return_value=case.rates):
            check_case(case)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}{case!r}") from error


def check_case(case: Case) -> None:
    net, x1, x2, tolerance = case.net, case.x1, case.x2, 1e-9 if case.dtype == torch.float64 else 1e-3
    n1, n2 = count(x1), count(x1 if x2 is None else x2)
    kernel = ntkit.TangentKernel(net, outputs=case.mode, params=case.params, memory=case.memory)
    expected = by_definition(*case.exact, case.mode)
    assert_equal(kernel(x1, x2), expected, tolerance, "kernel")
    scale = float(expected.abs().max()) * tolerance
    if case.law == "diagonal":
        own = by_definition(case.exact[0], case.exact[0], case.mode)[range(n1), range(n1)]
        assert_equal(kernel.diagonal(x1), own, tolerance, "diagonal")
    elif case.law == "paired":
        few = list(range(min(n1, n2)))
        pairs = kernel.paired(take(x1, few), take(x1 if x2 is None else x2, few))
        error = (pairs - expected[few, few]).abs().max()
        assert error <= scale, f"paired: error {error}"
    elif case.law == "layers":
        shares, expected_shares = kernel.layers(x1, x2), layers(*case.exact, case.mode)
        assert shares.keys() == expected_shares.keys()
        for name, own in expected_shares.items():
            error = (shares[name] - own).abs().max()
            assert error <= scale, f"share of {name}: error {error}"
        assert_equal(sum(shares.values()), expected, tolerance, "sum of shares")
    elif case.law == "operator" and case.mode != "diagonal":
        K = by_definition(case.exact[0], case.exact[0], case.mode)
        K = K.permute(0, 2, 1, 3).reshape(n1 * K.shape[2], -1) if K.dim() == 4 else K
        v = torch.linspace(-1, 2, len(K), dtype=torch.float64)
        error = (kernel.operator(x1) @ v.to(case.dtype) - K @ v).abs().max()
        assert error <= tolerance * K.abs().max() * v.abs().sum(), f"operator: error {error}"


@st.composite
def cases(draw: Callable[..., bytes]) -> Case:
    return draw_case(draw(st.binary(min_size=CHOICES, max_size=CHOICES)))


def fuzz(test: Callable[[Case], None], start: int, examples: int, *phases: Phase) -> None:
    """Run a test on random cases."""

    @seed(start)
    @settings(
        max_examples=examples,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=phases or (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        test(case)

    run()


@pytest.mark.timeout(300 + 2 * EXAMPLES)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_networks_equal_the_oracle(shard):
    print(f"NTKIT_FUZZ={EXAMPLES}:{SEED} draws these again")
    drawn: Counter = Counter()

    def test(case):
        drawn[case.dtype] += 1
        if well_conditioned(case):
            drawn[case.dtype, "compared"] += 1
            compare(case)

    fuzz(test, SEED + shard, EXAMPLES // SHARDS)
    print(dict(drawn))
    for dtype in (torch.float64, torch.float32) if EXAMPLES >= 500 else ():
        assert drawn[dtype, "compared"] > 0.9 * drawn[dtype] > 0, "too few networks are well conditioned"


@pytest.mark.parametrize("node", ["AddmmBackward0", "ConvolutionBackward0", "MulBackward0", "BmmBackward0"])
def test_a_rule_that_is_a_little_wrong_is_found(node, monkeypatch):
    true = rules.RULES[node]
    monkeypatch.setitem(rules.RULES, node, lambda use, owner, n, cot: true(use, owner, n, cot * (1 + 1e-6)))
    monkeypatch.setattr(check, "_compare", lambda *args: None)  # the engine's own check would find it, too

    def test(case):  # as above, where these networks pass while the rule is right
        if case.dtype == torch.float64 and well_conditioned(case):
            compare(case)

    with pytest.raises(AssertionError, match=r"kernel: error .* > 1e-09"):
        fuzz(test, 0, 100, Phase.generate)


def test_every_op_and_every_rule_is_drawn(monkeypatch):
    ops: set[str] = set()
    used: set[str] = set()

    def noted(node, true):
        return lambda *args: (used.add(node), true(*args))[1]

    for node, true in list(rules.RULES.items()):
        monkeypatch.setitem(rules.RULES, node, noted(node, true))

    def look(case):
        ops.update(m.text.partition("(")[0] for m in case.net.modules() if isinstance(m, Op))
        with contextlib.suppress(Exception):  # the comparison above is where failures count
            ntkit.TangentKernel(case.net, outputs="trace").plan(case.x1)

    fuzz(look, 0, 250)
    assert set(OPS) - ops == set()
    on_cpu = {node for node in rules.RULES if not node.startswith(("Cudnn", "Fused", "Thnn"))}
    assert on_cpu - used == set()
