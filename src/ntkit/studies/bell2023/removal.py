"""Are contributions faithful? Examples are removed, and the network is trained again from the same start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntkit.studies.bell2023.pictures import measure
from ntkit.studies.bell2023.setting import (
    Images,
    cnn,
    images,
    sgd,
    weighted,
    weighted_cross_entropy,
)
from ntkit.studies.parts import Part, Work
from ntkit.trajectory import train

KINDS = ("top", "near", "random")  # what is removed: top contributors, nearest images, random ones of the same class


def remove(work: Work, name: str, point: int) -> Part:
    """Change of one test image's prediction when training examples are removed, by share and kind."""
    return work.kept(
        f"{name}-removed-{point:03d}",
        f"{name}, examples removed, test image {point + 1} of {work.scale.removals}",
        lambda: _remove(work, name, point),
    )


def _remove(work: Work, name: str, point: int) -> Part:
    data = images(work, name, work.scale.train, work.scale.test)
    arrays = measure(work, name, 0).arrays
    before = torch.from_numpy(arrays["network"])[point]
    c = int(before.argmax())
    contributions = torch.from_numpy(arrays["contributions"])[point, c]
    own = (data.y.cpu() == c).nonzero()[:, 0]
    distance = torch.cdist(data.x_test[point].reshape(1, -1), data.x.flatten(1)).cpu()[0]
    numbers: dict[str, Any] = {"point": point, "predicted": c, "removed": []}
    for share in work.scale.shares:
        k = min(round(share * work.scale.train), len(own))
        generator = torch.Generator().manual_seed(1000 * point + k)
        chosen = [("top", contributions.topk(k).indices), ("near", own[distance[own].topk(k, largest=False).indices])]
        chosen += [("random", own[torch.randperm(len(own), generator=generator)[:k]]) for _ in range(work.scale.draws)]
        for kind, rows in chosen:
            after = again(work, data, rows)[point]
            numbers["removed"].append({
                "share": share,
                "count": k,
                "kind": kind,
                "logit": float(after[c] - before[c]),
                "margin": _margin(after, c) - _margin(before, c),
                "told": -float(contributions[rows].sum()),
                "flipped": int(after.argmax()) != c,
                "same_class": float((data.y.cpu()[rows] == c).double().mean()),
            })  # fmt: skip
    return Part(numbers, {})


def again(work: Work, data: Images, removed: Tensor) -> Tensor:
    """Test logits after training as before, from the same start and with the same batches, without some examples."""
    model = cnn(data.x.shape[-1], int(data.y.max()) + 1, work.scale.width, 0)
    targets = weighted(data.y, removed)
    train(
        model,
        (data.x, targets),
        weighted_cross_entropy,
        sgd(work.scale.lr),
        work.scale.steps,
        record=[work.scale.steps],
        seed=0,
    )
    with torch.no_grad():
        return model(data.x_test).cpu()


def _margin(logits: Tensor, c: int) -> float:
    others = torch.cat([logits[:c], logits[c + 1 :]])
    return float(logits[c] - others.max())
