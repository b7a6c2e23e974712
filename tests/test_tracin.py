"""TracIn: sums over checkpoints against their definition, and refusals."""

from __future__ import annotations

import pytest
import torch
from test_representers import LABELS, TEST, N, X, linear, network, sgd
from torch.nn.functional import cross_entropy

import ntkit
from ntkit.base.checks import Refused
from ntkit.testing import assert_equal


def test_tracin_of_one_checkpoint_is_rate_times_target_times_tangent_kernel():
    model = network()
    found = ntkit.tracin(
        [(model.state_dict(), 0.3)], TEST, output=1, model=network(), data=(X, LABELS), loss=cross_entropy
    )
    alpha = ntkit.target_importance(model, X, LABELS, cross_entropy)
    expected = 0.3 * ntkit.explain(ntkit.TangentKernel(model), alpha, X, TEST, output=1).scores
    assert torch.equal(found.scores, expected)


def test_tracin_of_a_run_is_the_sum_over_its_checkpoints():
    model, schedule = network(), lambda step: 1 / (1 + step)
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd(), steps=6, schedule=schedule)
    found, copy, total = ntkit.tracin(run, TEST), network(), 0.0
    assert torch.equal(found.outputs, model(TEST).argmax(1))
    for step in run.steps:
        run.load(copy, step)
        alpha = ntkit.target_importance(copy, X, LABELS, cross_entropy)
        rate = 0.05 / (1 + min(step, 5))
        scores = ntkit.explain(ntkit.TangentKernel(copy), alpha, X, TEST, output=found.outputs).scores
        total = total + rate * scores
    assert_equal(found.scores, total, 1e-13, "TracIn")
    few = ntkit.tracin(run, TEST, output=0, steps=[0])
    assert float((few.scores - ntkit.tracin(run, TEST, output=0, steps=[0, 6]).scores).abs().max()) > 1e-4


def test_tracin_of_one_step_is_the_change_of_a_linear_model_by_each_example():
    model = linear()
    before = model(TEST).detach()
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd(), steps=1)
    for output in range(3):
        change = (model(TEST).detach() - before)[:, output]
        assert_equal(ntkit.tracin(run, TEST, output=output, steps=[0]).total / N, change, 1e-12, "one step")


def test_refusals_of_tracin():
    model = network()
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd(), steps=5)
    extra = {"model": model, "data": (X, LABELS), "loss": cross_entropy}
    for arguments, settings, message in [
        (([], TEST), {}, "trajectory: got no checkpoint"),
        ((3, TEST), {}, "trajectory: got a int"),
        (([(model.state_dict(), "0.1")], TEST), {}, "eta: got '0.1'"),
        (([(linear().state_dict(), 0.1)], TEST), {}, "expected the model's parameters and buffers by name"),
        ((run, TEST), {"steps": [7]}, "step 7: got a step that was not recorded"),
        ((run, TEST), {"steps": []}, "trajectory: got no checkpoint"),
        ((run, TEST), {"output": 5}, "output: got 5"),
    ]:
        with pytest.raises(Refused) as refused:
            ntkit.tracin(*arguments, **settings, **extra)
        assert message in str(refused.value)
    with pytest.raises(Refused, match="model, data, loss: got not all of them"):
        ntkit.tracin([(model.state_dict(), 0.1)], TEST)
    with pytest.raises(Refused, match="other data"):
        ntkit.tracin(run, TEST, data=(X + 1, LABELS))
    groups = lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.02}], lr=0.1)
    with pytest.raises(Refused, match="groups of parameters with different ones"):
        ntkit.tracin(ntkit.train(network(), (X, LABELS), cross_entropy, groups, steps=2), TEST)
