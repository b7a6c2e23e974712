"""Which method predicts what the deletion of training examples does, and at what cost: ours beside dattri, captum and
traker, in one run.

python -m benchmarks.attribution                       # the three settings, and the cost
python -m benchmarks.attribution tanh cost             # some parts; merged into the results
python -m benchmarks.attribution scale --data-dir FOLDER     # the large case, on the official MNIST files

Settings: an MLP 64-32-10 on 300 digits, in float64, 300 steps of SGD in batches of 50; "tanh", "momentum" (ReLU), and
"chaotic" (ReLU, a learning rate of 1). What is predicted is the margin of 40 test points when the network is trained
again. Every method's scores are judged on the same retrained networks, by `ntkit.explanations.evaluation`.

Columns: rank correlations, mean over test points and standard error, with the change when each example is left out
("one left out"), and with the outcome without 50 random sets of 5 % and of 50 % of the examples, in the same run and,
for 50 %, over five fresh runs, whose chance allows no more than the ceiling. AUC-DEL+ and AUC-DEL-: mean change of the
margin without the 2, 5 and 10 % of the examples with the highest scores (the lower, the better) and the lowest scores
(the higher, the better), over the first 20 test points. CPU seconds: one thread, after a warm-up, without training the
network explained.

Of a method with several settings (dampings, dimensions, test functions) the one with the largest mean of the four
correlations is shown: a choice with hindsight, which favors methods with many settings. All are in the JSON file.

The large case: a CNN of 110,000 parameters, 5,000 training examples, 2,000 steps of SGD with momentum, batches of 32,
100 test points; seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ntkit
from benchmarks.attribution_case import BATCH, SETTINGS, STEPS, TEST, Case, margin, methods, network
from benchmarks.attribution_table import best_settings, markdown
from benchmarks.common import RESULTS, machine
from benchmarks.peers import attribution as peers
from ntkit.explanations.evaluation import case_deletion, datamodeling_score, leave_one_out
from ntkit.explanations.retrainings import Retrainings

FRESH, DELETED = 5, 20  # fresh runs per set; test points whose own examples are deleted
FILE = RESULTS / "attribution.json"
Row = dict[str, Any]


def cpu_seconds(work: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result and the least CPU seconds of some calls, after one that warms up unless it takes over four seconds."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
        if seconds[0] > 4:
            return result, seconds[0]
    return result, min(seconds[1:])


def rows_of_ours(case: Case) -> list[Row]:
    """Scores and CPU seconds of the library's methods, and of the formulas beside them."""
    rows = []
    for by, name, settings, work in methods(case):
        scores, seconds = cpu_seconds(work)
        row = {"by": by, "method": name, "settings": settings, "status": "ok", "seconds": seconds, "scores": scores}
        rows.append(row)
    return rows


