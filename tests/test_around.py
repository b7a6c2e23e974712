"""What is open around a call changes no value: autocast, inference mode, defaults, hooks of PyTorch itself, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import ntkit
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.machines.estimators import NTKClassifier, NTKRegressor


class Shielded(nn.Module):
    """A network whose forward pass no autocast reaches: whatever differs under autocast is not the network's doing."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), norm, nn.Linear(48, 2)
        self.gate = nn.Parameter(torch.rand(48))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = torch.tanh(self.norm(self.conv(x))).flatten(1)
            return self.head(torch.lerp(h, h * h, self.gate))  # lerp has no rule: its weight is on the fallback


def network(norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(3)) -> Shielded:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Shielded(norm()).to(torch.float32)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


X, Z = numbers(1, 9, 1, 6, 6), numbers(2, 4, 1, 6, 6)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0])
TARGETS = torch.tensor([-1.0, 1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.float64)
K = X.flatten(1) @ X.flatten(1).T + torch.eye(9, dtype=torch.float32)
VECTORS = numbers(3, 9, 2)


def dense() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2)
        return nn.Sequential(*layers).to(torch.float32)


def trained(x: Tensor, y: Tensor) -> ntkit.Trajectory:
    model = network(nn.Identity).to(x.device)
    return ntkit.train(model, (x, y), F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), steps=3, batch_size=4)


def followed(run: ntkit.Trajectory, model: nn.Module, x: Tensor, y: Tensor) -> list[Any]:
    series = ntkit.track(run, x, y, model=model, k=3).series
    return [series["distance"], series["alignment"], series["loss"]]


Case = tuple[Any, Callable[[Any], Any]]  # an object that is built outside of the context, and the call


