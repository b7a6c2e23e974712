"""Kernel matrices on disk by several processes: the same bytes, whoever computes and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import store_case
import torch
from processes import THERE, forked
from store_case import TILE, create, files_of, kernel, samples, tiles_in

import ntkit
from ntkit.base.checks import Refused
from ntkit.gram import tile_workers

pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
pytestmark = pytest.mark.skipif(not THERE, reason="needs SIGKILL and fork")
SIZE = 150  # 465 tiles


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The store of an undisturbed process without workers."""
    return create(tmp_path_factory.mktemp("store") / "whole", SIZE).path


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=None) as cluster:
        yield cluster.scheduler_address


def begun(folder: Path) -> BaseProcess:
    """A process with three workers that has computed some tiles."""
    np.save(folder.with_name("samples.npy"), samples(SIZE).numpy())
    log = folder.with_suffix(".log")
    child = forked(store_case.with_workers, folder, SIZE, log)
    while tiles_in(folder) < 20:
        assert child.is_alive(), log.read_text()
        time.sleep(0.01)
    return child


def workers_of(child: BaseProcess) -> list[psutil.Process]:
    """Its processes that compute: those of Dask that Python started by itself, but for those that watch resources."""
    below = psutil.Process(child.pid).children(recursive=True)
    return [p for p in below if "spawn_main" in " ".join(p.cmdline())]


def test_a_worker_killed_midway_changes_no_byte(whole, tmp_path):
    folder = tmp_path / "store"
    child = begun(folder)
    workers = workers_of(child)
    assert len(workers) == 3
    os.kill(random.Random(0).choice(workers).pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == 0, folder.with_suffix(".log").read_text()
    assert files_of(folder) == files_of(whole)


def test_a_run_killed_with_its_workers_goes_on(whole, tmp_path):
    folder = tmp_path / "store"
    child = begun(folder)
    workers = workers_of(child)
    child.kill()
    child.join()
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers), "workers outlive their run"
    bad = ntkit.GramStore.open(folder).verify()
    assert {b.reason for b in bad} == {"missing"}
    create(folder, SIZE)
    assert files_of(folder) == files_of(whole)


def test_workers_of_a_scheduler(whole, cluster, tmp_path):
    store = ntkit.GramStore.create(
        tmp_path / "s", kernel(), samples(SIZE), scheduler=cluster, tile=TILE, memory="50 MB"
    )
    assert files_of(store.path) == files_of(whole)
    again = ntkit.GramStore.create(tmp_path / "s", kernel(), samples(SIZE), scheduler="tcp://none:1", tile=TILE)
    assert torch.equal(again.dense(), store.dense())  # complete: nobody is asked


def test_tiles_that_fail_are_told_at_the_end(cluster, tmp_path, capfd):
    x = samples(17)
    torch.manual_seed(0)
    k = ntkit.TangentKernel(store_case.Stubborn(), outputs="trace")
    x[12, 0] = -9.0  # of the third of four rows
    with pytest.raises(Refused, match=r"4 of 10 tiles that failed 4 times, .*these samples are too"):
        ntkit.GramStore.create(tmp_path / "s", k, x, scheduler=cluster, tile=TILE)
    assert "Traceback" in capfd.readouterr().err
    bad = ntkit.GramStore.open(tmp_path / "s").verify()
    assert [tuple(b) for b in bad] == [(i, j, "missing") for i, j in [(0, 2), (1, 2), (2, 2), (2, 3)]]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_refusals(tmp_path):
    for workers in (0, True, "two"):
        with pytest.raises(Refused, match="workers: got"):
            ntkit.GramStore.create(tmp_path / "s", kernel(), samples(), workers=workers, tile=TILE)
    with pytest.raises(Refused, match="workers: got a number and a scheduler"):
        ntkit.GramStore.create(tmp_path / "s", kernel(), samples(), workers=2, scheduler="tcp://127.0.0.1:1", tile=TILE)
    assert not (tmp_path / "s").exists()
    with pytest.raises(Refused, match="scheduler: got nonsense://here"):
        ntkit.GramStore.create(tmp_path / "s", kernel(), samples(), scheduler="nonsense://here", tile=TILE)
    assert dask.config.get("scheduler", None) is None  # such a client would wait for it for ever


def test_the_users_own_arrays_are_not_computed_by_its_workers(cluster):
    for scheduler in (None, cluster):
        with tile_workers._client(1, scheduler, None):
            assert dask.config.get("scheduler", None) is None


def test_copies_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    """Samples of 432 bytes and three tiles of 104; a memmap has no copies."""
    x = samples(18).numpy()
    np.save(tmp_path / "x.npy", x)
    free = 5 * (x.nbytes + 3 * (TILE * TILE * 4 + 4)) - 1
    monkeypatch.setattr("ntkit.gram.tile_work.free_memory", lambda device: free)
    with pytest.raises(Refused, match=r"workers: got 5 x .*Take at most 4 workers\. Give samples as a numpy\.memmap"):
        ntkit.GramStore.create(tmp_path / "s", kernel(), x, workers=5, tile=TILE, memory="50 MB")
    assert not list((tmp_path / "s").glob("c/*/*"))
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert tile_workers.copied_bytes(tile_workers.by_file_names(on_disk, samples(18))) == 0
    assert tile_workers.copied_bytes(tile_workers.by_file_names(x, samples(18))) == x.nbytes
    several = {"a": on_disk, "b": (x, torch.from_numpy(x)), "c": None, "d": 3}
    assert tile_workers.copied_bytes(tile_workers.by_file_names(several, samples(18))) == 2 * x.nbytes


def test_a_gpu_for_each_task_where_workers_say_which_have_one():
    class Client:
        def __init__(self, *resources):
            self.workers = {str(i): {"resources": own} for i, own in enumerate(resources)}

        def scheduler_info(self):
            return {"workers": self.workers}

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tile_workers._resources(Client({"GPU": 1}), cpu) is None
    assert tile_workers._resources(Client({}, {"GPU": 1.0}), cuda) == {"GPU": 1}
    assert tile_workers._resources(Client({}, {"memory": 3}), cuda) is None


def test_dask_draws_from_a_generator_of_its_own(monkeypatch):
    """Its event loop would change the state by which a network that draws random numbers is known."""
    import types

    module = types.ModuleType("distributed.example")
    exec("import random\nfrom random import randint", vars(module))
    monkeypatch.setitem(sys.modules, "distributed.example", module)
    before = random.getstate()
    module.random.random(), module.randint(0, 9)
    assert random.getstate() != before
    tile_workers._keep_global_generator()
    before = random.getstate()
    assert 0 <= module.random.random() < 1
    assert 0 <= module.randint(0, 9) <= 9
    assert random.getstate() == before


def test_arrays_on_disk_go_by_their_names(tmp_path):
    """A part of one is sent by its values: its place in the file is not what it says."""
    x = np.arange(24.0).reshape(6, 4)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "f.npy", np.asfortranarray(x))
    for name in ("x", "f"):
        whole = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        sent = tile_workers.by_file_names({"a": whole, "b": whole[2:], "c": x}, {})
        assert not isinstance(sent["a"], np.ndarray)
        np.testing.assert_array_equal(sent["a"].open(), x)
        np.testing.assert_array_equal(sent["b"], x[2:])
        assert sent["c"] is x
