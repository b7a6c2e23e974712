"""What users pass as a batch, and what models return."""

from __future__ import annotations

import math
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.jacobian.oracle import tangent_kernel as oracle


class Reader(nn.Module):
    """Tokens to outputs; its options change the function."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out, self.other = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, twice=False, scale=1.0, past=None, mode="out"):
        h = self.embedding(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        if past is not None:
            h = h + past[0][:, None] * past[1][:, None]
        return (self.other if mode == "other" else self.out)(h.mean(1)) * scale * (2 if twice else 1)


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader().double()


IDS = torch.randint(0, 9, (7, 5), generator=torch.Generator().manual_seed(0))
MASK = (IDS > 2).double()
PAST = [torch.linspace(-1, 1, 28).view(7, 4).double(), torch.linspace(1, 2, 28).view(7, 4).double()]


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


BATCHES = {
    "a mapping": UserDict(input_ids=IDS),
    "a read-only mapping": MappingProxyType({"input_ids": IDS, "attention_mask": MASK}),
    "None": {"input_ids": IDS, "attention_mask": None},
    "None in a tuple": (IDS, None, True),
    "a flag": {"input_ids": IDS, "twice": True},
    "a number": {"input_ids": IDS, "scale": 3.0},
    "a text": {"input_ids": IDS, "mode": "other"},
    "arrays": {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()},
    "a list of tensors": {"input_ids": IDS, "past": PAST},
    "a tuple of arrays": {"input_ids": IDS, "past": tuple(t.numpy() for t in PAST)},
    "a list": [IDS, MASK],
}


def plain(x):
    """The same batch as a function of the tokens alone."""
    args = x if isinstance(x, (list, tuple)) else ()
    kwargs = dict(x) if not args else {}
    tensor = lambda v: torch.as_tensor(v) if isinstance(v, np.ndarray) else v
    every = lambda v: [tensor(t) for t in v] if isinstance(v, (list, tuple)) else tensor(v)
    return [every(v) for v in args], {k: every(v) for k, v in kwargs.items()}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_kernels_of_all_forms_equal_plain_autograd(reader, name, outputs):
    args, kwargs = plain(BATCHES[name])
    rows = []
    out = reader(*args, **kwargs)
    for i in range(7):
        for c in range(3):
            grads = torch.autograd.grad(out[i, c], list(reader.parameters()), retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros(p.numel()).double() if g is None else g.flatten()
                        for g, p in zip(grads, reader.parameters(), strict=True)
                    ]
                )
            )
    J = torch.stack(rows).view(7, 3, -1)
    full = torch.einsum("icp,jdp->ijcd", J, J)
    expected = full if outputs == "full" else full.diagonal(dim1=2, dim2=3).sum(-1)
    kernel = ntkit.TangentKernel(reader, outputs)
    close(kernel(BATCHES[name]), expected)
    close(kernel.diagonal(BATCHES[name]), expected.diagonal().movedim(-1, 0))


def test_one_kernel_with_two_values_of_a_flag(reader):
    """What is known of a graph depends on the flags."""
    kernel = ntkit.TangentKernel(reader, "trace")
    once = kernel({"input_ids": IDS, "twice": False})
    close(kernel({"input_ids": IDS, "twice": True}), 4 * once)
    close(kernel({"input_ids": IDS, "twice": False}), once)
    other = kernel({"input_ids": IDS, "mode": "other"})
    close(other, ntkit.TangentKernel(reader, "trace")({"input_ids": IDS, "mode": "other"}))
    close(kernel({"input_ids": IDS[:3], "twice": True}, {"input_ids": IDS, "twice": False}), 2 * once[:3])


def test_arrays_and_memory_mapped_files(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3))
    np.save(tmp_path / "x.npy", x)
    net = nn.Linear(3, 2).double()
    kernel = ntkit.TangentKernel(net, "trace")
    expected = kernel(torch.from_numpy(x))
    for array in (x, np.load(tmp_path / "x.npy", mmap_mode="r"), x[::-1][::-1], np.asfortranarray(x)):
        assert torch.equal(kernel(array), expected)
    close(kernel(x[:, ::-1]), kernel(torch.from_numpy(x[:, ::-1].copy())))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, r"x1\['input_ids'\]\[0\]: got a list of int"),
        ({"input_ids": [1, 2]}, r"x1\['input_ids'\]: got a list of int"),
        ({"input_ids": None}, "x1: got dict without tensors"),
        ((), "x1: got tuple without tensors"),
        (3.0, "x1: got float without tensors"),
        (np.array(["a", "b"]), "x1: got an array of <U1"),
        ({"input_ids": IDS, "cache": object()}, r"x1\['cache'\]: got object"),
        ({"input_ids": torch.tensor(3)}, "x1: got a tensor without axes"),
        ({"input_ids": IDS, "attention_mask": MASK[:5]}, r"tensors with \[5, 7\] samples"),
        ({"input_ids": IDS, "past": [PAST[0], PAST[1][:3]]}, r"tensors with \[3, 7\] samples"),
    ],
)
def test_refusals(reader, x, message):
    with pytest.raises(ntkit.Refused, match=message):
        ntkit.TangentKernel(reader, "trace")(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, mask):
        return self.out((torch.softmax(self.query(x) @ x.transpose(1, 2) + mask[:, None], -1) @ x).mean(1))


def test_infinite_masks_are_taken_where_the_outputs_are_finite():
    torch.manual_seed(0)
    net, x = Attention().double(), torch.randn(5, 3, 4).double()
    mask = torch.zeros(5, 3).double()
    mask[1:, 2] = -torch.inf
    kernel = ntkit.TangentKernel(net, "trace")
    far = torch.where(mask == 0, 0.0, -1e9)  # exp(-1e9) is zero in float64
    close(kernel((x, mask)), kernel((x, far)))
    close(kernel((x, mask)), oracle(net, (x, mask), None, "trace"))
    with pytest.raises(ntkit.Refused, match="an output that is not finite"):
        kernel((x, torch.full((5, 3), -torch.inf).double()))  # softmax of nothing
    mask[0, 0] = torch.nan
    with pytest.raises(ntkit.Refused, match=r"nan at index \(0, 0\)"):
        kernel((x, mask))
    with pytest.raises(ntkit.Refused, match=r"inf at index \(0, 0\)"):  # a limit has no outputs to look at
        ntkit.InfiniteKernel(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))(torch.tensor([[torch.inf, 0]]))


def test_labels_in_a_closure_are_refused_with_the_way_out():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = lambda out: nn.functional.cross_entropy(out, y, reduction="none")
    with pytest.raises(ntkit.Refused, match=r"outputs: got a callable that failed .* Labels belong into the batch"):
        ntkit.TangentKernel(net, losses)(x)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return nn.functional.cross_entropy(self.net(x), y, reduction="none")

    slopes = torch.softmax(net(x), 1) - nn.functional.one_hot(y)
    expected = (slopes @ slopes.T) * (x @ x.T + 1)
    close(ntkit.TangentKernel(WithLoss(), "trace")((x, y)), expected.detach())


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Rich(nn.Module):
    """Returns more than a tensor, in one of several forms."""

    def __init__(self, form) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(3, 5), nn.Linear(5, 2), form

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.form(self.b(h), h)


FORMS = {
    "a data class": Output,
    "a namespace": lambda logits, hidden: SimpleNamespace(logits=logits, hidden=hidden),
    "a dict": lambda logits, hidden: {"hidden": hidden, "logits": logits},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_default_and_select_picks_another_part(form):
    torch.manual_seed(0)
    net, x = Rich(FORMS[form]).double(), torch.randn(6, 3).double()
    bare = Rich(lambda logits, hidden: logits).double()
    bare.load_state_dict(net.state_dict())
    hidden = Rich(lambda logits, hidden: hidden).double()
    hidden.load_state_dict(net.state_dict())
    of = lambda out: out["hidden"] if isinstance(out, dict) else out.hidden
    for mode in ("full", "diagonal", "trace", "sum"):
        assert torch.equal(ntkit.TangentKernel(net, mode)(x), ntkit.TangentKernel(bare, mode)(x))
        assert torch.equal(ntkit.TangentKernel(net, mode, select=of)(x), ntkit.TangentKernel(hidden, mode)(x))
    sketch = ntkit.SketchedKernel(net, 16, select=of)(x)
    assert torch.equal(sketch, ntkit.SketchedKernel(hidden, 16)(x))
    assert not net._forward_hooks  # the user's model is as it was
    kernel = ntkit.TangentKernel(net, "trace", select=of)
    before = kernel(x)
    with torch.no_grad():
        net.a.weight.mul_(2)
    assert not torch.allclose(kernel(x), before)  # at its current parameters
    assert list(kernel.layers(x)) == ["a.weight", "a.bias", "b.weight", "b.bias"]  # under the model's names


def test_a_tuple_needs_select():
    net, x = nn.LSTM(3, 4, batch_first=True).double(), torch.randn(5, 2, 3).double()
    with pytest.raises(ntkit.Refused, match=r"the model's output: got tuple; .* select=lambda"):
        ntkit.TangentKernel(net, "trace")(x)
    last = ntkit.TangentKernel(net, "trace", select=lambda out: out[0][:, -1])(x)
    close(last, _last(net, x))
    with pytest.raises(ntkit.Refused, match="select: got 'logits'"):
        ntkit.TangentKernel(net, "trace", select="logits")


def _last(net, x):
    out = net(x)[0][:, -1]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out[i, c], list(net.parameters()), retain_graph=True)])
        for i in range(len(x))
        for c in range(4)
    ]
    J = torch.stack(rows).view(len(x), -1)
    return J @ J.T


def test_datasets_and_loaders_in_their_order():
    from torch.utils.data import DataLoader, Subset, TensorDataset

    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), torch.randn(10, 3).double(), torch.arange(10) % 2
    kernel = ntkit.TangentKernel(net, "trace")
    expected = kernel(x)
    pairs = TensorDataset(x, y)
    for source in (pairs, TensorDataset(x), DataLoader(pairs, batch_size=4), Subset(pairs, range(10))):
        assert torch.equal(kernel(source), expected)
        assert torch.equal(kernel.diagonal(source), kernel.diagonal(x))
    assert torch.equal(kernel(DataLoader(pairs, 3), x[:4]), kernel(x, x[:4]))
    with pytest.raises(ntkit.Refused, match="got a DataLoader with RandomSampler"):
        kernel(DataLoader(pairs, batch_size=4, shuffle=True))
    with pytest.raises(ntkit.Refused, match="got a DataLoader that drops samples"):
        kernel(DataLoader(pairs, batch_size=4, drop_last=True))


def test_as_the_kernel_of_scikit_learn():
    from sklearn.svm import SVC

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    X = np.random.default_rng(0).normal(size=(30, 4))
    y = (X[:, 0] > 0).astype(int)
    kernel = ntkit.TangentKernel(net, "trace")
    machine = SVC(kernel=kernel).fit(X, y)
    other = SVC(kernel="precomputed").fit(kernel(X).numpy(), y)
    np.testing.assert_allclose(
        machine.decision_function(X[::2]), other.decision_function(kernel(X[::2], X).numpy()), atol=1e-10
    )


class Switched(nn.Module):
    """Its outermost module has a mode and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.number = nn.Linear(3, 2), 1.0

    def forward(self, x):
        y = self.layer(x) * self.number
        return (y if self.training else 10 * y), None