def cases(device: str = "cpu") -> dict[str, Case]:
    """What computes numbers, on a device."""
    x, z, labels, targets, gram, vectors = (t.to(device) for t in (X, Z, LABELS, TARGETS, K, VECTORS))
    run = trained(x, labels)

    def net(norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(3)) -> nn.Module:
        return network(norm).to(device)

    def mlp() -> nn.Module:
        return dense().to(device)

    def tangent(outputs: Any, ask: Callable[[ntkit.TangentKernel], Any]) -> Case:
        return ntkit.TangentKernel(net(), outputs), ask

    return {
        "full": tangent("full", lambda k: k(x)),
        "trace, two sets": tangent("trace", lambda k: k(x, z)),
        "sum": tangent("sum", lambda k: k(x)),
        "callable": tangent(lambda y: y[:, 0] * y[:, 1], lambda k: k(x)),
        "diagonal": tangent("diagonal", lambda k: k.diagonal(x)),
        "paired": tangent("trace", lambda k: k.paired(x, x.flip(0))),
        "layers": tangent("trace", lambda k: list(k.layers(x).values())),
        "operator": tangent("trace", lambda k: k.operator(x) @ vectors),
        "KernelRidge of an operator": tangent(
            "trace", lambda k: ntkit.KernelRidge(0.1).fit(k.operator(x), targets).predict(k(z, x))
        ),
        "GaussianProcess of an operator": tangent(
            "trace", lambda k: ntkit.GaussianProcess(1.0).fit(k.operator(x), targets).predict(k(z, x), k(z)).covariance
        ),
        "vjp": tangent("full", lambda k: list(k.vjp(x, vectors).values())),
        "jvp": tangent("full", lambda k: k.jvp(x, {"head.bias": vectors[0]})),
        "SketchedKernel": (ntkit.SketchedKernel(net(), dim=32, outputs="trace"), lambda k: [k(x), k.standard_error(x)]),
        "ConjugateKernel": (ntkit.ConjugateKernel(net()), lambda k: k(x)),
        "InfiniteKernel": (ntkit.InfiniteKernel(mlp(), w_std=1.4, b_std=0.1), lambda k: k(x)),
        "PathKernel": (ntkit.PathKernel(run), lambda k: k.decompose(z).contributions),
        "PathKernel as a kernel": (ntkit.PathKernel(run, outputs="trace"), lambda k: k(x, z)),
        "track": (net(nn.Identity), lambda model: followed(run, model, x, labels)),
        "Gram": (ntkit.Gram(gram), lambda whole: whole @ vectors),
        "spectrum": (gram, lambda matrix: ntkit.spectrum(matrix, k=4).eigenvalues),
        "alignment": (gram, lambda matrix: ntkit.alignment(matrix, targets, centered=True)),
        "HardMarginSVM": (gram, lambda matrix: ntkit.HardMarginSVM().fit(matrix, labels).decision_function(matrix)),
        "KernelRidge": (gram, lambda matrix: ntkit.KernelRidge(0.1).fit(matrix, targets).predict(matrix)),
        "GradientFlow": (gram, lambda matrix: ntkit.GradientFlow().fit(matrix, targets).predict(matrix)),
        "GaussianProcess": (
            gram,
            lambda matrix: ntkit.GaussianProcess(0.1).fit(matrix, targets).predict(matrix, matrix).covariance,
        ),
        "effective rank": (gram, ntkit.effective_rank),
        "energy": (gram, lambda matrix: ntkit.spectrum(matrix, k=4).energy(targets)),
        "surrogate importance": (gram, lambda matrix: ntkit.surrogate_importance(matrix, vectors).values),
        "bandwidth": (x[:, 0], ntkit.bandwidth),
        "eigenfunctions": tangent("trace", lambda k: ntkit.eigenfunctions(k, ntkit.spectrum(k(x), k=3), x, z)),
        "invariance": tangent("trace", lambda k: ntkit.invariance(k, x, ntkit.probes.shift(1, 0)).per_sample),
        "cosines": tangent(
            "trace", lambda k: [c.centered.per_sample for c in ntkit.probes.cosines(k, x).by_transform.values()]
        ),
        "novelty": tangent("trace", lambda k: ntkit.novelty(k, x, z).deviation),
        "widened": (mlp(), lambda model: list(ntkit.widened(model, 7, x).parameters())),
        "to_ntk_parametrization": (mlp(), lambda model: list(ntkit.to_ntk_parametrization(model).parameters())),
        "convergence": (mlp(), lambda model: ntkit.convergence(model, x, widths=(8, 16), seeds=2).distance),
        "influence": (run, lambda trajectory: ntkit.influence(trajectory, z).scores),
        "Retrainings": (run, lambda trajectory: ntkit.Retrainings(trajectory, z).without([[1]])),
        "tracking importance": (run, lambda trajectory: ntkit.tracking_importance(trajectory).values),
        "tracin": (run, lambda trajectory: ntkit.tracin(trajectory, z).scores),
        "explain": (
            (ntkit.TangentKernel(net(), "trace"), net()),
            lambda k: ntkit.explain(k[0], ntkit.target_importance(k[1], x, labels, F.cross_entropy), x, z).scores,
        ),
        "InfluenceKernel": (ntkit.InfluenceKernel(net(), (x, labels), F.cross_entropy, damping=0.1), lambda k: k(x, z)),
        "load": (None, lambda _: [(data := ntkit.data.load("digits", train=30)).x_train, data.y_train, data.x_test]),
        "from_tensors": (x, lambda x: [(data := ntkit.data.from_tensors((x, labels))).x_train, data.y_train]),
        "targets": (x, lambda x: ntkit.data.from_tensors((x, targets * x[:, 0, 0, 0].double())).y_train),
        "NTKRegressor": (
            x.cpu().flatten(1).numpy(),
            lambda x: torch.from_numpy(NTKRegressor(machine="gp").fit(x, targets.cpu().numpy()).predict(x)),
        ),
        "NTKClassifier": (
            NTKClassifier(mlp().double()),
            lambda c: torch.from_numpy(
                c.fit(x.cpu().flatten(1).numpy(), labels.cpu().numpy()).decision_function(z.cpu().flatten(1).numpy())
            ),
        ),
    }


