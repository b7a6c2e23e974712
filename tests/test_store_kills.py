"""Kernels on disk after kills, full disks and damage: the same bytes, or a refusal that names the tile."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import store_case
import torch
from processes import THERE, forked, script
from store_case import TILE, N, counted, create, files_of, samples, tiles_in
from torch import nn

import ntkit
from ntkit.base.checks import Damaged, Refused
from ntkit.gram import tile_files, tile_work
from ntkit.gram.tile_files import TileFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed store."""
    return create(tmp_path_factory.mktemp("store") / "whole").path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


# ---------------------------------------------------------------------- room on the disk


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    tile = TILE * TILE * 4 + 4
    free = {"free": 7 * tile}  # 10 tiles are needed; 3 x 4 / 2 fit
    monkeypatch.setattr(tile_work.shutil, "disk_usage", lambda place: type("Usage", (), free))
    with pytest.raises(Refused, match=r"Take at most 15 samples, or a folder on a larger disk\. All .*operator"):
        create(tmp_path / "s")
    double = ntkit.TangentKernel(nn.Linear(6, 1).double(), outputs="trace")
    for room, said in ((10 * tile, "it fits: "), (9 * tile, "it is half: ")):
        free["free"] = room  # ten tiles of float64 need nearly twice that of float32
        with pytest.raises(Refused, match=f"In float32 .*{said}"):
            ntkit.GramStore.create(tmp_path / "s", double, samples().double(), tile=TILE)
    assert not (tmp_path / "s").exists()
    free["free"] = 10 * tile
    store = create(tmp_path / "s")
    free["free"] = 18 * 18 * 4 - 1
    with pytest.raises(Refused, match=r"K\.npy"):
        store.export(tmp_path / "K.npy")
    assert not (tmp_path / "K.npy").exists()
    shutil.rmtree(store.path / "c" / "0")
    free["free"] = 3 * tile
    with pytest.raises(Refused, match="of tiles for 18 samples"):
        create(store.path)
    free["free"] = 4 * tile  # those that are there need no room
    assert create(store.path).verify() == []


@pytest.mark.parametrize("tiles", [0, 4])
def test_a_disk_that_fills_up_leaves_whole_tiles(tiles, whole, tmp_path, monkeypatch):
    written = []

    def full(path, value, exclusive=False):
        if len(written) == tiles:
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}.1.partial").write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        return original(path, value, exclusive)

    import zarr.storage._local as local

    original = local._put
    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(Refused, match="No space left on device while writing"):
        create(tmp_path / "s")
    monkeypatch.setattr(local, "_put", original)
    assert len(ntkit.GramStore.open(tmp_path / "s").verify()) == 10 - tiles
    create(tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(whole)


def at_most_eight_kilobytes() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))


FILLED = """
import sys, ntkit, torch
k = ntkit.TangentKernel(torch.nn.Linear(6, 1), outputs="trace")
try:
    ntkit.GramStore.create(sys.argv[1], k, torch.rand(60, 6))
except ntkit.Refused as refused:
    print(refused)
"""


@pytest.mark.skipif(not THERE, reason="needs fork")
def test_a_real_limit_on_the_size_of_a_file(tmp_path):
    """Of the operating system: the description fits, the only tile (14 kB) does not."""
    done = script(FILLED, tmp_path / "s", first=at_most_eight_kilobytes).done()
    assert "c/0/0: got File too large while writing" in done.stdout, done
    assert (tmp_path / "s" / "zarr.json").exists()
    assert not list(tmp_path.rglob("*.partial"))


# ---------------------------------------------------------------------- kills


def started(folder: Path, n: int = N, last: int | None = None) -> BaseProcess:
    return forked(store_case.killed, folder, n, last, folder.with_suffix(".log"))


def ended(child: BaseProcess, folder: Path) -> int | None:
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
    return child.exitcode


def check_resumed(folder: Path, whole: Path, monkeypatch, n: int = N) -> None:
    """After a kill: what is there is whole; the rest, and nothing else, is computed; then all bytes are the same."""
    there, tiles = 0, len(ntkit.GramStore.open(whole)._files.grid.tiles)
    if (folder / "zarr.json").exists():
        bad = ntkit.GramStore.open(folder).verify()
        assert {b.reason for b in bad} <= {"missing"}
        there = tiles - len(bad)
    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(TileFiles, "write", counted(TileFiles.write, computed))
        create(folder, n)
    assert len(computed) == tiles - there
    assert files_of(folder) == files_of(whole)


