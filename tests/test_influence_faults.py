"""Faults once found in influence and retrainings, each with a plain loop of ``torch.optim`` beside it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntkit
from ntkit.base.checks import Refused
from ntkit.commands.explained_points import influence_in_numbers
from ntkit.explanations.evaluation import datamodeling_score, mislabeled
from ntkit.explanations.retrainings import Retrainings
from ntkit.report import explain_text
from ntkit.trajectory.reruns import Reruns

F64 = torch.float64
ONES = torch.eye(6)[0]
cross_entropy = nn.functional.cross_entropy


def sgd(params):
    return torch.optim.SGD(params, lr=0.2, momentum=0.6)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def vectors(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g)


class Wrapped(nn.Module):
    """Two layers, and a function of them and the input."""

    def __init__(self, function, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.function, self.first, self.last = function, first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def trained(model=None, data=None, loss=cross_entropy):
    start = mlp() if model is None else model
    before = copy.deepcopy(start)
    return ntkit.train(start, data or vectors(11), loss, sgd, steps=12, batch_size=4), before


def without(run, before, removed):
    """Logits of class 0 on two points after the run with a loss of zero for some examples: a plain loop."""
    x, y = vectors(11)
    net, keep = copy.deepcopy(before), torch.ones(11, dtype=F64)
    keep[removed] = 0
    opt = sgd(net.parameters())
    for step in range(12):
        rows = run.batch(step)
        opt.zero_grad()
        each = cross_entropy(net(x[rows]), y[rows], reduction="none")
        (each * keep[rows]).mean().backward()
        opt.step()
    return net(vectors(2, 2)[0]).detach()[:, 0]


def first_logit(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


# ---------------------------------------------------------------------- retrainings


def test_the_values_of_retrainings_are_those_of_the_trained_network():
    run, before = trained()
    again = Retrainings(run, vectors(2, 2)[0], measure=first_logit)
    assert torch.allclose(again.values, without(run, before, []), rtol=0, atol=1e-12)
    assert torch.allclose(again.without([[]])[0], again.values, rtol=0, atol=1e-12)
    assert not torch.allclose(before(vectors(2, 2)[0])[:, 0], again.values, rtol=0, atol=1e-3)


def test_a_checkpoint_calls_the_layer_with_the_parameters_of_the_run():
    layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double(), nn.Linear(6, 3).double()
    function = lambda m, x: m.last(checkpoint(m.first, x, use_reentrant=False))
    run, before = trained(Wrapped(function, *layers))
    again = Retrainings(run, vectors(2, 2)[0], measure=first_logit)
    assert torch.allclose(again.without([[1, 4]])[0], without(run, before, [1, 4]), rtol=0, atol=1e-12)
    assert ntkit.influence(run, *vectors(2, 2)).check.error < 1e-7


def recorded_loop(folder):
    model, (x, y) = mlp(), vectors(11)
    opt = sgd(model.parameters())
    with ntkit.record(model, opt, path=folder) as rec:
        for step in range(12):
            rows = torch.randperm(11, generator=torch.Generator().manual_seed(step))[:4]
            loss = cross_entropy(model(x[rows]), y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            rec.step(rows, loss)
    return ntkit.Trajectory.open(folder), model


def test_another_loss_than_that_of_a_recorded_loop_is_refused(tmp_path):
    run, model = recorded_loop(tmp_path / "run")
    x, y = vectors(11)
    point = vectors(2, 2)
    right = Retrainings(run, *point, model=model, data=(x, y), loss=cross_entropy)
    assert torch.allclose(right.without([[]])[0], right.values, rtol=0, atol=1e-12)
    with pytest.raises(Refused, match="different from its replay"):
        Retrainings(run, *point, model=model, data=(x, y), loss=lambda f, t: 3 * cross_entropy(f, t))
    with pytest.raises(Refused, match="different from its replay"):
        Retrainings(run, *point, model=model, data=(x.flip(0), y), loss=cross_entropy)


def test_fresh_runs_of_a_recorded_loop_are_refused_for_its_batches_have_no_rule(tmp_path):
    run, model = recorded_loop(tmp_path / "run")
    again = Retrainings(run, *vectors(2, 2), make=mlp, model=model, data=vectors(11), loss=cross_entropy)
    with pytest.raises(Refused, match="recorded loop"):
        again.without([[0]], fresh=1)


def test_two_measures_of_one_name_are_not_confused_in_a_folder(tmp_path):
    run, _ = trained()
    x = vectors(2, 2)[0]
    Retrainings(run, x, measure=lambda f: f[:, 0], path=tmp_path).without([[0]])
    Retrainings(run, x, measure=lambda f: f[:, 0], path=tmp_path)
    with pytest.raises(Refused, match="something else"):
        Retrainings(run, x, measure=lambda f: f[:, 1], path=tmp_path)


def test_fresh_networks_of_two_kinds_are_not_confused_in_a_folder(tmp_path):
    run, _ = trained()

    def other(seed):
        model = mlp(seed)
        with torch.no_grad():
            model[0].weight.mul_(3)
        return model

    found = [Retrainings(run, *vectors(2, 2), path=tmp_path, make=m).without([[0]], fresh=1) for m in (mlp, other)]
    again = Retrainings(run, *vectors(2, 2), path=tmp_path, make=mlp).without([[0]], fresh=1)
    assert torch.equal(found[0], again)
    assert not torch.allclose(found[0], found[1], rtol=0, atol=1e-3)


def test_a_fresh_run_on_fewer_examples_goes_through_the_whole_schedule():
    x, y = vectors(12)
    late = lambda step: float(step >= 6)  # of 12 steps
    run = ntkit.train(mlp(), (x, y), cross_entropy, sgd, steps=12, batch_size=4, schedule=late)
    again = Retrainings(run, vectors(2, 2)[0], measure=first_logit, make=lambda seed: mlp(3))
    net = mlp(3)
    opt = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.6)
    for step in range(4):  # as many epochs, each of one batch
        opt.zero_grad()
        cross_entropy(net(x[:4]), y[:4]).backward()
        opt.param_groups[0]["lr"] = 0.2 * (step >= 2)
        opt.step()
    found = again.without([list(range(4, 12))], fresh=1)[0, 0]
    assert torch.allclose(found, net(vectors(2, 2)[0])[:, 0].detach(), rtol=0, atol=1e-12)


def test_a_seed_is_one_that_numpy_takes():
    import numpy as np

    seeds = []

    def make(seed):
        np.random.RandomState(seed)  # raises from 2^32 on
        seeds.append(seed)
        return mlp(seed)

    run, _ = trained()
    Retrainings(run, *vectors(2, 2), make=make).without([[0], [1], [2]], fresh=2)
    assert len(set(seeds)) == 7  # six runs, and that of seed 0


@pytest.mark.parametrize(
    ("removed", "options", "message"),
    [
        ([], {}, "at least one set"),
        ([0, 1], {}, "a list for each set"),
        ([[0.7]], {}, "numbers of training examples"),
        (torch.zeros(2, 11), {}, "bool"),
        ([[0]], {"fresh": 1.5}, "fresh"),
        ([[0]], {"fresh": -1}, "fresh"),
        ([[0]], {"fresh": 1, "make": lambda seed: None}, "NoneType"),
        ([[0]], {"fresh": 1, "make": lambda seed: mlp(seed).float()}, "those of the run"),
    ],
)
def test_refusals_of_retrainings(removed, options, message):
    run, _ = trained()
    again = Retrainings(run, *vectors(2, 2), make=options.pop("make", mlp))
    with pytest.raises(Refused, match=message):
        again.without(removed, **options)


# ---------------------------------------------------------------------- influence


def test_a_complex_buffer_keeps_its_imaginary_part():
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.view_as_complex(self.first(x).view(-1, 4, 2)) * self.turn
            return self.last(torch.tanh(torch.view_as_real(parts).flatten(1)))

    torch.manual_seed(0)
    x, y = vectors(11)
    run = ntkit.train(Rotated(), (x.float(), y), cross_entropy, sgd, steps=12, batch_size=4)
    assert ntkit.influence(run, vectors(2, 2)[0].float(), vectors(2, 2)[1]).check.error < 1e-4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_with_masked_tokens_is_measured_as_it_was_trained():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            self.words, self.blocks, self.last = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, t: Tensor) -> Tensor:
            return self.last(self.blocks(self.words(t), src_key_padding_mask=t == 0)).mean(1)

    torch.manual_seed(0)
    tokens = torch.randint(0, 4, (11, 4), generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values
    run = ntkit.train(Masked().double(), (tokens, vectors(11)[1]), cross_entropy, sgd, steps=6, batch_size=4)
    result = ntkit.influence(run, tokens[:3], vectors(3)[1])
    assert result.check.error < 1e-7
    again = Retrainings(run, tokens[:3], vectors(3)[1])
    assert torch.allclose(again.values, result.values, rtol=0, atol=1e-12)
    assert torch.allclose(again.without([[]])[0], result.values, rtol=0, atol=1e-12)


def test_a_sparse_embedding():
    torch.manual_seed(0)
    function = lambda m, t: m.last(torch.tanh(m.first(t).mean(1)))
    model = Wrapped(function, nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3)).double()
    tokens = torch.randint(0, 7, (11, 4), generator=torch.Generator().manual_seed(0))
    plain = lambda params: torch.optim.SGD(params, lr=0.2)
    run = ntkit.train(model, (tokens, vectors(11)[1]), cross_entropy, plain, steps=9, batch_size=4)
    assert ntkit.influence(run, tokens[:2], vectors(2)[1]).check.error < 1e-7


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_whose_second_derivative_in_pytorch_is_wrong(dim):
    function = lambda m, x: m.last(torch.tanh(m.first(x)))
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6).double(), dim=dim)
    run, _ = trained(Wrapped(function, first, nn.Linear(6, 3).double()))
    assert ntkit.influence(run, *vectors(2, 2)).check.error < 1e-7


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("before", [lambda m, x: x.requires_grad_(), lambda m, x: m.last(x)])
def test_a_reentrant_checkpoint_is_refused_by_name(before):
    layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nn.Linear(5, 5).double()
    function = lambda m, x: checkpoint(m.first, before(m, x), use_reentrant=True)
    run, _ = trained(Wrapped(function, *layers))
    with pytest.raises(Refused, match="use_reentrant=False"):
        ntkit.influence(run, *vectors(2, 2))


def test_a_run_without_a_step_is_refused_by_name():
    run = ntkit.train(mlp(), vectors(11), cross_entropy, sgd, steps=5, target_loss=100.0)
    assert run.stop["step"] == 0
    with pytest.raises(Refused, match="before its first step"):
        ntkit.influence(run, *vectors(2, 2))


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        lambda f, y: nn.functional.binary_cross_entropy(f[:, 0].sigmoid(), y.float().clamp(max=1)),
        lambda f, y: cross_entropy(f @ WEIGHTS.diag(), y),
        lambda f, y: cross_entropy(f.float().to(torch.float32), y),
    ],
)
@pytest.mark.parametrize("forward", [lambda m, x: m.last(m.first(x.float())), lambda m, x: m.last(m.first(x) + ONES)])
def test_what_model_and_loss_bring_along_in_float32(loss, forward):
    """The certificate runs in float64, where a float32 tensor of the user's own is an error of PyTorch."""
    torch.manual_seed(0)
    x, y = vectors(11)
    model = Wrapped(forward, nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3))
    run = ntkit.train(model, (x.float(), y), loss, sgd, steps=9, batch_size=4)
    point = vectors(2, 2)[0].float()
    assert ntkit.influence(run, point, vectors(2, 2)[1], measure="loss").check.error < 1e-4
    assert ntkit.influence(run, point, measure=lambda f: f @ WEIGHTS).check.error < 1e-4


