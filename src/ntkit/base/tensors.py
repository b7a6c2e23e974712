"""Named tensors as safetensors files, each complete or absent, never pickled; and the hash of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ntkit.base.checks import Refused, refusal
from ntkit.base.files import write_bytes


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


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Bytes of a safetensors file with these tensors; two may share memory."""
    from safetensors.torch import save

    copies: dict[str, Tensor] = {}
    seen: set[int] = set()  # safetensors refuses tensors that share memory (views of one flat buffer)
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        memory = copy.untyped_storage().data_ptr()
        copies[name] = copy.clone() if memory in seen else copy
        seen.add(memory)
    return save(copies, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file that is complete or absent."""
    write_bytes(path, safetensors_bytes(tensors, metadata))


def read_tensors_if_present(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a safetensors file; None if another process has removed the file."""
    try:
        return read_tensors(path)
    except Refused:
        if path.exists():
            raise
        return None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; refuse any other file."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file; refuse any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise refusal(str(path), got=reason, expected="a .safetensors file", fix="Check the name.") from error
    except SafetensorError as error:
        raise refusal(
            str(path),
            got=f"a file that is not a complete safetensors file ({error})",
            expected="a .safetensors file",
            fix="If you trust its source, convert it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'weights.safetensors').",
        ) from error
