"""Models made to fool the engine. Each one once gave a wrong number, or could: rows that move with the data, samples
that mix where the self-check does not look, parameters that change under a kernel's feet."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import tiny_mlp, tokens, vectors
from torch import nn

import ntkit
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.jacobian.rules import RULES
from ntkit.jacobian.structure import SelfCheckError
from ntkit.testing import assert_equal


def exact(model, x1, x2=None, kernel=None):
    for outputs in ("full", "trace"):
        k = kernel if kernel is not None and outputs == "full" else ntkit.TangentKernel(model, outputs=outputs)
        assert_equal(k(x1, x2), tangent_kernel(model, x1, x2, outputs), 1e-10, outputs)
        assert_equal(k.diagonal(x1), k(x1)[range(len(x1)), range(len(x1))], 1e-10, "diagonal")


class Layered(nn.Module):
    """A linear layer and a head, with the forward given."""

    def __init__(self, forward, width=5):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(5, width), nn.Linear(width, 2), nn.Parameter(torch.ones(()))
        self.how = forward
        self.double()

    def forward(self, *x):
        return self.how(self, *x)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_rows_sorted_by_data_and_back():
    def forward(m, x):
        order = x[:, 0, 0].argsort()
        h = torch.tanh(m.a(x[order])).mean(1)
        return m.b(h[order.argsort()])

    x = torch.randn(9, 3, 5).double()
    x[[0, 4, 8], 0, 0] = torch.tensor([-9.0, 0.0, 9.0]).double()  # the samples of the self-check are in order already
    exact(Layered(forward), x)


def test_rows_packed_by_length():
    def forward(m, x, mask):
        kept = mask.flatten().nonzero().flatten()
        h = torch.zeros(mask.numel(), 5, dtype=x.dtype).index_put((kept,), torch.tanh(m.a(x.flatten(0, 1)[kept])))
        return m.b(h.unflatten(0, mask.shape).sum(1))

    model, x = Layered(forward), torch.randn(6, 4, 5).double()
    lengths = torch.tensor([2, 1, 3, 2, 4, 0])  # as many rows as if all had two
    batch = (x, torch.arange(4)[None] < lengths[:, None])
    K = ntkit.TangentKernel(model)(batch)
    assert_equal(K, tangent_kernel(model, batch), 1e-10, "packed")


def test_a_gate_that_opens_after_the_first_call():
    def forward(m, x):  # one layer for n class rows and n * T token rows at once
        rows = torch.cat([x[:, 0], x[:, 1:].flatten(0, 1)])
        h = torch.tanh(m.a(rows))
        return m.b(h[: len(x)] + m.gate * h[len(x) :].unflatten(0, (len(x), -1)).sum(1))

    model, x = Layered(forward), torch.randn(7, 4, 5).double()
    kernel = ntkit.TangentKernel(model)
    for gate in (0.0, 0.7):
        model.gate.data.fill_(gate)
        exact(model, x, kernel=kernel)


def test_a_gated_branch_that_reverses_the_batch():
    model = Layered(lambda m, x: m.b(x) + m.gate * m.a(x.flip(0)).flip(0)[:, :2])
    x = vectors(7)
    kernel = ntkit.TangentKernel(model)
    for gate in (0.0, 0.7):
        model.gate.data.fill_(gate)
        exact(model, x, kernel=kernel)


def test_a_layout_switched_between_calls():
    def forward(m, x):
        h = torch.tanh(m.a(x.transpose(0, 1))).mean(0) if m.swap else torch.tanh(m.a(x)).mean(1)
        return m.b(h)

    model, x = Layered(forward), torch.randn(6, 3, 5).double()
    kernel = ntkit.TangentKernel(model)
    for model.swap in (False, True, False):
        exact(model, x, kernel=kernel)


def test_other_uses_for_other_inputs():
    class Square(Layered):
        def forward(self, x):
            return torch.tanh(x[:, :5]) @ (self.a.weight if x.shape[1] == 6 else self.a.weight.T)

    model = Square(None)
    x1, x2 = vectors(4), vectors(3, 6)
    kernel = ntkit.TangentKernel(model)
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-10, "W.T against W")
    assert_equal(kernel.paired(x1[:3], x2), kernel(x1, x2)[range(3), range(3)], 1e-10, "paired")


MIXING = {
    "centring": lambda x: x - x.mean(0),
    "largest of the batch": lambda x: x / x.abs().amax().clamp(min=3.0),
    "a branch on the batch": lambda x: x.clamp(-1, 1) if bool((x.abs() > 3).any()) else x,
}


@pytest.mark.parametrize("how", MIXING)
def test_samples_that_mix_where_the_self_check_does_not_look(how):
    model = Layered(lambda m, x: m.b(torch.tanh(m.a(MIXING[how](x)))))
    x = vectors(12)
    x[[0, 6, 11]] = vectors(1)  # the first samples looked at are equal
    x[3] *= 9
    kernel = ntkit.TangentKernel(model)
    for call in (lambda: kernel(x[:1], x), lambda: (kernel.diagonal(x[:1]), kernel(x)), lambda: kernel(x)):
        with pytest.raises(ntkit.Refused, match="when the sample is evaluated alone"):
            call()


def test_stochastic_depth_is_refused_for_every_seed():
    model = Layered(lambda m, x: m.b(m.a(x) if torch.rand(()) > 0.1 else x))
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(ntkit.Refused, match="draws random numbers"):
            ntkit.TangentKernel(model)(vectors(4))


def test_inference_mode_and_no_grad_around_the_call():
    model, x = tiny_mlp(), vectors(4)
    K = tangent_kernel(model, x)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            assert_equal(ntkit.TangentKernel(model)(x * 1.0), K, 1e-10, "inside")  # x * 1.0 is made inside, too
    assert_equal(ntkit.TangentKernel(model)(x), K, 1e-10, "after")


def test_outputs_cut_from_the_parameters_are_refused():
    with pytest.raises(ntkit.Refused, match=r"outputs that depend on none of the selected parameters.*use_reentrant"):
        ntkit.TangentKernel(Layered(lambda m, x: m.b(x).detach()))(vectors(4))
    from torch.utils.checkpoint import checkpoint

    model = Layered(lambda m, x: m.b(checkpoint(m.a, m.gate * x, use_reentrant=True)))
    with pytest.raises(ntkit.Refused, match="a reentrant checkpoint"):
        ntkit.TangentKernel(model)(vectors(4))


def test_parameters_replaced_after_construction():
    model, x = tiny_mlp(), vectors(4)
    kernel = ntkit.TangentKernel(model)
    kernel(x)
    model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()}, assign=True)
    exact(model, x, kernel=kernel)
    model[2] = nn.Linear(8, 2).double()
    exact(model, x, kernel=kernel)


def test_input_that_carries_a_graph_through_the_model():
    model = tiny_mlp(5, 5)
    x = model[0](vectors(4))[:, :5]
    kernel = ntkit.TangentKernel(model)
    K = tangent_kernel(model, x.detach())
    assert_equal(kernel(x), K, 1e-10, "values")
    assert not kernel(x).requires_grad
    v = torch.ones(20).double()
    assert_equal(kernel.operator(x) @ v, K.permute(0, 2, 1, 3).reshape(20, 20) @ v, 1e-10, "operator")


def test_a_tied_parameter_is_chosen_by_any_of_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9)}).double()
    model["head"].weight = model["embed"].weight

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner["head"](torch.tanh(self.inner["embed"](ids)).mean(1))

    x = tokens(5)
    chosen = ntkit.TangentKernel(LM(), params=lambda name: name.startswith("inner.head"))(x)
    assert_equal(chosen, tangent_kernel(LM(), x), 1e-10, "head.weight is embed.weight")


def test_precisions_that_differ_inside_a_model():
    class Mixed(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6).to(first), nn.Linear(6, 2).to(second)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))).to(self.b.weight.dtype))

    x = vectors(4)
    for first, second in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        model, wide = Mixed(first, second), Mixed(torch.float64, torch.float64)
        wide.load_state_dict(model.state_dict())
        K = ntkit.TangentKernel(model)(x)
        assert K.dtype == torch.float64
        assert_equal(K, tangent_kernel(wide, x), 1e-6, f"{first} then {second}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_self_check_bites_in_every_precision(dtype, monkeypatch):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x = vectors(4).to(dtype)
    assert ntkit.TangentKernel(model)(x).dtype == dtype
    right = RULES["AddmmBackward0"]
    wrong = lambda use, owner, n, cot: right(use, owner, n, 0.1 * cot if use.params == ("0.weight",) else cot)
    monkeypatch.setitem(RULES, "AddmmBackward0", wrong)  # what the rule says is now not what autograd says
    with pytest.raises(SelfCheckError, match=r"0\.weight"):
        ntkit.TangentKernel(model)(x)


def test_complex_parameters_are_refused_not_dropped():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(5, 8).double(), nn.Parameter(torch.randn(5, dtype=torch.complex128))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.w)

    with pytest.raises(ntkit.Refused, match=r"parameter 'w': got torch.complex128.*view_as_complex"):
        ntkit.TangentKernel(Fourier())
    model, x = Fourier(), vectors(2)
    model.w.requires_grad_(False)
    plain = [torch.autograd.grad(model(x[s : s + 1])[0, 1], model.a.weight)[0] for s in range(2)]
    K = ntkit.TangentKernel(model, params=["a.weight"], outputs=lambda y: y[:, 1])(x)
    assert_equal(K[0, 1], (plain[0] * plain[1]).sum(), 1e-10, "the real parameters, frozen complex ones aside")


def test_threads_share_a_model():
    model, x = tiny_mlp(), vectors(4)
    wanted = {name: tangent_kernel(model, x, params=[name]) for name in ("0.weight", "2.bias")}
    wrong: list[str] = []

    def work(name):
        for _ in range(10):
            try:
                assert_equal(ntkit.TangentKernel(model, params=[name])(x), wanted[name], 1e-10, name)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p.requires_grad for p in model.parameters())


def test_a_batch_of_one_does_not_spoil_the_fast_path():
    model = (
        nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(18, 2))
        .double()
        .eval()
    )
    x = torch.randn(9, 3, 6).double()
    kernel = ntkit.TangentKernel(model)
    kernel.diagonal(x[:1])
    assert kernel.fallback(x) == {}
    exact(model, x, kernel=kernel)


def test_buffers_that_the_forward_binds_anew():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 2).double()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps = self.steps + 1
            return self.a(x)

    model = Counting()
    held = model.steps
    ntkit.TangentKernel(model)(vectors(4))
    assert model.steps is held
    assert model.steps == 0


def test_small_integers_and_sparse_embeddings():
    for embedding in (nn.Embedding(9, 5), nn.Embedding(9, 5, sparse=True)):
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(20, 2)).double()
        x = tokens(6).int()
        K = ntkit.TangentKernel(model)(x)
        dense = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 2)).double()
        dense.load_state_dict(model.state_dict())
        assert_equal(K, tangent_kernel(dense, x), 1e-10, str(embedding))
    with pytest.raises(ntkit.Refused, match="scale_grad_by_freq, which divides gradients by counts over the batch"):
        ntkit.TangentKernel(nn.Sequential(nn.Embedding(9, 5, scale_grad_by_freq=True), nn.Flatten()))(tokens(3))
    with pytest.raises(ntkit.Refused, match="max_norm, which changes its weight at every call"):
        ntkit.TangentKernel(nn.Sequential(nn.Embedding(9, 5, max_norm=1.0), nn.Flatten()))(tokens(3))