def test_select_sees_the_model_as_it_is_now():
    torch.manual_seed(0)
    net, x = Switched().double().train(), torch.randn(4, 3).double()
    kernel = ntkit.TangentKernel(net, "trace", select=lambda out: out[0])
    first = kernel(x)
    net.eval()
    close(kernel(x), 100 * first)
    net.number = 3.0
    close(kernel(x), 900 * first)
    handle = net.register_forward_hook(lambda module, args, out: (2 * out[0], None))
    close(kernel(x), 3600 * first)
    handle.remove()
    close(kernel(x), 900 * first)
    net.layer = nn.utils.parametrizations.weight_norm(net.layer)
    assert torch.isfinite(kernel(x)).all()
    for select, message in (
        (lambda out: out[1], "select: got a function that returned None"),
        (lambda out: out.absent, r"select: got a function that failed on the model's output, tuple"),
        (lambda out: out[7], r"select: got a function that failed"),
    ):
        with pytest.raises(ntkit.Refused, match=message):
            ntkit.TangentKernel(net, "trace", select=select)(x)
        with pytest.raises(ntkit.Refused, match=message):
            ntkit.SketchedKernel(net, 8, select=select)(x)
    one, other = (ntkit.TangentKernel(net, select=lambda out, i=i: out[i]) for i in range(2))
    assert one.settings().keys() == {"model", "outputs", "parameters", "select"}
    assert ntkit.Gram(first, one, x).identity != ntkit.Gram(first, other, x).identity