VALUES = cases()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "dual level": forward_ad.dual_level,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "one backward thread": lambda: torch.autograd.set_multithreading_enabled(False),
}


@cache
def plain(name: str) -> list[Tensor]:
    thing, ask = VALUES[name]
    return tensors(ask(thing))


def tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list) and isinstance(value[0], (Tensor, list)) else [value]
    return [torch.as_tensor(v, device="cpu") for v in values]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", VALUES)
def test_the_context_of_a_call_changes_no_bit(name, context):
    (thing, ask), wanted = VALUES[name], plain(name)
    with CONTEXTS[context]():
        values = ask(thing)
    values = tensors(values)
    assert len(values) == len(wanted)
    for value, expected in zip(values, wanted, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


# ---------------------------------------------------------------------- autocast and the network itself


def unrounded(model: nn.Sequential, x: Tensor) -> Tensor:
    """The trace kernel of a dense network from its layers' inputs and cotangents, multiplied in float64."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    total = torch.zeros(len(x), len(x), dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for layer in layers]
    outputs = [model(x[i : i + 1]) for i in range(len(x))]
    for handle in handles:
        handle.remove()
    for k in range(len(layers)):
        mine = seen[k :: len(layers)]
        data = torch.cat([a.detach().to(out.dtype) for a, out in mine]).double()  # autocast rounds the input of a layer
        for c in range(outputs[0].shape[1]):
            rows = [torch.autograd.grad(y[0, c], out, retain_graph=True)[0]
                    for y, (_, out) in zip(outputs, mine, strict=True)]  # fmt: skip
            cotangents = torch.cat(rows).double()
            total += (data @ data.T + 1) * (cotangents @ cotangents.T)
    return total


@pytest.mark.parametrize("outputs", [1, 3])
def test_under_autocast_the_kernel_is_that_of_the_rounded_network(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(outputs)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, outputs))
    x = numbers(5, 1, 8) + 1e-2 * numbers(6, 30, 8)  # near each other: products in bfloat16 would not be positive
    with torch.autocast("cpu", dtype=torch.bfloat16):
        K = ntkit.TangentKernel(model, "trace")(x)
        reference = unrounded(model, x)
    assert K.dtype == torch.float32
    torch.testing.assert_close(K.double(), reference, rtol=1e-6, atol=1e-6 * float(reference.max()))
    eigenvalues = torch.linalg.eigvalsh(K.double())
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
    far = ntkit.TangentKernel(model, "trace")(x).double()
    assert float((far - reference).abs().max()) > 1e-4 * float(reference.max())  # autocast did reach the network


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace", "sum"])
def test_attention_under_autocast_has_a_kernel(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Unflatten(1, (2, 4)), block, nn.Flatten(), nn.Linear(8, 3)).eval()
    x = numbers(7, 6, 8)
    reference = tangent_kernel(model, x, outputs=outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        K = ntkit.TangentKernel(model, outputs)(x)
    # two roundings to 8 bits in each of some ten layers
    assert float((K.double() - reference).abs().max()) < 0.1 * float(reference.abs().max())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, on first use of vmap
def test_a_call_inside_a_transform_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ntkit.Refused, match=r"inside a transform of torch\.func"):
        torch.func.vmap(lambda x: ntkit.TangentKernel(model)(x))(torch.ones(2, 4, 3))
    with forward_ad.dual_level(), pytest.raises(ntkit.Refused, match="dual tensor"):
        ntkit.TangentKernel(model)(forward_ad.make_dual(torch.ones(4, 3), torch.ones(4, 3)))


def test_more_threads_change_nothing_beyond_rounding():
    kernel, x = ntkit.TangentKernel(network().double(), "trace"), X.double()
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values.append(kernel(x))
    finally:
        torch.set_num_threads(before)
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-12, atol=1e-12)


def test_a_compiled_network_has_the_kernel_of_the_plain_one():
    model = network()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(ntkit.TangentKernel(compiled, "trace")(X), ntkit.TangentKernel(model, "trace")(X))


# ---------------------------------------------------------------------- hooks


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The full kernel by one backward pass per sample and output, hooks and all."""
    params, rows = list(model.parameters()), []
    for i in range(len(x)):
        y = model(x[i : i + 1])[0]
        rows.append(torch.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in y
        ]))  # fmt: skip
    return torch.einsum("icp,jdp->ijcd", *[torch.stack(rows)] * 2)


