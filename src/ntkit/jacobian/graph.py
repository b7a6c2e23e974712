"""Find where the autograd graph of one forward pass uses parameters.

No hook is registered and no module is patched: tied weights come out right. The graph has two sides. The *weight side*
is what depends on parameters alone, whatever the batch: the parameters, views of them, and what is computed from them
(a weight norm's W = g v / |v|, a LoRA's W + B A, the embeddings of positions 0..T-1). The *data side* is the rest.
Where a node of the data side has an input of the weight side is a *use*; that input is the *source* of the use.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ntkit.base.checks import refusal

Node = Any  # torch.autograd.graph.Node

# Nodes that only rearrange a tensor's entries: over a parameter they are weight side, whatever their size.
LAYOUT = {
    f"{name}Backward{i}"
    for i in (0, 1)
    for name in (
        "T", "Transpose", "Permute", "View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Alias", "Clone",
        "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "ToCopy",
    )
}  # fmt: skip


# Nodes with several results through which gradients flow: their cotangents stand side by side, along the last axis.
_RESULTS = {"ThnnFusedLstmCellBackward0": 2}

# What these nodes save of where they cut: another place is another use.
_CUTS = ("_saved_dim", "_saved_start", "_saved_step", "_saved_index", "_saved_split_size", "_saved_split_sizes")


@dataclass(frozen=True)
class Use:
    """One place where the data side takes in a source.

    ``slot`` is the consumer's input; ``source`` and ``number`` name the source's node and which of its results;
    ``params`` are the parameters behind it; ``chain`` the nodes from the source down to the parameter, when they are
    one line of rearrangements (empty: the parameter itself), else None; ``shape`` that of the source; ``signature``
    what must stay the same from batch to batch.
    """

    node: Node
    slot: int
    source: Node
    number: int
    params: tuple[str, ...]
    chain: tuple[str, ...] | None
    shape: tuple[int, ...]
    signature: tuple

    @property
    def direct(self) -> bool:
        """Whether the source is one parameter's own entries, perhaps rearranged."""
        return self.chain is not None


def nodes_behind(output: Tensor) -> list[Node]:
    """List every node of the graph behind `output`, in a fixed order (breadth first)."""
    return nodes_from(output.grad_fn)


def nodes_from(start: Node) -> list[Node]:
    """A node and all behind it, breadth first."""
    seen: dict[Node, None] = {}
    queue: deque[Node] = deque([start])
    while queue:
        node = queue.popleft()
        if node is not None and node not in seen:
            seen[node] = None
            queue.extend(child for child, _ in node.next_functions)
    return list(seen)


def saved_numbers(output: Tensor) -> int:
    """Count the numbers that the graph behind `output` keeps for its backward pass, parameters included, each once.

    >>> x = torch.ones(3, requires_grad=True)
    >>> saved_numbers((x * x).exp())
    6
    """
    sizes: dict[int, int] = {}
    for node in nodes_behind(output):
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(saved := getattr(node, name), Tensor):
                sizes[saved.data_ptr()] = saved.numel()
    return sum(sizes.values())


