"""ntkit: see a PyTorch network through its tangent kernel, before, along and after training.

The public API: every name, and the module that defines it. A module is imported when one of its names is first used,
so that ``import ntkit`` and ``ntkit --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of _NAMES below once more, as imports: what type checkers and editors read
    from ntkit import data as data
    from ntkit import probes as probes
    from ntkit import report as report
    from ntkit import testing as testing
    from ntkit.base.checks import Damaged as Damaged
    from ntkit.base.checks import NoLimit as NoLimit
    from ntkit.base.checks import Refused as Refused
    from ntkit.base.checks import Undefined as Undefined
    from ntkit.commands.analyze import analyze as analyze
    from ntkit.commands.compare import compare as compare
    from ntkit.commands.settings import Settings as Settings
    from ntkit.commands.verify import FileRecord as FileRecord
    from ntkit.commands.verify import verify as verify
    from ntkit.explanations.axioms import check_axioms as check_axioms
    from ntkit.explanations.evaluation import Deletion as Deletion
    from ntkit.explanations.evaluation import Evaluation as Evaluation
    from ntkit.explanations.evaluation import case_deletion as case_deletion
    from ntkit.explanations.evaluation import datamodeling_score as datamodeling_score
    from ntkit.explanations.evaluation import leave_one_out as leave_one_out
    from ntkit.explanations.evaluation import mislabeled as mislabeled
    from ntkit.explanations.evaluation import query_loss_difference as query_loss_difference
    from ntkit.explanations.importances import Importance as Importance
    from ntkit.explanations.importances import TrackingImportance as TrackingImportance
    from ntkit.explanations.importances import target_importance as target_importance
    from ntkit.explanations.importances import tracking_importance as tracking_importance
    from ntkit.explanations.influence import FiniteDifferences as FiniteDifferences
    from ntkit.explanations.influence import Influence as Influence
    from ntkit.explanations.influence import influence as influence
    from ntkit.explanations.representers import Explainer as Explainer
    from ntkit.explanations.representers import Explanation as Explanation
    from ntkit.explanations.representers import explain as explain
    from ntkit.explanations.retrainings import Retrainings as Retrainings
    from ntkit.explanations.surrogate import surrogate_importance as surrogate_importance
    from ntkit.explanations.tracin import tracin as tracin
    from ntkit.gram.gram_matrix import Gram as Gram
    from ntkit.gram.gram_store import GramStore as GramStore
    from ntkit.gram.tile_files import BadTile as BadTile
    from ntkit.jacobian.structure import SelfCheckError as SelfCheckError
    from ntkit.kernels.conjugate import ConjugateKernel as ConjugateKernel
    from ntkit.kernels.gpytorch_kernel import GPyTorchKernel as GPyTorchKernel
    from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel as InfiniteKernel
    from ntkit.kernels.infinite.sampled import LimitEstimate as LimitEstimate
    from ntkit.kernels.influence_kernel import InfluenceKernel as InfluenceKernel
    from ntkit.kernels.kernel import Kernel as Kernel
    from ntkit.kernels.kernel import KernelOperator as KernelOperator
    from ntkit.kernels.path.decomposition import PathDecomposition as PathDecomposition
    from ntkit.kernels.path.decomposition import Top as Top
    from ntkit.kernels.path.path_kernel import PathKernel as PathKernel
    from ntkit.kernels.sketch import SketchedKernel as SketchedKernel
    from ntkit.kernels.tangent import TangentKernel as TangentKernel
    from ntkit.machines import GaussianProcess as GaussianProcess
    from ntkit.machines import GradientFlow as GradientFlow
    from ntkit.machines import HardMarginSVM as HardMarginSVM
    from ntkit.machines import KernelRidge as KernelRidge
    from ntkit.machines import Posterior as Posterior
    from ntkit.machines.estimators import NTKClassifier as NTKClassifier
    from ntkit.machines.estimators import NTKRegressor as NTKRegressor
    from ntkit.machines.modes import BestTime as BestTime
    from ntkit.measures.convergence import Convergence as Convergence
    from ntkit.measures.convergence import MonteCarlo as MonteCarlo
    from ntkit.measures.convergence import convergence as convergence
    from ntkit.measures.convergence import monte_carlo as monte_carlo
    from ntkit.measures.eigenfunctions import bandwidth as bandwidth
    from ntkit.measures.eigenfunctions import eigenfunctions as eigenfunctions
    from ntkit.measures.eigenfunctions import grid as grid
    from ntkit.measures.novelty import Novelty as Novelty
    from ntkit.measures.novelty import novelty as novelty
    from ntkit.measures.spectra import Spectrum as Spectrum
    from ntkit.measures.spectra import alignment as alignment
    from ntkit.measures.spectra import effective_rank as effective_rank
    from ntkit.measures.spectra import spectrum as spectrum
    from ntkit.networks.linearization import Linearized as Linearized
    from ntkit.networks.linearization import linearized as linearized
    from ntkit.networks.parametrization import to_ntk_parametrization as to_ntk_parametrization
    from ntkit.networks.widening import widened as widened
    from ntkit.probes import invariance as invariance
    from ntkit.secant.secant_tensor import NoSecant as NoSecant
    from ntkit.studies.study import study as study
    from ntkit.tracking import Tracked as Tracked
    from ntkit.tracking import track as track
    from ntkit.trajectory import Recorder as Recorder
    from ntkit.trajectory import Trajectory as Trajectory
    from ntkit.trajectory import load_weights as load_weights
    from ntkit.trajectory import record as record
    from ntkit.trajectory import train as train
    from ntkit.trajectory.callbacks import LightningCallback as LightningCallback
    from ntkit.trajectory.callbacks import TransformersCallback as TransformersCallback

__version__ = "1.0.0"

_NAMES = {
    "ntkit.kernels.kernel": ("Kernel", "KernelOperator"),
    "ntkit.kernels.tangent": ("TangentKernel",),
    "ntkit.gram.gram_matrix": ("Gram",),
    "ntkit.gram.gram_store": ("GramStore",),
    "ntkit.jacobian.structure": ("SelfCheckError",),
    "ntkit.kernels.conjugate": ("ConjugateKernel",),
    "ntkit.kernels.sketch": ("SketchedKernel",),
    "ntkit.kernels.infinite.infinite_kernel": ("InfiniteKernel",),
    "ntkit.kernels.influence_kernel": ("InfluenceKernel",),
    "ntkit.explanations.importances": ("Importance", "TrackingImportance", "target_importance", "tracking_importance"),
    "ntkit.explanations.surrogate": ("surrogate_importance",),
    "ntkit.explanations.representers": ("Explainer", "Explanation", "explain"),
    "ntkit.explanations.tracin": ("tracin",),
    "ntkit.explanations.axioms": ("check_axioms",),
    "ntkit.networks.parametrization": ("to_ntk_parametrization",),
    "ntkit.networks.widening": ("widened",),
    "ntkit.measures.convergence": ("Convergence", "MonteCarlo", "convergence", "monte_carlo"),
    "ntkit.networks.linearization": ("Linearized", "linearized"),
    "ntkit.machines.estimators": ("NTKClassifier", "NTKRegressor"),
    "ntkit.kernels.path.path_kernel": ("PathKernel",),
    "ntkit.kernels.path.decomposition": ("PathDecomposition", "Top"),
    "ntkit.secant.secant_tensor": ("NoSecant",),
    "ntkit.explanations.evaluation": (
        "Deletion",
        "Evaluation",
        "case_deletion",
        "datamodeling_score",
        "leave_one_out",
        "mislabeled",
        "query_loss_difference",
    ),
    "ntkit.explanations.influence": ("FiniteDifferences", "Influence", "influence"),
    "ntkit.explanations.retrainings": ("Retrainings",),
    "ntkit.machines": ("GaussianProcess", "GradientFlow", "HardMarginSVM", "KernelRidge", "Posterior"),
    "ntkit.measures.spectra": ("Spectrum", "alignment", "effective_rank", "spectrum"),
    "ntkit.probes": ("invariance",),
    "ntkit.measures.novelty": ("Novelty", "novelty"),
    "ntkit.measures.eigenfunctions": ("bandwidth", "eigenfunctions", "grid"),
    "ntkit.trajectory": ("Recorder", "Trajectory", "load_weights", "record", "train"),
    "ntkit.tracking": ("Tracked", "track"),
    "ntkit.studies.study": ("study",),
    "ntkit.commands.analyze": ("analyze",),
    "ntkit.commands.compare": ("compare",),
    "ntkit.commands.verify": ("FileRecord", "verify"),
    "ntkit.commands.settings": ("Settings",),
    "ntkit.base.checks": ("Damaged", "NoLimit", "Refused", "Undefined"),
    "ntkit.machines.modes": ("BestTime",),
    "ntkit.kernels.infinite.sampled": ("LimitEstimate",),
    "ntkit.gram.tile_files": ("BadTile",),
    "ntkit": ("data", "probes", "report", "testing"),  # modules that are names themselves
}
_WITH_PACKAGES = {  # beside __all__: each needs a package that ntkit does not require
    "GPyTorchKernel": "ntkit.kernels.gpytorch_kernel",
    "LightningCallback": "ntkit.trajectory.callbacks",
    "TransformersCallback": "ntkit.trajectory.callbacks",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)

if not TYPE_CHECKING:  # a type checker would take a __getattr__ to mean that every name exists

    def __getattr__(name):
        if name not in _HOME and name not in _WITH_PACKAGES:
            raise AttributeError(f"module 'ntkit' has no attribute '{name}'")
        from ntkit.base.imports import same_random_numbers

        module = _HOME.get(name) or _WITH_PACKAGES[name]
        with same_random_numbers():
            return import_module(f"ntkit.{name}") if module == "ntkit" else getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