# ---------------------------------------------------------------------- evaluation


class Outcomes:
    """In the place of retrainings: outcomes by a formula of the mask of removed examples."""

    def __init__(self, m: int, n: int, function) -> None:
        self.m, self.n, self.function = m, n, function

    def without(self, removed: Tensor, fresh: int = 0) -> Tensor:
        return self.function(removed, fresh)


@pytest.mark.parametrize("common", [0.0, 0.7, 1.0])
def test_the_error_of_a_datamodeling_score_counts_the_draw_of_the_sets(common):
    """Test points that are alike have alike errors: their number does not reduce that of the sets."""
    g = torch.Generator().manual_seed(0)

    def drawn():
        own, same = torch.randn(20, 40, generator=g, dtype=F64), torch.randn(1, 40, generator=g, dtype=F64)
        return (1 - common) * own + common * same

    true = drawn()
    scores = true + drawn()
    again = Outcomes(20, 40, lambda removed, _: (~removed).double() @ true.T)
    found = [datamodeling_score(scores, again, sets=40, seed=seed) for seed in range(60)]
    spread = float(torch.tensor([f.value for f in found]).std())
    error = sum(f.standard_error for f in found) / 60
    assert spread < 1.3 * error
    if common:
        assert error < 1.6 * spread  # without common parts the test points are fixed here, but count as drawn


