"""What tells one kernel matrix from another: a hash of the kernel, its parameters and the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import ntkit
from ntkit.base.batch import Batch
from ntkit.base.function_identity import function_identity, module_identity
from ntkit.base.tensors import tensor_hash
from ntkit.data.streamed_samples import StreamedSamples
from ntkit.kernels.kernel import Kernel
from ntkit.trajectory.recorded_run import Trajectory, read_run

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
_SETTINGS = (*_PLAIN, nn.Module, Kernel, Trajectory, FunctionType)
_MEMORY = "_budget"  # changes how a kernel is computed, not what it is


def identity(source: Any, dtype: torch.dtype) -> str:
    """Hash a kernel with its data, or values, together with their dtype and ntkit's version (sha256)."""
    digest = hashlib.sha256(f"ntkit {ntkit.__version__} {dtype};".encode())
    for part in _parts(source):
        digest.update(f"{part};".encode())
    return digest.hexdigest()


def what_it_depends_on(kernel: Kernel, x: Batch | StreamedSamples) -> dict[str, str]:
    """A hash of each thing that a kernel's values depend on, by name: its settings (the model among them), the data."""
    found = {"kernel": f"{type(kernel).__module__}.{type(kernel).__qualname__}"}
    for name, entry in kernel.settings().items():
        if name != _MEMORY and _is_setting(entry):
            found[name.strip("_")] = _digest(entry)
    return {**found, "data": _digest(x)}


def _digest(value: Any) -> str:
    return hashlib.sha256(";".join(_parts(value)).encode()).hexdigest()


def _parts(value: Any) -> Iterator[str]:
    """Text that differs wherever two values do: settings by value, tensors by their bytes, modules by both."""
    if isinstance(value, StreamedSamples):
        yield from _parts_of_samples(value)
        return
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        yield tensor_hash({"": value})
    elif isinstance(value, nn.Module):
        yield repr(value)
        yield tensor_hash(dict([*value.named_parameters(), *value.named_buffers()]))
        yield " ".join(name for name, p in value.named_parameters() if p.requires_grad)
        yield " ".join(name for name, m in value.named_modules() if m.training)
        yield from module_identity(value)
    elif isinstance(value, Kernel):
        for name, entry in value.settings().items():
            if name != _MEMORY and _is_setting(entry):
                yield name
                yield from _parts(entry)
    elif isinstance(value, Trajectory):
        run = read_run(value.path)
        yield from _parts([run.get(name) for name in ("initial", "stop", "settings")])
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield repr(key)
            yield from _parts(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _parts(entry)
    elif isinstance(value, FunctionType):
        yield f"{value.__module__}.{function_identity(value)}"
        yield from _parts([entry for entry in _given(value) if entry is not value])  # networks that are trained, too
    elif isinstance(value, _PLAIN):
        yield repr(value)
    elif callable(value) and not isinstance(value, type):  # a partial function, a method, an object of the user's
        yield function_identity(value)


def _given(function: FunctionType) -> Iterator[Any]:
    """What a function encloses, and its defaults."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # its variable is not bound yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _parts_of_samples(samples: StreamedSamples) -> Iterator[str]:
    """The same text as of these samples in memory."""
    yield from _parts_of_part(samples.first, iter(samples.hashes))


def _parts_of_part(part: Any, hashes: Iterator[str]) -> Iterator[str]:
    """As `_parts`, with these hashes in place of those of the tensors, in their order."""
    if isinstance(part, Tensor):
        yield from ("torch.Tensor", next(hashes))
    elif isinstance(part, Mapping):
        yield f"builtins.{type(part).__name__}"
        for key, entry in part.items():
            yield repr(key)
            yield from _parts_of_part(entry, hashes)
    elif isinstance(part, (tuple, list)):
        yield f"{type(part).__module__}.{type(part).__qualname__}"
        for entry in part:
            yield from _parts_of_part(entry, hashes)
    else:
        yield from _parts(part)


def _is_setting(entry: Any) -> bool:
    """Whether an entry is a setting: not what a kernel collects while it computes, and not None."""
    if isinstance(entry, (tuple, list, dict)):
        entries = entry.values() if isinstance(entry, dict) else entry
        return len(entry) > 0 and all(isinstance(one, _PLAIN) for one in entries)
    return entry is not None and (isinstance(entry, _SETTINGS) or (callable(entry) and not isinstance(entry, type)))
