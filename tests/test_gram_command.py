"""`ntkit gram` and `ntkit verify`: a user's module to a matrix on disk, whoever computes and whoever is killed."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from processes import THERE, Running, command
from safetensors.torch import save_file
from store_case import files_of, tiles_in

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.trust import code_of_user
from ntkit.commands.gram_on_disk import gram
from ntkit.commands.settings import GramSettings
from ntkit.commands.verify import summary, verify, without_whole_tiles
from ntkit.gram.named_kernel import NamedKernel
from ntkit.gram.tile_files import TileFiles
from ntkit.networks.built_in import build

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(not THERE, reason="needs SIGKILL and fork")

NETWORK = '''
"""A user's own convolutional network, and a part of it in a file beside."""
import os, time
from torch import nn
from scaled import Scaled

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.rest = nn.Sequential(nn.GELU(), nn.Conv2d(6, 8, 3, stride=2), nn.GELU(), nn.Flatten(), Scaled(32, outputs))

    def forward(self, x):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return self.rest(self.first(x))

def make(outputs):
    return Net(outputs)
'''
BESIDE = """
from torch import nn

class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)
"""
TILE, N = 20, 300  # 120 tiles
WORDS = ["digits", "--train", N, "--tile", TILE, "--memory", "50 MB"]  # a plan that does not depend on free memory


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the user's files."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(NETWORK)
    (folder / "scaled.py").write_text(BESIDE)
    return folder


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The store of an undisturbed command in one process."""
    done = command("gram", "net.py:make", *WORDS, "--out", "whole", cwd=place).done()
    assert done.returncode == 0, done.stderr
    return place / "whole"


def begun(place: Path, out: Path, tiles: int, *more: object, **how: Any) -> Running:
    """The command, slow enough to be disturbed, when it has computed some tiles."""
    words = ["gram", "net.py:make", *WORDS, "--out", out, *more]
    running = command(*words, cwd=place, env={"PAUSE": "0.1", "PYTHONWARNINGS": "ignore"}, **how)
    assert running.until(lambda: tiles_in(out) >= tiles), running.stderr
    return running


def workers_of(running: Running) -> list[psutil.Process]:
    below = psutil.Process(running.pid).children(recursive=True)
    return [p for p in below if "spawn_main" in " ".join(p.cmdline())]


def test_two_workers_one_killed_then_the_whole_run_then_resumed(place, whole, tmp_path):
    out = tmp_path / "store"
    running = begun(place, out, 20, "--workers", 2)
    workers = workers_of(running)
    assert len(workers) == 2
    os.kill(random.Random(0).choice(workers).pid, signal.SIGKILL)
    assert running.until(lambda: tiles_in(out) >= 60)
    below = workers_of(running)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    psutil.wait_procs(below, timeout=30)
    there = tiles_in(out)
    assert 60 <= there < 120
    done = command("gram", "net.py:make", *WORDS, "--out", out, "--workers", 2, cwd=place).done()
    assert done.returncode == 0, done.stderr
    assert f"of which {there} are there" in done.stderr
    assert files_of(out) == files_of(whole)


def test_interrupted_it_says_how_far_it_is_and_goes_on(place, whole, tmp_path):
    out = tmp_path / "store"
    running = begun(place, out, 10)
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130
    there = tiles_in(out)
    assert f"stopped with {there} of 120 tiles; the same call goes on" in running.stderr
    assert "Traceback" not in running.stderr
    done = command("gram", "net.py:make", *WORDS, "--out", out, cwd=place).done()
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(whole)


def test_interrupted_in_a_terminal_the_workers_say_nothing(place, whole, tmp_path):
    """Ctrl-C there reaches the command and all of its workers at once."""
    out = tmp_path / "store"
    running = begun(place, out, 20, "--workers", 2, first=os.setsid)
    assert all(os.getpgid(worker.pid) == running.pid for worker in workers_of(running))
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait() == 130
    lines = [line for line in running.stderr.splitlines() if not line.startswith("kernel matrix: ")]
    assert re.fullmatch(r"stopped with \d+ of 120 tiles; the same call goes on", lines[-1])
    assert len(lines) == 4, lines  # size, time, workers, this
    done = command("gram", "net.py:make", *WORDS, "--out", out, cwd=place).done()
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(whole)


class Terminals:
    """A scheduler with two workers, each started as in a terminal and a folder of its own."""

    def __init__(self, folder: Path) -> None:
        dask, file = Path(sys.executable).with_name("dask"), folder / "scheduler.json"
        words = [["scheduler", "--port", "0", "--scheduler-file", file, "--no-dashboard"]]
        words += [["worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard", "--no-nanny"]] * 2
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "PAUSE": "0.1", "OMP_NUM_THREADS": "1"}
        self.processes = []
        for number, arguments in enumerate(words):
            (own := folder / f"terminal {number}").mkdir()
            with open(own / "log", "w") as log:
                command = [str(word) for word in (dask, *arguments)]
                self.processes.append(subprocess.Popen(command, cwd=own, env=environment, stderr=log))
        while not file.exists():
            assert self.processes[0].poll() is None, (folder / "terminal 0" / "log").read_text()
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(timeout=60)


@pytest.fixture
def terminals(tmp_path) -> Iterator[Terminals]:
    there = Terminals(tmp_path)
    yield there
    there.close()


def test_a_scheduler_and_workers_started_by_hand_then_it_is_killed_midway(place, whole, terminals, tmp_path):
    words = ["gram", "net.py:make", *WORDS, "--out", tmp_path / "store", "--scheduler", terminals.address]
    done = command(*words, cwd=place).done()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[12] workers?$", done.stderr, re.M)
    assert "120 tiles computed" in done.stderr
    assert files_of(tmp_path / "store") == files_of(whole)
    out = tmp_path / "other"
    running = begun(place, out, 10, "--scheduler", terminals.address)
    terminals.processes[0].kill()
    assert running.wait() == 2
    assert "scheduler: got one that is gone" in running.stderr
    assert "Traceback" not in running.stderr
    terminals.close()
    done = command("gram", "net.py:make", *WORDS, "--out", out, cwd=place).done()
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(whole)


# ---------------------------------------------------------------------- what it says


def test_what_it_says(place, whole, tmp_path):
    done = command("gram", "net.py:make", *WORDS, "--out", whole, cwd=place).done()
    assert "of which 120 are there: 0.0 MB on the disk" in done.stderr
    K = ntkit.GramStore.open(whole)
    assert f"{N} x {N} in float32" in done.stdout
    assert K.checksum[:16] in done.stdout
    assert eval(done.stdout.strip().rpartition("K = ")[2]).shape == (N, N)
    lines: list[str] = []
    gram(f"{place}/net.py:make", "digits", GramSettings(train=100, tile=10), out=tmp_path / "s", say=lines.append)
    assert lines[0].startswith("100 samples, 55 tiles of 10 x 10 in float32: 0.0 MB on the disk, which has ")
    assert re.fullmatch(r"about \d+ s, by the first tiles", lines[1])
    assert lines[2].startswith("55 tiles computed in ")


@pytest.mark.parametrize("outputs", ["trace", "sum", "full"])
def test_weights_dtype_and_outputs(outputs, place, tmp_path):
    network = named(place).kernel.settings()["model"]
    tensors = {name: 0.1 * torch.randn_like(p) for name, p in network.state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    settings = GramSettings(train=12, weights=tmp_path / "w.safetensors", dtype="float64", outputs=outputs, tile=5)
    K = gram(f"{place}/net.py:make", "digits", settings, out=tmp_path / "s")
    network.load_state_dict(tensors)
    x = ntkit.data.load("digits", train=12).x_train
    expected = ntkit.Gram(ntkit.TangentKernel(network.double(), outputs=outputs)(x.double()))
    assert K.dtype == torch.float64
    torch.testing.assert_close(K.dense(), expected.dense())


def named(place: Path) -> NamedKernel:
    name = f"{place}/net.py:make"
    with code_of_user({"--model": name}):
        network = build(name, (1, 8, 8), 10, 0)
        return NamedKernel.of(
            network, name, shape=(1, 8, 8), classes=10, seed=0, vocabulary=None, outputs="trace", dtype="float32",
            device="cpu", memory="50 MB",
        )  # fmt: skip


def test_a_npy_file_stays_on_disk(place, tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(30, 1, 8, 8)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    K = gram(f"{place}/net.py:make", f"{tmp_path}/x.npy", GramSettings(tile=8), out=tmp_path / "s")
    assert K.shape == (30, 30)
    for array, message in ((x.astype("f8"), "float64 of shape"), (x[:, 0, 0, 0], r"of shape \[30\]"), (x == 0, "bool")):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(Refused, match=message):
            gram(f"{place}/net.py:make", f"{tmp_path}/x.npy", GramSettings(), out=tmp_path / "other")
    with pytest.raises(Refused, match=r"--train: got a \.npy file"):
        gram(f"{place}/net.py:make", f"{tmp_path}/x.npy", GramSettings(train=3), out=tmp_path / "other")


# ---------------------------------------------------------------------- the user's code


def test_other_code_is_another_matrix(place, whole, tmp_path):
    """A changed `forward` has the same parameters: the hash of the file tells."""
    for name in ("net.py", "scaled.py"):
        shutil.copy(place / name, tmp_path)
    settings = GramSettings(train=40, tile=20)
    out = tmp_path / "s"
    gram(f"{tmp_path}/net.py:make", "digits", settings, out=out)
    gram(f"{place}/net.py:make", "digits", settings, out=out)  # the same file elsewhere
    (tmp_path / "net.py").write_text(NETWORK.replace("self.rest(", "3 * self.rest("))
    with pytest.raises(Refused, match=r"a kernel matrix of another model.*, code"):
        gram(f"{tmp_path}/net.py:make", "digits", settings, out=out)


def test_a_worker_refuses_code_that_is_not_the_senders(place, tmp_path):
    for name in ("net.py", "scaled.py"):
        shutil.copy(place / name, tmp_path)
    sent = named(tmp_path)
    (tmp_path / "net.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(Refused, match=r"--model .*net.py:make: got [0-9a-f]{64} .*Let all workers see the same file"):
        _ = sent.kernel
    (tmp_path / "net.py").unlink()
    with pytest.raises(Refused, match=r"net\.py"):
        _ = sent.kernel


def test_no_code_travels(place, tmp_path):
    """The pickle of a kernel by name holds numbers and names; its module is not needed to read it."""
    sent = named(place)
    assert isinstance(sent.kernel, ntkit.TangentKernel)
    names = [argument for _, argument, _ in pickletools.genops(pickle.dumps(sent)) if isinstance(argument, str)]
    assert not [name for name in names if "ntkit_user" in name or "torch" in name]


def test_refusals(tmp_path):
    for settings, message in (
        (GramSettings(outputs="diagonal"), "--outputs: got 'diagonal'"),
        (GramSettings(dtype="float16"), "--dtype: got 'float16'"),
        (GramSettings(device="tpu"), "--device: got 'tpu'"),
        (GramSettings(train=0), "--train: got 0"),
        (GramSettings(workers=0), "--workers: got 0"),
        (GramSettings(tile=0), "--tile: got 0"),
        (GramSettings(workers=2, scheduler="tcp://127.0.0.1:1"), "a number and a scheduler"),
        (GramSettings(weights="none.safetensors"), "none.safetensors"),
        (GramSettings(memory="much"), "memory: got 'much'"),
    ):
        with pytest.raises(Refused, match=message):
            gram("linear", "digits", settings, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------- verify


def test_verify_lists_what_is_wrong(whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "run" / "kernel")
    assert {record.status for record in verify(copy)} == {"ok"}
    assert summary(verify(copy)) == "121 files: 121 ok"
    (copy / "c" / "0" / "1").unlink()
    blob = bytearray((copy / "c" / "2" / "3").read_bytes())
    blob[77] ^= 1
    (copy / "c" / "2" / "3").write_bytes(blob)
    (copy / "mine.txt").touch()
    for folder, prefix in ((copy, ""), (tmp_path / "run", "kernel/")):
        listed = {record.file: record.status for record in without_whole_tiles(verify(folder))}
        bad = {"c/0/1": "missing", "c/2/3": "damaged", "mine.txt": "not ntkit's", "zarr.json": "ok"}
        assert listed == {prefix + name: status for name, status in bad.items()}
    done = command("verify", copy).done()
    assert done.returncode == 1
    assert "122 files: 119 ok, 1 damaged, 1 missing, 1 not ntkit's" in done.stdout
    description = copy / "zarr.json"
    description.write_text(description.read_text().replace("trace", "Trace"))
    assert {r.file: r.status for r in verify(copy) if r.status == "damaged"} == {"zarr.json": "damaged"}


def test_the_description_says_what_was_asked(whole):
    said = TileFiles(whole).settings
    assert said["model"] == "net.py:make"
    assert said["train"] == N
    assert set(said["identity"]) == {"model file"}
