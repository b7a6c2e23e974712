"""The axioms of representers (Tsai 2023, section 3): which kernels keep them, and each one noticed alone."""

from __future__ import annotations

import pytest
import torch
from test_representers import F64, LABELS, N, X, drawn, network, sgd
from torch.nn.functional import cross_entropy, mse_loss

import ntkit
from ntkit.base.checks import Refused


@pytest.mark.parametrize("output", [0, 1])
def test_axioms_hold_for_importance_times_a_scalar_kernel(output):
    model = network()
    alpha = ntkit.target_importance(model, X, LABELS, cross_entropy)
    for kernel in (ntkit.TangentKernel(model, "trace"), ntkit.ConjugateKernel(model)):
        found = ntkit.explain(kernel, alpha, X, X, output=output)
        violations = ntkit.check_axioms(found.scores, found.total)
        assert set(violations) == {
            "self-explanation", "symmetric zero", "symmetric cycle", "irreducibility", "efficiency",
        }  # fmt: skip
        assert max(violations.values()) < 1e-12


def test_axioms_fail_for_a_path_kernel_and_for_sums_over_checkpoints():
    run = ntkit.train(network(), (X, LABELS), cross_entropy, sgd(), steps=60, batch_size=3)
    path = ntkit.Explanation.of_path(ntkit.PathKernel(run).decompose(X), 0)
    assert ntkit.check_axioms(path.scores)["symmetric cycle"] > 1e-2
    assert ntkit.check_axioms(path.scores, path.expected)["efficiency"] < 1e-12
    y = drawn(N, 1, seed=8)
    run = ntkit.train(network(1), (X, y), mse_loss, sgd(), steps=30, batch_size=3)
    first, many = (ntkit.check_axioms(ntkit.tracin(run, X, output=0, steps=steps).scores) for steps in ([0], None))
    assert max(first.values()) < 1e-10  # of one checkpoint and one output: importance times kernel
    assert many["symmetric cycle"] > 1e-2


def test_axioms_fail_where_the_kernel_mixes_outputs():
    """A sum over outputs of importance times kernel is no importance times kernel."""
    model = network()
    alpha = ntkit.target_importance(model, X, LABELS, cross_entropy)
    scores = ntkit.explain(ntkit.TangentKernel(model), alpha, X, X, output=0).scores
    assert ntkit.check_axioms(scores)["symmetric cycle"] > 1e-2


def test_each_axiom_is_noticed_alone():
    A, alpha = drawn(6, 8), drawn(6, seed=2)
    K = A @ A.T
    good = alpha * K
    assert max(ntkit.check_axioms(good).values()) < 1e-12
    one_zero = good.clone()
    one_zero[2, 2] = 0  # example 2 has a score of 0 for itself, and others for other examples
    assert ntkit.check_axioms(one_zero)["self-explanation"] > 0.01
    half = good.clone()
    half[1, 4] = 0
    assert ntkit.check_axioms(half)["symmetric zero"] == pytest.approx(float(half[4, 1].abs() / half.abs().max()))
    cycle = good.clone()
    cycle[1, 4] *= 1.5
    found = ntkit.check_axioms(cycle)
    assert found["symmetric cycle"] > 0.01
    assert found["self-explanation"] == found["symmetric zero"] == 0
    Q = torch.linalg.qr(drawn(6, 6))[0]
    indefinite = Q @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, -0.3], dtype=F64)) @ Q.T
    assert (indefinite.diagonal() > 0).all()
    found = ntkit.check_axioms(alpha * indefinite)
    assert found["symmetric cycle"] < 1e-12
    assert found["irreducibility"] > 0.01
    scale = indefinite.diagonal().rsqrt()
    lowest = torch.linalg.eigvalsh(scale[:, None] * indefinite * scale)[0]
    assert found["irreducibility"] == pytest.approx(-float(lowest), rel=1e-9)
    assert ntkit.check_axioms(good, good.sum(1) + 1)["efficiency"] > 0.01


def test_axioms_of_two_groups_that_do_not_meet_and_of_importances_of_zero():
    blocks = torch.block_diag(*(B @ B.T for B in (drawn(3, 3), drawn(4, 4, seed=1))))
    alpha = drawn(7, seed=2)
    alpha[3] = 0
    assert max(ntkit.check_axioms(alpha * blocks).values()) < 1e-12
    mixed = alpha * blocks
    mixed[:3] *= -1  # as if alpha had another sign for some test points: phi_ii too
    assert max(ntkit.check_axioms(mixed).values()) < 1e-12  # blocks do not meet: a sign for each is free
    mixed[0, 1] *= -1
    assert max(ntkit.check_axioms(mixed).values()) > 0.1


def test_refusals_of_axioms():
    with pytest.raises(Refused, match=r"scores: got shape \[2, 3\]"):
        ntkit.check_axioms(drawn(2, 3))
    with pytest.raises(Refused, match="scores: got nan"):
        ntkit.check_axioms(torch.full((2, 2), float("nan")))
    with pytest.raises(Refused, match=r"expected: got shape \[3\]"):
        ntkit.check_axioms(drawn(2, 2), drawn(3))
