"""`InfluenceKernel`: both routes against the definition, and its identities (ridge, gradient flow, C = d I)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import ntkit
from ntkit.base.checks import Refused
from ntkit.jacobian import oracle
from ntkit.kernels import influence_kernel
from ntkit.kernels.curvature import SpectralFilter
from ntkit.kernels.output_loss import OutputLoss
from ntkit.testing import assert_equal, check_kernel

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(width=5, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def half_square(out, y):
    return (out - y).square().sum(1).mean() / 2


X, LABELS, TEST = drawn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 1]), drawn(3, 4, seed=1)
WAYS = [{"damping": 0.3}, {"damping": 1e-4}, {"time": 5.0}, {"time": 2000.0}]
IDS = ["damping", "small damping", "short time", "long time"]


def jacobians(model, x):
    return torch.cat(list(oracle.jacobian(model, x).values()), -1)  # [n, C, P]


def by_definition(model, x1, x2, damping=None, time=None, matrix=None):
    """J F(C) J^T with the Gauss-Newton matrix of cross-entropy (or another matrix), written out."""
    J = jacobians(model, X)
    if matrix is None:
        p = model(X).detach().softmax(1)
        D = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("icp,icd,idq->pq", J, D, J) / len(X)
    values, vectors = torch.linalg.eigh(matrix)
    F = [1 / (v + damping) if time is None else -math.expm1(-time * v) / v if v else time for v in values.tolist()]
    left, right = (jacobians(model, x) @ vectors for x in (x1, x2))
    return torch.einsum("icp,jdp->ijcd", left * torch.tensor(F, dtype=F64), right)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("width", [5, 1], ids=["by samples", "by parameters"])
def test_both_routes_are_the_definition(way, width):
    model = network(width)
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, **way)
    assert kernel.certificate["route"] == ("samples" if width == 5 else "parameters")
    size = kernel.certificate["at_zero"] * kernel.certificate["largest_eigenvalue"]
    values = kernel(TEST, X)
    assert values.dtype == F64
    assert_equal(values, by_definition(model, TEST, X, **way), 1e-13 * (10 + size), "k(test, train)")
    assert kernel.certificate["error"] < 1e-13 * (10 + size)


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=["damping", "time"])
@pytest.mark.parametrize("width", [5, 1], ids=["by samples", "by parameters"])
@pytest.mark.parametrize("outputs", ["full", lambda y: y[:, 0] * y[:, 1]], ids=["full", "callable"])
def test_it_obeys_the_laws_of_a_kernel(way, width, outputs):
    kernel = ntkit.InfluenceKernel(network(width), (X, LABELS), cross_entropy, outputs=outputs, **way)
    check_kernel(kernel, X, TEST)


@pytest.mark.parametrize("width", [5, 1], ids=["by samples", "by parameters"])
def test_a_callable_is_the_kernel_of_that_scalar(width):
    model = network(width)
    scalar = lambda y: y[:, 0] * y[:, 1]
    full = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, time=9.0)(TEST, X)
    y1, y2 = (model(x).detach() for x in (TEST, X))
    r1, r2 = (torch.stack([y[:, 1], y[:, 0], 0 * y[:, 0]], 1) for y in (y1, y2))
    expected = torch.einsum("ic,ijcd,jd->ij", r1, full, r2)
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, time=9.0, outputs=scalar)
    assert_equal(kernel(TEST, X), expected, 1e-12, "scalar")


def test_by_strips_it_is_the_same(monkeypatch):
    kernel = ntkit.InfluenceKernel(network(), (X, LABELS), cross_entropy, time=9.0)
    whole = kernel(X, TEST)
    monkeypatch.setattr(kernel, "_memory", lambda: 1)
    assert_equal(kernel(X, TEST), whole, 1e-13, "one sample at a time")


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=["damping", "time"])
def test_by_leading_eigenpairs_it_is_the_definition_where_they_are_all(way, monkeypatch):
    monkeypatch.setattr(influence_kernel, "_EXACT", 0)
    model = network()
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, **way)
    assert_equal(kernel(TEST, X), by_definition(model, TEST, X, **way), 1e-7, "k(test, train)")
    assert kernel.certificate["eigenpairs"] <= 14  # softmax has 2 directions of curvature of 3, and 7 examples
    assert kernel.certificate["error"] < 1e-3


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("pairs", [1, 4, 8])
def test_the_error_of_leading_eigenpairs_is_bounded_by_the_one_reported(way, pairs, monkeypatch):
    for name, value in (("_EXACT", 0), ("_FIRST", pairs), ("_MOST", pairs)):
        monkeypatch.setattr(influence_kernel, name, value)
    model = network()
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, **way)
    exact = by_definition(model, X, X, **way)
    own = torch.arange(7)
    gap = (kernel(X) - exact)[own, own].diagonal(dim1=1, dim2=2)
    largest = float(kernel(X)[own, own].diagonal(dim1=1, dim2=2).max())
    assert kernel.certificate["eigenpairs"] == pairs
    assert float(gap.min()) > -1e-9 * largest  # what is left out only ever raises the kernel
    assert 0.02 * kernel.certificate["error"] < float(gap.max()) / largest < kernel.certificate["error"] + 1e-9


def flat_loss(model, x, y):
    def value(theta):
        parts, start = {}, 0
        for name, p in model.named_parameters():
            parts[name], start = theta[start : start + p.numel()].view_as(p), start + p.numel()
        return cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    return value


@pytest.mark.parametrize("way", [{"damping": 2.0}, {"time": 1.5}], ids=["damping", "time"])
def test_the_hessian_is_that_of_the_mean_training_loss(way):
    model = network(2)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    matrix = torch.autograd.functional.hessian(flat_loss(model, X, LABELS), theta)
    assert float(torch.linalg.eigvalsh(matrix)[0]) < -1e-3  # else a Gauss-Newton matrix would pass, too
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, curvature="hessian", **way)
    assert_equal(kernel(TEST, X), by_definition(model, TEST, X, matrix=matrix, **way), 1e-12, "hessian")


def test_a_damping_below_the_smallest_eigenvalue_is_refused_with_the_one_needed():
    model = network(2)
    lowest = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, curvature="hessian", time=1.0).certificate
    needed = -lowest["smallest_eigenvalue"]
    with pytest.raises(Refused, match="not definite") as refused:
        ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, curvature="hessian", damping=needed * 0.99)(TEST)
    assert f"expected more than {needed * (1 + 1e-5):.6g}" in str(refused.value)
    enough = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, curvature="hessian", damping=needed * 1.01)(TEST)
    assert float(torch.linalg.eigvalsh(enough.permute(0, 2, 1, 3).reshape(9, 9))[0]) >= 0
    with pytest.raises(Refused, match="flow stays finite"):
        ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, curvature="hessian", time=1e5 / needed)(TEST)


@pytest.mark.parametrize("n", [4, 12], ids=["by samples", "by parameters"])
def test_with_a_curvature_of_d_times_identity_it_is_a_multiple_of_the_tangent_kernel(n):
    """Orthonormal inputs of a linear model, squared loss: C = I / 8 on all that the inputs see."""
    x = torch.linalg.qr(drawn(8, 8))[0][:n] if n < 8 else torch.cat([torch.eye(8, dtype=F64)] * 3)[:24]
    model, d = nn.Linear(8, 1, bias=False).double(), 1 / 4 if n < 8 else 1 / 8
    theta = ntkit.TangentKernel(model)(x)
    for way, factor in (({"damping": 0.5}, 1 / (d + 0.5)), ({"time": 3.0}, -math.expm1(-3 * d) / d)):
        kernel = ntkit.InfluenceKernel(model, (x, 0 * x[:, :1]), half_square, **way)
        assert kernel.certificate["route"] == ("samples" if n < 8 else "parameters")
        assert_equal(kernel(x), theta * factor, 1e-13, f"{way}")


@pytest.mark.parametrize("features", [3, 30], ids=["by parameters", "by samples"])
def test_ridge_regression_influence_is_the_derivative_of_leaving_one_out(features):
    """Exact retrainings at weights 1 +- eps of one example, and the closed form of leaving it out."""
    n, ridge = 12, 0.2
    x, y, test = drawn(n, features), drawn(n, 1, seed=2), drawn(4, features, seed=3)

    def fitted(weights):
        gram = x.T @ (weights[:, None] * x) / n + ridge * torch.eye(features, dtype=F64)
        return torch.linalg.solve(gram, x.T @ (weights[:, None] * y) / n)

    model = nn.Linear(features, 1, bias=False).double()
    model.weight.data = fitted(torch.ones(n, dtype=F64)).T.contiguous()
    kernel = ntkit.InfluenceKernel(model, (x, y), half_square, damping=ridge)
    alpha = ntkit.target_importance(model, x, y, half_square)
    gained = ntkit.explain(kernel, alpha, x, test).scores / n  # d prediction / d weight
    h = ntkit.explain(kernel, ntkit.Importance(torch.ones(n), "ones"), x, x).scores.diagonal() / n  # the leverage
    for i in range(n):
        step = 1e-4 * torch.eye(n, dtype=F64)[i]
        slope = (test @ (fitted(1 + step) - fitted(1 - step))).ravel() / 2e-4
        assert_equal(gained[:, i], slope, 1e-7, f"derivative, example {i}")
        change = (test @ (fitted(torch.ones(n) - torch.eye(n)[i]) - fitted(torch.ones(n, dtype=F64)))).ravel()
        assert_equal(-gained[:, i] / (1 - h[i]), change, 1e-11, f"leaving {i} out")


def test_the_early_stopped_filter_is_the_limit_of_small_steps():
    """A linear model, squared loss: dtheta / dweight carried through 4,000 steps of gradient descent."""
    n, features, time, steps = 6, 4, 3.0, 4000
    x, y, test = drawn(n, features), drawn(n, 1, seed=2), drawn(3, features, seed=3)
    model = nn.Linear(features, 1, bias=False).double()
    slope = (model(x).detach() - y) * x / n  # d gradient / d weight, at the end of training: held fixed along the run
    tangent, rate = torch.zeros(n, features, dtype=F64), time / steps
    errors = []
    exact = ntkit.explain(
        ntkit.InfluenceKernel(model, (x, y), half_square, time=time),
        ntkit.target_importance(model, x, y, half_square), x, test,
    ).scores / n  # fmt: skip
    for count in (steps, 2 * steps):
        rate = time / count
        tangent.zero_()
        for _ in range(count):
            tangent -= rate * (tangent @ (x.T @ x) / n + slope)
        errors.append(float((test @ tangent.T - exact).abs().max() / exact.abs().max()))
    assert errors[0] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)  # an error of first order in the step vanishes


def test_the_filters_are_accurate_for_tiny_and_huge_eigenvalues():
    from fractions import Fraction

    def exact(u):  # (1 - exp(-u)) / u and (u - 1 + exp(-u)) / u^2 by their series, in rational numbers
        u, first, second, term = Fraction(u), Fraction(0), Fraction(0), Fraction(1)
        for k in range(60):
            first += term / (k + 1)
            second += term / ((k + 1) * (k + 2))
            term *= -u / (k + 1)
        return float(first), float(second)

    eigenvalues = [0.0, 1e-300, 1e-17, 3e-9, 1e-4, 0.3, 0.999, 1.0, 1.5, 6.0]
    filter_ = SpectralFilter(time=1.0)
    values, missing = (f(torch.tensor(eigenvalues, dtype=F64)) for f in (filter_.values, filter_.missing))
    for k, u in enumerate(eigenvalues):
        first, second = exact(u)
        assert values[k].item() == pytest.approx(first, rel=4e-15)
        assert missing[k].item() == pytest.approx(second, rel=4e-15)
    assert SpectralFilter(time=2.0).values(torch.tensor([-1.0], dtype=F64)).item() == pytest.approx(math.exp(2) - 1)


def test_time_of_a_run_is_its_learning_rates_over_one_less_momentum():
    model, sgd = network(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    schedule = lambda step: 0.5**step
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd, steps=4, schedule=schedule)
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, time=run)
    assert kernel.certificate["at_zero"] == pytest.approx(0.1 * (1 + 0.5 + 0.25 + 0.125) / 0.1, rel=1e-12)
    adam = ntkit.train(network(), (X, LABELS), cross_entropy, lambda p: torch.optim.Adam(p), steps=2)
    with pytest.raises(Refused, match=r"Adam.*expected a run of torch.optim.SGD"):
        ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, time=adam)


def test_it_follows_the_parameters_of_the_model():
    model = network()
    kernel = ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, damping=0.1)
    before = kernel(TEST)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert_equal(kernel(TEST), by_definition(model, TEST, TEST, damping=0.1), 1e-11, "after a change")
    assert float((kernel(TEST) - before).abs().max()) > 1e-2


def test_a_gram_of_it_has_an_identity_that_tells_filter_and_data():
    model = network()

    def identity(data=(X, LABELS), **way):
        kernel = ntkit.InfluenceKernel(model, data, cross_entropy, outputs=lambda y: y[:, 0], **way)
        return ntkit.Gram(kernel(TEST), kernel, TEST).identity

    same = identity(time=1.0)
    assert identity(time=1.0) == same
    assert len({same, identity(time=2.0), identity(damping=1.0), identity((X[:5], LABELS[:5]), time=1.0)}) == 4


def test_mean_and_sum_of_a_loss_are_one_loss():
    model = network()
    mean, total = (
        ntkit.InfluenceKernel(model, (X, LABELS), lambda out, y, r=r: cross_entropy(out, y, reduction=r), damping=0.1)
        for r in ("mean", "sum")
    )
    assert_equal(total(TEST), mean(TEST), 1e-13, "sum")
    hessians = [
        ntkit.InfluenceKernel(
            model, (X, LABELS), lambda out, y, r=r: cross_entropy(out, y, reduction=r), curvature="hessian", time=1.0
        )(TEST)
        for r in ("mean", "sum")
    ]
    assert_equal(hessians[1], hessians[0], 1e-13, "sum")


def test_a_loss_of_the_batch_as_a_whole_is_refused():
    weighted = lambda out, y: cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 5.0], dtype=F64))
    with pytest.raises(Refused, match="depends on the other examples"):
        OutputLoss(weighted, drawn(7, 3), LABELS)
    by_hand = lambda out, y: (torch.tensor([1.0, 2.0, 5.0])[y] * cross_entropy(out, y, reduction="none")).mean()
    assert OutputLoss(by_hand, drawn(7, 3), LABELS).of_mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "got neither; expected exactly one"),
        ({"damping": 1.0, "time": 1.0}, "got both"),
        ({"damping": 0.0}, "damping: got 0.0"),
        ({"damping": -1.0}, "damping: got -1.0"),
        ({"time": math.inf}, "time: got inf"),
        ({"time": "long"}, "time: got 'long'"),
        ({"time": 1.0, "curvature": "fisher"}, "curvature: got 'fisher'"),
        ({"time": 1.0, "outputs": "trace"}, "outputs: got 'trace'"),
        ({"time": 1.0, "params": "none"}, "params: got 'none'"),
        ({"time": 1.0, "memory": 1000}, "43 parameters; 7 examples x 3 outputs: 1.76e-05 GB"),
        ({"time": 1.0, "memory": 1000, "curvature": "hessian"}, 'use curvature="gauss-newton"'),
        ({"time": 1.0, "data": (X, LABELS[:3])}, "x: got 7 rows; expected 3"),
        ({"time": 1.0, "loss": lambda out, y: -mse_loss(out[:, 0], y.double())}, "convex in the outputs"),
        ({"time": 1.0, "loss": lambda out, y: out}, "loss: got"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    settings = {"data": (X, LABELS), "loss": cross_entropy} | change
    with pytest.raises(Refused) as refused:
        ntkit.InfluenceKernel(network(), **settings)(TEST)
    assert message in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", ["full", lambda out: out[:, 0]], ids=["full", "callable"])
def test_the_diagonal_in_narrow_precisions_is_that_of_the_matrix(dtype, outputs):
    """T times the tangent kernel was computed in half precision there, which ends at 65504."""
    model, x = nn.Linear(4, 2).to(dtype), X.to(dtype)  # its kernel (|x|^2 + 1) I has few roundings
    kernel = ntkit.InfluenceKernel(model, (x[:2], drawn(2, 2).to(dtype)), mse_loss, time=1e5, outputs=outputs)
    theta = ntkit.TangentKernel(model, outputs)
    own = torch.arange(7)
    assert_equal(theta.diagonal(x).double(), theta(x)[own, own].double(), 4 * torch.finfo(dtype).eps, "tangent kernel")
    whole, room = kernel(x)[own, own], 1e5 * 4 * torch.finfo(dtype).eps * float(theta.diagonal(x).double().max())
    assert kernel.diagonal(x).dtype == kernel.paired(x, x).dtype == F64
    for found in (kernel.diagonal(x), kernel.paired(x, x)):
        assert float((found - whole).abs().max()) <= room


@pytest.mark.parametrize("way", [{"damping": 1e-200}, {"time": 1e200}, {"damping": 5e-324}], ids=str)
def test_a_filter_that_leaves_nothing_but_rounding_is_refused(way):
    model = network(outputs=2, width=40)
    kernel = ntkit.InfluenceKernel(model, (X, drawn(7, 2)), mse_loss, **way)
    (name,) = way
    with pytest.raises(Refused, match=rf"{name}: got .*, at which rounding alone is .* Use a (larger|shorter)"):
        kernel(TEST)


def test_extreme_filters_that_leave_something_are_exact():
    """Where F hardly depends on the eigenvalue, the kernel is F(0) times the tangent kernel."""
    model = network(outputs=2, width=40)
    theta = ntkit.TangentKernel(model)(TEST)
    for way, at_zero in (({"damping": 1e200}, 1e-200), ({"time": 1e-200}, 1e-200)):
        found = ntkit.InfluenceKernel(model, (X, drawn(7, 2)), mse_loss, **way)(TEST)
        assert_equal(found / at_zero, theta, 1e-12, str(way))


def test_leading_eigenpairs_where_the_examples_looked_at_have_no_gradient(monkeypatch):
    for name, value in (("_EXACT", 0), ("_CHECKED", 2)):
        monkeypatch.setattr(influence_kernel, name, value)
    model, x = nn.Linear(4, 2, bias=False).double(), drawn(7, 4)
    x[0] = x[6] = 0.0  # those looked at
    kernel = ntkit.InfluenceKernel(model, (x, drawn(7, 2)), mse_loss, damping=0.3)
    second = torch.eye(8, dtype=F64).view(2, 4, 8)
    J = torch.einsum("ni,cip->ncp", x, second)
    C = torch.einsum("ncp,ncq->pq", J, J) / 7  # mse_loss of two outputs: D = I
    exact = torch.einsum("icp,pq,jdq->ijcd", J, torch.linalg.inv(C + 0.3 * torch.eye(8, dtype=F64)), J)
    assert_equal(kernel(x), exact, 1e-7, "k(x, x)")
    with pytest.raises(Refused, match="the curvature: got"):  # not one pair fits
        ntkit.InfluenceKernel(model, (x, drawn(7, 2)), mse_loss, damping=0.3, memory=100)(x)
