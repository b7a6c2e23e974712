"""Named tensors as safetensors files, each complete or absent, never pickled; and the hash of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkit.base.batch import tensors_to_hash
from ntkit.base.checks import refusal
from ntkit.base.files import parsed, write_bytes
from ntkit.base.integrity import metadata_to_seal, sealed_tensors


def tensor_hash(
    tensors: Mapping[str, Tensor] | Iterable[Tensor],
    header: Callable[[Tensor], str] = lambda tensor: f"{tensor.dtype} {list(tensor.shape)};",
) -> str:
    """SHA-256 over all tensors, in their order: the name (in a mapping), the header (dtype and shape) and the bytes."""
    named = tensors.items() if isinstance(tensors, Mapping) else ((None, tensor) for tensor in tensors)
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update((header(tensor) if name is None else f"{name} {header(tensor)}").encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def points_hash(x: Any, y: Tensor | None) -> str:
    """Hash of a batch, with the places of its tensors and its constants, and of its targets, if it has some."""
    named = {f"x.{place}": tensor for place, tensor in tensors_to_hash(x).items()}
    return tensor_hash(named if y is None else {**named, "y": y})


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None = None) -> bytes:
    """Bytes of a safetensors file with these tensors and its checksum; two may share memory. `metadata` is JSON."""
    from safetensors.torch import save

    copies: dict[str, Tensor] = {}
    seen: set[int] = set()  # safetensors refuses tensors that share memory (views of one flat buffer)
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        memory = copy.untyped_storage().data_ptr()
        copies[name] = copy.clone() if memory in seen else copy
        seen.add(memory)
    return sealed_tensors(save(copies, metadata_to_seal(metadata or {})))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write named tensors as one safetensors file that is complete or absent."""
    write_bytes(path, safetensors_bytes(tensors, metadata))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file of a run, after a check of its checksum."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of a safetensors file of a run, after a check of its checksum.

    Raises
    ------
    Damaged
        When the file is not as it was written.
    Refused
        When the file is absent or cannot be read.
    """
    from safetensors.torch import load

    return parsed(Path(path), load)


def chosen_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is the GPU if there is one.

    Raises
    ------
    Refused
        For "cuda" on a machine without a GPU.
    """
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise refusal("--device", got="cuda", expected="a device of this machine", fix="Use --device cpu.")
    return torch.device(("cuda" if gpu else "cpu") if name == "auto" else name)
