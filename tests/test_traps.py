"""What other tangent-kernel programs get wrong, and what users do to their models: each a test against the oracle.

Where a trap is tested elsewhere, this is where:

- outputs averaged or summed without saying: test_tangent `test_trace_is_a_sum_and_sum_is_scaled_by_outputs`; outputs
  of rank 3 here;
- reused modules, tied embedding and output head, transposed use: cases "reused", "siamese", "tied" of cases.py, on
  which test_tangent runs every mode, route and law; a tied parameter by any of its names in test_adversarial; shares
  here;
- batch norm in train mode, dropout, chance: test_refusals; stochastic depth and samples that mix: test_adversarial;
- parameters outside leaf modules: cases "raw parameters", "attention" (class token), "adapters", "positions";
- rows out of order: `check_kernel` permutes samples, test_tangent `test_laws`; sorted, packed: test_adversarial;
- a number of samples that tiles do not divide: test_tangent `test_any_tiling_gives_the_same`; a larger prime here;
- buffers: running statistics in case "norms"; buffers bound anew in test_adversarial; caches here;
- fused attention without a second derivative: `check_kernel` multiplies by the operator; EmbeddingBag here;
- options that change nothing: `test_every_option_changes_something` here;
- batch of one, unused parameters: test_tangent `test_one_sample_and_unused_parameters`, test_adversarial
  `test_a_batch_of_one_does_not_spoil_the_fast_path`; every mode here;
- one output: case "one output"; dead layers: test_tangent `test_dead_layers_are_right_and_come_alive`;
- frozen parameters: test_tangent `test_parameters_are_selected_by_name_predicate_and_grad`, test_untouched;
- checkpointed blocks: case "checkpointed"; reentrant ones are refused: test_adversarial; nested ones here;
- DataParallel, non-contiguous input: test_tangent `test_compiled_and_wrapped_input_types`; channels-last input: case
  "channels last"; such models here;
- tuples and dicts: cases "two inputs", "dict input"; small integers: test_adversarial; bytes and masks here;
- precisions: float32 in test_tangent, mixed in test_adversarial; half precision here.

Long because of the number of traps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, images, make, softplus_sum, tiny_mlp, tokens, vectors
from networks import Op, parameter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ntkit
from ntkit.base.batch import take
from ntkit.jacobian.oracle import jacobian, tangent_kernel
from ntkit.testing import assert_equal, check_kernel

MODES = ["full", "diagonal", "trace", "sum", softplus_sum]


def mlp(inputs: int = 5, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


# ---------------------------------------------------------------------- models


def forces(m, x):
    """Minus the gradient of an energy with respect to the input."""
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(m.net(x).sum(), x, create_graph=True)
    return -slope


def by_words(m, x):
    """Each different word of the batch is looked up once."""
    words, where = torch.unique(x, return_inverse=True)
    return m.head(torch.tanh(m.embed(words))[where].mean(1))


def filled(m, x):
    out = x.new_zeros(len(x), 4)
    out[:, :2] = m.a(x)
    out[:, 2:] += m.b(x)
    out[:, 1] *= 0.5
    return m.c(torch.tanh(out))


def overwritten(m, x):
    h = m.a(x)
    h.add_(m.shift).mul_(0.5)
    h[x[:, 0] > 0, 0] = 0.3
    h.masked_fill_(h > 0.5, 0.1)
    return m.b(h.relu_())


class Rotary(nn.Module):
    """Positions turn queries and keys, by angles that are kept in a buffer and in a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        self.register_buffer("rate", torch.tensor([1.0, 0.1]), persistent=False)
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        if t not in self.cache:
            self.cache[t] = torch.arange(t, dtype=x.dtype)[:, None] * self.rate.to(x)
        cos, sin = self.cache[t].cos(), self.cache[t].sin()

        def turned(h: Tensor) -> Tensor:
            a, b = h.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)).mean(1)


