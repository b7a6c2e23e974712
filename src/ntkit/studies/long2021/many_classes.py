"""Kernels of networks with ten outputs, before training and at training losses: machines one class against the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.base.checks import defined
from ntkit.data import Data
from ntkit.gram.gram_matrix import Gram
from ntkit.jacobian.forwards import raw_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines.ridge import KernelRidge
from ntkit.machines.svm import HardMarginSVM
from ntkit.measures.spectra import alignment, effective_rank
from ntkit.studies.long2021.long_setting import Setting, at_loss, examples, extent
from ntkit.studies.long2021.moments import cosines, moment_part
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import device

SOFT = 1e-4  # of the kernel's mean diagonal: the ridge of squared hinge loss
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # of the kernel's mean diagonal; the one of least leave-one-out error is taken


def class_part(setting: Setting, seed: int, moment: str) -> StudyPart:
    """As `moment_part`, of a network with an output for each class."""
    part = moment_part(setting, seed, moment)
    return StudyPart(part.experiment, part.case, part.name, at_moment_of_classes, part.arguments)


def at_moment_of_classes(work: Work, setting: Setting, seed: int, moment: str) -> Result:
    """The tangent kernel, summed over outputs, at a moment; a loss that was not reached is a status."""
    data = examples(work, setting)
    found = at_loss(work, setting, seed, moment, data)
    if isinstance(found, Result):
        return found
    model, told = found
    x, x_test = data.x_train.to(device()), data.x_test.to(device())
    logits, logits_test = (raw_outputs(model, part).cpu() for part in (x, x_test))
    wrong = logits_test.argmax(1) != data.y_test
    kernel = TangentKernel(model, outputs="trace")
    entry, predicted = of_classes(kernel(x).cpu(), kernel(x_test, x).cpu(), data)
    cosine = cosines(kernel, x_test[: extent(work).probed])
    entry |= {"agreement": _mean(predicted == logits_test.argmax(1)), "cosines": cosine.numbers}
    numbers: dict[str, Any] = {
        "loss": float(F.cross_entropy(logits, data.y_train)),
        "test_loss": float(F.cross_entropy(logits_test, data.y_test)),
        "error": _mean(logits.argmax(1) != data.y_train),
        "test_error": _mean(wrong),
        "tangent": entry,
    }
    arrays = {"network.wrong": wrong, "tangent.wrong": predicted != data.y_test}
    bits = {name: value.numpy().astype(np.uint8) for name, value in arrays.items()}
    return Result(numbers | told, bits | {f"tangent.cosine.{key}": value for key, value in cosine.arrays.items()})


def of_classes(K: Tensor, K_test: Tensor, data: Data) -> tuple[dict[str, Any], Tensor]:
    """Hard-margin SVMs one against the rest, and ridge regression on one-hot targets; labels that the SVMs predict.

    Where a class is not separable, all machines are those with squared hinge loss, which are those of K + ridge I. The
    targets are centered: one-hot minus the mean over classes. The margin is the smallest over classes.
    """
    gram, classes = Gram(K), len(data.classes)
    targets = F.one_hot(data.y_train, classes).double() - 1 / classes
    svm, machine = machines(K, data.y_train)
    predicted = torch.as_tensor(machine.predict(K_test))
    scale = float(gram.diagonal().mean()) ** 0.5
    ridge = chosen_ridge(gram, targets, data.y_train)
    ridge_error = None
    if ridge is not None:
        outputs = torch.as_tensor(KernelRidge(ridge * scale**2).fit(gram, targets).predict(K_test))
        ridge_error = _mean(outputs.argmax(1) != data.y_test)
    entry = {
        "status": svm.status_,
        "machine": machine_name(svm, machine),
        "gap": float(svm.gap_) if np.isfinite(svm.gap_) else None,
        "test_error": _mean(predicted != data.y_test),
        "margin": float(torch.as_tensor(svm.margin_).min()) / scale,
        "support": float(np.mean([len(rows) for rows in svm.support_])),
        "scale": scale,
        "ridge": ridge,
        "ridge_error": ridge_error,
        "alignment": defined(alignment, gram, targets),
        "alignment_centered": defined(alignment, gram, targets, centered=True),
        "effective_rank": defined(effective_rank, gram),
    }
    return entry, predicted


def chosen_ridge(gram: Gram, targets: Tensor, y: Tensor) -> float | None:
    """The ridge of least leave-one-out error, the larger one of equals; None where all systems are singular."""
    errors, scale = {}, float(gram.diagonal().mean())
    for ridge in sorted(RIDGES, reverse=True):
        machine = KernelRidge(ridge * scale).fit(gram, targets)
        if machine.status_ == "solved":
            errors[ridge] = _mean((targets - torch.as_tensor(machine.loo_)).argmax(1) != y)
    return min(errors, key=lambda ridge: errors[ridge]) if errors else None


def _mean(kept: Tensor) -> float:
    return float(kept.double().mean())


def machines(K: Tensor, y: Tensor) -> tuple[HardMarginSVM, HardMarginSVM]:
    """The hard-margin SVM, and the machine to use: the same, or that of K + ridge I where nothing separates."""
    svm = HardMarginSVM().fit(K, y)
    if svm.gap_ < 1:
        return svm, svm
    soft = K.clone()
    soft.diagonal().add_(SOFT * float(Gram(K).diagonal().mean()))
    return svm, HardMarginSVM().fit(soft, y)


def machine_name(svm: HardMarginSVM, machine: HardMarginSVM) -> str:
    """Which of the `machines` is used, with the certificate of the second one."""
    return "hard margin" if machine is svm else f"squared hinge, {machine.status_}, gap {machine.gap_:.0e}"
