"""Models that PyTorch takes and that are written in an unusual way: exact, or refused by name.

The oracle is here: gradients of one output of one sample at a time, by `torch.autograd.grad` on the model itself.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from ntkit.base.batch import call_with, count, take
from ntkit.jacobian.forwards import raw_outputs
from ntkit.kernels.output_loss import model_outputs
from ntkit.networks.larger_copies import larger_copy
from ntkit.testing import assert_equal


class Odd(nn.Module):
    """A forward pass given as a function of the module and its input, over parts of any kind."""

    def __init__(self, run, /, **parts) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x, **named):
        return self.run(self, *x, **named)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(numbers(*shape))


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def jacobian(model: nn.Module, x) -> Tensor:
    """[n, C, P] in float64, from a copy of the model."""
    own = copy.deepcopy(model)
    params = [p for p in own.parameters() if p.requires_grad]
    samples = []
    for i in range(count(x)):
        out = call_with(own, take(x, slice(i, i + 1))).reshape(-1)
        rows = []
        for value in out:
            grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
            rows.append(torch.cat([part.reshape(-1).double() for part in parts]))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def exact(model: nn.Module, x, tolerance: float = 1e-10, kernel: ntkit.TangentKernel | None = None) -> None:
    """Values, diagonal and products of the tangent kernel against the Jacobian."""
    J = jacobian(model, x)
    full = torch.einsum("icp,jdp->ijcd", J, J)
    kernel = kernel or ntkit.TangentKernel(model)
    n, C, P = J.shape
    assert_equal(kernel(x).double(), full, tolerance, "k(x)")
    assert_equal(kernel.diagonal(x).double(), full[range(n), range(n)], tolerance, "diagonal")
    trace = ntkit.TangentKernel(model, "trace")(x).double()
    assert_equal(trace, full.diagonal(dim1=2, dim2=3).sum(-1), tolerance, "trace")
    u, v, start = {}, numbers(n, C), 0
    flat = numbers(P)
    for name, p in model.named_parameters():
        u[name], start = flat[start : start + p.numel()].view_as(p), start + p.numel()
    assert_equal(kernel.jvp(x, u).double(), J @ flat, tolerance, "J u")
    pulled = torch.cat([g.reshape(-1).double() for g in kernel.vjp(x, v).values()])
    assert_equal(pulled, torch.einsum("nc,ncp->p", v, J), tolerance, "J^T v")
    product = (kernel.operator(x) @ v.reshape(-1)).double()
    assert_equal(product, J.flatten(0, 1) @ (J.flatten(0, 1).T @ v.reshape(-1)), tolerance, "K v")


def valid(dims: int) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 2, 2, padding="valid")


CONVOLUTIONS = {
    **{f"valid {dims}d": (valid(dims), 2 + dims) for dims in (1, 2, 3)},
    "valid in groups": (nn.Conv2d(3, 3, 2, padding="valid", groups=3), 4),
    "one number for two axes": (
        Odd(lambda m, x: F.conv2d(x, m.w, stride=[2], padding=[1], dilation=[2]), w=parameter(2, 3, 2, 2)),
        4,
    ),
    "one number, transposed": (
        Odd(
            lambda m, x: F.conv_transpose2d(x, m.w, stride=[2], padding=[1], output_padding=[1], dilation=[2]),
            w=parameter(3, 2, 2, 2),
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_whose_numbers_autograd_stores_once(name):
    model, axes = CONVOLUTIONS[name]
    exact(model.double(), numbers(5, 3, *(5,) * (axes - 2)))


@pytest.mark.parametrize("lengths", [(2, 2, 2, 2, 5), (2, 2, 2, 2, 3), (1, 2, 3, 2, 2), (2, 2, 2, 2, 0)])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_that_were_of_one_length_before(lengths, mode):
    def run(m, words, length):
        starts = torch.cat([length.new_zeros(1), length.cumsum(0)[:-1]])
        return m.head(m.bag(words[torch.arange(words.shape[1]) < length[:, None]], starts))

    model = Odd(run, bag=nn.EmbeddingBag(7, 3, mode=mode), head=nn.Linear(3, 2)).double()
    words, kernel = torch.randint(0, 7, (5, 5)), ntkit.TangentKernel(model)
    exact(model, (words, torch.full((5,), 2)), kernel=kernel)
    exact(model, (words, torch.tensor(lengths)), kernel=kernel)


@pytest.mark.parametrize("second", [torch.float64, torch.float32])
def test_products_of_models_in_two_precisions(second):
    """The precision of values, products and vectors is the widest of the parameters."""
    first = torch.float32 if second == torch.float64 else torch.float64

    def run(m, x):
        return m.b(torch.tanh(m.a(x.to(m.a.weight.dtype))).to(m.b.weight.dtype))

    model = Odd(run, a=nn.Linear(5, 6).to(first), b=nn.Linear(6, 2).to(second))
    exact(model, numbers(4, 5), 1e-6)
    kernel, x = ntkit.TangentKernel(model), numbers(4, 5)
    assert kernel.operator(x).dtype == kernel(x).dtype == torch.float64
    if second == torch.float64:  # of the last layer alone nothing is rounded to float32, the vector neither
        v = numbers(4, 2)
        with torch.no_grad():
            hidden = torch.tanh(model.a(x.float())).double()
        assert_equal(kernel.vjp(x, v)["b.weight"], v.T @ hidden, 1e-14, "J^T v")


def _in_place(m, x):
    with torch.no_grad():
        m.b.lerp_(m.a, 0.1)
    return torch.tanh(x @ m.a)


def _by_data(m, x):
    m.a.data.clamp_(-0.5, 0.5)
    return torch.tanh(x @ m.a)


def _replaced(m, x):
    m.b.data = 0.9 * m.b.data
    return torch.tanh(x @ m.a)


def _renormed(m, x):
    return F.embedding(x.argsort(1), m.b, max_norm=0.3).mean(1) @ m.a[:3]


@pytest.mark.parametrize("run", [_in_place, _by_data, _replaced, _renormed])
def test_a_forward_pass_that_writes_to_parameters_is_refused(run):
    model = Odd(run, a=parameter(4, 3), b=parameter(4, 3))
    with pytest.raises(ntkit.Refused, match=r"parameter '[ab]': got a forward pass that changes it"):
        ntkit.TangentKernel(model)(numbers(3, 4))
    calls = {
        "conjugate": lambda model, x: ntkit.ConjugateKernel(model)(x),
        "outputs": lambda model, x: raw_outputs(model, x),
        "influence": lambda model, x: ntkit.InfluenceKernel(model, (x, numbers(3, 3)), F.mse_loss, damping=1.0)(x),
        "loss": lambda model, x: model_outputs(model, x),
    }
    for call in calls.values():
        model = Odd(run, a=parameter(4, 3), b=parameter(4, 3))
        with pytest.raises(ntkit.Refused, match=r"parameter '[ab]': got a forward pass that changes it"):
            call(model, numbers(3, 4))


def test_a_limit_of_a_network_that_writes_to_its_parameters_is_refused():
    def run(m, x):
        m.a.weight.data.clamp_(-0.1, 0.1)
        return m.b(torch.relu(m.a(x)))

    model = Odd(run, a=nn.Linear(4, 50), b=nn.Linear(50, 1)).double()
    with pytest.raises(ntkit.Refused, match=r"parameter 'a.weight': got a forward pass that changes it"):
        ntkit.InfiniteKernel(model)(numbers(3, 4))


# ---------------------------------------------------------------------- features


def _time_first(m, x):
    return m.head(m.rnn(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("n", [2, 5])
def test_features_with_another_axis_first_are_refused(n):
    """As many steps as samples: the shape does not tell."""
    model = Odd(_time_first, rnn=nn.RNN(4, 3), head=nn.Linear(3, 2)).double()
    x = numbers(n, n, 4)
    with pytest.raises(ntkit.Refused, match="the features: got"):
        ntkit.ConjugateKernel(model, "rnn", select=lambda out: out[0])(x)
    last = model.rnn(x.transpose(0, 1))[0][-1].detach()
    assert_equal(ntkit.ConjugateKernel(model)(x), last @ last.T, 1e-12, "of the head")


def test_features_that_mix_samples_are_refused():
    def run(m, x):
        h = torch.tanh(m.a(x))
        return m.b(h - h.mean(0))

    model, x = Odd(run, a=nn.Linear(4, 5), b=nn.Linear(5, 2)).double(), numbers(6, 4)
    with pytest.raises(ntkit.Refused, match="other features for one sample when it is evaluated alone"):
        ntkit.ConjugateKernel(model)(x)
    h = model.a(x).detach()
    assert_equal(ntkit.ConjugateKernel(model, "a")(x), h @ h.T, 1e-12, "before the mixture")


# ---------------------------------------------------------------------- linearized


def moved(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The linearized model somewhere else, and how far that is."""
    lin = ntkit.linearized(model)
    with torch.no_grad():
        start = torch.cat([p.reshape(-1) for p in lin.parameters()])
        for p in lin.parameters():
            p.add_(torch.randn_like(p))
        return lin, torch.cat([p.reshape(-1) for p in lin.parameters()]) - start