class Masked(nn.Module):
    """Attention over tokens of which some are padding, and a picture in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(9, 4), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(6, 2)

    def forward(self, ids: Tensor, padding: Tensor, picture: Tensor, scale: float = 255.0) -> Tensor:
        h = self.block(self.embed(ids), src_key_padding_mask=padding)
        words = (h * ~padding[:, :, None]).sum(1)
        seen = self.conv(picture[:, None].to(h) / scale).amax((2, 3))
        return self.head(torch.cat([words, seen], 1))


def masked(n: int) -> dict[str, Tensor]:
    padding = torch.arange(4) >= torch.randint(1, 5, (n, 1))
    return {"ids": tokens(n), "padding": padding, "picture": torch.randint(0, 256, (n, 4, 4), dtype=torch.uint8)}


def nested(m, x):
    def inner(h):
        return checkpoint(lambda t: torch.tanh(m.b(t)), m.a(h), use_reentrant=False)

    return checkpoint_sequential(m.rest, 2, checkpoint(inner, x, use_reentrant=False), use_reentrant=False)


def watched_by_hooks() -> nn.Module:
    net = mlp()
    net[0].register_forward_hook(lambda module, args, out: out * 2)
    net[2].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


def channels_last() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, groups=1), nn.Flatten(), nn.Linear(27, 2))
    return net.to(memory_format=torch.channels_last)


def expanded(n: int) -> Tensor:
    return torch.randn(3, n, dtype=torch.float64).T[:, None].expand(n, 5, 3).transpose(1, 2)


def called_with_others(m, x):
    doubled = {name: 2 * p for name, p in m.net.named_parameters()}
    return torch.func.functional_call(m.net, doubled, (x,)) + m.net(x)


TRAPS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    # a parameter more than once in one product
    "W @ W": (lambda: Op(lambda m, x: torch.tanh(x @ (m.w @ m.w)), w=parameter(5, 5)), vectors),
    "W * W": (lambda: Op(lambda m, x: torch.tanh(x @ (m.w * m.w)), w=parameter(5, 3)), vectors),
    "x W W^T": (lambda: Op(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, w=parameter(5, 3)), vectors),
    "x W W^T, linear": (lambda: Op(lambda m, x: x @ m.w @ m.w.T, w=parameter(5, 3)), vectors),
    "w x w": (lambda: Op(lambda m, x: m.w * torch.sin(x) * m.w, w=parameter(5)), vectors),
    "(x W) * (x W)": (lambda: Op(lambda m, x: (x @ m.w) * (x @ m.w), w=parameter(5, 3)), vectors),
    "x^T W x": (lambda: Op(lambda m, x: torch.einsum("ni,ij,nj->n", x, m.w, x), w=parameter(5, 5)), vectors),
    "x^T W^T W x": (
        lambda: Op(lambda m, x: torch.einsum("ni,ki,kj,nj->n", x, m.w, m.w, x), w=parameter(3, 5)),
        vectors,
    ),
    "weight and bias in one": (lambda: Op(lambda m, x: F.linear(x, m.w[:, 1:], m.w[:, 0]), w=parameter(3, 6)), vectors),
    "parts that overlap": (
        lambda: Op(lambda m, x: torch.tanh(x @ m.w[:5]) @ m.w[2:5, :2] + m.w[6, 1:], w=parameter(7, 3)),
        vectors,
    ),
    "a convolution kernel as a matrix": (
        lambda: Op(
            lambda m, x: F.conv2d(x, m.w).flatten(1) @ m.w.flatten(1).T[:16].repeat(3, 1), w=parameter(3, 2, 3, 3)
        ),
        images,
    ),
    "one bias for all layers": (
        lambda: Op(
            lambda m, x: F.linear(torch.tanh(F.linear(x, m.u, m.b)), m.v, m.b),
            u=parameter(4, 5),
            v=parameter(4, 4),
            b=parameter(4),
        ),
        vectors,
    ),
    "a parameter without entries": (
        lambda: Op(lambda m, x: m.net(x) + x @ m.a @ m.b, net=mlp(), a=parameter(5, 0), b=parameter(0, 3)),
        vectors,
    ),
    # forwards that are not layer after layer
    "forces": (lambda: Op(forces, net=mlp(outputs=1)), vectors),
    "vmap over samples": (lambda: Op(lambda m, x: torch.vmap(m.net)(x), net=mlp()), vectors),
    "a loop over samples": (lambda: Op(lambda m, x: torch.stack([m.net(one) for one in x]), net=mlp()), vectors),
    "functional_call": (lambda: Op(called_with_others, net=mlp()), vectors),
    "hooks": (watched_by_hooks, vectors),
    "words looked up once": (lambda: Op(by_words, embed=nn.Embedding(9, 4), head=nn.Linear(4, 2)), tokens),
    "a spectrum, cut": (
        lambda: Op(
            lambda m, x: m.head(torch.fft.irfft(torch.fft.rfft(m.a(x).flip(1)) * m.w, n=4)[:, 1:3]),
            a=nn.Linear(5, 4),
            w=parameter(3),
            head=nn.Linear(2, 2),
        ),
        vectors,
    ),
    # written in place
    "filled": (lambda: Op(filled, a=nn.Linear(5, 2), b=nn.Linear(5, 2), c=nn.Linear(4, 2)), vectors),
    "overwritten": (lambda: Op(overwritten, a=nn.Linear(5, 4), b=nn.Linear(4, 2), shift=parameter(4)), vectors),
    "inplace activations": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ELU(inplace=True), mlp(4)),
        vectors,
    ),
    "nested checkpoints": (
        lambda: Op(nested, a=nn.Linear(5, 4), b=nn.Linear(4, 4), rest=nn.Sequential(nn.ReLU(), *mlp(4))),
        vectors,
    ),
    # inputs, outputs, buffers
    "outputs of rank 3": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda n: vectors(n * 5, 3).unflatten(0, (n, 5)),
    ),
    "outputs transposed": (lambda: Op(lambda m, x: m.net(x).T.contiguous().T, net=mlp()), vectors),
    "bytes, masks and words": (Masked, masked),
    "rotary cache": (Rotary, lambda n: torch.randn(n, 3, 4).double()),
    "channels-last model": (channels_last, images),
    "channels-last model and input": (channels_last, lambda n: images(n).to(memory_format=torch.channels_last)),
    "expanded and transposed input": (
        lambda: nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Flatten(), mlp(6)),
        expanded,
    ),
    # nothing to see
    "dead ReLU": (
        lambda: Op(
            lambda m, x: m.b(torch.relu(m.a(x) - 50)) + m.c(x), a=nn.Linear(5, 4), b=nn.Linear(4, 2), c=nn.Linear(5, 2)
        ),
        vectors,
    ),
    "times zero": (lambda: Op(lambda m, x: m.net(x) + 0 * m.w * x[:, :3], net=mlp(), w=parameter(3)), vectors),
    "an expert that nobody asks": (
        lambda: Op(
            lambda m, x: m.a(x).index_add(0, (x[:, 0] > 9).nonzero()[:, 0], m.b(x[x[:, 0] > 9])), a=mlp(), b=mlp()
        ),
        vectors,
    ),
    "bags of words": (
        lambda: Op(lambda m, x: m.gate * m.head(m.bag(x)), bag=nn.EmbeddingBag(9, 4), head=mlp(4), gate=parameter()),
        tokens,
    ),
}


def build(name: str, n1: int = 5, n2: int = 3) -> tuple[nn.Module, Any, Any]:
    """Model in float64 and eval mode, x1, x2: the same every time."""
    factory, data = TRAPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory().double().eval(), data(n1), data(n2)


@pytest.mark.parametrize("outputs", MODES, ids=lambda m: m if isinstance(m, str) else "callable")
@pytest.mark.parametrize("name", TRAPS)
def test_equals_the_oracle(name, outputs):
    model, x1, x2 = build(name)
    kernel = ntkit.TangentKernel(model, outputs=outputs)
    for a, b, what in ((x1, x2, "k(x1, x2)"), (x1, None, "k(x1)"), (take(x2, [1]), None, "k of one")):
        assert_equal(kernel(a, b), tangent_kernel(model, a, b, outputs), 1e-10, what)


@pytest.mark.parametrize("name", TRAPS)
def test_laws(name):
    model, x1, x2 = build(name)
    check_kernel(ntkit.TangentKernel(model), x1, x2)
    check_kernel(ntkit.TangentKernel(model, outputs="trace", memory=1), x1, x2)


@pytest.mark.parametrize("name", [*TRAPS, "tied", "reused", "siamese", "adapters"])
def test_shares_hold_the_cross_terms(name):
    model, x1, x2 = build(name) if name in TRAPS else make(name)
    j1, j2 = jacobian(model, x1), jacobian(model, x2)
    scale = max(float(torch.einsum("icp,jdp->ijcd", j1[p], j2[p]).abs().max()) for p in j1)
    for parameter_, share in ntkit.TangentKernel(model).layers(x1, x2).items():
        exact = torch.einsum("icp,jdp->ijcd", j1[parameter_], j2[parameter_])
        assert float((share - exact).abs().max()) <= 1e-10 * scale, parameter_


@pytest.mark.parametrize("outputs", MODES, ids=lambda m: m if isinstance(m, str) else "callable")
@pytest.mark.parametrize("name", ["mlp", "conv", "attention, sequence first", "lstm", "tied", "norms"])
def test_a_batch_of_one(name, outputs):
    model, x1, x2 = make(name)
    kernel = ntkit.TangentKernel(model, outputs=outputs)  # which has seen nothing but one sample
    one = take(x1, [0])
    assert_equal(kernel(one), tangent_kernel(model, one, None, outputs), 1e-10, "one")
    assert_equal(kernel(one, x2), tangent_kernel(model, one, x2, outputs), 1e-10, "one against some")
    assert_equal(kernel.diagonal(one), tangent_kernel(model, one, None, outputs)[:, 0], 1e-10, "diagonal")


@pytest.mark.parametrize("name", ["mlp", "conv", "attention, batch first", "experts", "no rule"])
def test_a_prime_number_of_samples(name):
    model, _, _ = make(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x1, x2 = CASES[name][1](13), CASES[name][1](11)
    for memory in (9000, 60000, 300000):
        kernel = ntkit.TangentKernel(model, memory=memory)
        assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-10, f"memory {memory}")
        assert_equal(kernel(x1), tangent_kernel(model, x1), 1e-10, f"memory {memory}")


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """Against the oracle of the rounded model.

    A gradient passes at most four layers forward and four back, each of which rounds twice (product, nonlinearity) by
    half a unit in the last place; the kernel multiplies two gradients, and rounds.
    """
    model, x1, x2 = make(name)
    model, x1, x2 = model.to(dtype), *(x.to(dtype) if x.is_floating_point() else x for x in (x1, x2))
    for outputs in MODES:
        exact = tangent_kernel(model, x1, x2, outputs)
        K = ntkit.TangentKernel(model, outputs=outputs)(x1, x2)
        assert K.dtype == dtype
        assert_equal(K, exact, 17 * torch.finfo(dtype).eps, f"{name} {outputs}")


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_autocast_inside_a_model(name):
    """Against plain autograd through the same autocast, sample by sample, with the tolerance of half precision."""
    model, x1, x2 = make(name)

    def run(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.net(x).float()

    model, x1, x2 = Op(run, net=model.float()), x1.float(), x2.float()
    j1, j2 = (torch.cat(list(jacobian(model, x, dtype=torch.float32).values()), -1).double() for x in (x1, x2))
    K = ntkit.TangentKernel(model)(x1, x2)
    assert K.dtype == torch.float32
    exact = torch.einsum("icp,jdp->ijcd", j1, j2)
    assert_equal(K, exact, 17 * torch.finfo(torch.bfloat16).eps, name)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mlp", "conv", "tied"])
def test_compiled_models(name, backend, compiler):
    if backend == "inductor":
        try:
            compiler(torch.sin, backend=backend)(torch.ones(2))
        except Exception as error:
            pytest.skip(f"inductor does not work here: {error}")
    model, x1, x2 = make(name)
    compiled = compiler(model, backend=backend)
    for outputs in MODES:
        K = ntkit.TangentKernel(compiled, outputs=outputs)(x1, x2)
        assert_equal(K, tangent_kernel(model, x1, x2, outputs), 1e-10, f"{backend} {outputs}")
    model.compile(backend=backend)  # in place
    assert_equal(ntkit.TangentKernel(model)(x1), tangent_kernel(make(name)[0], x1), 1e-10, "compiled in place")


# ---------------------------------------------------------------------- single traps


@pytest.mark.parametrize(
    "write", [lambda x: x.mul_(0.5), lambda x: x.relu_(), lambda x: x[:, 0].fill_(0.3)], ids=["mul", "relu", "fill"]
)
def test_a_model_that_writes_to_its_input(write):
    """Exact or refused, and the user's data stay as they are."""

    def run(m, x):
        write(x)
        return m.net(x)

    model = Op(run, net=tiny_mlp())
    x1, x2 = vectors(4), vectors(3)
    kept = x1.clone()
    expected = tangent_kernel(model, x1.clone(), x2.clone())
    with contextlib.suppress(ntkit.Refused):
        assert_equal(ntkit.TangentKernel(model)(x1, x2), expected, 1e-10, "kernel")
    assert torch.equal(x1, kept), "the user's data were changed"


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.InstanceNorm2d(2, affine=True), nn.BatchNorm3d(2)])
def test_a_norm_before_tokens(norm):
    """A batch norm whose channels become the features of tokens, as in hybrids of CNN and transformer.

    PyTorch (2.13, CPU, eval mode) gets its gradient wrong for a batch of one when the cotangent is channels-last in
    memory, and an instance norm always calls it with a batch of one. So the oracle here is the norm written out.
    """

    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.tokens, self.head = norm, nn.LayerNorm(2), nn.Linear(2, 3)

        def forward(self, x):
            h = F.silu(self.norm(x)).flatten(2).transpose(1, 2)
            return torch.tanh(self.head(self.tokens(h))).mean(1)

    class Written(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            axes = tuple(range(2, x.dim()))
            wide = (1, -1) + (1,) * len(axes)
            if isinstance(self.norm, nn.InstanceNorm2d):
                mean, var = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
            else:
                mean, var = self.norm.running_mean.view(wide), self.norm.running_var.view(wide)
            normal = (x - mean) / (var + self.norm.eps).sqrt()
            return normal * self.norm.weight.view(wide) + self.norm.bias.view(wide)

    size = (3, 3, 2) if isinstance(norm, nn.BatchNorm3d) else (3, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x1, x2 = Net(norm).double().eval(), torch.randn(4, 2, *size).double(), torch.randn(3, 2, *size).double()
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    written = Net(Written(norm))
    written.tokens, written.head = model.tokens, model.head
    assert_equal(ntkit.TangentKernel(model)(x1, x2), tangent_kernel(written, x1, x2), 1e-10, "kernel")
    assert_equal(ntkit.TangentKernel(model)(x1[:1]), tangent_kernel(written, x1[:1]), 1e-10, "one sample")


def test_gradients_that_vanish_by_symmetry():
    """The sum of what was centred depends on nothing: the kernel of what made it is rounding, not a refusal."""
    model = Op(lambda m, x: m.a(x) + m.norm(m.b(x)).sum(1, keepdim=True), a=nn.Linear(5, 2), b=nn.Linear(5, 4))
    model.norm = nn.LayerNorm(4, elementwise_affine=False)
    model, x = model.double(), vectors(4)
    whole = tangent_kernel(model, x)
    assert_equal(ntkit.TangentKernel(model)(x), whole, 1e-10, "with the others")
    alone = ntkit.TangentKernel(model, params=["b.weight", "b.bias"])(x)
    assert float(alone.abs().max()) <= 1e-24 * float(whole.abs().max())


def test_outputs_that_vanish_by_symmetry():
    """Outputs that are nothing but rounding differ between a batch and a sample alone; their kernel is not nothing."""
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 1, bias=False))
    model, x = model.double(), vectors(4)
    nn.init.ones_(model[2].weight)
    assert_equal(ntkit.TangentKernel(model)(x), tangent_kernel(model, x), 1e-10, "kernel")


