"""Batches of samples: the arguments of a model's call.

A tensor (``model(x)``), a tuple (``model(*x)``) or a dict (``model(**x)``). Their entries are tensors with samples
along the first axis, lists, tuples or dicts of such tensors, or constants (None, True, False, a number, a text): the
same for all samples, and passed on as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ntkit.base.checks import refusal
from ntkit.base.numbers import check_dense, refuse_masked

Batch = Any  # Tensor | tuple[Any, ...] | dict[str, Any]

_LONG = "gG"  # codes of numpy's long double and its complex form, which torch does not have
_CONSTANT = (type(None), bool, int, float, str, torch.dtype, torch.device)
_NESTED = (Tensor, np.ndarray, Mapping, list, tuple, type(None))
_EXPECTED = "a tensor or array with samples along its first axis, or a tuple or dict of such"


def leaves(x: Batch) -> list[Tensor]:
    """Tensors of a batch."""
    if isinstance(x, Tensor):
        return [x]
    return [tensor for _, tensor in _walk(x, "") if isinstance(tensor, Tensor)]


def named_leaves(x: Batch) -> dict[str, Any]:
    """Tensors, constants and forms by place: "0", "1" ... of a tuple, names of a dict, "past[0]" inside of an entry."""
    return {"0": x} if isinstance(x, Tensor) else dict(_walk(x, ""))


def _walk(x: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(x, (tuple, list, dict)):
        if place:  # a form of its own: a model may tell a list from a tuple, and an empty one from none
            yield f"{place}[]", f"{type(x).__name__} of {len(x)}"
        for name, entry in x.items() if isinstance(x, dict) else enumerate(x):
            yield from _walk(entry, f"{place}[{name!r}]" if place else str(name))
    else:
        yield place, x


def with_leaves(x: Batch, tensors: list[Tensor]) -> Batch:
    """Batch like `x` with other tensors."""
    if isinstance(x, Tensor):
        return tensors[0]
    following = iter(tensors)
    result = mapped(x, lambda entry: next(following) if isinstance(entry, Tensor) else entry)
    if next(following, None) is not None:
        raise ValueError("more tensors than places")
    return result


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """The same tuples, lists and dicts (of any mapping) with the function's values of their entries."""
    if isinstance(x, Mapping):
        return {name: mapped(entry, function) for name, entry in x.items()}
    if isinstance(x, (tuple, list)):
        entries = [mapped(entry, function) for entry in x]
        return type(x)(*entries) if hasattr(x, "_fields") else type(x)(entries)
    return function(x)


def call_with(function: Callable[..., Any], x: Batch) -> Any:
    """Call a function (a model) with a batch: its entries as arguments, or of a dict as keywords."""
    if isinstance(x, Tensor):
        return function(x)
    return function(**x) if isinstance(x, dict) else function(*x)


def main_output(raw: Any) -> Any:
    """The tensor of a model's output: the output itself, or its "logits" (of a Hugging Face `ModelOutput`, a dict)."""
    if isinstance(raw, Tensor):
        return raw
    logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)
    return logits if isinstance(logits, Tensor) else raw


def outputs_of(model: Callable[..., Any], x: Batch) -> Any:
    """A model's output on a copy of a batch, as a tensor where it has logits."""
    return main_output(call_with(model, copied(x)))


def has_infinity(x: Batch) -> bool:
    """Whether a batch has an infinite number."""
    floats = [t for t in leaves(x) if t.is_floating_point() or t.is_complex()]
    return any(not torch.isfinite(t.sum()) and bool(torch.isinf(t).any()) for t in floats)


def kind(x: Batch) -> tuple[Any, ...]:
    """What the graph of a model may depend on, beside the number of samples: places, shapes, dtypes, constants."""
    return tuple((place, _kind(value)) for place, value in named_leaves(x).items())


def tensors_to_hash(x: Batch) -> dict[str, Tensor]:
    """Tensors by place, and the constants as the bytes of their text."""
    return {
        place: value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode()), dtype=torch.uint8)
        for place, value in named_leaves(x).items()
    }


