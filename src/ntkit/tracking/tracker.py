"""The kernel along a recorded run: spectrum, alignment, energies, change, first-order prediction."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import functional as F

from ntkit.base.batch import Batch, checked, count
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Damaged, refusal
from ntkit.base.function_identity import function_identity
from ntkit.base.lock import FolderLock
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.numbers import as_integer
from ntkit.base.progress import Task, task
from ntkit.base.run_files import TRACK_FORMAT, tracking_id
from ntkit.base.tensors import points_hash, tensor_hash
from ntkit.data.streamed_samples import with_labels
from ntkit.gram.krylov import leading
from ntkit.jacobian.forwards import raw_outputs
from ntkit.jacobian.model_calls import Outputs
from ntkit.jacobian.model_outputs import selected
from ntkit.kernels.tangent import TangentKernel
from ntkit.tracking.losses import check_paired, cross_entropy, derivatives, half_squared, logistic
from ntkit.tracking.series import Tracked, assembled, close_folder, open_folder, read_snapshot, write_snapshot
from ntkit.tracking.snapshot_numbers import KernelMatrix, KernelProducts, finite, kernel_change
from ntkit.trajectory import Trajectory
from ntkit.trajectory.learning_rates import sharpness_bound
from ntkit.trajectory.objective import Loss


@own_context()
def track(
    trajectory: Trajectory,
    x: Batch,
    y: Tensor | None = None,
    *,
    model: nn.Module,
    loss: Loss | None = None,
    k: int = 20,
    outputs: Outputs = "trace",
    steps: Iterable[int] | None = None,
    memory: int | str | None = None,
    path: str | Path | None = None,
    on_snapshot: Callable[[dict[str, Any]], None] | None = None,
    select: Callable[[Any], Any] | None = None,
) -> Tracked:
    """Measure the tangent kernel on `x` at every snapshot of a run (Kopitkov & Indelman 2020).

    Parameters
    ----------
    trajectory : a run of `ntkit.train` or `ntkit.record`.
    x, y : points, and their targets: values [n] or [n, C], or labels (integers [n]: +-1 for one output,
        one-hot for several). Without y there are no numbers about targets, residuals, sharpness and first order.
    model : a module of the run's architecture; its parameters are restored afterwards.
    loss : ``loss(model(x), y)`` -> scalar, the mean over samples, as in training. By default half the squared error for
        values; for labels cross-entropy (logistic for one output).
    k : eigenpairs.
    outputs : "trace" (n x n, summed over outputs), "full" (n C x n C), "diagonal" (each output's own n x n kernel), or
        a callable that returns one scalar per sample.
    steps : the snapshots to measure; all by default.
    memory : bytes for Gram matrices (or text such as "2 GB"): if three do not fit, the kernel is only multiplied with
        vectors, by block Krylov iteration, in memory O(n k + P). Half of the free memory by default.
    path : folder for the numbers, one file per snapshot: an interrupted call continues there. A damaged file is
        measured again, with a warning.
    on_snapshot : called with the numbers of each new snapshot.
    select : the part of the model's output that is looked at, as for `ntkit.TangentKernel`.

    Raises
    ------
    Refused
        As `ntkit.TangentKernel`; when y or the model do not fit, `path` holds other settings, or another process is
        writing there; when a snapshot of the run is damaged or missing.

    Examples
    --------
    The kernel of a model linear in its parameters is constant, and first order is exact:

    >>> import ntkit
    >>> x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> model, y = torch.nn.Linear(3, 1).double(), x[:, :1]
    >>> run = ntkit.train(model, (x, y), half_squared, lambda p: torch.optim.SGD(p, lr=0.1), steps=4)
    >>> tracked = track(run, x, y, model=model, k=3)
    >>> [round(d, 12) for d in tracked.series["distance"]], round(tracked.series["first_order"][0]["cosine"], 12)
    ([0.0, 0.0, 0.0, 0.0, 0.0], 1.0)
    """
    x, y = with_labels(x, y)
    part = selected(model, select)
    whole = model if select is None else part  # of a whole object a callable `outputs` may take any part
    tracker = _Tracker(trajectory, x, y, whole, loss, k, outputs, memory)
    tracker.settings |= {} if select is None else {"select": function_identity(select)}
    selection = trajectory.steps if steps is None else _chosen(steps, trajectory.steps)
    folder = None if path is None else Path(path)
    with nullcontext() if folder is None else FolderLock(folder):
        if folder is not None:
            open_folder(folder, tracker.settings)
        with _restored(model), task("kernel along training", total=len(selection)) as progress:
            records, vectors = _measured(tracker, folder, selection, on_snapshot, progress)
        if folder is not None:
            close_folder(folder, tracker.settings, selection)
    return assembled(tracker.settings, records, vectors, folder)


def _chosen(steps: Any, recorded: list[int]) -> list[int]:
    """The snapshots to measure, each once and in their order."""
    steps = steps.tolist() if isinstance(steps, (Tensor, np.ndarray)) else steps
    given = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else [steps]
    if wrong := [s for s in given if isinstance(s, bool) or s not in recorded]:
        expected = f"recorded steps of the run: {', '.join(map(str, recorded[:10]))}{', ...' * (len(recorded) > 10)}"
        raise refusal("steps", got=repr(wrong[0]), expected=expected, fix="None = all of them.")
    if not given:
        raise refusal("steps", got="none", expected="at least one recorded step", fix="None = all of them.")
    return sorted({int(s) for s in given})


def _measured(
    tracker: _Tracker,
    folder: Path | None,
    selection: list[int],
    on_snapshot: Callable[[dict[str, Any]], None] | None,
    progress: Task,
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Records and eigenvectors by step: from the folder, or measured and written there."""
    records, vectors = [], {}
    for i, step in enumerate(selection):
        stored = None if folder is None else tracker.stored(folder, step, selection[:i])
        if stored is not None:
            record, arrays = stored
        else:
            record, arrays = tracker.measure(step, selection[:i])
            if folder is not None:
                write_snapshot(folder, record, arrays, tracking_id(tracker.settings))
            if on_snapshot is not None:
                on_snapshot(record)
        records.append(record)
        vectors[step] = arrays["eigenvectors"]
        progress.advance()
    return records, vectors


class _Tracker:
    """Measures one network on one set of points at the snapshots of a run."""

    def __init__(
        self,
        trajectory: Trajectory,
        x: Batch,
        y: Tensor | None,
        model: nn.Module,
        loss: Loss | None,
        k: int,
        outputs: Outputs,
        memory: int | str | None,
    ) -> None:
        self.trajectory, self.model = trajectory, model
        self.x = checked(x, "x", infinite=True)
        self.n = count(self.x)
        budget = parse_memory(memory) or free_memory(next(model.parameters()).device) // 2
        with _restored(model):
            self._load(trajectory.steps[0])
            raw = raw_outputs(model, self.x)
        self.outputs = raw.reshape(self.n, -1).shape[1]
        self.mode = outputs if self.outputs > 1 or callable(outputs) else "trace"  # with one output all modes agree
        self.y, self.targets, self.loss = self._checked_targets(y, loss, raw)
        self.full = TangentKernel(model, "full", memory=memory)
        self.kernel = TangentKernel(model, self.mode, memory=memory)
        self.size = N = self.n * (self.outputs if self.mode == "full" else 1)
        self.k = as_integer(k, "k", f"an integer from 1 to {N}", "Use a smaller k.", least=1, most=N)
        itemsize = raw.element_size()
        copies = 3 * self.outputs if self.mode == "diagonal" else 3  # K now, before and at first; one in float64
        self.dense = N * N * (copies * itemsize + 8) <= budget
        if self.mode == "diagonal" and not self.dense:
            got = f"{self.outputs} Gram matrices of {N} points"
            fix = "Pass fewer points, or use outputs=lambda y: y[:, 0]."
            raise refusal('outputs="diagonal"', got=got, expected=f"at most {budget:.2g} bytes", fix=fix)
        self.layers = self.dense and len(dict(model.named_parameters())) * N * N * itemsize <= budget // 2
        self._signatures: dict[int, Any] = {}  # step -> its kernel's signature, to measure changes
        self.settings = {
            "format": TRACK_FORMAT,
            "points": self.n,
            "k": self.k,
            "outputs": "callable" if callable(outputs) else self.mode,
            "outputs_of_model": self.outputs,
            "kernel": "dense" if self.dense else "matrix-free",
            "loss": function_identity(self.loss) if self.loss else None,
            "output": function_identity(outputs) if callable(outputs) else None,
            "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
            "trained": [name for name, p in model.named_parameters() if p.requires_grad],
            "run": hashlib.sha256(json.dumps(trajectory.settings, sort_keys=True).encode()).hexdigest()[:16],
            "data": points_hash(self.x, self.y),
            "initial": tensor_hash(trajectory.state(trajectory.steps[0]).values()),
        }

    def _checked_targets(
        self, y: Tensor | None, loss: Loss | None, raw: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Loss | None]:
        """Targets as the loss takes them, as values [n, C], and the loss."""
        if y is None:
            return None, None, None
        y = torch.as_tensor(y, device=raw.device)
        labels = not y.is_floating_point()
        if len(y) != self.n or (labels and y.dim() != 1) or (not labels and y.numel() != self.n * self.outputs):
            got, expected = (
                f"shape {tuple(y.shape)}, {y.dtype}",
                f"{self.n} labels, or values [{self.n}, {self.outputs}]",
            )
            raise refusal("y", got=got, expected=expected, fix="Pass one target per point.")
        if not labels:
            check_paired(loss, raw, y)
            return y, y.detach().double().reshape(self.n, -1), loss or half_squared
        y = y.long()
        classes = max(2, self.outputs)
        if int(y.min()) < 0 or int(y.max()) >= classes:
            got, fix = f"labels from {int(y.min())} to {int(y.max())}", "Number the classes from 0, or pass values."
            raise refusal("y", got=got, expected=f"labels from 0 to {classes - 1}", fix=fix)
        check_paired(loss, raw, y)
        if self.outputs == 1:
            return y, 2.0 * y.double()[:, None] - 1, loss or logistic
        return y, F.one_hot(y, self.outputs).double(), loss or cross_entropy

    def _load(self, step: int) -> None:
        self.trajectory.load(self.model, step)
        self.model.eval()

    def _identity(self, step: int, earlier: list[int]) -> dict[str, Any]:
        """What the numbers of a snapshot depend on beside the settings: parameters, and the steps of comparison."""
        state = tensor_hash(self.trajectory.state(step).values())
        return {"state": state, "since": [earlier[0], earlier[-1]] if earlier else [step, step]}

    def stored(
        self, folder: Path, step: int, earlier: list[int]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Numbers and eigenvectors that an earlier call stored for the same identity, unless they are damaged."""
        identity = self._identity(step, earlier)
        try:
            found = read_snapshot(folder, step, tracking_id(self.settings))
        except Damaged as error:
            warnings.warn(f"{error} It is measured again.", stacklevel=4)
            return None
        return found if found and all(found[0].get(name) == value for name, value in identity.items()) else None

    def measure(self, step: int, earlier: list[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Numbers and eigenvectors of one snapshot."""
        self._load(step)
        rates = self._rates(step)
        record: dict[str, Any] = {"step": step, "loss": None, "learning_rate": finite(rates[0]) if rates else None}
        record |= self._identity(step, earlier)
        if not all(bool(t.isfinite().all()) for t in self.trajectory.state(step).values() if t.is_floating_point()):
            shape = (self.outputs, self.size, self.k) if self.mode == "diagonal" else (self.size, self.k)
            return record | {"status": "parameters that are not finite"}, {"eigenvectors": np.full(shape, np.nan)}
        raw = raw_outputs(self.model, self.x)
        slope = curvature = None
        if self.loss is not None and self.y is not None:
            record["loss"], slope, curvature = derivatives(self.loss, raw, self.y)
        kernel = self._kernel()
        values: dict[str, Tensor | None]
        values = {"target": self.targets, "output": raw.reshape(self.n, -1).double(), "residual": slope}
        if isinstance(kernel, KernelMatrix) and self.mode == "diagonal":
            parts = []
            for c in range(self.outputs):
                columns = {name: None if v is None else v[:, c : c + 1] for name, v in values.items()}
                parts.append(KernelMatrix(kernel.K[:, :, c]).spectral(self.k, columns, 1))
            record["per_output"] = [numbers for numbers, _ in parts]
            vectors = np.stack([v for _, v in parts])
        else:
            if callable(self.mode):  # one scalar of the outputs: only its values can be compared with the kernel
                values = {"output": raw_outputs(self.model, self.x, scalar=self.mode).double()}
            numbers, vectors = kernel.spectral(self.k, values, self.outputs if self.mode == "full" else 1)
            record |= numbers
        if isinstance(kernel, KernelMatrix):
            record |= kernel.layered(self.targets)
        record |= self._changes(kernel, step, earlier)
        if slope is not None:
            record |= self._sharpness(kernel, curvature)
            optimizer = self.trajectory.settings["optimizer"]
            record["sharpness_bound"] = sharpness_bound(optimizer, rates[0]) if rates else None
            record["first_order"] = self._first_order(rates, slope)
        return record, {"eigenvectors": vectors}

    def _kernel(self) -> KernelMatrix | KernelProducts:
        """The kernel of the model's parameters."""
        if not self.dense:
            return KernelProducts(self.kernel.operator(self.x), self.n)
        shares = self.kernel.layers(self.x) if self.layers else None
        K = sum(shares.values()) if shares else self.kernel(self.x)
        assert isinstance(K, Tensor)
        return KernelMatrix(K, shares, self.mode == "diagonal")

    def _changes(self, kernel: KernelMatrix | KernelProducts, step: int, earlier: list[int]) -> dict[str, Any]:
        """Distances of the kernel from the first one and from the one before."""
        if not earlier:
            self._signatures = {}
        first, before = (earlier[0], earlier[-1]) if earlier else (step, step)
        self._signatures[step] = kernel.signature()
        for s in {first, before} - self._signatures.keys():  # in a resumed call: computed again, with the same values
            self._load(s)
            self._signatures[s] = self._kernel().signature()
            self._load(step)
        now, at_first, at_before = (self._signatures[s] for s in (step, first, before))
        self._signatures = {first: at_first, step: now}
        return kernel_change(now, at_first, at_before, step - before)

    def _rates(self, step: int) -> list[float]:
        """Learning rate of each group at a step; none if no step was logged."""
        rates = self.trajectory.learning_rates
        return rates[min(step, len(rates) - 1)].tolist() if len(rates) else []

    def _sharpness(self, kernel: KernelMatrix | KernelProducts, curvature: Tensor | None) -> dict[str, Any]:
        """Largest eigenvalue of the Gauss-Newton matrix (1/n) H^1/2 K H^1/2."""
        if curvature is None:
            return {"sharpness": None, "stable_learning_rate": None}
        values, vectors = torch.linalg.eigh(curvature)  # per sample, [n, C, C]
        root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
        if not bool(root.any()):
            return {"sharpness": 0.0, "stable_learning_rate": None}
        scalar = self.outputs == 1 and not callable(self.mode)
        is_full = isinstance(kernel, KernelMatrix) and kernel.K.dim() == 2 and scalar
        operator = kernel.K.double() if is_full else self.full.operator(self.x)

        def product(v: np.ndarray) -> np.ndarray:
            u = torch.from_numpy(v).to(root).reshape(self.n, self.outputs, -1)
            image = operator @ (root @ u).reshape(self.n * self.outputs, -1)
            return (root @ image.to(root).reshape(u.shape)).reshape(v.shape).cpu().numpy() / self.n

        largest = float(leading(product, self.n * self.outputs, 1, 1e-5)[0][0])
        return {"sharpness": finite(largest), "stable_learning_rate": finite(2 / largest) if largest > 0 else None}

    def _first_order(self, rates: list[float], slope: Tensor) -> dict[str, Any] | None:
        """One gradient descent step on the points: the change of all outputs, and its first-order prediction."""
        groups = self.trajectory.settings["optimizer"]["groups"]
        if len(groups) != len(rates):  # none logged, or groups were added later: no rate per parameter
            return None
        rate = {name: lr for lr, group in zip(rates, groups, strict=True) for name in group["params"]}
        gradient = self.full.vjp(self.x, slope / self.n)
        update = {name: -rate.get(name, 0.0) * g for name, g in gradient.items()}
        predicted = self.full.jvp(self.x, update).double()
        before = raw_outputs(self.model, self.x).reshape(self.n, -1).double()
        params = dict(self.model.named_parameters())
        with torch.no_grad(), _restored(self.model):
            for name, change in update.items():
                params[name].add_(change)
            after = raw_outputs(self.model, self.x).reshape(self.n, -1).double()
        true = after - before
        sizes = float(true.norm()), float(predicted.norm())
        if not min(sizes) > 0:
            return None
        return {
            "cosine": finite(float((true * predicted).sum()) / (sizes[0] * sizes[1])),
            "relative_error": finite(float((true - predicted).norm()) / sizes[0]),
            "norm_ratio": finite(sizes[1] / sizes[0]),
        }


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers and modes of the model at the end.

    So are their version counters: a graph of the user's own that saved a parameter can still be differentiated.
    """
    modes = [(module, module.training) for module in model.modules()]
    state = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]
    with ExitStack() as versions:
        for tensor, _ in state:
            versions.enter_context(_unsafe_preserve_version_counter(tensor))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in state:
                    tensor.copy_(value)
            for module, mode in modes:
                module.training = mode
