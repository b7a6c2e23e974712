"""Inputs, models and losses as people have them, from public reports: the right number, or a refusal that helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from situations import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import ntkit

SITUATIONS = Table()
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """A linear layer and others, called by a function."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(5, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.double().eval()
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


def by_autograd(model, x, pick=lambda out: out):
    """The kernel's traces by plain autograd, one sample and one output after the other."""
    own = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        out = pick(model(x[i : i + 1])).reshape(-1)
        grads = [torch.autograd.grad(o, own, retain_graph=True, allow_unused=True) for o in out]
        filled = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, own, strict=True)] for row in grads]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in filled]))
    J = torch.stack(rows)
    return torch.einsum("icp,jcp->ij", J, J).detach()


def check(model, x, pick=lambda out: out, **how) -> None:
    expected = by_autograd(model, x, pick)
    found = ntkit.TangentKernel(model, "trace", **how)(x)
    assert float((found - expected).abs().max()) <= 1e-13 * float(expected.abs().max())


def kernel(x, forward=lambda net, x: net.a(x), **layers):
    return ntkit.TangentKernel(Net(forward, **layers), "trace")(x)


# --- what models return and do ---


@SITUATIONS.of("meta-pytorch/captum#665", r"output: got list; expected a tensor. Pick a tensor with select=lambda")
def a_list_of_outputs(folder):
    kernel(X, lambda net, x: [net.a(x), net.a(x)])


@SITUATIONS.of("meta-pytorch/captum#1215")
def a_tuple_of_outputs_of_which_one_is_selected(folder):
    check(Net(lambda net, x: (torch.tanh(net.a(x)), None)), X, lambda out: out[0], select=lambda out: out[0])


@SITUATIONS.of("meta-pytorch/captum#745")
def a_layer_that_returns_none_beside_its_output(folder):
    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    check(Net(lambda net, x: net.a(torch.tanh(net.b(x)[0])), b=Layer(5, 5)), X)


@SITUATIONS.of("layumi/Person_reID_baseline_pytorch#77", r"got shape \(\) for 1 samples.* write squeeze\(-1\)")
def squeeze_without_an_axis(folder):
    kernel(X, lambda net, x: net.a(x)[:, :1].squeeze())


@SITUATIONS.of("f-dangel/backpack#248")
def one_layer_used_twice(folder):
    check(Net(lambda net, x: torch.tanh(net.a(x)) + net.a(x.flip(1))), X)


@SITUATIONS.of("pytorch/pytorch#80951")
def an_embedding_tied_to_the_last_layer(folder):
    net = Net(lambda net, x: net.out(torch.tanh(net.words(x))), words=nn.Embedding(10, 4), out=nn.Linear(4, 10))
    net.out.weight = net.words.weight
    check(net, torch.tensor([1, 3, 3, 0, 9, 2]))


@SITUATIONS.of("meta-pytorch/opacus#436")
def a_frozen_weight_with_a_trained_bias(folder):
    net = Net(lambda net, x: net.b(torch.tanh(net.a(x))), b=nn.Linear(3, 2))
    net.b.weight.requires_grad_(False)
    net.a.bias.requires_grad_(False)
    check(net, X)


@SITUATIONS.of("meta-pytorch/opacus#502")
def a_layer_that_is_never_used(folder):
    check(Net(lambda net, x: torch.tanh(net.a(x)), unused=nn.Linear(2, 10)), X)


@SITUATIONS.of("pytorch/functorch#381")
def an_addition_in_place_to_a_slice(folder):
    def forward(net, x):
        y = net.a(x)
        y[:, 0] += 3
        return y * y

    check(Net(forward), X)


@SITUATIONS.of("pytorch/pytorch#103329")
def outputs_written_into_zeros(folder):
    def forward(net, x):
        y = torch.zeros(len(x), 4, dtype=x.dtype)
        y[:, :3], y[:, 3] = net.a(x), torch.tanh(net.a(x)).sum(1)
        return y

    check(Net(forward), X)


@SITUATIONS.of("pytorch/pytorch#102223")
def checkpointing_without_reentrance(folder):
    check(Net(lambda net, x: torch.tanh(checkpoint(net.a, x, use_reentrant=False))), X)


@SITUATIONS.of("pytorch/pytorch#102223", r"got a reentrant checkpoint; .*use_reentrant=False")
def checkpointing_with_reentrance(folder):
    kernel(X, lambda net, x: net.b(checkpoint(net.b2, net.a(x), use_reentrant=True)), b=nn.Linear(3, 2), b2=nn.Tanh())