def arguments(x: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of that call."""
    return call_with(lambda *args, **kwargs: (args, kwargs), x)


def copied(x: Batch) -> Batch:
    """A copy, for a model that may write into its input."""
    return with_leaves(x, [t.clone() for t in leaves(x)])


def take(x: Batch, index: Any) -> Batch:
    """Index every tensor of a batch along its samples."""
    return with_leaves(x, [t[index] for t in leaves(x)])


def alike(x1: Batch, x2: Batch) -> bool:
    """Whether two batches can be concatenated: the same places, shapes, dtypes and devices, the same constants."""
    if type(x1) is not type(x2):
        return False
    return sorted(kind(x1), key=str) == sorted(kind(x2), key=str)


def _kind(value: Any) -> Any:
    return (value.shape[1:], value.dtype, value.device) if isinstance(value, Tensor) else (type(value), repr(value))


def join(x1: Batch, x2: Batch) -> Batch:
    """Concatenate two batches."""
    second = named_leaves(x2)
    pairs = [(t, second[place]) for place, t in named_leaves(x1).items() if isinstance(t, Tensor)]
    return with_leaves(x1, [torch.cat(pair) for pair in pairs])


def count(x: Batch) -> int:
    """Number of samples."""
    return leaves(x)[0].shape[0]


def as_batch(x: Any, name: str = "x") -> Batch:
    """Take what users have as a batch: numpy arrays (memory-mapped ones, too), any mapping, a list for a tuple."""
    if isinstance(x, Mapping):
        if odd := [key for key in x if not isinstance(key, str)]:
            fix = "A mapping is passed as model(**x)."
            raise refusal(name, got=f"the key {odd[0]!r}", expected="texts as keys", fix=fix)
        return {key: _entry(value, f"{name}[{key!r}]") for key, value in x.items()}
    if type(x) is list or isinstance(x, tuple):
        return tuple(_entry(value, f"{name}[{i}]") for i, value in enumerate(x))
    return _entry(x, name)


def _entry(value: Any, name: str) -> Any:
    """One argument: a tensor, a constant, or tensors in lists, tuples or dicts."""
    if isinstance(value, Tensor) or type(value) in _CONSTANT or isinstance(value, (torch.dtype, torch.device)):
        return value
    refuse_masked(value, name)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc" and value.dtype.char not in _LONG:
        return _of_array(value)
    if isinstance(value, Mapping):
        return {key: _entry(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        if odd := [entry for entry in value if not isinstance(entry, _NESTED)]:
            got = f"a {type(value).__name__} of {type(odd[0]).__name__}"
            fix = "Convert it with torch.as_tensor (pad first what has different lengths)."
            raise refusal(name, got=got, expected=_EXPECTED, fix=fix)
        entries = [_entry(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    raise refusal(name, got=_kind_of(value), expected=_EXPECTED, fix=_way_in(value))


def _kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"{type(value).__name__} of numpy" if isinstance(value, np.generic) else type(value).__name__


def _way_in(value: Any) -> str:
    """How something that is not taken becomes a tensor."""
    if isinstance(value, np.generic):
        return f"Convert it with {type(value.item()).__name__}(...)."
    if isinstance(value, np.ndarray):
        return "Give numbers, e.g. array.astype('float64')."
    if hasattr(value, "toarray"):  # scipy's sparse matrices
        return "Pass x.toarray()."
    if hasattr(value, "to_numpy"):  # tables of pandas and polars
        return "Pass x.to_numpy(), of its columns of numbers."
    if hasattr(value, "__array__"):
        return "Pass numpy.asarray(x)."
    if isinstance(value, Iterator):
        return "Collect it: torch.stack(list(x)) of samples, torch.cat(list(x)) of batches."
    return "Convert it with torch.as_tensor; a tuple is passed as model(*x), a dict as model(**x)."


def _of_array(array: np.ndarray) -> Tensor:
    """A tensor over an array's memory, which is only read; what torch has no such layout of is copied."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        good = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
        return torch.from_numpy(array if good else array.copy())


def _places(x: Batch, wanted: Callable[[Tensor], bool]) -> list[str]:
    """Places of some of the tensors of a tuple or dict."""
    if isinstance(x, Tensor):
        return []
    return [place for place, value in named_leaves(x).items() if isinstance(value, Tensor) and wanted(value)]


def checked(x: Batch, name: str, infinite: bool = False) -> Batch:
    """Refuse what is not a batch of samples (no tensors, empty, ragged, not finite); return it without its graph.

    `infinite` lets infinities through beside other tensors, as in a mask that is added to attention scores: for callers
    that check the outputs. The only input is never infinite: the gradient of a layer that it enters would be, too.
    """
    form = type(x).__name__
    x = as_batch(x, name)
    tensors = leaves(x)
    if not tensors or not all(t.dim() for t in tensors):
        got = "a tensor without axes" if tensors else f"{form} without tensors"
        fix = "Stack samples with torch.stack; a tuple is passed as model(*x), a dict as model(**x)."
        if place := _places(x, lambda t: not t.dim()):
            fix = f"It is {name}[{place[0]!r}]; pass an option of the model as a number: t.item()."
        raise refusal(name, got=got, expected=_EXPECTED, fix=fix)
    if any(unpack_dual(t).tangent is not None for t in tensors):
        got, fix = (
            "a dual tensor of forward-mode differentiation",
            "Pass torch.autograd.forward_ad.unpack_dual(x).primal.",
        )
        raise refusal(name, got=got, expected="plain tensors", fix=fix)
    for tensor in tensors:
        check_dense(tensor, name)
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) > 1:
        fix = "Give all tensors the same number of samples."
        if place := _places(x, lambda t: t.shape[0] == 1):
            fix += f" One that is the same for all ({name}[{place[0]!r}]): t.expand(n, ...)."
        raise refusal(name, got=f"tensors with {sorted(sizes)} samples", expected="one number of samples", fix=fix)
    if sizes == {0}:
        raise refusal(name, got="an empty set", expected="at least one sample", fix="Check the selection of samples.")
    for tensor in tensors:
        # a finite sum means finite values; another sum may only have overflowed, so then each value is checked
        if not (tensor.is_floating_point() or tensor.is_complex()) or torch.isfinite(tensor.sum()):
            continue
        bad = torch.isnan(tensor) if infinite and len(tensors) > 1 else ~torch.isfinite(tensor)
        if bad.any():
            index = tuple(int(i) for i in bad.nonzero()[0])
            got, fix = f"{tensor[index].item()} at index {index}", "Remove or repair that sample."
            raise refusal(name, got=got, expected="finite values", fix=fix)
    with torch.inference_mode(False):
        return with_leaves(x, [t.clone() if t.is_inference() else t.detach() for t in tensors])


def different_samples(x: Batch, most: int) -> list[int]:
    """Up to so many samples that differ from each other: equal ones could not show that samples mix."""
    n = count(x)
    candidates = dict.fromkeys([0, n // 2, n - 1, *torch.linspace(0, n - 1, min(n, 16)).long().tolist()])
    samples: list[int] = []
    for i in candidates:
        if all(any(not torch.equal(t[i], t[j]) for t in leaves(x)) for j in samples):
            samples.append(i)
        if len(samples) == most:
            break
    return samples
