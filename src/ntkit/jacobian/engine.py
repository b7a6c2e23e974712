"""The engine: structure -> plan -> tiles -> products, with one retry for irregular graphs and for lack of memory.

Every client (tangent, sketched and path kernels, matrix-free products) goes through `Engine.run`. It looks up what
`jacobian.self_check` established of the model on these inputs, plans, and hands both to the client's work; where the
work meets an irregular graph or a device out of memory, it is done again under another plan. Batches and blocks are
shared out among workers below, in `jacobian.batches` and `jacobian.strip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, take
from ntkit.base.caller_context import own_context
from ntkit.base.checks import nearest, refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.progress import task
from ntkit.base.workers import spread, workers
from ntkit.jacobian.batches import each_batch, parts_of
from ntkit.jacobian.contraction import (
    Tile,
    multiply_aligned,
    prepare,
)
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.model_calls import MODES, Outputs, Params, check_mode, check_module, select_parameters
from ntkit.jacobian.model_outputs import check_select
from ntkit.jacobian.pairs import Whole
from ntkit.jacobian.plan import ROUTES, Job, Plan, Route, make_plan
from ntkit.jacobian.product_checks import compare_products
from ntkit.jacobian.products import differentiated_twice, pulled_back
from ntkit.jacobian.self_check import structure_of
from ntkit.jacobian.strip import Strip
from ntkit.jacobian.structure import Irregular, Structure, joined

T = TypeVar("T")

_PLANS = 64  # stored per engine, at most
_ALIGNED = 32  # pairs that a worker multiplies at a time


class Engine:
    """Gradients of a model's outputs for every sample, J(x) [n, C, P] in factors, and their products.

    Parameters
    ----------
    model : any module; used as it is, left as it was.
    outputs : "full", "diagonal", "trace", "sum" or a callable (see `ntkit.TangentKernel`).
    params : parameter names, a predicate, or None (all that require grad).
    memory : bytes of scratch memory (or text such as "2 GB"); half of what is free if None.
    routes : parameter name -> route, where the choice is not to be the cheapest.
    selected : the parameters themselves by names of the caller's choice, instead of `params`.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs = "full",
        params: Params = None,
        memory: int | str | None = None,
        routes: Mapping[str, Route] | None = None,
        *,
        selected: Mapping[str, nn.Parameter] | None = None,
        select: Callable[[Any], Any] | None = None,
    ) -> None:
        check_module(model, fix="Wrap the function in a module.")
        check_select(select)
        if not callable(outputs) and (not isinstance(outputs, str) or outputs not in MODES):
            fix = nearest(str(outputs), MODES)
            raise refusal("outputs", got=repr(outputs), expected="a mode or a callable", fix=fix)
        self.model, self.outputs, self.select = model, outputs, select
        self.mode = outputs if outputs in ("full", "diagonal") else "trace"
        self._budget = parse_memory(memory)
        self._selection, self._selected = params, selected
        self._gradients = Gradients(model, self._parameters(), outputs, select)
        self._routes = dict(routes or {})
        self._plans: dict[tuple, Plan] = {}
        for name, route in self._routes.items():
            wrong, names = (name, self.params) if name not in self.params else (route, ROUTES)
            if wrong not in names:
                got, expected = f"{name!r}: {route!r}", "a parameter's name and a route"
                raise refusal("routes", got=got, expected=expected, fix=nearest(wrong, names))

    @property
    def gradients(self) -> Gradients:
        """The gradients of the model as it was at the last `refresh`."""
        return self._gradients

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters that gradients are taken by."""
        return self._gradients.params

    @property
    def like(self) -> Tensor:
        """A tensor without entries on the device of the parameters, in the precision of results."""
        return next(iter(self.params.values())).new_empty(0, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of results: the widest of the parameters."""
        return self._gradients.dtype

    def settings(self) -> dict[str, Any]:
        """What the gradients depend on beside the samples."""
        own = {"model": self.model, "outputs": self.outputs, "parameters": list(self.params)}
        return own if self.select is None else {**own, "select": self.select}

    def memory(self) -> int:
        """Bytes of scratch memory allowed now."""
        if self._budget is not None:
            return self._budget
        free = free_memory(self.like.device) // 2
        step = 1 << max(0, free.bit_length() - 3)  # coarse, so that a plan made before serves again
        return free // step * step

    def refresh(self) -> Engine:
        """Look at the model again: since the last call its mode or its parameters may have changed."""
        check_mode(self.model)
        params = self._parameters()
        if not self._gradients.current(params):
            self._gradients = Gradients(self.model, params, self.outputs, self.select)
        return self

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._selected) if self._selected is not None else select_parameters(self.model, self._selection)

    # ------------------------------------------------------------------ structure, plan, retry

    def structure(self, x: Batch, unseen: bool = False) -> Structure:
        """What the self-check established of the model on inputs like `x` (see `self_check.structure_of`)."""
        irregular: dict[str, str] = {}
        return self._retry(lambda: structure_of(self._gradients, x, irregular, unseen), irregular.update)

    def plan(self, x1: Batch, x2: Batch | None = None, n: int | None = None) -> Plan:
        """How the kernel of these samples is computed, or of `n` like them; it may serve others of the same shapes."""
        return self._job(x1, x2, n=n).plan

    def run(
        self,
        work: Callable[[Job], T],
        x1: Batch,
        x2: Batch | None = None,
        *,
        aligned: bool = False,
        other: Engine | None = None,
        plan: Plan | None = None,
    ) -> T:
        """Do a piece of work: again where a graph turns out irregular, or under half the budget where memory ends.

        Parameters
        ----------
        work : from a `Job` to a result. It must be safe to begin again.
        x1, x2 : the samples of both sides; ``x2=None``: the same set.
        aligned : whether only pairs (i, i) are wanted.
        other : the engine of `x2`, where that goes through another network with the same parameter names.
        plan : made beforehand by `plan`; None makes one for these samples. What is computed then depends, to the bit,
            on the plan and the samples alone; so lack of memory is raised.
        """
        job: Job | None = None

        def attempt() -> T:
            nonlocal job
            job = None
            job = self._job(x1, x2, aligned, other, plan)
            return work(job)

        def exclude(reasons: dict[str, str]) -> None:
            for structure in (job.left, job.right) if job is not None else ():
                structure.exclude(reasons)

        def smallest() -> bool:  # whether less memory would change nothing
            return job is None or plan is not None or job.plan.tile == job.plan.batch == 1

        return self._retry(attempt, exclude, smallest)

    def _retry(
        self,
        attempt: Callable[[], T],
        exclude: Callable[[dict[str, str]], None],
        smallest: Callable[[], bool] = lambda: True,
    ) -> T:
        while True:
            try:
                with own_context():
                    return attempt()
            except Irregular as signal:  # met in this batch only: these parameters go sample by sample
                exclude(signal.reasons)
            except torch.OutOfMemoryError:
                if smallest():
                    raise
                torch.cuda.empty_cache()
                self._budget = max(self.memory() // 2, 1)

    def _job(
        self,
        x1: Batch,
        x2: Batch | None = None,
        aligned: bool = False,
        other: Engine | None = None,
        plan: Plan | None = None,
        n: int | None = None,
    ) -> Job:
        left = right = self.structure(x1, unseen=True)
        if x2 is not None:
            right = (other or self).structure(x2, unseen=True)
            if left not in self._gradients.structures.values():  # x2 has shown more different samples of that kind
                left = self.structure(x1, unseen=True)
        if other is None and left.outputs != right.outputs:
            got, expected = f"{right.outputs} outputs", f"{left.outputs}, as for x1"
            raise refusal("x2", got=got, expected=expected, fix="Use inputs of one shape.")
        if plan is not None:
            return Job(left, right, plan.fitted(left if right is left else joined(left, right)))
        n1, n2, same = n or count(x1), n or count(x1 if x2 is None else x2), x2 is None
        budget = self.memory()
        fallback, together = (len(left.fallback), len(right.fallback)), (left.together, right.together)
        key = (left, right, fallback, together, n1, n2, same, aligned, budget, workers())
        if key not in self._plans:
            both = left if right is left else joined(left, right)
            plan = make_plan(
                both,
                self.mode,
                n1,
                n2,
                budget,
                self.like,
                same=same,
                apart=left is not right,
                aligned=aligned,
                routes=self._routes,
            )
            self._compare_products(x1, left, plan, aligned)
            if len(self._plans) == _PLANS:  # the oldest goes, and with it a structure that may be out of use
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = plan
            return Job(left, right, plan)
        return Job(left, right, self._plans[key])

    def _compare_products(self, x: Batch, structure: Structure, plan: Plan, aligned: bool) -> None:
        """Compare products with float64, once per structure and routes."""
        routes = (aligned, *((step.route, step.late) for step in plan.steps))
        if routes not in structure.routes:
            structure.routes.add(routes)  # before the comparison, which may find the graph irregular: then all again
            compare_products(self._gradients, x, structure, plan, self.mode, aligned)

    # ------------------------------------------------------------------ products

    def gram(
        self,
        x1: Batch,
        x2: Batch | None = None,
        out: Tensor | None = None,
        plan: Plan | None = None,
        by_parameter: bool = False,
    ) -> Tensor:
        """J(x1) J(x2)^T as the mode has it: [n1, n2, ...], or [parameters, n1, n2, ...] one share each.

        Parameters
        ----------
        x1, x2 : samples; ``x2=None``: the same set, whose symmetric half is computed once.
        out : where to write the values, of the result's shape and dtype.
        plan : see `run`.
        by_parameter : whether each parameter's share is wanted instead of their sum.
        """
        names = tuple(self.params) if by_parameter else None
        n1, n2 = count(x1), count(x1 if x2 is None else x2)
        result = None if out is None else out[None]
        rows = 0  # of the result that are final
        with task("tangent kernel", total=n1 + n2) as progress, torch.no_grad():

            def next_rows(job: Job) -> int:
                nonlocal result
                if result is None:
                    shape = (len(names) if names else 1, n1, n2, *self.tail(job.left.outputs))
                    result = torch.empty(shape, dtype=self.dtype, device=self.like.device)
                part = slice(rows, min(rows + job.plan.tile, n1))
                Strip(self._gradients, job, self.mode, names, progress.advance).fill(result, part, x1, x2)
                return part.stop

            while rows < n1:
                rows = self.run(next_rows, x1, x2, plan=plan)
        assert result is not None
        return result if by_parameter else result[0]

    def tail(self, outputs: int) -> tuple[int, ...]:
        """Axes of the result behind those of the samples."""
        return {"full": (outputs, outputs), "diagonal": (outputs,)}.get(self.mode, ())

    def pairs(self, x1: Batch, x2: Batch | None = None) -> Tensor:
        """The kernel of pairs (i, i) only: [n, ...]."""
        n, parts, done = count(x1), [], 0

        def next_pairs(job: Job) -> Tensor:
            part = slice(done, done + job.plan.tile)
            left = prepare(self._gradients, take(x1, part), job.left, job.plan)
            right = left if x2 is None else prepare(self._gradients, take(x2, part), job.right, job.plan)
            return self._aligned(left, right)

        while done < n:
            parts.append(self.run(next_pairs, x1, x2, aligned=True))
            done += len(parts[-1])
        return torch.cat(parts)

    def _aligned(self, left: Tile, right: Tile) -> Tensor:
        if left.rows.device.type != "cpu":
            return multiply_aligned(left, right, self.mode)

        def work(part: slice) -> Tensor:
            first = left.part(part.start, part.stop)
            return multiply_aligned(first, first if left is right else right.part(part.start, part.stop), self.mode)

        return torch.cat(spread(work, [slice(i, i + _ALIGNED) for i in range(0, left.n, _ALIGNED)]))

    def tile(self, x: Batch, structure: Structure, plan: Plan) -> Tile:
        """Factors of samples, as the plan wants them: what `contraction.multiply` takes."""
        return prepare(self._gradients, x, structure, plan)

    # ------------------------------------------------------------------ gradients

    def factors(self, x: Batch, structure: Structure) -> dict[str, Whole]:
        """Gradients of all samples of `x` in factors, by parameter, in one pass; for the work of `run`."""
        return self._gradients.batch(x, structure)

    def each_batch(
        self,
        x: Batch,
        parts: list[slice],
        structure: Structure,
        keep: Callable[[slice, dict[str, Whole]], None],
    ) -> None:
        """Gradients of every part of the samples in factors, by workers: `keep` takes a part and them, in any order."""
        each_batch(self._gradients, x, parts, structure, keep)

    def batches(self, x: Batch, share: float) -> Iterator[tuple[slice, dict[str, Whole]]]:
        """Gradients in factors, some samples at a time: their slice, and their factors by parameter.

        `share` of the memory is for the gradient entries of the samples in hand.
        """
        n, done = count(x), 0

        def next_batch(job: Job) -> tuple[slice, dict[str, Whole]]:
            entries = sum(size.entries for size in job.left.sizes.values())
            part = slice(done, min(n, done + self.batch_size(job, share, entries)))
            return part, self.factors(take(x, part), job.left)

        while done < n:
            part, factors = self.run(next_batch, x)
            yield part, factors
            done = part.stop

    def batch_size(self, job: Job, share: float, entries: int) -> int:
        """Samples of a forward pass, of which `entries` numbers per output take at most a share of the memory."""
        needed = job.left.outputs * entries * self.like.element_size() + 1
        return max(1, min(job.plan.batch, int(self.memory() * share / workers() / needed)))

    # ------------------------------------------------------------------ matrix-free

    def jvp(self, x: Batch, directions: list[Tensor], batch: int | None = None) -> Tensor:
        """J(x) u for a block of parameter directions: u per parameter [k, *shape] -> [n, C, k]."""
        step = batch or self.vector_batch(x)
        columns = None
        if self._twice(x):
            columns = differentiated_twice(self._gradients, self.structure(x), x, directions, step)
        return self.run(lambda job: self._along(x, job.left, directions, step), x) if columns is None else columns

    def _twice(self, x: Batch) -> bool:
        """Whether differentiating twice gives J u: compared once per structure with the gradients of a few samples.

        A function of the user's own may have a first derivative and no second one, without a word.
        """
        structure = self.structure(x)
        if structure.twice is None:
            few = take(x, slice(0, 2))
            u = [torch.linspace(-1, 1, p.numel(), dtype=p.dtype, device=p.device).view(1, *p.shape)
                 for p in self.params.values()]  # fmt: skip
            expected = self.run(lambda job: self._along(few, job.left, u, 2), few)
            columns = differentiated_twice(self._gradients, structure, few, u, 2)
            bound = structure.eps**0.5 * expected.norm()
            structure.twice = columns is not None and bool((columns - expected).norm() <= bound)
        return structure.twice

    def vjp(self, x: Batch, v: Tensor, batch: int | None = None) -> list[Tensor]:
        """J(x)^T v for a block of vectors: v [n, C, k] -> per parameter [k, *shape]."""
        return pulled_back(self._gradients, self.structure(x), x, v, batch or self.vector_batch(x))

    @torch.no_grad()
    def _along(self, x: Batch, structure: Structure, directions: list[Tensor], batch: int) -> Tensor:
        flat = [u.reshape(u.shape[0], -1).T.to(self.dtype) for u in directions]
        columns = flat[0].new_empty(count(x), structure.outputs, flat[0].shape[1])

        def keep(part: slice, factors: dict[str, Whole]) -> None:
            along = [factors[name].rows() @ u for name, u in zip(self.params, flat, strict=True)]
            columns[part] = torch.stack(along).sum(0)

        self.each_batch(x, parts_of(x, batch), structure, keep)
        return columns

    def vector_batch(self, x: Batch) -> int:
        """Samples that a worker's forward pass may hold when vectors are multiplied."""
        structure = self.structure(x)
        needed = structure.bytes_per_sample * 4 * structure.outputs + 1
        return max(1, min(256, int(self.memory() * 0.3 / workers() / needed), -(-count(x) // workers())))
