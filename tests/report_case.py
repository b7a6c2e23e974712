"""Made-up results for the report's tests: one with everything in it, one where all that may be null is null."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
from page_case import HOSTILE

from ntkit.base.files import write_arrays, write_json

KERNELS = (
    ("init", "tangent kernel at initialization"),
    ("after", "after kernel"),
    ("conjugate", "conjugate kernel (last hidden layer)"),
)


def number(value: float | None, error: float | None = None, certificate: str = "") -> dict[str, Any]:
    return {"value": value, "error": error, "certificate": certificate}


def rate(wrong: int, n: int, split: str) -> dict[str, Any]:
    p = wrong / n
    return number(p, math.sqrt(p * (1 - p) / n), f"binomial standard error, {n} {split} images")


Arrays = dict[str, dict[str, np.ndarray]]  # by stage


def full() -> tuple[dict[str, Any], Arrays]:
    """Images, trained here: every section has its input."""
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 450]
    grown = np.log1p(steps) / math.log(451)  # 0 at the start, 1 at the end
    first = 840.0 * np.arange(1, 21) ** -1.35
    last = np.concatenate([10400.0 * np.arange(1, 11) ** -0.55, 1200.0 * np.arange(2, 12) ** -1.1])
    eigenvalues = np.exp(np.log(first) + grown[:, None] ** 1.6 * (np.log(last) - np.log(first)))
    ks = [1, 2, 5, 10, 20]
    targets = np.outer(1 - grown, [0.08, 0.14, 0.27, 0.41, 0.55]) + np.outer(grown, [0.13, 0.26, 0.58, 0.93, 0.96])
    outputs = np.outer(1 - grown, [0.82, 0.87, 0.93, 0.96, 0.98]) + np.outer(grown, [0.16, 0.3, 0.64, 0.97, 0.985])
    residual = np.outer(1 - grown, [0.2, 0.27, 0.38, 0.5, 0.62]) + np.outer(grown**2, [0.02, 0.05, 0.09, 0.18, 0.3])
    noise = np.random.default_rng(5).normal(size=450)
    t = np.arange(450)
    losses = 2.3 * np.exp(-t / 55) + 0.02 + 0.12 * np.abs(noise) * np.exp(-t / 150)
    errors = {"init": (24, 0), "after": (8, 0), "conjugate": (9, 0)}
    machines = [
        {
            "kernel": kernel,
            "label": label,
            "status": "optimal",
            "advice": "",
            "test_error": rate(errors[kernel][0], 360, "test"),
            "train_error": rate(errors[kernel][1], 1437, "train"),
            "ridge_test_error": rate(errors[kernel][0] + 1, 360, "test"),
            "ridge_train_error": rate(0, 1437, "train"),
            "ridge_status": "solved",
            "ridge_residual": 3e-15,
            "confusion": confusion(errors[kernel][0]),
            "gap": 3.1e-10 * (i + 1),
            "kkt": 2.7e-9 / (i + 1),
            "margin": [round(0.02 * (i + 1) * (1 + 0.13 * c), 5) for c in range(10)],
            "support": [611, 214, 187][i],
            "n": 1437,
        }
        for i, (kernel, label) in enumerate(KERNELS)
    ]
    alignments = {"init": (0.318, 0.189, 2.6, 8520.0, 5.93), "after": (0.604, 0.781, 5.4, 159200.0, 110.8)}
    alignments["conjugate"] = (0.455, 0.716, 4.1, 908.3, 0.632)
    names = ("alignment", "alignment_centered", "effective_rank", "trace", "scale")
    quality = [
        {"kernel": k, "label": s, "pictured": [2] * 10, **dict(zip(names, alignments[k], strict=True))}
        for k, s in KERNELS
    ]
    rows = [
        ("shift", "1 pixel right, 1 pixel down", (0.612, 0.011), (0.668, 0.014), (0.815, 0.009)),
        ("rotation", "by 0.25 rad, both ways", (0.735, 0.009), (0.797, 0.012), (0.886, 0.007)),
        ("zoom", "centre 13/14, bilinear", (0.941, 0.003), (0.944, 0.004), (0.972, 0.002)),
        ("quadrant swap", "upper left and lower right", (0.523, 0.012), (0.241, 0.015), (0.472, 0.013)),
        ("patch shuffle", "2 x 2 patches, seed 0", (0.452, 0.011), (0.158, 0.012), (0.405, 0.012)),
    ]
    cosine = "standard error of the mean, 200 test images"
    invariances = [
        {
            "name": name,
            "parameters": parameters,
            **{
                key: number(*pair, cosine)
                for key, pair in zip(("init", "after", "conjugate"), (before, after, conjugate), strict=True)
            },
            "undefined": 0,
        }
        for name, parameters, before, after, conjugate in rows
    ]
    for row in invariances:
        row["change"] = number(row["after"]["value"] - row["init"]["value"], 0.01, cosine)
        row["beyond"] = number(row["change"]["value"] + 0.212, 0.012, cosine)
        row["centered"] = {key: number(row[key]["value"] - 0.4, 0.02, cosine) for key, _ in KERNELS} | {"undefined": 1}
        row["centered"] |= {name: row[name] for name in ("change", "beyond")}
    different = {"name": "two different images", "parameters": "mean over all pairs", "undefined": 0}
    different |= {"init": number(0.519, 0.02), "after": number(0.307, 0.02), "conjugate": number(0.402, 0.02)}
    different["change"] = number(-0.212, 0.015)
    different["centered"] = {key: number(-0.0052, 0.0001) for key, _ in KERNELS} | {"undefined": 2}
    neighbors, arrays = _neighbors()
    explained, shown = _explained()
    examples, images = _examples(rows, arrays["test"])
    results = {
        "format": 1,
        "title": "cnn on digits",
        "data": {
            "name": "digits",
            "kind": "images",
            "classes": [str(c) for c in range(10)],
            "train": 1437,
            "test": 360,
            "input_shape": [1, 8, 8],
            "normalization": "pixels / 16, so that they lie in [0, 1]",
            "source": "handwritten digits, as shipped with scikit-learn",
            "hash": "5f1d0c0f9b7a43b2e6d1c8a45be07f21",
        },
        "model": {
            "name": "cnn",
            "parameters": 38282,
            "outputs": 10,
            "loss": "cross-entropy",
            "weights": None,
            "kernel_outputs": "trace",
            "fallback": {},
            "text": "Sequential(\n  (0): Conv2d(1, 16, kernel_size=(3, 3), padding=(1, 1))\n  (1): ReLU()\n"
            "  (2): MaxPool2d(kernel_size=2, stride=2)\n  (3): Flatten(start_dim=1)\n  (4): Linear(256, 128)\n"
            "  (5): ReLU()\n  (6): Linear(128, 10)\n)",
        },
        "training": {
            "optimizer": "SGD lr 0.05, momentum 0.9",
            "batch_size": 32,
            "steps": 450,
            "stop": "steps",
            "losses": [float(x) for x in losses],
            "seed": 0,
        },
        "network": {
            "train_error": rate(2, 1437, "train"),
            "ridge_test_error": rate(3, 360, "test"),
            "test_error": rate(9, 360, "test"),
            "train_loss": number(0.0213, 0.0018, "standard error of the mean"),
            "test_loss": number(0.0941, 0.0173, "standard error of the mean"),
            "fit": number(0.991, None, "1 minus the training loss over that of the best constant prediction"),
            "confusion": confusion(9),
        },
        "machines": machines,
        "quality": quality,
        "comparisons": {
            "compared": [
                paired("init", "svm", 2, 18, 360), paired("conjugate", "svm", 3, 4, 360),
                paired("network", "svm", 4, 5, 360),
            ]
        },
        "similarity": {
            "init_after": 0.671,
            "after_conjugate": 0.926,
            "init_conjugate": 0.732,
            "init_after_centered": 0.402,
            "after_conjugate_centered": 0.951,
            "init_conjugate_centered": 0.455,
        },
        "along": {
            "points": 500,
            "steps": steps,
            "loss": [float(2.3 * math.exp(-s / 55) + 0.02) for s in steps],
            "eigenvalues": eigenvalues.tolist(),
            "trace": (eigenvalues.sum(1) * 1.08).tolist(),
            "alignment": (0.318 + 0.286 * grown).tolist(),
            "alignment_centered": (0.189 + 0.592 * grown**1.3).tolist(),
            "effective_rank": (eigenvalues.sum(1) * 1.08 / eigenvalues[:, 0]).tolist(),
            "distance": (0.33 * grown**1.8).tolist(),
            "energy_ks": ks,
            "energy_target": targets.tolist(),
            "energy_output": outputs.tolist(),
            "energy_residual": residual.tolist(),
            "residual": 3.4e-13,
            "sharpness": (eigenvalues[:, 0] / 500).tolist(),
            "sharpness_bound": [40.0] * len(steps),
            "test_loss": [float(2.3 * math.exp(-s / 65) + 0.09) for s in steps],
            "test_error": [rate(round(9 + 300 * math.exp(-s / 20)), 360, "test") for s in steps],
        },
        "invariances": {"samples": 200, "rows": invariances, "different": different, "examples": examples},
        "against_loss": _against_loss(rows),
        "explained": explained,
        "limit": _limit(steps),
        "left_out": [],
        "neighbors": neighbors,
        "certificates": [
            {
                "what": "kernel against plain autograd, 3 samples x all parameters, float64",
                "value": 3.1e-15,
                "tolerance": 1e-10,
                "ok": True,
            },
            {"what": "symmetry of the after kernel, relative", "value": 0.0, "tolerance": 1e-6, "ok": True},
            {"what": "relative duality gap, worst machine", "value": 9.3e-10, "tolerance": 1e-8, "ok": True},
            {"what": "eigenpair residual, relative to the largest eigenvalue", "value": 3.4e-13, "tolerance": 1e-8,
             "ok": True},
        ],
        "reproduce": {
            "command": "ntkit analyze --data digits --model cnn --lr 0.05 --momentum 0.9 --batch-size 32 --steps 450 "
            "--along 500 --seed 0",
            "versions": {"ntkit": "0.1.0", "torch": "2.13.0", "numpy": "2.4.1", "python": "3.11.7"},
            "seed": 0,
            "device": "cpu",
            "dtype": "float32",
            "memory": 2_000_000_000,
        },
    }  # fmt: skip
    grams = {f"gram-{key}": _gram(eigenvalues[-1 if key == "after" else 0]) for key, _ in KERNELS}
    return results, {"neighbors": arrays, "invariances": {"images": images}, "explained": shown, **grams}


def _limit(steps: list[int]) -> dict[str, Any]:
    """The first-order network falls behind."""
    shares = [math.exp(-s / 20) for s in steps]
    wrong = {"network": [round(9 + 300 * s) for s in shares], "first_order": [round(90 + 220 * s) for s in shares]}
    losses = {"network": [0.09 + 2.3 * s for s in shares], "first_order": [0.9 + 1.5 * s for s in shares]}
    first = {
        "steps": steps, "tests": 360, "distance": [None, *(1 - s for s in shares[1:])], "test_loss": losses,
        "test_error": {name: [rate(n, 360, "test") for n in values] for name, values in wrong.items()},
        "paired": paired("network", "svm", 85, 4, 360),
    }  # fmt: skip
    kernel = {
        "samples": 12, "networks": 8, "error": 0.023, "biased": False, "distance": 0.167, "notes": [],
        "why": "layer '4' (MaxPool2d): max_pool2d, which mixes channels or positions",
        "cosines": {"init": 0.971, "after": 0.583},
    }  # fmt: skip
    return {"first_order": first, "kernel": kernel}


def confusion(wrong: int, n: int = 360) -> list[list[int]]:
    """All wrong answers take 8 for 3."""
    counts = np.diag([n // 10] * 10)
    counts[8, 3], counts[8, 8] = wrong, n // 10 - wrong
    return counts.tolist()


def paired(other: str, machine: str, only_after: int, only_other: int, n: int) -> dict[str, Any]:
    """Two error rates on the same examples, as `ntkit.commands.kernel_measures.paired` has them."""
    from scipy.stats import binomtest

    value, differ = (only_after - only_other) / n, only_after + only_other
    return {
        "with": other, "machine": machine, "examples": n, "only_after": only_after, "only_other": only_other,
        **number(value, math.sqrt((differ / n - value**2) / n), f"pairs of {n} test examples"),
        "p": float(binomtest(only_after, differ).pvalue) if differ else 1.0,
    }  # fmt: skip


def _gram(eigenvalues: np.ndarray) -> dict[str, np.ndarray]:
    labels = np.repeat(np.arange(10), 2)
    picture = (0.5 + 0.4 * (labels[:, None] == labels) + 0.1 * np.eye(20)).astype(np.float32)
    return {"eigenvalues": eigenvalues, "picture": picture, "pictured": np.arange(20)}


def minimal() -> dict[str, Any]:
    """Vectors, weights loaded: nothing along training, no invariances, no neighbors; numbers that are not defined."""
    results = copy.deepcopy(full()[0])
    results["title"] = "my-mlp on table.npz"
    results["data"].update(name="table.npz", kind="vectors", classes=["no", "yes"], train=90, test=31, input_shape=[7])
    results["model"].update(name="my-mlp", outputs=1, loss="logistic (one output)", weights="mlp.safetensors")
    results["model"].update(fallback={"scale": "an operation without a rule"}, parameters=211)
    for key in ("training", "along", "invariances", "neighbors", "against_loss", "explained", "comparisons", "limit"):
        results[key] = None
    results["network"] = {name: number(None) for name in results["network"] if name != "confusion"}
    results["network"]["test_error"] = number(0.25, None, "")
    for machine in results["machines"]:
        machine.update(margin=0.125, n=90)
        del machine["confusion"]
    for row in results["quality"]:
        del row["pictured"]
    results["machines"][0].update(status="not separable", advice="Use a soft margin.", gap=None, kkt=None, margin=0.0)
    results["machines"][0].update(test_error=number(None), train_error=number(None))
    results["machines"][1].update(status="inaccurate", advice="Compute the kernel in float64.", gap=2e-3)
    results["quality"][0].update(alignment_centered=None, effective_rank=None)
    results["similarity"] = dict.fromkeys(results["similarity"])
    results["certificates"] = [{"what": "symmetry", "value": None, "tolerance": 1e-6, "ok": False}]
    results["reproduce"].update(seed=None, memory=None)
    return results


def earlier() -> tuple[dict[str, Any], Arrays]:
    """As written before centered cosines, those of different images, examples, curves by loss, explanations, pairs."""
    results, arrays = full()
    del results["explained"], results["limit"], results["left_out"]
    del results["comparisons"], results["network"]["fit"], results["network"]["confusion"]
    for row in results["quality"]:
        del row["pictured"]
    for machine in results["machines"]:
        for name in ("ridge_train_error", "ridge_status", "ridge_residual", "confusion"):
            del machine[name]
    for name in ("sharpness", "sharpness_bound", "test_loss", "test_error"):
        del results["along"][name]
    del results["against_loss"], results["invariances"]["different"], results["invariances"]["examples"]
    for row in results["invariances"]["rows"]:
        del row["centered"], row["change"], row["beyond"]
    return results, {"neighbors": arrays["neighbors"]}


def write(folder: Path, results: dict[str, Any], arrays: Arrays | None = None) -> Path:
    """Write a run folder that the report can read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    if arrays is not None:
        (folder / "arrays").mkdir(exist_ok=True)
        for stage, content in arrays.items():
            write_arrays(folder / "arrays" / f"{stage}.safetensors", content)
    return folder


