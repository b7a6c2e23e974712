"""What a function computes, as a text: two that differ by an enclosed value are two, in folders, too."""

import dataclasses
import enum
import functools
import logging
import operator
import subprocess
import sys
import types
from collections import deque, namedtuple
from fractions import Fraction
from types import FunctionType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.base.function_identity import function_identity, module_identity

ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6])
Named = namedtuple("Named", "weight")


class Weighs:
    def __init__(self, weight):
        self.weight, self.itself = weight, self

    def __call__(self, out):
        return out @ self.weight

    def apply(self, out):
        return out @ self.weight


def enclosed(value):
    return lambda out: (out, value)


def default(value):
    return lambda out, weight=value: out @ weight


def keyword(value):
    def function(out, *, weight=value):
        return out @ weight

    return function


def inner(value):
    def function(out):
        return (lambda one: one @ value)(out)

    return function


def calls_itself(value):
    def function(out):
        return function(out[1:]) @ value

    return function


def called(value):
    inside = enclosed(value)
    return lambda out: inside(out)


def of_module(value, code="lambda out: out @ weight"):
    """A function that reads a name of its module."""
    names = {"weight": value, "other": torch.randn(2)}
    return eval(code, names)


def helper_of_module(value):
    names = {"weight": value}
    exec("def helper(out):\n    return out @ weight\nfunction = lambda out: helper(out)", names)
    return names["function"]


def frozen(value):
    net = nn.Linear(2, 1, bias=False).requires_grad_(False)
    net.weight.copy_(value)
    return lambda out: net(out)


MAKE = {
    "enclosed": enclosed,
    "in a list": lambda value: enclosed([1, value]),
    "in a tuple with names": lambda value: enclosed(Named(value)),
    "in a dict": lambda value: enclosed({"weight": value}),
    "an array": lambda value: enclosed(value.numpy()),
    "that takes gradients": lambda value: enclosed(value.clone().requires_grad_()),
    "complex, conjugated": lambda value: enclosed(torch.complex(value, value).conj()),
    "default": default,
    "keyword default": keyword,
    "of a function within": inner,
    "of a recursion": calls_itself,
    "of a function that is called": called,
    "of the module": of_module,
    "of the module, within": lambda value: of_module(value, "lambda out: [one @ weight for one in out]"),
    "of a function of the module": helper_of_module,
    "of an object": Weighs,
    "of a method": lambda value: Weighs(value).apply,
    "of an enclosed object": lambda value: enclosed(Weighs(value)),
    "of a loss": lambda value: nn.CrossEntropyLoss(weight=value),
    "of an enclosed loss": lambda value: enclosed(nn.CrossEntropyLoss(weight=value)),
    "of a network that is not trained": frozen,
    "of a partial function": lambda value: functools.partial(F.cross_entropy, weight=value),
    "of an enclosed partial function": lambda value: enclosed(functools.partial(F.cross_entropy, weight=value)),
    "of a method of its own": lambda value: value.matmul,
}


@pytest.mark.parametrize("kind", MAKE)
def test_tensors_count_by_their_values(kind):
    one, again, two = (function_identity(MAKE[kind](value.clone())) for value in (ONE, ONE, TWO))
    assert one == again
    assert one != two
    assert function_identity(enclosed(ONE)) != function_identity(enclosed(ONE.double()))


def test_other_settings():
    a_list: list = [1]
    a_list.append(a_list)
    different = [
        operator.itemgetter(0),
        operator.itemgetter(1),
        operator.attrgetter("logits"),
        torch.sum,
        torch.logsumexp,
        functools.partial(torch.sum, dim=1),
        functools.partial(torch.sum, dim=0),
        enclosed(a_list),
        enclosed(1.0),
        enclosed(True),
        enclosed(nn.CrossEntropyLoss()),
        enclosed(nn.CrossEntropyLoss(label_smoothing=0.1)),
        enclosed(ONE.to_sparse()),
        of_module(2.0, "lambda out: out * weight"),
        of_module(3.0, "lambda out: out * weight"),
    ]
    texts = [function_identity(function) for function in different]
    assert len(set(texts)) == len(texts)
    assert function_identity(of_module(ONE, "lambda out: out.other")) == function_identity(
        of_module(TWO, "lambda out: out.other")
    )  # the name of an attribute is none of the module


