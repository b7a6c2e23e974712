"""`Replay` of changed runs, of files that are gone, of what a record does not tell: refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from replay_case import (
    ADAM,
    F32,
    F64,
    OPTIMIZERS,
    SGD,
    D,
    N,
    check_updates,
    checked,
    data,
    edit,
    halved,
    loop,
    mlp,
    mse,
    of_loop,
    same,
    summed,
)
from run_folders import as_an_earlier_version_wrote
from safetensors.torch import load_file, save_file
from torch import nn

from ntkit.base.checks import Refused
from ntkit.trajectory import Trajectory, record, train
from ntkit.trajectory.replay import Replay

# Files that are changed here are those of an earlier version: with checksums they are refused when they are read.
pytestmark = pytest.mark.filterwarnings("ignore::ntkit.base.integrity.WithoutChecksum")


def scaled(folder, step, factor, name="0.weight"):
    as_an_earlier_version_wrote(folder)
    file = folder / "snapshots" / f"step-{step:08d}.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[1] *= factor
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kept", ["log", "all"])
def test_a_changed_snapshot(tmp_path, kept, dtype):
    train(mlp(dtype=dtype), data(dtype), mse, ADAM, 9, batch_size=4, record=kept, path=tmp_path / "run")
    for step in (0, 1, 4, 8, 9):
        shutil.copytree(tmp_path / "run", tmp_path / str(step))
        scaled(tmp_path / str(step), step, 1 + 1e-3)
        wanted = rf"snapshot of step {step} in {step}: got '0.weight' different from its replay by \d.*changed snapshot"
        if step == 0:
            wanted = r"step-00000000.safetensors: got a damaged file: a network with hash"
        with pytest.raises(Refused, match=wanted):
            checked(tmp_path / str(step), model=mlp(dtype=dtype), data=data(dtype))


def test_rounding_of_one_step_is_accepted_and_no_more(tmp_path):
    for kept in ("all", "log"):
        train(mlp(), data(), mse, OPTIMIZERS["momentum"], 9, batch_size=4, record=kept, path=tmp_path / kept)
        scaled(tmp_path / kept, 8, 1 + 1e-10)
    replay, recorded = checked(tmp_path / "all"), Trajectory.open(tmp_path / "all").state(8)
    assert not replay.bitwise
    steps = {step.step: step for step in replay.backwards()}
    assert same(steps[8].before, recorded)
    assert same(steps[7].after, recorded)
    model = mlp()
    model.load_state_dict(recorded)  # the replay went on from there
    outputs = model(steps[8].x)
    assert torch.equal(steps[8].slope, torch.autograd.grad(mse(outputs, data()[1][steps[8].rows]), outputs)[0])
    with pytest.raises(Refused, match=r"snapshot of step 8.*record='all'"):  # step 7 was not recorded
        checked(tmp_path / "log")


def test_a_run_that_is_exact_at_its_last_step_alone_is_not_bitwise(tmp_path):
    still = lambda step: float(step < 8)  # the last step changes nothing: both snapshots are off by the same
    train(mlp(), data(), mse, SGD, 9, batch_size=4, record="all", schedule=still, path=tmp_path / "run")
    assert checked(tmp_path / "run").bitwise
    for step in (8, 9):
        scaled(tmp_path / "run", step, 1 + 1e-10)
    assert not checked(tmp_path / "run").bitwise


def test_rounding_of_parameters_that_hardly_move(tmp_path):
    tiny = lambda p: torch.optim.SGD(p, lr=1e-13)  # an update of some 1e-14, of parameters of some 0.5
    for folder, factor in (("rounding", 1 + 2.0**-52), ("more", 1 + 2.0**-46)):
        train(mlp(), data(), mse, tiny, 4, record="all", path=tmp_path / folder)
        scaled(tmp_path / folder, 3, factor)
    assert not checked(tmp_path / "rounding").bitwise
    with pytest.raises(Refused, match="snapshot of step 3"):
        checked(tmp_path / "more")


def test_a_file_that_is_gone_or_another(tmp_path):
    train(mlp(), data(), mse, ADAM, steps=9, batch_size=4, path=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "run" / "snapshots" / "step-00000006.safetensors").unlink()
    with pytest.raises(
        Refused, match=r"got no snapshot of step 6; expected one at each recorded step \(record='log'\)"
    ):
        checked(tmp_path / "run")
    as_an_earlier_version_wrote(tmp_path / "other")
    file = tmp_path / "other" / "snapshots" / "step-00000006.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"2.bias": torch.zeros(3)}, file)
    with pytest.raises(Refused, match=r"step 6 in other: got '2.bias' \[\[3\], 'torch.float32'\]"):
        checked(tmp_path / "other")
    save_file({name: t for name, t in tensors.items() if name != "2.bias"}, file)
    with pytest.raises(Refused, match=r"step-00000006.safetensors: got a damaged file: no tensor '2.bias'"):
        checked(tmp_path / "other")
    (tmp_path / "other" / "losses.safetensors").unlink()
    with pytest.raises(Refused, match=r"losses.safetensors: got a damaged file: no such file"):
        checked(tmp_path / "other")
    loop(tmp_path / "loop")
    (tmp_path / "loop" / "log" / "00000000.safetensors").unlink()
    with pytest.raises(Refused, match=r"00000000.safetensors: got a damaged file: no step 0 in it"):
        checked(tmp_path / "loop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["settings"].update(seed=1), "snapshot of step 1 .*batches \\(seed\\)"),
        (lambda run: run["settings"].update(clip=0.1), "snapshot of step 1 .*clip"),
        (
            lambda run: run["settings"]["optimizer"]["groups"][0].update(lr=0.3),
            r"optimizer.groups.0.lr in run.json.*0.3",
        ),
        (lambda run: run["settings"]["optimizer"]["groups"][0].update(momentum=0.8), "step 2 .*optimizer settings"),
        (lambda run: run["settings"].update(data="0" * 64), "data: got other data, or the same in another order"),
        (lambda run: run["settings"].update(loss="l1"), "loss: got mse; expected l1"),
        (lambda run: run["settings"]["parameters"].update({"0.bias": [[8], "torch.float64"]}), "model: got '0.bias'"),
        (lambda run: run.update(initial="0" * 64), "00000000.safetensors: got a damaged file: a network with hash"),
        (lambda run: run.update(status="running"), "got a run that is running or was killed"),
    ],
    ids=lambda value: "" if callable(value) else value.split()[0],
)
def test_a_changed_run_json(tmp_path, change, message):
    train(mlp(), data(), mse, OPTIMIZERS["momentum"], steps=9, batch_size=4, clip=50.0, path=tmp_path)
    assert checked(tmp_path).bitwise
    edit(tmp_path, change)
    with pytest.raises(Refused, match=message):
        checked(tmp_path)


def test_other_rates_in_the_log(tmp_path):
    for name, more in (("constant", {}), ("scheduled", {"schedule": halved})):
        train(mlp(), data(), mse, SGD, steps=6, path=tmp_path / name, **more)
        as_an_earlier_version_wrote(tmp_path / name)
        file = tmp_path / name / "losses.safetensors"
        tensors = load_file(file)
        tensors["learning_rates"][4] *= 1.01
        save_file(tensors, file)
    with pytest.raises(Refused, match=r"optimizer.groups.0.lr in run.json.*got 0.1; expected 0.101"):
        checked(tmp_path / "constant")
    with pytest.raises(Refused, match=r"snapshot of step 6 .*optimizer settings"):
        checked(tmp_path / "scheduled")


def test_other_data_loss_model_or_clip(tmp_path):
    (x, y), trajectory = data(), train(mlp(), data(), mse, ADAM, steps=4, batch_size=4, clip=1.0)
    for other in ((x.flip(0), y.flip(0)), (x, y + 1e-9), ((x,), y.float())):
        with pytest.raises(Refused, match="data: got other data, or the same in another order"):
            Replay(trajectory, data=other)
    with pytest.raises(Refused, match="data: got 10 examples; expected the 11"):
        Replay(trajectory, data=(x[:10], y[:10]))
    with pytest.raises(Refused, match="data: got Tensor"):
        Replay(trajectory, data=x)
    with pytest.raises(Refused, match="loss: got summed; expected mse"):
        Replay(trajectory, loss=summed)
    with pytest.raises(Refused, match="loss: got a float"):
        Replay(trajectory, loss=1.0)
    with pytest.raises(Refused, match=r"clip: got a max norm of 0.5; expected 1.0"):
        Replay(trajectory, clip=0.5)
    with pytest.raises(Refused, match=r"clip: got -1; expected a finite norm > 0"):
        Replay(trajectory, clip=-1)
    assert Replay(trajectory, clip=1.0).n == N
    with pytest.raises(Refused, match="model: got str"):
        Replay(trajectory, model="mlp")
    with pytest.raises(Refused, match=r"model: got '2.weight' absent"):
        Replay(trajectory, model=nn.Sequential(nn.Linear(D, 7)).double())
    with pytest.raises(Refused, match=r"model: got '0.weight' \[\[7, 3\], 'torch.float32'\]"):
        Replay(trajectory, model=mlp(dtype=F32))
    spoilt = mlp()
    spoilt.kept = spoilt[0].weight * 2
    with pytest.raises(Refused, match="model: got a module that cannot be copied"):
        Replay(trajectory, model=spoilt)

    def mse2(outputs, y):
        return 2 * mse(outputs, y)

    mse2.__qualname__ = "mse"
    with pytest.raises(Refused, match=r"snapshot of step [1-4] .*loss"):  # Adam hides the factor, but for eps and clip
        Replay(trajectory, loss=mse2).check()


def test_what_a_recorded_loop_does_not_tell(tmp_path):
    (x, y), trajectory = data(), loop(tmp_path / "run")
    for given in ({"loss": summed}, {"data": (x.flip(0), y.flip(0))}, {"clip": 0.1}):
        with pytest.raises(Refused, match=r"snapshot of step 1 in run: got '.*' different from its replay"):
            of_loop(trajectory, **given).check()
    with pytest.raises(
        Refused, match=r"batch of step 0: got rows \d to \d+; expected rows of the training set, 0 to 4"
    ):
        of_loop(trajectory, data=(x[:5], y[:5])).check()
    with pytest.raises(Refused, match="batch of step 0: got a step recorded without indices"):
        of_loop(loop(tmp_path / "without", indices=False)).check()
    shutil.copytree(tmp_path / "run", tmp_path / "thin")
    (tmp_path / "thin" / "snapshots" / "step-00000003.safetensors").unlink()
    with pytest.raises(Refused, match="got no snapshot of step 3"):
        of_loop(Trajectory.open(tmp_path / "thin"))
    warm = OPTIMIZERS["momentum"]

    def used(params):
        opt = warm(params)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    with pytest.raises(Refused, match=r"snapshot of step 1 .*an optimizer that was not new"):
        of_loop(loop(tmp_path / "warm", used)).check()


def test_a_group_added_during_the_run(tmp_path):
    model, (x, y) = mlp(), data()
    opt = SGD([model[2].weight])
    with record(model, opt, tmp_path) as rec:
        for step in range(4):
            if step == 2:
                opt.add_param_group({"params": [model[0].weight], "lr": 0.01})
            mse(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            rec.step(torch.arange(N))
    with pytest.raises(Refused, match=r"learning rates of .*: got \[4, 2\].*each of 1 groups"):
        checked(tmp_path)


def test_runs_that_ended_early(tmp_path):
    def target(limit):
        return train(mlp(), data(), mse, SGD, steps=50, target_loss=limit)

    first = target(None).losses[7].item()
    trajectory = target(first)
    assert trajectory.stop == {"reason": "target", "step": 7, "loss": first}
    check_updates(Replay(trajectory), 1e-12)
    none = Replay(target(1e9))
    assert (list(none.backwards()), none.steps, none.bitwise) == ([], 0, True)

    wild = lambda p: torch.optim.SGD(p, lr=1e60)
    trajectory = train(mlp(nn.Identity(), nn.Linear(7, 7)), data(), mse, wild, steps=9)
    assert trajectory.status == "diverged"
    assert 0 < Replay(trajectory).steps < 9
    check_updates(Replay(trajectory), 1e-12)

    trajectory = loop(tmp_path, lambda p: torch.optim.SGD(p, lr=1e70), record="all")
    assert trajectory.status == "diverged"
    replay = of_loop(trajectory)
    assert replay.steps == trajectory.stop["diverged_at"] < trajectory.stop["step"]
    assert len(list(replay.backwards())) == replay.steps
    assert all(bool(torch.isfinite(t).all()) for t in replay.final().values())


def test_a_loop_that_is_not_finite_and_did_not_say_so(tmp_path):
    model, (x, y) = mlp(), data()
    opt = torch.optim.SGD(model.parameters(), lr=1e170)
    with record(model, opt, tmp_path, record="all") as rec:
        for _ in range(4):
            opt.zero_grad()
            mse(model(x), y).backward()
            opt.step()
            rec.step(torch.arange(N))
    assert Trajectory.open(tmp_path).status == "complete"
    with pytest.raises(Refused, match=r"loss of step \d: got (inf|nan); expected a finite|values that are not finite"):
        checked(tmp_path)
