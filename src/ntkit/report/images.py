"""Images small enough for a page: examples, and eigenfunctions along training in 8 bits, few pixels, few snapshots."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays_and_metadata
from ntkit.base.integrity import damaged
from ntkit.report.words import plain

FUNCTIONS = 6
_THUMB = 112  # pixels, twice the size on the page, for high-resolution screens
_PIXELS = 96  # longest side, in pixels
_SNAPSHOTS = 60
_BELOW = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def thumbnail(pixels: np.ndarray) -> str:
    """One image, uint8 [H, W, 1 or 3], as a data URI."""
    import io

    from PIL import Image

    pixels = np.ascontiguousarray(pixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def viewer(
    folder: Path, eigenvalues: Mapping[int, list[float | None] | None], told: dict[str, Any]
) -> dict[str, Any] | None:
    """The data with which the page shows ``folder/images.safetensors``; None if the file does not exist.

    Parameters
    ----------
    folder : of a tracking. The file holds ``target`` [H, W], ``steps`` [T], ``eigenfunctions`` [T, q, H, W], and
        optionally ``output`` [T, H, W] and ``bandwidth`` [T, q]. If it holds ``mean`` [H, W] instead of ``target``, an
        eigenfunction is a sum of the images followed, weighted by an eigenvector, and ``mean`` is their mean.
    eigenvalues : step -> eigenvalues there.
    told : ``track.json``.

    Raises
    ------
    Refused
        When one of the first three is missing, the shapes do not agree, or the file is damaged.
    """
    path = folder / "images.safetensors"
    digest = told.get("images")
    if not path.exists():
        if digest is not None:
            raise damaged(path, "no such file")
        return None
    arrays, metadata = read_arrays_and_metadata(path)
    if digest is not None and metadata.get("sha256") != digest:
        raise damaged(path, "not the file that track.json was written with")
    weighted = "mean" in arrays
    if weighted:
        arrays["target"] = arrays["mean"]
    _check(path, arrays)
    steps, bandwidth = arrays["steps"], arrays.get("bandwidth")
    frames = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _SNAPSHOTS)).round().astype(int))
    functions = _same_signs(_smaller(arrays["eigenfunctions"][:, :FUNCTIONS])[frames])
    target = _smaller(arrays["target"])
    low, high = float(target.min()), float(target.max())
    captions = []
    for t in frames:
        values = eigenvalues.get(int(steps[t])) or []
        bands = [] if bandwidth is None else [float(b) for b in bandwidth[t]]
        captions.append([_caption(i, values, bands) for i in range(functions.shape[1])])
    output = _text(_gray(_smaller(arrays["output"])[frames], low, high)) if "output" in arrays else None
    frame_steps = [int(steps[t]) for t in frames]
    return {
        "steps": frame_steps,
        "of": len(steps),
        "weighted": weighted,
        "count": functions.shape[1],
        "low": low,
        "high": high,
        "bandwidth": bandwidth is not None,
        "data": {
            "height": target.shape[0],
            "width": target.shape[1],
            "steps": frame_steps,
            "captions": captions,
            "target": _text(_gray(target, low, high)),
            "output": output,
            "functions": _text(_signed(functions)),
        },
    }


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in ("target", "steps", "eigenfunctions") if name not in arrays]
    if missing:
        fix = "Write target, steps and eigenfunctions, or delete the file."
        raise refusal(str(path), got=f"no {', '.join(missing)}", expected="images with a target and steps", fix=fix)
    T, size = len(arrays["steps"]), arrays["target"].shape
    functions = arrays["eigenfunctions"].shape
    shapes = {"eigenfunctions": (T, *functions[1:2], *size), "output": (T, *size)}
    for name, shape in shapes.items():
        got = arrays[name].shape if name in arrays else shape
        if got != shape or len(size) != 2 or not T or len(functions) != 4:
            fix = "Write one image per step, all of the same size."
            raise refusal(f"{path}: {name}", got=f"shape {got}", expected=f"images {size} at {T} steps", fix=fix)


def _smaller(images: np.ndarray) -> np.ndarray:
    """Average square blocks, to at most `_PIXELS` on the longest side; an incomplete last row or column is dropped."""
    images = np.nan_to_num(images.astype(np.float64))
    H, W = images.shape[-2:]
    b = min(-(-max(H, W) // _PIXELS), H, W)
    h, w = H // b, W // b
    return images[..., : h * b, : w * b].reshape(*images.shape[:-2], h, b, w, b).mean((-3, -1))


def _same_signs(functions: np.ndarray) -> np.ndarray:
    """Give each eigenfunction [T, q], whose sign is arbitrary, the sign that agrees with the snapshot before.

    >>> a = np.array([[[[1.0, -2.0]]], [[[-1.0, 2.1]]]])
    >>> _same_signs(a).ravel().tolist()
    [-1.0, 2.0, -1.0, 2.1]
    """
    functions = functions.copy()
    first = functions[0].reshape(functions.shape[1], -1)
    peak = np.take_along_axis(first, np.abs(first).argmax(1)[:, None], 1)[:, 0]
    functions[0] *= np.where(peak < 0, -1.0, 1.0)[:, None, None]
    for before, now in zip(functions, functions[1:], strict=False):
        now *= np.where((before * now).sum((1, 2)) < 0, -1.0, 1.0)[:, None, None]
    return functions


def _signed(functions: np.ndarray) -> np.ndarray:
    """Map to 1 ... 255 with zero at 128, each image scaled by its own largest value."""
    largest = np.abs(functions).max((-2, -1), keepdims=True)
    return (np.round(127 * functions / np.where(largest > 0, largest, 1)) + 128).astype(np.uint8)


def _gray(images: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.round(255 * np.clip((images - low) / ((high - low) or 1.0), 0, 1)).astype(np.uint8)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _caption(i: int, eigenvalues: list[float | None], bandwidth: list[float]) -> str:
    value = f"\u00a0=\u00a0{plain(eigenvalues[i])}" if i < len(eigenvalues) and eigenvalues[i] is not None else ""
    band = f", {plain(bandwidth[i], 2)}\u00a0cycles" if i < len(bandwidth) and np.isfinite(bandwidth[i]) else ""
    return f"λ{str(i + 1).translate(_BELOW)}{value}{band}"
