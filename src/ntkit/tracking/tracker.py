"""Follow a network's kernel along a recorded run: spectrum, alignment, energies, change, first-order prediction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base.batch import Batch, checked, count, leaves
from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays, read_json, write_arrays, write_json
from ntkit.base.progress import task
from ntkit.gram.krylov import leading
from ntkit.jacobian.model_calls import Outputs, raw_outputs
from ntkit.kernels.tangent import TangentKernel, free_memory, parse_memory
from ntkit.tracking.losses import Loss, cross_entropy, derivatives, half_squared, logistic
from ntkit.tracking.series import FORMAT, Tracked, assembled, open_folder
from ntkit.tracking.snapshot_numbers import Change, Dense, MatrixFree, columns_of, finite
from ntkit.trajectory import Trajectory


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
    trajectory : what `ntkit.train` or `ntkit.record` left.
    x, y : points to follow, and their targets: values [n] or [n, C], or labels (integers [n]: +-1 for one output,
        one-hot for several). Without y nothing is said of targets, residuals, learning rates and first order.
    model : a module of the run's architecture; its parameters are put back afterwards.
    loss : ``loss(model(x), y)`` -> scalar, the mean over samples, as in training. By default half the squared error for
        values; for labels cross-entropy (logistic for one output).
    k : eigenpairs.
    outputs : "trace" (n x n, summed over outputs), "full" (n C x n C), "diagonal" (each output's own n x n kernel), or
        a callable that gives one scalar per sample.
    steps : those to measure; all recorded by default.
    memory : bytes for Gram matrices (or text such as "2 GB"): where three do not fit, the kernel is only multiplied
        with vectors, by block Krylov iteration, in memory O(n k + P). Half of what is free by default.
    path : folder for the numbers, one file per snapshot: a call that was stopped goes on there.
    on_snapshot : called with each snapshot's numbers as they come.

    Returns
    -------
    Tracked

    Raises
    ------
    Refused
        As `ntkit.TangentKernel`; when y does not fit, the model is another one, or `path` holds other settings.

    Examples
    --------
    A model linear in its parameters keeps its kernel, and first order is exact:

    >>> import ntkit
    >>> x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> model, y = torch.nn.Linear(3, 1).double(), x[:, :1]
    >>> run = ntkit.train(model, (x, y), half_squared, lambda p: torch.optim.SGD(p, lr=0.1), steps=4)
    >>> tracked = track(run, x, y, model=model, k=3)
    >>> [round(d, 12) for d in tracked.series["distance"]], round(tracked.series["first_order"][0]["cosine"], 12)
    ([0.0, 0.0, 0.0, 0.0, 0.0], 1.0)
    """
    follower = _Follower(trajectory, x, y, model, loss, k, outputs, memory)
    wanted = sorted(set(trajectory.steps if steps is None else steps))
    folder = None if path is None else Path(path)
    if folder is not None:
        open_folder(folder, follower.settings)
    records, vectors = [], {}
    with _put_back(model), task("kernel along training", total=len(wanted)) as progress:
        for i, step in enumerate(wanted):
            file = None if folder is None else folder / f"step-{step:08d}.json"
            kept = follower.kept(file, step, wanted[:i])
            if kept is not None:
                record, arrays = kept
            else:
                record, arrays = follower.at(step, wanted[:i])
                if file is not None:  # the numbers last: a snapshot with numbers is whole
                    write_arrays(file.with_suffix(".safetensors"), arrays)
                    write_json(file, record)
                if on_snapshot is not None:
                    on_snapshot(record)
            records.append(record)
            vectors[step] = arrays["eigenvectors"]
            progress.advance()
    return assembled(follower.settings, records, vectors, folder)


