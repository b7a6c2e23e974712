"""The conjugate kernel: inner products of the last hidden features."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, has_infinity, take
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Refused, nearest, refusal
from ntkit.base.shown import of_model
from ntkit.base.workers import product
from ntkit.jacobian.forwards import each_forward
from ntkit.jacobian.graph import Node, find_uses, nodes_behind, nodes_from, precisions_of
from ntkit.jacobian.model_calls import call, check_mode, check_module, select_parameters, untouched, unwritten
from ntkit.jacobian.model_outputs import Select, check_finite_outputs, check_select, part_of, real_rows
from ntkit.kernels.kernel import Kernel, KernelOperator, mirrored, written

_BATCH = 128
_WEIGHTED = {
    "AddmmBackward0": (2, "_saved_mat1"),
    "MmBackward0": (1, "_saved_self"),
    "ConvolutionBackward0": (1, "_saved_input"),
}

_BIASED = {"AddmmBackward0": 0, "ConvolutionBackward0": 2}
_SHIFTS = ("AddBackward0", "SubBackward0")  # a parameter added is a bias
_PRODUCTS = ("MvBackward0", "BmmBackward0", "DotBackward0")


class ConjugateKernel(Kernel):
    """k(x, x') = <phi(x), phi(x')> with phi the input of the last weight layer, without a bias feature.

    Parameters
    ----------
    model : any module in eval mode.
    layer : name of a submodule whose *output* is phi instead (see ``model.named_modules()``).
    select : the part of the model's output behind which the last weight layer is looked for, as for
        `ntkit.TangentKernel`; of a `layer`, the part of that layer's output that is phi.

    Notes
    -----
    Long 2021, section 2 ("conjugate kernel"). The last weight layer is read off the autograd graph: the dense or
    convolution node with a weight behind which all other weights are; several with the same input (heads) count as one.

    Raises
    ------
    Refused
        As `ntkit.TangentKernel`; where there is no last weight layer, or several beside each other: name one.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 1))
    >>> ConjugateKernel(model)(torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    _infinite = True
    _computed = "features"

    def __init__(self, model: nn.Module, layer: str | None = None, *, select: Select | None = None) -> None:
        check_module(model)
        check_select(select)
        self._model, self._select = model, select
        self._layer: nn.Module | None = None
        if layer is not None:
            modules = dict(model.named_modules())
            if not isinstance(layer, str) or layer not in modules:
                fix = nearest(str(layer)[:80], modules)
                raise refusal("layer", got=repr(layer)[:80], expected="a submodule's name", fix=fix)
            self._layer = modules[layer]
        self._place = layer  # two layers may have equal settings and weights

    def __repr__(self) -> str:
        return of_model(type(self), self._model)

    @own_context()
    def features(self, x: Batch) -> Tensor:
        """phi(x), [n, d]; under autocast, where features come in half precision, in the precision of the weights."""
        check_mode(self._model)
        x = self._checked(x, "x")
        params = select_parameters(self._model, lambda name: True)  # a frozen layer counts, too

        with untouched(self._model, params):
            with unwritten(self._model):
                parts = each_forward(
                    self._model,
                    x,
                    _BATCH,
                    lambda modules, part: self._features(part, modules, params)[0],
                    self._select if self._layer is None else None,
                )
            phi = torch.cat(parts)
            self._compare_alone(x, phi, params)
        dtype = next(self._model.parameters()).dtype
        return self._finite(phi.to(torch.promote_types(phi.dtype, dtype)), x)

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x, x): two products with the features."""
        phi = self.features(x)
        return KernelOperator(len(phi), lambda v: phi @ (phi.T @ v), lambda: phi.square().sum(1), phi)

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        phi = self.features(x1)
        other = phi if x2 is None else self.features(x2)
        values = product(phi, other.T)
        return written(mirrored(values) if x2 is None else values, out)

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        phi = self.features(x1)
        return (phi * (phi if x2 is None else self.features(x2))).sum(1)

    def _features(
        self, x: Batch, modules: dict[nn.Module, nn.Module], params: dict[str, nn.Parameter]
    ) -> tuple[Tensor, Tensor]:
        """Features [n, d] of a batch, and the tensor that they were read off, with its graph."""
        n, model = count(x), modules[self._model]
        if self._layer is not None:
            out = self._output_of(modules[self._layer], model, x, n)
            phi = None if out is None else out.detach()
        else:
            out = self._tensor(call(model, x), n)
            if has_infinity(x):
                check_finite_outputs(self._model, out)
            phi = self._last_hidden(out, params)
        if phi is None or out is None:
            got = "no dense or convolution layer with a trainable weight behind its output"
            expected = "a weight layer, whose input is the feature map of the conjugate kernel"
            fix = "Name a layer: ConjugateKernel(model, layer=...)."
            raise refusal(f"model {type(self._model).__name__}", got=got, expected=expected, fix=fix)
        if phi.shape[0] != n:
            got = f"shape {tuple(phi.shape)} for {n} samples"
            fix = "Name a layer whose output has the samples first: ConjugateKernel(model, layer=...)."
            raise refusal("the features", got=got, expected=f"({n}, ...)", fix=fix)
        return phi.reshape(n, -1), out

    def _compare_alone(self, x: Batch, phi: Tensor, params: dict[str, nn.Parameter]) -> None:
        """Refuse features of a sample that depend on the other samples, or that are not along the first axis."""
        if count(x) == 1 or not bool(torch.isfinite(phi).all()):
            return
        themselves = {module: module for module in self._model.modules()}
        for s in {0, count(x) // 2}:
            twice, out = self._features(take(x, [s, s]), themselves, params)  # some layers take one sample otherwise
            dtypes = {twice.dtype, *(p.dtype for p in params.values()), *precisions_of(nodes_behind(out))}
            eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
            bound = eps**0.5 * phi.abs().max()
            alike = twice.shape[1:] == phi.shape[1:]
            if not (alike and (twice[0] - phi[s]).abs().max() <= bound):
                raise refusal(
                    "the features",
                    got="other features for one sample when it is evaluated alone",
                    expected="the same in every batch, with the samples along the first axis",
                    fix="Look for layers that mix samples (batch statistics), or pick a layer whose output has the "
                    "samples first: ConjugateKernel(model, layer=...).",
                )

    def _tensor(self, output: Any, n: int) -> Tensor:
        """The part of an output that is looked at; refuses what is no tensor."""
        part = part_of(output, self._select)
        return part if isinstance(part, Tensor) else real_rows(part, n)

    def _output_of(self, layer: nn.Module, model: nn.Module, x: Batch, n: int) -> Tensor | None:
        caught: list[Any] = []
        handle = layer.register_forward_hook(lambda module, args, output: caught.append(output))
        try:
            call(model, x)
        finally:
            handle.remove()
        return self._tensor(caught[-1], n).detach() if caught else None

    @staticmethod
    def _last_hidden(out: Tensor, params: dict[str, nn.Parameter]) -> Tensor | None:
        uses = {(use.node, use.slot) for use in find_uses(nodes_behind(out), params, set())}
        inputs = []
        for node in _last_weighted(out, uses):
            name = node.name()
            slot, saved = _WEIGHTED.get(name, (-1, ""))
            if (node, slot) not in uses:
                got = f"{name}, whose weight is not a parameter of a dense or convolution layer"
                raise _no_last_layer(got, "a model whose last layer is dense or a convolution, with hidden features")
            inputs.append(getattr(node, saved).detach())
            if inputs[-1].shape != inputs[0].shape or not torch.equal(inputs[-1], inputs[0]):
                got = f"{name} beside another weight layer with another input"
                raise _no_last_layer(got, "one last layer, behind which all others are, or heads with one input")
        return inputs[0] if inputs else None


def _last_weighted(out: Tensor, uses: set[tuple[Node, int]]) -> list[Node]:
    """Nodes with a weight, or products of two tensors, that are behind no other such node."""
    weighted = {node for node, slot in uses if slot not in _biases(node)}
    first: list[Node] = []  # those that are reached without passing another
    seen: set[Node] = set()
    queue: deque[Node] = deque([out.grad_fn])
    while queue:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in weighted or node.name() in (*_PRODUCTS, *_WEIGHTED):
            first.append(node)
        else:
            queue.extend(child for child, _ in node.next_functions)
    behind = {node: set(nodes_from(node)) for node in first} if len(first) > 1 else {}
    return [node for node in first if not any(node in behind[other] for other in behind if other is not node)]


def _biases(node: Node) -> tuple[int, ...]:
    """Slots of a node at which a parameter is a bias."""
    name = node.name()
    return (_BIASED[name],) if name in _BIASED else (0, 1) if name in _SHIFTS else ()


def _no_last_layer(got: str, expected: str) -> Refused:
    fix = "Name the layer whose output is the feature map: ConjugateKernel(model, layer=...)."
    return refusal("the last weight layer", got=got, expected=expected, fix=fix)
