"""`ntkit solve`: a spectrum, or a classifier with its test error, from a kernel matrix on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.base.checks import Damaged, refusal
from ntkit.base.files import read_json, write_json
from ntkit.base.lock import FolderLock
from ntkit.base.progress import task
from ntkit.base.trust import code_of_run
from ntkit.commands.gram_on_disk import RECORDED, in_dtype, kernel_and_samples
from ntkit.commands.network_measures import finite
from ntkit.commands.settings import GramSettings, SolveSettings
from ntkit.data import Data
from ntkit.gram.gram_identity import what_it_depends_on
from ntkit.gram.gram_store import GramStore
from ntkit.gram.tile_files import DESCRIPTION, TileFiles
from ntkit.kernels.kernel import Kernel
from ntkit.machines import HardMarginSVM, KernelRidge
from ntkit.measures.spectra import spectrum

SOLVED = "solved.json"
_NO_ERRORS: dict[str, Any] = {"training_error": None, "test_error": None}  # of a machine that does not exist
_STRIP = 2**26  # numbers of the kernel between test and training examples at a time


def solve(
    store: str | Path,
    settings: SolveSettings,
    trust: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compute what the settings ask for from a store; return it, and write each part into ``STORE/solved.json``.

    Labels, and for the test error the test set, are those of the data set that `ntkit gram` took. The kernel between
    test and training examples is computed in strips, and not kept.

    Parameters
    ----------
    store : the folder, complete.
    settings : what to compute.
    trust : let code run that the store names even if it has never been run here.
    say : called with a line before each computation.

    Raises
    ------
    Refused
        For a store that is not complete, labels that are not there or do not fit, and code that was not run here. When
        network or data are not those of the store any more.
    """
    settings.check()
    K, files = GramStore.open(store), TileFiles(Path(store))
    results: dict[str, Any] = {"tiles": K.checksum, "samples": files.grid.n, "dtype": files.grid.dtype}
    labels, test = None, None
    if settings.spectrum is not None and not 1 <= settings.spectrum <= len(K):
        expected = f"an integer from 1 to {len(K):,}, the number of eigenvalues"
        raise refusal("--spectrum", got=settings.spectrum, expected=expected, fix="Ask for fewer.")
    if settings.ridge is not None or settings.svm:
        labels, test = _labels(files, settings, trust)
    parts: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    if (k := settings.spectrum) is not None:
        parts.append(("spectrum", f"the top {k} of the spectrum", lambda: _spectrum(K, k)))
    if (ridge := settings.ridge) is not None and labels is not None:
        parts.append(("ridge", "kernel ridge regression", lambda: _ridge(K, ridge, labels, test)))
    if settings.svm and labels is not None:
        parts.append(("svm", "hard-margin SVM", lambda: _svm(K, labels, test)))
    for name, line, work in parts:
        say(line)
        results[name] = work()
        _keep(Path(store), results)
    return results


def _keep(store: Path, results: dict[str, Any]) -> None:
    """Write what there is now, beside what was computed before from the same tiles."""
    with FolderLock(store):
        try:
            earlier = read_json(store / SOLVED) if (store / SOLVED).exists() else {}
        except Damaged:
            earlier = {}
        same = isinstance(earlier, dict) and earlier.get("tiles") == results["tiles"]
        write_json(store / SOLVED, (earlier if same else {}) | results)