def test_the_ceiling_where_the_seeds_disagree():
    opposite = torch.tensor([[[0.0], [1.0], [2.0]], [[2.0], [1.0], [0.0]]], dtype=F64)
    again = Outcomes(1, 10, lambda removed, fresh: opposite)
    assert datamodeling_score(torch.randn(1, 10), again, sets=3, fresh=2).ceiling == 0
    again = Outcomes(1, 10, lambda removed, fresh: torch.zeros(2, 3, 1, dtype=F64))
    assert math.isnan(datamodeling_score(torch.randn(1, 10), again, sets=3, fresh=2).ceiling)


def test_refusals_of_suspicion():
    wrong = torch.tensor([True, False, False])
    with pytest.raises(Refused, match="NaN"):
        mislabeled(torch.tensor([0.0, math.nan, 1.0]), wrong)
    with pytest.raises(Refused, match="a tensor"):
        mislabeled([0.0, 1.0, 2.0], wrong)  # pyrefly: ignore
    assert mislabeled(torch.tensor([2.0, 1.0, 0.0], requires_grad=True), wrong).value == 1


def test_a_run_that_does_not_move_misses_nothing(monkeypatch):
    """At learning rate 0 every change is 0, whatever rounding leaves between outputs of runs beside one another."""
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    net = torch.nn.Linear(3, 2)
    sgd = lambda params: torch.optim.SGD(params, lr=0.0)
    run = ntkit.train(net, (x, y), torch.nn.functional.cross_entropy, sgd, 2, batch_size=4)
    plain = Reruns.run

    def rounded(self, *args, **named):
        values, ends = plain(self, *args, **named)
        return values * (1 + 1e-7 * (named.get("keep") is None)), ends

    monkeypatch.setattr(Reruns, "run", rounded)
    found = ntkit.influence(run, x[:2], y[:2])
    assert float(found.scores.abs().max()) == 0
    assert (found.miss, found.metasmoothness) == (0.0, 1.0)
    point = {"influence": {"helped": [], "hurt": []}, "residual": 0.0}
    told = {"influence": influence_in_numbers(found), "accounting": {"bitwise": True}, "points": [point]}
    told["influence"] |= {"own_error": 0.9, "finite_differences": 1.0}  # of rounding alone
    assert "no training example has an influence on these margins" in explain_text.trust(told)
    assert "kinks" not in explain_text.checks(told)
    assert "nothing to compare with finite differences" in explain_text.checks(told)