class Tells(nn.Module):
    """Tells a list from a tuple, and an empty one from none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, extra=None, scale=1.0):
        factor = 2.0 if extra is None else 1.0 if isinstance(extra, list) else 3.0
        return torch.tanh(self.layer(x)) * factor * math.copysign(1.0, scale)


def test_forms_and_constants_of_two_sets_are_kept_apart():
    torch.manual_seed(0)
    net, x = Tells().double(), torch.randn(5, 3).double()
    kernel = ntkit.TangentKernel(net, "trace")
    base = ntkit.TangentKernel(net, "trace")({"x": x, "extra": []})
    close(kernel({"x": x}, {"x": x, "extra": []}), 2 * base)
    close(kernel({"x": x, "extra": []}, {"x": x}), 2 * base)
    close(kernel({"x": x, "extra": [x]}, {"x": x, "extra": (x,)}), 3 * base)
    close(kernel({"x": x, "extra": [], "scale": 0.0}, {"x": x, "extra": [], "scale": -0.0}), -base)
    Pair = namedtuple("Pair", "first second")
    close(kernel({"x": x, "extra": Pair(x, x)}), 9 * base)
    with pytest.raises(ntkit.Refused, match=r"x1: got the key 1; expected texts as keys"):
        kernel({1: x, "1": x})
    with pytest.raises(ntkit.Refused, match="a masked array, whose mask would be lost"):
        kernel(np.ma.masked_array(x.numpy(), mask=x.numpy() > 0))
    with pytest.raises(ntkit.Refused, match=r"got float64 of numpy; .* Convert it with float"):
        kernel({"x": x, "scale": np.float64(2)})


def test_infinite_input_whose_gradient_is_not_finite_is_refused():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, a, b):
            return torch.tanh(self.one(a)) + torch.tanh(self.two(b))

    torch.manual_seed(0)
    kernel = ntkit.TangentKernel(Sum().double(), "trace")
    a, b = torch.randn(50, 2).double(), torch.randn(50, 2).double()
    assert torch.isfinite(kernel((a, b))).all()
    b[7, 0] = torch.inf
    for call in (lambda: kernel((a, b)), lambda: kernel.diagonal((a, b)), lambda: kernel.paired((a, b), (a, b))):
        with pytest.raises(ntkit.Refused, match="an infinite input, on which the outputs are finite"):
            call()
