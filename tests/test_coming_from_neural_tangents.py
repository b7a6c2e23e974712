"""Every row of docs/how-to/neural-tangents.md: its line runs, and equals the published formula of its layer."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import stax_formulas as formulas
import torch
from stax_formulas import State

import ntkit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import stax_rows
from benchmarks.peers.stax_rows import BRANCHES, COVERED, FUNCTIONS, IMAGES, KINDS, SEQUENCES, VECTORS, B, W, data

ROWS = {row.name: row for row in stax_rows.rows()}


def dense(state: State) -> State:
    return formulas.dense(state, W, B)


def relu(state: State) -> State:
    return formulas.rectified_linear(state, 0, 1)


def conv(state: State, size: int, window: int, stride: int, before: int) -> State:
    old = math.isqrt(state.k.shape[2])
    return formulas.convolution(state, formulas.taps(old, size, window, stride, before), W, B)


def local(state: State) -> State:
    return formulas.convolution(state, formulas.taps(4, 2, 3, 1, 0), W, B, shared=False)


def transposed(state: State) -> State:
    found = [matrix.T for matrix in formulas.taps(9, 4, 3, 2, 0)]
    return formulas.convolution(state, found, W, B)


def average(state: State) -> State:
    total = formulas.pool(formulas.taps(4, 4, 3, 1, 1))
    return formulas.mapped(state, total / total.sum(1, keepdims=True))


def tail_branch(state: State) -> State:
    return dense(relu(state))


def added(one: State, two: State) -> State:
    return State(one.k + two.k, one.t + two.t)


def beside(one: State, two: State) -> State:
    return State((2 * one.k + two.k) / 3, (2 * one.t + two.t) / 3)


def mean(state: State) -> State:
    positions = state.k.shape[2]
    return formulas.mapped(state, np.full((1, positions), 1 / positions))


def on_graph(state: State) -> State:
    """The columns of an image are nodes of the graph A."""
    return formulas.mapped(state, np.kron(np.eye(4), data().A.T))


erf = formulas.erf_layer(1.0, 1.0, 0.0)
LAYERS = {
    "serial": lambda s: dense(relu(s)),
    "repeat": lambda s: tail_branch(tail_branch(tail_branch(s))),
    "Dense": dense,
    "Identity": lambda s: s,
    "LayerNorm": lambda s: relu(formulas.norm(s)),
    "Dropout": lambda s: formulas.dropout(relu(s), 0.3),
    "Relu": relu,
    "LeakyRelu": lambda s: formulas.rectified_linear(s, 0.1, 1),
    "ABRelu": lambda s: formulas.rectified_linear(s, 0.3, 1.5),
    "Abs": lambda s: formulas.rectified_linear(s, -1, 1),
    "Sign": formulas.sign,
    "RectifiedMonomial": formulas.rectified_square,
    "Monomial": formulas.polynomial(0, 0, 0, 1),
    "Polynomial": formulas.polynomial(1, 2, -0.5, 0.1),
    "Hermite": lambda s: formulas.smooth(lambda c, a, b: c**3)(formulas.norm(s)),
    "Erf": formulas.erf_layer(1.5, 0.7, 0.2),
    "Sigmoid_like": formulas.erf_layer(0.5, 1 / 2.4020563531719796, 0.5),
    "Gelu": formulas.smooth(formulas.gelu),
    "Sin": formulas.sine(2, 1.5, 0.4),
    "Cos": formulas.sine(2, 1.5, 0.4 + math.pi / 2),
    "Rbf": formulas.smooth(lambda c, a, b: np.exp(-0.7 * (a + b - 2 * c))),
    "Exp": formulas.exponential(0.5, 0.4),
    "Gaussian": formulas.bell(2, 0.5),
    "Gabor": formulas.smooth(formulas.gabor),
    "ExpNormalized": lambda s: formulas.smooth(lambda c, a, b: np.exp(c - 1))(formulas.norm(s)),
    "Elementwise": formulas.smooth(lambda c, a, b: np.exp(-(a + b) / 2) * np.sinh(c)),
    "ElementwiseNumerical": formulas.by_quadrature(np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "FanOut": lambda s: added(s, tail_branch(s)),
    "parallel": lambda s: added(dense(s), dense(erf(s))),
    "FanInSum": lambda s: relu(added(dense(s), tail_branch(s))),
    "FanInProd": lambda s: formulas.product(dense(s), tail_branch(s)),
    "FanInConcat": lambda s: beside(dense(s), tail_branch(s)),
    "Conv": lambda s: relu(conv(s, 2, 3, 2, 0)),
    "ConvLocal": lambda s: relu(local(s)),
    "ConvTranspose": lambda s: relu(transposed(s)),
    "AvgPool": average,
    "SumPool": lambda s: formulas.mapped(s, formulas.pool(formulas.taps(4, 2, 2, 2, 0))),
    "GlobalAvgPool": mean,
    "GlobalSumPool": lambda s: formulas.mapped(s, np.ones((1, 16))),
    "Flatten": formulas.flattened,
    "Index": lambda s: formulas.mapped(s, np.kron(np.eye(4)[1:3], np.eye(4)[::2])),
    "ImageResize": lambda s: formulas.mapped(s, formulas.linear_interpolation(4, 6, 6)),
    "DotGeneral": lambda s: mean(on_graph(s)),
    "Aggregate": on_graph,
}
ON_SEQUENCES = {
    "GlobalSelfAttention": lambda s: dense(mean(formulas.attention(dense(s), W, W**2, B))),
    "Aggregate, a graph per sample": lambda s: dense(
        mean(formulas.per_sample(relu(dense(s)), data().graphs.transpose(0, 2, 1)))
    ),
    "mask_constant": lambda s: dense(
        formulas.per_sample(relu(dense(s)), (data().masks / data().masks.sum(1, keepdims=True))[:, None])
    ),
}


def expected(row: stax_rows.Row) -> State:
    """Both kernels of a row of layers by the formulas, each [n, n]."""
    d = data()
    if row.section == SEQUENCES:
        state = ON_SEQUENCES[row.name](formulas.of_samples(d.sequences))
    elif row.section == IMAGES:
        pixels = d.images.reshape(len(d.images), 2, 16).transpose(0, 2, 1)
        state = relu(conv(formulas.of_samples(pixels), 4, 3, 1, 1))
        state = dense(mean(LAYERS[row.name](state)))
    else:
        state = dense(LAYERS[row.name](dense(formulas.of_samples(d.x[:, None]))))
    assert state.k.shape[2:] == (1, 1)
    return State(state.k[:, :, 0, 0], state.t[:, :, 0, 0])


def distance(found, wanted) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# ---------------------------------------------------------------------- the functions


def limit(layer_of, x):
    """Both kernels of dense, erf, dense on samples."""
    state = dense(layer_of(dense(formulas.of_samples(x[:, None]))))
    return State(state.k[:, :, 0, 0], state.t[:, :, 0, 0])


def slope_by_samples():
    """Of the sum of all entries of the tangent kernel, by a complex step for each number of each sample."""
    d, found = data(), np.zeros(data().x.shape)
    for at in np.ndindex(*found.shape):
        x = d.x + 0j
        x[at] += 1e-30j
        k, a, b = (W**2 / 4 * m + B**2 for m in (x @ d.x_test.T, (x * x).sum(1)[:, None], (d.x_test**2).sum(1)[None]))
        outer = (1 + 2 * a) * (1 + 2 * b)
        after = 2 / math.pi * np.arcsin(2 * k / np.sqrt(outer))
        tangent = W**2 * k * 4 / math.pi / np.sqrt(outer - 4 * k**2) + W**2 * after + B**2
        found[at] = tangent.sum().imag / 1e-30
    return found


def descent(loss_slope, kernel, kernel_test, time, steps=20_000):
    """df/dt = -K dL/df from f = 0, by the classical method of Runge and Kutta."""
    f, f_test, h = 0 * data().y, np.zeros((3, 2)), time / steps
    for _ in range(steps):
        one = loss_slope(f)
        two = loss_slope(f - h / 2 * kernel @ one)
        three = loss_slope(f - h / 2 * kernel @ two)
        four = loss_slope(f - h * kernel @ three)
        slope = (one + 2 * two + 2 * three + four) / 6
        f, f_test = f - h * kernel @ slope, f_test - h * kernel_test @ slope
    return f_test


def cross_entropy_slope(f):
    y = data().y
    p = np.exp(f - f.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True) * y.sum(1, keepdims=True) - y) / y.size


def function_values() -> dict[str, np.ndarray]:
    """What each row of functions returns, by its formula."""
    d = data()
    both = limit(erf, np.concatenate([d.x, d.x_test]))
    (S, T), (S_test, T_test), S_tests = (
        (m[:6, :6] for m in both),
        (m[6:, :6] for m in both),
        both.k[6:, 6:],
    )
    J, J_test, f = formulas.jacobian(d.parameters, d.x), formulas.jacobian(d.parameters, d.x_test), formulas.outputs
    step = np.concatenate([s.ravel() for s in d.step])
    full = np.einsum("icp,jdp->ijcd", J_test, J)
    linear = f(d.parameters, d.x) + J @ step
    rates, modes = np.linalg.eigh(T / 12)  # the loss is a mean over 6 samples and 2 outputs
    trained = T_test @ modes @ np.diag((1 - np.exp(-3 * rates)) / (12 * rates)) @ modes.T
    noisy = S + 0.1 * np.eye(6)
    return {
        "kernel_fn": T_test,
        "jax.grad": slope_by_samples(),
        "Kernel.cov1": np.diag(S),
        "batch": T,
        "empirical_ntk_fn": full,
        "trace_axes": np.einsum("ijcc->ij", full) / 2,
        "diagonal_axes": np.einsum("ijcc->ijc", full),
        "NtkImplementation": np.einsum("icp,jdp->ijcd", J, J),
        "empirical_nngp_fn": f(d.parameters, d.x_test) @ f(d.parameters, d.x).T / 2,
        "empirical_kernel_fn": full,
        "empirical_ntk_vp_fn": np.einsum("icp,jdp,jd->ic", J, J, d.y).ravel(),
        "linearize": linear,
        "taylor_expand": linear + formulas.curvature(d.parameters, d.step, d.x) / 2,
        "gradient_descent_mse": trained @ d.y,
        "gradient_descent_mse_ensemble": S_tests - trained @ S_test.T - S_test @ trained.T + trained @ S @ trained.T,
        "gradient_descent": descent(cross_entropy_slope, T, T_test, 3.0),
        "gp_inference": S_tests - S_test @ np.linalg.solve(noisy, S_test.T),
        "diag_reg": T_test @ np.linalg.solve(T + 0.1 * np.trace(T) / 6 * np.eye(6), d.y),
        "max_learning_rate": np.array(2 * 12 / np.linalg.eigvalsh(T)[-1]),
        "monte_carlo_kernel_fn": T,
    }


INTEGRATED = {"gradient_descent"}  # numerically: the machine's own bound of its error is 1e-6
EXACT = [n for n, row in ROWS.items() if row.section == FUNCTIONS and row.verdict != "sampled" and n not in INTEGRATED]


# ---------------------------------------------------------------------- tests


def test_every_row_is_tested():
    sections = {VECTORS, BRANCHES, IMAGES, SEQUENCES, FUNCTIONS}
    assert {row.section for row in ROWS.values()} == sections
    assert set(ROWS) == {*LAYERS, *ON_SEQUENCES, *function_values()}
    assert len(ROWS) == len(stax_rows.rows()), "a name is there twice"
    assert {row.verdict for row in ROWS.values()} == set(COVERED)


@pytest.mark.parametrize("name", [*LAYERS, *ON_SEQUENCES])
def test_layer_equals_its_formula(name):
    wanted = expected(ROWS[name])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for kind in KINDS:
            assert distance(stax_rows.ours(ROWS[name], kind), wanted.t if kind == "ntk" else wanted.k) < 1e-10
    assert bool(warned) == (name == "Dropout"), "in train mode, as there"


def test_layers_in_closed_form_are_called_so():
    assert {name for name in (*LAYERS, *ON_SEQUENCES) if ROWS[name].verdict != "yes"} == {
        "ExpNormalized"
    }  # what has no network


def test_monte_carlo_agrees_with_the_limit():
    row = ROWS["monte_carlo_kernel_fn"]
    assert row.verdict == "sampled"
    found = eval(row.ours.removesuffix(".mean"), stax_rows.names_of_functions())
    away = np.linalg.norm(found.mean.numpy() - function_values()[row.name])
    assert away < 3 * float(found.standard_error.norm()) < 0.05 * float(found.mean.norm())


@pytest.mark.parametrize("name", EXACT)
def test_function_equals_its_formula(name):
    assert ROWS[name].verdict == ("no" if name == "taylor_expand" else "yes")
    assert distance(stax_rows.ours(ROWS[name]), function_values()[name]) < 1e-10


def test_training_with_a_loss_equals_its_differential_equation():
    row = ROWS["gradient_descent"]
    assert row.verdict == "yes"
    assert distance(stax_rows.ours(row), function_values()[row.name]) < 1e-6


COMPOSITIONS = {  # of several layers, where neural-tangents 0.6.5 itself differs from the formulas
    "unequal sizes": (
        'Apply(lambda h: F.interpolate(h, size=(6, 7), mode="bilinear"))',
        lambda s: formulas.mapped(s, formulas.linear_interpolation(4, 6, 7)),
    ),
    "branches of one and two convolutions, a graph": (
        """nn.Sequential(
            Join(sum, nn.Conv2d(8, 8, 1), nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), Apply(torch.sign), nn.Conv2d(8, 8, 3, padding=1))),
            Apply(lambda h: h @ A), Apply(torch.abs), Apply(lambda h: h @ A))""",
        lambda s: on_graph(
            formulas.rectified_linear(
                on_graph(added(dense(s), conv(formulas.sign(conv(s, 4, 3, 1, 1)), 4, 3, 1, 1))), -1, 1
            )
        ),
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_equals_its_formula(name, monkeypatch):
    line, formula = COMPOSITIONS[name]
    monkeypatch.setitem(LAYERS, name, formula)
    row = ROWS["Conv"]._replace(name=name, ours=line)
    wanted = expected(row)
    for kind in KINDS:
        assert distance(stax_rows.ours(row, kind), wanted.t if kind == "ntk" else wanted.k) < 1e-10


def test_a_wrong_line_is_noticed():
    wrong = ROWS["LeakyRelu"]._replace(ours="nn.LeakyReLU(0.1 + 1e-8)")
    assert distance(stax_rows.ours(wrong), expected(wrong).t) > 1e-10


def test_a_factor_behind_a_layer_is_its_standard_deviations():
    row = ROWS["Relu"]._replace(ours="nn.Sequential(Apply(lambda z: 2 * z), nn.ReLU())")
    state = formulas.dense(formulas.of_samples(data().x[:, None]), 2 * W, 2 * B)
    assert distance(stax_rows.ours(row), dense(relu(state)).t[:, :, 0, 0]) < 1e-10


def test_the_standard_parametrization_is_that_of_the_module():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 1000)).double()
    for layer in (model[0], model[2]):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.normal_(layer.bias)
    x = data().x
    k = 2 * x @ x.T / 4 + 1
    tangent = 4 * x @ x.T / 4 + 1  # input width x covariance, and the biases: Sohl-Dickstein et al. 2020
    after = relu(State(k[:, :, None, None], tangent[:, :, None, None]))
    wanted = 2 * after.t[:, :, 0, 0] + 4000 * after.k[:, :, 0, 0] + 1
    found = ntkit.InfiniteKernel(model)(torch.from_numpy(x)).numpy()
    assert distance(found, wanted) < 1e-10


def test_every_layer_of_stax_has_a_row():
    stax = """ABRelu Abs Aggregate AvgPool Conv ConvLocal ConvTranspose Cos Dense DotGeneral Dropout Elementwise
        ElementwiseNumerical Erf Exp ExpNormalized FanInConcat FanInProd FanInSum FanOut Flatten Gabor Gaussian Gelu
        GlobalAvgPool GlobalSelfAttention GlobalSumPool Hermite Identity ImageResize Index LayerNorm LeakyRelu Monomial
        Polynomial Rbf RectifiedMonomial Relu Sigmoid_like Sign Sin SumPool parallel repeat serial"""
    assert {row.name for row in ROWS.values() if row.section != FUNCTIONS} - set(stax.split()) == {
        "Aggregate, a graph per sample",
        "mask_constant",
    }
    assert set(stax.split()) <= set(ROWS)
    assert all(f"stax.{name}(" in ROWS[name].theirs for name in stax.split())
