"""What is not defined is said: refused by name, or a status. What a user passes by mistake is refused at the door."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from sklearn.base import clone
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Undefined, defined
from ntkit.measures.convergence import fitted_slope
from ntkit.measures.eigenfunctions import bandwidth, eigenfunctions, patterns
from ntkit.tracking.snapshot_numbers import KernelMatrix

A = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
K = A @ A.T
Y = torch.tensor([1.0, -1, 1, -1, 1, -1])
LOSS = lambda outputs, y: F.mse_loss(outputs, y)


def refused(message):
    return pytest.raises(ntkit.Refused, match=message)


# ------------------------------------------------------------------ undefined numbers


class Zeros:
    """The products of a matrix of zeros."""

    shape, dtype = (6, 6), torch.float64

    def __matmul__(self, v):
        return 0 * v

    def to_scipy(self):
        return scipy.sparse.linalg.aslinearoperator(scipy.sparse.csr_matrix((6, 6)))


def test_numbers_that_are_not_defined_are_refused():
    s = ntkit.spectrum(K)
    for call, message in (
        (lambda: ntkit.alignment(K, torch.ones(6), centered=True), "alignment: y: got one constant target"),
        (lambda: ntkit.alignment(K, torch.ones(6, 3), centered=True), "alignment: y: got one constant target"),
        (lambda: ntkit.alignment(K, torch.zeros(6)), "y: got zeros only"),
        (lambda: s.energy(torch.zeros(6, 2)), "v: got zeros only"),
        (lambda: ntkit.effective_rank(-K), "effective_rank: got largest eigenvalue"),
        (lambda: bandwidth(torch.ones(3, 4, 4)), "images: got constant images only"),
        (lambda: fitted_slope([1, 2], [0.0, 1.0], [0.1, 0.1]), "slope: got 0 "),
        (lambda: fitted_slope([1, 2], [1.0, 1.0], [0.0, 0.1]), "slope: got 1 "),
        (lambda: ntkit.alignment(0 * K, Y), "K1: got zeros only; expected a kernel"),
        (lambda: ntkit.alignment(0 * K, Y, centered=True), "K1: got zeros only; expected a kernel"),
        (lambda: ntkit.alignment(K, 0 * K), "K2: got zeros only; expected a kernel"),
        (lambda: ntkit.alignment(torch.ones(6, 6), K, centered=True), "alignment: K1: got one constant kernel"),
        (lambda: ntkit.spectrum(0 * K), "K: got zeros only; expected a kernel"),
        (lambda: ntkit.spectrum(Zeros(), k=2), "operator: got zeros only; expected a kernel"),
        (lambda: ntkit.effective_rank(0 * K), "K: got zeros only; expected a kernel"),
    ):
        with pytest.raises(Undefined, match=message):
            call()
        assert defined(call) is None
    assert defined(ntkit.alignment, K, Y) == ntkit.alignment(K, Y)
    with refused("symmetric"):
        defined(ntkit.alignment, A[:, :6], Y)


def test_a_limit_of_zeros_has_no_rate():
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with pytest.raises(Undefined, match="convergence: got a limit of zeros"):
        ntkit.convergence(net, torch.zeros(3, 2), widths=(4, 8), seeds=2)


def test_pages_go_on_where_a_number_is_not_defined():
    """One class, zero targets: None, which the pages write as undefined, beside the other numbers."""
    same, zero = torch.ones(6, 2).double(), torch.zeros(6, 1).double()
    numbers, _ = KernelMatrix(K).spectral(3, {"target": same, "output": zero}, 1)
    assert numbers["alignment_centered"] is None
    assert numbers["class_alignment"] == [None, None]
    assert numbers["energy_output"] == [None] * 3
    assert numbers["alignment"] == pytest.approx(float(K.sum() / K.norm() / 6))
    vectors = torch.linalg.eigh(K)[1].flip(1)[:, :3]
    assert numbers["energy_target"] == pytest.approx((vectors.sum(0) ** 2 / 6).cumsum(0).tolist())
    numbers, _ = KernelMatrix(K).spectral(3, {"target": zero}, 1)
    assert numbers["alignment"] is numbers["alignment_centered"] is None


def test_machines_on_kernels_of_zeros_and_constant_targets():
    zero, ones = torch.zeros(4, 4).double(), torch.ones(4).double()
    for machine in (ntkit.KernelRidge(0.0), ntkit.GaussianProcess(0.0)):
        fitted = machine.fit(zero, ones)
        assert fitted.status_ == "singular"
        assert fitted.advice_
    torch.testing.assert_close(ntkit.KernelRidge(0.5).fit(zero, ones).alpha_, 2 * ones)
    assert ntkit.KernelRidge(0.5).fit(K, torch.zeros(6)).residual_ == 0
    flow = ntkit.GradientFlow().fit(zero, ones)
    assert (flow.status_, flow.max_learning_rate_) == ("solved", float("inf"))
    assert torch.equal(flow.predict(zero, float("inf")), 0 * ones)
    with refused("K: got a zero diagonal"):
        ntkit.HardMarginSVM().fit(zero, [0, 1, 0, 1])
    with refused("y: got one class"):
        ntkit.HardMarginSVM().fit(K, torch.ones(6))
    one = torch.ones(1, 1).double()
    assert ntkit.KernelRidge(0.0).fit(one, [3.0]).predict(one).tolist() == [3.0]
    x = np.linspace(0, 1, 8)[:, None]
    for kind in ("ridge", "gp"):
        assert np.allclose(ntkit.NTKRegressor(machine=kind).fit(x, np.full(8, 2.5)).predict(x), 2.5)


# ------------------------------------------------------------------ labels of the support vector machine


@pytest.mark.parametrize(
    "y",
    [
        [1, -1, 1, -1, 1, -1],
        [1.0, -1.0, 1.0, -1.0, 1.0, -1.0],
        np.array([True, False] * 3),
        np.array(["cat", "dog"] * 3),
        np.array(["cat", "dog"] * 3, dtype=object),
        torch.tensor([1.0, -1.0] * 3, dtype=torch.bfloat16),
        torch.tensor([True, False] * 3),
        np.arange(6),
        range(6),
    ],
    ids=str,
)
def test_labels_that_the_svm_takes(y):
    svm = ntkit.HardMarginSVM().fit(K, y)
    assert svm.status_ == "optimal"
    assert list(svm.predict(K)) == list(y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.randn(6, generator=torch.Generator().manual_seed(1)), r"y: got continuous values .* KernelRidge"),
        ([0.5, 1, 2, 3, 4, 5], r"y: got continuous values \(0.5 at index 0\); expected class labels"),
        (np.eye(2)[[0, 1] * 3], r"y: got shape \[6, 2\]"),
        (np.array([1, "a", None, 2, 3, 4], dtype=object), "y: got object values; expected class labels"),
        (np.array([1j] * 6), "y: got complex128 values"),
        (torch.tensor([1j] * 6), "y: got complex values"),
        (None, "y: got"),
        (Y.to_sparse(), "y: got a sparse tensor"),
        (scipy.sparse.csr_matrix(np.ones((6, 1))), "y: got a sparse csr_matrix"),
        (torch.ones(6, device="meta"), 'y: got a tensor on device "meta"'),
        ([1, 0, 1], "y: got 3 entries; expected 6"),
        ([1.0, float("nan"), 0, 1, 0, 1], "y: got nan at index 1"),
    ],
)
def test_targets_that_the_svm_refuses(y, message):
    with refused(message):
        ntkit.HardMarginSVM().fit(K, y)


# ------------------------------------------------------------------ settings


SETTINGS = {
    "ridge": (ntkit.KernelRidge, "ridge", 0.25),
    "noise": (ntkit.GaussianProcess, "noise", 0.25),
    "tol": (ntkit.HardMarginSVM, "tol", 0.25),
    "lr": (ntkit.GradientFlow, "lr", 0.25),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_no_numbers_are_refused(name):
    make, _, good = SETTINGS[name]
    wrong = (
        np.ones(4),
        torch.ones(2),
        "0.1",
        float("nan"),
        -1.0,
        float("inf"),
        True,
        10**400,
        [0.1],
        1j,
        K.to_sparse(),
    )
    for value in (*wrong, torch.ones((), device="meta"), *([None] if name != "lr" else [])):
        with refused(f"{name}: got "):
            make(value)
    for value in (torch.tensor(good), np.float32(good), np.array(good)):
        assert make(value).get_params()[name] is value


@pytest.mark.parametrize("name", SETTINGS)
def test_machines_are_cloned_copied_and_pickled(name):
    make, _, good = SETTINGS[name]
    machine = make(good).fit(K, Y)
    other = clone(machine)
    assert repr(other) == repr(make(good))
    assert other.get_params() == machine.get_params() == make(good).get_params()
    for copied in (copy.deepcopy(machine), pickle.loads(pickle.dumps(machine))):
        assert repr(copied) == repr(machine)
        one, two = (m.predict(K) for m in (copied, machine))
        assert torch.equal(*((one.mean, two.mean) if name == "noise" else (one, two)))
    assert machine.set_params(**{name: 0.5}) is machine
    assert repr(machine) == repr(make(0.5))
    with refused("Call fit before predicting"):
        machine.predict(K)
    with refused(rf"got 'ridgee'; expected a setting\. .*{name}"):
        machine.set_params(ridgee=1.0)
    with refused(f"{name}: got -1"):
        machine.set_params(**{name: -1.0})
    assert machine.get_params()[name] == 0.5


def test_a_flow_with_a_loss_is_cloned():
    flow = clone(ntkit.GradientFlow(loss=LOSS))
    assert flow.get_params() == {"lr": None, "momentum": 0.0, "loss": LOSS, "k": None}


# ------------------------------------------------------------------ arrays

MACHINES = {
    "ridge": lambda: ntkit.KernelRidge(0.1),
    "gp": lambda: ntkit.GaussianProcess(0.1),
    "svm": ntkit.HardMarginSVM,
    "flow": ntkit.GradientFlow,
}
MATRICES = {
    "sparse": (K.to_sparse(), r"a sparse tensor; expected a dense one\. Pass K\.to_dense"),
    "csr": (scipy.sparse.csr_matrix(K.numpy()), r"a sparse csr_matrix; expected a dense array\. Pass its \.toarray"),
    "meta": (K.to("meta"), 'a tensor on device "meta", without values'),
    "none": (None, "K: got NoneType"),
    "text": ("kernel", "K: got <U6 values"),
    "complex": (K.cfloat(), "K: got complex values"),
    "nan": (torch.where(K[1, 2] == K, torch.nan, K), r"K: got nan at index"),
    "inf": (torch.where(K[1, 2] == K, torch.inf, K), r"K: got inf at index"),
    "asymmetric": (A[:, :6], r"expected a symmetric matrix"),
    "not square": (A, r"K: got shape \[6, 9\]"),
    "empty": (torch.zeros(0, 0), r"K: got shape \[0, 0\], empty"),
    "ragged": ([[1, 2], [3]], "K: got rows of unequal length"),
    "module": (nn.Linear(2, 1), "K: got Linear"),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("machine", [*MACHINES, "spectrum", "alignment", "effective_rank"])
def test_matrices_that_are_refused_by_all(machine, matrix):
    value, message = MATRICES[matrix]
    with refused(message if machine != "alignment" else message.replace("K: ", "K1: ").replace(r"K\.to", r"K1\.to")):
        if machine in MACHINES:
            MACHINES[machine]().fit(value, Y)
        elif machine == "alignment":
            ntkit.alignment(value, Y)
        else:
            getattr(ntkit, machine)(value)


@pytest.mark.parametrize("machine", ["ridge", "gp", "flow"])
@pytest.mark.parametrize(
    "y",
    [
        None,
        np.array(list("ababab")),
        Y[:4],
        torch.where(torch.arange(6) == 2, torch.nan, Y),
        Y.cfloat(),
        Y.to_sparse(),
        Y.to("meta"),
        torch.ones(6, 2, 2),
        [[1], [1, 2]],
    ],
    ids=["none", "strings", "short", "nan", "complex", "sparse", "meta", "three axes", "ragged"],
)
def test_targets_that_are_refused(machine, y):
    with refused("y: got "):
        MACHINES[machine]().fit(K, y)


def test_targets_that_need_gradients_are_taken():
    y = Y.clone().requires_grad_()
    assert not ntkit.KernelRidge(0.1).fit(K.clone().requires_grad_(), y).alpha_.requires_grad
    assert torch.equal(
        ntkit.KernelRidge(0.1).fit(K, list(map(float, Y))).alpha_, ntkit.KernelRidge(0.1).fit(K, Y).alpha_
    )


def test_places_of_a_gram():
    gram = ntkit.Gram(K)
    assert torch.equal(gram.rows(np.array([0, -1])), K[[0, -1]])
    for wrong in ([6], None, "a", [0.5], torch.tensor([True] * 6), [[0]], torch.ones(2, device="meta").long()):
        with refused(r"index: got .*expected a slice or a list of places from 0 to 5"):
            gram.rows(wrong)


# ------------------------------------------------------------------ models, samples, sizes


@pytest.mark.parametrize("model", [None, "mlp", lambda x: x, torch.ones(3), nn.Linear])
def test_what_is_no_module(model):
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)
    for call in (
        lambda: ntkit.InfiniteKernel(model),
        lambda: ntkit.ConjugateKernel(model),
        lambda: ntkit.widened(model, 8, A),
        lambda: ntkit.to_ntk_parametrization(model),
        lambda: ntkit.monte_carlo(model, A, width=8),
        lambda: ntkit.convergence(model, A),
        lambda: ntkit.train(model, (A, Y), F.mse_loss, sgd, steps=1),
    ):
        with refused(r"model: got \w+; expected a torch\.nn\.Module"):
            call()


def test_samples_and_sizes():
    net = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    kernel, limit = ntkit.TangentKernel(net, "trace"), ntkit.InfiniteKernel(net, "ntk", 1.0, 0.1)
    top = ntkit.spectrum(kernel(A), k=2)
    for call, message in (
        (lambda: limit(A.to_sparse()), r"x1: got a sparse tensor.*x1\.to_dense"),
        (lambda: limit(A.to("meta")), 'x1: got a tensor on device "meta"'),
        (lambda: limit.describe(None), "x: got NoneType"),
        (lambda: limit.operator([]), "x: got list"),
        (lambda: ntkit.ConjugateKernel(net).features(A[:0]), "x: got an empty set"),
        (lambda: ntkit.InfiniteKernel(net, "ntk", "1", 0.1), "w_std: got '1'"),
        (lambda: ntkit.to_ntk_parametrization(net, w_std="1"), "w_std: got '1'"),
        (lambda: eigenfunctions(len, top, A, A), "kernel: got builtin_function_or_method"),
        (lambda: eigenfunctions(kernel, K, A, A), "spectrum: got Tensor; expected an ntkit Spectrum"),
        (lambda: eigenfunctions(kernel, top, A, A[:0]), "points: got an empty set"),
        (lambda: eigenfunctions(kernel, top, A, A, batch_size=0), "batch_size: got 0"),
        (lambda: patterns(torch.ones(3, 1), None), "images: got NoneType"),
        (lambda: bandwidth("waves"), "images: got <U5 values"),
        (lambda: ntkit.grid(0), "side: got 0"),
        (lambda: ntkit.grid(3, low=None), "low: got None"),
        (lambda: ntkit.monte_carlo(net, None, width=8), "x: got NoneType"),
        (lambda: ntkit.monte_carlo(net, A, width=8, kind="ntkk"), "kind: got 'ntkk'"),
        (lambda: ntkit.convergence(net, A, widths=None), "widths: got None; expected a list of positive integers"),
        (lambda: ntkit.GaussianProcess(0.1).fit(K, Y).predict(K, K).sample(1, seed=-1), "seed: got -1"),
        (lambda: limit.operator(A) @ [1.0], "vector: got list; expected a tensor"),
        (lambda: limit(A, out=np.array(["a"])), "out: got an array of <U1"),
        (lambda: ntkit.ConjugateKernel(net, 3), "layer: got 3"),
        (lambda: ntkit.widened(net, 8, A, seed=None), "seed: got None"),
        (lambda: ntkit.probes.rotate(None), "rotate: angle: got None"),
        (lambda: ntkit.probes.zoom("0.5"), "zoom: crop: got '0.5'"),
        (lambda: ntkit.probes.standard(3), "image_shape: got int"),
        (lambda: ntkit.invariance(A, torch.ones(2, 1, 3, 3), ntkit.probes.shift(1)), "kernel: got Tensor"),
        (lambda: ntkit.invariance(kernel, torch.ones(2, 1, 3, 3), None), "transform: got NoneType"),
        (lambda: ntkit.GaussianProcess(0.1).fit(K, Y).predict(K, K).percentiles("a"), "q: got"),
    ):
        with refused(message):
            call()
