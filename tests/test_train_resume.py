"""`train` interrupted and resumed: the same bytes after a kill at every step, Ctrl-C, a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import textwrap
from importlib import import_module
from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from train_case import OPTIMIZERS, SGD, Noisy, data, halved, mlp, mse, same_bits

from ntkit.base.checks import Refused
from ntkit.base.files import write_json
from ntkit.trajectory import Trajectory, train


def eval_loss(model, load, step):
    load(model, step)
    model.eval()
    with torch.no_grad():
        return mse(model(data()[0]), data()[1]).item()


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def always_checkpoint(monkeypatch):
    monkeypatch.setattr(import_module("ntkit.trajectory.run_writer"), "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(import_module("ntkit.trajectory.run_writer"), "CHECKPOINT_SHARE", math.inf)


def test_a_scheduled_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    always_checkpoint(monkeypatch)
    arguments = (data(), mse, OPTIMIZERS["adam"], 9)
    how = {"batch_size": 4, "schedule": halved}

    def stop(step, loss):
        if step == 5:
            raise RuntimeError("stop")

    train(mlp(), *arguments, path=tmp_path / "whole", **how)
    with pytest.raises(RuntimeError, match="stop"):
        train(mlp(), *arguments, path=tmp_path / "run", **how, on_step=stop)
    assert Trajectory.open(tmp_path / "run").learning_rates.flatten().tolist() == [0.02] * 3 + [0.01] * 2
    with pytest.raises(Refused, match=r"schedule \(was halved, now null\)"):
        train(mlp(), *arguments, path=tmp_path / "run", batch_size=4, resume=True)
    train(mlp(), *arguments, path=tmp_path / "run", **how, resume=True)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("often", [True, False])
@pytest.mark.parametrize("early", [False, True])
def test_resume_after_a_kill_at_any_step_gives_the_same_bytes(tmp_path, monkeypatch, often, early):
    if often:
        always_checkpoint(monkeypatch)
    args = (data(), mse, OPTIMIZERS["adam"])
    settings = dict(steps=13, batch_size=4, seed=4, record="log")
    if early:  # a loss that is first reached at the end of epoch 2 or 3
        probe = Noisy()
        free = train(probe, *args, **(settings | dict(record="all"))).load
        settings["target_loss"] = max(eval_loss(probe, free, step) for step in (6, 9)) * (1 + 1e-9)
    whole, killed_at = tmp_path / "whole", [0, 1, 5, 6, 12]

    def copy_disk(step, loss):
        if step in killed_at:  # what a kill at this moment would leave
            shutil.copytree(whole, tmp_path / f"killed-{step}")

    model = Noisy()
    uninterrupted = train(model, *args, path=whole, on_step=copy_disk, **settings)
    copies = sorted(tmp_path.glob("killed-*"))
    assert len(copies) >= 3 if early else len(copies) == 5
    assert uninterrupted.stop["reason"] == ("target" if early else "steps")
    assert not early or uninterrupted.stop["step"] in (6, 9)
    for folder in copies:
        assert Trajectory.open(folder).status == "running"
        (folder / "snapshots" / "step-00000099.safetensors.ntkit-part").write_bytes(b"half")
        fresh, steps = Noisy(), []
        with torch.no_grad():
            for p in fresh.parameters():
                p.add_(1.0)  # the checkpoint counts, not what the model holds
        train(fresh, *args, path=folder, resume=True, on_step=lambda step, loss, to=steps: to.append(step), **settings)
        assert same_bits(fresh.state_dict(), model.state_dict())
        assert fresh.calls == model.calls == uninterrupted.stop["step"]
        assert bytes_of(folder) == bytes_of(whole)
        if often:
            assert steps[0] == int(folder.name.removeprefix("killed-"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_resume_after_a_real_kill(tmp_path):
    script = """
        import math, os, signal, sys
        import torch
        sys.path.insert(0, sys.argv[1])
        import train_case as t
        from ntkit.trajectory import train
        import ntkit.trajectory.run_writer as run
        run.CHECKPOINT_SECONDS, run.CHECKPOINT_SHARE = 0.0, math.inf
        kill = lambda step, loss: step == 6 and os.kill(os.getpid(), signal.SIGKILL)
        train(t.Noisy(), t.data(), t.mse, t.OPTIMIZERS["momentum"], 9, batch_size=4, path=sys.argv[2], on_step=kill)
    """
    here = Path(__file__).resolve().parent
    done = processes.script(textwrap.dedent(script), here, tmp_path / "killed").done()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    models = [Noisy(), Noisy()]
    steps: list[int] = []
    for model, name in zip(models, ("killed", "whole"), strict=True):
        train(
            model,
            data(),
            mse,
            OPTIMIZERS["momentum"],
            9,
            batch_size=4,
            path=tmp_path / name,
            resume=True,
            on_step=lambda step, loss: steps.append(step),
        )
    assert steps == [6, 7, 8, *range(9)]
    assert same_bits(models[0].state_dict(), models[1].state_dict())
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_a_kill_before_the_first_checkpoint(tmp_path):
    folder = tmp_path / "run"

    def stop(step, loss):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(mlp(), data(), mse, SGD, steps=3, path=folder, on_step=stop)
    (folder / "checkpoint.safetensors").unlink()
    other = mlp()
    nn.init.zeros_(other[0].bias)
    with pytest.raises(Refused, match="got initial parameters with hash"):
        train(other, data(), mse, SGD, steps=3, path=folder, resume=True)
    train(mlp(), data(), mse, SGD, steps=3, path=folder, resume=True)
    train(mlp(), data(), mse, SGD, steps=3, path=tmp_path / "whole")
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("how", ["raised", "signal"])
def test_ctrl_c_keeps_the_last_finished_step(tmp_path, how):
    folder = tmp_path / "run"
    calls = 0

    def loss(outputs, y):
        nonlocal calls
        calls += 1
        if how == "signal" and calls == 8:  # one trial call, then step 6: in the middle of a step
            signal.raise_signal(signal.SIGINT)
        return mse(outputs, y)

    def on_step(step, loss):
        if how == "raised" and step == 6:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(mlp(), data(), loss, SGD, steps=9, path=folder, on_step=on_step)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(Trajectory.open(folder).losses) == 6  # steps 0 to 5 are done
    seen = []
    train(mlp(), data(), loss, SGD, steps=9, path=folder, resume=True, on_step=lambda step, loss: seen.append(step))
    assert seen == [6, 7, 8]
    train(mlp(), data(), loss, SGD, steps=9, path=tmp_path / "whole")
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_ctrl_c_in_the_last_step_is_not_lost(tmp_path):
    class Interrupting(torch.optim.SGD):
        def step(self, closure=None):
            signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    with pytest.raises(KeyboardInterrupt):
        train(mlp(), data(), mse, lambda p: Interrupting(p, lr=0.1), steps=1, path=tmp_path / "run")
    assert Trajectory.open(tmp_path / "run").status == "complete"


def test_resume_of_an_ended_run_loads_it(tmp_path):
    model = mlp()
    traj = train(model, data(), mse, SGD, steps=4, path=tmp_path / "run")
    before, fresh = bytes_of(tmp_path / "run"), mlp()
    again = train(fresh, data(), mse, SGD, steps=4, path=tmp_path / "run", resume=True, on_step=lambda *_: 1 / 0)
    assert same_bits(fresh.state_dict(), model.state_dict())
    assert bytes_of(tmp_path / "run") == before
    assert again.losses.tolist() == traj.losses.tolist()


def test_resume_with_something_else_is_refused(tmp_path):
    (x, y), folder = data(), tmp_path / "run"
    train(mlp(), (x, y), mse, SGD, steps=4, path=folder)
    with pytest.raises(Refused, match=r"holds a run.*Pass resume=True"):
        train(mlp(), (x, y), mse, SGD, steps=4, path=folder)
    for change, message in [
        (dict(steps=5), r"steps \(was 4, now 5\)"),
        (dict(seed=1, steps=4), r"seed \(was 0, now 1\)"),
        (dict(steps=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.2)), r"optimizer.defaults.lr \(was 0.1, now 0.2\)"),
        (dict(steps=4, data=(x, y + 1)), r"data \(was \w"),
        (
            dict(steps=4, model=mlp(nn.Linear(7, 7).double())),
            r"parameters.3.weight \(was absent, now \[\[1, 7\], \"torch.float64\"\]\)",
        ),
    ]:
        arguments = dict(model=mlp(), data=(x, y), optimizer=SGD) | change
        with pytest.raises(Refused, match=message):
            train(loss=mse, path=folder, resume=True, **arguments)
    write_json(folder / "run.json", {"format": "other"})
    with pytest.raises(Refused, match=r"got format other; expected ntkit-trajectory"):
        Trajectory.open(folder)


@pytest.mark.parametrize("failing", ["run.json", "step-00000004", "checkpoint", "losses"])
def test_a_full_disk_leaves_no_half_file_and_the_run_can_go_on(tmp_path, monkeypatch, failing):
    always_checkpoint(monkeypatch)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(mlp(), data(), mse, SGD, steps=6, path=whole)
    fsync, files = os.fsync, import_module("ntkit.base.files")
    room = 3

    def full(descriptor):
        nonlocal room
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            room -= 1
            if room <= 0 or failing != "checkpoint":
                raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("finds the file written through /proc")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Refused, match="No space left on device"):
        train(mlp(), data(), mse, SGD, steps=6, path=folder)
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert not list(folder.rglob("*.ntkit-part"))
    train(mlp(), data(), mse, SGD, steps=6, path=folder, resume=True)
    assert bytes_of(folder) == bytes_of(whole)


def test_a_state_in_another_dtype_than_its_parameter_resumes_to_the_same_bits(tmp_path):
    def stop(step, loss):
        if step == 6:
            raise KeyboardInterrupt

    nadam = lambda p: torch.optim.NAdam(p, lr=0.05)  # a product in float32, of parameters in float64
    options = dict(steps=12, path=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(mlp(), data(), mse, nadam, on_step=stop, **options)
    train(model := mlp(), data(), mse, nadam, resume=True, **options)
    plain, (x, y) = mlp(), data()
    opt = nadam(list(plain.parameters()))
    for _ in range(12):
        opt.zero_grad()
        mse(plain(x), y).backward()
        opt.step()
    assert same_bits(model.state_dict(), plain.state_dict())
