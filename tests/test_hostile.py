"""Hostile and odd files: nothing of them runs, none takes memory or time, every refusal is one line."""

from __future__ import annotations

import os
import resource
import signal
import traceback
import warnings
from random import Random

import numpy as np
import pytest
import torch
from hostile_files import EITHER, MARK, REFUSED, X, Y, folder_of_images, mnist, npz, png, write

import ntkit
from ntkit.commands.infinite_width import infinite
from ntkit.commands.settings import InfiniteSettings
from ntkit.data import from_tensors, load

MEMORY, SECONDS, END = 2**30, 60, b"\0\n"
SLOW = ("npz_bomb", "npz_entries_overlap", "npz_table_of_contents_is_huge", "image_text_bomb", "gz_of_tiny_members")


def in_a_child(calls) -> tuple[list[str], int]:
    """How each file is met, "opened" or a refusal or a traceback, and by how many bytes the process grew meanwhile."""
    read, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: none of them matters here
        child = os.fork()
    if child == 0:
        try:
            with open("/proc/self/statm") as handle:
                pages = [int(number) * resource.getpagesize() for number in handle.read().split()]
            resource.setrlimit(resource.RLIMIT_AS, (pages[0] + 4 * MEMORY,) * 2)  # spares the machine
            warnings.simplefilter("ignore")
            for call in calls:
                signal.alarm(SECONDS)  # ends the process
                os.write(send, how_it_is_met(call).encode(errors="backslashreplace")[:60_000] + END)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages[1]
            os.write(send, str(max(0, grown)).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(read, "rb") as handle:
        *texts, grown = handle.read().split(END)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"file {len(texts)}: ended by signal {status}: it hangs, or it crashed"
    return [text.decode() for text in texts], int(grown)


def how_it_is_met(call) -> str:
    try:
        found = call()
        return "opened" if lawful(found) else f"wrong: {found}"
    except ntkit.Refused as refused:
        return f"refused: {refused}"
    except BaseException:
        return traceback.format_exc()


def lawful(found) -> bool:
    """What the data's own description promises."""
    if not isinstance(found, ntkit.data.Data):
        return False
    labels = torch.cat([found.y_train, found.y_test])
    inputs = torch.cat([found.x_train.flatten(1), found.x_test.flatten(1)]).double()
    known = labels.isfinite() if found.targets else (labels >= 0) & (labels < len(found.classes))
    return len(labels) == len(inputs) and bool(known.all() and inputs.isfinite().all())


def check(cases, folder) -> None:
    """Judge files, each a name and a seed. One process meets them all: it grows by what the hungriest takes."""
    calls = []
    for name, seed in cases:
        place = folder / f"{name}-{seed}"
        place.mkdir()
        calls.append((REFUSED | EITHER)[name](Random(seed), place))
    texts, grown = in_a_child(calls)
    for (name, seed), text in zip(cases, texts, strict=True):
        allowed = ("refused: ",) if name in REFUSED else ("refused: ", "opened")
        assert text.startswith(allowed), (name, seed, text)
        assert "\n" not in text
        assert text.isprintable()
        assert "; expected " in text or text == "opened"
    assert grown < MEMORY
    assert not list(folder.rglob(MARK))


@pytest.mark.parametrize("name", [*REFUSED, *EITHER])
def test_hostile_files(name, tmp_path):
    check([(name, seed) for seed in range(2 if name in SLOW else 12)], tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(6))
def test_many_hostile_files(seed, tmp_path):
    """Each kind six times, with other numbers: 186 files."""
    check([(name, 1000 + seed) for name in (*REFUSED, *EITHER)], tmp_path)


def test_the_law_would_notice():
    hungry = lambda: bytearray(2 * MEMORY).find(1)
    broken = lambda: [][0]
    (text, _), grown = in_a_child([hungry, broken])
    assert grown > MEMORY
    assert "wrong" in text
    assert "IndexError" in in_a_child([broken])[0][0]
    with pytest.raises(AssertionError, match="file 1: ended by signal 9"):
        in_a_child([broken, lambda: os.kill(os.getpid(), signal.SIGKILL)])


# --- odd, and right ---


def test_odd_arrays_that_are_right(tmp_path):
    plain = load(write(tmp_path / "plain.npz", npz(x=X, y=Y)))
    odd = {
        "compressed": npz(True, x=X, y=Y),
        "columns": npz(x=np.asfortranarray(X), y=Y),
        "big": npz(x=X.astype(">f8"), y=Y.astype(">i2")),
        "more": npz(x=X, y=Y, note=np.array("text"), z=np.array([{}], dtype=object)),
        "strided": npz(x=np.repeat(X, 2, 1)[:, ::2], y=Y),
    }
    for name, blob in odd.items():
        assert load(write(tmp_path / f"{name}.npz", blob)).hash == plain.hash, name
    cube = np.arange(120.0).reshape(20, 2, 3)
    one, other = (load(write(tmp_path / "a.npz", npz(x=x, y=Y))) for x in (cube, np.asfortranarray(cube)))
    assert one.hash == other.hash


def test_one_class_or_one_example_each(tmp_path):
    alone = load(write(tmp_path / "a.npz", npz(x=X, y=0 * Y)))
    assert alone.classes == ("0",)
    with pytest.raises(ntkit.Refused, match="at least two classes"):
        ntkit.analyze(ntkit.Settings(data=str(tmp_path / "a.npz"), model="linear"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ntkit.Refused, match="at least two classes"):
        infinite(InfiniteSettings(data=str(tmp_path / "a.npz")))
    single = npz(x_train=X[:2], y_train=Y[:2], x_test=X[:2], y_test=Y[:2])
    assert len(load(write(tmp_path / "b.npz", single)).y_train) == 2


def test_a_photograph_is_read_as_stored(tmp_path):
    """Viewers turn it by its EXIF orientation; we do not, as the documentation says."""
    from PIL import Image

    call = folder_of_images(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    Image.fromarray(pixels).save(tmp_path / "set" / "ant" / "0.png", exif=exif)
    stored = torch.from_numpy(pixels)[None] / 255
    data = call()
    assert any(torch.equal(image, stored) for image in torch.cat([data.x_train, data.x_test]))


def test_names_that_no_report_can_show_are_refused_before_training(tmp_path):
    for name in ("data", "data_dir", "model", "weights"):
        with pytest.raises(ntkit.Refused, match=f"--{name.replace('_', '-')}: .*that can be printed"):
            ntkit.analyze(ntkit.Settings(**{name: "a\udcff.npz"}), out=tmp_path / "run")
    with pytest.raises(ntkit.Refused, match=r"--out: .*not UTF-8"):
        ntkit.analyze(out=str(tmp_path / "run\udcff"))
    with pytest.raises(ntkit.Refused, match=r"class_names: .*the character '.n'"):
        from_tensors((X, Y), class_names=["a", "two\nlines"])


def test_odd_names_that_are_right(tmp_path):
    sets = tmp_path / ("Leerzeichen, 名前, é, <b>&amp;" * 4)
    folder_of_images(tmp_path)
    (tmp_path / "set").rename(sets)
    (sets / "ant").rename(sets / ("a" * 250))
    settings = {"model": "linear", "epochs": 1, "train": 4, "test": 2, "track_points": 4, "probe_points": 2}
    folder = ntkit.analyze(ntkit.Settings(data=str(sets), **settings), out=tmp_path / "名前 é")
    assert (folder / "report.html").exists()
    assert len(ntkit.Settings(data="d" * 300, model="m" * 200 + ".py:f").slug()) == 60


def test_places_for_results_that_cannot_be(tmp_path):
    write(tmp_path / "file", b"")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "file/below", "pipe", "n" * 300, "n" * 300 + "/below"):
        with pytest.raises(ntkit.Refused, match="folder"):
            ntkit.analyze(ntkit.Settings(model="linear", train=10, epochs=1), out=tmp_path / name)


def test_very_many_classes(tmp_path):
    for i in range(1200):
        for j in range(2):
            write(tmp_path / "set" / f"class {i}" / f"{j}.png", png())
    assert len(load(tmp_path / "set").classes) == 1200


def test_a_gzip_file_is_unpacked_no_further_than_its_header_says(tmp_path, monkeypatch):
    import gzip

    from ntkit.data import readers

    blob = mnist(tmp_path)["train-images-idx3-ubyte"]
    write(tmp_path / "train-images-idx3-ubyte", gzip.compress(blob) + gzip.compress(bytes(10**7)) * 9)
    unpacked = []
    readinto = readers._Gunzip.readinto

    def counted(self, buffer):
        unpacked.append(readinto(self, buffer))
        return unpacked[-1]

    monkeypatch.setattr(readers._Gunzip, "readinto", counted)
    with pytest.raises(ntkit.Refused, match="trailing bytes"):
        load("mnist", data_dir=tmp_path)
    assert sum(unpacked) < 2**18
