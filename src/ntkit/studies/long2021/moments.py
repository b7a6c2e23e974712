"""The kernels of a network at one moment of its training: how well they classify, how alike they are, how invariant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit import probes
from ntkit.base.checks import defined
from ntkit.data import Data
from ntkit.gram.arrays import float64_product
from ntkit.gram.gram_matrix import Gram
from ntkit.jacobian.forwards import raw_outputs
from ntkit.kernels.conjugate import ConjugateKernel
from ntkit.kernels.kernel import Kernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines.machine_input import solve
from ntkit.machines.svm import HardMarginSVM
from ntkit.measures.spectra import alignment, effective_rank
from ntkit.probes.similarity import Invariance
from ntkit.studies.long2021.long_setting import (
    BATCH,
    START,
    Setting,
    at_loss,
    examples,
    logistic,
    settings,
    training_part,
)
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import device
from ntkit.trajectory.batch_order import batch_indices, steps_per_epoch

RIDGES = (1e-4, 1e-3, 1e-2)  # of the kernel's mean diagonal


def parts(work: Work) -> Iterator[StudyPart]:
    """Each run: its kernels before training, the training, the kernels at each loss."""
    for setting, seed in settings(work):
        yield moment_part(setting, seed, START)
        if setting.network != "sum":  # a control of the probes alone
            yield training_part(setting, seed)
            for loss in work.sizes.losses:
                yield moment_part(setting, seed, str(loss))


def moment_part(setting: Setting, seed: int, moment: str) -> StudyPart:
    """The kernels at a moment: `START`, or the target of the training loss as text."""
    name = f"{setting.file(seed)}-{moment if moment == START else f'loss-{moment}'}"
    return StudyPart("moment", (setting, moment), name, at_moment, (setting, seed, moment))


def at_moment(work: Work, setting: Setting, seed: int, moment: str) -> Result:
    """Load the network of a moment and measure its kernels; a loss that was not reached is a status."""
    data = examples(work, setting)
    found = at_loss(work, setting, seed, moment, data)
    if isinstance(found, Result):
        return found
    model, told = found
    numbers, arrays, machine = measured(work, model, data)
    numbers |= told
    if moment == START and setting.network != "sum" and not setting.augmented:
        numbers["linearized"] = linearized(work, setting, seed, data, model, *machine)
    return Result(numbers, arrays)


def measured(
    work: Work, model: nn.Module, data: Data
) -> tuple[dict[str, Any], dict[str, np.ndarray], tuple[Tensor, Tensor]]:
    """Numbers, arrays by test image, and the tangent kernel of the training set and of test against training set."""
    x, x_test = data.x_train.to(device()), data.x_test.to(device())
    logits, logits_test = (raw_outputs(model, part)[:, 0].cpu() for part in (x, x_test))
    wrong = (logits_test > 0).long() != data.y_test
    numbers: dict[str, Any] = {
        "loss": float(logistic(logits[:, None], data.y_train)),
        "test_loss": float(logistic(logits_test[:, None], data.y_test)),
        "error": float(((logits > 0).long() != data.y_train).double().mean()),
        "test_error": float(wrong.double().mean()),
    }
    arrays = {"network.wrong": wrong.numpy().astype(np.uint8)}
    tangent, conjugate = TangentKernel(model, outputs="trace"), ConjugateKernel(model)
    K, K_test = both(tangent, x, x_test)
    other, other_test = both(conjugate, x, x_test)
    numbers["tangent_conjugate_alignment"] = defined(alignment, Gram(K), Gram(other))
    for name, kernel, train, test in (("tangent", tangent, K, K_test), ("conjugate", conjugate, other, other_test)):
        entry, decision, svm = quality(train, test, data)
        entry["agreement"] = agreement(decision, logits_test)
        entry["correlation"] = correlation(decision, logits_test)
        arrays[f"{name}.wrong"] = ((decision > 0).long() != data.y_test).numpy().astype(np.uint8)
        centered, decision, _ = quality(*features_centered(train, test), data, start=svm)
        arrays[f"{name} centered.wrong"] = ((decision > 0).long() != data.y_test).numpy().astype(np.uint8)
        numbers[f"{name} centered"], cosine = centered, cosines(kernel, x_test[: work.sizes.probed])
        numbers[name] = entry | {"cosines": cosine.numbers}
        arrays |= {f"{name}.cosine.{key}": value for key, value in cosine.arrays.items()}
    return numbers, arrays, (K, K_test)


def both(kernel: Kernel, x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of the training set and of test against training set, as one: gradients are computed once for both."""
    n, whole = len(x), kernel(torch.cat([x, x_test])).cpu()
    return whole[:n, :n].clone(), whole[n:, :n].clone()


def agreement(decision: Tensor, logits: Tensor) -> float | None:
    """Part of the images that machine and network put in the same class; None where there is no machine (NaN)."""
    return None if decision.isnan().any() else float((decision > 0).eq(logits > 0).double().mean())


def correlation(decision: Tensor, logits: Tensor) -> float | None:
    """Correlation of the machine's decisions with the network's outputs; None where one of them is constant or NaN."""
    one, other = decision.double().numpy(), logits.double().numpy()
    varied = np.ptp(one) > 0 and np.ptp(other) > 0  # False for NaN
    return float(np.corrcoef(one, other)[0, 1]) if varied else None


