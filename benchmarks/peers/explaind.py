"""The path kernel of explaind 0.0.2 (mainlp/explaind, MIT), with the peers' torch environment.

``python -m benchmarks.peers.explaind`` measures one case, digits in a ReLU MLP, and prints JSON. `measure` does so for
any run given as arrays, `digits` makes those of the case. The script also is the child that `measure` starts.

What it takes to run explaind, all of it done here or in `setup`:

- Its wheel asks for Python 3.12, but nothing in it needs that: installed with ``--ignore-requires-python``. Of what it
  depends on, the path kernel imports torch, numpy and tqdm; the rest (pandas, tensorboard, umap-learn, plotly) are left
  out by ``--no-deps``. No file is patched. 0.1.0 differs by an AdamW explainer for language models alone.
- The network must give log-probabilities: gradients of -loss are taken as gradients of the target's output. Other
  losses (and NLLLoss by that name) raise; logits with CrossEntropyLoss are accepted, and wrong.
- ``kernel_store_interval=nan`` is never a divisor of a step: without it the first step stores into None and raises,
  unless parameter-wise kernels are kept too ([tests, 1, C, batch, parameters] numbers for plain SGD).
- Nodes per step are int(1 / integral_eps), 10 by default. ``early_steps=0``: else the first 4 steps get 1000.
- ``checkpoints=[]``: the default is one list for all optimizers of a process.
- Momentum 0.9 and weight decay 1e-4 are its defaults: both are set. ``buffer_float16=False``: else momentum's features
  are rounded to float16. Nesterov is ignored, and dampening is wrong: neither is offered here.
- Every node frees the Jacobians of all parameters. glibc then gives them back to the system, and float64 takes nearly
  twice as long (float32 a tenth longer): told not to.
- float64: it leaves out all parameters that are not ``torch.float``; in its module that name is made to mean float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import sys
import tempfile
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers import job as jobs
from benchmarks.peers.setup import interpreter

Arrays = dict[str, np.ndarray]


# ---------------------------------------------------------------- the child


class Rows(Dataset):
    """Samples and targets, the latter where explaind looks for them: it puts every sample's index beside its target."""

    def __init__(self, x: Tensor, targets: list[Any]):
        self.x, self.targets = x, targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.x[i], self.targets[i]


def mlp(weights: dict[str, Tensor]) -> nn.Sequential:
    """ReLU MLP with these weights and biases, named and ordered as nn.Sequential does; it ends in log-probabilities."""
    layers: list[nn.Module] = []
    for w in weights.values():
        if w.ndim == 2:
            layers += [nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype), nn.ReLU()]
    model = nn.Sequential(*layers[:-1], nn.LogSoftmax(dim=1))
    model.load_state_dict(weights)
    return model


def trained(case: Arrays, nodes: int, matrices: bool) -> tuple[Callable[[], Tensor], Tensor]:
    """Train as the case says; gives the work, explaind's prediction of the test points, and the network's own."""
    from explaind import model_paths
    from explaind.data_paths import DataPath
    from explaind.epk_model import ExactPathKernelModel
    from explaind.modulo_model.loss import RegularizedCrossEntropyLoss
    from explaind.optimizer_paths import SGDOptimizerPath

    weights = {name[6:]: torch.from_numpy(a) for name, a in case.items() if name.startswith("param:")}
    x, x_test = torch.from_numpy(case["x"]), torch.from_numpy(case["x_test"])
    torch.set_default_dtype(x.dtype)
    if x.dtype == torch.float64:
        model_paths.torch = types.SimpleNamespace(**{**vars(torch), "float": torch.float64})
    network = mlp(weights)
    model = model_paths.ModelPath(network, device="cpu", output_dim=network(x[:1]).shape[1])
    rates = np.broadcast_to(case["lr"], len(case["batches"])).tolist()
    optimizer = SGDOptimizerPath(
        model, lr=rates[0], momentum=float(case.get("momentum", 0)), weight_decay=float(case.get("weight_decay", 0)),
        checkpoints=[], buffer_float16=False, device="cpu",
    )  # fmt: skip
    data = DataPath(DataLoader(Rows(x, case["y"].tolist()), batch_sampler=case["batches"].tolist()), full_batch=False)
    loss = RegularizedCrossEntropyLoss(alpha=0.0)  # NLLLoss, mean over the batch
    for rate, batch in zip(rates, data.dataloader, strict=True):
        optimizer.optimizer.param_groups[0]["lr"] = rate
        inputs, targets = data.get_batch(batch)
        optimizer.zero_grad()
        loss(model.forward(inputs), targets).backward()
        optimizer.step()
        model.log_checkpoint()
        optimizer.log_checkpoint()
    peer = ExactPathKernelModel(
        model, optimizer, loss, data, integral_eps=1 / (nodes + 0.5), early_steps=0, evaluate_predictions=False,
        kernel_store_interval=float("nan"), device="cpu",
    )  # fmt: skip

    def work() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return peer.predict(x_test, keep_kernel_matrices=matrices)[0].detach()

    return work, model.forward(x_test, step=len(rates)).detach()


