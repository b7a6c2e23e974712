"""The kernel along a recorded run: spectrum, alignment, energies, change, first-order prediction."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base.batch import Batch, checked, count, leaves
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Damaged, refusal
from ntkit.base.lock import FolderLock
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.progress import Task, task
from ntkit.base.run_files import TRACK_FORMAT, tracking_id
from ntkit.base.tensors import tensor_hash
from ntkit.base.workers import spread, workers
from ntkit.jacobian.model_calls import Outputs, raw_outputs
from ntkit.tracking.losses import cross_entropy, half_squared, logistic
from ntkit.tracking.measurement import Network, Points, Snapshot, copies_of, restored
from ntkit.tracking.series import Tracked, assembled, close_folder, open_folder, read_snapshot, write_snapshot
from ntkit.tracking.snapshot_numbers import finite, kernel_change
from ntkit.trajectory import Trajectory
from ntkit.trajectory.objective import Loss

T = TypeVar("T")
R = TypeVar("R")

_SHARES = 8  # of the memory: one is scratch for a kernel; as many snapshots are measured at once, at most


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
    tracker = _Tracker(trajectory, x, y, model, loss, k, outputs, memory)
    selection = sorted(set(trajectory.steps if steps is None else steps))
    folder = None if path is None else Path(path)
    with nullcontext() if folder is None else FolderLock(folder):
        if folder is not None:
            open_folder(folder, tracker.settings)
        with restored(model), task("kernel along training", total=len(selection)) as progress:
            records, vectors = _measured(tracker, folder, selection, on_snapshot, progress)
        if folder is not None:
            close_folder(folder, tracker.settings, selection)
    return assembled(tracker.settings, records, vectors, folder)


def _measured(
    tracker: _Tracker,
    folder: Path | None,
    selection: list[int],
    on_snapshot: Callable[[dict[str, Any]], None] | None,
    progress: Task,
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Records and eigenvectors by step: from the folder, or measured, several at once, and written there in order."""
    records: list[dict[str, Any]] = []
    vectors: dict[int, np.ndarray] = {}
    for start in range(0, len(selection), tracker.at_once):
        group = [(step, selection[:i]) for i, step in enumerate(selection) if start <= i < start + tracker.at_once]
        stored = [None if folder is None else tracker.stored(folder, *one) for one in group]
        new = tracker.measure([one for one, found in zip(group, stored, strict=True) if found is None])
        for (step, earlier), found in zip(group, stored, strict=True):
            if found is None:
                snapshot = new.pop(0)
                record = snapshot.head | tracker.changes(snapshot.signature, step, earlier) | snapshot.tail
                arrays = snapshot.arrays
                if folder is not None:
                    write_snapshot(folder, record, arrays, tracking_id(tracker.settings))
                if on_snapshot is not None:
                    on_snapshot(record)
            else:
                record, arrays = found
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
        self.trajectory, self.model, self.k = trajectory, model, k
        self.x = checked(x, "x")
        self.n = count(self.x)
        budget = parse_memory(memory) or free_memory(next(model.parameters()).device) // 2
        with restored(model):
            self._load(trajectory.steps[0])
            raw = raw_outputs(model, self.x)
        self.outputs = raw.reshape(self.n, -1).shape[1]
        self.mode = outputs if self.outputs > 1 or callable(outputs) else "trace"  # with one output all modes agree
        self.y, self.targets, self.loss = self._checked_targets(y, loss, raw.device)
        self.size = N = self.n * (self.outputs if self.mode == "full" else 1)
        if not 1 <= k <= N:
            raise refusal("k", got=k, expected=f"1 to {N}", fix="Use a smaller k.")
        itemsize = raw.element_size()
        copies = 3 * self.outputs if self.mode == "diagonal" else 3  # K now, before and at first; one in float64
        self.dense = N * N * (copies * itemsize + 8) <= budget
        if self.mode == "diagonal" and not self.dense:
            got = f"{self.outputs} Gram matrices of {N} points"
            fix = "Pass fewer points, or use outputs=lambda y: y[:, 0]."
            raise refusal('outputs="diagonal"', got=got, expected=f"at most {budget:.2g} bytes", fix=fix)
        self.layers = self.dense and len(dict(model.named_parameters())) * N * N * itemsize <= budget // 2
        # scratch is the same for any number of snapshots at once: what is computed depends on it to the bit
        points = Points(
            self.x, self.y, self.targets, self.loss, self.n, self.outputs, self.mode, k, N, self.dense, self.layers,
            max(budget // _SHARES, 1),
        )  # fmt: skip
        self._free: SimpleQueue[Network] = SimpleQueue()
        own: list[nn.Module] = []
        at_once = min(workers(), _SHARES, budget // (2 * self._bytes(itemsize) + 1))
        if at_once > 1 and raw.device.type == "cpu":
            with restored(model):
                self._load(trajectory.steps[0])
                own = copies_of(model, self.x, at_once)
        self.at_once = max(len(own), 1)
        for one in own or [model]:
            self._free.put(Network(one, points))
        self._signatures: dict[int, Any] = {}  # step -> its kernel's signature, to measure changes
        self.settings = {
            "format": TRACK_FORMAT,
            "points": self.n,
            "k": k,
            "outputs": "callable" if callable(outputs) else self.mode,
            "outputs_of_model": self.outputs,
            "kernel": "dense" if self.dense else "matrix-free",
            "loss": _fingerprint(self.loss) if self.loss else None,
            "output": _fingerprint(outputs) if callable(outputs) else None,
            "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
            "trained": [name for name, p in model.named_parameters() if p.requires_grad],
            "run": hashlib.sha256(json.dumps(trajectory.settings, sort_keys=True).encode()).hexdigest()[:16],
            "data": tensor_hash([*leaves(self.x), *([] if self.y is None else [self.y])]),
            "initial": tensor_hash(trajectory.state(trajectory.steps[0]).values()),
        }

    def _checked_targets(
        self, y: Tensor | None, loss: Loss | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Loss | None]:
        """Targets as the loss takes them, as values [n, C], and the loss."""
        if y is None:
            return None, None, None
        y = torch.as_tensor(y, device=device)
        labels = not y.is_floating_point()
        if len(y) != self.n or (labels and y.dim() != 1) or (not labels and y.numel() != self.n * self.outputs):
            got, expected = (
                f"shape {tuple(y.shape)}, {y.dtype}",
                f"{self.n} labels, or values [{self.n}, {self.outputs}]",
            )
            raise refusal("y", got=got, expected=expected, fix="Pass one target per point.")
        if not labels:
            return y, y.detach().double().reshape(self.n, -1), loss or half_squared
        y = y.long()
        classes = max(2, self.outputs)
        if int(y.min()) < 0 or int(y.max()) >= classes:
            got, fix = f"labels from {int(y.min())} to {int(y.max())}", "Number the classes from 0, or pass values."
            raise refusal("y", got=got, expected=f"labels from 0 to {classes - 1}", fix=fix)
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

    def measure(self, group: list[tuple[int, list[int]]]) -> list[Snapshot]:
        """Numbers and eigenvectors of some snapshots, each with its step and the steps before it."""
        return self._in_workers(lambda one: self._measured(*one), group)

    def _measured(self, step: int, earlier: list[int]) -> Snapshot:
        rates = self._rates(step)
        head: dict[str, Any] = {"step": step, "loss": None, "learning_rate": finite(rates[0]) if rates else None}
        head |= self._identity(step, earlier)
        with self._network() as network:
            return network.measure(self.trajectory.state(step), step, head, self._by_parameter(rates))

    def _in_workers(self, work: Callable[[T], R], items: list[T]) -> list[R]:
        """All results; in workers also where there is one item, whose numbers are then the same to the bit."""
        return spread(work, items) if self.at_once > 1 else [work(item) for item in items]

    @contextmanager
    def _network(self) -> Iterator[Network]:
        """A network that nobody else is at work with."""
        network = self._free.get()
        try:
            yield network
        finally:
            self._free.put(network)

    def _bytes(self, itemsize: int) -> int:
        """Memory of one snapshot in hand, beside scratch: kernel, its parts, their precise form; the model."""
        model = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        if not self.dense:
            return 4 * model
        matrices = (self.outputs if self.mode == "diagonal" else 1) + 1
        matrices += len(dict(self.model.named_parameters())) if self.layers else 0
        return 4 * model + self.size**2 * (matrices * itemsize + 4 * 8)

    def changes(self, signature: Any, step: int, earlier: list[int]) -> dict[str, Any]:
        """Distances of a kernel from the first one and from the one before."""
        if signature is None:  # of parameters that are not finite
            return {}
        if not earlier:
            self._signatures = {}
        first, before = (earlier[0], earlier[-1]) if earlier else (step, step)
        self._signatures[step] = signature
        for s in {first, before} - self._signatures.keys():  # in a resumed call: computed again, with the same values
            (self._signatures[s],) = self._in_workers(self._signature, [s])
        now, at_first, at_before = (self._signatures[s] for s in (step, first, before))
        self._signatures = {first: at_first, step: now}
        return kernel_change(now, at_first, at_before, step - before)

    def _signature(self, step: int) -> Any:
        with self._network() as network:
            return network.signature(self.trajectory.state(step), step)

    def _rates(self, step: int) -> list[float]:
        """Learning rate of each group at a step; none if no step was logged."""
        rates = self.trajectory.learning_rates
        return rates[min(step, len(rates) - 1)].tolist() if len(rates) else []

    def _by_parameter(self, rates: list[float]) -> dict[str, float]:
        """Learning rate by parameter; none if none was logged, or where groups were added later."""
        groups = self.trajectory.settings["optimizer"]["groups"]
        if len(groups) != len(rates):
            return {}
        return {name: lr for lr, group in zip(rates, groups, strict=True) for name in group["params"]}


def _fingerprint(function: Any) -> str:
    """Name and code of a function, or type and plain settings of a callable object: its identity in track.json."""
    code = getattr(function, "__code__", None)
    if code is None:
        own = getattr(function, "__dict__", {}).items()
        settings = {k: v for k, v in own if isinstance(v, (bool, int, float, str)) or v is None}
        return f"{type(function).__name__} {settings}"
    parts = (code.co_code, code.co_consts, code.co_names, function.__defaults__)
    return f"{function.__qualname__} {hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