def test_every_option_changes_something():
    model, x = tiny_mlp(), vectors(4)

    def values(**options):
        return ntkit.TangentKernel(model, **options)(x)

    plain = values()
    changes = {
        "outputs": lambda: values(outputs="trace").shape != plain.shape,
        "params": lambda: not torch.equal(values(params=["0.weight"]), plain),
        "memory": lambda: (
            ntkit.TangentKernel(model, memory=1).plan(x).tile < ntkit.TangentKernel(model, memory="1 GB").plan(x).tile
        ),
        "routes": lambda: (
            [
                ntkit.TangentKernel(model, routes={"0.weight": route}).plan(x).route("0.weight")
                for route in ("rows", "outer")
            ]
            == ["rows", "outer"]
        ),
        "select": lambda: values(select=lambda out: out[:, :1]).shape != plain.shape,
    }
    assert set(inspect.signature(ntkit.TangentKernel).parameters) == {"model", *changes}
    for name, changed in changes.items():
        assert changed(), f"option {name} is accepted and ignored"


class Changing(nn.Module):
    """Samples of one shape, several graphs: by a flag, by the data, by the number of samples."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.flag = by, False
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.by == "number" and len(x) > 20:  # the same, another way
            return torch.cat([self(part) for part in x.split(10)])
        flag = {"flag": self.flag, "data": x.mean() > 0, "number": False}[self.by]
        return self.three(self.two(self.one(x).sigmoid()).tanh() if flag else self.one(x).tanh())


@pytest.mark.parametrize("by", ["flag", "data", "number"])
def test_a_graph_that_changes_between_calls(by):
    torch.manual_seed(3)
    model = Changing(by).double()
    kernel = ntkit.TangentKernel(model)
    x = torch.randn(40, 4, dtype=torch.float64).abs()
    calls = [(x[:5], x[5:9]), (-x[:5], -x[5:9]), (x[:20], x[20:]), (x[:5], x[5:9])]
    for flag in (False, True, False):
        model.flag = flag
        for x1, x2 in calls:
            assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-12, f"{by}, {flag}")
            assert_equal(kernel(x1), tangent_kernel(model, x1), 1e-12, "k(x)")
            assert_equal(kernel.diagonal(x1), tangent_kernel(model, x1).diagonal().permute(2, 0, 1), 1e-12, "diagonal")


def test_a_model_converted_after_the_kernel_was_made():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(6, 5)
    kernel = ntkit.TangentKernel(model)
    kernel(x)
    model.double()
    got = kernel(x.double())
    assert got.dtype == torch.float64
    assert_equal(got, tangent_kernel(model, x.double()), 1e-12, "float64")


def test_samples_that_mix_in_large_batches_only():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 2)

        def forward(self, x):
            h = self.f(x).sin()
            return h - h.mean(0) * (len(x) > 16)

    kernel, x = ntkit.TangentKernel(Centred()), torch.randn(40, 4)
    assert kernel(x[:8]).shape == (8, 8, 2, 2)
    with pytest.raises(ntkit.Refused, match="evaluated alone"):
        kernel(x)


def test_numpy_random_numbers_are_noticed_and_put_back():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 2)

        def forward(self, x):
            return self.f(x) * np.random.normal()  # noqa: NPY002 (what users write)

    np.random.seed(0)  # noqa: NPY002
    np.random.normal()  # noqa: NPY002 (one more is now in store: taking it moves no pointer)
    with pytest.raises(ntkit.Refused, match="random numbers"):
        ntkit.TangentKernel(Noisy())(torch.randn(3, 4))
    after = np.random.normal()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    np.random.normal()  # noqa: NPY002
    assert after == np.random.normal()  # noqa: NPY002


class Turned(nn.Module):
    """Batch-major or time-major inside, by a flag: where there are as many samples as times, shapes cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.major, self.f = True, nn.Linear(5, 2).double()

    def forward(self, x):
        order = (0, 1, 2) if self.major else (1, 0, 2)
        inside = x.permute(*order).clone(memory_format=torch.contiguous_format)
        return self.f(inside).tanh().permute(*order).sum(1)


class Cut(nn.Module):
    """A parameter of which two parts are used; one of them moves."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.start = nn.Parameter(torch.randn(6, 4, dtype=torch.float64)), 0

    def forward(self, x):
        one, two = F.linear(x, self.w[0:3]), F.linear(x, self.w[self.start : self.start + 3])
        return one.tanh().sum(1, keepdim=True) + two.sin().sum(1, keepdim=True)


@pytest.mark.parametrize("n", [5, 6])
def test_axes_that_trade_places_between_calls(n):
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(n, 6, 5, dtype=torch.float64)
    kernel = ntkit.TangentKernel(model)
    for major in (True, False, True):
        model.major = major
        assert_equal(kernel(x), tangent_kernel(model, x), 1e-12, f"major {major}")


def test_a_cut_that_moves_between_calls():
    torch.manual_seed(0)
    model, x = Cut(), torch.randn(5, 4, dtype=torch.float64)
    kernel = ntkit.TangentKernel(model)
    for start in (0, 3, 1, 0):
        model.start = start
        assert_equal(kernel(x), tangent_kernel(model, x), 1e-12, f"start {start}")
