"""Out of distribution: held-out classes and patches of photographs, told from known classes by kernels or baselines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.conjugate import ConjugateKernel
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.novelty import novelty
from ntkit.studies.bell2023.setting import cnn, cross_entropy, images, sgd
from ntkit.studies.parts import Part, Work
from ntkit.trajectory import train

KNOWN = ("0", "1", "2", "3", "4")
HELD = ("5", "6", "7", "8", "9")
SETS = {"held": "held-out digits", "photographs": "patches of photographs"}
SCORES = {  # name: (title, of the kernel or a baseline); larger is taken for more novel
    "after outside": ("outside the span, after kernel", True),
    "after deviation": ("posterior deviation, after kernel", True),
    "logit outside": ("outside the span, after kernel of the largest logit", True),
    "logit deviation": ("posterior deviation, after kernel of the largest logit", True),
    "path outside": ("outside the span, path kernel", True),
    "path deviation": ("posterior deviation, path kernel", True),
    "softmax": ("1 − largest softmax probability", False),
    "energy": ("energy, −log Σ exp of the logits", False),
    "norm": ("norm of the outputs’ gradient", False),
    "gradnorm": ("− norm of the gradient of the loss against uniform targets", False),
    "features": ("distance to the nearest training image, last hidden layer", False),
    "pixels": ("distance to the nearest training image, pixels", False),
}
_SHRINK = 4  # a photograph's pixels averaged into one: its patches are then not flat


def patches(n: int, pixels: int, seed: int) -> Tensor:
    """Grey patches of scikit-learn's two photographs, each scaled to [0, 1]: [n, 1, pixels, pixels]."""
    from sklearn.datasets import load_sample_images

    draw, found = np.random.default_rng(seed), []
    photographs = [_shrunk(image.mean(2)) for image in load_sample_images().images]
    while len(found) < n:
        grey = photographs[len(found) % len(photographs)]
        i, j = (int(draw.integers(side - pixels + 1)) for side in grey.shape)
        patch = grey[i : i + pixels, j : j + pixels]
        if patch.max() > patch.min():
            found.append((patch - patch.min()) / (patch.max() - patch.min()))
    return torch.from_numpy(np.stack(found))[:, None]


def _shrunk(image: np.ndarray) -> np.ndarray:
    h, w = (side // _SHRINK for side in image.shape)
    return image[: h * _SHRINK, : w * _SHRINK].reshape(h, _SHRINK, w, _SHRINK).mean((1, 3))


def tell_apart(work: Work, name: str, seed: int) -> Part:
    """AUROC of every score against both kinds of images that were not learned."""
    return work.kept(
        f"unseen-{name}-seed-{seed}",
        f"{name}, images of other kinds, seed {seed}",
        lambda: _tell_apart(work, name, seed),
    )


def _tell_apart(work: Work, name: str, seed: int) -> Part:
    from sklearn.metrics import roc_auc_score

    data = images(work, name, work.scale.train, work.scale.unseen, classes=KNOWN, seed=seed)
    other = images(work, name, len(HELD), work.scale.unseen, classes=HELD, seed=seed)
    held = other.x_test * other.deviation + other.mean
    sets = {"held": held, "photographs": patches(work.scale.unseen, data.x.shape[-1], seed).to(held)}
    sets = {kind: (x - data.mean) / data.deviation for kind, x in sets.items()}
    model = cnn(data.x.shape[-1], len(KNOWN), work.scale.width, seed)
    run = train(
        model, (data.x, data.y), cross_entropy, sgd(work.scale.lr), work.scale.unseen_steps, seed=seed, resume=True,
        path=work.trajectory(f"unseen-{name}-seed-{seed}"),
    )  # fmt: skip
    everything = torch.cat([data.x_test, *sets.values()])
    kernels = {
        "after": TangentKernel(model, outputs="trace"),
        "logit": TangentKernel(model, outputs=lambda out: out.max(1).values),
        "path": PathKernel(run, outputs="trace"),
    }
    scores, certificates = {}, {}
    for kind, kernel in kernels.items():
        found = novelty(kernel, data.x, everything)
        scores |= {f"{kind} outside": found.outside, f"{kind} deviation": found.deviation}
        certificates[kind] = {"residual": found.residual, "floor": found.floor, "rank": found.rank}
        if kind == "after":
            scores["norm"] = found.norm
    scores |= _baselines(model, data.x, everything)
    m, numbers = len(data.x_test), {}
    for place, kind in enumerate(sets):
        rows = slice(m + place * work.scale.unseen, m + (place + 1) * work.scale.unseen)
        numbers[kind] = {}
        for score in SCORES:
            values = torch.cat([scores[score][:m], scores[score][rows]]).cpu().numpy()
            numbers[kind][score] = float(roc_auc_score(np.arange(len(values)) >= m, values))
    shown = {score: values.cpu().numpy() for score, values in scores.items()}
    accuracy = float((model(data.x_test).argmax(1) == data.y_test).double().mean())
    return Part({"auroc": numbers, "certificates": certificates, "accuracy": accuracy, "known": m}, shown)


@torch.no_grad()
def _baselines(model: nn.Module, x_train: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Scores that need no kernel between two samples."""
    logits = model(x)
    last = ConjugateKernel(model)
    uniform = TangentKernel(model, outputs=lambda out: -out.log_softmax(1).mean(1))
    squares = last.diagonal(x)[:, None] + last.diagonal(x_train) - 2 * last(x, x_train)
    return {
        "softmax": 1 - logits.softmax(1).max(1).values,
        "energy": -logits.logsumexp(1),
        "gradnorm": -uniform.diagonal(x).sqrt(),
        "features": squares.clamp(min=0).min(1).values.sqrt(),
        "pixels": torch.cdist(x.flatten(1), x_train.flatten(1)).min(1).values,
    }