def test_a_network_in_training_is_the_same_function_at_each_call():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    function = lambda out: net(out)
    before = function_identity(function)
    with torch.no_grad():
        net[0].weight.add_(1)
    assert function_identity(function) == before
    net.eval()
    assert function_identity(function) == before
    net.append(nn.Linear(2, 1))
    assert function_identity(function) != before


def test_an_unbound_name_and_a_function_without_a_module():
    def outer():
        function = lambda out: later(out)
        text = function_identity(function)
        later = None
        assert isinstance(function, FunctionType)
        return text, later

    assert outer()[0]


def test_the_same_in_every_process():
    code = (
        "import functools, torch\n"
        "from ntkit.base.function_identity import function_identity\n"
        "class A:\n"
        "    def __init__(self): self.w = torch.ones(3)\n"
        "    def f(self, out): return out @ self.w\n"
        "w, s = torch.ones(3), 2.0\n"
        "helper = lambda out: out @ w\n"
        "for f in (lambda out: s * helper(out), A().f, functools.partial(torch.sum, dim=1), torch.nn.MSELoss()):\n"
        "    print(function_identity(f))\n"
    )
    texts = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0].split("\n"))) == 5


def test_kernels_with_other_functions_are_other_kernels():
    torch.manual_seed(0)
    net, x = nn.LSTM(3, 2, batch_first=True).double(), torch.randn(4, 2, 3).double()
    K = torch.eye(4, dtype=torch.float64)
    last = lambda pick: ntkit.Gram(K, ntkit.TangentKernel(net, lambda out: out.sum((1, 2)), select=pick), x).identity
    assert last(operator.itemgetter(0)) == last(operator.itemgetter(0))
    assert last(operator.itemgetter(0)) != last(operator.itemgetter(1))


