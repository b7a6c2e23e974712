"""Networks trained again without some examples: what every test of an explanation by deletion needs, computed once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, checked
from ntkit.base.caller_context import no_context
from ntkit.base.checks import Damaged, refusal
from ntkit.base.files import ensure_folder
from ntkit.base.function_identity import OTHER_VERSION, function_identity
from ntkit.base.integrity import fingerprint
from ntkit.base.lock import FolderLock
from ntkit.base.numbers import as_integer, as_number
from ntkit.base.tensors import points_hash, read_tensors_and_metadata, tensor_hash, write_tensors
from ntkit.base.versions import check_format
from ntkit.data.streamed_samples import with_labels
from ntkit.explanations.measures_of_outputs import Measure, OutputMeasure
from ntkit.jacobian.model_calls import check_module
from ntkit.jacobian.model_outputs import Select
from ntkit.trajectory import Trajectory
from ntkit.trajectory.batch_order import batch_indices
from ntkit.trajectory.objective import Inputs, Loss
from ntkit.trajectory.recorded_run import assign, read_run
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.replay_checks import check_any_steps
from ntkit.trajectory.reruns import Reruns

_VERSION = 1  # of the files of a folder
_AT_ONCE = 128  # retrainings from one file to the next


class Retrainings:
    """Measures of test points after the recorded run is repeated without some of its training examples.

    Two kinds. The *same* run: from its start, in its batches, with the removed examples' loss counted as zero. *Fresh*
    runs: on the remaining examples alone, from a new initialization, in an order of their own, with the recorded
    optimizer, batch size and number of epochs, and the schedule over these; the mean over seeds. Parameters and buffers
    that are not trained keep their recorded values.

    Every subset is trained once, whoever asks: methods are compared on the same networks.

    Parameters
    ----------
    trajectory : the run.
    x_test, y_test, measure : test points, targets and what is measured, as for `ntkit.influence`.
    path : folder; results are kept there, and a later call with the same run and test points goes on from them.
    make : seed -> a new network; needed for fresh runs.
    model, data, loss, clip : of the run, where `trajectory` was opened from disk.
    select : the part of the model's output that the loss and the measure take, as for `ntkit.TangentKernel`.

    Attributes
    ----------
    n, m, measure : numbers of training examples and test points; name of what is measured.
    values : [m], measures of the trained network itself, in float64.

    Raises
    ------
    Refused
        When the run cannot be replayed (see `ntkit.PathKernel`), an argument is invalid, or `path` holds retrainings
        of another run, other test points or another measure.

    Examples
    --------
    >>> import ntkit
    >>> x, y = torch.linspace(-1, 1, 6).view(6, 1).double(), torch.tensor([0, 0, 1, 1, 0, 0])
    >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5)
    >>> run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=40, batch_size=4)
    >>> again = Retrainings(run, x[:2] + 0.1, y[:2])
    >>> again.without([[0], [1, 2]]).shape
    torch.Size([2, 2])
    """

    @no_context()
    def __init__(
        self,
        trajectory: Trajectory,
        x_test: Batch,
        y_test: Tensor | None = None,
        *,
        measure: Measure = "margin",
        path: str | Path | None = None,
        make: Callable[[int], nn.Module] | None = None,
        model: nn.Module | None = None,
        data: tuple[Inputs, Tensor] | None = None,
        loss: Loss | None = None,
        clip: float | None = None,
        select: Select | None = None,
    ) -> None:
        x, y = with_labels(x_test, y_test)
        self._x = checked(x, "x_test", infinite=True)
        self._replay = Replay(trajectory, model, data, loss, clip, select=select)
        check_any_steps(self._replay.steps)
        self._replay.check()
        assign(self._replay.model, self._replay.final(), "the end of the run")
        self._of = OutputMeasure(measure, self._replay.objective.loss, self._x, y, self._replay.model)
        self.n, self.values = self._replay.n, self._of.of_network(self._replay.model, self._x)
        self._reruns = Reruns(self._replay)
        self._make, self._batch_size = make, trajectory.settings.get("batch_size")
        self.m, self.measure = len(self.values), self._of.name
        run = read_run(trajectory.path)
        points = points_hash(self._x, self._of.targets)
        loss_counts = measure == "loss"  # as the measure; in training, the replay has compared it
        functions = (measure, self._replay.objective.loss if loss_counts else None, self._replay.select)
        told = [function_identity(function) for function in functions if callable(function)]
        self._id = fingerprint([run["initial"], run["settings"], points, self._of.name, *told])
        self._known: dict[str, Tensor] = {}
        self._folder = None if path is None else Path(path)
        if self._folder is not None:
            self._read(ensure_folder(self._folder))

    @no_context()
    def without(self, removed: Tensor | Sequence[Sequence[int]], *, fresh: int = 0) -> Tensor:
        """Measures after training without some examples.

        Parameters
        ----------
        removed : K sets of training examples: lists of their numbers, int64 [K, k], or bool [K, n], True where removed.
        fresh : 0 for the same run; else the number of fresh runs per set.

        Returns
        -------
        Tensor
            [K, m] in float64; for fresh runs [fresh, K, m].

        Raises
        ------
        Refused
            For examples out of range, and for fresh runs without `make`.
        """
        masks = self._masks(removed)
        fresh = as_integer(fresh, "fresh", "a number of runs per set, >= 0", "0 = the same run.", least=0)
        of = self._fresh_network() if fresh else ""
        seeds = range(1, fresh + 1) if fresh else [0]
        keys = {(s, k): _key(mask, s) + of for s in seeds for k, mask in enumerate(masks)}
        missing = {key: place for place, key in keys.items() if key not in self._known}
        for seed in seeds:
            own = [(key, k) for key, (s, k) in missing.items() if s == seed]
            by_size: dict[int, list[tuple[str, int]]] = {}
            for key, k in own:  # fresh runs of one length go together
                by_size.setdefault(int(masks[k].sum()) if seed else 0, []).append((key, k))
            for group in by_size.values():
                for start in range(0, len(group), _AT_ONCE):
                    some = group[start : start + _AT_ONCE]
                    rows = masks[[k for _, k in some]]
                    values = self._fresh(rows, seed) if seed else self._same(rows)
                    self._keep([key for key, _ in some], values)
        values = [torch.stack([self._known[keys[s, k]] for k in range(len(masks))]) for s in seeds]
        return torch.stack(values) if fresh else values[0]

    def _masks(self, removed: Tensor | Sequence[Sequence[int]]) -> Tensor:
        if not len(removed):
            raise refusal("removed", got="no set", expected="at least one set of examples", fix="Pass [[]] for none.")
        numbers = isinstance(removed, Tensor) and removed.dim() == 2 and removed.dtype == torch.int64
        if isinstance(removed, Tensor) and not numbers:
            if removed.dtype != torch.bool or removed.dim() != 2 or removed.shape[1] != self.n:
                got, expected = f"{removed.dtype} {list(removed.shape)}", f"bool [K, {self.n}], or int64 [K, k]"
                raise refusal("removed", got=got, expected=expected, fix="Pass one row per set.")
            masks = removed.cpu()
        else:
            masks = torch.zeros(len(removed), self.n, dtype=torch.bool)
            for k, examples in enumerate(removed):
                index = torch.as_tensor(examples)
                if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.dtype == torch.bool)):
                    got, fix = f"{examples!r}", "Pass a list for each set, e.g. [[0], [1, 2]]."
                    raise refusal(f"removed, set {k}", got=got, expected="numbers of training examples", fix=fix)
                index = index.long()
                if index.numel() and not bool(((index >= 0) & (index < self.n)).all()):
                    bad = int(index[(index < 0) | (index >= self.n)][0])
                    fix = "Training examples are numbered from 0."
                    raise refusal(f"removed, set {k}", got=f"example {bad}", expected=f"0 to {self.n - 1}", fix=fix)
                masks[k, index] = True
        if bool(masks.all(1).any()):
            got, fix = "a set of all examples", "Leave at least one."
            raise refusal("removed", got=got, expected="some examples that remain", fix=fix)
        return masks

    def _same(self, masks: Tensor) -> Tensor:
        return self._reruns.run(1.0 - masks.double(), self._measured, self._x, keep=0)[0]

    def _measured(self, outputs: Any, _: int) -> Tensor:
        return self._of.values(outputs)

    def _fresh(self, masks: Tensor, seed: int) -> Tensor:
        """Runs on what remains, all of one size; each set has an initialization and an order of its own."""
        kept = torch.stack([(~mask).nonzero()[:, 0] for mask in masks])
        size = kept.shape[1]
        batch = self._batch_size
        epochs = self._replay.steps / -(-self.n // (self._batch_size or self.n))
        steps = max(1, round(epochs * -(-size // (batch or size))))
        own = [_seed(mask, seed) for mask in masks]
        networks = [dict(self._made(s).named_parameters()) for s in own]
        initial = {name: torch.stack([net[name].detach() for net in networks]) for name in self._replay.names}

        def rows(step: int) -> Tensor:
            order = [batch_indices(s, size, batch, step) for s in own]
            return torch.stack([k[o] for k, o in zip(kept, order, strict=True)])

        weights = torch.ones(len(masks), self.n)
        return self._reruns.run(weights, self._measured, self._x, initial, rows, steps, keep=0)[0]

    def _fresh_network(self) -> str:
        """Hash of the network of seed 0, so that networks of another `make` have other names in the folder."""
        if self._make is None:
            fix = "Pass make=seed -> network to Retrainings."
            raise refusal("make", got="None", expected="a function of a seed for fresh runs", fix=fix)
        if self._replay.is_loop:
            got, fix = "a recorded loop, whose batches have no rule", "Use fresh=0, or a run of ntkit.train."
            raise refusal("fresh", got=got, expected="a run of ntkit.train", fix=fix)
        made = dict(self._made(0).named_parameters())
        return "-" + tensor_hash([made[name].detach() for name in self._replay.names])[:12]

    def _made(self, seed: int) -> nn.Module:
        assert self._make is not None
        devices = sorted({p.device for p in self._replay.model.parameters()}, key=str)
        gpus = [device.index or 0 for device in devices if device.type == "cuda"]
        with torch.random.fork_rng(devices=gpus):
            for generator in [torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus)]:
                generator.manual_seed(seed)  # of no other device: the fork would not restore it
            model = self._make(seed)
        check_module(model, "make", "Return the network.")
        model = model.to(devices[0])
        shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        own = {name: (p.shape, p.dtype) for name, p in self._replay.model.named_parameters()}
        if shapes != own:
            fix = "Build the network as it was built for the run."
            raise refusal("make", got="a network with other parameters", expected="those of the run", fix=fix)
        return model

    # ------------------------------------------------------------------ the folder

    def _keep(self, keys: list[str], values: Tensor) -> None:
        self._known.update(zip(keys, values, strict=True))
        if self._folder is None:
            return
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        with FolderLock(self._folder):
            tensors = {**dict(zip(keys, values, strict=True)), "trained": self.values}
            write_tensors(self._folder / f"retrainings-{name}.safetensors", tensors, {"of": self._id})

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob("retrainings-*.safetensors")):
            try:
                tensors, metadata = read_tensors_and_metadata(path)
            except Damaged as error:
                warnings.warn(f"{error} Its networks are trained again.", stacklevel=4)
                continue
            check_format(path, metadata.get("version", _VERSION), _VERSION, "Name another folder.")  # absent: 1
            trained = tensors.pop("trained", self.values)  # another function as measure may have the same name
            if metadata.get("of") != self._id or not torch.allclose(trained, self.values, rtol=1e-3, atol=1e-6):
                got, expected = "retrainings of something else", "those of this run, these test points and this measure"
                raise refusal(str(folder), got=got, expected=expected, fix=f"Name another folder. {OTHER_VERSION}")
            self._known.update(tensors)


def _key(mask: Tensor, seed: int) -> str:
    """Name of a set of removed examples and a seed: the same in every process."""
    return f"{hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:24]}-{seed}"


def _seed(mask: Tensor, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{_key(mask, seed)}".encode()).digest()[:4], "big")


def subsets(n: int, share: float, sets: int, seed: int = 0) -> Tensor:
    """Random sets of examples to remove: bool [sets, n], each with ``round(share * n)`` of them.

    Examples
    --------
    >>> subsets(10, 0.3, 2).sum(1).tolist()
    [3, 3]
    """
    expected, fix = f"at least one of {n} examples, and not all", "Choose a share between 1 / n and 1."
    good = lambda given: 0 < given < 1 and 1 <= round(given * n) < n
    size = round(as_number(share, "share", good, expected, fix) * n)
    sets = as_integer(sets, "sets", "a number of sets, at least 1", "Use e.g. 50.", least=1)
    seed = as_integer(seed, "seed", "an integer", "Use seed=0.")
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(sets, n, dtype=torch.bool)
    for row in masks:
        row[torch.randperm(n, generator=generator)[:size]] = True
    return masks
