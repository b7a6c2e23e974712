"""Folders of images, one folder per class: PNG and JPEG, all of one mode, and of one size unless they are resized."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import check_name, refusal
from ntkit.base.memory import check_room
from ntkit.base.numbers import as_integer
from ntkit.data.readers import Files, open_data

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LARGEST = 2**28  # bytes of one image file
_SIDE = 4096  # pixels of a side after resizing, at most
_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # what Windows and macOS put into folders, in lower case
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # folders of a split
_ORIENTATION = 274  # the EXIF tag; 1: as stored


def read_image_folder(folder: Path, resize: int | None = None) -> Files:
    """Read FOLDER/train/CLASS/* and FOLDER/test/CLASS/*, or FOLDER/CLASS/*: PNG and JPEG, one size, gray or RGB.

    Without test/ a folder val/, valid/ or validation/ is the test set; beside test/ it is left out, and the source says
    so. Pixels are as stored: an orientation noted in a photograph's EXIF data does not turn it; the source counts
    them. With `resize` the shorter side of each image is resized to that many pixels, and the square in its center
    is cut out.
    """
    if resize is not None:
        expected = f"a number of pixels from 1 to {_SIDE:,}"
        resize = as_integer(resize, "resize (--resize)", expected, "For example 32.", least=1, most=_SIDE)
    roots, unused = _split(folder)
    split = len(roots) == 2
    folders = [_class_folders(root) for root in roots]
    classes = tuple(path.name for path in folders[0])
    for other in folders[1:]:
        odd = sorted(set(classes) ^ {path.name for path in other})
        if odd:
            got = f"class {odd[0]!r} in only one of {roots[0].name} and {roots[1].name}"
            raise refusal(str(folder), got=got, expected="the same class folders in both", fix="Add or remove it.")
    for name in classes:  # they become the names of the classes, in tables and reports
        check_name(f"class folder in {folder.name}", name, "Rename the folder.")
    labels = [[label for label, path in enumerate(group) for _ in _visible(path)] for group in folders]
    pixels, turned = _read_images([path for group in folders for inner in group for path in _visible(inner)], resize)
    n = len(labels[0])
    train = (pixels[:n], np.array(labels[0]))
    test = (pixels[n:], np.array(labels[1])) if split else None
    layout = f"{roots[0].name}/CLASS and {roots[1].name}/CLASS" if split else "CLASS"
    source = f"images in {folder.name}/, {layout}: {', '.join(classes)}"
    if unused:
        source += f"; {', '.join(unused)} left out"
    if turned:
        source += f"; {turned} with an EXIF orientation, which is not applied"
    if resize is not None:
        source += f"; shorter side resized to {resize} pixels (Pillow, bilinear, antialiased), then the center cut out"
    return Files(train, test, classes, source)


def _split(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders of the training and the test set, or the folder itself; and folders of other sets beside them."""
    held = {path.name.lower(): path for path in _visible(folder) if os.path.isdir(path)}
    train = [held[name] for name in _TRAIN if name in held]
    test = [held[name] for name in _TEST if name in held]
    if not train or not test or not all(any(map(os.path.isdir, _visible(path))) for path in (train[0], test[0])):
        return [folder], []  # or these are the names of classes
    return [train[0], test[0]], [path.name for path in (*train[1:], *test[1:])]


def _visible(folder: Path) -> list[Path]:
    try:
        found = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(path for path in found if path.name.lower() not in _SYSTEM)
    except OSError as error:
        fix = "Check its permissions."
        raise refusal(str(folder), got=error.strerror or error, expected="a readable folder", fix=fix) from error


def _class_folders(root: Path) -> list[Path]:
    folders = [path for path in _visible(root) if os.path.isdir(path)]
    if not folders:
        fix = "Name the folder that holds the class folders."
        raise refusal(str(root), got="no class folders", expected="one folder of images per class", fix=fix)
    for folder in folders:
        if not _visible(folder):
            raise refusal(str(folder), got="an empty class folder", expected="images", fix="Add some or remove it.")
    return folders


def _read_images(paths: list[Path], resize: int | None) -> tuple[np.ndarray, int]:
    """Pixels of all images, and how many have an orientation of their own."""
    pixels, turned = np.empty(0, np.uint8), 0
    first = ""
    for row, path in enumerate(paths):
        if path.suffix.lower() not in _SUFFIXES:
            got, fix = f"a file that is not {', '.join(_SUFFIXES)}", "Move it elsewhere."
            if os.path.isdir(path):
                got = "a folder in a class folder"
                fix = "Name the folder that holds CLASS/, or train/CLASS/ and test/CLASS/."
            expected = "only PNG and JPEG images in a class folder"
            raise refusal(str(path), got=got, expected=expected, fix=fix)
        with _open(path) as image:
            # the header has been read, the pixels have not
            what, shape = f"{image.width} x {image.height} {image.mode}", (image.height, image.width)
            if image.mode not in ("L", "RGB"):
                fix = "Convert all images to one of them."
                raise refusal(str(path), got=f"mode {image.mode}", expected="8-bit gray (L) or RGB", fix=fix)
            if (frames := getattr(image, "n_frames", 1)) != 1:
                got = f"an image of {frames} frames"
                raise refusal(str(path), got=got, expected="one picture", fix="Save one of them.")
            size = shape if resize is None else (resize, resize)
            shape = size if image.mode == "L" else (*size, 3)
            if row == 0:
                room = len(paths) * int(np.prod(shape, dtype=object))
                check_room(str(path.parent.parent), room, None if resize else sum(map(_size, paths)))
                pixels, first = np.empty((len(paths), *shape), np.uint8), f"{what}, as {path.name}"
            elif shape != pixels.shape[1:]:
                fix = "Bring all images to one size and mode."
                if resize is None and len(shape) == pixels.ndim - 1:
                    side = min(*shape[:2], *pixels.shape[1:3])
                    fix = f"Resize them: --resize {side} (resize={side})."
                raise refusal(str(path), got=what, expected=first, fix=fix)
            try:
                pixels[row] = np.asarray(image if resize is None else _square(image, resize))
                turned += image.format == "JPEG" and image.getexif().get(_ORIENTATION, 1) != 1
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged files
                raise _unreadable(path, error) from error
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2), turned


def _square(image: Any, side: int) -> Any:
    """The image with its shorter side resized, and the square in its center; halves of a pixel go to the right."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + side, top + side))


def _size(path: Path) -> int:
    """Bytes of a file; 0 for what cannot be read, which is refused when its turn comes."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open an image: its header is read and checked, its pixels are not."""
    from PIL import Image

    handle, size = open_data(path, "a PNG or JPEG image")
    with handle:
        if size > _LARGEST:
            expected = f"a PNG or JPEG image of at most {_LARGEST:,} bytes"
            raise refusal(str(path), got=f"{size:,} bytes", expected=expected, fix="Replace it.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(handle, formats=("PNG", "JPEG"))
        except Exception as error:  # as above
            raise _unreadable(path, error) from error
        with image:
            yield image


def _unreadable(path: Path, error: Exception) -> Exception:
    from PIL import UnidentifiedImageError

    got, fix = f"an image that cannot be read ({error})", "Replace it."
    if isinstance(error, UnidentifiedImageError):  # its text is the object that was read from
        got, fix = "a file that cannot be read as PNG or JPEG, whatever its name", "Convert or replace it."
    return refusal(str(path), got=got, expected="an intact PNG or JPEG image", fix=fix)
