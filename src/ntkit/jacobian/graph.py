"""Find where the autograd graph of one forward pass uses parameters.

No hook, no patch: tied weights come out right.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Node = Any  # torch.autograd.graph.Node

# Nodes that only rearrange a tensor's entries. Between a parameter and its consumer they are not uses themselves.
LAYOUT = {
    f"{name}Backward{i}"
    for i in (0, 1)
    for name in (
        "T", "Transpose", "Permute", "View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Alias", "Clone",
        "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "ToCopy",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """One place where the graph consumes a parameter.

    ``slot`` is the consumer's input; ``layout`` the names of the rearranging nodes on the way, nearest to the consumer
    first; ``shape`` that of the weight as the consumer sees it.
    """

    name: str
    node: Node
    slot: int
    layout: tuple[str, ...]
    shape: tuple[int, ...]


def find_uses(output: Tensor, params: dict[str, nn.Parameter]) -> list[Use]:
    """List every use of `params` in the graph behind `output`, in a fixed order (breadth first from the output).

    Parameters
    ----------
    output : result of a forward pass with grad enabled.
    params : parameter by name.

    Returns
    -------
    list of Use
        Empty when the output depends on none of them.
    """
    names = {id(p): name for name, p in params.items()}
    uses: list[Use] = []
    seen: set[Node] = set()
    queue: deque[Node] = deque([output.grad_fn] if output.grad_fn is not None else [])
    while queue:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        for slot, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            found = _parameter_behind(child, names)
            if found is None:
                queue.append(child)
            elif found[0] is not None:
                metadata = child._input_metadata if child.name() in LAYOUT else None
                shape = tuple(metadata[number].shape) if metadata else tuple(params[found[0]].shape)
                uses.append(Use(found[0], node, slot, found[1], shape))
    return uses


def nodes_behind(output: Tensor) -> list[Node]:
    """List every node of the graph behind `output`, in a fixed order (breadth first)."""
    seen: dict[Node, None] = {}
    queue: deque[Node] = deque([output.grad_fn])
    while queue:
        node = queue.popleft()
        if node is not None and node not in seen:
            seen[node] = None
            queue.extend(child for child, _ in node.next_functions)
    return list(seen)


def _parameter_behind(node: Node, names: dict[int, str]) -> tuple[str | None, tuple[str, ...]] | None:
    """Name of the parameter behind a chain of layout nodes; (None, ...) for a leaf not asked for; None if data."""
    layout: list[str] = []
    while node.name() in LAYOUT and len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        layout.append(node.name())
        node = node.next_functions[0][0]
    if hasattr(node, "variable"):  # AccumulateGrad: a leaf
        return names.get(id(node.variable)), tuple(layout)
    return None


def signature(uses: list[Use]) -> tuple[tuple[str, str, int, tuple[str, ...]], ...]:
    """What must stay the same for a check made on some samples to hold for others: the uses, without sizes."""
    return tuple((use.name, use.node.name(), use.slot, use.layout) for use in uses)
