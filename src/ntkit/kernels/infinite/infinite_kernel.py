"""The limit of infinite width: covariance of the outputs and tangent kernel, read off the module."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count
from ntkit.base.checks import refusal
from ntkit.base.progress import task
from ntkit.kernels.infinite.layers import Graph, Layer, Pointwise, Source, Weights
from ntkit.kernels.infinite.planes import Planes, Side, prepared
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.tape import record
from ntkit.kernels.infinite.tape_to_layers import read
from ntkit.kernels.kernel import Kernel, KernelOperator, check_out, written

Kind = Literal["ntk", "nngp"]

_CELLS = {"cpu": 1 << 16}  # numbers in a plane: a few planes stay in a core's cache
_CELLS_ELSEWHERE = 1 << 24
_PAIRS = 1 << 10  # of samples with positions in a tile: 32 x 32, so that what a side needs is made for many
_BATCH = 512
_HELD = 256e6  # bytes of what sides need, kept for the tiles to come
_INEXACT = 1e-6  # relative error of an activation's table worth a warning


class InfiniteKernel(Kernel):
    """Tangent kernel ("ntk") or covariance of the outputs ("nngp") of a module as its hidden widths tend to infinity.

    The layers are read off a run of the module: dense layers and convolutions (stride, zero padding, dilation, groups
    of hidden channels), any elementwise activation, sums of branches, factors, average and global pools, flattening,
    LayerNorm and GroupNorm before an activation, dropout in eval mode. The widths the module happens to have play no
    part, except through `w_std=None`. All outputs have the same kernel and are independent: entry (i, c, j, d) of the
    full kernel is ``k(x1, x2)[i, j]`` for c = d, else 0.

    Parameters
    ----------
    model : the module, in eval mode. It is run on a few samples and left as it was.
    kind : "ntk" or "nngp".
    w_std, b_std : the NTK parametrization z = w_std / sqrt(fan_in) W a + b_std b in every dense and convolution layer,
        with standard normal W and b, all trained. None: the module's own parametrization and initialisation, recognised
        from its weights (`initial_std`), with the parameters trained that require gradients. In
        torch's own parametrization the tangent kernel of a layer grows with its width: the widths are then the
        module's, and the value is the leading order.

    Attributes
    ----------
    error : largest relative error of an activation computed by quadrature so far; 0 while all were in closed form.

    Returns (of a call)
    -------------------
    Tensor
        [n1, n2] in the dtype of the samples; exactly symmetric for ``x2=None``. The values of a sample with itself are
        free of the rounding that angles near 0 amplify.

    Raises
    ------
    Refused
        By the layer's name, for what has no such limit: max-pools, BatchNorm, softmax, attention and other mixtures of
        channels, products of branches, weights used twice, sums of branches that depend on each other.

    Warns
    -----
    UserWarning
        When the quadrature of an activation is less exact than 1e-6 (kinks elsewhere than at 0: ReLU6, hardtanh).

    Notes
    -----
    Jacot et al. 2018, proposition 1 and theorem 1. Per layer, with covariance S and tangent kernel T: activations
    S -> E[s(u) s(v)], T -> T E[s'(u) s'(v)] for (u, v) of covariance S; dense layers and convolutions
    T -> w^2 T + w^2 S + b^2, S -> w^2 S + b^2, averaged over the taps. Kernels of images need all pairs of positions:
    they are carried one offset at a time (see `planes`), in memory that does not grow with the image.
    The slope of a PReLU is taken as it is and not as trained: one number for all channels has no deterministic limit.

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
        w_std: float | None = None,
        b_std: float | None = None,
    ) -> None:
        if kind not in ("ntk", "nngp"):
            raise refusal("kind", got=repr(kind), expected='"ntk" or "nngp"', fix="Choose one of them.")
        if (w_std is None) != (b_std is None):
            missing = "b_std" if b_std is None else "w_std"
            raise refusal(missing, got="None, but the other one given", expected="both or none", fix="Give both.")
        for name, value in (("w_std", w_std), ("b_std", b_std)):
            if value is not None and not 0 <= value < math.inf:
                raise refusal(name, got=value, expected="a finite number >= 0", fix="It is a standard deviation.")
        self.kind = kind
        self._model, self._stds = model, (w_std, b_std)
        self._models: dict[torch.dtype, nn.Module] = {}
        self._graphs: dict[tuple[torch.dtype, tuple[int, ...]], Graph] = {}
        self._state: Any = None  # of the model, when the graphs were read

    @property
    def error(self) -> float:
        """Largest relative error of an activation computed by quadrature so far."""
        return max((a.error for graph in self._graphs.values() for _, a in _tables(graph)), default=0.0)

    def describe(self, x: Batch) -> str:
        """The layers as they were read, one a line: what each is, and where its variances come from.

        Examples
        --------
        >>> model = nn.Sequential(nn.Linear(3, 9), nn.ReLU())
        >>> print(InfiniteKernel(model, w_std=1.0, b_std=0.0).describe(torch.ones(1, 3)))
        the input, 3 channels at 1 x 1 positions
        layer '0' (Linear): weights of std 1 / sqrt(fan in), bias of std 0 (as given)
        layer '1' (ReLU): piecewise linear, slopes 1 and 0
        """
        graph, _ = self._read(x)
        return "\n".join(_line(layer) for layer in graph.layers)

    def operator(self, x: Batch) -> KernelOperator:
        """k(x, x) as an operator; the values are computed once, at the first product, and kept."""
        like = next(iter(self._read(x)[1].values()))
        values = lru_cache(1)(lambda: self(x))
        return KernelOperator(count(x), lambda v: values() @ v, lambda: self.diagonal(x), like)

    # ------------------------------------------------------------------ values

    @torch.inference_mode(False)  # activations are differentiated
    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        if _half(x1):  # too coarse for the angles between samples
            return written(self._gram(x1.float(), None if x2 is None else x2.float(), None).to(x1.dtype), out)
        (graph, data1), same = self._read(x1), x2 is None
        data2 = data1 if x2 is None else self._read(x2, like=x1)[1]
        n1, n2 = count(x1), count(x1 if x2 is None else x2)
        like = next(iter(data1.values()))
        if out is None:
            out = torch.empty(n1, n2, dtype=like.dtype, device=like.device)
        check_out(out, (n1, n2), like.dtype)
        side = _tile(graph, like)
        tiles = [(i, j) for i in range(0, n1, side) for j in range(i if same else 0, n2, side)]
        held = max(4, int(_HELD / (8 * side * _state_size(graph))))

        versions = self._covered(graph, data1, data2)

        @lru_cache(held)
        def prepare(second: bool, start: int) -> Side:
            return self._side(graph, data2 if second else data1, slice(start, start + side))

        def tile(at: tuple[int, int]) -> None:
            i, j = at
            with torch.no_grad():
                one, two = prepare(False, i), prepare(not same, j)
                planes = Planes(graph, one, two, False, same and i == j, self.kind == "ntk", _cells(like))
                out[i : i + side, j : j + side] = planes(graph.layers[graph.output])[-1, 0, 0]

        _all(tile, tiles, like)
        if same:
            for i in range(0, n1, side):
                out[i : i + side, :i] = out[:i, i : i + side].T
                block = out[i : i + side, i : i + side]
                block.copy_(block.triu() + block.triu(1).T)
        if self._versions(graph) != versions:  # another thread met other variances
            return self._gram(x1, x2, out)
        self._warn(graph)
        return out

    @torch.inference_mode(False)
    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        if _half(x1):
            return self._pairs(x1.float(), None if x2 is None else x2.float()).to(x1.dtype)
        graph, data1 = self._read(x1)
        data2 = data1 if x2 is None else self._read(x2, like=x1)[1]
        like = next(iter(data1.values()))
        out = torch.empty(count(x1), dtype=like.dtype, device=like.device)
        versions = self._covered(graph, data1, data2)

        def batch(start: int) -> None:
            chosen = slice(start, start + _BATCH)
            with torch.no_grad():
                one = self._side(graph, data1, chosen)
                two = one if x2 is None else self._side(graph, data2, chosen)
                planes = Planes(graph, one, two, True, x2 is None, self.kind == "ntk", _cells(like))
                out[chosen] = planes(graph.layers[graph.output])[-1, 0, 0, :, 0]

        _all(batch, list(range(0, count(x1), _BATCH)), like)
        if self._versions(graph) != versions:
            return self._pairs(x1, x2)
        self._warn(graph)
        return out

    def _side(self, graph: Graph, data: dict[int, Tensor], chosen: slice) -> Side:
        part = {place: t[:, :, chosen] for place, t in data.items()}
        return prepared(graph, part, _cells(next(iter(part.values()))))

    def _covered(self, graph: Graph, data1: dict[int, Tensor], data2: dict[int, Tensor]) -> list[int]:
        """Let the tables of activations reach over the variances of all samples; gives the tables' versions."""
        if self._versions(graph):
            for data in (data1,) if data1 is data2 else (data1, data2):
                n = next(iter(data.values())).shape[2]
                for start in range(0, n, _BATCH):
                    self._side(graph, data, slice(start, start + _BATCH))
        return self._versions(graph)

    def _versions(self, graph: Graph) -> list[int]:
        return [a.version for _, a in _tables(graph)]

    def _warn(self, graph: Graph) -> None:
        for layer, a in _tables(graph):
            if a.error > _INEXACT:
                warnings.warn(
                    f"{layer.name}: its kernel is computed by quadrature with a relative error of {a.error:.0e}: its "
                    "slope jumps elsewhere than at 0, or its inputs are of very different size.",
                    stacklevel=4,
                )

    # ------------------------------------------------------------------ reading

    @torch.inference_mode(False)
    def _read(self, x: Batch, like: Batch | None = None) -> tuple[Graph, dict[int, Tensor]]:
        """The layers for samples of this shape, and what each source makes of these, [H, W, n, C] / sqrt(C)."""
        if not isinstance(x, Tensor):
            raise refusal(
                "x",
                got=type(x).__name__,
                expected="one tensor",
                fix="A limit is known for networks of one input: wrap the model in a module that takes one tensor.",
            )
        if isinstance(like, Tensor):
            if x.shape[1:] != like.shape[1:]:
                got, expected = tuple(x.shape[1:]), tuple(like.shape[1:])
                raise refusal("x2", got=f"samples of shape {got}", expected=f"{expected}, as x1", fix="Cut them alike.")
            x = x.to(like.dtype)
        if (state := _state(self._model)) != self._state:  # trained on, frozen or changed since
            self._state, self._graphs, self._models = state, {}, {}
        model = self._of(x.dtype) if x.is_floating_point() else self._model
        key = (x.dtype, tuple(x.shape[1:]))
        graph = self._graphs.get(key) or read(model, x, *self._stds)
        self._graphs[key] = graph
        places = [layer.place for layer in graph.layers if isinstance(layer, Source)]
        data: dict[int, Tensor] = {}
        for start in range(0, len(x), _BATCH):
            batch = x[start : start + _BATCH]
            made = {0: batch} if places == [0] else self._made(model, batch, graph.last_place)
            for place in places:
                t = made[place]
                value = t.reshape(*t.shape[:2], *(1,) * (4 - t.dim()), *t.shape[2:]).permute(2, 3, 0, 1)
                if place not in data:
                    data[place] = value.new_empty(*value.shape[:2], len(x), value.shape[3])
                torch.div(value, math.sqrt(value.shape[3]), out=data[place][:, :, start : start + _BATCH])
        return graph, data

    def _made(self, model: nn.Module, batch: Tensor, last: int) -> dict[int, Tensor]:
        """What the model makes of a batch before its weights; of its first sample the same as alone."""
        made = {place: op.out for place, op in enumerate(record(model, batch, last).ops)}
        if len(batch) > 1:
            alone = record(model, batch[:1], last).ops
            for place, op in enumerate(alone):
                if op.out.shape[:1] == (1,) and not torch.allclose(op.out, made[place][:1], rtol=1e-4, atol=1e-6):
                    raise refusal(
                        "the model",
                        got=f"{op.name}, which makes another value of a sample when others are in its batch",
                        expected="samples that do not know of each other",
                        fix="Normalise the data outside the model.",
                    )
        return made

    def _of(self, dtype: torch.dtype) -> nn.Module:
        """The model in the dtype of the samples: kernels of float64 samples are in float64, whatever the weights'."""
        if dtype == next((p.dtype for p in self._model.parameters()), torch.get_default_dtype()):
            return self._model
        if (model := self._models.get(dtype)) is None:
            self._models[dtype] = model = copy.deepcopy(self._model).to(dtype)
        return model


