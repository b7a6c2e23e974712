"""What influence and its evaluations say of themselves, by value: metasmoothness, finite differences, intervals."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.explanations import influence as module
from ntkit.explanations.evaluation import Deletion, Evaluation
from ntkit.explanations.measures_of_outputs import OutputMeasure
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.reruns import Reruns

F64 = torch.float64
N, STEPS = 8, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, Y = draw(N, 2), torch.arange(N) % 2
TEST, GOAL = draw(3, 2, seed=1), torch.tensor([1, 0, 1])
SETTINGS = {"lr": 1.5, "momentum": 0.9}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def trained(model: nn.Module, **settings: float) -> ntkit.Trajectory:
    sgd = lambda params: torch.optim.SGD(params, **(SETTINGS | settings))
    return ntkit.train(model, (X, Y), nn.functional.cross_entropy, sgd, steps=STEPS, batch_size=4)


def again(run: ntkit.Trajectory, weights: Tensor, **settings: float) -> nn.Module:
    """The run with other weights, in a loop of its own."""
    net = copy.deepcopy(run.origin[0])
    run.load(net, 0)
    optimizer = torch.optim.SGD(net.parameters(), **(SETTINGS | settings))
    for step in range(STEPS):
        rows = run.batch(step)
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(net(X[rows]), Y[rows], reduction="none")
        (losses * weights[rows]).mean().backward()
        optimizer.step()
    return net


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def logits(net: nn.Module) -> Tensor:
    return net(TEST).detach().gather(1, GOAL[:, None])[:, 0]


@pytest.mark.parametrize("at", [1.0, 0.5])
def test_metasmoothness_and_the_miss_are_those_of_three_runs(at):
    run = trained(network())
    found = ntkit.influence(run, TEST, GOAL, measure="logit", at=at)
    weights = torch.full((N,), at, dtype=F64)
    change = 0.05 * weights * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=F64)
    nets = [again(run, weights + j * change) for j in range(3)]
    first, middle, last = map(flat, nets)
    straight = (middle - first).sign() * (last - middle).sign()
    distance = (last - first).abs()
    expected = float((distance * straight).sum() / distance.sum())
    assert 0.1 < expected < 0.99  # some parameters turn round
    assert found.metasmoothness == pytest.approx(expected, abs=1e-6)
    real = logits(nets[1]) - logits(nets[0])
    assert found.miss == pytest.approx(float((found.scores @ change - real).norm() / real.norm()), rel=1e-5)
    torch.testing.assert_close(found.values, logits(nets[0]), rtol=1e-9, atol=1e-9)


def test_a_run_that_no_weight_moves_is_smooth():
    """With a learning rate of zero nothing moves: no parameter turns round."""
    found = ntkit.influence(trained(network(), lr=0.0), TEST, GOAL)
    assert found.metasmoothness == 1.0
    assert not found.scores.any()


def test_what_is_trusted_and_smooth_by_the_limits():
    one = ntkit.influence(trained(network(), lr=0.1), TEST, GOAL)
    assert one.trusted
    assert one.smooth
    for name, good, bad in (("miss", 0.5, 0.51), ("metasmoothness", 0.5, 0.49)):
        for value in (good, bad):
            other = copy.copy(one)
            setattr(other, name, value)
            assert (other.trusted and other.smooth) is (value == good)


@pytest.mark.parametrize("at", [1.0, 0.5])
def test_finite_differences_and_their_errors_are_those_of_plain_runs(at):
    """With a large step, so that the error of one-sided differences is far above rounding."""
    settings = {"lr": 0.3}
    run = trained(network(), **settings)
    weights, examples, step = torch.full((N,), at, dtype=F64), torch.tensor([5, 0, 3]), 0.05
    replay = Replay(run, weights=None if at == 1 else weights)
    of = OutputMeasure("logit", replay.objective.loss, TEST, GOAL, replay.model)
    scores = draw(3, N, seed=2)
    found, middle = module._differences(Reruns(replay, F64), weights, examples, step, None, scores, TEST, of)
    central, one_sided, plain = [], [], logits(again(run, weights, **settings))
    for i in examples.tolist():
        values = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[i] += sign * step * at
            values.append(logits(again(run, moved, **settings)))
        central.append((values[0] - values[1]) / (2 * step * at))
        one_sided.append((values[0] - plain) / (step * at))
    torch.testing.assert_close(middle, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.values, torch.stack(central, 1), rtol=1e-7, atol=1e-9)
    sizes = [c.norm() for c in central]
    errors = [float((scores[:, i] - c).norm() / s) for i, c, s in zip(examples, central, sizes, strict=True)]
    own = [float((o - c).norm() / s) for o, c, s in zip(one_sided, central, sizes, strict=True)]
    assert found.error == pytest.approx(max(errors), rel=1e-6)
    assert found.own_error == pytest.approx(max(own), rel=1e-5)
    assert max(errors) > 1.1 * sum(errors) / 3  # the largest is not the mean
    assert max(own) > 1e-4


@pytest.mark.parametrize(
    ("smooth", "errors", "tried", "chosen"),
    [
        (0.9, {1e-6: 3e-3, 1e-7: 1e-3, 1e-8: 2e-3}, [1e-6, 1e-7, 1e-8], 1e-7),  # none is good: the best
        (0.9, {1e-6: 3e-3, 1e-7: 1e-4, 1e-8: 2e-5}, [1e-6, 1e-7], 1e-7),  # good enough: no more runs
        (0.5, {1e-6: 9e-5, 1e-7: 2e-5, 1e-8: 1e-5}, [1e-6], 1e-6),
        (0.4, {1e-6: 1e-3, 1e-7: 3e-3, 1e-8: 2e-3}, [1e-7, 1e-8, 1e-6], 1e-6),
    ],
)
def test_the_step_of_finite_differences_is_the_first_good_one_or_the_best(smooth, errors, tried, chosen, monkeypatch):
    seen = []

    def found(reruns, weights, examples, step, middle, scores, x, of):
        assert middle is (seen[0] if seen else None)  # of the run itself: computed once
        seen.append(torch.tensor(step) if middle is None else step)
        return module.FiniteDifferences(examples, torch.zeros(3, 2), 0.0, errors[step], step), seen[0]

    monkeypatch.setattr(module, "_differences", found)
    one = module._certificate(None, torch.ones(N), draw(3, N), TEST, None, 2, smooth)  # type: ignore[arg-type]
    assert [float(step) for step in seen] == pytest.approx(tried)
    assert (one.step, one.own_error) == (chosen, errors[chosen])


class Wrong(torch.autograd.Function):
    """0.15 x^2, whose derivative by autograd is itself taken for a constant."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.slope = 0.3 * x.detach()
        return 0.15 * x**2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.slope


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + Wrong.apply(x)


