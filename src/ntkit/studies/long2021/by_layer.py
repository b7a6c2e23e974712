"""Each layer's share of the tangent kernel: what it classifies alone, and what is lost without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.data import Data
from ntkit.jacobian.forwards import raw_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.studies.long2021.long_setting import Setting, examples, extent, logistic, network, sample, trained
from ntkit.studies.long2021.moments import quality
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import device

END = "end"  # the last recorded step of a run
KINDS = {"Conv2d": "convolution", "Linear": "dense"}


def layer_part(setting: Setting, seed: int, moment: str) -> StudyPart:
    """The layers at a moment, `START` or `END`."""
    name = f"{setting.file(seed)}-layers-{moment}"
    return StudyPart("layers", (setting, moment), name, layers, (setting, seed, moment))


def layers(work: Work, setting: Setting, seed: int, moment: str) -> Result:
    """SVMs with the kernel, with each layer's share alone, and with the others' sum, on a sample of the images."""
    whole, sizes = examples(work, setting), extent(work)
    model, step = network(setting, whole.input_shape, seed), 0
    if moment == END:
        run = trained(work, setting, seed, whole, model)
        step = run.steps[-1]
        run.load(model, step)
    data = sample(whole, sizes.kernel_train, sizes.kernel_test)
    x, x_test = data.x_train.to(device()), data.x_test.to(device())
    kernel = TangentKernel(model, outputs="trace")
    train, test = by_layer(kernel.layers(x)), by_layer(kernel.layers(x_test, x))
    K, K_test = total(train), total(test)
    trace = float(K.diagonal().sum(dtype=torch.float64))
    outputs, logits = (raw_outputs(model, part)[:, 0].cpu() for part in (x, x_test))
    entry, decision, _ = quality(K, K_test, data)
    arrays = {"whole.wrong": _wrong(decision, data), "decision": decision.numpy(), "logit": logits.double().numpy()}
    alone, without, names = [], [], list(train)
    kinds = [KINDS[type(model.get_submodule(name)).__name__] for name in names]
    numbers: dict[str, Any] = {
        "seed": seed,
        "status": "measured",
        "step": step,
        "loss": float(logistic(outputs[:, None], data.y_train)),
        "test_error": float((logits > 0).long().ne(data.y_test).double().mean()),
        "kinds": kinds,
        "whole": entry,
        "layers": {},
    }
    for place, name in enumerate(names):
        rest = [other for other in names if other != name]
        own, own_decision = separated(train[name], test[name], data)
        others, others_decision = separated(total(train, rest), total(test, rest), data)
        alone.append(_wrong(own_decision, data))
        without.append(_wrong(others_decision, data))
        share = float(train[name].diagonal().sum(dtype=torch.float64)) / trace
        numbers["layers"][str(place)] = {"share": share, "alone": own, "without": others}
    arrays |= {"alone.wrong": np.stack(alone), "without.wrong": np.stack(without)}
    return Result(numbers, arrays)


def by_layer(shares: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum the parameters' shares of a kernel over each layer: its weight and its bias; in the network's order."""
    sums: dict[str, Tensor] = {}
    for name, share in shares.items():
        layer = name.rpartition(".")[0]
        sums[layer] = sums[layer] + share.cpu() if layer in sums else share.cpu()
    return sums


def total(shares: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    """The sum of some layers' shares, of all by default."""
    chosen = [shares[name] for name in (shares if names is None else names)]
    result = chosen[0].clone()
    for share in chosen[1:]:
        result += share
    return result


def separated(K: Tensor, K_test: Tensor, data: Data) -> tuple[dict[str, Any], Tensor]:
    """As `quality`; a share that is zero on all images separates nothing."""
    if not K.diagonal().any():
        return {"status": "zero", "test_error": None, "alignment": None, "margin": 0.0}, torch.zeros(len(K_test))
    return quality(K, K_test, data)[:2]


def _wrong(decision: Tensor, data: Data) -> np.ndarray:
    return ((decision > 0).long() != data.y_test).numpy().astype(np.uint8)
