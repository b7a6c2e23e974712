"""The door of the kernels: every refusal says got, expected, what to do."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import make, tiny_mlp, vectors
from torch import nn

import ntkit

X = vectors(4)


def kernel(model=None, **more):
    return ntkit.TangentKernel(tiny_mlp() if model is None else model, **more)


def refused(message):
    return pytest.raises(ntkit.Refused, match=message)


def test_batch_norm_in_train_mode():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().train()
    with refused(r"layer '1' \(BatchNorm1d\): got train mode; expected eval mode.*model\.eval\(\)"):
        kernel(model)(X)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
    with refused(r"layer '1' .*batch statistics \(track_running_stats=False\)"):
        kernel(model)(X)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.AlphaDropout(0.1)])
def test_active_dropout(layer):
    with refused(r"layer '1' .*dropout p=0\.1 active; expected no randomness. Call model\.eval\(\)"):
        kernel(nn.Sequential(nn.Linear(5, 3), layer).double().train())(X)
    kernel(nn.Sequential(nn.Linear(5, 3), layer).double().eval())(X)


def test_dropout_inside_attention_and_recurrent_layers():
    for layer in (nn.MultiheadAttention(4, 2, dropout=0.2), nn.LSTM(4, 4, 2, dropout=0.2)):
        model = nn.ModuleDict({"inner": layer}).double().train()
        with refused(r"layer 'inner' .*dropout p=0\.2 active"):
            kernel(model)(X)


class Coupled(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(5, 2)

    def forward(self, x):
        return self.layer(self.how(x))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda x: x - x.mean(0),
            "changes by .* when the sample is evaluated alone; expected the same output in every batch",
        ),
        (lambda x: x.sort(0)[0], "changes by .* when the sample is evaluated alone"),
        (
            lambda x: x * torch.rand_like(x),
            "a forward pass that draws random numbers; expected the same output at every call",
        ),
        (lambda x: x * random.random(), "a forward pass that draws random numbers"),
        (lambda x: x / (x[:, :1] > 9), r"an output that is not finite \(sample 0 of a batch"),
    ],
)
def test_samples_that_mix_or_chance(how, message):
    with refused(message):
        kernel(Coupled(how).double())(X)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:0], "x1: got an empty set; expected at least one sample"),
        (
            torch.where(torch.arange(20).view(4, 5) == 13, torch.nan, X),
            r"x1: got nan at index \(2, 3\); expected finite values",
        ),
        (torch.where(torch.arange(20).view(4, 5) == 5, torch.inf, X), r"got inf at index \(1, 0\)"),
        (torch.where(torch.arange(20).view(4, 5) == 11, torch.nan, X).cfloat(), r"x1: got .*nan.* at index \(2, 1\)"),
        (
            [[1.0, 2.0]],
            r"x1\[0\]: got a list of float; expected a tensor or array with samples .*torch\.as_tensor",
        ),
        ((X, X[:3]), r"tensors with \[3, 4\] samples; expected one number of samples"),
        (
            torch.randn(4, 6).double(),
            r"got input \(\d, 6\) float64, on which its forward failed .*Check channels, sizes and dtype",
        ),
        (X.float(), r"got input \(\d, 5\) float32, on which its forward failed"),
    ],
    ids=["empty", "nan", "inf", "complex nan", "list", "ragged", "channels", "dtype"],
)
def test_input(x, message):
    with refused(message):
        kernel()(x)


def test_output():
    class Wrong(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how, self.layer = how, nn.Linear(5, 2)

        def forward(self, x):
            return self.how(self.layer(x))

    for how, message in (
        (lambda y: {"scores": y}, r"the model's output: got dict; expected a tensor. Pick a tensor with select=lambda"),
        (lambda y: y.mean(), r"got shape \(\) for \d samples"),
        (lambda y: y.T, r"got shape \(2, \d\) for \d samples; expected \(\d, \.\.\.\)"),
        (lambda y: torch.complex(y, y), r"got torch.complex128; expected real floating point.*view_as_real"),
        (lambda y: y.argmax(1), r"got torch.int64; expected real floating point"),
    ):
        with refused(message):
            kernel(Wrong(how).double())(X)
    assert kernel(Wrong(lambda y: {"logits": y}).double(), outputs=lambda y: y["logits"][:, 0])(X).shape == (4, 4)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-22, torch.float32), (1e-4, torch.float16)])
def test_values_too_small_for_their_precision(scale, dtype):
    model, x = nn.Linear(4, 2, bias=False), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * scale
    name = str(dtype).removeprefix("torch.")
    with refused(rf"the kernel: got values of .* in {name}; expected values above .*lose their digits.*float64"):
        kernel(model.to(dtype), outputs="trace")(x.to(dtype))
    expected = 2 * x.double() @ x.double().T
    assert torch.allclose(kernel(model.double(), outputs="trace")(x.double()), expected, rtol=1e-12, atol=0)


def test_an_expanded_place_for_the_result():
    with refused("out: got an expanded tensor; expected a place of its own for each value"):
        kernel(outputs="trace")(X, out=torch.zeros(1, 1, dtype=torch.float64).expand(4, 4))


def test_arguments():
    with refused(r"outputs: got 'traces'; expected a mode or a callable. Did you mean trace\?"):
        kernel(outputs="traces")
    with refused(r"outputs: got a callable that returned \(\d, 3\); expected one scalar per sample"):
        kernel(outputs=lambda y: y)(X)
    with refused("model: got function; expected a torch.nn.Module"):
        ntkit.TangentKernel(tiny_mlp().forward.__func__)
    with refused(r"params: got '0\.wieght'; expected a parameter's name. Did you mean 0\.weight"):
        kernel(params=["0.wieght"])
    for array in (torch.rand(40, 9), np.ones((40, 9))):  # of data in the place of a word
        with pytest.raises(ntkit.Refused) as caught:
            ntkit.TangentKernel(tiny_mlp(), array)
        assert len(str(caught.value)) < 250
        assert "..." in str(caught.value)
    with refused(r"params: got Parameter containing: tensor\(.* \.\.\.; expected") as caught:
        kernel(params=[nn.Parameter(torch.rand(30, 30))])
    assert len(str(caught.value)) < 300
    with refused("params: got no parameter; expected a predicate that accepts"):
        kernel(params=lambda name: False)
    with refused("params: got no parameter; expected a model with at least one parameter"):
        kernel(nn.ReLU())
    with refused("memory: got '2 parsecs'"):
        kernel(memory="2 parsecs")
    with refused("memory: got 0"):
        kernel(memory=0)
    with refused(r"memory: got '8'; expected a number with its unit. Such as '8 GB'."):
        kernel(memory="8")
    np.testing.assert_allclose(kernel(memory="30000000")(X), kernel()(X), rtol=1e-12)


def test_sets_that_do_not_go_together():
    with refused("x2: got 3 samples; expected 4, as x1"):
        kernel().paired(X, X[:3])
    model, _, _ = make("tokens through linear")
    with refused(r"x2: got 4 outputs; expected 6, as for x1"):
        kernel(model)(torch.randn(3, 3, 5).double(), torch.randn(3, 2, 5).double())


def test_operator():
    with refused('operator of outputs="diagonal": got one matrix per output'):
        kernel(outputs="diagonal").operator(X)
    with refused(r"vector: got shape \(5,\); expected \(12,\) or \(12, k\)"):
        kernel().operator(X) @ torch.ones(5)
