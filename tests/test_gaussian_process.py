"""The Gaussian process of a kernel and the ensemble of trained networks: against flows, conditioning, scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ntkit.base.checks import Refused
from ntkit.machines.flow import GradientFlow
from ntkit.machines.gaussian_process import GaussianProcess, Posterior

INF = float("inf")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, rtol=1e-10, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def problem() -> tuple[torch.Tensor, ...]:
    """Kernels of 11 training and 5 test points, and two outputs."""
    x, x_test = normal(11, 17), normal(5, 17, seed=1)
    return x @ x.T, x_test @ x.T, x_test @ x_test.T, normal(11, 2, seed=2)


def on_circle(*angles: float) -> torch.Tensor:
    g = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([g.cos(), g.sin()], 1)


def infinite(x: torch.Tensor, L: int, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """NNGP and tangent kernel of a ReLU network with L weight layers (Jacot et al. 2018, Proposition 1, Theorem 1)."""
    sigma = x @ x.T / x.shape[1] + beta**2
    theta = sigma.clone()
    for _ in range(L - 1):
        scale = sigma.diagonal().sqrt()
        angle = torch.arccos((sigma / scale[:, None] / scale).clamp(-1, 1))
        sigma = scale[:, None] * scale * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi) + beta**2
        theta = theta * (math.pi - angle) / (2 * math.pi) + sigma
    return sigma, theta


def jacot(angles: list[float], t: float, lr: float | None = None, L: int = 4) -> tuple[GradientFlow, Posterior]:
    """The Gaussian of infinitely wide networks trained on four points of the circle."""
    train = [-2.2, -1.0, 1.0, 2.2]
    S, T = infinite(on_circle(*train, *angles), L, 0.1)
    flow = GradientFlow(lr).fit(T[:4, :4], torch.tensor([-0.4, -0.2, 0.3, 0.3]).double())
    return flow, flow.ensemble(
        T[4:, :4], nngp_train=S[:4, :4], nngp_test_train=S[4:, :4], nngp_test_test=S[4:, 4:], t=t
    )


def test_the_limit_of_four_points_on_the_circle():
    pi = math.pi
    angles = [0, pi / 4, pi / 2, 3 * pi / 4, pi, -pi / 4, -pi / 2]
    flow, p = jacot(angles, INF)
    expected_mean = [0.04393, 0.24310, 0.29887, 0.24865, -0.04634, -0.14453, -0.29297]
    expected_std = [0.13728, 0.05103, 0.07400, 0.03761, 0.12848, 0.05103, 0.07400]
    close(flow.eigenvalues_.flip(0), torch.tensor([0.0374, 0.0429, 0.0662, 0.1360]).double(), rtol=0, atol=5e-5)
    close(p.mean, torch.tensor(expected_mean).double(), rtol=0, atol=6e-6)
    close(p.std, torch.tensor(expected_std).double(), rtol=0, atol=6e-6)
    other = jacot(angles, INF, L=3)[1]  # another depth is another table
    assert (other.mean - p.mean).abs().max() > 1e-3
    assert (other.std - p.std).abs().max() > 1e-3
    trained = jacot(angles, 1000, lr=1.0)[1]  # 1000 steps at learning rate 1 are the limit
    close(trained.mean, p.mean, rtol=0, atol=1e-9)
    close(trained.covariance, p.covariance, rtol=0, atol=1e-9)


def test_the_ensemble_knows_its_training_points():
    train = [-2.2, -1.0, 1.0, 2.2]
    _, p = jacot(train, INF)
    close(p.covariance, torch.zeros(4, 4).double(), atol=1e-14)
    close(p.mean, torch.tensor([-0.4, -0.2, 0.3, 0.3]).double())
    assert (jacot(train, 5.0)[1].std > 0.05).all()
    start = jacot([0.0, 0.3], 0.0)[1]
    close(start.mean, torch.zeros(2).double())
    close(start.covariance, infinite(on_circle(0.0, 0.3), 4, 0.1)[0])


@pytest.mark.parametrize("lr", [None, 0.5])
def test_the_ensemble_is_that_of_flows_from_random_starts(lr):
    angles, t, n = [0.4, 2.0, -3.0], 12, 40_000
    flow, p = jacot(angles, t, lr)
    S, T = infinite(on_circle(-2.2, -1.0, 1.0, 2.2, *angles), 4, 0.1)
    starts = Posterior(torch.zeros(7).double(), S).sample(n, seed=1).T
    y = torch.tensor([-0.4, -0.2, 0.3, 0.3]).double()[:, None].expand(4, n)
    ends = GradientFlow(lr).fit(T[:4, :4], y, initial=starts[:4]).predict(T[4:, :4], t, initial=starts[4:])
    error = p.std / n**0.5
    assert ((ends.mean(1) - p.mean).abs() < 5 * error).all()
    close(torch.cov(ends), p.covariance, rtol=0, atol=5 * 1.5 * p.covariance.max().item() / n**0.5)
    assert (jacot(angles, 6, lr)[1].covariance - p.covariance).abs().max() > 1e-3
    # the diagonal alone; two outputs; arrays
    same = flow.ensemble(
        T[4:, :4].numpy(), nngp_train=S[:4, :4], nngp_test_train=S[4:, :4], nngp_test_test=S.diagonal()[4:], t=t
    )
    assert isinstance(same.mean, np.ndarray)
    close(same.covariance, p.covariance.diagonal())
    both = GradientFlow(lr).fit(T[:4, :4], y[:, :2] * torch.tensor([1.0, 2.0]))
    close(
        both.ensemble(T[4:, :4], nngp_train=S[:4, :4], nngp_test_train=S[4:, :4], nngp_test_test=S[4:, 4:], t=t).mean[
            :, 1
        ],
        2 * p.mean,
    )


def test_with_one_kernel_for_both_the_ensemble_at_the_end_is_the_noiseless_posterior():
    K, K_test, K_test_test, y = problem()
    gp = GaussianProcess().fit(K, y).predict(K_test, K_test_test)
    flow = (
        GradientFlow()
        .fit(K, y)
        .ensemble(K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=K_test_test, t=INF)
    )
    close(flow.mean, gp.mean)
    close(flow.covariance, gp.covariance, rtol=0, atol=1e-10)


def test_the_posterior_is_conditioning_of_the_joint_gaussian():
    K, K_test, K_test_test, y = problem()
    noise = 0.3
    gp = GaussianProcess(noise).fit(K, y)
    p = gp.predict(K_test, K_test_test)
    # the block of the joint precision that belongs to the test points is the inverse of their posterior covariance
    joint = torch.cat(
        [torch.cat([K + noise * torch.eye(11).double(), K_test.T], 1), torch.cat([K_test, K_test_test], 1)]
    )
    precision = torch.linalg.inv(joint)
    close(p.covariance, torch.linalg.inv(precision[11:, 11:]), rtol=1e-8, atol=1e-9)
    close(p.mean, -p.covariance @ precision[11:, :11] @ y, rtol=1e-8, atol=1e-9)
    assert gp.residual_ < 1e-13
    normal_law = torch.distributions.MultivariateNormal(torch.zeros(11).double(), joint[:11, :11])
    assert gp.log_marginal_likelihood_ == pytest.approx(normal_law.log_prob(y.T).sum().item(), rel=1e-12)
    close(gp.predict(K_test, K_test_test.diagonal()).covariance, p.covariance.diagonal())
    assert gp.predict(K_test).covariance is None
    assert (GaussianProcess(2 * noise).fit(K, y).predict(K_test, K_test_test).std > p.std).all()


def test_the_marginal_likelihood_is_that_of_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import DotProduct

    x, x_test, y = normal(11, 3), normal(5, 3, seed=1), normal(11, seed=2)
    other = GaussianProcessRegressor(DotProduct(1.0), alpha=0.2, optimizer=None).fit(x.numpy(), y.numpy())
    gp = GaussianProcess(0.2).fit(1 + x @ x.T, y)
    p = gp.predict(1 + x_test @ x.T, 1 + x_test @ x_test.T)
    mean, covariance = other.predict(x_test.numpy(), return_cov=True)
    close(p.mean, mean)
    close(p.covariance, covariance)
    assert gp.log_marginal_likelihood_ == pytest.approx(other.log_marginal_likelihood_value_, rel=1e-10)


def test_rescaling_and_training_points():
    K, K_test, K_test_test, y = problem()
    one, other = GaussianProcess(0.1).fit(K, y), GaussianProcess(0.7).fit(7 * K, y)
    p, q = one.predict(K_test, K_test_test), other.predict(7 * K_test, 7 * K_test_test)
    close(q.mean, p.mean)
    close(q.covariance, 7 * p.covariance)
    exact = GaussianProcess().fit(K, y).predict(K, K)
    close(exact.mean, y)
    close(exact.covariance, torch.zeros(11, 11).double(), atol=1e-12)


def test_nothing_is_added_to_a_singular_kernel():
    x = normal(11, 3)
    gp = GaussianProcess().fit(x @ x.T, normal(11))
    assert gp.status_ == "singular"
    assert "Use a noise well above" in gp.advice_
    p = gp.predict(x @ x.T, x @ x.T)
    assert torch.isnan(p.mean).all()
    assert torch.isnan(p.covariance).all()
    assert math.isnan(gp.log_marginal_likelihood_)
    assert GaussianProcess(1e-6).fit(x @ x.T, normal(11)).status_ == "solved"


def test_percentiles_and_samples():
    K, K_test, K_test_test, y = problem()
    p = GaussianProcess(0.5).fit(K, y).predict(K_test, K_test_test)
    low, middle, high = p.percentiles([10, 50, 90])
    close(middle, p.mean)
    close(high - middle, 1.2815515655446004 * p.std[:, None].expand(5, 2))
    close(p.percentiles(10), low)
    draws = p.sample(20_000, seed=3)
    assert draws.shape == (20_000, 5, 2)
    assert torch.equal(draws[:10], p.sample(20_000, seed=3)[:10])
    assert not torch.equal(draws, p.sample(20_000, seed=4))
    assert ((draws < low).double().mean(0) - 0.1).abs().max() < 0.02
    close(torch.cov(draws[:, :, 1].T), p.covariance, rtol=0, atol=0.1 * p.covariance.max().item())
    assert torch.cov(torch.stack([draws[:, 0, 0], draws[:, 0, 1]]))[0, 1].abs() < 0.1 * p.covariance[0, 0]
    state = torch.get_rng_state()
    arrays = GaussianProcess(0.5).fit(K, y).predict(K_test.numpy(), K_test_test.numpy())
    for values in (arrays.mean, arrays.covariance, arrays.std, arrays.percentiles(50), arrays.sample(2)):
        assert isinstance(values, np.ndarray)
    assert torch.equal(state, torch.get_rng_state())


def test_refusals():
    K, K_test, K_test_test, y = problem()
    gp = GaussianProcess().fit(K, y)
    for call, message in [
        (lambda: GaussianProcess(-1.0), "noise: got -1.0; expected a finite variance >= 0"),
        (lambda: GaussianProcess().predict(K_test), "GaussianProcess: got no fitted machine"),
        (lambda: GaussianProcess().fit(K_test, y), "K: got shape"),
        (lambda: GaussianProcess().fit(K, y[:3]), "y: got 3 entries; expected 11"),
        (lambda: gp.predict(K_test[:, :3]), "K_test: got shape"),
        (lambda: gp.predict(K_test, K), r"K_test_test: got shape \[11, 11\]; expected \[5, 5\], or its diagonal \[5\]"),
        (
            lambda: gp.predict(K_test, K_test[:, :5]),
            r"K_test_test: got K_test_test\[1, 4\] = .* but K_test_test\[4, 1\] = .*; expected a symmetric",
        ),
        (lambda: gp.predict(K_test).std, "Posterior: got a mean alone"),
        (lambda: gp.predict(K_test, torch.ones(5)).sample(2), "sample: got variances only"),
        (lambda: gp.predict(K_test, K_test_test).sample(0), "n: got 0"),
        (lambda: gp.predict(K_test, K_test_test).percentiles([0, 50]), "q: got"),
    ]:
        with pytest.raises(Refused, match=message):
            call()