def test_folders_of_another_enclosed_tensor_are_refused(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def loss_of(w):  # no training example is of the last class: the run is the same whatever its weight
        return lambda out, y: (F.cross_entropy(out, y, reduction="none") * w[y]).mean()

    def scalar_of(w):
        return lambda out: out @ w

    one = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    two = torch.tensor([1.0, 2.0, 3.0 + 1e-6], dtype=torch.float64)  # so little that numbers alone would hardly tell
    run = ntkit.train(net, (x, y), loss_of(one), lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
    test, labels, decompose = (
        x[:1],
        torch.tensor([2]),
        lambda path, **options: ntkit.PathKernel(run, **options).decompose(x[:1], path=path),
    )
    again = lambda path, y=None, **options: ntkit.Retrainings(run, test, y, path=path, **options).without([[0]])
    track = lambda path, **options: ntkit.track(run, x, y, model=net, k=1, path=path, **options)
    calls = {
        "track, loss": lambda w, path: track(path, loss=loss_of(w)),
        "track, outputs": lambda w, path: track(path, outputs=scalar_of(w)),
        "track, select": lambda w, path: track(path, select=lambda out: out * w),
        "path, outputs": lambda w, path: decompose(path, outputs=scalar_of(w)),
        "path, loss": lambda w, path: decompose(path, loss=loss_of(w)),
        "again, measure": lambda w, path: again(path, measure=scalar_of(w)),
        "again, loss": lambda w, path: again(path, labels, measure="loss", loss=loss_of(w)),
    }
    messages = {
        "track": "got a tracking with another",
        "path": "got another decomposition",
        "again": "got retrainings of something else",
    }
    for name, call in calls.items():
        call(one, tmp_path / name)
        call(one.clone(), tmp_path / name)
        with pytest.raises(ntkit.Refused) as refused:
            call(two, tmp_path / name)
        assert messages[name.partition(",")[0]] in str(refused.value), name
    whole = lambda out: 1.0 * out
    for name, call in {"track": track, "path": decompose, "again": again}.items():
        call(tmp_path / f"{name}, some", select=whole)
        call(tmp_path / f"{name}, none")
        with pytest.raises(ntkit.Refused, match=messages[name]):
            call(tmp_path / f"{name}, some")
        with pytest.raises(ntkit.Refused, match=messages[name]):
            call(tmp_path / f"{name}, none", select=whole)


class Configured(nn.Module):
    """A network whose numbers are in an object of some kind."""

    def __init__(self, given):
        super().__init__()
        self.layer, self.given = nn.Linear(2, 1, bias=False), given


@dataclasses.dataclass
class Settings:
    scale: float


class Holder:
    def __init__(self, scale):
        self.scale, self.itself = scale, self
        self.weights = torch.full((2,), scale) if isinstance(scale, float) else None


class Slotted:
    __slots__ = ("__hidden", "weight")

    def __init__(self, weight):
        self.weight, self.__hidden = 1.0, weight

    def __call__(self, out):
        return out * self.__hidden


class Attributed(dict):
    pass


def attributed(scale):
    given = Attributed(a=1)
    given.scale = scale
    return given


class Color(enum.Enum):
    RED, BLUE = 1, 2


def with_class(scale, how):
    """A network of a class that has the number in its body."""

    def act(h):
        return h * scale

    bodies = {
        "attribute": {"scale": scale},
        "static method": {"act": staticmethod(act)},
        "property": {"scale": property(lambda self: scale)},
        "cached property": {"scale": functools.cached_property(lambda self: scale)},
    }
    return type("OfClass", (Configured,), bodies[how])(None)


def with_hook(scale, where):
    net = Configured(None)
    {
        "parameter": net.layer.weight.register_hook,
        "layer": net.layer.register_full_backward_hook,
        "before a layer": net.layer.register_full_backward_pre_hook,
    }[where](lambda *of: scale)
    return net


NETWORKS = {
    "data class": lambda v: Configured(Settings(v)),
    "data class in a list": lambda v: Configured([Settings(v)]),
    "namespace": lambda v: Configured(types.SimpleNamespace(scale=v)),
    "object": lambda v: Configured(Holder(v)),
    "object in an object": lambda v: Configured(Holder(Holder(v))),
    "object in a list": lambda v: Configured([Holder(v)]),
    "object in a dict": lambda v: Configured({"a": Holder(v)}),
    "object in a list of an object": lambda v: Configured(Holder([Holder(v)])),
    "dict with attributes": lambda v: Configured(attributed(v)),
    "deque": lambda v: Configured(deque([v])),
    "deque in an object": lambda v: Configured(Holder(deque([Holder(v)]))),
    "slots": lambda v: Configured(Slotted(v)),
    "set": lambda v: Configured({v, "a", "b"}),
    "slice": lambda v: Configured(slice(0, int(v))),
    "range": lambda v: Configured(range(int(v))),
    "dtype": lambda v: Configured(torch.float32 if v == 2.0 else torch.float64),
    "enum": lambda v: Configured(Color(int(v) - 1)),
    "fraction": lambda v: Configured(Fraction(v)),
    **{f"class: {how}": lambda v, how=how: with_class(v, how)
       for how in ("attribute", "static method", "property", "cached property")},
    **{f"gradient hook: {where}": lambda v, where=where: with_hook(v, where)
       for where in ("parameter", "layer", "before a layer")},
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_with_other_settings_are_other_networks(kind):
    one, again, two = ("\n".join(module_identity(NETWORKS[kind](value))) for value in (2.0, 2.0, 3.0))
    assert one == again
    assert one != two


def test_objects_of_other_packages_within_objects_count_by_their_types():
    """A logger holds all loggers of the process, a trainer its clock: the same network would be another one later."""
    one, two = (Configured(Holder(logging.Logger(name))) for name in ("one", "two"))
    assert list(module_identity(one)) == list(module_identity(two))


def test_callable_objects_with_slots():
    assert function_identity(Slotted(2.0)) == function_identity(Slotted(2.0)) != function_identity(Slotted(3.0))
    assert function_identity(enclosed(deque([1.0]))) != function_identity(enclosed(deque([2.0])))
