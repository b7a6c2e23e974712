"""A tangent kernel by the name of its network's factory: what travels to other processes in place of the module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from ntkit.base.tensors import safetensors_bytes
from ntkit.base.trust import code_hashes, code_of_sender
from ntkit.jacobian.model_calls import Outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.networks.built_in import build
from ntkit.trajectory.recorded_run import assign


@dataclass(frozen=True)
class NamedKernel:
    """``ntkit.TangentKernel`` of a network that is built by name and gets its weights from safetensors bytes.

    Unlike a kernel, which a pickle carries, it holds no code: whoever builds it imports the user's module by itself,
    and refuses one whose files are not the sender's.

    Parameters
    ----------
    name : a built-in network, ``package.module:factory`` or ``/path/file.py:factory``.
    shape, classes, seed, vocabulary : what the factory gets, see `ntkit.networks.built_in.build`.
    outputs, dtype, device, memory : of the kernel.
    weights : parameters and buffers, in the format of safetensors.
    hashes : of the code's files.
    settings : of the command that made it, for the description of a store.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    seed: int
    vocabulary: int | None
    outputs: Outputs
    dtype: str
    device: str
    memory: int | str | None
    weights: bytes
    hashes: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, name: str, **values: Any) -> NamedKernel:
        """Take the weights of a network, and the hashes of the code that the context allows (`ntkit.base.trust`)."""
        place, colon, factory = name.rpartition(":")
        absolute = f"{os.path.abspath(place)}:{factory}" if colon and place.endswith(".py") else name
        weights = safetensors_bytes(dict([*network.named_parameters(), *network.named_buffers()]))
        found = code_hashes({"--model": name})
        return cls(absolute, weights=weights, hashes=found, **values)

    @property
    def code(self) -> str:
        """What tells the user's code from other code; empty for a built-in network."""
        return " ".join(self.hashes["--model"])

    @cached_property
    def kernel(self) -> TangentKernel:
        """The kernel, built once in this process.

        Raises
        ------
        Refused
            When the code is not here, or not the sender's.
        """
        with code_of_sender({"--model": self.name}, self.hashes):
            network = build(self.name, self.shape, self.classes, self.seed, self.vocabulary)
        network = network.to(device=self.device, dtype=getattr(torch, self.dtype))
        assign(network, load(self.weights), "weights")
        return TangentKernel(network, outputs=self.outputs, memory=self.memory)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "kernel"}
