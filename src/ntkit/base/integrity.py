"""Checksums inside files: a file is complete, absent or damaged by itself, and no index can disagree with it.

JSON carries its checksum in the last line, a page in a last comment, a safetensors file in its metadata. Each covers
every other byte of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkit.base.checks import Damaged

_JSON_TAIL = re.compile(rb' "checksum": "sha256:([0-9a-f]{64})"\n\}\n')
_PAGE_TAIL = re.compile(rb"<!-- checksum sha256:([0-9a-f]{64}) of all bytes before this line -->\n")
_TAIL_BYTES = {".json": 89, ".html": 120, ".md": 120}
_TAILS = {".json": _JSON_TAIL, ".html": _PAGE_TAIL, ".md": _PAGE_TAIL}
# Traces of a tail that was changed itself: a changed byte breaks one of them at most.
_TRACES = (re.compile(rb"sha256:[0-9a-f]{64}"), re.compile(rb'"checksum"|<!-- checksum'))
# One entry of metadata, with JSON in it: safetensors writes several entries in random order.
_ENTRY = rb'"ntkit":"{\"sha256\": \"'
_OTHER_ENTRY = re.compile(rb'"ntkit":"(?!\{\\"(step|format)\\": )')  # earlier versions wrote these two first
_NO_DIGEST = "0" * 64


class WithoutChecksum(UserWarning):
    """A folder whose files have no checksums: an earlier version wrote it."""


def damaged(path: str | Path, why: str, fix: str = "Restore it from a copy, or repeat what wrote it.") -> Damaged:
    """Build the refusal of a damaged file; the caller raises it.

    >>> str(damaged("run.json", "an empty file"))
    'run.json: got a damaged file: an empty file; expected it as it was written. Restore it from a copy, or repeat what wrote it.'
    """  # noqa: E501
    return Damaged(f"{path}: got a damaged file: {why}; expected it as it was written. {fix}")


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that identify a JSON value, e.g. the settings that the files of one run have in common."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sealed_json(value: Any) -> bytes:
    r"""JSON with its checksum as the last key; NaN and infinities, which are not JSON, raise ValueError.

    >>> print(sealed_json({"a": 1}).decode()[:42])
    {
     "a": 1,
     "checksum": "sha256:caa4789be6
    """
    if not isinstance(value, dict) or value.keys() == {"value"}:
        value = {"value": value}
    if "checksum" in value:
        raise ValueError("the key 'checksum' is that of the file")
    text = json.dumps(value, indent=1, allow_nan=False)
    body = (text[:-2] + ",\n" if value else "{\n").encode()
    return body + f' "checksum": "sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def unsealed(value: dict[str, Any]) -> Any:
    """The value that `sealed_json` wrote, from the JSON object with its checksum."""
    del value["checksum"]
    return value["value"] if value.keys() == {"value"} else value


def sealed_page(text: str) -> bytes:
    """HTML with its checksum in a last comment."""
    body = text.encode() if text.endswith("\n") else f"{text}\n".encode()
    digest = hashlib.sha256(body).hexdigest()
    return body + f"<!-- checksum sha256:{digest} of all bytes before this line -->\n".encode()


def metadata_to_seal(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file that has room for the checksum."""
    return {"ntkit": json.dumps({"sha256": _NO_DIGEST, **metadata})}


def sealed_tensors(blob: bytes) -> bytes:
    """Bytes of a safetensors file with `metadata_to_seal`, with the checksum of all of them: its own digits are 0."""
    place = blob.index(_ENTRY) + len(_ENTRY)
    digest = hashlib.sha256(blob).hexdigest().encode()
    return b"".join((memoryview(blob)[:place], digest, memoryview(blob)[place + 64 :]))


def checksum_of(blob: bytes) -> str:
    """The checksum in the bytes that `sealed_tensors` returned."""
    place = blob.index(_ENTRY) + len(_ENTRY)
    return blob[place : place + 64].decode()


def stored_checksum(path: Path, blob: bytes) -> str | None:
    """The checksum in a file, after its comparison with the file's bytes; None if the file was written without one.

    Raises
    ------
    Damaged
        When the file is empty, or not as it was written.
    """
    if not blob:
        raise damaged(path, "an empty file")
    return _of_tensors(path, blob) if path.suffix == ".safetensors" else _of_text(path, blob)


def _of_text(path: Path, blob: bytes) -> str | None:
    size = _TAIL_BYTES[path.suffix]
    found = _TAILS[path.suffix].fullmatch(blob[-size:])
    if found is None:
        end = blob[-2 * size :]
        if any(trace.search(end) for trace in _TRACES):
            raise damaged(path, "changed since it was written, or cut off (its last line is not the checksum)")
        return None
    if hashlib.sha256(memoryview(blob)[:-size]).hexdigest() != (digest := found[1].decode()):
        raise damaged(path, "changed since it was written (its checksum differs)")
    return digest


def _of_tensors(path: Path, blob: bytes) -> str | None:
    header = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    place = header.find(_ENTRY) + 8 + len(_ENTRY)
    if _ENTRY not in header:
        if b"sha256" in blob[:200] or _OTHER_ENTRY.search(blob[:200]):
            raise damaged(path, "changed since it was written (its header is another)")
        return None
    digest = hashlib.sha256(memoryview(blob)[:place])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(blob)[place + 64 :])
    if digest.hexdigest().encode() != blob[place : place + 64]:
        raise damaged(path, "changed since it was written, or cut off (its checksum differs)")
    return digest.hexdigest()


def tensor_metadata(blob: bytes) -> dict[str, Any]:
    """The metadata that `metadata_to_seal` was given, and ``sha256``, of a complete safetensors file.

    Older files have it without a checksum. Raises ValueError, KeyError or TypeError where it has another form.
    """
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    metadata = json.loads((header.get("__metadata__") or {}).get("ntkit", "{}"))
    return dict(metadata)


def check_place(path: Path, metadata: Mapping[str, Any], **place: Any) -> None:
    """Refuse a complete file that lies in the wrong place: of another run, or of another step.

    Parameters
    ----------
    path : the file.
    metadata : what it says of itself, with its checksum as ``sha256``; older files have neither.
    place : what it must say, by name.
    """
    for name, value in place.items():
        if name in metadata and metadata[name] != value:
            raise damaged(path, f"a file of another {name} ({metadata[name]}) than this one ({value})")
        if name not in metadata and "sha256" in metadata:
            raise damaged(path, f"another file, which does not say its {name}")


_warned: set[Path] = set()


def warn_without_checksum(file: Path) -> None:
    """Warn, once for each run's folder, that its files cannot be checked."""
    file = Path(file).absolute()
    marks = ("run.json", "track.json")
    folders = [p for p in list(file.parents)[:5] if any((p / mark).exists() for mark in marks)] or [file.parent]
    if folders[-1] not in _warned:
        _warned.add(folders[-1])
        warnings.warn(
            f"{folders[-1]} has files without checksums (an earlier version of ntkit wrote them, or an editor): damage "
            "would not be noticed. A run repeated in a new folder has them.",
            WithoutChecksum,
            stacklevel=4,
        )
