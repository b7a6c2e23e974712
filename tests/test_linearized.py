"""The linearized network: trained, it is the flow on the tangent kernel; modes, buffers and saving as a module's."""

from __future__ import annotations

import pytest
import torch
from benchmarks.families import _missing as repaired  # makes a torchvision importable that was built for another torch
from torch import nn
from torch.nn import functional as F

from ntkit.base.checks import Refused
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines.flow import GradientFlow
from ntkit.networks.linearization import linearized


class Tied(nn.Module):
    """A weight used twice, a raw parameter, a buffer that the forward writes to, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.norm(self.second(torch.tanh(self.first(x)))) * self.scale)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mlp":
            model, x = (
                nn.Sequential(nn.Linear(5, 17), nn.ReLU(), nn.Linear(17, 11), nn.ReLU(), nn.Linear(11, 1)),
                (9, 5),
            )
        elif kind == "cnn":
            head = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
            model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), *head), (7, 2, 6, 6)
            model[1].running_mean += torch.rand(3, generator=g)
        else:
            model, x = Tied(), (7, 4)
    return model.double().eval(), torch.randn(*x, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tied"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_it_is_the_flow_on_the_tangent_kernel(kind, momentum):
    model, x = network(kind)
    C = 1 if kind == "mlp" else model(x).shape[1]
    y = torch.randn(len(x), C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    K = TangentKernel(model)(x).transpose(1, 2).reshape(len(x) * C, -1)
    flow = GradientFlow(lr=1e-3, momentum=momentum).fit(K, y.reshape(-1), initial=model(x).detach().reshape(-1))
    flow = GradientFlow(0.2 * flow.max_learning_rate_, momentum=momentum).fit(
        K, y.reshape(-1), initial=model(x).detach().reshape(-1)
    )
    lin = linearized(model)
    optimizer = torch.optim.SGD(lin.parameters(), lr=flow.lr, momentum=momentum)
    for _ in range(50):
        optimizer.zero_grad()
        (0.5 * F.mse_loss(lin(x), y)).backward()
        optimizer.step()
    trained = lin(x).detach().reshape(-1)
    torch.testing.assert_close(trained, flow.predict_train(50), rtol=0, atol=1e-8)
    assert (trained - flow.predict_train(49)).abs().max() > 1e-6
    assert (trained - model(x).reshape(-1)).abs().max() > 1e-2


def test_training_it_in_part_is_the_flow_on_that_part_of_the_kernel():
    model, x = network("mlp")
    y, names = torch.ones(9, 1, dtype=torch.float64), ["2.weight", "4.bias"]
    flow = GradientFlow(0.05).fit(TangentKernel(model, "trace", params=names)(x), y, initial=model(x).detach())
    lin = linearized(model, names)
    assert [n for n, p in lin.named_parameters() if p.requires_grad] == ["moving.2.weight", "moving.4.bias"]
    optimizer = torch.optim.SGD(lin.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * F.mse_loss(lin(x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(lin(x).detach(), flow.predict_train(20), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tied"])
def test_it_is_the_first_order_expansion(kind):
    model, x = network(kind)
    lin = linearized(model)
    assert torch.equal(lin(x), model(x))
    g = torch.Generator().manual_seed(3)
    step = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in lin.moving.named_parameters():
            p += step[n]
    change = (lin(x) - model(x)).detach()
    torch.testing.assert_close(change, TangentKernel(model).jvp(x, step), rtol=1e-10, atol=1e-12)
    bent = (shifted(1e-5, model, x, step) - shifted(-1e-5, model, x, step)) / 2e-5
    torch.testing.assert_close(change, bent, rtol=1e-6, atol=1e-7)
    with torch.no_grad():  # linear: twice the step, twice the change
        for n, p in lin.moving.named_parameters():
            p += step[n]
    torch.testing.assert_close((lin(x) - model(x)).detach(), 2 * change, rtol=1e-12, atol=1e-12)


def shifted(h: float, model: nn.Module, x: torch.Tensor, step: dict) -> torch.Tensor:
    moved = {n: p.detach() + h * step[n] for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return torch.func.functional_call(model, {**moved, **buffers}, x)


def test_the_model_and_modes_and_buffers_stay():
    model, x = network("tied")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    lin = linearized(model).train()
    assert not lin.start.norm.training
    assert not lin.moving.norm.training
    lin(x).sum().backward()
    assert lin.start.calls == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert lin.moving.first.weight is lin.moving.second.weight
    assert lin.start.first.weight is lin.start.second.weight


def test_it_is_saved_and_moved_like_a_module():
    model, x = network("mlp")
    lin, other = linearized(model), linearized(network("mlp")[0])
    with torch.no_grad():
        for p in lin.parameters():
            p.mul_(1.5)
        for b in other.start.buffers():
            b.zero_()
    other.load_state_dict(lin.state_dict())
    assert torch.equal(other(x), lin(x))
    assert not torch.equal(lin(x), model(x))
    assert lin.float()(x.float()).dtype == torch.float32


def test_refusals():
    with pytest.raises(Refused, match=r"layer '1' \(BatchNorm2d\): got train mode"):
        linearized(network("cnn")[0].train())
    with pytest.raises(Refused, match=r"dropout p=0\.5 active"):
        linearized(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    with pytest.raises(Refused, match="params: got 'weights'"):
        linearized(nn.Linear(2, 2), ["weights"])
    with pytest.raises(Refused, match="model: got function"):
        linearized(shifted)
    with pytest.raises(Refused, match=r"model LSTM: got an operation without a forward-mode .*other torch operations"):
        linearized(nn.LSTM(2, 2))(torch.ones(3, 1, 2))
    with pytest.raises(Refused, match="the output of Pair: got tuple"):
        linearized(Pair(2, 2))(torch.ones(3, 2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fused_attention_of_transformers(implementation):
    """It has no forward-mode derivative, and the refusal says which attention has one."""
    repaired("transformers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=implementation,
    )  # fmt: skip

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, tokens):
            return self.bert(input_ids=tokens, attention_mask=(tokens > 0).long()).logits

    model, tokens = Classifier().eval(), torch.randint(1, 20, (2, 5))
    if implementation == "eager":
        assert torch.equal(linearized(model)(tokens), model(tokens))
        return
    with pytest.raises(Refused, match=r'forward-mode derivative .*attn_implementation="eager"'):
        linearized(model)(tokens)


def test_fused_attention_step_by_step():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x @ self.weight, x, x)

    x, model = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)), Attention()
    with pytest.raises(Refused, match=r"SDPBackend\.MATH"):
        linearized(model)(x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(linearized(model)(x), model(x))