def _without_grad(m, x):
    with torch.no_grad():
        h = torch.tanh(m.a(x))
    return m.b(h)


def _scaled_without_grad(m, x):
    h = m.a(x)
    with torch.no_grad():
        spread = h.std(1, keepdim=True)
    return m.b(h / spread)


def _weights_without_grad(m, x):
    h = m.a(x)
    with torch.no_grad():
        w = m.b.weight / m.b.weight.norm()
        w[0] *= 2
    return m.b(h) + torch.tanh(h) @ w.T


def _detached(m, x):
    return m.b(torch.tanh(m.a(x)).detach()) * m.a(x)[:, :2]


@pytest.mark.parametrize("run", [_without_grad, _scaled_without_grad, _weights_without_grad, _detached])
def test_what_has_no_gradient_is_a_constant_of_the_linearized_model(run):
    model, x = Odd(run, a=nn.Linear(4, 5), b=nn.Linear(5, 2)).double(), numbers(3, 4)
    J, (lin, step) = jacobian(model, x), moved(model)
    expected = model(x).detach() + J @ step
    assert_equal(lin(x).detach(), expected, 1e-12, "values")
    with torch.no_grad():
        values = lin(x)
    assert not values.requires_grad
    assert_equal(values, expected, 1e-12, "values without grad")