@pytest.mark.skipif(not THERE, reason="needs SIGKILL and fork")
def test_killed_before_each_file_operation_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Three tiles, two a side, the last not whole."""
    n = TILE + 3
    whole = create(tmp_path / "whole", n).path
    assert ended(started(tmp_path / "once", n), tmp_path / "once") == 0
    assert files_of(tmp_path / "once") == files_of(whole)
    operations = int((tmp_path / "once.log").read_text())
    assert operations >= 20  # the folder, its description, and three tiles
    for last in range(operations):
        folder = tmp_path / f"{last}"
        assert ended(started(folder, n, last), folder) == -signal.SIGKILL
        check_resumed(folder, whole, monkeypatch, n)


@pytest.mark.fuzz
@pytest.mark.skipif(not THERE, reason="needs SIGKILL and fork")
def test_killed_at_random_times_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Four times, each after some of 1,275 tiles more."""
    n, draw = 250, random.Random(0)
    whole, folder = create(tmp_path / "whole", n).path, tmp_path / "killed"
    for _ in range(4):
        there = tiles_in(folder)
        child, wanted = started(folder, n), there + draw.randrange(1, 200)
        while tiles_in(folder) < wanted:
            assert child.is_alive()
        child.kill()
        assert ended(child, folder) == -signal.SIGKILL
        bad = ntkit.GramStore.open(folder).verify()
        assert {b.reason for b in bad} == {"missing"}
        assert len(bad) < 1275 - there
    check_resumed(folder, whole, monkeypatch, n)


# ---------------------------------------------------------------------- damage


def damage(file: Path, draw: random.Random) -> str:
    """Change a file at random, and say how."""
    blob = bytearray(file.read_bytes())
    how = draw.choice(["flip", "truncate", "append", "zeros", "delete", "empty", "swap"])
    place = draw.randrange(len(blob))
    if how == "flip":
        blob[place] ^= 1 << draw.randrange(8)
    elif how == "truncate":
        del blob[place:]
    elif how == "append":
        blob += bytes([draw.randrange(1, 256)])
    elif how == "zeros":
        end = min(len(blob), place + draw.randrange(1, 64))
        changed = any(blob[place:end])
        blob[place:end] = bytes(end - place)
        if not changed:
            blob[place] = 1
    elif how == "delete":
        file.unlink()
        return how
    elif how == "empty":
        blob.clear()
    else:
        other = (place + 1) % len(blob)
        if blob[place] == blob[other]:
            blob[place] ^= 255
        else:
            blob[place], blob[other] = blob[other], blob[place]
    file.write_bytes(blob)
    return how


def says(blob: bytes) -> Any:
    """What a JSON file says; another value each time where it is none."""
    try:
        return json.loads(blob)
    except ValueError:
        return object()


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_found_named_and_repaired(seed, copy, whole):
    draw = random.Random(seed)
    names = sorted(files_of(whole))
    name = "zarr.json" if seed % 5 == 0 else draw.choice([n for n in names if n != "zarr.json"])
    before = (copy / name).read_bytes()
    how = damage(copy / name, draw)
    if name == "zarr.json" and how != "delete" and says((copy / name).read_bytes()) == says(before):
        assert ntkit.GramStore.open(copy).checksum == ntkit.GramStore.open(whole).checksum  # white space alone
        return
    if name == "zarr.json":
        with pytest.raises(Refused, match=r"zarr\.json") as refused:
            ntkit.GramStore.open(copy)
        assert isinstance(refused.value, Damaged) or how == "delete"
        with pytest.raises(Refused):
            create(copy)
        return
    i, j = (int(part) for part in name.split("/")[1:])
    store = ntkit.GramStore.open(copy)
    assert [bad[:2] for bad in store.verify()] == [(i, j)]
    for read in (store.dense, lambda: store.rows([i * TILE]), lambda: store @ torch.ones(N)):
        with pytest.raises(Damaged, match=rf"c/{i}/{j}: got tile \({i}, {j}\)"):
            read()
    create(copy)
    assert files_of(copy) == files_of(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array["codecs"].append({"name": "numcodecs.pickle"}),
        lambda array: array.update(shape=[N, 3]),
        lambda array: array.update(data_type="float64"),
        lambda array: array["attributes"]["ntkit"].update(grid={"n": N}),
        lambda array: array["attributes"]["ntkit"].update(plan={"steps": [{"run": "code"}]}),
        lambda array: array.pop("codecs"),
    ],
)
def test_a_description_by_someone_else_is_refused_before_zarr_reads_it(change, copy, monkeypatch):
    """Also with a right checksum: codecs are code, found by name."""
    array = json.loads((copy / "zarr.json").read_text())
    del array["attributes"]["ntkit"]["checksum"]
    change(array)
    (copy / "zarr.json").write_bytes(tile_files._sealed(json.dumps(array).encode()))
    monkeypatch.setattr("zarr.open_array", None)
    with pytest.raises(Damaged, match=r"zarr\.json: got a damaged file: (an array of another kind|of another format)"):
        ntkit.GramStore.open(copy)
