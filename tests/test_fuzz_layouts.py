"""Random networks in unusual layouts, states and hooks against finite differences, which share nothing with autograd.

`pytest -m fuzz tests/test_fuzz_layouts.py` draws the same 60 every time; `NTKIT_FUZZ=2000` draws that many others and
prints their seed, `NTKIT_FUZZ=2000:SEED` draws them again. One network: `check(draw_case(SEED))`.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from layout_case import Mismatch, check, check_autocast, draw_case
from layout_judge import by_autograd, by_differences
from layout_networks import draw_network, inputs
from layout_ops import OPS
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::UserWarning")]  # of PyTorch, on odd networks
ASKED, _, AGAIN = os.environ.get("NTKIT_FUZZ", "").partition(":")
SHARDS, NETWORKS = 4, int(ASKED or 60)
SEED = int(AGAIN) if AGAIN else random.SystemRandom().randrange(10**9) if ASKED else 0


def smallest(case):
    """The case less every step that it does not need to fail."""
    i = 0
    while i < len(case.net.steps):
        shorter = draw_case(case.seed)
        shorter.net = case.net.without(i)
        shorter.target = min(case.target, len(shorter.net.steps) - 1)
        try:
            check(shorter)
            i += 1
        except Mismatch:
            case = shorter
        except Exception:  # the rest does not fit together
            i += 1
    return case


@pytest.mark.timeout(300 + 2 * NETWORKS)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_silently_wrong(shard):
    print(f"NTKIT_FUZZ={NETWORKS}:{SEED} draws these again")
    verdicts, reasons, wrong, at_fault, entries, skipped = Counter(), Counter(), [], 0, 0, 0
    for seed in range(SEED + shard, SEED + NETWORKS, SHARDS):
        case = draw_case(seed)
        try:
            outcome = check(case)
            counted(verdicts, reasons, outcome.verdict, case)
        except Mismatch as mismatch:
            wrong.append(f"{mismatch}\nsmallest:\n{smallest(draw_case(seed))}")
            continue
        except Fault as fault:
            wrong.append(str(fault))
            continue
        at_fault += bool(outcome.torch_faults)
        entries, skipped = entries + outcome.entries, skipped + outcome.skipped
    print(
        dict(verdicts),
        dict(reasons),
        f"PyTorch's autograd wrong in {at_fault}",
        f"skipped {skipped} of {entries} entries",
    )
    assert not wrong, "\n\n".join(wrong)
    assert skipped < 0.03 * entries, "too many entries lie near a kink"
    assert verdicts["equal"] > 0.8 * sum(verdicts.values()), "too few networks are judged"


class Fault(AssertionError):
    """An error that is no refusal."""


def counted(verdicts: Counter, reasons: Counter, verdict: str, case: Any) -> None:
    """Count a verdict, and its reason without numbers; what is not a refusal is a fault."""
    kind, _, reason = verdict.partition(": ")
    verdicts[kind] += 1
    if reason:
        reasons[kind, re.sub(r"[\d.e+-]+", "#", reason)[:90]] += 1
    if kind in ("self-check", "raw"):
        raise Fault(f"{verdict}\n{case}")


@pytest.mark.timeout(300 + 2 * NETWORKS)
def test_autocast_in_single_precision():
    verdicts, reasons = Counter(), Counter()
    for seed in range(SEED, SEED + NETWORKS // 4):
        case = draw_case(seed)
        counted(verdicts, reasons, check_autocast(case), case)
    print(dict(verdicts), dict(reasons))
    assert verdicts["equal"] > 0.6 * sum(verdicts.values())


OPTIMIZERS = (
    partial(torch.optim.SGD, lr=0.01),
    partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    partial(torch.optim.Adam, lr=0.01),
)


def learned_wrongly(seed: int) -> bool:
    """Whether a run of this network followed gradients that are none: no sums rebuild it, and the error says so."""
    net, shape = draw_network(seed)
    params = [p for p in net.parameters() if p.requires_grad]
    batches = [inputs(seed, shape, 5)[[i, 4 - i]][:n] for i in (0, 1) for n in (1, 2)]
    return any(by_differences(net, x, params).off(by_autograd(net, x, params, False)) > 0 for x in batches)


@pytest.mark.timeout(300 + 2 * NETWORKS)
def test_the_path_kernel_rebuilds_the_predictions():
    verdicts, reasons = Counter(), Counter()
    for seed in range(SEED, SEED + NETWORKS // 5):
        net, shape = draw_network(seed)
        x, test = inputs(seed, shape, 5), inputs(seed + 1, shape, 2)
        out = net(x).reshape(5, -1)
        if not out.requires_grad:
            continue
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        loss = lambda out, y: F.mse_loss(out.reshape(len(out), -1), y)
        try:
            run = ntkit.train(net, (x, y), loss, OPTIMIZERS[seed % 3], steps=3, batch_size=2)
            found = ntkit.PathKernel(run).decompose(test)
        except ntkit.Refused as refused:
            counted(verdicts, reasons, f"refused: {refused}", net)
            continue
        if found.residual.abs().max() < 1e-12:  # outputs that vanish by symmetry are nothing but rounding
            verdicts["rebuilt"] += 1
            continue
        if found.error > 1e-9 and learned_wrongly(seed):
            verdicts["PyTorch's gradient was wrong"] += 1
            continue
        assert found.error <= 1e-9, f"seed {seed}: error {found.error}\n{net}"
        verdicts["rebuilt"] += 1
    print(dict(verdicts), *reasons.most_common(), sep="\n")
    assert verdicts["rebuilt"] > 0.4 * sum(verdicts.values())


def test_every_operation_is_drawn():
    assert len(OPS) >= 100
    drawn = Counter()
    for seed in range(2000):
        net, _ = draw_network(seed)
        drawn.update(step.text.partition("(")[0] for step in net.steps)
    assert set(OPS) - set(drawn) == set()


class Wrong(torch.autograd.Function):
    """tanh whose gradient is a little off."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h.tanh())
        return h.tanh()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].square()) * (1 + 1e-6)


def test_a_gradient_that_is_a_little_wrong_is_found():
    """Autograd, oracle and engine agree on it: only differences can tell."""
    case = draw_case(0)
    case.net.steps[-1] = nn.Sequential(case.net.steps[-1])
    case.net.steps[-1].text, case.hook, case.state = "wrong", "", "nothing"
    check(case)
    case.net.steps[-1].register_forward_hook(lambda module, args, out: Wrong.apply(out))
    with pytest.raises(Mismatch, match="oracle: off by"):
        check(case)
