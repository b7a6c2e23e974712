"""Plan a kernel: the cheapest exact route per parameter by the machine's measured rates, and tiles under a budget.

Routes for a parameter whose gradient is a sum over positions t of cotangent [C, T, o] times data [T, a]:

- ``outer``  (T = 1): (A1 A2^T) * (B1 B2^T); nothing of size n x P is formed;
- ``tokens`` (few T): the same over pairs of positions, summed;
- ``nested`` (few T, C > 1, all outputs): the data products are multiplied into one side's cotangents first, so that
  pairs of positions are not paired with pairs of outputs;
- ``rows``   (many T, or no factors): per-sample gradient entries [n, C, P], then one matrix product for all of these;
- ``shared``: a bias whose layer's weight is on one of the first three: one more in every data product, no product;
- ``fallback``: rows by plain autograd, sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from ntkit.base.checks import nearest, refusal
from ntkit.base.workers import workers
from ntkit.jacobian.machine_rates import Rates, rates_for
from ntkit.jacobian.structure import Part, Size, Structure

# Bytes of activations, cotangents and receptive fields that one forward batch may hold. Past the caches, and with fresh
# pages for every large tensor, a sample of a convolutional net costs two to three times as much on a CPU (LOG.md).
_FORWARD = 32e6
_FEWEST = 4  # samples: below that, convolutions lose more than the caches give

# Numbers of the kernel multiplied at a time: enough for the full rate of a matrix product, and what is added up stays
# in a CPU's caches.
_BLOCK = {"cpu": 2**20, "cuda": 2**26}
_TILE = 1024  # samples of the streaming side at a time
_NARROWEST = 64  # rows: a product of fewer is slower for each
_SEVERAL = 4  # batches for each worker from which one more does not count
_WORTH = 3e-3  # seconds of a worker below which what it costs to share out work is more than it saves

Route = Literal["outer", "tokens", "nested", "rows"]
ROUTES: tuple[Route, ...] = get_args(Route)


@dataclass(frozen=True)
class Step:
    """The plan for one parameter: its route, and what that costs for the whole product.

    ``flops`` are floating-point operations of matrix products; ``bytes_per_sample`` the memory of a sample while its
    tile is in use; ``seconds`` the time of one core by the machine's rates. ``late``: the entries of the rows route are
    formed when they are multiplied, block by block, because the factors are smaller to keep.
    """

    name: str
    route: str
    flops: float
    bytes_per_sample: int
    seconds: float
    late: bool = False


@dataclass(frozen=True, repr=False)
class Plan:
    """How a kernel is computed: one `Step` per parameter, and sizes in samples. ``print(plan)`` shows a table.

    The rows of the kernel are done ``tile`` at a time, whose factors stay in memory while the columns pass by,
    ``columns`` at a time: so the columns are prepared once per tile of rows. A worker multiplies ``strip`` of the rows
    with ``block`` of the columns, and sends ``batch`` samples through the model; ``scratch`` bytes are for what a
    product of its holds in between.
    """

    steps: tuple[Step, ...]
    tile: int
    columns: int
    strip: int
    block: int
    batch: int
    scratch: int

    def route(self, name: str) -> str:
        """Route of a parameter."""
        return next(step.route for step in self.steps if step.name == name)

    def fitted(self, structure: Structure) -> Plan:
        """The same plan for other samples: parameters without the factors that it asks for are on the fallback route.

        Raises
        ------
        Refused
            For the plan of other parameters.
        """
        if {step.name for step in self.steps} != structure.sizes.keys():
            fix = "Make it with plan() of this kernel, or of one of the same model and params."
            raise refusal("plan", got="a plan of other parameters", expected="one step per parameter", fix=fix)
        lost = set(structure.fallback)
        for step in self.steps:
            if (step.route in ("outer", "tokens", "nested") or step.late) and not structure.sizes[step.name].parts:
                lost.add(step.name)
        shared = [step.name for step in self.steps if step.route == "shared"]
        lost |= {bias for bias in shared if structure.shared.get(bias, bias) in {bias, *lost}}
        steps = [replace(step, route="fallback", late=False) if step.name in lost else step for step in self.steps]
        return replace(self, steps=tuple(steps))

    @property
    def on_rows(self) -> list[str]:
        """Parameters whose gradient entries are kept."""
        return [step.name for step in self.steps if step.route in ("rows", "fallback") and not step.late]

    @property
    def flops(self) -> float:
        """Floating-point operations of all matrix products, the model's own passes not counted."""
        return sum(step.flops for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time of all products on one core, by the machine's rates; the model's own passes not counted."""
        return sum(step.seconds for step in self.steps)

    def __repr__(self) -> str:
        return f"Plan({len(self.steps)} parameters, {self.flops / 1e9:.3g} GFLOP, tiles of {self.tile} samples)"

    def __str__(self) -> str:
        """Table of routes and costs, the most expensive first."""
        width = max(len(step.name) for step in self.steps)
        lines = [f"{'parameter':{width}}  route     {'GFLOP':>9}  {'kB/sample':>9}  {'ms':>8}"]
        for step in sorted(self.steps, key=lambda step: -step.seconds):
            lines.append(
                f"{step.name:{width}}  {step.route:8}  {step.flops / 1e9:9.3f}  {step.bytes_per_sample / 1e3:9.1f}  "
                f"{step.seconds * 1e3:8.2f}"
            )
        stored = sum(step.bytes_per_sample for step in self.steps)
        lines.append(
            f"{'all':{width}}  {'':8}  {self.flops / 1e9:9.3f}  {stored / 1e3:9.1f}  {self.seconds * 1e3:8.2f}"
        )
        lines.append(
            f"beside forward and backward passes of {self.batch} samples each; rows {self.tile} at a time, columns "
            f"{self.columns}, products {self.strip} x {self.block}"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Shape:
    """The task: pairs of samples, samples whose gradients are formed, outputs and how they combine."""

    pairs: float
    samples: float
    outputs: int
    mode: str
    aligned: bool

    @property
    def products(self) -> int:
        """Inner products of cotangents per pair of samples."""
        return self.outputs**2 if self.mode == "full" else self.outputs

    @property
    def results(self) -> int:
        """Numbers per pair of samples."""
        return self.outputs**2 if self.mode == "full" else 1 if self.mode == "trace" else self.outputs


def _cost(size: Size, route: str, shape: _Shape, rates: Rates) -> tuple[float, float]:
    """Floating-point operations and seconds of one parameter's share."""
    if route == "rows":
        form = shape.samples * shape.outputs * sum(2.0 * p.positions * p.l * p.r for p in size.parts)
        product = shape.pairs * 2 * shape.products * size.entries
        passes = shape.samples * shape.outputs * size.entries
        return form + product, form / rates.batched + product / rates.product + passes / rates.entries
    flops = entries = 0.0
    for p in size.parts:
        for q in size.parts:
            if (p.l, p.r, p.block) == (q.l, q.r, q.block):
                more = _pair_cost(p, q, route, shape)
                flops, entries = flops + more[0], entries + more[1]
    return flops, flops / rates.product + entries / rates.entries


def _pair_cost(p: Part, q: Part, route: str, shape: _Shape) -> tuple[float, float]:
    """Floating-point operations and entries touched by the products of two pairs of factors."""
    grid, c = shape.pairs * p.positions * q.positions, shape.outputs
    if p.data_left != q.data_left:
        flops = grid * (2 * c * (p.l * (not p.index) + p.r * (not q.index)) + 2 * shape.results)
        return flops, grid * 4 * c
    near = 2 * p.data * (not p.index)
    if route == "nested":
        flops = grid * (near + 2 * c * p.cotangent) + shape.pairs * 2 * p.positions * shape.products * p.cotangent
        return flops, grid * 2 + shape.pairs * 2 * p.positions * c * p.cotangent
    return grid * (near + 2 * shape.products * p.cotangent), grid * (1 + (1 if p.positions == 1 else 2) * shape.results)


def _choices(size: Size, shape: _Shape) -> list[str]:
    """Routes open to a parameter."""
    if not size.parts:
        return ["rows"]
    if shape.aligned:  # pairs of positions are always nested there
        return ["nested" if size.positions > 1 else "outer", "rows"]
    if size.positions == 1:
        return ["outer", "rows"]
    nested = shape.mode == "full" and shape.outputs > 1 and len({p.data_left for p in size.parts}) == 1
    return ["tokens", *(["nested"] if nested else []), "rows"]


@dataclass(frozen=True)
class Job:
    """What a piece of work needs: the structure of the model on each side's inputs, and the plan for both."""

    left: Structure
    right: Structure
    plan: Plan


def make_plan(
    structure: Structure,
    mode: str,
    n1: int,
    n2: int,
    budget: int,
    like: Tensor,
    *,
    same: bool = False,
    apart: bool = False,
    aligned: bool = False,
    routes: Mapping[str, Route] | None = None,
) -> Plan:
    """Choose routes, then tile and batch sizes under a memory budget.

    Parameters
    ----------
    structure : of the model on these inputs.
    mode : "full", "diagonal" or "trace" ("sum" and callables have one output and are "trace").
    n1, n2 : samples on each side; `same` when the second set is the first, `apart` when it has another
        structure, `aligned` when only pairs (i, i) are wanted.
    budget : bytes of scratch memory, beside inputs and result.
    like : a parameter, for its device and its bytes per number.
    routes : parameter -> route, where the choice is not to be the cheapest.

    Raises
    ------
    Refused
        For a route that a parameter's gradient does not allow.
    """
    pairs = n1 if aligned else n1 * n2 / 2 if same else n1 * n2
    shape = _Shape(float(pairs), float(n1 if same else n1 + n2), structure.outputs, mode, aligned)
    steps = _cheapest_steps(structure, shape, budget, like, routes or {})
    outputs, itemsize = structure.outputs, like.element_size()
    # Beside the tiles: cotangents and saved tensors of the forward batch, and for the parameter in hand its two factors
    # (receptive fields included) and, on the rows route, its entries.
    factors = max(
        (p.positions * (p.data + outputs * p.cotangent) * itemsize for s in structure.sizes.values() for p in s.parts),
        default=0,
    )
    entries = max((step.bytes_per_sample for step in steps if step.route != "outer"), default=0)
    transient = structure.bytes_per_sample * (outputs + 1) + 2 * factors + entries + 1
    cores = workers() if like.device.type == "cpu" else 1
    # both sides go through the model together where they are samples of one kind, else one after the other
    samples = n1 if same else max(n1, n2) if apart else n1 + n2
    batch = _batch(structure, samples, budget * 0.3 / cores / transient, transient, like, cores)
    numbers = min(_BLOCK.get(like.device.type, 2**20), budget * 0.1 / (3 * itemsize * cores))
    block = max(1, math.isqrt(int(numbers / shape.results)))
    late = max((outputs * structure.sizes[step.name].entries * itemsize for step in steps if step.late), default=0)
    if late:  # the entries of two blocks are in memory while they are multiplied
        block = max(1, min(block, int(budget * 0.2 / (2 * late * cores))))
    fit = budget * (0.5 if late else 0.7) / (sum(step.bytes_per_sample for step in steps) + 1)  # samples
    if aligned:
        tile = columns = max(1, min(int(fit / 2), n1, _TILE))
    else:
        columns = max(1, min(int(fit * 0.15), n2, _TILE))
        tile = max(1, min(int(fit) - columns, n1))
        tile = math.ceil(n1 / math.ceil(n1 / tile))  # equal tiles: the last is not a sliver
    strip = block
    if sum(step.seconds for step in steps) > cores * _WORTH:
        strip = _strip(tile, columns, block, cores, bool(late))
    return Plan(steps, tile, columns, strip, block, batch, max(budget // 8 // cores, 1))


def _batch(structure: Structure, n: int, fit: float, transient: int, like: Tensor, cores: int) -> int:
    """Samples that a worker sends through the model at a time, of which `fit` fit into memory."""
    most = fit
    if like.device.type == "cpu":
        most = min(most, max(_FORWARD / transient, _FEWEST))
        flops = sum(2.0 * p.positions * p.l * p.r for size in structure.sizes.values() for p in size.parts)
        worth = n * flops * (1 + 2 * structure.outputs) / rates_for(like).batched > cores * _WORTH
        if not worth or structure.together is False or structure.expected is None:
            cores = 1
        most = min(most, math.ceil(n / cores))
    most = max(1, min(256, int(most), n))
    even = math.ceil(n / (math.ceil(n / (most * cores)) * cores))  # as many batches for each worker
    expected = structure.expected
    if expected is None or n <= _SEVERAL * even * cores:
        return even
    # of a size that does not hide which axis is the samples': or each batch costs another one
    near = sorted(range(max(2, even * 3 // 4), min(int(fit), even * 5 // 4) + 1), key=lambda m: abs(m - even))
    return next((m for m in near if expected.size_that_tells(m) == m), even)


def _strip(tile: int, columns: int, block: int, cores: int, late: bool) -> int:
    """Rows that a worker multiplies at a time: few enough that there is work for all."""
    rows = min(block, tile)
    # Entries of the columns that are multiplied out late are so once per strip: then there are no more than needed.
    wanted = cores if late else 2 * cores
    strips = math.ceil(wanted / math.ceil(columns / block))
    return max(1, min(rows, max(math.ceil(tile / strips), min(_NARROWEST, math.ceil(tile / cores)))))


def _cheapest_steps(
    structure: Structure, shape: _Shape, budget: int, like: Tensor, routes: Mapping[str, Route]
) -> tuple[Step, ...]:
    """One step per parameter: on the route asked for, else on the cheapest."""
    outputs, itemsize, rates = structure.outputs, like.element_size(), rates_for(like)
    steps: dict[str, Step] = {}
    for name, size in structure.sizes.items():
        row_bytes = outputs * size.entries * itemsize
        pair_bytes = sum(p.positions * (outputs * p.cotangent + p.data) * itemsize for p in size.parts)
        options = {}
        for route in _choices(size, shape):
            late = route == "rows" and bool(size.parts) and pair_bytes < row_bytes and not shape.aligned
            stored = row_bytes if route == "rows" and not late else pair_bytes
            flops, seconds = _cost(size, route, shape, rates)
            seconds += shape.samples * stored / itemsize / rates.fresh
            options[route] = Step(name, route, flops, stored, seconds, late)
        if name in structure.fallback:
            step = options["rows"]
            steps[name] = Step(name, "fallback", step.flops, row_bytes, step.seconds)
            continue
        wish = routes.get(name)
        if wish is not None and wish not in options:
            got, expected = repr(wish), f"one of {sorted(options)}"
            raise refusal(f"route of '{name}'", got=got, expected=expected, fix=nearest(wish, options))
        if len(options) > 1 and 4 * row_bytes > budget and wish is None:
            del options["rows"]  # two samples per side would not fit: never form these rows
        steps[name] = options[wish] if wish else min(options.values(), key=lambda step: step.seconds)
    for bias, weight in structure.shared.items():
        factored = steps[weight].route not in ("rows", "fallback")
        if factored and bias not in structure.fallback and bias not in routes and not shape.aligned:
            steps[bias] = Step(bias, "shared", 0.0, 0, 0.0)
    return tuple(steps.values())
