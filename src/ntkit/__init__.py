"""ntkit: see a PyTorch network through its tangent kernel, before, along and after training.

The door: every public name and the room it lives in. A room is opened when a name in it is first used, so that
``import ntkit`` and ``ntkit --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "ntkit.kernels.kernel": ("Kernel", "KernelOperator"),
    "ntkit.kernels.tangent": ("TangentKernel",),
    "ntkit.jacobian.structure": ("SelfCheckError",),
    "ntkit.kernels.conjugate": ("ConjugateKernel",),
    "ntkit.kernels.sketch": ("SketchedKernel",),
    "ntkit.kernels.infinite.infinite_kernel": ("InfiniteKernel",),
    "ntkit.networks.parametrization": ("to_ntk_parametrization",),
    "ntkit.networks.widening": ("widened",),
    "ntkit.measures.convergence": ("convergence", "monte_carlo"),
    "ntkit.networks.linearization": ("linearized",),
    "ntkit.machines.estimators": ("NTKClassifier", "NTKRegressor"),
    "ntkit.kernels.path.path_kernel": ("PathKernel",),
    "ntkit.kernels.path.decomposition": ("PathDecomposition",),
    "ntkit.secant.secant_tensor": ("NoSecant",),
    "ntkit.machines": ("GaussianProcess", "GradientFlow", "HardMarginSVM", "KernelRidge", "Posterior"),
    "ntkit.measures.spectra": ("Spectrum", "alignment", "effective_rank", "spectrum"),
    "ntkit.probes": ("invariance",),
    "ntkit.measures.novelty": ("novelty",),
    "ntkit.measures.eigenfunctions": ("bandwidth", "eigenfunctions", "grid"),
    "ntkit.trajectory": ("Trajectory", "load_weights", "record", "train"),
    "ntkit.tracking": ("Tracked", "track"),
    "ntkit.studies": ("study",),
    "ntkit.commands.analyze": ("analyze",),
    "ntkit.commands.settings": ("Settings",),
    "ntkit.base.checks": ("Refused",),
    "ntkit": ("data", "probes", "report", "testing"),  # rooms that are names themselves
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ntkit' has no attribute '{name}'")
    room = _HOME[name]
    return import_module(f"ntkit.{name}") if room == "ntkit" else getattr(import_module(room), name)


def __dir__() -> list[str]:
    return __all__