@SITUATIONS.of("MadryLab/trak#52")
def a_forward_that_unpacks_shapes_and_reads_numbers(folder):
    def forward(net, x):
        n, d = x.shape[:2]
        return net.a(x).view(n, -1) * int(d) * (2 if x.sum().item() > -1e9 else 1)

    check(Net(forward), X)


@SITUATIONS.of("pytorch/pytorch#101107")
def a_compiled_model(folder):
    check(torch.compile(Net(lambda net, x: torch.tanh(net.a(x))), backend="eager"), X)


@SITUATIONS.of("pytorch/pytorch#130932")
def a_model_in_data_parallel(folder):
    check(nn.DataParallel(Net(lambda net, x: torch.tanh(net.a(x)))), X)


# --- what goes in ---


@SITUATIONS.of("aleximmer/Laplace#283")
def a_list_of_tensors_of_different_shapes_as_one_argument(folder):
    parts = [X[:, :1], X[:, 1:3].view(6, 2, 1), X[:, 3:]]
    found = kernel((parts,), lambda net, xs: net.a(torch.cat([part.flatten(1) for part in xs], 1)))
    assert torch.allclose(found, 3 * (X @ X.T + 1), rtol=1e-14)


@SITUATIONS.of("aleximmer/Laplace#283", r"takes 2 positional arguments but 4 .*Give the arguments that its forward")
def a_list_of_tensors_for_a_model_of_one_argument(folder):
    kernel([X, X, X])


@SITUATIONS.of("mosaicml/composer#985", r"unexpected keyword argument 'labels'.* Give the arguments that its forward t")
def a_loader_of_dicts_with_labels_that_the_model_does_not_take(folder):
    items = [{"x": row, "labels": torch.tensor(0)} for row in X]
    kernel(DataLoader(Items(items), batch_size=2))


@SITUATIONS.of("pytorch/pytorch#30303")
def an_expanded_input_through_einsum(folder):
    check(Net(lambda net, x: torch.tanh(torch.einsum("nd,cd->nc", x, net.a.weight))), X[:1].expand(6, 5))


@SITUATIONS.of("rahul-goel/fused-ssim#44")
def images_that_are_a_view_of_channels_last(folder):
    net = Net(lambda net, x: torch.tanh(net.c(x)).flatten(1), c=nn.Conv2d(2, 2, 3))
    check(net, torch.randn(6, 5, 5, 2).double().permute(0, 3, 1, 2))


@SITUATIONS.of("pytorch/pytorch#191678")
def channels_last_and_max_pooling(folder):
    net = Net(lambda net, x: F.max_pool2d(net.c(x), 2).flatten(1), c=nn.Conv2d(2, 2, 3))
    images = torch.randn(6, 2, 5, 5).double().to(memory_format=torch.channels_last)
    check(net.to(memory_format=torch.channels_last), images)


@SITUATIONS.of("pytorch/pytorch#94805")
def complex_inputs(folder):
    net = Net(lambda net, x: (x @ net.a.weight.T.to(torch.complex128)).abs())
    check(net, torch.complex(X, X.flip(1)))


@SITUATIONS.of("cositools/cosipy#636")
def an_array_of_the_other_byte_order(folder):
    assert torch.equal(kernel(X.numpy().astype(">f8")), kernel(X))


@SITUATIONS.of("fastai/course22#99", r"an array of float128|an array of longdouble; .*astype\('float64'\)")
def an_array_of_long_doubles(folder):
    if np.dtype(np.longdouble).itemsize == 8:
        raise ntkit.Refused("got an array of longdouble; expected no such machine. array.astype('float64')")
    kernel(X.numpy().astype(np.longdouble))


@SITUATIONS.of("skorch-dev/skorch#494", r"x1: got Frame; .*Pass x\.to_numpy\(\)")
def a_table_of_pandas(folder):
    class Frame:
        def to_numpy(self):
            return X.numpy()

    kernel(Frame())


@SITUATIONS.of("skorch-dev/skorch#19", r"x1: got csr_matrix; .*Pass x\.toarray\(\)")
def a_sparse_matrix_of_scipy(folder):
    kernel(pytest.importorskip("scipy.sparse").csr_matrix(X.numpy()))


