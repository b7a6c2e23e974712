"""ntkit: see a PyTorch network through its tangent kernel, before, along and after training.

The door: every public name and the room it comes from. Rooms are opened on first use, so that ``import ntkit`` and
``ntkit --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "ntkit.kernels.base": ("Kernel",),
    "ntkit.kernels.tangent": ("TangentKernel",),
    "ntkit.kernels.conjugate": ("ConjugateKernel",),
    "ntkit.machines": ("HardMarginSVM", "KernelRidge"),
    "ntkit.spectra": ("Spectrum", "spectrum", "alignment", "effective_rank"),
    "ntkit.probes": ("invariance",),
    "ntkit.trajectory": ("Trajectory", "train", "load_weights"),
    "ntkit.settings": ("Settings",),
    "ntkit.analysis": ("analyze",),
    "ntkit.checks": ("Refused",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    try:
        return import_module(f"ntkit.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module 'ntkit' has no attribute '{name}'") from error


def __dir__() -> list[str]:
    return [*globals(), *__all__]
