"""Named tensors as files: safetensors, whole or absent, never pickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ntkit.base.checks import Refused, refusal
from ntkit.base.files import write_atomically


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes (sha256)."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Give the bytes of a safetensors file with these tensors; two may share memory."""
    from safetensors.torch import save

    whole: dict[str, Tensor] = {}
    seen: set[int] = set()  # safetensors refuses tensors that share memory (views of one flat buffer)
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        memory = copy.untyped_storage().data_ptr()
        whole[name] = copy.clone() if memory in seen else copy
        seen.add(memory)
    return save(whole, metadata)


def write_bytes(path: Path, blob: bytes) -> None:
    """Write bytes, whole or not at all."""

    def write(aside: Path) -> None:
        aside.write_bytes(blob)

    write_atomically(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, whole or not at all."""
    write_bytes(path, serialised(tensors, metadata))


def read_if_there(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a safetensors file, or give None where another process has removed it."""
    try:
        return read_tensors(path)
    except Refused:
        if path.exists():
            raise
        return None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or refuse what is none."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file, or refuse what is none."""
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
            got=f"a file that is not whole safetensors ({error})",
            expected="a .safetensors file",
            fix="Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'weights.safetensors').",
        ) from error