class _Test:
    """The test set, and the kernel to the training examples in strips."""

    def __init__(self, kernel: Kernel, x: Tensor, sets: Data) -> None:
        self._kernel, self._x = kernel, x
        self._x_test = in_dtype(sets.x_test, str(x.dtype).removeprefix("torch.")).to(x.device)
        self.labels = sets.y_test

    def errors(self, predict: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Share of the test examples whose label is not predicted, with its standard error."""
        rows = max(1, _STRIP // len(self._x))
        found = []
        with task("test examples", total=len(self.labels)) as progress:
            for part in self._x_test.split(rows):
                found.append(predict(self._kernel(part, self._x)))
                progress.advance(len(part))
        m = len(self.labels)
        error = float((torch.cat(found).cpu() != self.labels).double().mean())
        return {"value": error, "error": math.sqrt(error * (1 - error) / m), "examples": m}


def _labels(files: TileFiles, settings: SolveSettings, trust: bool) -> tuple[Tensor, _Test | None]:
    """A number for the class of each sample, and the test set where there is one."""
    if settings.labels is not None:
        return _from_file(settings.labels, files.grid.n), None
    said = files.settings
    if not said:
        fix = "Give the labels: --labels y.npy"
        expected = "labels, or a store of ntkit gram, which knows its data set"
        raise refusal(str(files.folder), got="a store made in Python", expected=expected, fix=fix)
    recorded = {name: said.get(name, getattr(GramSettings, name)) for name in RECORDED}
    s = GramSettings(**recorded, memory=settings.memory, device=settings.device)
    names = {"--model": said["model"], "--data": said["data"]}
    given = {"--model": settings.model, "--data": settings.data}
    with code_of_run(files.folder / DESCRIPTION, names, said["identity"], given, trust):
        named, x, sets = kernel_and_samples(said["model"], said["data"], s)
    if sets is None:
        fix = "Give the labels: --labels y.npy"
        raise refusal(said["data"], got="samples without labels", expected="a data set", fix=fix)
    if sets.targets is not None:
        fix = "Ask for --spectrum, or fit ntkit.KernelRidge to the store in Python."
        raise refusal("--ridge, --svm", got="the targets of a regression", expected="classes", fix=fix)
    now = what_it_depends_on(named.kernel, x) | ({"code": named.code} if named.code else {})
    other = [name for name, value in now.items() if files.depends_on.get(name) != value]
    if other:
        got, fix = f"another {', '.join(other)} than when the store was made", "Restore it, or give --labels y.npy."
        raise refusal(str(files.folder), got=got, expected="the same network and data", fix=fix)
    return sets.y_train, _Test(named.kernel, x.to(named.device), sets)


def _from_file(path: Path, n: int) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        fix = "Save one with numpy.save."
        raise refusal(f"--labels {path}", got=str(error), expected="a .npy file of labels", fix=fix) from error
    if values.shape != (n,) or values.dtype.kind not in "iub":
        fix = "Save one integer per sample, in the order of the samples."
        got = f"{values.dtype} of shape {list(values.shape)}"
        raise refusal(f"--labels {path}", got=got, expected=f"integers of shape [{n}]", fix=fix)
    codes = np.unique(values, return_inverse=True)[1].reshape(-1)
    if codes.max() == 0:
        fix = "Give labels of at least two classes."
        raise refusal(f"--labels {path}", got="one class", expected="two or more", fix=fix)
    return torch.from_numpy(codes)


def _spectrum(K: GramStore, k: int) -> dict[str, Any]:
    found = spectrum(K, k=k)
    numbers = {"eigenvalues": found.eigenvalues.tolist(), "residuals": found.residuals.tolist()}
    return {**numbers, "trace": found.trace, "tail": found.tail, "floor": found.floor, "status": found.status}


def _ridge(K: GramStore, relative: float, labels: Tensor, test: _Test | None) -> dict[str, Any]:
    """One-hot targets less their mean over classes; the class of the largest output is predicted."""
    ridge = relative * float(K.diagonal().mean())
    targets = F.one_hot(labels).double()
    machine = KernelRidge(ridge).fit(K, targets - 1 / targets.shape[1])

    def predict(values: Any) -> Tensor:
        return torch.as_tensor(machine.predict(values)).argmax(1).cpu()

    names = ("method_", "passes_", "residual_", "status_", "advice_")
    certificate = {name.strip("_"): getattr(machine, name) for name in names} | {"residual": finite(machine.residual_)}
    errors = _NO_ERRORS if machine.status_ == "singular" else _errors(K, predict, labels, test)
    return {"ridge": ridge, "relative_ridge": relative, **certificate, **errors}


def _svm(K: GramStore, labels: Tensor, test: _Test | None) -> dict[str, Any]:
    machine = HardMarginSVM().fit(K, labels)

    def predict(values: Any) -> Tensor:
        return torch.as_tensor(machine.predict(values)).cpu()

    supports = machine.support_ if isinstance(machine.support_, list) else [machine.support_]
    margins = [finite(margin) for margin in np.atleast_1d(np.asarray(machine.margin_)).tolist()]
    certificate = {"status": machine.status_, "gap": finite(machine.gap_), "kkt": finite(machine.kkt_)}
    sizes = [len(support) for support in supports]
    errors = _NO_ERRORS if machine.status_ == "not separable" else _errors(K, predict, labels, test)
    return {**certificate, "advice": machine.advice_, "margins": margins, "supports": sizes, **errors}


def _errors(K: GramStore, predict: Callable[[Any], Tensor], labels: Tensor, test: _Test | None) -> dict[str, Any]:
    training = float((predict(K) != labels).double().mean())
    return {"training_error": training, "test_error": None if test is None else test.errors(predict)}