def precisions_of(nodes: list[Node]) -> set[torch.dtype]:
    """Floating-point types of the results of nodes."""
    dtypes = {m.dtype for node in nodes if not hasattr(node, "variable") for m in node._input_metadata}
    return {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


def own_functions(nodes: list[Node]) -> list[str]:
    """Names of the user's own autograd functions among nodes."""
    own = {node: node.name().removesuffix("Backward") for node in nodes if _is_own(node)}
    names = set(own.values()) - {"BackwardHookFunction"}  # PyTorch's, for backward hooks on layers
    return [f"function {name}" for name in sorted(names)]


def _is_own(node: Node) -> bool:
    return isinstance(node, BackwardCFunction)


def has_norms(output: Tensor) -> bool:
    """Whether `correct_norms` may have something to do in graphs like this one."""
    return any(node.name() in ("NativeBatchNormBackward0", "NativeGroupNormBackward0") for node in nodes_behind(output))


def correct_norms(output: Tensor) -> None:
    """Work around wrong gradients of PyTorch on a CPU (seen in 2.6 to 2.13), where the order of axes in memory matters.

    Batch norm: input, weight and bias get wrong gradients where a size-one axis (a batch of one, an image one pixel
    wide) hides that cotangent and saved input are in different orders, channels first and channels last. So the
    cotangent is copied into the input's order. Instance norms call it so, too.

    Group norm: with a channels-last input that needs no gradient, PyTorch ends the process. So it is refused.
    """
    for node in nodes_behind(output):
        if node.name() == "NativeBatchNormBackward0" and 1 in node._saved_input.shape:
            last = _channels_last(node._saved_input)
            node.register_prehook(lambda grads, last=last: tuple(g if g is None else _ordered(g, last) for g in grads))
        elif ends_process(node) and node.next_functions[0][0] is None:
            raise refusal(
                "a group norm",
                got="a channels-last input that needs no gradient, on which PyTorch ends the process",
                expected="a contiguous input",
                fix="Call .contiguous() on it in the model's forward.",
            )


def ends_process(node: Node) -> bool:
    """Whether PyTorch ends the process if a backward pass through this node leaves out its input's gradient."""
    if node.name() != "NativeGroupNormBackward0":
        return False
    t = node._saved_input
    return t.device.type == "cpu" and (_channels_last(t) or _has_channels_last_strides(t))


def _channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes a tensor's order in memory for channels-last; strides of size-one axes do not count."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and not t.is_contiguous() and t.is_contiguous(memory_format=formats[t.dim()])


def _has_channels_last_strides(t: Tensor) -> bool:
    """Whether all strides, those of size-one axes too, are channels-last (as c10's suggest_memory_format has it)."""
    if t.dim() not in (4, 5) or t.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.stride(d) < least or (d == 0 and least == t.stride(1)):
            return False
        least = t.stride(d) * max(t.shape[d], 1)
    return True


def _ordered(t: Tensor, channels_last: bool) -> Tensor:
    """A copy with its axes in that order; `Tensor.contiguous` would keep odd strides of size-one axes."""
    if not channels_last:
        return t.clone(memory_format=torch.contiguous_format)
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def shapes_of(node: Node) -> tuple[tuple[int, ...], ...]:
    """Shapes of a node's results; of a leaf none."""
    return () if hasattr(node, "variable") else tuple(tuple(m.shape) for m in node._input_metadata)


def results_of(node: Node) -> int:
    """Number of a node's results through which gradients flow to parameters."""
    return _RESULTS.get(node.name(), 1)


def cotangent_shape(node: Node) -> tuple[int, ...]:
    """Shape of a node's cotangent: of its one result, or of several side by side."""
    shape = shapes_of(node)[0]
    return shape if (count := results_of(node)) == 1 else (*shape[:-1], count * shape[-1])


def sizes_of(node: Node) -> tuple[int, ...]:
    """Shapes of a node's results, one behind the other; of a leaf its own."""
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    return tuple(size for m in node._input_metadata for size in m.shape)


def find_uses(nodes: list[Node], params: dict[str, nn.Parameter], constant: set[int]) -> list[Use]:
    """List every use in a graph, in the order of `nodes`.

    Parameters
    ----------
    nodes : what `nodes_behind` gave.
    params : parameter by name.
    constant : positions in `nodes` of those whose results do not grow with the batch.
    """
    names = {id(p): name for name, p in params.items() if p.numel()}  # no entries, no share
    side = _weight_side(nodes, names, constant)
    uses = []
    for node in nodes:
        if node in side:
            continue
        for slot, (child, number) in enumerate(node.next_functions):
            if child is not None and child in side:
                behind, chain, names_behind = _describe(child, side)
                shape = tuple(
                    child.variable.shape if hasattr(child, "variable") else child._input_metadata[number].shape
                )
                signature = (behind, node.name(), slot, number, names_behind)
                uses.append(Use(node, slot, child, number, behind, chain, shape, signature))
    return uses


def _weight_side(nodes: list[Node], names: dict[int, str], constant: set[int]) -> dict[Node, str | None]:
    """Nodes of the weight side; of parameters with their name."""
    side: dict[Node, str | None] = {}
    waiting: dict[Node, list[Node]] = {}
    open_children: dict[Node, int] = {}
    ready: deque[Node] = deque()
    for i, node in enumerate(nodes):
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                side[node] = names[id(node.variable)]
                ready.append(node)
            continue
        children = {child for child, _ in node.next_functions if child is not None}
        if children and (i in constant or (node.name() in LAYOUT and len(children) == 1)):
            open_children[node] = len(children)
            for child in children:
                waiting.setdefault(child, []).append(node)
    while ready:
        for parent in waiting.get(ready.popleft(), ()):
            open_children[parent] -= 1
            if not open_children[parent]:
                side[parent] = None
                ready.append(parent)
    return side


def _describe(source: Node, side: dict[Node, str | None]) -> tuple[tuple[str, ...], tuple[str, ...] | None, tuple]:
    """Parameters behind a source, its chain of rearrangements if it is one, and the names of all its nodes."""
    behind: dict[str, None] = {}
    chain: list[str] | None = []
    names = []
    seen: set[Node] = set()
    queue: deque[Node] = deque([source])
    while queue:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        if (name := side[node]) is not None:
            behind[name] = None
            continue
        names.append(
            (node.name(), *(str(getattr(node, saved, "")) for saved in _CUTS)) if node.name() in LAYOUT else node.name()
        )
        children = [child for child, _ in node.next_functions if child is not None]
        queue.extend(children)
        if chain is not None:
            chain = [*chain, node.name()] if node.name() in LAYOUT and len(children) == 1 else None
    return tuple(behind), None if chain is None or len(behind) > 1 else tuple(chain), tuple(names)


def with_keys(uses: list[Use]) -> list[tuple[tuple, Use]]:
    """Uses with a key that survives other parameters' uses coming and going: (parameters, which of their uses)."""
    seen: dict[tuple, int] = {}
    keyed = []
    for use in uses:
        number = seen.get(use.params, 0)
        keyed.append(((use.params, number), use))
        seen[use.params] = number + 1
    return keyed


def signatures_of(uses: list[Use]) -> dict[str, tuple]:
    """Signatures of the uses of each parameter."""
    signatures: dict[str, tuple] = {}
    for use in uses:
        for name in use.params:
            signatures[name] = (*signatures.get(name, ()), use.signature)
    return signatures