def test_a_wrong_second_derivative_is_said():
    model = network()
    model[1] = Layer()
    run = trained(model, lr=0.2)
    with pytest.warns(UserWarning, match="differ from finite differences by .* wrong second derivative"):
        found = ntkit.influence(run, TEST, GOAL)
    assert 1e-3 < found.check.error < 0.5  # a wrong number that looks right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ntkit.influence(trained(network(), lr=0.2), TEST, GOAL).check.error < 1e-6


# ---------------------------------------------------------------------- evaluations


def test_intervals_are_of_95_percent():
    by_normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.975)).item()
    for one in (Evaluation(0.3, 0.1, torch.zeros(1), ""), Deletion([0.1], torch.zeros(1, 1), 0.3, 0.1, "")):
        assert one.interval == pytest.approx((0.3 - 0.1 * by_normal, 0.3 + 0.1 * by_normal), abs=1e-4)


class Few:
    """In the place of retrainings: the sum of what each remaining example adds; the last test point sees nothing."""

    measure = "margin"

    def __init__(self, m: int, n: int = 9) -> None:
        self.m, self.n = m, n
        self.adds = draw(m, n, seed=3)
        self.adds[-1] = 0
        self.values = self.adds.sum(1)

    def without(self, removed, *, fresh: int = 0) -> Tensor:
        masks = torch.zeros(len(removed), self.n, dtype=torch.bool)
        for mask, out in zip(masks, removed, strict=True):
            mask[torch.as_tensor(out)] = True
        return (~masks).double() @ self.adds.T


def test_a_test_point_whose_outcomes_are_all_equal_has_no_correlation():
    few, scores = Few(4), draw(4, 9, seed=4)
    for found in (ntkit.leave_one_out(scores, few), ntkit.datamodeling_score(scores, few, sets=6)):
        defined = found.by_point[:3]
        assert defined.isfinite().all()
        assert found.by_point[3].isnan()
        assert found.value == pytest.approx(float(defined.mean()))
    found = ntkit.leave_one_out(scores, few)
    assert found.standard_error == pytest.approx(float(found.by_point[:3].std() / 3**0.5))


def test_what_has_no_standard_error_has_an_infinite_one():
    one = Few(2)
    one.m, one.adds, one.values = 1, one.adds[:1], one.values[:1]
    scores = draw(1, 9, seed=4)
    assert ntkit.leave_one_out(scores, one).standard_error == math.inf  # one test point
    assert ntkit.case_deletion(scores, one).standard_error == math.inf
    assert ntkit.query_loss_difference(scores, one, share=0.2).standard_error == math.inf
    assert ntkit.datamodeling_score(draw(3, 9), Few(3), sets=2).standard_error == math.inf  # two sets


@pytest.mark.parametrize("name", ["margin", "logit"])
def test_without_targets_it_is_the_measure_of_the_predicted_class(name):
    torch.manual_seed(3)
    model = nn.Linear(2, 4).double()
    of = OutputMeasure(name, nn.functional.cross_entropy, TEST, None, model)
    outputs = model(TEST).detach()
    assert of.targets is not None
    assert of.targets.tolist() == outputs.argmax(1).tolist()
    for value, row in zip(of.of_network(model, TEST), outputs.tolist(), strict=True):
        others = math.log(sum(math.exp(f) for f in sorted(row)[:-1]))
        assert float(value) == pytest.approx(max(row) - (others if name == "margin" else 0.0))
