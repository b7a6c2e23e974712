"""The measurements of `ntkit analyze` on one network, each a function from kernels and data to plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base import progress
from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory
from ntkit.data import Data
from ntkit.jacobian.forwards import raw_outputs
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.kernels.conjugate import ConjugateKernel
from ntkit.kernels.kernel import Kernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.probes import Cosines, Invariance, cosines, standard
from ntkit.tracking import track
from ntkit.trajectory import Trajectory

TOP = 20  # eigenvalues followed along training
ENERGY_KS = (1, 2, 5, 10, 20)
ENERGIES = ("energy_target", "energy_output", "energy_residual")
NEIGHBORS, EXAMPLES = 5, 8  # neighbors per test example, and test examples with neighbors
SHOWN = 4  # test images that are shown with their transforms
DIFFERENT = "two different images"
LABELS = {
    "init": "tangent kernel at initialization",
    "after": "after kernel",
    "conjugate": "conjugate kernel (last hidden layer)",
}


def number(value: float | None, error: float | None, certificate: str) -> dict[str, Any]:
    """One number of a result: value, standard error and what certifies it."""
    return {"value": finite(value), "error": finite(error), "certificate": certificate}


def rate(wrong: Tensor, what: str) -> dict[str, Any]:
    """Error rate with its binomial standard error."""
    p, n = float(wrong.double().mean()), wrong.numel()
    return number(p, (p * (1 - p) / n) ** 0.5, f"binomial standard error, {n:,} {what}")


class TrainingTask:
    """What the network is trained for: two classes with one output (logistic), or one output per class (softmax)."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.data, self.classes = data, len(data.classes)
        if self.classes < 2:
            got, fix = f"one class, {data.classes[0]}", "Add examples of another class."
            raise refusal(f"data {data.name}", got=got, expected="at least two classes", fix=fix)
        parameter = next(model.parameters(), data.x_train)
        self.outputs = outputs_of(model, data.x_train[:2].to(parameter.device)).shape[1]
        if self.outputs not in ({1, 2} if self.classes == 2 else {self.classes}):
            got = f"{self.outputs} outputs for {self.classes} classes"
            expected = "one output per class" + (", or one output" if self.classes == 2 else "")
            fix = "Give the factory a parameter named outputs, or select as many classes with --classes."
            raise refusal(f"model {type(model).__name__}", got=got, expected=expected, fix=fix)
        self.binary = self.outputs == 1
        self.name = "logistic (one output)" if self.binary else "cross-entropy"

    def loss(self, out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Mean loss of outputs [n, ...] for labels [n]; with reduction="none" each sample's."""
        out = out.reshape(len(y), -1)
        if self.binary:
            return F.binary_cross_entropy_with_logits(out[:, 0], y.to(out), reduction=reduction)
        return F.cross_entropy(out, y, reduction=reduction)

    def predict(self, out: Tensor) -> Tensor:
        """Labels from outputs [n, C]."""
        return (out[:, 0] > 0).long() if self.binary else out.argmax(1)

    def targets(self, y: Tensor) -> Tensor:
        """Targets of the alignment: +-1 [n], or one-hot [n, C]."""
        return 2.0 * y.double() - 1 if self.binary else F.one_hot(y, self.classes).double()


def outputs_of(model: nn.Module, x: Any) -> Tensor:
    """Outputs [n, C] in batches, without gradients; the model is left as it was."""
    return raw_outputs(model, x).reshape(len(x), -1)


def network(task: TrainingTask, model: nn.Module) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Loss and error of the network itself on both sets, how well it fits its training set; and its wrong answers.

    ``fit`` is 1 - training loss / loss of the best constant prediction, which is the entropy of the class frequencies;
    ``right`` the same of errors.
    """
    result, data = {}, task.data
    wrong = torch.zeros(0, dtype=torch.bool)
    for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        out = outputs_of(model, x)
        predicted = task.predict(out)
        wrong = predicted != y
        result[f"{part}_error"] = rate(wrong, f"{part} examples")
        loss = task.loss(out, y, reduction="none").double()
        error = float(loss.std() / len(y) ** 0.5) if len(y) > 1 else None
        result[f"{part}_loss"] = number(float(loss.mean()), error, f"standard error over {len(y):,} examples")
        if part == "test":
            result["confusion"] = confusion(predicted, y, task.classes)
    shares = torch.bincount(data.y_train.cpu(), minlength=task.classes).double() / len(data.y_train)
    constant = float(-(shares * shares.clamp_min(1e-300).log()).sum())
    loss = result["train_loss"]["value"]
    fit = 1 - loss / constant if constant and loss is not None else None
    result["fit"] = number(fit, None, "1 minus the training loss over that of the best constant prediction")
    wrong_constant, wrong_now = 1 - float(shares.max()), result["train_error"]["value"]
    right = 1 - wrong_now / wrong_constant if wrong_constant else None
    result["right"] = number(right, None, "1 minus the training error over that of the most frequent class")
    return result, {"wrong": wrong.cpu().numpy()}


def confusion(predicted: Tensor, y: Tensor, classes: int) -> list[list[int]]:
    """How many examples of each class (rows) were said to be of each class (columns)."""
    places = y.cpu() * classes + predicted.cpu()
    return torch.bincount(places, minlength=classes**2).reshape(classes, classes).tolist()


def along(
    task: TrainingTask, model: nn.Module, trajectory: Trajectory, points: int, memory: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The kernel on the same training points at every snapshot (Kopitkov & Indelman 2020; trace kernel)."""
    rows = spread(len(task.data.x_train), points)
    x, y, n = task.data.x_train[rows], task.data.y_train[rows], len(rows)
    k = min(TOP, n)
    ks = [j for j in ENERGY_KS if j <= k]
    tracked = track(trajectory, x, y, model=model, loss=task.loss, k=k, outputs="trace", memory=memory)
    series = tracked.series
    errors = _test_errors(task, model, trajectory, tracked.steps)
    same = ("loss", "eigenvalues", "trace", "alignment", "alignment_centered", "effective_rank", "distance",
            "cka", "sharpness", "sharpness_bound")  # fmt: skip
    energies = {name: [[row[j - 1] for j in ks] for row in series[name]] for name in ENERGIES}
    result = {
        "points": n,
        "steps": tracked.steps,
        **{name: series.get(name, [None] * len(tracked.steps)) for name in same},
        **energies,
        **errors,
        "energy_ks": ks,
        "residual": max((r for r in series["residual"] if r is not None), default=0.0),
    }
    arrays = {
        "eigenvalues": np.asarray(series["eigenvalues"], dtype=np.float64),
        "eigenvectors": np.stack([tracked.eigenvectors(step) for step in tracked.steps]),
        "points": rows.numpy(),
    }
    return result, arrays


def _test_errors(task: TrainingTask, model: nn.Module, trajectory: Trajectory, steps: list[int]) -> dict[str, Any]:
    """The network's own loss on the test examples at each snapshot and, with classes, its error."""
    x, y = task.data.x_test, task.data.y_test
    found: dict[str, Any] = {"test_loss": []} | ({"test_error": []} if task.classes else {})
    for step in steps:
        trajectory.load(model, step)
        out = outputs_of(model, x)
        found["test_loss"].append(finite(float(task.loss(out, y).double())))
        if task.classes:
            bad = not bool(out.isfinite().all())
            found["test_error"].append(number(None, None, "outputs that are not finite") if bad else
                                       rate(task.predict(out) != y, "test examples"))  # fmt: skip
    return found


def spread(n: int, count: int) -> Tensor:
    """At most `count` indices below `n`, spread evenly from the first to the last."""
    return torch.linspace(0, max(n - 1, 0), min(count, n)).long()


def invariances(kernels: dict[str, Kernel], data: Data, samples: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Cosines between test images and their transforms under each kernel (Long 2021), and between different images."""
    tests = spread(len(data.x_test), samples)
    images = data.x_test[tests.to(data.x_test.device)]
    probes = standard(tuple(images.shape[1:]))
    empty = dict.fromkeys(("init", "after", "conjugate"), number(None, None, "not measured"))
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "parameters": text, **empty, "undefined": 0, "centered": {**empty, "undefined": 0}}
        for name, text in [
            *((name, "; ".join(t.parameters for t in group)) for name, group in probes.items()),
            (DIFFERENT, f"mean over all pairs of the {len(images)} images"),
        ]
    }
    found: dict[str, dict[str, Cosines]] = {}
    with progress.task("invariances", total=len(kernels)) as bar:
        for key, kernel in kernels.items():
            transformed, different = cosines(kernel, images, probes)
            found[key] = transformed | {DIFFERENT: different}
            for name, three in found[key].items():
                for entry, cosine in ((rows[name], three.raw), (rows[name]["centered"], three.centered)):
                    entry[key] = mean_cosine(cosine)
                    entry["undefined"] = max(entry["undefined"], cosine.undefined)
            bar.advance()
    if "init" in found and "after" in found:
        _add_changes(rows, found["init"], found["after"])
    shown = spread(len(images), SHOWN).tolist()
    examples = [
        {
            "test_index": int(tests[i]),
            "label": data.shown(data.y_test[tests[i]]),
            "cosines": [{"name": name, **_of_image(found, name, i)} for name in probes],
            "different": _of_image(found, DIFFERENT, i),
        }
        for i in shown
    ]
    strips = torch.stack([images[shown], *(group[0](images[shown]) for group in probes.values())], 1)
    pixels = as_pixels(strips.flatten(0, 1))
    arrays = {"images": pixels.reshape(len(shown), strips.shape[1], *pixels.shape[1:])}
    different_row = rows.pop(DIFFERENT)
    return {"samples": len(images), "rows": [*rows.values()], "different": different_row, "examples": examples}, arrays


def _add_changes(rows: dict[str, dict[str, Any]], before: dict[str, Cosines], after: dict[str, Cosines]) -> None:
    """Mean change of each cosine, image by image, and how much more it is than that of two different images.

    The standard error of the latter takes into account that a pair of images counts for both (the jackknife): it is the
    deviation of c - 2 (n - 1) / (n - 2) d over sqrt(n), of the changes c of the transform's cosine and d of the mean
    cosine with the other images.
    """
    for name, row in rows.items():
        for entry, form in ((row, "raw"), (row["centered"], "centered")):
            change, different = (
                getattr(after[n], form).per_sample - getattr(before[n], form).per_sample for n in (name, DIFFERENT)
            )
            if name == DIFFERENT:
                entry["change"] = _mean(change, change)
            else:
                entry["change"] = _mean(change)
                entry["beyond"] = _mean(change - different, -different)


def _mean(values: Tensor, over_pairs: Tensor | None = None) -> dict[str, Any]:
    """Mean of the defined values, and p of Student's t test that it is 0; None without any spread.

    The standard error is their deviation over the root of their number; the part of them that is each image's mean over
    its pairs with the others counts as in the jackknife.
    """
    from scipy.stats import t

    known = values.isfinite()
    count, mean, fewest = int(known.sum()), float(values[known].mean()), 2 if over_pairs is None else 3
    if count < fewest:
        return number(None, None, f"fewer than {fewest} images") | {"p": None}
    spread_of = values if over_pairs is None else values + over_pairs * count / (count - 2)
    error = float(spread_of[known].std()) / count**0.5
    if not error and mean:
        return number(mean, None, f"no spread over {count} images") | {"p": None}
    p = 2 * float(t.sf(abs(mean) / error, count - 1)) if error else 1.0
    return number(mean, error, f"standard error over {count} images, before and after training") | {"p": p}


def mean_cosine(cosine: Invariance) -> dict[str, Any]:
    """Mean cosine with its standard error."""
    count = len(cosine.per_sample) - cosine.undefined
    return number(cosine.mean, cosine.standard_error, f"standard error over {count} images")


def _of_image(found: dict[str, dict[str, Cosines]], name: str, i: int) -> dict[str, dict[str, float | None]]:
    """Raw and centered cosine of one image, by kernel."""
    return {
        form: {key: finite(float(getattr(by_name[name], form).per_sample[i])) for key, by_name in found.items()}
        for form in ("raw", "centered")
    }


def select_examples(task: TrainingTask, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Test examples to look at, up to half of them misclassified, the others spread over the set; all predictions."""
    predicted = task.predict(outputs_of(model, task.data.x_test))
    wrong = (predicted != task.data.y_test).nonzero().flatten()[: EXAMPLES // 2]
    right = (predicted == task.data.y_test).nonzero().flatten()
    return torch.cat([wrong, right[spread(len(right), EXAMPLES - len(wrong))]]), predicted


def neighbors(
    data: Data, examples: Tensor, predicted: Tensor, kernels: dict[str, tuple[Tensor, Tensor, Tensor]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Training examples nearest to some test examples, by kernel cosine.

    Parameters
    ----------
    examples : indices of the test examples, [R].
    predicted : the network's prediction for each test example.
    kernels : kernel -> (k(examples, train) [R, n], diagonal on the examples [R], diagonal on train [n]).
    """
    rows: list[dict[str, Any]] = [
        {"test_index": i, "label": data.shown(data.y_test[i]), "predicted": data.shown(predicted[i])}
        for i in examples.tolist()
    ]
    words = data.sentence if data.vocabulary is not None else None if data.columns is None else data.columns.shown
    if words is not None:
        for row in rows:
            row["text"] = words(data.x_test[row["test_index"]])
    arrays = {"test": as_pixels(data.x_test[examples])} if data.kind == "images" else {}
    count = min(NEIGHBORS, len(data.x_train))
    for name, (K, own, train) in kernels.items():
        cosine = K.double() / (own.double().sqrt()[:, None] * train.double().sqrt()[None]).clamp_min(1e-300)
        top, index = cosine.topk(count, dim=1)
        for row, similarities, indices in zip(rows, top.tolist(), index.tolist(), strict=True):
            row[name] = [
                {"index": j, "label": data.shown(data.y_train[j]), "similarity": similarity}
                | ({} if words is None else {"text": words(data.x_train[j])})
                for j, similarity in zip(indices, similarities, strict=True)
            ]
        if data.kind == "images":
            pixels = as_pixels(data.x_train[index.flatten().to(data.x_train.device)])
            arrays[name] = pixels.reshape(len(examples), count, *arrays["test"].shape[1:])
    return {"rows": rows, "kind": data.kind}, arrays


def against_oracle(model: nn.Module, x: Tensor, when: str) -> dict[str, Any]:
    """Certificate: the kernel of a few samples against per-sample autograd in float64."""
    few = x[spread(len(x), 3)]
    exact = tangent_kernel(model, few, outputs="trace")
    error = float((TangentKernel(model, outputs="trace")(few).double() - exact).abs().max() / exact.abs().max())
    precision = few.dtype if few.is_floating_point() else "model dtype"
    what = f"tangent kernel {when} ({precision}) against per-sample autograd in float64, {len(few)} samples"
    return {"what": what.replace("torch.", ""), "value": finite(error), "tolerance": 1e-4, "ok": error <= 1e-4}


def check_size(n: int) -> None:
    """Refuse what does not fit: a Gram matrix in float32, and two in float64 while a machine is solved."""
    free = free_memory(torch.device("cpu"))
    if 20 * n**2 > free:
        got = f"kernel matrices of about {20 * n**2 / 1e9:.0f} GB while they are solved"
        expected = f"at most {free / 1e9:.0f} GB, the free memory"
        fix = f"Use fewer, e.g. --train {int((free / 40) ** 0.5) // 100 * 100}."
        raise refusal(f"{n:,} training examples", got=got, expected=expected, fix=fix)


def kernels_of(models: dict[str, nn.Module], memory: int) -> dict[str, Callable[[], Kernel]]:
    """The three kernels to compare; each is built when it is called for."""
    return {
        "init": lambda: TangentKernel(models["init"], outputs="trace", memory=memory),
        "after": lambda: TangentKernel(models["after"], outputs="trace", memory=memory),
        "conjugate": lambda: ConjugateKernel(models["after"]),
    }


def as_pixels(x: Tensor) -> np.ndarray:
    """Images [n, C, H, W] as bytes [n, H, W, 1 or 3]; standardized pixels are stretched to [0, 1]."""
    x = (x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)).double()  # a half's range overflows
    low, high = x.min(), x.max()
    if low < 0 or high > 1:
        x = (x - low) / (high - low if high > low else 1.0)
    return (x * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def finite(value: float | None) -> float | None:
    """The number, or None for NaN and infinities: JSON has neither."""
    return None if value is None or not np.isfinite(value) else float(value)