def _state(model: nn.Module) -> Any:
    """What a reading depends on, to tell whether the model is still the one that was read."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    tensors = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_complex()]
    return modules, [
        (name, t.requires_grad, t.shape, float(t.detach().sum(dtype=torch.float64))) for name, t in tensors
    ]


def _half(x: Batch) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


def _tables(graph: Graph) -> list[tuple[Pointwise, Tabulated]]:
    """What is computed by quadrature: activations, and what a norm's weight meets in them."""
    of = [(k, a) for k in graph.layers if isinstance(k, Pointwise) for a in (k.activation, k.weighted)]
    return [(k, a) for k, a in of if isinstance(a, Tabulated)]


def _cells(like: Tensor) -> int:
    return _CELLS.get(like.device.type, _CELLS_ELSEWHERE)


def _tile(graph: Graph, like: Tensor) -> int:
    """Samples on a side of a tile."""
    area = max(math.prod(layer.size) for layer in graph.layers)
    return max(8, math.isqrt(min(_cells(like), _PAIRS * max(1, _cells(like) >> 16)) if area > 1 else _cells(like)))


def _state_size(graph: Graph) -> int:
    """Numbers kept for a sample."""
    return 1 + sum(4 * math.prod(layer.size) for layer in graph.layers if isinstance(layer, Pointwise))


