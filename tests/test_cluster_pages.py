"""The files to copy in docs/how-to/clusters run, with processes of this machine in place of the cluster's."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_gram_command
import yaml
from processes import THERE
from store_case import files_of
from test_gram_command import WORDS

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(not THERE, reason="a POSIX system")
PAGES = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "clusters"
ARGUMENTS = [str(word) for word in ("net.py:make", *WORDS)]

place, whole = test_gram_command.place, test_gram_command.whole


def block(page: str, language: str) -> str:
    """The file to copy: the first block of its language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", (PAGES / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def environment(folder: Path) -> dict[str, str]:
    """Commands of this Python first, and those of a folder before them."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry)])
    return {**os.environ, "PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_several_gpus(place, whole, tmp_path):
    script = block("gpus", "sh")
    assert script.count("--device cuda") == 1
    (tmp_path / "gpus.sh").write_text(script.replace("--device cuda", "--device cpu"))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\necho 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    out, port = tmp_path / "store", free_port()
    words = ["sh", tmp_path / "gpus.sh", *ARGUMENTS, "--out", out]
    how = {"cwd": place, "env": environment(tmp_path) | {"PORT": f"{port}"}, "capture_output": True, "text": True}
    done = subprocess.run([str(word) for word in words], timeout=300, start_new_session=True, **how)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(whole)
    end = time.monotonic() + 30
    while not ended(port):
        assert time.monotonic() < end, "the scheduler outlives the script"
        time.sleep(0.1)


JOBQUEUE = '''
from distributed import LocalCluster

class SLURMCluster(LocalCluster):
    """Two processes in place of jobs."""

    def __init__(self, cores, processes, memory, walltime):
        assert (cores, processes) == (1, 1)
        super().__init__(n_workers=0, threads_per_worker=cores, dashboard_address=":0", memory_limit=None)

    def adapt(self, minimum_jobs, maximum_jobs):
        assert minimum_jobs == maximum_jobs == 32
        self.scale(2)
'''


def test_slurm(place, whole, tmp_path):
    (tmp_path / "slurm.py").write_text(block("slurm", "py"))
    (tmp_path / "dask_jobqueue.py").write_text(JOBQUEUE)
    words = [sys.executable, tmp_path / "slurm.py", *ARGUMENTS, "--out", tmp_path / "store"]
    how = {"cwd": place, "env": environment(tmp_path), "capture_output": True, "text": True}
    done = subprocess.run([str(word) for word in words], timeout=300, **how)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "store") == files_of(whole)


def test_kubernetes(place, whole, tmp_path):
    documents = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(block("kubernetes", "yaml"))}
    port = free_port()

    def command(kind: str, name: str) -> list[str]:
        container = documents[kind, name]["spec"]["template"]["spec"]["containers"][0]
        return [word.replace("tcp://scheduler:8786", f"tcp://127.0.0.1:{port}") for word in container["command"]]

    service = documents["Service", "scheduler"]["spec"]
    labels = documents["Deployment", "scheduler"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels
    assert service["ports"] == [{"port": 8786}]
    for (kind, _), document in documents.items():
        if kind == "Deployment":
            spec = document["spec"]
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    scheduler = [word.replace("8786", f"{port}") for word in command("Deployment", "scheduler")]
    gram = command("Job", "gram")
    assert gram[2:6] == ["net.py:make", "set.npz", "--out", "kernel"]
    gram[2:] = [*ARGUMENTS, "--out", str(tmp_path / "store"), *gram[-2:]]
    how = {"cwd": place, "env": environment(tmp_path)}
    commands = [scheduler, *[command("Deployment", "workers")] * 2]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(words, **how, **quiet) for words in commands]
    try:
        while ended(port):
            assert started[0].poll() is None
            time.sleep(0.05)
        done = subprocess.run(gram, capture_output=True, text=True, timeout=300, **how)
        assert done.returncode == 0, done.stderr
        assert files_of(tmp_path / "store") == files_of(whole)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)