def test_the_padding_of_an_embedding_does_not_move_the_linearized_model():
    embedding = nn.Embedding(7, 3, padding_idx=-2)
    model, words = (
        nn.Sequential(embedding, nn.Flatten(), nn.Linear(9, 2)).double(),
        torch.tensor([[0, 5, 1], [5, 5, 2]]),
    )
    with torch.no_grad():
        embedding.weight[5] = 1.0
    J, (lin, step) = jacobian(model, words), moved(model)
    assert_equal(lin(words).detach(), model(words).detach() + J @ step, 1e-12, "values")


def test_linearized_refuses_parameters_it_cannot_move():
    w = parameter(4, 3)
    model = Odd(lambda m, x: torch.tanh(x @ m.listed[0]) @ m.v, w=w, listed=[w], v=parameter(3, 2))
    lin, others = ntkit.linearized(model), ntkit.linearized(model, params=["v"])
    with pytest.raises(ntkit.Refused, match="parameter 'w': got a use that is not by its layer's attribute"):
        lin(numbers(2, 4))
    assert others(numbers(2, 4)).shape == (2, 2)  # there it is a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(ntkit.Refused, match="scripted module"):
        ntkit.linearized(scripted)


class Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_linearized_refuses_functions_without_forward_mode():
    model = Odd(lambda m, x: x @ Signs.apply(m.w), w=parameter(4, 2))
    with pytest.raises(ntkit.Refused, match=r"an operation that torch\.func\.jvp does not take"):
        ntkit.linearized(model)(numbers(2, 4))


# ---------------------------------------------------------------------- larger copies


def test_a_group_for_each_channel_stays_one_in_larger_copies():
    """It is an instance norm then, whose copies normalize each channel by itself."""

    def network(norm):
        layers = [nn.Conv2d(2, 6, 2), norm, nn.ReLU(), nn.Conv2d(6, 6, 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double()

    x, one = numbers(3, 2, 5, 5), network(nn.GroupNorm(6, 6))
    other = network(nn.InstanceNorm2d(6, affine=True))
    other.load_state_dict(one.state_dict())
    assert_equal(one(x).detach(), other(x).detach(), 1e-12, "the networks")
    values = []
    for model in (one, other):
        copy_ = larger_copy(model, 3, x)
        copy_.draw(0)
        values.append(copy_.network(x).detach())
    assert_equal(*values, 1e-12, "the copies")
    assert larger_copy(network(nn.GroupNorm(2, 6)), 3, x).network[1].num_groups == 2
