"""`record` interrupted and resumed: kills at every file operation, exceptions, a full disk."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import signal
import textwrap
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import processes
import pytest
import torch
from record_case import (
    UNTIL,
    Net,
    adam,
    advance,
    batch,
    bytes_of,
    data,
    factor,
    options,
    run,
    same_bits,
    state_of,
)
from torch import nn

from ntkit.base.checks import Refused
from ntkit.base.tensors import read_tensors_and_metadata
from ntkit.trajectory import Trajectory, record


def always_checkpoint(monkeypatch):
    monkeypatch.setattr(import_module("ntkit.trajectory.run_writer"), "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(import_module("ntkit.trajectory.run_writer"), "CHECKPOINT_SHARE", math.inf)


def resumed(folder):
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # the checkpoint counts, not what the model holds
    if not (folder / "checkpoint.safetensors").exists():
        model = Net()
    run(model, adam(model), resume=True, **options(folder))
    return model


def test_resume_after_a_kill_at_any_file_operation_gives_the_same_bytes(tmp_path, monkeypatch):
    """Before and after every rename and removal the folder is copied: that is what a kill there would leave."""
    monkeypatch.setattr(import_module("ntkit.trajectory.step_log"), "SEGMENT", 4)
    calls = itertools.count()
    monkeypatch.setattr(
        import_module("ntkit.trajectory.run_writer").CheckpointTimer, "due", lambda *_: next(calls) % 3 == 1
    )
    whole, left = tmp_path / "whole", {}

    def copied(change):
        def wrapper(path, *args, **kwargs):
            for moment in ("before", "after"):
                if moment == "after":
                    change(path, *args, **kwargs)
                if whole.exists() and whole in Path(path).parents:
                    now = bytes_of(whole)
                    folder = tmp_path / f"killed-{len(left)}"
                    if left.setdefault(tuple(now.items()), folder) == folder and "run.json" in now:
                        shutil.copytree(whole, folder)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(import_module("ntkit.base.files").os, "replace", copied(os.replace))
        patch.setattr(Path, "unlink", copied(Path.unlink))
        model = Net()
        run(model, adam(model), **options(whole))
    folders = [folder for folder in left.values() if folder.exists()]
    assert len(folders) > 50
    kinds = set()
    for folder in folders:
        before = Trajectory.open(folder)
        if before.status == "running" and (folder / "checkpoint.safetensors").exists():
            rest = read_tensors_and_metadata(folder / "checkpoint.safetensors")[1]
            assert len(before.losses) >= rest["step"]
            kinds |= {"log ahead"} if len(before.losses) > rest["step"] else set()
            kinds |= {"snapshots ahead"} if before.steps[-1] > rest["step"] else set()
            kinds |= {"snapshots given up"} if set(map(int, rest["kept"])) - set(before.steps) else set()
        else:
            kinds.add(before.status)
        fresh = resumed(folder)
        assert same_bits(state_of(fresh), state_of(model))
        assert bytes_of(folder) == bytes_of(whole)
    assert kinds == {"log ahead", "snapshots ahead", "snapshots given up", "running", "complete"}


def test_resume_where_much_was_written_after_the_checkpoint(tmp_path, monkeypatch):
    """Snapshots of before the checkpoint are given up after it: a resumed run must choose the same ones again."""
    monkeypatch.setattr(import_module("ntkit.trajectory.step_log"), "SEGMENT", 3)
    now, until = 0, 20
    monkeypatch.setattr(import_module("ntkit.trajectory.run_writer").CheckpointTimer, "due", lambda *_: now == 3)
    settings = dict(record="all", budget=options(None)["budget"])

    def on_step(step):
        nonlocal now
        now = step + 1
        if step > 5 and step % 3 == 0:
            shutil.copytree(tmp_path / "whole", tmp_path / f"killed-{step}")

    run(model := Net(), adam(model), tmp_path / "whole", until, on_step=on_step, **settings)
    now, states = 0, []
    for folder in sorted(tmp_path.glob("killed-*")):
        shutil.copytree(folder, tmp_path / "short")
        for copied, end in [(folder, until), (tmp_path / "short", 4)]:
            fresh, traj = Net(), Trajectory.open(copied)
            assert len(traj.losses) > 4
            traj = run(fresh, adam(fresh), copied, end, resume=True, **settings)
            states.append(traj.steps)
            assert len(list((copied / "log").iterdir())) == math.ceil(end / 3)
            assert len(traj.losses) == len(traj.learning_rates) == traj.steps[-1] == end
            assert same_bits(traj.state(end), state_of(fresh))
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "short")
    assert len(states) == 10


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["loop", "snapshot", "log", "checkpoint"])
def test_resume_after_a_real_kill(tmp_path, moment):
    script = """
        import math, os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import record_case as t
        import ntkit.base.files as files
        import ntkit.trajectory.run_writer as run
        run.CHECKPOINT_SECONDS, run.CHECKPOINT_SHARE = 0.0, math.inf
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        moment, steps, fsync = sys.argv[3], [], os.fsync
        def dying(descriptor):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if len(steps) == 6 and moment in name.replace("step-", "snapshot-"):
                die()
            return fsync(descriptor)
        files.os.fsync = dying
        def on_step(step):
            steps.append(step)
            if moment == "loop" and step == 6:
                die()
        model = t.Net()
        t.run(model, t.adam(model), on_step=on_step, **t.options(Path(sys.argv[2])))
    """
    if not Path("/proc/self/fd").exists():
        pytest.skip("finds the file written through /proc")
    here, killed = Path(__file__).resolve().parent, tmp_path / "killed"
    done = processes.script(textwrap.dedent(script), here, killed, moment).done()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    model = resumed(killed)
    whole = run(other := Net(), adam(other), **options(tmp_path / "whole"))
    assert same_bits(state_of(model), state_of(other))
    assert bytes_of(killed) == bytes_of(tmp_path / "whole")
    assert whole.learning_rates.tolist() == [[0.05 * factor(s), 0.01 * factor(s)] for s in range(UNTIL)]
    assert all(torch.equal(whole.batch(s), batch(s)) for s in range(UNTIL))


def broken_off(folder, where):
    """A loop with an exception at step 6, before or after that step is recorded."""
    model = Net()
    opt = adam(model)

    def stop(*_):
        raise KeyboardInterrupt

    with record(model, opt, folder, record=[0]) as rec:
        for step in range(UNTIL):
            if where == "forward" and step == 6:
                model(data()[0])  # running statistics have moved
                stop()
            if where == "update" and step == 6:
                opt.register_step_post_hook(stop)
                opt._optimizer_step_post_hooks.move_to_end(list(opt._optimizer_step_post_hooks)[-1], last=False)
            rows, loss = advance(model, opt, step)
            if where == "before rec.step" and step == 6:
                stop()
            rec.step(rows, loss)
            if where == "after rec.step" and step == 5:
                stop()


@pytest.mark.parametrize("where", ["forward", "update", "before rec.step", "after rec.step"])
def test_an_exception_leaves_a_run_that_goes_on(tmp_path, where):
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "run", where)
    assert Trajectory.open(tmp_path / "run").status == "running"
    assert len(Trajectory.open(tmp_path / "run").losses) == 6
    started, fresh = [], Net()
    with record(fresh, opt := adam(fresh), tmp_path / "run", record=[0], resume=True) as rec:
        started.append(rec.done)
        for step in range(rec.done, UNTIL):
            rec.step(*advance(fresh, opt, step))
    # Amid a step, or where its rows are unknown, there is nothing sound to keep: the checkpoint before counts.
    assert started == [6 if "after" in where or where == "forward" else 0]
    whole = run(other := Net(), adam(other), tmp_path / "whole", UNTIL, scheduled=False, record=[0])
    assert same_bits(whole.state(UNTIL), Trajectory.open(tmp_path / "run").state(UNTIL))
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


def test_a_full_disk(tmp_path, monkeypatch):
    files, fsync, room = import_module("ntkit.base.files"), os.fsync, 12
    whole = run(other := Net(), adam(other), **options(tmp_path / "whole"))

    def full(descriptor):
        nonlocal room
        room -= 1
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    always_checkpoint(monkeypatch)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Refused, match="No space left on device"):
        run(model := Net(), adam(model), **options(tmp_path / "run"))
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert 0 < len(Trajectory.open(tmp_path / "run").losses) < UNTIL
    resumed(tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(whole.path)


def test_resume_of_an_ended_run_loads_it(tmp_path):
    run(model := Net(), adam(model), tmp_path / "run", 4)
    before, fresh = bytes_of(tmp_path / "run"), Net()
    opt = adam(fresh)
    with record(fresh, opt, tmp_path / "run", resume=True) as rec:
        assert rec.done == 4
        assert same_bits(state_of(fresh), state_of(model))
        advance(fresh, opt, 4)
        with pytest.raises(Refused, match=r"rec\.step: got a step of a run that has ended.*in another folder"):
            rec.step()
    assert bytes_of(tmp_path / "run") == before


def test_resume_with_something_else_is_refused(tmp_path):
    run(model := Net(), adam(model), tmp_path / "run", 4)
    with pytest.raises(Refused, match=r"holds a run.*Pass resume=True"), record(model, adam(model), tmp_path / "run"):
        pass
    sgd = torch.optim.SGD(model.parameters())
    for changed, message in [
        ((model, sgd), r'optimizer\.class \(was torch\.optim\.adam\.Adam, now torch\.optim\.sgd\.SGD\)'),
        ((wide := nn.Linear(2, 2), torch.optim.Adam(wide.parameters())), r"parameters\.first\.weight \(was \[\[6, 3\]"),
    ]:  # fmt: skip
        with pytest.raises(Refused, match=message), record(*changed, tmp_path / "run", resume=True):
            pass
    with pytest.raises(Refused, match=r"record \(was log, now 2\)"):
        run(model, adam(model), tmp_path / "run", 4, record=2, resume=True)


def test_groups_that_came_on_the_way_cannot_be_resumed(tmp_path):
    model, (x, y) = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double(), data()
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with suppress(KeyError), record(model, opt, tmp_path / "run") as rec:
        opt.add_param_group({"params": model[1].parameters()})
        ((model(x) - y) ** 2).mean().backward()
        opt.step()
        rec.step()
        raise KeyError
    start = state_of(fresh := nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double())
    opt = torch.optim.SGD(fresh[0].parameters(), lr=0.1)
    message = r"got groups of \[2, 2\] parameters in its checkpoint; expected \[2\]"
    with pytest.raises(Refused, match=message), record(fresh, opt, tmp_path / "run", resume=True):
        pass
    assert same_bits(state_of(fresh), start)
