"""The limit of infinite width: covariance of the outputs and tangent kernel, read from the module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, checked, count
from ntkit.base.caller_context import own_context
from ntkit.base.checks import NoLimit, refusal
from ntkit.base.shown import of_model
from ntkit.jacobian.model_outputs import Select, selected
from ntkit.kernels.infinite.layers import Graph, Input
from ntkit.kernels.infinite.limit_gradients import LimitGradients, Std, as_numbers, as_std, refused, wants_gradients
from ntkit.kernels.infinite.limit_tiles import (
    BATCH,
    check_size,
    in_float64,
    inexact,
    line_of,
    outputs_before_weights,
    state_of_model,
    warn_of_errors,
    warn_of_masks,
)
from ntkit.kernels.infinite.limit_values import at_positions, matrix, pairs
from ntkit.kernels.infinite.reading import read
from ntkit.kernels.infinite.sampled import LimitEstimate, SampledLimit, Sampling
from ntkit.kernels.infinite.shared_weights import Program
from ntkit.kernels.infinite.shared_weights_reader import read_program
from ntkit.kernels.kernel import Kernel, KernelOperator, check_out, written
from ntkit.networks.larger_copies import Make

Kind = Literal["ntk", "nngp"]


class InfiniteKernel(Kernel):
    """Tangent kernel ("ntk") or covariance of the outputs ("nngp") of a module as its hidden widths tend to infinity.

    The layers are read from a run of the module: dense layers and convolutions, transposed ones too (stride, padding of
    any mode, dilation, groups), any elementwise activation, sums, products and concatenations of branches, parts of
    channels (slices, chunks, gated linear units), factors, average and global pools, linear maps of positions (slices,
    flips, padding, interpolation, means over one axis), flattening, LayerNorm and GroupNorm before an activation,
    dropout; in networks of vectors also recurrent layers and BatchNorm in train mode. The module's own widths have no
    influence, except through `w_std=None` and as shares of the channels in a concatenation or a part. All outputs have
    the same kernel and are independent: entry (i, c, j, d) of the full kernel is ``k(x1, x2)[i, j]`` for c = d, else 0.

    Parameters
    ----------
    model : the module; dropout in train mode is taken as random masks. It is run on a few samples and not changed.
    kind : "ntk" or "nngp".
    w_std, b_std : the NTK parametrization z = w_std / sqrt(fan_in) W a + b_std b in every dense and convolution layer,
        with standard normal W and b, all trained. None: the module's own parametrization and initialization, recognized
        from its weights (`initial_std`); the parameters that require gradients are trained. In PyTorch's own
        parametrization the tangent kernel of a layer grows with its width: the widths are then the module's, and the
        value is the leading order. Tensors that require a gradient stay in the autograd graph.
    sample : number of random networks for what has no closed form: attention, recurrent layers, max-pools, branches
        that depend on each other. They are copies of the module with all hidden widths multiplied by one number, so
        that the narrowest has 256 features or more; heads, groups and taps stay as they are. `estimate` returns their
        mean with its standard error. None: refuse. A module with a closed form has that one, whatever `sample` is.
    make : factor -> the module with its hidden widths times that factor, where `sample` cannot enlarge the module.
    select : the part of the module's output whose limit is wanted, as for `TangentKernel`.

    Attributes
    ----------
    error : largest relative error of an activation so far: of a table or a BatchNorm, which are computed by quadrature,
        or of rounding between the pieces of a function with kinks elsewhere than at 0; 0 for all other closed forms.
        Of a sampled limit: its standard error over its value, both as Frobenius norms.

    Returns (of a call)
    -------------------
    Tensor
        [n1, n2] in the dtype of the samples; exactly symmetric for ``x2=None``. Of a network with a value per position
        the mean over positions; `positions` has all pairs of them. The values of a sample with itself are free of the
        rounding error that angles near 0 amplify. With dropout in train mode, a sample has one mask in ``k(x)``,
        ``diagonal`` and ``paired`` of one set; samples of two sets have masks of their own, equal ones too.
        In the autograd graph if samples, `w_std` or `b_std` require a gradient. With BatchNorm in train mode, of the
        network as a function of the whole batch x: only ``k(x)``, and part of a batch has other values.

    Raises
    ------
    Refused
        By the layer's name, for a layer without such a limit in closed form, where `sample` is None: max-pools,
        BatchNorm with running statistics, softmax, attention and other mixtures of channels, weights used twice, sums
        and products of branches that depend on each other, activations whose moments overflow. With `sample`, what
        cannot be enlarged. For a gradient through an activation that has no closed form, or has kinks elsewhere than
        at 0. With BatchNorm in train mode: for two sets, pairs and single samples, and for functions behind it that do
        not have two slopes.

    Warns
    -----
    UserWarning
        For dropout in train mode: the kernel is that of random masks. When the relative error of an activation exceeds
        1e-6: many kinks elsewhere than at 0 between pieces that are no polynomials, or variances of very different
        size. (Kinks between polynomials, as of ReLU6 or hardswish, are exact.) When the mean over sampled networks
        differs from that over networks half as wide by more than three standard errors.

    Notes
    -----
    Jacot et al. 2018, proposition 1 and theorem 1. Per layer, with covariance S and tangent kernel T: activations
    S -> E[s(u) s(v)], T -> T E[s'(u) s'(v)] for (u, v) of covariance S; dense layers and convolutions
    T -> w^2 T + w^2 S + b^2, S -> w^2 S + b^2, averaged over the kernel's window. Kernels of images need all pairs of
    positions: they are computed one offset at a time (see `planes`), in memory that does not grow with the image.
    Products of branches K1 K2, T1 K2 + K1 T2; concatenations of channels: the mean of their kernels by their shares.
    BatchNorm in train mode: E[h h^T] and E[J T J^T] over the values z ~ N(0, S) of a channel at the samples of a batch,
    for h = s(BatchNorm(z)) and its Jacobian J by z (Yang 2020, Tensor Programs II; see `batch_norm`).
    Dropout of rate p in train mode: values of a sample with itself at one position times 1 / (1 - p).
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

    _differentiable = True

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "ntk",
        w_std: Std | None = None,
        b_std: Std | None = None,
        *,
        sample: int | None = None,
        make: Make | None = None,
        select: Select | None = None,
    ) -> None:
        if not isinstance(kind, str) or kind not in ("ntk", "nngp"):
            raise refusal("kind", got=repr(kind), expected='"ntk" or "nngp"', fix="Choose one of them.")
        if (w_std is None) != (b_std is None):
            missing, other = ("b_std", "w_std") if b_std is None else ("w_std", "b_std")
            raise refusal(missing, got=f"None although {other} is given", expected="both or none", fix="Give both.")
        stds = (as_std(w_std, "w_std"), as_std(b_std, "b_std")) if w_std is not None and b_std is not None else None
        self.kind = kind
        self._given, self._select, self._stds = model, select, stds
        self._model = selected(model, select)
        self._sampling = Sampling.of(kind, sample, make)
        self._programs: dict[tuple[Any, ...], Program | None] = {}
        self._models: dict[torch.dtype, nn.Module] = {}
        self._graphs: dict[tuple[Any, ...], Graph] = {}  # by dtype and shape of a sample, w_std and b_std
        self._fingerprint: Any = None  # of the model, when the graphs were read

    @property
    def error(self) -> float:
        """Largest relative error of an activation so far."""
        errors = [a.error for graph in self._graphs.values() for _, a in inexact(graph)]
        errors += [program.error for program in self._programs.values() if program]
        return max(errors, default=self._sampling.error if self._sampling else 0.0)

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
        x = checked(x, "x")
        if (sampled := self._sampled(x)) is not None:
            return "\n".join(sampled.describe())
        if (program := self._program(x)) is not None:
            return "\n".join(program.describe())
        return "\n".join(line_of(layer) for layer in self._read(x)[0].layers)

    @own_context()
    def estimate(self, x1: Batch, x2: Batch | None = None) -> LimitEstimate:
        """The kernel with its standard error, where it is sampled; ``k(x1, x2)`` is the mean.

        Returns
        -------
        LimitEstimate
            ``mean``, ``standard_error``, ``bias`` and ``bias_error``, [n1, n2] each in float64. The bias is the mean
            minus that of networks half as wide; as it falls with the width, what is left is of its size or smaller.

        Raises
        ------
        Refused
            For a limit in closed form, and without `sample`.
        """
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        if (sampled := self._sampled(x1)) is None:
            fix = "Call the kernel: its values have no sampling error."
            raise refusal("estimate", got="a limit in closed form", expected="a sampled one", fix=fix)
        found = sampled.gram(x1, x2)
        self._rounded(found.mean, x1)  # the networks compute in this dtype
        return found

    @torch.inference_mode(False)
    @own_context()
    def positions(self, x1: Batch, x2: Batch | None = None) -> Tensor:
        """The kernel between all pairs of positions of the output, of a network with a value per position.

        Returns
        -------
        Tensor
            [n1, n2, P, P] for outputs [n, C, P], [n, C, H, W] with P = H W, or with the channels last: entry
            (i, j, p, q) is the kernel of an output of sample i at p and the same channel of sample j at q; it is 0 for
            two channels. ``k(x1, x2)`` is the mean over p = q. For x2 = None exactly symmetric in (i, p), (j, q).

        Raises
        ------
        Refused
            As the kernel's call; for a limit that is not one of a graph of layers (recurrent, sampled), and for samples
            or stds that require gradients.

        Examples
        --------
        >>> model = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 1))
        >>> x = torch.tensor([[[1.0, 0.0, 2.0]]], dtype=torch.float64)
        >>> kernel = InfiniteKernel(model, w_std=1.0, b_std=0.0)
        >>> kernel.positions(x)[0, 0]
        tensor([[0.3333, 0.1186, 0.6667],
                [0.1186, 1.6667, 0.2373],
                [0.6667, 0.2373, 1.3333]], dtype=torch.float64)
        >>> kernel(x)
        tensor([[1.1111]], dtype=torch.float64)
        """
        if wants_gradients(x1, x2, *self._stds or ()):
            raise refused("positions", "a kernel of all positions", "Call it")
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        if self._program(x1) is not None or self._sampled(x1) is not None:
            got = "a limit that is sampled or of weights used several times"
            fix = "Call the kernel: its values are the mean over the outputs."
            raise refusal("positions", got=got, expected="a graph of layers", fix=fix)
        graph, data1, dtype = self._read(x1)
        data2 = None if x2 is None else self._read(x2, like=x1)[1]
        return at_positions(graph, data1, data2, self.kind == "ntk", dtype).to(x1.device)

    def _sampled(self, x: Batch) -> SampledLimit | None:
        """Random networks for samples like these, if asked for and if there is no closed form."""
        if self._sampling is None or self._is_graph(x) or self._program(x) is not None:
            return None
        assert isinstance(x, Tensor)
        return self._sampling.limit(self._model_for(x), x, as_numbers(self._stds))

    def _is_graph(self, x: Batch) -> bool:
        """Whether the network is a graph of layers that depend on nothing in common; two samples tell."""
        try:
            self._read(torch.cat([x[:1], x[-1:]]) if isinstance(x, Tensor) else x)
        except NoLimit:
            return False
        return True

    def _program(self, x: Batch) -> Program | None:
        """The network as sums of nodes, where it is no graph of layers."""
        if self._is_graph(x):
            return None
        assert isinstance(x, Tensor)
        stds = as_numbers(self._stds)
        key = (x.dtype, tuple(x.shape[1:]), stds)
        if key not in self._programs:
            self._programs[key] = read_program(self._model_for(x), x, *stds or (None, None))
        return self._programs[key]

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """k(x, x) as an operator; the values are computed once, at the first product."""
        if wants_gradients(x, *self._stds or ()):
            raise refused("operator", "a matrix-free product", "Use the matrix, kernel(x) @ v, or build the operator")
        x = checked(x, "x")
        other = self._sampled(x) is not None or self._program(x) is not None
        like = torch.empty(0, dtype=self._dtype(x) if other else self._read(x)[2], device=x.device)
        kernel = copy.copy(self)
        kernel._stds = as_numbers(self._stds)
        values = lru_cache(1)(lambda: kernel(x))
        of_batch = (program := self._program(x)) is not None and program.batch_norm
        diagonal = (lambda: values().diagonal()) if of_batch else (lambda: kernel.diagonal(x))
        return KernelOperator(count(x), lambda v: values() @ v, diagonal, like)

    def settings(self) -> dict[str, Any]:
        """As of every kernel; with the values of `w_std` and `b_std`, and how the limit is sampled."""
        own = vars(self) | {"_stds": as_numbers(self._stds) or (None, None), "_model": self._given}
        del own["_given"]
        if self._select is None:
            del own["_select"]
        return own | ({"sample": s.networks, "make": s.make} if (s := self._sampling) else {})

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
        if (sampled := self._sampled(x1)) is not None:
            return written(self._rounded(sampled.gram(x1, x2).mean, x1), out)
        if (program := self._program(x1)) is not None:
            values = program.gram(self._model_for(x1), x1, x2, self.kind)
            warn_of_errors(program.inexact())
            return written(self._rounded(values, x1), out)
        graph, data1, dtype = self._read(x1)
        data2 = None if x2 is None else self._read(x2, like=x1)[1]
        shape = (count(x1), count(x1 if x2 is None else x2))
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=x1.device)
        check_out(out, shape, dtype)
        return matrix(graph, data1, data2, self.kind == "ntk", out)

    @torch.inference_mode(False)
    @own_context()
    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        if wants_gradients(x1, x2, *self._stds or ()):
            return self._with_gradients(x1, x2, LimitGradients.pairs)
        if (sampled := self._sampled(x1)) is not None:
            return self._rounded(sampled.pairs(x1, x2).mean, x1)
        if (program := self._program(x1)) is not None:
            values = program.pairs(self._model_for(x1), x1, x2, self.kind)
            warn_of_errors(program.inexact())
            return self._rounded(values, x1)
        graph, data1, dtype = self._read(x1)
        data2 = None if x2 is None else self._read(x2, like=x1)[1]
        return pairs(graph, data1, data2, self.kind == "ntk", dtype).to(x1.device)

    def _with_gradients(self, x1: Batch, x2: Batch | None, values: Callable[..., Tensor]) -> Tensor:
        if self._program(x1) is not None or self._sampled(x1) is not None:
            got = "a limit that is sampled, of weights used several times or of batch norm"
            raise refused("the infinite kernel", got, "Call the kernel")
        graph, data1, dtype = self._read(x1, keep=True)
        data2 = None if x2 is None or x2 is x1 else self._read(x2, like=x1, keep=True)[1]
        out = values(LimitGradients(graph, self._stds, self.kind == "ntk"), data1, data2)
        check_size(float(out.detach().abs().max()), dtype)
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
        if (fingerprint := state_of_model(self._given)) != self._fingerprint:  # trained, frozen or changed since
            self._model = selected(self._given, self._select)
            self._fingerprint, self._graphs, self._programs, self._models = fingerprint, {}, {}, {}
            if self._sampling:
                self._sampling.limits.clear()
        model = self._in_dtype(x.dtype) if x.is_floating_point() else self._model
        stds = self._stds and ((1.0, 1.0) if keep else as_numbers(self._stds))
        key = (x.dtype, tuple(x.shape[1:]), stds)
        if (graph := self._graphs.get(key)) is None:
            graph = read(model, x, *stds or (None, None))
            warn_of_masks(graph)
            kept = {k: g for k, g in self._graphs.items() if k[2] in (stds, (1.0, 1.0))}
            self._graphs = {**kept, key: graph}
        inputs = [layer for layer in graph.layers if isinstance(layer, Input)]
        data: dict[int, Tensor] = {}
        for start in range(0, len(x), BATCH):
            batch = x[start : start + BATCH]
            alone = not any(layer.index for layer in inputs)
            outputs = [batch] if alone else outputs_before_weights(model, batch, graph.last_index, keep)
            for layer in inputs:
                t = layer.values(outputs[layer.index])
                dtype, t = dtype if x.is_floating_point() else t.dtype, in_float64(t)
                if layer.key not in data:
                    data[layer.key] = t.new_empty(*t.shape[:2], len(x), t.shape[3])
                data[layer.key][:, :, start : start + BATCH] = t if layer.as_given else t / math.sqrt(t.shape[3])
        return graph, data, dtype

    def _dtype(self, x: Batch) -> torch.dtype:
        """Of a sampled kernel's values: that of the samples, or the parameters' if these are whole numbers."""
        assert isinstance(x, Tensor)
        return x.dtype if x.is_floating_point() else next(self._model.parameters()).dtype

    def _rounded(self, values: Tensor, x: Batch) -> Tensor:
        """A limit that is no graph of layers in its dtype, if that can represent it."""
        check_size(float(values.abs().max()), dtype := self._dtype(x))
        return values.to(dtype)

    def _model_for(self, x: Tensor) -> nn.Module:
        return self._in_dtype(x.dtype) if x.is_floating_point() else self._model

    def _in_dtype(self, dtype: torch.dtype) -> nn.Module:
        """The model in the dtype of the samples: kernels of float64 samples are in float64, whatever the weights'."""
        if dtype == next((p.dtype for p in self._model.parameters()), torch.get_default_dtype()):
            return self._model
        if (model := self._models.get(dtype)) is None:
            self._models[dtype] = model = copy.deepcopy(self._model).to(dtype)
        return model
