"""NTKRegressor and NTKClassifier: scikit-learn's own checks, closed forms, rescaling, refusals."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from ntkit.base.checks import Refused
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines import estimators
from ntkit.machines.estimators import NTKClassifier, NTKRegressor
from ntkit.machines.gaussian_process import GaussianProcess
from ntkit.machines.ridge import KernelRidge

CHECKS = parametrize_with_checks(
    [
        NTKRegressor(),
        NTKRegressor(machine="gp"),
        NTKClassifier(),
        NTKClassifier(machine="gp"),
        NTKClassifier(machine="svm"),
    ]
).mark


@pytest.mark.parametrize(CHECKS.args[0], list(CHECKS.args[1]), **CHECKS.kwargs)  # pytest 9 takes no generator
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def arc_cosine(x: np.ndarray, z: np.ndarray, depth: int, w: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """NNGP and tangent kernel of a ReLU network (Jacot et al. 2018, Theorem 1, with standard deviations w and b)."""
    s = w**2 * x @ z.T / x.shape[1] + b**2
    sx, sz = (w**2 * (v**2).mean(1) + b**2 for v in (x, z))
    t = s.copy()
    for _ in range(depth):
        scale = np.sqrt(np.outer(sx, sz))
        angle = np.arccos(np.clip(s / scale, -1, 1))
        angle[(x[:, None] == z).all(2)] = 0  # where arccos would lose half the digits
        s = w**2 * scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi) + b**2
        t = w**2 * t * (np.pi - angle) / (2 * np.pi) + s
        sx, sz = w**2 * sx / 2 + b**2, w**2 * sz / 2 + b**2
    return s, t


def table(n: int = 23, m: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, x_test = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    return x, np.sin(2 * x[:, 0]) + x[:, 1], x_test, np.sin(2 * x_test[:, 0]) + x_test[:, 1]


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_the_regressor_is_ridge_regression_with_the_closed_form_kernel(kind):
    x, y, x_test, _ = table()
    K, K_test = (arc_cosine(v, x, 2, 1.3, 0.2)[kind == "ntk"] for v in (x, x_test))
    scale = np.diag(K).mean()
    machine = KernelRidge(0.01 * scale).fit(K, y - y.mean())
    model = NTKRegressor(depth=2, w_std=1.3, b_std=0.2, kind=kind, ridge=0.01).fit(x, y)
    assert model.scale_ == pytest.approx(scale, rel=1e-10)
    np.testing.assert_allclose(model.predict(x_test), y.mean() + machine.predict(K_test), rtol=1e-8)
    other = NTKRegressor(depth=3, w_std=1.3, b_std=0.2, kind=kind, ridge=0.01).fit(x, y)
    assert abs(other.predict(x_test) - model.predict(x_test)).max() > 1e-4


def test_the_process_has_the_same_mean_and_the_posterior_variance():
    x, y, x_test, _ = table()
    K, K_test, K_test_test = (arc_cosine(a, b, 3, 2**0.5, 0.1)[1] for a, b in ((x, x), (x_test, x), (x_test, x_test)))
    scale = np.diag(K).mean()
    posterior = (
        GaussianProcess(0.05 * y.var())
        .fit(K * y.var() / scale, y - y.mean())
        .predict(K_test * y.var() / scale, K_test_test * y.var() / scale)
    )
    model = NTKRegressor(machine="gp", ridge=0.05).fit(x, y)
    mean, std = model.predict(x_test, return_std=True)
    np.testing.assert_allclose(mean, y.mean() + posterior.mean, rtol=1e-8)
    np.testing.assert_allclose(std, posterior.std, rtol=1e-8)
    np.testing.assert_allclose(NTKRegressor(ridge=0.05).fit(x, y).predict(x_test), mean, rtol=1e-10)
    both = NTKRegressor(machine="gp", ridge=0.05).fit(x, np.stack([y, 3 * y + 1], 1))
    mean2, std2 = both.predict(x_test, return_std=True)
    np.testing.assert_allclose(mean2, np.stack([mean, 3 * mean + 1], 1), rtol=1e-8)
    np.testing.assert_allclose(std2, np.stack([std, 3 * std], 1), rtol=1e-8)
    assert (model.predict(x, return_std=True)[1] < std.max()).all()


def test_rescaling_the_kernel_or_the_targets():
    x, y, x_test, _ = table()
    one = NTKRegressor(depth=1, w_std=1.0, b_std=0.0).fit(x, y)
    other = NTKRegressor(depth=1, w_std=3.0, b_std=0.0).fit(x, 5 * y - 2)  # multiplies the kernel by 81
    assert other.scale_ == pytest.approx(81 * one.scale_)
    np.testing.assert_allclose(other.predict(x_test), 5 * one.predict(x_test) - 2, rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_targets_whose_squares_float64_does_not_hold(factor):
    x = np.random.default_rng(0).normal(size=(20, 3))
    y = x[:, 0] + x[:, 1] ** 2
    one, other = NTKRegressor().fit(x, y).predict(x), NTKRegressor().fit(x, factor * y).predict(x)
    assert np.allclose(other / factor, one, rtol=1e-9)


def test_no_hidden_layer_is_linear_regression():
    x, _, x_test, _ = table()
    y = x @ [1.0, -2.0, 0.5] + 3
    model = NTKRegressor(depth=0, ridge=1e-9).fit(x, y)
    np.testing.assert_allclose(model.predict(x_test), x_test @ [1.0, -2.0, 0.5] + 3, rtol=1e-5)


@pytest.mark.parametrize("machine", ["ridge", "gp", "svm"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_classifier_finds_the_classes(machine, classes):
    rng = np.random.default_rng(1)
    sector, within = rng.integers(0, 2 * classes, 120), rng.uniform(0.1, 0.9, 120)
    angle = (sector + within) * np.pi / classes  # every class has two sectors of the plane
    x = rng.uniform(1, 2, 120)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    names = np.array(["a", "b", "c"])[sector % classes]
    model = NTKClassifier(machine=machine).fit(x[:90], names[:90])
    assert (model.predict(x[90:]) == names[90:]).mean() > 0.95
    values = model.decision_function(x[90:])
    index = (values > 0).astype(int) if classes == 2 else values.argmax(1)
    assert values.shape == ((30,) if classes == 2 else (30, 3))
    assert (model.classes_[index] == model.predict(x[90:])).all()
    assert hasattr(model, "predict_proba") == (machine == "gp")


def test_the_svm_is_the_one_with_squared_slacks():
    """min 1/2 |w|^2 + C/2 sum max(0, 1 - y f)^2 with C = 1/ridge, by its optimality condition alpha = C y slack."""
    x, y, _, _ = table(41)
    labels = (y + np.random.default_rng(3).normal(size=41) > 0).astype(int)
    ridge = 0.3
    model = NTKClassifier(machine="svm", ridge=ridge).fit(x, labels)
    slack = np.maximum(0, 1 - (2 * labels - 1) * model.decision_function(x))
    np.testing.assert_allclose(model.machine_.alpha_, slack / ridge, atol=1e-4)
    assert (slack > 0.1).any()
    assert model.machine_.gap_ < 1e-6


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_the_posterior(classes):
    x, y, x_test, _ = table(60)
    labels = np.digitize(y, [0.0] if classes == 2 else [-0.5, 0.5])
    model = NTKClassifier(machine="gp", ridge=0.3).fit(x, labels)
    found = model.predict_proba(x_test)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert (model.classes_[found.argmax(1)] == model.predict(x_test)).all()
    # draw values of all classes from the posterior by its definition: sum over classes held
    K, K_test, K_test_test = (arc_cosine(a, b, 3, 2**0.5, 0.1)[1] for a, b in ((x, x), (x_test, x), (x_test, x_test)))
    scale, one_hot = np.diag(K).mean(), np.eye(classes)[labels]
    p = (
        GaussianProcess(0.3)
        .fit(K / scale, one_hot - one_hot.mean(0))
        .predict(K_test / scale, np.diag(K_test_test) / scale)
    )
    frequencies = one_hot.mean(0)
    spread = math.sqrt((frequencies * (1 - frequencies)).sum() / (classes - 1))
    noise = np.random.default_rng(0).normal(size=(100_000, 7, classes))
    noise -= noise.mean(2, keepdims=True)
    values = frequencies + p.mean + spread * p.std[:, None] * noise
    drawn = np.eye(classes)[values.argmax(2)].mean(0)
    np.testing.assert_allclose(found, drawn, atol=0.008)
    assert abs(found - found[::-1]).max() > 0.05  # points differ by more than that tolerance
    if classes == 2:
        np.testing.assert_allclose(found[:, 1], ndtr(model.decision_function(x_test)), rtol=1e-9)
        difference = (values[:, :, 1] - values[:, :, 0]).std(0)
        np.testing.assert_allclose(difference, 2 * np.sqrt(frequencies.prod()) * p.std, rtol=0.02)


# ------------------------------------------------------------------ any network


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(30, 1)
        )

    def forward(self, x):
        return self.net(x)


def wide(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(), nn.Linear(4, 1))


def test_a_module_a_factory_and_a_kernel():
    x, y, x_test, _ = table()
    reference = NTKRegressor(depth=1).fit(x, y).predict(x_test)
    for model in (wide, wide(3), wide(3).double()):
        np.testing.assert_allclose(NTKRegressor(model=model).fit(x, y).predict(x_test), reference, rtol=1e-10)
    net = wide(3).double()
    kernel = TangentKernel(net, outputs="trace")
    model = clone(NTKRegressor(model=kernel, machine="gp", ridge=0.1)).fit(x, y)
    K, K_test = kernel(torch.tensor(x)).numpy(), kernel(torch.tensor(x_test), torch.tensor(x)).numpy()
    machine = KernelRidge(0.1 * np.diag(K).mean()).fit(K, y - y.mean())
    np.testing.assert_allclose(model.predict(x_test), y.mean() + machine.predict(K_test), rtol=1e-8)
    assert model.predict(x_test, return_std=True)[1].min() > 0


def test_a_convolution_on_rows_of_pixels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15, 12))
    one = NTKRegressor(model=Images(), ridge=0.1).fit(x, x[:, 0])
    other = NTKRegressor(depth=1, ridge=0.1).fit(x, x[:, 0])
    assert one.predict(x).shape == (15,)
    assert abs(one.predict(x) - other.predict(x)).max() > 1e-3


def test_the_modules_own_initialisation():
    x, y, x_test, _ = table()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    kernel = estimators.InfiniteKernel(net)
    K, K_test = kernel(torch.tensor(x)).numpy(), kernel(torch.tensor(x_test), torch.tensor(x)).numpy()
    expected = y.mean() + KernelRidge(1e-3 * np.diag(K).mean()).fit(K, y - y.mean()).predict(K_test)
    own = NTKRegressor(model=net, w_std=None, b_std=None).fit(x, y).predict(x_test)
    np.testing.assert_allclose(own, expected, rtol=1e-8)
    assert abs(NTKRegressor(model=net).fit(x, y).predict(x_test) - own).max() > 1e-3


# ------------------------------------------------------------------ scikit-learn's machinery


class Counted(estimators.InfiniteKernel):
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(estimators, "InfiniteKernel", Counted)
    monkeypatch.setattr(estimators, "_CACHE", estimators._TensorCache(2**20))
    monkeypatch.setattr(Counted, "calls", 0)
    return Counted


@pytest.mark.parametrize("model", [None, wide, wide(3), Images()], ids=["none", "factory", "module", "images"])
def test_a_search_over_the_ridge_computes_each_kernel_once(counted, model):
    x, y, _, _ = table(20)
    x = np.tile(x, 4) if isinstance(model, Images) else x
    search = GridSearchCV(
        NTKRegressor(model=model), {"ridge": [1e-3, 1e-2, 0.1, 1.0], "machine": ["ridge", "gp"]}, cv=3
    )
    search.fit(x, y)
    assert counted.calls == 3 + 3 + 1  # of each fold: training, test; then all
    state = torch.get_rng_state()
    NTKRegressor(model=model, ridge=0.5).fit(x, y).predict(x[:5])
    assert torch.equal(state, torch.get_rng_state())
    assert counted.calls == 8
    NTKRegressor(model=model, kind="nngp").fit(x, y)
    NTKRegressor(model=model, b_std=0.2).fit(x, y)
    NTKRegressor(model=model).fit(x + 1e-12, y)
    NTKRegressor(model=model).fit(x[:, ::-1], y)
    assert counted.calls == 12


def test_another_network_is_another_kernel(counted):
    class Slope(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.at = at

        def forward(self, x):
            return nn.functional.leaky_relu(x, self.at)

    estimators.__dict__["Slope"] = Slope  # so that it can be pickled
    Slope.__module__, Slope.__qualname__ = "ntkit.machines.estimators", "Slope"
    try:
        x, y, x_test, _ = table()
        found = []
        for at in (0.1, 0.1, 0.5):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 4), Slope(at), nn.Linear(4, 1))
            found.append(NTKRegressor(model=net).fit(x, y).predict(x_test))
        assert np.array_equal(found[0], found[1])
        assert abs(found[0] - found[2]).max() > 1e-4
        assert counted.calls == 4
        net[1].extra = lambda: None  # cannot be pickled: computed afresh, and right
        for _ in range(2):
            assert np.array_equal(NTKRegressor(model=net).fit(x, y).predict(x_test), found[2])
        assert counted.calls == 8
    finally:
        del estimators.__dict__["Slope"]


def test_what_is_kept_is_bounded_and_shared_by_threads():
    kept, made = estimators._TensorCache(1000), []

    def ask(key: int) -> None:
        value = kept.get(key, lambda: made.append(key) or torch.full((40,), float(key), dtype=torch.float64))
        assert (value == key).all()

    for key in (1, 2, 3, 1, 4, 1, 2):  # three fit: 2 is the least recently used when 4 comes
        ask(key)
    assert made == [1, 2, 3, 4, 2]
    assert sum(v.nbytes for v in kept._values.values()) == kept._bytes <= 1000
    large = torch.zeros(1000)
    assert kept.get("large", lambda: large) is large
    assert "large" not in kept._values
    threads = [threading.Thread(target=lambda: [ask(k % 5) for k in range(200)]) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sum(v.nbytes for v in kept._values.values()) == kept._bytes <= 1000


def test_pipeline_search_clone_pickle_and_two_processes():
    x, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), NTKClassifier())
    search = GridSearchCV(pipeline, {"ntkclassifier__ridge": [1e-3, 0.1]}, cv=3, n_jobs=2).fit(x, y)
    assert search.best_score_ > 0.95
    assert "NTKClassifier" in repr(clone(search))
    again = pickle.loads(pickle.dumps(search))
    assert np.array_equal(again.predict(x), search.predict(x))
    assert clone(NTKClassifier(model=wide(13), ridge=0.2)).get_params()["ridge"] == 0.2


def test_wine():
    x, y = load_wine(return_X_y=True)
    scores = {}
    for machine in ("ridge", "gp", "svm"):
        scores[machine] = cross_val_score(
            make_pipeline(StandardScaler(), NTKClassifier(machine=machine)), x, y, cv=5
        ).mean()
    assert min(scores.values()) > 0.96


def test_sparse_tables_are_refused_and_the_library_opens_without_scikit_learn():
    from scipy.sparse import csr_matrix

    x, y, _, _ = table()
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        NTKRegressor().fit(csr_matrix(x), y)
    code = "import sys, ntkit, ntkit.machines; assert not {m for m in sys.modules if m.startswith('sklearn')}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusals():
    x, y, x_test, _ = table()
    labels = (y > 0).astype(int)
    twice = np.concatenate([x, x])
    for call, message in [
        (lambda: NTKRegressor(machine="svm").fit(x, y), "machine: got 'svm'; expected a machine"),
        (lambda: NTKClassifier(machine="SVM").fit(x, labels), "Options: gp, ridge, svm"),
        (lambda: NTKRegressor(kind="ntkk").fit(x, y), "kind: got 'ntkk'"),
        (lambda: NTKRegressor(ridge=-1.0).fit(x, y), "ridge: got -1.0"),
        (lambda: NTKRegressor(depth=1.5).fit(x, y), "depth: got 1.5"),
        (lambda: NTKRegressor(w_std=None).fit(x, y), "w_std, b_std: got None; expected numbers, where model=None"),
        (lambda: NTKRegressor(model=3).fit(x, y), "model: got int"),
        (lambda: NTKRegressor(model=lambda d: d).fit(x, y), "model: got int"),
        (lambda: NTKRegressor(ridge=0.0).fit(twice, np.tile(y, 2)), r"NTKRegressor\(ridge=0\): got singular"),
        (lambda: NTKRegressor(machine="gp", ridge=0.0).fit(twice, np.tile(y, 2)), "got singular; expected solved"),
        (
            lambda: NTKClassifier(machine="svm", ridge=0.0).fit(twice, np.r_[labels, 1 - labels]),
            "got not separable; expected optimal. Points with the same features",
        ),
        (lambda: NTKRegressor(b_std=0.0).fit(0 * x, y), "X: got a kernel of mean 0"),
        (lambda: NTKClassifier().fit(x, 0 * labels), "y: got one class, 0"),
        (lambda: NTKRegressor().fit(x, y).predict(x_test, return_std=True), "return_std: got machine='ridge'"),
        (lambda: NTKRegressor(model=nn.BatchNorm1d(3)).fit(x, y), "got batch norm of the input"),
    ]:
        with pytest.raises(Refused, match=message):
            call()
    with pytest.raises(AttributeError, match="predict_proba") as caught:
        NTKClassifier().fit(x, labels).predict_proba(x_test)
    assert "machine='ridge'; expected machine=\"gp\"" in str(caught.value.__cause__)
    single = nn.Sequential(nn.Linear(x.shape[1], 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(Refused, match=r"model's is float32; convert one of the two, such as model.double\(\)"):
        NTKRegressor(TangentKernel(single, "trace")).fit(x, y)
