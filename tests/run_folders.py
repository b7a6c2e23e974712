"""Folders of runs for tests: as an earlier version left them, changed with and without a right checksum."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ntkit.base.files import read_json


def as_an_earlier_version_wrote(folder: Path) -> Path:
    """Rewrite a folder without checksums, and without what the files say of their run and step."""
    for file in folder.rglob("*.json"):
        value = read_json(file)
        if isinstance(value, dict) and value.get("format") == "ntkit-trajectory":
            value.pop("snapshots", None)
        if isinstance(value, dict) and file.name == "results.json":
            value = {name: entry for name, entry in value.items() if name not in ("files", "run", "figures")}
        if isinstance(value, dict):
            value = value.get("result", value) if file.parent.name == "stages" else value
            value = value.get("numbers", value) if file.parent.name == "parts" else value
        if isinstance(value, dict):
            value.pop("tracking", None)
            later = {"track.json": ("steps", "images"), "run.json": ("stages", "parts")}.get(file.name, ())
            value = {name: entry for name, entry in value.items() if name not in later}
        file.write_text(json.dumps(value, indent=1) + "\n")
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = json.loads((opened.metadata() or {}).get("ntkit", "{}"))
        rest = {name: value for name, value in metadata.items() if name not in ("sha256", "run")}
        old = {"ntkit": json.dumps(rest)} if "step" in rest and "optimizer" in rest else None
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, old)
    for file in folder.rglob("*.html"):
        file.write_text(file.read_text().partition("<!-- checksum")[0])
    return folder