def quality(
    K: Tensor, K_test: Tensor, data: Data, start: HardMarginSVM | None = None
) -> tuple[dict[str, Any], Tensor, HardMarginSVM]:
    """A kernel's machine with its certificate, alignment and effective rank; the machine's decisions on the test set.

    The machine is the hard-margin SVM; where nothing separates the classes, ridge regression on the labels -1 and 1:
    most of thousands of points would be in the support of an SVM with another loss. Last the SVM, from which the one
    of a similar kernel starts.
    """
    gram, targets = Gram(K), 2.0 * data.y_train.double() - 1
    scale = float(gram.diagonal().mean()) ** 0.5
    start = start if start is not None and start.gap_ < 1 else None  # else a combination under which features cancel
    svm, machine = HardMarginSVM().fit(gram, data.y_train, start=start), "hard margin"
    if not svm.gap_ < 1:  # no separator was found: not separable, or K has negative eigenvalues by rounding
        machine, weights = _ridge(gram, targets, scale)
        decision = float64_product(K_test, weights)
    else:
        decision = torch.as_tensor(svm.decision_function(K_test)).double()
    entry = {
        "status": svm.status_,
        "machine": machine,
        "gap": float(svm.gap_) if np.isfinite(svm.gap_) else None,
        "test_error": None if decision.isnan().any() else float(((decision > 0).long() != data.y_test).double().mean()),
        "margin": float(svm.margin_) / scale,  # 0 where not separable; of the features' root mean square norm
        "support": len(svm.support_),
        "scale": scale,
        "alignment": defined(alignment, gram, targets),
        "alignment_centered": defined(alignment, gram, targets, centered=True),
        "effective_rank": defined(effective_rank, gram),
    }
    return entry, decision, svm


def _ridge(gram: Gram, targets: Tensor, scale: float) -> tuple[str, Tensor]:
    """Ridge regression with the smallest of `RIDGES` above the rounding of K: its name with the residual, weights."""
    for share in RIDGES:
        found = solve(gram, share * scale**2, targets[:, None], "ridge")
        if found.status == "solved":
            return f"ridge {share:g}, solved, residual {found.residual:.0e}", found.alpha[:, 0]
    return f"ridge {RIDGES[-1]:g}, singular", torch.full_like(targets, torch.nan)


def features_centered(K: Tensor, K_test: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of features minus their mean over the training set."""
    mean = K.mean(0, dtype=torch.float64)
    whole = float(mean.mean())
    own, centered = (mean - whole / 2).to(K.dtype), K.clone()
    for rows in torch.arange(len(K)).split(512):  # both means at once: the result is exactly symmetric
        centered[rows] -= own[rows, None] + own
    centered.diagonal().clamp_(min=0)  # |phi - mean|^2; what is left of a mean is the rounding of K, of either sign
    test = K_test - mean.to(K.dtype)
    test -= (K_test.mean(1, dtype=torch.float64, keepdim=True) - whole).to(K.dtype)
    return centered, test


def cosines(kernel: Kernel, x: Tensor) -> Result:
    """Cosines in feature space between images and their transforms; with them the cosine of two different images.

    By name of the transform: "raw"; "paper", with 1e-4 added to each norm as in the paper's code; "centered", of
    features minus their mean over the images. "pairs": the mean over all pairs of different images, in each form.
    Arrays: raw and centered cosine by image, [transforms, n].
    """
    transformed, different = probes.cosines(kernel, x)
    numbers = {
        name: {form: _mean(getattr(found, form)) for form in ("raw", "paper", "centered")}
        for name, found in [*transformed.items(), ("pairs", different)]
    }
    arrays = {
        form: torch.stack([getattr(found, form).per_sample for found in transformed.values()]).float().numpy()
        for form in ("raw", "centered")
    }
    return Result(numbers, arrays)


def _mean(found: Invariance) -> dict[str, float | None]:
    """Mean and standard error over the images where the cosine is defined."""
    if len(found.per_sample) - found.undefined < 2:
        return {"mean": None, "error": None}
    return {"mean": found.mean, "error": None if math.isnan(found.standard_error) else found.standard_error}


def linearized(
    work: Work, setting: Setting, seed: int, data: Data, model: nn.Module, K: Tensor, K_test: Tensor
) -> list[dict[str, Any]]:
    """Train the network's linearization by the same SGD, on the same batches: one entry per loss that it reaches.

    In function space: a step of learning rate r changes all outputs by -r/B K[:, batch] dL/df[batch].
    """
    f, f_test = (raw_outputs(model, part.to(device()))[:, 0].cpu().double() for part in (data.x_train, data.x_test))
    y, n, columns = data.y_train.double(), len(data.x_train), K_test.T.contiguous()
    epoch, wanted, reached = steps_per_epoch(n, BATCH), sorted(work.sizes.losses, reverse=True), []
    for step in range(work.sizes.epochs * epoch + 1):
        if step % max(1, epoch // 4) == 0:
            loss = float(logistic(f[:, None], y))
            while wanted and loss <= wanted[0]:
                error = float(((f_test > 0).long() != data.y_test).double().mean())
                reached.append({"loss": wanted.pop(0), "step": step, "test_error": error})
            if not wanted or not np.isfinite(loss):
                break
        rows = batch_indices(seed, n, BATCH, step)
        slope = ((-setting.lr / len(rows)) * (torch.sigmoid(f[rows]) - y[rows])).to(K.dtype)
        f += slope @ K[rows]  # a step is rounded as K is; the sum over steps is in float64
        f_test += slope @ columns[rows]
    return reached
