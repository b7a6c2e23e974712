"""`ntkit gram`: a network's tangent kernel on a data set, computed into a folder tile by tile."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import check_name, refusal
from ntkit.base.factory import is_code
from ntkit.base.regular_files import check_folder
from ntkit.base.tensors import chosen_device
from ntkit.base.trust import code_hashes, code_of_user
from ntkit.commands.settings import GramSettings
from ntkit.data import Data
from ntkit.gram.gram_store import GramStore
from ntkit.gram.named_kernel import NamedKernel
from ntkit.networks.built_in import build
from ntkit.trajectory import load_weights

_OF_DATA = ("classes", "class_names", "task", "target", "resize", "train", "test")
RECORDED = ("data_dir", *_OF_DATA, "weights", "outputs", "dtype", "seed")  # settings that a store knows


def gram(
    model: str,
    data: str,
    settings: GramSettings | None = None,
    *,
    out: str | Path,
    say: Callable[[str], None] = lambda line: None,
) -> GramStore:
    """Compute the tangent kernel of a network on the training examples of a data set into a folder, or go on with it.

    The worker processes get the network as its factory's name and its weights, and import the user's module by
    themselves.

    Parameters
    ----------
    model : a built-in network, ``package.module:factory`` or ``file.py:factory``.
    data : as in `analyze`; or a ``.npy`` file of samples without labels, which stays on disk: the network gets one
        output then.
    settings : which kernel, and who computes it.
    out : the folder.
    say : called with each line: what it will take, and how far it has come when it ends.

    Raises
    ------
    Refused
        As `GramStore.create`.
    """
    s = settings or GramSettings()
    s.check()
    for option, name in (("MODEL", model), ("DATA", data)):
        check_name(option, name, "Rename it.")
    check_folder(out, "--out")
    with code_of_user({"--model": model, "--data": data}):
        kernel, x, _ = kernel_and_samples(model, data, s, say)
    return GramStore.create(
        out, kernel, x, workers=s.workers, scheduler=s.scheduler, memory=s.memory, tile=s.tile, say=say
    )


def kernel_and_samples(
    model: str, data: str, s: GramSettings, say: Callable[[str], None] = lambda line: None
) -> tuple[NamedKernel, Any, Data | None]:
    """The kernel, the samples and the data set that names and settings say; None for a file without labels."""
    sets = None
    if data.endswith(".npy") and not is_code("--data", data):
        x = _without_labels(data, s)
        shape, classes, vocabulary = x.shape[1:], 1, None
    else:
        sets = s.load_named(data)
        x = in_dtype(sets.x_train, s.dtype)
        classes = sets.outputs
        shape, vocabulary = sets.input_shape, sets.tokens
    network = build(model, shape, classes, s.seed, vocabulary)
    if s.weights is not None:
        say(load_weights(network, s.weights))
    device = chosen_device(s.device)
    network = network.to(device=device, dtype=getattr(torch, s.dtype))
    kernel = NamedKernel.of(
        network, model, shape=shape, classes=classes, seed=s.seed, vocabulary=vocabulary, outputs=s.outputs,
        dtype=s.dtype, device=str(device), memory=s.memory, settings=_recorded(model, data, s),
    )  # fmt: skip
    return kernel, x, sets


def in_dtype(x: Tensor, dtype: str) -> Tensor:
    """Samples in the dtype of the network; token numbers as they are."""
    return x.to(getattr(torch, dtype)) if x.is_floating_point() else x


def summary(store: GramStore) -> list[str]:
    """What there is now, and how it is opened."""
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    n, kind = store.shape[0], str(store.dtype).removeprefix("torch.")
    return [
        f"{n:,} x {n:,} in {kind}, {size / 1e6:,.1f} MB, checksum {store.checksum[:16]}",
        f"check it: ntkit verify {shlex.quote(str(store.path))}",
        f"in Python: K = ntkit.GramStore.open({str(store.path)!r})",
    ]


def _without_labels(data: str, s: GramSettings) -> np.ndarray:
    """The samples of a .npy file, on disk."""
    for option in _OF_DATA:
        if getattr(s, option) is not None:
            fix = "Leave it out, or give an .npz file with labels."
            raise refusal(
                "--" + option.replace("_", "-"), got="a .npy file, without labels", expected="a data set", fix=fix
            )
    try:
        x = np.load(os.path.expanduser(data), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        fix = "Save one with numpy.save."
        raise refusal(data, got=str(error), expected="a .npy file of numbers", fix=fix) from error
    if x.ndim < 2 or not len(x) or (x.dtype.kind == "f" and x.dtype != np.dtype(s.dtype)) or x.dtype.kind not in "fi":
        fix = f"Save them so, once: numpy.save(file, x.astype({s.dtype!r}))."
        expected = f"samples along the first axis, in {s.dtype} (or integers, for token numbers)"
        raise refusal(data, got=f"{x.dtype} of shape {list(x.shape)}", expected=expected, fix=fix)
    return x


def _recorded(model: str, data: str, s: GramSettings) -> dict[str, Any]:
    """What another command needs to find the labels and the network again; the hash of the code among it."""
    hashes = code_hashes({"--model": model, "--data": data})
    files = {f"{option[2:]} file": found[-1][:16] for option, found in hashes.items() if found}
    return {"model": model, "data": data, **{name: asdict(s)[name] for name in RECORDED}, "identity": files}
