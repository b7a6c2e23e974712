"""Tables and figures: every method beside every test, deletion curves, and examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.data import Data
from ntkit.report.words import fixed
from ntkit.studies.claim import mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, curve, lines, table
from ntkit.studies.tsai2023.methods import EXACT, EXISTING, METHODS, NEW, score_part
from ntkit.studies.tsai2023.predictions import PREDICTIONS, SHARES
from ntkit.studies.tsai2023.tsai_sentences import area, correlation
from ntkit.studies.tsai2023.tsai_setting import TASKS, file_of, images_or_tokens, tasks

CURVES = (NEW, EXISTING[0], EXISTING[2], *EXACT, "random")
SHOWN = ((NEW, "accounting"), (EXACT[0], "influence"))
TOP = 4  # examples shown for and against


def parts(work: Work) -> Iterator[StudyPart]:
    """Examples of the first seed of each task."""
    for task, seed in tasks(work):
        if seed == work.seeds[0]:
            yield StudyPart("examples", task, f"{file_of(task, seed)}-examples", _examples, (task, seed))


def _examples(work: Work, task: str, seed: int) -> Result:
    """Three test points, a confident right one, a wrong one or the least confident, with their top examples."""
    data, scores = images_or_tokens(work, TASKS[task], seed), work.result(score_part(task, seed)).arrays
    outputs, right = scores["outputs"], scores["right"]
    sure = np.where(right, np.abs(outputs), -np.abs(outputs)).argsort()
    points = [int(sure[-1]), int(sure[0]), int(sure[len(sure) // 2])]
    cases: list[dict[str, Any]] = []
    arrays = {}
    for place, j in enumerate(points):
        case: dict[str, Any] = {
            "predicted": data.classes[int(outputs[j] > 0)],
            "label": data.classes[int(data.y_test[j])],
            "output": float(outputs[j]),
            "top": {},
        }
        if TASKS[task].text:
            case["words"] = data.sentence(data.x_test[j])
        else:
            arrays[f"{place}"] = _gray(data.x_test[j : j + 1], data)[0]
        for method, _ in SHOWN:
            own = torch.from_numpy(scores[method][j])
            for side, order in (("for", own.argsort(descending=True)), ("against", own.argsort())):
                rows = order[:TOP]
                entry: dict[str, Any] = {
                    "scores": own[rows].tolist(),
                    "labels": [data.classes[int(data.y_train[i])] for i in rows],
                }
                if TASKS[task].text:
                    entry["words"] = [data.sentence(data.x_train[i]) for i in rows]
                else:
                    arrays[f"{place}/{method}/{side}"] = _gray(data.x_train[rows], data)
                case["top"][f"{method}/{side}"] = entry
        cases.append(case)
    return Result({"cases": cases}, arrays)


def _gray(x: Tensor, data: Data) -> np.ndarray:
    """Images from 0 to 255, uint8 [n, H, W, channels]."""
    low, high = float(data.x_train.min()), float(data.x_train.max())
    return (255 * (x - low) / (high - low)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def sections(results: Results) -> Iterator[Section]:
    """One section for each task."""
    for task, runs in results["deletion"].items():
        scores = results["scores"][task]
        points = sum(len(run.arrays["random: lowest"]) for run in runs)
        facts = {name: mean([run.numbers[name] for run in scores]) for name in ("train_error", "test_error", "loss")}
        smooth = mean([run.numbers["certificates"][f"{EXACT[0]}: metasmoothness"] for run in scores])
        size, steps = (scores[0].numbers[name] for name in ("parameters", "steps"))
        yield Section(
            task,
            task,
            f"{len(runs)} networks of {size:,} parameters, {steps} steps each: training loss "
            f"{facts['loss'].value:.3f}, training error {100 * facts['train_error'].value:.1f} %, error on the "
            f"{points} test points {100 * facts['test_error'].value:.1f} %. Metasmoothness {smooth.value:.2f}"
            + (": low, a derivative by weights says little here." if smooth.value < 0.5 else "."),
            [_methods(results, task), _curves(results, task), *_shown(results, task)],
            {
                f"examples/{task}/{name}": array
                for result in results["examples"].get(task, [])
                for name, array in result.arrays.items()
            },
        )


def _methods(results: Results, task: str) -> Item:
    rows = []
    for method in METHODS:
        seconds = mean([run.numbers["seconds"][method] for run in results["scores"][task]]).value
        rows.append([
            method,
            *(f"{area(results, task, method, direction):.2f}" for direction in ("lowest", "highest")),
            *(f"{correlation(results, task, method, what):.2f}" for what in PREDICTIONS),
            f"{seconds:.1f}",
        ])  # fmt: skip
    ceiling = [run.numbers["random"][PREDICTIONS[3]]["ceiling"] for run in results["predictions"][task]]
    columns = ["Method", "AUC-DEL−", "AUC-DEL+", *(what.capitalize() for what in PREDICTIONS), "CPU seconds"]
    told = [c for c in ceiling if c is not None]
    note = (
        "AUC-DEL−: change of the explained output without the examples of the lowest scores, the higher the better. "
        "AUC-DEL+: without those of the highest, the lower the better. Then rank correlations of scores and real "
        "changes: without single examples, without random sets. Fresh runs have a new initialization and order"
        + (f"; their ceiling is {mean(told).value:.2f}." if told else ".")
    )
    return table("Methods and tests", columns, rows, note)


def _curves(results: Results, task: str) -> Item:
    percents = [100 * share for share in SHARES]
    panels = []
    for direction, heading in (("lowest", "the lowest scores"), ("highest", "the highest scores")):
        series = []
        for method in CURVES:
            changes = np.concatenate([run.arrays[f"{method}: {direction}"] for run in results["deletion"][task]])
            values = [mean(changes[:, k]) for k in range(len(SHARES))]
            series.append(curve(method, percents, [v.value for v in values], error=[v.error for v in values]))
        panels.append((heading, series))
    return lines(
        "The explained output after removal",
        "Trained again without the examples of the lowest, and of the highest scores of each test point.",
        "% of the training set removed", "change of the output", panels, wide=True,
    )  # fmt: skip


def _shown(results: Results, task: str) -> Iterator[Item]:
    for result in results["examples"].get(task, []):
        cases = result.numbers["cases"]
        if TASKS[task].text:
            for case in cases:
                yield _sentences(case)
        else:
            title = "Training images for and against, by accounting and by influence"
            yield {"kind": "images", "title": title, "cases": [_images(task, i, case) for i, case in enumerate(cases)]}


def _told(case: Item) -> str:
    right = "correctly" if case["predicted"] == case["label"] else f"wrongly: it is {case['label']}"
    return f"Predicted {case['predicted']}, {right}; output {fixed(case['output'], 2, plus=True)}."


def _sentences(case: Item) -> Item:
    rows = []
    for method, words in SHOWN:
        for side in ("for", "against"):
            top = case["top"][f"{method}/{side}"]
            for text, label, score in zip(top["words"], top["labels"], top["scores"], strict=True):
                rows.append([f"{side}, by {words}", text, label, fixed(score, 3, plus=True)])
    return table(f"“{case['words']}”", ["", "Training sentence", "Class", "Score"], rows, _told(case))


def _images(task: str, place: int, case: Item) -> Item:
    strips = []
    for method, words in SHOWN:
        for side in ("for", "against"):
            top = case["top"][f"{method}/{side}"]
            images = [
                {"image": [f"examples/{task}/{place}/{method}/{side}", [k]], "caption": str(label),
                 "value": fixed(score, 2, plus=True), "other": side == "for" and label != case["predicted"]}
                for k, (label, score) in enumerate(zip(top["labels"], top["scores"], strict=True))
            ]  # fmt: skip
            strips.append({"heading": f"{side}, by {words}", "images": images})
    return {"image": [f"examples/{task}/{place}", []], "text": _told(case), "strips": strips}