def rows_of_peers(case: Case) -> tuple[list[Row], dict[str, Row]]:
    """Scores and CPU seconds of the peers' methods; a record of each library."""
    rows, records = [], {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.safetensors"
        case.write(file)
        for library in peers.LIBRARIES:
            records[library], found = peers.measure(library, file)
            rows += [{"by": library, **row} for row in found]
            print(library, records[library], flush=True)
    return rows, records


def judge(row: Row, again: Retrainings) -> None:
    """Add the correlations to a method's row."""
    scores = row["scores"]
    if not bool(torch.isfinite(scores).all()):
        row["status"] = "values that are not finite"
        return
    found = {
        "one left out": leave_one_out(scores, again),
        "5 %": datamodeling_score(scores, again, share=0.05),
        "50 %": datamodeling_score(scores, again, share=0.5),
        "50 % fresh": datamodeling_score(scores, again, share=0.5, fresh=FRESH),
    }
    row |= {name: result.record() for name, result in found.items()}
    row["mean"] = statistics.fmean(result.value for result in found.values())


def judge_deletion(row: Row, again: Retrainings) -> None:
    """Add what happens without the examples that a method ranks highest, and lowest, for the first test points."""
    for name, against in (("AUC-DEL+", False), ("AUC-DEL-", True)):
        result = case_deletion(row["scores"][: again.m], again, against=against)
        row[name] = {"value": result.area, "error": result.standard_error, "protocol": result.protocol}


def measure(name: str, folder: Path | None) -> Row:
    """One setting: every method on the same retrained networks."""
    setting = SETTINGS[name]
    start = time.process_time()
    case = Case.of(setting)
    training = time.process_time() - start
    again, of_few = (
        Retrainings(
            case.run, case.x_test[:count], case.y_test[:count], make=lambda seed: network(setting, seed),
            path=None if folder is None else folder / f"{name}-{count}",
        )
        for count in (TEST, DELETED)
    )  # fmt: skip
    certificate = ntkit.influence(case.run, case.x_test, case.y_test).record()
    rows = rows_of_ours(case)
    theirs, records = rows_of_peers(case)
    rows += theirs
    for row in rows:
        if row["status"] == "ok":
            judge(row, again)
            print(name, row["by"], row["method"], row["settings"], row.get("mean"), flush=True)
    for row in best_settings(rows):
        judge_deletion(row, of_few)
    for row in rows:
        row.pop("scores", None)
    right = (case.model(case.x_test).argmax(1) == case.y_test).double().mean()
    return {
        "setting": str(setting), "training_seconds": training, "test_accuracy": float(right),
        "metasmoothness": certificate["metasmoothness"], "finite_differences": certificate["finite_differences"],
        "libraries": records, "rows": rows,
    }  # fmt: skip


def cost() -> Row:
    """CPU seconds of the influence and of the path kernel beside the run's, in gradients per step and test point."""
    rows = []
    for m in (10, 40, 100):
        case = Case.of(SETTINGS["tanh"], m)
        run, x, y = case.run, case.x_test, case.y_test
        _, influence = cpu_seconds(lambda: ntkit.influence(run, x, y), 3)  # noqa: B023
        path = ntkit.PathKernel(run, outputs=margin)
        _, decomposition = cpu_seconds(lambda: path.decompose(x, y), 3)  # noqa: B023
        rows.append({"test_points": m, "influence_seconds": influence, "path_kernel_seconds": decomposition})
    x, y = case.x[:BATCH], case.y[:BATCH]

    def gradients() -> None:
        for _ in range(STEPS):
            case.model.zero_grad()
            cross_entropy(case.model(x), y).backward()

    _, passes = cpu_seconds(gradients, 3)
    _, training = cpu_seconds(lambda: Case.of(SETTINGS["tanh"]), 3)
    for row in rows:
        for what in ("influence", "path_kernel"):
            row[f"{what}_gradients"] = row[f"{what}_seconds"] / (passes * row["test_points"])
    more = {
        f"{what}_gradients_per_more_point": (rows[-1][f"{what}_seconds"] - rows[0][f"{what}_seconds"]) / (90 * passes)
        for what in ("influence", "path_kernel")
    }
    return {**more, "rows": rows, "steps": STEPS, "gradient_seconds": passes / STEPS, "training_seconds": training}


def scale(folder: Path, steps: int) -> Row:
    """The large case; with fewer steps than 2,000, its memory."""
    data = ntkit.data.load("mnist", data_dir=folder, train=5_000)
    test = slice(0, 100)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 66), nn.ReLU(), nn.Linear(66, 10))
    sgd = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)
    start = time.perf_counter()
    run = ntkit.train(model, (data.x_train, data.y_train), cross_entropy, sgd, steps=steps, batch_size=32)
    training = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    result = ntkit.influence(run, data.x_test[test], data.y_test[test], memory="6 GB")
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "training_examples": len(data.x_train),
        "steps": steps, "test_points": len(result.values), "training_seconds": training,
        "influence_seconds": time.perf_counter() - start, "influence_cpu_seconds": time.process_time() - cpu,
        "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, **result.record(),
    }  # fmt: skip


def save(part: str, found: Row) -> None:
    """Merge a part into the results, with what it was measured on, and write the table anew."""
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    load = [round(value, 1) for value in os.getloadavg()]
    results[part] = {"machine": machine(), "load": load, "ntkit": version("ntkit"), **found}
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(_plain(results), indent=1) + "\n")
    FILE.with_suffix(".md").write_text(markdown(results))


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """The parts named on the command line."""
    known = [*SETTINGS, "cost", "scale"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(known)}; all but scale if none is named")
    parser.add_argument("--data-dir", type=Path, help="folder of the MNIST files, for the large case")
    parser.add_argument("--retrainings", type=Path, help="folder that keeps retrained networks' margins between calls")
    parser.add_argument("--steps", type=int, default=2_000, help="of training, in the large case")
    asked = parser.parse_args()
    parts = asked.parts or [*SETTINGS, "cost"]
    if unknown := [part for part in parts if part not in known]:
        parser.error(f"unknown parts: {', '.join(unknown)}")
    if "scale" in parts and asked.data_dir is None:
        parser.error("scale needs --data-dir FOLDER")
    torch.set_num_threads(1)
    for part in parts:
        if part == "cost":
            save(part, cost())
        elif part == "scale":
            save(part, scale(asked.data_dir, asked.steps))
        else:
            save(part, measure(part, asked.retrainings))
    print(FILE.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
