"""Rules of the public names: flags by keyword, one name for one idea, results that can grow and are public."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

import ntkit

NAMES = [name for name in ntkit.__all__ if not inspect.ismodule(getattr(ntkit, name))]
MODULES = (ntkit.data, ntkit.probes)
OTHER_NAMES = {
    "folder": "path", "file_path": "path", "fraction": "share", "batch": "batch_size", "traj": "trajectory",
    "learning_rate": "lr", "rng": "seed", "generator": "seed", "random_state": "seed", "n_jobs": "workers",
    "budget_bytes": "memory", "top_k": "k", "again": "retrainings",
    "random_sets": "sets", "normalisation": "normalization", "dataset": "train",
}  # fmt: skip
FREE = {"ntkit.Explainer.influence", "ntkit.Tracked.to_tensorboard"}  # another library's signature; a folder of its own


def callables() -> dict[str, inspect.Signature]:
    """Signatures of the public functions, constructors and methods that ntkit defines, by their whole name."""
    found = {}
    everything = {f"ntkit.{name}": getattr(ntkit, name) for name in NAMES}
    for module in MODULES:
        everything |= {f"{module.__name__}.{n}": v for n, v in vars(module).items() if not n.startswith("_")}
    for name, value in everything.items():
        if inspect.isfunction(value):
            found[name] = inspect.signature(value)
        elif inspect.isclass(value) and value.__module__.startswith("ntkit") and not issubclass(value, Exception):
            if not dataclasses.is_dataclass(value) and not issubclass(value, tuple):
                found[name] = inspect.signature(value)
            for method, function in inspect.getmembers(value, callable):
                if not method.startswith("_") and getattr(function, "__module__", "").startswith("ntkit"):
                    found[f"{name}.{method}"] = inspect.signature(function)
    return {name: signature for name, signature in found.items() if name not in FREE}


def positional(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


SIGNATURES = callables()


def test_the_rules_look_at_functions_constructors_and_methods():
    assert {"ntkit.train", "ntkit.TangentKernel", "ntkit.PathDecomposition.top", "ntkit.probes.shift"} <= set(
        SIGNATURES
    )


def test_a_flag_is_given_by_keyword():
    flags = [
        f"{name}({p.name})" for name, s in SIGNATURES.items() for p in positional(s) if isinstance(p.default, bool)
    ]
    others = (
        r"\.(get_params\(deep|NTKRegressor\.predict\(return_std|Linearized\.train\(mode)\)$"  # scikit-learn's, torch's
    )
    assert [flag for flag in flags if not re.search(others, flag)] == []


def test_few_settings_can_be_given_by_position():
    """At most three with a default: more could not be put into another order, or grow."""
    many = [name for name, s in SIGNATURES.items() if sum(p.default is not p.empty for p in positional(s)) > 3]
    assert many == []


def test_one_idea_has_one_name():
    other = [f"{name}({p})" for name, s in SIGNATURES.items() for p in s.parameters if p in OTHER_NAMES]
    assert other == []


@pytest.mark.parametrize("name", NAMES)
def test_results_compare_as_objects(name):
    """Fields are tensors, whose comparison is no truth value; `eq=False` keeps a result hashable."""
    value = getattr(ntkit, name)
    if dataclasses.is_dataclass(value) and any("Tensor" in str(f.type) for f in dataclasses.fields(value)):
        assert value.__eq__ is object.__eq__
        assert value.__hash__ is object.__hash__


def test_equal_explanations_compare_without_an_error():
    one, other = (ntkit.Explanation(torch.eye(2)) for _ in range(2))
    assert one != other
    assert len({one, other, one}) == 2


def test_what_public_functions_return_is_public():
    """A class of ntkit named as the value of a public function or method has an entry among the public names."""
    known = {getattr(ntkit, name) for name in NAMES} | {v for m in MODULES for v in vars(m).values() if callable(v)}
    hidden = set()
    for name, signature in SIGNATURES.items():
        function = eval(name.removeprefix("ntkit."), vars(ntkit) | {n: getattr(ntkit, n) for n in ntkit.__all__})
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        for word in re.findall(r"\w+", str(signature.return_annotation)):
            value = scope.get(word)
            if inspect.isclass(value) and value.__module__.startswith("ntkit") and value not in known:
                hidden.add(f"{name}: {word}")
    assert hidden == ENGINE


ENGINE = {  # how a kernel on disk is computed: not promised (docs/versions.md)
    "ntkit.TangentKernel.factors: KeptFactors",
    "ntkit.TangentKernel.plan: Plan",
    "ntkit.TangentKernel.plan_for_tiles: Plan",
}


def test_one_argument_has_one_kind_of_value():
    """`resume` is a flag wherever it is an argument; a folder of an earlier run is `from_run`, or `run` alone."""
    kinds = {name: s.parameters["resume"].annotation for name, s in SIGNATURES.items() if "resume" in s.parameters}
    assert set(kinds.values()) == {"bool"}
    assert kinds.keys() >= {"ntkit.train", "ntkit.record"}
    assert "from_run" in SIGNATURES["ntkit.analyze"].parameters


def test_names_that_need_a_package_are_no_part_of_an_import_of_all():
    """They are used in `test_callbacks` and `test_gpytorch`."""
    assert ntkit._WITH_PACKAGES.keys() == {"GPyTorchKernel", "LightningCallback", "TransformersCallback"}
    assert not ntkit._WITH_PACKAGES.keys() & set(ntkit.__all__)
