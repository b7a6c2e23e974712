"""The limit of infinite width: covariance of the outputs and tangent kernel, read from the module."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, checked, count
from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.shown import of_model
from ntkit.base.workers import spread, workers
from ntkit.jacobian.model_calls import check_module
from ntkit.kernels.infinite.layers import Affine, Graph, Input, Layer, Pointwise
from ntkit.kernels.infinite.limit_gradients import LimitGradients, Std, as_numbers, as_std, refused, wants_gradients
from ntkit.kernels.infinite.piecewise import Piecewise
from ntkit.kernels.infinite.planes import Planes, prepare, splits
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.sample_sides import Side
from ntkit.kernels.infinite.tape import record
from ntkit.kernels.infinite.tape_to_layers import read
from ntkit.kernels.infinite.tile_progress import each
from ntkit.kernels.kernel import Kernel, KernelOperator, check_out

Kind = Literal["ntk", "nngp"]

_PLANE_ELEMENTS = {"cpu": 1 << 16}  # a few planes of this size fit into a core's cache
_PLANE_ELEMENTS_ELSEWHERE = 1 << 24
_TILE_PAIRS = 1 << 10  # pairs of samples with positions in a tile: 32 x 32, so that each side is prepared for many
_BATCH, _BATCH_OF_GRIDS = 512, 64
_CACHE_BYTES = 256e6  # of prepared sides, kept for the next tiles
_INEXACT = 1e-6  # relative error of an activation above which a warning is given


class InfiniteKernel(Kernel):
    """Tangent kernel ("ntk") or covariance of the outputs ("nngp") of a module as its hidden widths tend to infinity.

    The layers are read from a run of the module: dense layers and convolutions, transposed ones too (stride, padding of
    any mode, dilation, groups), any elementwise activation, sums, products and concatenations of branches, factors,
    average and global pools, linear maps of positions (slices, flips, padding, interpolation, means over one axis),
    flattening, LayerNorm and GroupNorm before an activation, dropout in eval mode. The module's own widths have no
    influence, except through `w_std=None` and as shares of the channels in a concatenation. All outputs have the same
    kernel and are independent: entry (i, c, j, d) of the full kernel is ``k(x1, x2)[i, j]`` for c = d, else 0.

    Parameters
    ----------
    model : the module, in eval mode. It is run on a few samples and not changed.
    kind : "ntk" or "nngp".
    w_std, b_std : the NTK parametrization z = w_std / sqrt(fan_in) W a + b_std b in every dense and convolution layer,
        with standard normal W and b, all trained. None: the module's own parametrization and initialization, recognized
        from its weights (`initial_std`); the parameters that require gradients are trained. In PyTorch's own
        parametrization the tangent kernel of a layer grows with its width: the widths are then the module's, and the
        value is the leading order. Tensors that require a gradient stay in the autograd graph.

    Attributes
    ----------
    error : largest relative error of an activation so far: of a table computed by quadrature, or of rounding between
        the pieces of a function with kinks elsewhere than at 0; 0 for all other closed forms.

    Returns (of a call)
    -------------------
    Tensor
        [n1, n2] in the dtype of the samples; exactly symmetric for ``x2=None``. The values of a sample with itself are
        free of the rounding error that angles near 0 amplify. In the autograd graph if samples, `w_std` or `b_std`
        require a gradient.

    Raises
    ------
    Refused
        By the layer's name, for a layer without such a limit: max-pools, BatchNorm, softmax, attention and other
        mixtures of channels, weights used twice, sums and products of branches that depend on each other. For a
        gradient through an activation that has no closed form, or has kinks elsewhere than at 0.

    Warns
    -----
    UserWarning
        When the relative error of an activation exceeds 1e-6: kinks elsewhere than at 0 between pieces that are no
        polynomials. (Those between polynomials, as of ReLU6, hardtanh or hardswish, are exact.)

    Notes
    -----
    Jacot et al. 2018, proposition 1 and theorem 1. Per layer, with covariance S and tangent kernel T: activations
    S -> E[s(u) s(v)], T -> T E[s'(u) s'(v)] for (u, v) of covariance S; dense layers and convolutions
    T -> w^2 T + w^2 S + b^2, S -> w^2 S + b^2, averaged over the kernel's window. Kernels of images need all pairs of
    positions: they are computed one offset at a time (see `planes`), in memory that does not grow with the image.
    Products of branches K1 K2, T1 K2 + K1 T2; concatenations of channels: the mean of their kernels by their shares.
    Gradients are exact, of second order, too; where the tangent kernel has a tip (a kink at 0, samples that coincide)
    they are the mean of the one-sided derivatives. `kernel.operator` has none.
    The slope of a PReLU is a constant and not trained: one number for all channels has no deterministic limit.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
    ...                       nn.Linear(8, 1))
    >>> circle = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> InfiniteKernel(model, w_std=1.0, b_std=0.1)(circle)
    tensor([[0.2825, 0.0927],
            [0.0927, 0.2825]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "ntk",
        w_std: Std | None = None,
        b_std: Std | None = None,
    ) -> None:
        if not isinstance(kind, str) or kind not in ("ntk", "nngp"):
            raise refusal("kind", got=repr(kind), expected='"ntk" or "nngp"', fix="Choose one of them.")
        if (w_std is None) != (b_std is None):
            missing, other = ("b_std", "w_std") if b_std is None else ("w_std", "b_std")
            raise refusal(missing, got=f"None although {other} is given", expected="both or none", fix="Give both.")
        stds = (as_std(w_std, "w_std"), as_std(b_std, "b_std")) if w_std is not None else None
        check_module(model)
        self.kind = kind
        self._model, self._stds = model, stds
        self._models: dict[torch.dtype, nn.Module] = {}
        self._graphs: dict[tuple[Any, ...], Graph] = {}  # by dtype and shape of a sample, w_std and b_std
        self._fingerprint: Any = None  # of the model, when the graphs were read

    @property
    def error(self) -> float:
        """Largest relative error of an activation so far."""
        return max((a.error for graph in self._graphs.values() for _, a in _inexact(graph)), default=0.0)

    def describe(self, x: Batch) -> str:
        """List the layers as read, one per line: what each is, and how its variances are known.

        Examples
        --------
        >>> model = nn.Sequential(nn.Linear(3, 9), nn.ReLU())
        >>> print(InfiniteKernel(model, w_std=1.0, b_std=0.0).describe(torch.ones(1, 3)))
        the input, 3 channels at 1 x 1 positions
        layer '0' (Linear): weights of std 1 / sqrt(fan in), bias of std 0 (as given)
        layer '1' (ReLU): piecewise linear, slopes 1 and 0
        """
        graph = self._read(checked(x, "x"))[0]
        return "\n".join(_line(layer) for layer in graph.layers)

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """k(x, x) as an operator; the values are computed once, at the first product."""
        if wants_gradients(x, *self._stds or ()):
            raise refused("operator", "a matrix-free product", "Use the matrix, kernel(x) @ v, or build the operator")
        x = checked(x, "x")
        like = torch.empty(0, dtype=self._read(x)[2], device=x.device)
        kernel = copy.copy(self)
        kernel._stds = as_numbers(self._stds)
        values = lru_cache(1)(lambda: kernel(x))
        return KernelOperator(count(x), lambda v: values() @ v, lambda: kernel.diagonal(x), like)

    def settings(self) -> dict[str, Any]:
        """As of every kernel; with the values of `w_std` and `b_std`."""
        return vars(self) | {"_stds": as_numbers(self._stds) or (None, None)}

    def __repr__(self) -> str:
        return of_model(type(self), self._model)

    def _checked(self, x: Any, name: str) -> Batch:
        found = super()._checked(x, name)
        return x if wants_gradients(x) else found

    # ------------------------------------------------------------------ values

    @torch.inference_mode(False)  # activations are differentiated
    @own_context()
    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        if wants_gradients(x1, x2, *self._stds or ()):
            if out is not None:
                raise refused("out", "memory to write into", "Leave it out, or call the kernel")
            return self._with_gradients(x1, x2, LimitGradients.matrix)
        (graph, data1, dtype), same = self._read(x1), x2 is None
        data2 = data1 if x2 is None else self._read(x2, like=x1)[1]
        n1, n2 = count(x1), count(x1 if x2 is None else x2)
        like = next(iter(data1.values()))
        if out is None:
            out = torch.empty(n1, n2, dtype=dtype, device=x1.device)
        check_out(out, (n1, n2), dtype)
        size = _tile_size(graph, like, max(n1, n2))
        tiles = [(i, j) for i in range(0, n1, size) for j in range(i if same else 0, n2, size)]
        spread_within = splits(graph) and len(tiles) < 2 * workers()  # else whole tiles are spread

        @lru_cache(max(4, int(_CACHE_BYTES / (8 * size * _state_size(graph)))))
        def side(second: bool, start: int) -> Side:
            return _side(graph, data2 if second else data1, slice(start, start + size))

        def tile(at: tuple[int, int]) -> float:
            i, j = at
            with torch.no_grad():
                one, two = spread(lambda which: side(*which), [(False, i), (not same, j)])
                planes = Planes(graph, one, two, False, same and i == j, self.kind == "ntk", _plane_elements(like))
                block = planes(graph.layers[graph.output])[-1, 0, 0]
                out[i : i + size, j : j + size] = block
                return max(abs(float(end)) for end in block.aminmax())

        versions = _covered(graph, data1, data2)
        sizes = each(tile, tiles, like, spread_within)
        if same:
            for i in range(0, n1, size):
                out[i : i + size, :i] = out[:i, i : i + size].T
                block = out[i : i + size, i : i + size]
                block.copy_(block.triu() + block.triu(1).T)
        if _versions(graph) != versions:  # another thread extended a table
            return self._gram(x1, x2, out)
        _check_size(max(sizes), dtype)
        _warn(graph)
        return out

    @torch.inference_mode(False)
    @own_context()
    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        if wants_gradients(x1, x2, *self._stds or ()):
            return self._with_gradients(x1, x2, LimitGradients.pairs)
        graph, data1, dtype = self._read(x1)
        data2 = data1 if x2 is None else self._read(x2, like=x1)[1]
        like = next(iter(data1.values()))
        out = torch.empty(count(x1), dtype=like.dtype, device=like.device)

        size = _BATCH if _positions(graph) == 1 else _BATCH_OF_GRIDS

        def batch(start: int) -> None:
            samples = slice(start, start + size)
            with torch.no_grad():
                one = _side(graph, data1, samples)
                two = one if x2 is None else _side(graph, data2, samples)
                planes = Planes(graph, one, two, True, x2 is None, self.kind == "ntk", _plane_elements(like))
                out[samples] = planes(graph.layers[graph.output])[-1, 0, 0, :, 0]

        versions = _covered(graph, data1, data2)
        each(batch, list(range(0, count(x1), size)), like)
        if _versions(graph) != versions:
            return self._pairs(x1, x2)
        _check_size(float(out.abs().max()), dtype)
        _warn(graph)
        return out.to(x1.device, dtype)

    def _with_gradients(self, x1: Batch, x2: Batch | None, values: Callable[..., Tensor]) -> Tensor:
        graph, data1, dtype = self._read(x1, keep=True)
        data2 = None if x2 is None or x2 is x1 else self._read(x2, like=x1, keep=True)[1]
        out = values(LimitGradients(graph, self._stds, self.kind == "ntk"), data1, data2)
        _check_size(float(out.detach().abs().max()), dtype)
        return out.to(x1.device, dtype)

    # ------------------------------------------------------------------ reading

    @torch.inference_mode(False)
    @own_context()
    def _read(
        self, x: Batch, like: Batch | None = None, keep: bool = False
    ) -> tuple[Graph, dict[int, Tensor], torch.dtype]:
        """The layers for samples of this shape, the samples at each input layer, and the dtype of the values.

        keep : for gradients: the samples keep their autograd graph, and the layers are those of stds of 1.
        The samples are [H, W, n, C] / sqrt(C) in float64, as all that follows: in float32 an angle between samples
        that are nearly parallel would be off by 3e-4, and so would the kernel.
        """
        if not isinstance(x, Tensor):
            fix = "Wrap the model in a module that takes one tensor."
            raise refusal("x", got=type(x).__name__, expected="one tensor", fix=fix)
        if isinstance(like, Tensor):
            if x.shape[1:] != like.shape[1:]:
                got, expected = tuple(x.shape[1:]), tuple(like.shape[1:])
                fix = "Give both sets samples of the same shape."
                raise refusal("x2", got=f"samples of shape {got}", expected=f"{expected}, as x1", fix=fix)
            x = x.to(like.dtype)
        half = x.dtype in (torch.float16, torch.bfloat16)
        dtype, x = x.dtype, x.float() if half else x
        if (fingerprint := _fingerprint(self._model)) != self._fingerprint:  # trained, frozen or changed since
            self._fingerprint, self._graphs, self._models = fingerprint, {}, {}
        model = self._in_dtype(x.dtype) if x.is_floating_point() else self._model
        stds = self._stds and ((1.0, 1.0) if keep else as_numbers(self._stds))
        key = (x.dtype, tuple(x.shape[1:]), stds)
        if (graph := self._graphs.get(key)) is None:
            graph = read(model, x, *stds or (None, None))
            kept = {k: g for k, g in self._graphs.items() if k[2] in (stds, (1.0, 1.0))}
            self._graphs = {**kept, key: graph}
        indices = [layer.index for layer in graph.layers if isinstance(layer, Input)]
        data: dict[int, Tensor] = {}
        for start in range(0, len(x), _BATCH):
            batch = x[start : start + _BATCH]
            outputs = [batch] if indices == [0] else _outputs(model, batch, graph.last_index, keep)
            for index in indices:
                t = outputs[index]
                dtype = dtype if x.is_floating_point() else t.dtype
                t = _double(t.reshape(*t.shape[:2], *(1,) * (4 - t.dim()), *t.shape[2:]).permute(2, 3, 0, 1))
                if index not in data:
                    data[index] = t.new_empty(*t.shape[:2], len(x), t.shape[3])
                data[index][:, :, start : start + _BATCH] = t / math.sqrt(t.shape[3])
        return graph, data, dtype

    def _in_dtype(self, dtype: torch.dtype) -> nn.Module:
        """The model in the dtype of the samples: kernels of float64 samples are in float64, whatever the weights'."""
        if dtype == next((p.dtype for p in self._model.parameters()), torch.get_default_dtype()):
            return self._model
        if (model := self._models.get(dtype)) is None:
            self._models[dtype] = model = copy.deepcopy(self._model).to(dtype)
        return model


def _outputs(model: nn.Module, batch: Tensor, last: int, keep: bool) -> list[Tensor]:
    """Outputs of the calls on a batch before the weights; those of the first sample are checked against it alone."""
    outputs = [op.out for op in record(model, batch, last, keep).ops]
    if len(batch) > 1:
        for op, out in zip(record(model, batch[:1], last).ops, outputs, strict=False):
            if op.out.shape[:1] == (1,) and not torch.allclose(op.out, out[:1], rtol=1e-4, atol=1e-6):
                got = f"{op.name}, whose value for a sample depends on the other samples in its batch"
                expected = "a function of each sample alone"
                raise refusal("the model", got=got, expected=expected, fix="Normalize the data outside the model.")
    return outputs


def _fingerprint(model: nn.Module) -> Any:
    """What a reading depends on, to tell whether the model has changed since."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    tensors = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_complex()]
    return modules, [
        (name, t.requires_grad, t.shape, float(t.detach().sum(dtype=torch.float64))) for name, t in tensors
    ]


def _double(t: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _check_size(largest: float, dtype: torch.dtype) -> None:
    """Refuse values that overflow in the dtype of the samples, or all lose digits to underflow."""
    info = torch.finfo(dtype)
    if largest > info.max or 0 < largest < 100 * info.tiny:
        got, expected = f"values up to {largest:.1e}", f"values that {dtype} can represent"
        raise refusal("the kernel", got=got, expected=expected, fix="Scale the data, or pass it in float64.")


def _side(graph: Graph, data: dict[int, Tensor], samples: slice) -> Side:
    part = {index: t[:, :, samples] for index, t in data.items()}
    return prepare(graph, part, _plane_elements(next(iter(part.values()))))


def _inexact(graph: Graph) -> list[tuple[Pointwise, Tabulated | Piecewise]]:
    """The activations with an error, with their layers."""
    pairs = [(k, a) for k in graph.layers if isinstance(k, Pointwise) for a in (k.activation, k.weighted)]
    return [(k, a) for k, a in pairs if isinstance(a, (Tabulated, Piecewise))]


def _versions(graph: Graph) -> list[int]:
    return [a.version for _, a in _inexact(graph) if isinstance(a, Tabulated)]


def _covered(graph: Graph, data1: dict[int, Tensor], data2: dict[int, Tensor]) -> list[int]:
    """Extend the tables of activations to the variances of all samples; return the tables' versions."""

    def cover() -> None:
        for data in (data1,) if data1 is data2 else (data1, data2):
            for start in range(0, next(iter(data.values())).shape[2], _BATCH):
                _side(graph, data, slice(start, start + _BATCH))

    if _versions(graph):
        spread(lambda work: work(), [cover])  # by one worker: the same table whatever the number of threads
    return _versions(graph)


def _warn(graph: Graph) -> None:
    for layer, a in _inexact(graph):
        if a.error > _INEXACT:
            warnings.warn(
                f"{layer.name}: its kernel is computed with a relative error of {a.error:.0e}. Its slope jumps "
                "elsewhere than at 0, or the sizes of its inputs are very different.",
                stacklevel=4,
            )


def _plane_elements(like: Tensor) -> int:
    return _PLANE_ELEMENTS.get(like.device.type, _PLANE_ELEMENTS_ELSEWHERE)


def _tile_size(graph: Graph, like: Tensor, n: int) -> int:
    """Samples along each side of a tile, of n at most; tiles of about equal size."""
    elements = _plane_elements(like)
    if _positions(graph) > 1:
        elements = min(elements, _TILE_PAIRS * max(1, elements >> 16))
    elif like.device.type == "cpu":
        elements += elements // 2  # the calls of so few operations cost more than what leaves the nearest cache
    size = max(8, math.isqrt(elements))
    return math.ceil(n / math.ceil(n / size))


def _positions(graph: Graph) -> int:
    """Positions of the largest grid."""
    return max(math.prod(layer.size) for layer in graph.layers)


def _state_size(graph: Graph) -> int:
    """Elements of a prepared side, per sample."""
    return 1 + sum(4 * math.prod(layer.size) for layer in graph.layers if isinstance(layer, Pointwise))


def _line(layer: Layer) -> str:
    positions = f"{layer.size[0]} x {layer.size[1]} positions"
    if isinstance(layer, Input):
        return f"{layer.name or 'the input'}, {layer.channels} channels at {positions}"
    if isinstance(layer, Affine):
        return (
            f"{layer.name}: weights of std {math.sqrt(layer.weight_var):.4g} / sqrt(fan in), "
            f"bias of std {math.sqrt(layer.bias_var):.4g} ({layer.initialization})"
        )
    if isinstance(layer, Pointwise):
        return f"{layer.name}: {layer.activation.name}"
    kinds = {"GlobalPool": "global pool", "PositionMap": "sums over positions", "Concat": "branches side by side"}
    kind = kinds.get(type(layer).__name__, type(layer).__name__.lower())
    return f"{layer.name}: {kind}, {positions}"