LINEAR_HOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "mask on a weight": lambda m: m[0].weight.register_hook(lambda g: g * torch.eye(5, 4, dtype=g.dtype)),
    "scale on a bias": lambda m: m[2].bias.register_hook(lambda g: 0.5 * g),
    "hook that changes nothing": lambda m: m[0].weight.register_hook(lambda g: None),
    "backward hook on a layer": lambda m: m[1].register_full_backward_hook(lambda _, i, o: (i[0] * 0.5,)),
    "forward hook with a gradient hook": lambda m: m[0].register_forward_hook(
        lambda _, a, out: out.register_hook(lambda g: 0.5 * g) and None
    ),
    "after accumulation": lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: None),
}


@pytest.mark.parametrize("hook", LINEAR_HOOKS)
def test_hooks_that_are_linear_are_honored_as_autograd_does(hook):
    model, x = small(), numbers(8, 5, 4).double()
    LINEAR_HOOKS[hook](model)
    kernel, reference = ntkit.TangentKernel(model), by_autograd(model, x)
    torch.testing.assert_close(kernel(x), reference, rtol=1e-12, atol=1e-12)
    v = numbers(9, 10).double()
    matrix = reference.permute(0, 2, 1, 3).reshape(10, 10)
    torch.testing.assert_close(kernel.operator(x) @ v, matrix @ v, rtol=1e-12, atol=1e-12)


def test_hooks_on_one_of_the_weights_behind_a_use_keep_the_others():
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(0)
            self.w, self.a, self.b = (
                nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64))
                for shape in ((4, 2), (4, 1), (1, 2))
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ (self.w + self.a @ self.b))

    model, x = Adapted(), numbers(10, 4, 4).double()
    model.w.register_hook(lambda g: 0.5 * g)
    torch.testing.assert_close(ntkit.TangentKernel(model)(x), by_autograd(model, x), rtol=1e-12, atol=1e-12)


NONLINEAR_HOOKS: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "clip on a weight": (lambda m: m[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1)), "parameter '0.weight'"),
    "sign on a layer": (lambda m: m[1].register_full_backward_hook(lambda _, i, o: (i[0].sign(),)), "layer '1'"),
}


@pytest.mark.parametrize("hook", NONLINEAR_HOOKS)
def test_hooks_that_are_not_linear_are_refused_by_name(hook):
    model, x = small(), numbers(8, 5, 4).double()
    register, name = NONLINEAR_HOOKS[hook]
    register(model)
    with pytest.raises(ntkit.Refused, match="linear in the cotangent") as error:
        ntkit.TangentKernel(model)(x)
    assert name in str(error.value)


def test_a_hook_registered_after_the_first_call_counts():
    model, x = small(), numbers(8, 5, 4).double()
    kernel = ntkit.TangentKernel(model)
    kernel(x)
    model[0].weight.register_hook(lambda g: 0.5 * g)
    torch.testing.assert_close(kernel(x), by_autograd(model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", ["path kernel", "retrainings"])
def test_what_replays_a_run_is_made_in_inference_mode_too(of):
    x, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    sgd = lambda params: torch.optim.SGD(params, lr=0.3)
    run = ntkit.train(model, (x, y), F.cross_entropy, sgd, steps=3)

    def value() -> Tensor:
        if of == "path kernel":
            return ntkit.PathKernel(run).decompose(x[:2]).contributions
        return ntkit.Retrainings(run, x[:2], y[:2]).without([[1]])

    expected = value()
    with torch.inference_mode():
        assert torch.equal(value(), expected)