def _all(work: Callable, items: list, like: Tensor) -> None:
    """Do all items, on as many threads as torch uses; one operation keeps to its thread."""
    threads = torch.get_num_threads() if like.device.type == "cpu" else 1
    start, (first, *rest) = time.monotonic(), items
    with task("infinite kernel", len(items)) as progress, _single_threaded(threads):
        work(first)
        progress.advance()
        progress.expect((time.monotonic() - start) * len(rest) / min(threads, max(1, len(rest))))
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for _ in map(work, rest) if threads == 1 else pool.map(work, rest):
                    progress.advance()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


@contextmanager
def _single_threaded(threads: int) -> Iterator[None]:
    """Operations keep to their thread: each is too small for two."""
    try:
        if threads > 1:
            torch.set_num_threads(1)
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _line(layer: Layer) -> str:
    positions = f"{layer.size[0]} x {layer.size[1]} positions"
    if isinstance(layer, Source):
        return f"{layer.name or 'the input'}, {layer.channels} channels at {positions}"
    if isinstance(layer, Weights):
        return (
            f"{layer.name}: weights of std {math.sqrt(layer.weight):.4g} / sqrt(fan in), "
            f"bias of std {math.sqrt(layer.bias):.4g} ({layer.read})"
        )
    if isinstance(layer, Pointwise):
        return f"{layer.name}: {layer.activation.name}"
    return f"{layer.name}: {type(layer).__name__.lower()}, {positions}"