class _Follower:
    """One network, its run and the points to follow."""

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
        self.x, self.n = checked(x, "x"), count(checked(x, "x"))
        device = next(model.parameters()).device
        self.budget = parse_memory(memory) or free_memory(device) // 2
        with _put_back(model):
            self._load(trajectory.steps[0])
            raw = raw_outputs(model, self.x)
        self.outputs = raw.reshape(self.n, -1).shape[1]
        self.mode = outputs if self.outputs > 1 or callable(outputs) else "trace"  # one output: all modes are one
        if callable(outputs):
            self.label = "callable"
        else:
            self.label = self.mode
        self.y, self.targets, self.loss = self._checked_targets(y, loss, raw.device)
        self.full = TangentKernel(model, "full", memory=memory)
        self.kernel = TangentKernel(model, outputs if callable(outputs) else self.mode, memory=memory)
        N = self.n * (self.outputs if self.mode == "full" else 1)
        if not 1 <= k <= N:
            raise refusal("k", got=k, expected=f"1 to {N}", fix="Ask for at most all eigenpairs.")
        itemsize = raw.element_size()
        copies = 3 * self.outputs if self.mode == "diagonal" else 3  # K now, before and at first; one in float64
        self.dense = N * N * (copies * itemsize + 8) <= self.budget
        if self.mode == "diagonal" and not self.dense:
            raise refusal(
                'outputs="diagonal"', got=f"{self.outputs} Gram matrices of {N} points",
                expected=f"room in {self.budget:.2g} bytes", fix="Follow fewer, or use outputs=lambda y: y[:, 0].",
            )  # fmt: skip
        self.layers = self.dense and len(dict(model.named_parameters())) * N * N * itemsize <= self.budget // 2
        self.held: dict[int, Any] = {}  # step -> its kernel, in the form that changes are measured with
        self.settings = {
            "format": FORMAT, "points": self.n, "k": k, "outputs": self.label, "outputs_of_model": self.outputs,
            "kernel": "dense" if self.dense else "matrix-free",
            "loss": _named(self.loss) if self.loss else None,
            "output": _named(outputs) if callable(outputs) else None,
            "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
            "trained": [name for name, p in model.named_parameters() if p.requires_grad],
            "run": hashlib.sha256(json.dumps(trajectory.settings, sort_keys=True).encode()).hexdigest()[:16],
            "data": _hash([*leaves(self.x), *([] if self.y is None else [self.y])]),
            "initial": _hash(list(trajectory.state(trajectory.steps[0]).values())),
        }  # fmt: skip

    def _checked_targets(self, y: Any, loss: Loss | None, device: torch.device) -> tuple[Any, Any, Any]:
        """Targets as the loss takes them, as values [n, C], and the loss."""
        if y is None:
            return None, None, None
        y = torch.as_tensor(y, device=device)
        labels = not y.is_floating_point()
        if len(y) != self.n or (labels and y.dim() != 1) or (not labels and y.numel() != self.n * self.outputs):
            expected = f"{self.n} labels, or values [{self.n}, {self.outputs}]"
            raise refusal("y", got=f"shape {tuple(y.shape)}, {y.dtype}", expected=expected, fix="One target per point.")
        if not labels:
            return y, y.detach().double().reshape(self.n, -1), loss or half_squared
        y = y.long()
        classes = max(2, self.outputs)
        if int(y.min()) < 0 or int(y.max()) >= classes:
            got, fix = f"labels from {int(y.min())} to {int(y.max())}", "Number the classes from 0, or give values."
            raise refusal("y", got=got, expected=f"labels from 0 to {classes - 1}", fix=fix)
        if self.outputs == 1:
            return y, 2.0 * y.double()[:, None] - 1, loss or logistic
        return y, F.one_hot(y.long(), self.outputs).double(), loss or cross_entropy

    def _load(self, step: int) -> None:
        self.trajectory.load(self.model, step)
        self.model.eval()

    # ------------------------------------------------------------------ one snapshot

    def _identity(self, step: int, earlier: list[int]) -> dict[str, Any]:
        """What a snapshot's numbers hang on beside the settings: parameters, and where changes are measured from."""
        first = earlier[0] if earlier else step
        return {
            "state": _hash(list(self.trajectory.state(step).values())),
            "since": [first, earlier[-1] if earlier else step],
        }

    def kept(
        self, file: Path | None, step: int, earlier: list[int]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Numbers of an earlier call, if they are of the same."""
        if file is None or not file.exists():
            return None
        record = read_json(file)
        same = all(record.get(name) == value for name, value in self._identity(step, earlier).items())
        return (record, read_arrays(file.with_suffix(".safetensors"))) if same else None

    def at(self, step: int, earlier: list[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Numbers and eigenvectors of one snapshot."""
        self._load(step)
        record: dict[str, Any] = {"step": step, "loss": None, "learning_rate": finite(self._rate(step))}
        record |= self._identity(step, earlier)
        if not all(bool(t.isfinite().all()) for t in self.trajectory.state(step).values() if t.is_floating_point()):
            N = self.n * (self.outputs if self.mode == "full" else 1)
            shape = (self.outputs, N, self.k) if self.mode == "diagonal" else (N, self.k)
            return record | {"status": "parameters that are not finite"}, {"eigenvectors": np.full(shape, np.nan)}
        raw = raw_outputs(self.model, self.x)
        out = raw.reshape(self.n, -1).double()
        slope = curvature = None
        if self.loss is not None:
            record["loss"], slope, curvature = derivatives(self.loss, raw, self.y)
        whole = self._kernel(step)
        shown = {"target": self.targets, "output": out, "residual": slope}
        if self.mode == "diagonal":
            parts = [part.spectral(self.k, columns_of(shown, c), center=1) for c, part in enumerate(whole.split())]
            record["per_output"] = [numbers for numbers, _ in parts]
            vectors = np.stack([v for _, v in parts])
        else:
            if callable(self.mode):  # one scalar of the outputs: only it can be compared with
                shown = {"output": self._reduced(raw)}
            numbers, vectors = whole.spectral(self.k, shown, center=self.outputs if self.mode == "full" else 1)
            record |= numbers
        if isinstance(whole, Dense):
            record |= whole.layered(self.targets)
        record |= self._changes(whole, step, earlier)
        if slope is not None and curvature is not None:
            record |= self._sharpness(whole, curvature)
            record["first_order"] = self._first_order(step, slope)
        return record, {"eigenvectors": vectors}

    def _reduced(self, raw: Tensor) -> Tensor:
        assert callable(self.mode)
        return self.mode(raw).detach().double().reshape(self.n, 1)

    def _kernel(self, step: int) -> Any:
        """The kernel of the parameters loaded, as a matrix or as products."""
        if not self.dense:
            return MatrixFree(self.kernel.operator(self.x), self.n)
        shares = self.kernel.layers(self.x) if self.layers else None
        K = sum(shares.values()) if shares else self.kernel(self.x)
        assert isinstance(K, Tensor)
        return Dense(K, shares, self.mode == "diagonal")

    def _changes(self, whole: Any, step: int, earlier: list[int]) -> dict[str, Any]:
        """How far the kernel is from the first one and from the one before."""
        now = whole.signature()
        others = {}
        for name, s in (("first", earlier[0] if earlier else step), ("before", earlier[-1] if earlier else step)):
            if s == step:
                others[name] = now
                continue
            if s not in self.held:  # a resumed call: made again, with the same values
                self._load(s)
                self.held[s] = self._kernel(s).signature()
                self._load(step)
            others[name] = self.held[s]
        self.held = {s: kernel for s, kernel in self.held.items() if s == (earlier[0] if earlier else step)} | {
            step: now
        }
        elapsed = step - earlier[-1] if earlier else 0
        return Change(now, others["first"], others["before"], elapsed).numbers()

    # ------------------------------------------------------------------ learning rates and first order

    def _rate(self, step: int) -> float | None:
        rates = self.trajectory.learning_rates
        return float(rates[min(step, len(rates) - 1), 0]) if len(rates) else None

    def _sharpness(self, whole: Any, curvature: Tensor) -> dict[str, Any]:
        """Largest eigenvalue of the Gauss-Newton matrix (1/n) H^1/2 K H^1/2."""
        values, vectors = torch.linalg.eigh(curvature)  # per sample, [n, C, C]
        root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
        if not bool(root.any()):
            return {"sharpness": 0.0, "stable_learning_rate": None}
        dense = isinstance(whole, Dense) and whole.K.dim() == 2 and self.outputs == 1 and not callable(self.mode)
        operator = whole.double() if dense else self.full.operator(self.x)

        def product(v: np.ndarray) -> np.ndarray:
            u = torch.from_numpy(v).to(root).reshape(self.n, self.outputs, -1)
            image = operator @ (root @ u).reshape(self.n * self.outputs, -1)
            return (root @ image.to(root).reshape(u.shape)).reshape(v.shape).cpu().numpy() / self.n

        largest = float(leading(product, self.n * self.outputs, 1, 1e-5)[0][0])
        return {"sharpness": finite(largest), "stable_learning_rate": finite(2 / largest) if largest > 0 else None}

    def _first_order(self, step: int, slope: Tensor) -> dict[str, Any] | None:
        """One gradient descent step on the points followed: how all outputs change, and how they should."""
        rates = self.trajectory.learning_rates
        if not len(rates):
            return None
        row = rates[min(step, len(rates) - 1)].tolist()
        groups = self.trajectory.settings["optimizer"]["groups"]
        if len(groups) != len(row):  # groups came later: whose rate is whose is not recorded
            return None
        rate = {name: lr for lr, group in zip(row, groups, strict=True) for name in group["params"]}
        gradient = self.full.vjp(self.x, slope / self.n)
        update = {name: -rate.get(name, 0.0) * g for name, g in gradient.items()}
        predicted = self.full.jvp(self.x, update).double()
        before = raw_outputs(self.model, self.x).reshape(self.n, -1).double()
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            kept = {name: params[name].clone() for name in update}
            for name, change in update.items():
                params[name].add_(change)
            after = raw_outputs(self.model, self.x).reshape(self.n, -1).double()
            for name, value in kept.items():
                params[name].copy_(value)
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
def _put_back(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers and modes of the model as they were."""
    modes = [(module, module.training) for module in model.modules()]
    state = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in state:
                tensor.copy_(value)
        for module, mode in modes:
            module.training = mode


def _named(function: Any) -> str:
    """A function's name and code, or an object's repr: what tells one loss or output from another."""
    code = getattr(function, "__code__", None)
    if code is None:  # a module, a partial: its own plain settings
        own = {
            k: v
            for k, v in getattr(function, "__dict__", {}).items()
            if isinstance(v, (bool, int, float, str)) or v is None
        }
        return f"{type(function).__name__} {own}"
    parts = (code.co_code, code.co_consts, code.co_names, function.__defaults__)
    return f"{function.__qualname__} {hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _hash(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {list(t.shape)};".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