def _against_loss(rows: list) -> dict[str, Any]:
    """Six snapshots; the first kernel does not separate the points."""
    snapshots = []
    for i, loss in enumerate((2.31, 0.9, 0.35, 0.13, 0.05, 0.021)):
        cosines = [
            {"name": name, "raw": number(first[0] + 0.01 * i, 0.01), "centered": number(0.2 + 0.02 * i, 0.02)}
            for name, _, first, *_ in rows
        ]
        error = rate(20 - 3 * i, 360, "test") if i else number(None, None, "SVM not separable")
        snapshots.append(
            {
                "step": 3**i,
                "loss": loss,
                "network_error": rate(300 if not i else 22 - 3 * i, 360, "test"),
                "status": "optimal" if i else "not separable",
                "kernel_error": error,
                "ridge_error": rate(21 - 3 * i, 360, "test"),
                "cosines": cosines,
                "different": {"raw": number(0.52 - 0.04 * i, 0.02), "centered": number(-0.02, 0.001)},
            }
        )
    return {"points": 500, "tests": 360, "samples": 50, "machine": "ridge", "snapshots": snapshots}


def _explained() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Two test points, one right and one wrong; pixels are those of the examples' numbers, one pixel lit for each."""
    steps, points = [0, 1, 8, 450], []
    for j, (label, said) in enumerate((("3", "3"), ("8", "9"))):
        entry: dict[str, Any] = {
            "test_index": 40 + j, "why": ("right, most confident", "wrong, most confident")[j], "label": label,
            "predicted": said, "right": label == said, "margin": 7.5 - 5 * j, "initial": -2.25, "weight_decay": 0.0,
            "examples": 9.75 - 5 * j + 3e-6, "residual": 3e-6,
        }  # fmt: skip
        for start, method in enumerate(("accounting", "influence")):
            entry[method] = {
                side: [
                    {"index": 10 * start + 5 * down + i + j, "label": str(i), "score": score, "rank_there": 30 + i,
                     "along": [0.0, score / 4, score / 2, score]}
                    for i in range(5)
                    for score in [(-0.1 if down else 0.375) * (5 - i)]
                ]
                for down, side in enumerate(("helped", "hurt"))
            }  # fmt: skip
        entry["deletions"] = [
            {"method": method, "size": 5, "predicted": -0.5 - k, "real": -0.25 - k, "spread": 0.125 if k == 2 else None}
            for k, method in enumerate(("accounting", "influence", "random"))
        ]
        points.append(entry)
    train = np.zeros((21, 8, 8, 1), np.uint8)
    train.reshape(21, 64)[np.arange(21), np.arange(21)] = 255
    test = np.full((2, 8, 8, 1), 100, np.uint8)
    told = {
        "steps_shown": steps,
        "accounting": {"bitwise": True},
        "influence": {"metasmoothness": 0.625, "smooth": True, "miss": 0.0625, "trusted": True, "checked": 1,
                      "own_error": 2e-8,
                      "finite_differences": 4.7e-6},
        "random_sets": 3,
        "points": points,
    }  # fmt: skip
    return told, {"test": test, "train": train, "train_index": np.arange(21)}