def keep_freed_memory() -> None:
    """Have glibc reuse large freed blocks rather than give them back; does nothing where there is no glibc."""
    with contextlib.suppress(AttributeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def child() -> None:
    job = jobs.read_job()
    keep_freed_memory()
    torch.manual_seed(0)
    with np.load(job["inputs"]) as file:
        case = dict(file)
    with contextlib.redirect_stdout(io.StringIO()):
        predict, network = trained(case, job["nodes"], job["matrices"])
    error: dict[str, float] = {}

    def work() -> Tensor:
        found = predict()
        error["absolute"] = float((found - network).abs().max())
        error["relative"] = error["absolute"] / float(network.abs().max())
        return torch.stack([found, network])

    versions = {name: version(name) for name in ("explaind", "torch", "numpy")}
    versions["python"] = sys.version.split()[0]
    jobs.report(job, work, nodes=job["nodes"], dtype=str(case["x"].dtype), error=error, versions=versions)


# ---------------------------------------------------------------- the parent


def digits(batch: int = 200, steps: int = 20, dtype: str = "float32") -> Arrays:
    """Arrays of the case: an MLP 64-128-128-10, 200 digits in batches, 20 others to predict, SGD with rate 0.1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(dtype)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(dim=1)
    )
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(200) for _ in range(-(-steps * batch // 200))])
    params = {f"param:{name}": p.detach().numpy().astype(dtype) for name, p in model.named_parameters()}
    return {
        "x": x[:200], "y": y[:200], "x_test": x[1000:1020], "lr": np.array(0.1),
        "batches": order[: steps * batch].reshape(steps, batch), **params,
    }  # fmt: skip


def measure(
    case: Arrays, nodes: int = 100, matrices: bool = False, seconds: float = 60, limit: float = 600, threads: int = 1
) -> dict[str, Any]:
    """Run explaind on a run given as arrays.

    Parameters
    ----------
    case : ``x`` [n, d], ``y`` [n] classes, ``x_test`` [m, d], ``batches`` [steps, size] rows of x, ``lr`` one or one
        per step, ``param:NAME`` the initial weights of a ReLU MLP in order; if wanted ``momentum``, ``weight_decay``.
        Loss: mean negative log-likelihood. The arrays' precision is the run's.
    nodes : midpoints per training step.
    matrices : also keep the path kernel of all test and training points, by parameter.
    seconds, limit, threads : to repeat for, to give up after, cores; see `job.run`.

    Returns
    -------
    dict
        ``status``; ``first_seconds`` and ``seconds`` of the path kernel alone; ``nodes``, ``dtype``, ``versions``,
        ``peak_gb``; ``error`` of the outputs, path kernel against network, ``absolute`` at most, and ``relative`` to
        the network's largest; ``path_kernel`` and ``network`` [m, C].
    """
    import psutil

    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "inputs.npz", **case)
        job = {"inputs": f"{name}/inputs.npz", "nodes": nodes, "matrices": matrices, "seconds": seconds}
        memory = int(psutil.virtual_memory().available * 0.7)
        record = jobs.run("explaind", interpreter("torch"), job, Path(name), limit, memory, threads)
        if path := record.pop("values", None):
            record["path_kernel"], record["network"] = np.load(path)
    return record


def main() -> None:
    if sys.argv[1:]:
        return child()
    records = [measure(digits(dtype=dtype)) for dtype in ("float32", "float64")]
    print(json.dumps(records, indent=1, default=np.ndarray.tolist))


if __name__ == "__main__":
    main()
