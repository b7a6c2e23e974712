"""One network on one set of points: the numbers of a snapshot, but for its distances from others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ntkit.base.batch import Batch
from ntkit.gram.krylov import leading
from ntkit.jacobian.model_calls import Outputs, raw_outputs
from ntkit.jacobian.replicas import in_one_thread
from ntkit.kernels.tangent import TangentKernel
from ntkit.tracking.losses import derivatives
from ntkit.tracking.snapshot_numbers import KernelMatrix, KernelProducts, finite
from ntkit.trajectory.objective import Loss
from ntkit.trajectory.recorded_run import assign


@dataclass(frozen=True)
class Points:
    """What is measured: `n` points and their targets, and how; the same for every snapshot.

    ``targets`` are ``y`` as values [n, C]; ``mode`` is the kernel's; ``size`` its rows; ``dense``: it is formed;
    ``layers``: so is the share of each parameter. ``memory``: bytes of scratch for one kernel.
    """

    x: Batch
    y: Tensor | None
    targets: Tensor | None
    loss: Loss | None
    n: int
    outputs: int
    mode: Outputs
    k: int
    size: int
    dense: bool
    layers: bool
    memory: int


class Snapshot(NamedTuple):
    """Numbers of one snapshot; those of its distances from others belong between `head` and `tail`."""

    head: dict[str, Any]
    tail: dict[str, Any]
    arrays: dict[str, np.ndarray]
    signature: Any  # of its kernel; None where parameters are not finite


class Network:
    """A network whose parameters are set to one snapshot after the other, and its kernels.

    Parameters
    ----------
    model : its parameters are changed.
    points : what is measured.
    """

    def __init__(self, model: nn.Module, points: Points) -> None:
        self.model, self._points = model, points
        self._full = TangentKernel(model, "full", memory=points.memory)
        self._kernel = TangentKernel(model, points.mode, memory=points.memory)

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Set parameters and buffers to those of a step."""
        assign(self.model, state, f"step {step}")
        self.model.eval()

    def signature(self, state: dict[str, Tensor], step: int) -> Any:
        """What changes of the kernel are measured by, at a step."""
        self.load(state, step)
        return self._kernel_now().signature()

    def measure(self, state: dict[str, Tensor], step: int, head: dict[str, Any], rates: dict[str, float]) -> Snapshot:
        """Numbers and eigenvectors at a step.

        Parameters
        ----------
        state : parameters and buffers by name.
        head : the numbers that are known without the network.
        rates : learning rate of each parameter, by name; none where it is not known.
        """
        own = self._points
        self.load(state, step)
        if not all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point()):
            shape = (own.outputs, own.size, own.k) if own.mode == "diagonal" else (own.size, own.k)
            head = head | {"status": "parameters that are not finite"}
            return Snapshot(head, {}, {"eigenvectors": np.full(shape, np.nan)}, None)
        raw = raw_outputs(self.model, own.x)
        slope = curvature = None
        if own.loss is not None and own.y is not None:
            loss, slope, curvature = derivatives(own.loss, raw, own.y)
            head = head | {"loss": loss}
        kernel = self._kernel_now()
        numbers, vectors = self._spectral(kernel, raw, slope)
        head = head | numbers
        if isinstance(kernel, KernelMatrix):
            head |= kernel.layered(own.targets)
        tail: dict[str, Any] = {}
        if slope is not None and curvature is not None:
            tail = self._sharpness(kernel, curvature)
            tail["first_order"] = self._first_order(rates, slope)
        return Snapshot(head, tail, {"eigenvectors": vectors}, kernel.signature())

    def _kernel_now(self) -> KernelMatrix | KernelProducts:
        """The kernel of the model's parameters."""
        own = self._points
        if not own.dense:
            return KernelProducts(self._kernel.operator(own.x), own.n)
        shares = self._kernel.layers(own.x) if own.layers else None
        K = sum(shares.values()) if shares else self._kernel(own.x)
        assert isinstance(K, Tensor)
        return KernelMatrix(K, shares, own.mode == "diagonal")

    def _spectral(
        self, kernel: KernelMatrix | KernelProducts, raw: Tensor, slope: Tensor | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Numbers of the spectrum, and eigenvectors."""
        own = self._points
        values: dict[str, Tensor | None]
        values = {"target": own.targets, "output": raw.reshape(own.n, -1).double(), "residual": slope}
        if isinstance(kernel, KernelMatrix) and own.mode == "diagonal":
            parts = []
            for c in range(own.outputs):
                columns = {name: None if v is None else v[:, c : c + 1] for name, v in values.items()}
                parts.append(KernelMatrix(kernel.K[:, :, c]).spectral(own.k, columns, 1))
            return {"per_output": [numbers for numbers, _ in parts]}, np.stack([v for _, v in parts])
        if callable(own.mode):  # one scalar of the outputs: only its values can be compared with the kernel
            values = {"output": own.mode(raw).detach().double().reshape(own.n, 1)}
        return kernel.spectral(own.k, values, own.outputs if own.mode == "full" else 1)

    def _sharpness(self, kernel: KernelMatrix | KernelProducts, curvature: Tensor) -> dict[str, Any]:
        """Largest eigenvalue of the Gauss-Newton matrix (1/n) H^1/2 K H^1/2."""
        own = self._points
        values, vectors = torch.linalg.eigh(curvature)  # per sample, [n, C, C]
        root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
        if not bool(root.any()):
            return {"sharpness": 0.0, "stable_learning_rate": None}
        scalar = own.outputs == 1 and not callable(own.mode)
        is_full = isinstance(kernel, KernelMatrix) and kernel.K.dim() == 2 and scalar
        operator = kernel.K.double() if is_full else self._full.operator(own.x)

        def product(v: np.ndarray) -> np.ndarray:
            u = torch.from_numpy(v).to(root).reshape(own.n, own.outputs, -1)
            image = operator @ (root @ u).reshape(own.n * own.outputs, -1)
            return (root @ image.to(root).reshape(u.shape)).reshape(v.shape).cpu().numpy() / own.n

        largest = float(leading(product, own.n * own.outputs, 1, 1e-5)[0][0])
        return {"sharpness": finite(largest), "stable_learning_rate": finite(2 / largest) if largest > 0 else None}

    def _first_order(self, rates: dict[str, float], slope: Tensor) -> dict[str, Any] | None:
        """One gradient descent step on the points: the change of all outputs, and its first-order prediction."""
        if not rates:
            return None
        own = self._points
        gradient = self._full.vjp(own.x, slope / own.n)
        update = {name: -rates.get(name, 0.0) * g for name, g in gradient.items()}
        predicted = self._full.jvp(own.x, update).double()
        before = raw_outputs(self.model, own.x).reshape(own.n, -1).double()
        params = dict(self.model.named_parameters())
        with torch.no_grad(), restored(self.model):
            for name, change in update.items():
                params[name].add_(change)
            after = raw_outputs(self.model, own.x).reshape(own.n, -1).double()
        true = after - before
        sizes = float(true.norm()), float(predicted.norm())
        if not min(sizes) > 0:
            return None
        return {
            "cosine": finite(float((true * predicted).sum()) / (sizes[0] * sizes[1])),
            "relative_error": finite(float((true - predicted).norm()) / sizes[0]),
            "norm_ratio": finite(sizes[1] / sizes[0]),
        }


def copies_of(model: nn.Module, x: Batch, number: int) -> list[nn.Module]:
    """Copies of a model that can be used in several threads at once; none where that may be wrong.

    Each must give the model's outputs bit by bit, and so without the model: that has no number in it meanwhile. (A
    function that a module holds may lead from its copy back to the original.)
    """
    if in_one_thread(model):
        return []
    try:
        found = [copy.deepcopy(model) for _ in range(number)]
    except Exception:
        return []
    outputs = raw_outputs(model, x)
    with restored(model):
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(torch.nan if t.is_floating_point() or t.is_complex() else 0)
        return found if all(_gives(own, x, outputs) for own in found) else []


def _gives(model: nn.Module, x: Batch, outputs: Tensor) -> bool:
    try:
        return torch.equal(raw_outputs(model, x), outputs)
    except Exception:
        return False


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
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