def _examples(rows: list, test: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Two test images with their transforms, here pictures that only differ from one another."""
    both = {form: {key: 0.1 + 0.2 * i for i, (key, _) in enumerate(KERNELS)} for form in ("raw", "centered")}
    told = [
        {
            "test_index": 7 + i,
            "label": str(i),
            "cosines": [{"name": name, **both} for name, *_ in rows],
            "different": both,
        }
        for i in range(2)
    ]
    return told, np.stack([np.stack([np.roll(test[i], j, 1) for j in range(1 + len(rows))]) for i in range(2)])


def _neighbors() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images / 16 * 255).round().astype(np.uint8)
    flat = digits.images.reshape(len(pixels), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    rows, test, before, after = [], [], [], []
    for number_, i in enumerate([1441, 1469, 1553, 1570, 1612, 1658]):
        label = int(digits.target[i])
        cosine = unit[:1437] @ unit[i]
        near = np.argsort(-cosine)[3:8] if number_ % 2 else np.argsort(-cosine)[:5]
        same = np.flatnonzero(digits.target[:1437] == label)
        alike = same[np.argsort(-cosine[same])[:5]]
        if number_ == 4:  # one neighbour of another class also after training
            alike[3] = np.flatnonzero(digits.target[:1437] == 8)[3]
            near[1], near[2] = (np.flatnonzero(digits.target[:1437] == c)[7] for c in (3, 9))
        rows.append(
            {
                "test_index": i - 1437,
                "label": str(label),
                "predicted": "8" if number_ == 4 else str(label),
                "init": [_found(j, digits.target, 0.97 - 0.013 * r) for r, j in enumerate(near)],
                "after": [_found(j, digits.target, 0.94 - 0.041 * r) for r, j in enumerate(alike)],
            }
        )
        test.append(pixels[i])
        before.append(pixels[near])
        after.append(pixels[alike])
    arrays = {"test": np.stack(test), "init": np.stack(before), "after": np.stack(after)}
    return {"rows": rows, "kind": "images"}, {name: value[..., None] for name, value in arrays.items()}


def _found(index: int, labels: np.ndarray, similarity: float) -> dict[str, Any]:
    return {"index": int(index), "label": str(labels[index]), "similarity": similarity}


def _poison(value: Any, key: str = "") -> Any:
    """Put hostile text into every string that a user could choose."""
    if isinstance(value, dict):
        return {k: _poison(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_poison(v, key) for v in value]
    fixed = {"kind", "kernel", "status", "stop", "kernel_outputs", "method", "with", "machine"}
    return HOSTILE + value if isinstance(value, str) and key not in fixed else value


def hostile() -> dict[str, Any]:
    """Results in which everything that a user names is text that tries to run."""
    return _poison(full()[0])
