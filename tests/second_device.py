"""A plugin of pytest, ``-p second_device``: "cuda" is a device in the memory of the CPU (`second_device.cpp`).

For machines without a GPU. Tests marked ``gpu`` run there and find tensors that were left on the CPU. What is CUDA's
own (memory, streams, TF32, speed) is not tested by it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

NAME = "second"


def compiled(folder: Path) -> None:
    """Compile the device into a folder, if it is not there, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).with_suffix(".cpp"))
    options = {"extra_cflags": ["-O0", "-w"], "build_directory": str(folder), "is_python_module": False}
    cpp_extension.load("second_device", [source], **options)  # 12 s; with Python's headers and -O1: 29 s


def _named() -> None:
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(NAME)
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.manual_seed_all = module.manual_seed = module._lazy_init = module.synchronize = lambda *_: None
    module.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _lstm(gates: Tensor, hidden: Tensor, c: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Any:
    total = gates + hidden + (0 if b1 is None else b1) + (0 if b2 is None else b2)
    i, f, g, o = total.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_backward(by_h: Tensor | None, by_c: Tensor | None, c: Tensor, new: Tensor, kept: Tensor, bias: bool) -> Any:
    i, f, g, o = kept.chunk(4, 1)
    t = new.tanh()
    by_h = torch.zeros_like(c) if by_h is None else by_h
    by_new = (torch.zeros_like(c) if by_c is None else by_c) + by_h * o * (1 - t * t)
    parts = by_new * g * i * (1 - i), by_new * c * f * (1 - f), by_new * i * (1 - g * g), by_h * t * o * (1 - o)
    gates = torch.cat(parts, 1)
    return gates, by_new * f, gates.sum(0) if bias else c.new_empty(0)


def _gru(gates: Tensor, hidden: Tensor, h: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Any:
    gates, hidden = (t if b is None else t + b for t, b in ((gates, b1), (hidden, b2)))
    (a, b, c), (p, q, s) = gates.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (a + p).sigmoid(), (b + q).sigmoid()
    n = (c + r * s).tanh()
    return (1 - z) * n + z * h, torch.cat([r, z, n, h, s], 1)


def _gru_backward(by_h: Tensor, kept: Tensor, bias: bool) -> Any:
    r, z, n, h, s = kept.chunk(5, 1)
    by_z, by_n = by_h * (h - n) * z * (1 - z), by_h * (1 - z) * (1 - n * n)
    by_r = by_n * s * r * (1 - r)
    gates, hidden = torch.cat([by_r, by_z, by_n], 1), torch.cat([by_r, by_z, by_n * r], 1)
    return gates, hidden, by_h * z, gates.sum(0) if bias else None, hidden.sum(0) if bias else None


def _recurrent() -> torch.library.Library:
    """The fused cells of recurrent layers, which GPUs have and the CPU has not."""
    library = torch.library.Library("aten", "IMPL")
    cells = {
        "_thnn_fused_lstm_cell": _lstm,
        "_thnn_fused_lstm_cell_backward_impl": _lstm_backward,
        "_thnn_fused_gru_cell": _gru,
        "_thnn_fused_gru_cell_backward": _gru_backward,
    }
    for name, function in cells.items():
        library.impl(name, function, "PrivateUse1")
    return library


def _renamed(value: Any) -> Any:
    is_cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return torch.device(NAME) if is_cuda else value


def _moved(model: nn.Module) -> nn.Module:
    """The model on the device; tied weights stay tied, as on a GPU (PyTorch would replace each by one of its own)."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept: no other gets its number
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, old in own.items():
                if old is not None:
                    there = old.detach().to(NAME)
                    there = nn.Parameter(there, old.requires_grad) if isinstance(old, nn.Parameter) else there
                    own[name] = pairs.setdefault(id(old), (there, old))[0]
    return model


def _in_place_of_cuda() -> None:
    tensor_to, module_to = Tensor.to, nn.Module.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor_to(self, *map(_renamed, args), **{key: _renamed(value) for key, value in kwargs.items()})

    def to_of_module(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        here = torch.device(NAME)
        args, kwargs = tuple(map(_renamed, args)), {key: _renamed(value) for key, value in kwargs.items()}
        if here in [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]:
            _moved(self)
            args = tuple(value for value in args if value != here)
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return module_to(self, *args, **kwargs) if args or kwargs else self

    names: Any = torch
    names.Tensor.to, names.nn.Module.to = to, to_of_module
    names.Tensor.cuda, names.nn.Module.cuda = lambda self: self.to("cuda"), lambda self: self.to("cuda")
    names.cuda.is_available = lambda: True


if "pytest" in sys.modules:
    compiled(Path.cwd() / ".cache" / f"second_device-{torch.__version__}")
    _named()
    LIBRARY = _recurrent()
    _in_place_of_cuda()