@SITUATIONS.of("fastai/course22#99", r"x1: got an array of object; .*array\.astype\('float64'\)")
def an_array_of_objects(folder):
    kernel(X.numpy().astype(object))


@SITUATIONS.of("facebookresearch/multimodal#354", r"tensors with \[1, 6\] samples; .*x1\['p'\]\): t\.expand\(n, ")
def positions_that_are_the_same_for_all_samples(folder):
    kernel({"x": X, "p": torch.arange(5)[None]}, lambda net, x, p: net.a(x + p))


@SITUATIONS.of("pytorch/pytorch#40717", r"a tensor without axes; .*It is x1\['scale'\]; pass .* as a number")
def an_option_of_the_model_as_a_tensor(folder):
    kernel({"x": X, "scale": torch.tensor(2.0)}, lambda net, x, scale: net.a(x) * scale)


class Items(Dataset):
    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


@SITUATIONS.of("pytorch/pytorch#74337", r"samples 0 to 5: got .*NoneType; expected samples that can be put together")
def a_dataset_with_a_missing_sample(folder):
    kernel(Items([*X[:3], None, *X[4:]]))


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 6

    def __iter__(self):
        return iter((row, 0) for row in X)


@SITUATIONS.of("huggingface/transformers#8087", "got Stream, a stream without places")
def a_stream_with_a_length(folder):
    kernel(Stream())


@SITUATIONS.of("pytorch/pytorch#9171", "got a DataLoader with WeightedRandomSampler; expected the samples in the order")
def a_loader_that_draws_by_weights(folder):
    kernel(DataLoader(TensorDataset(X), 2, sampler=WeightedRandomSampler([1.0] * 6, 6)))


# --- losses ---


def trained(loss, y, outputs=1):
    torch.manual_seed(0)
    return ntkit.train(nn.Linear(5, outputs).double(), (X, y), loss, lambda p: torch.optim.SGD(p, lr=0.1), steps=2)


@SITUATIONS.of("pytorch/pytorch#16045", r"outputs \[6, 1\] and targets \[6\], which it compares .*reshape\(-1, 1\)")
def mean_squares_of_a_column_and_a_row(folder):
    trained(F.mse_loss, X[:, 0])


@SITUATIONS.of("Photon-AI-Research/NeuralSolvers#20", r"which it compares each with each; .*reshape\(-1, 1\)")
def differences_by_hand_of_a_column_and_a_row(folder):
    trained(lambda out, y: (out - y).abs().mean(), X[:, 0])


@SITUATIONS.of("deepset-ai/FARM#229", r"which it compares each with each; .*shape \[6\]: y\.reshape\(-1\)")
def squeezed_outputs_and_a_column(folder):
    trained(lambda out, y: F.smooth_l1_loss(out[:, 0], y), X[:, :1])


@SITUATIONS.of("pytorch/pytorch#16045")
def targets_in_the_shape_of_the_outputs_or_compared_in_pairs_on_purpose(folder):
    first = trained(F.mse_loss, X[:, :1]).losses
    assert torch.equal(first, trained(lambda out, y: F.mse_loss(out[:, 0], y), X[:, 0]).losses)
    pairs = lambda out, y: F.softplus((out.T - out) * (y[:, None] - y)).mean()
    assert trained(pairs, X[:, 0]).status == "complete"


@SITUATIONS.of("pytorch/pytorch#1939", r"failed on outputs \[6, 1\] float64 and targets \[6\] float64, 0 to 1 \(Target")
def binary_entropy_of_a_column_and_a_row(folder):
    trained(F.binary_cross_entropy_with_logits, (X[:, 0] > 0).double())


@SITUATIONS.of("pytorch/pytorch#15666", r"failed on outputs \[6, 3\] float64 and targets \[6\] int64, 1 to 3 \(Target")
def labels_that_begin_at_one(folder):
    trained(F.cross_entropy, torch.arange(6) % 3 + 1, 3)


@SITUATIONS.of("skorch-dev/skorch#137")
def numpy_arrays_as_data(folder):
    y = torch.arange(6) % 3
    run = ntkit.train(
        nn.Linear(5, 3).double(), (X.numpy(), y.numpy()), F.cross_entropy, lambda p: torch.optim.SGD(p, 0.1), steps=1
    )
    assert run.status == "complete"


@SITUATIONS.parametrized()
def test_situations(situation, tmp_path):
    situation.check(tmp_path)
