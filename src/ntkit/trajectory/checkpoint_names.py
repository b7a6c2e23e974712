"""Tensors of a checkpoint under the names of a model: wrappers and prefixes left out, names of older releases."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.trajectory.recorded_run import tied_names

# names that torch.compile, FSDP, checkpointing and Lightning put between a module and its parameters, anywhere; and
# "module" of DataParallel, which may be a module's own name
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_KNOWN = {"module", "model", "net", "network", "base_model"}  # attributes that usually hold the one network


class Named(NamedTuple):
    """Tensors under the model's names, what was done to the names, and whether none of the model's is missing."""

    tensors: dict[str, Tensor]
    notes: list[str]
    complete: bool


def under_model_names(tensors: Mapping[str, Tensor], model: nn.Module) -> Named:
    """The tensors of a file under the model's names, as far as the names can be matched.

    In this order: as they are; without a prefix that all of the model's names have; without the names of wrappers; and
    each of these with what PyTorch itself changes when it loads a file of an older release (buffers that batch norms
    did not have, the old names of weight norms).

    Raises
    ------
    Refused
        When several networks of these names are in the file.
    """
    best: Named | None = None
    most = 0
    for segments in ((), _WRAPPERS, (*_WRAPPERS, "module")):
        view = _View(model, segments)
        given = {_without(name, segments): tensor for name, tensor in tensors.items()}
        if len(given) < len(tensors) or view.ambiguous:
            continue
        named, matches = _without_prefix(given, view)
        if segments and len(given.keys() & tensors.keys()) < len(given):
            left = sorted({part for name in tensors for part in name.split(".") if part in segments})
            named.notes.insert(0, f"without the names of wrappers ({', '.join(left)})")
        if named.complete:
            return named
        if best is None or matches > most:
            best, most = named, matches
    return best or Named(dict(tensors), [], False)


class _View:
    """The names of a model without those of wrappers, and what of them a file must have."""

    def __init__(self, model: nn.Module, segments: tuple[str, ...]) -> None:
        self.model = model
        groups = tied_names(model)
        needed = set(model.state_dict()) | {name for name, _ in model.named_parameters()}
        self.groups = [set(names) for names, _ in groups if needed & set(names)]
        every = [name for names, _ in groups for name in names]
        self.own = {_without(name, segments): name for name in every}
        self.ambiguous = len(self.own) < len(every)

    def complete(self, names: Iterable[str]) -> bool:
        """Whether the file has each tensor of the model, of tied ones under one of their names."""
        names = set(names)
        return bool(self.groups) and all(group & names for group in self.groups)

    def under(self, given: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        rest = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
        return {self.own.get(name, name): tensor for name, tensor in rest.items()}


def _without(name: str, segments: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in segments) if segments else name


def _without_prefix(given: Mapping[str, Tensor], view: _View) -> tuple[Named, int]:
    """Tensors without the prefix under which they are the model's, and how many names then are."""
    matches = Counter({"": 0})
    for name in given:
        parts = name.split(".")
        matches.update(
            "".join(f"{part}." for part in parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in view.own
        )
    ranked = [prefix for prefix, _ in matches.most_common()]
    likely = [prefix for prefix in ranked if 2 * matches[prefix] >= len(view.groups)]
    for upgrade in (False, True):
        fitting: dict[str, dict[str, Tensor]] = {}
        for prefix in ranked[:4] if upgrade else likely:
            tensors = view.under(given, prefix)
            tensors = _upgraded(tensors, view.model) if upgrade else tensors
            if view.complete(tensors):
                fitting[prefix] = tensors
        if fitting:
            prefix = _only(fitting)
            notes = _notes(given, prefix) + (["names of an older release of PyTorch"] if upgrade else [])
            return Named(fitting[prefix], notes, True), matches[prefix]
    prefix = likely[0] if likely else ""
    return Named(view.under(given, prefix), _notes(given, prefix), False), matches[prefix]


def _notes(given: Mapping[str, Tensor], prefix: str) -> list[str]:
    others = sorted(name for name in given if not name.startswith(prefix))
    notes = [f'without the prefix "{prefix}"'] if prefix else []
    return notes + ([f"left out: {listed(others)}"] if others else [])


def _only(fitting: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The prefix to leave out: none, or the only one, or the only usual one."""
    if "" in fitting:
        return ""
    usual = [prefix for prefix in fitting if set(prefix[:-1].split(".")) <= {*_KNOWN, *_WRAPPERS}]
    if len(found := usual or list(fitting)) == 1:
        return found[0]
    fix = "Save the state dict of the one that you want."
    got = f"several networks of these names, under {listed(sorted(found))}"
    raise refusal("weights", got=got, expected="one", fix=fix)


def _upgraded(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What PyTorch makes of names of older releases, by a copy of the model without values; the model is not changed.

    `load_state_dict` of its modules adds what they lacked then, and renames.
    """
    empty: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        blank = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    try:
        hollow = copy.deepcopy(model, empty)
        hollow.load_state_dict(dict(tensors), strict=False, assign=True)
        state = hollow.state_dict()
    except Exception:  # a module that cannot be copied, other shapes: nothing is known of older names
        return dict(tensors)
    filled = {name: value for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta}
    old = {name: value for name, value in tensors.items() if not any(value is new for new in filled.values())}
    return filled if _same_values(old, filled) else dict(tensors)


def _same_values(old: Mapping[str, Tensor], filled: Mapping[str, Tensor]) -> bool:
    """Whether each of the file's tensors has gone into one of the model's."""
    addresses = {value.data_ptr() for value in filled.values()}
    return all(value.data_ptr() in addresses for value in old.values())


def same_shapes(tensors: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether tensors of the model's names have its shapes."""
    shapes = {name: tensor.shape for names, tensor in tied_names(model) for name in names}
    return all(tensor.shape == shapes.get(name) for name, tensor in tensors.items())


def nearest_names(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """The part of the model that the file fits, if any; or for a missing name the nearest in the file."""
    own = [name for names, _ in tied_names(model) for name in names]
    parts = Counter(
        name.removesuffix(f".{inner}")
        for name in own
        for inner in (".".join(name.split(".")[i:]) for i in range(1, name.count(".") + 1))
        if inner in tensors
    )
    for part, count in parts.most_common(1):
        if count == len(tensors):
            return f" The names are those of the model's part '{part}': load the file into that."
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    pairs = [(name, near[0]) for name in missing[:50] if (near := get_close_matches(name, unexpected, 1, 0.6))]
    return f" The nearest names: {listed([f'{a} ~ {b}' for a, b in pairs])}." if pairs else ""


def listed(names: list[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
