"""`record` around plain loops: what is recorded equals what was; budget; refusals. Kills: test_record_resume.py."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
import torch
from record_case import (
    F64,
    N,
    Net,
    adam,
    advance,
    batch,
    bytes_of,
    data,
    factor,
    run,
    same_bits,
    state_of,
)
from torch import nn

from ntkit.base.checks import Refused
from ntkit.trajectory import Trajectory, record
from ntkit.trajectory.snapshots import snapshot_rule, snapshot_steps, surplus_snapshots

# --- the same bits as the loop without a recorder ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16])
def test_snapshots_are_the_states_of_the_plain_loop(tmp_path, dtype):
    model, plain = Net(dtype), Net(dtype)
    opt, plain_opt = adam(model), adam(plain)
    with record(model, opt, tmp_path / "run", record="all") as rec:
        for step in range(rec.done, 7):
            rec.step(*advance(model, opt, step, dtype))
            assert rec.done == step + 1
    states, losses = [state_of(plain)], []
    for step in range(7):
        losses.append(advance(plain, plain_opt, step, dtype)[1].item())
        states.append(state_of(plain))
    traj = Trajectory.open(tmp_path / "run")
    assert (traj.steps, traj.status) == (list(range(8)), "complete")
    assert traj.stop == {"reason": "ended", "step": 7, "loss": None}
    for step, state in enumerate(states):
        assert same_bits(traj.state(step), state)
        assert torch.equal(traj.state(step)["again.weight"], traj.state(step)["middle.weight"])
    assert int(traj.state(7)["calls"]) == 7
    assert traj.state(0)["norm.running_mean"].ne(traj.state(7)["norm.running_mean"]).all()
    assert traj.losses.tolist() == losses
    assert traj.learning_rates.tolist() == [[0.05, 0.01]] * 7
    assert all(torch.equal(traj.batch(step), batch(step)) for step in range(7))
    fresh = Net(dtype)
    traj.load(fresh, 7)
    assert same_bits(state_of(fresh), states[7])


def test_nothing_of_model_and_optimizer_is_changed(tmp_path):
    model = Net()
    opt = adam(model)

    def hooks():
        return [dict(h) for h in (opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks, model._forward_hooks)]

    before, state, rng = hooks(), state_of(model), torch.get_rng_state()
    with record(model, opt, tmp_path / "a"):
        assert hooks() != before
    assert hooks() == before
    assert same_bits(state_of(model), state)
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(ZeroDivisionError), record(model, opt, tmp_path / "b"):
        1 / 0
    assert hooks() == before
    assert Trajectory.open(tmp_path / "a").steps == [0]
    assert Trajectory.open(tmp_path / "b").status == "running"


def test_a_compiled_model_is_recorded_under_its_own_names(tmp_path):
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    with record(wrapped, adam(model), tmp_path / "a"):
        pass
    with record(nn.DataParallel(model), adam(model), tmp_path / "b"):
        pass
    for name in "ab":
        assert same_bits(Trajectory.open(tmp_path / name).state(0), state_of(model))


def test_tensors_that_share_memory(tmp_path):
    flat = torch.arange(6, dtype=F64)
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(flat[:4].view(2, 2))
    model.register_buffer("overlap", flat[2:])
    with record(model, torch.optim.SGD(model.parameters()), tmp_path / "run"):
        pass
    assert same_bits(Trajectory.open(tmp_path / "run").state(0), state_of(model))


# --- what counts as a step, and its learning rate ------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_learning_rate_is_that_of_the_update(tmp_path, when):
    model = Net()
    opt = torch.optim.SGD([{"params": [model.last.weight], "lr": 0.5}, {"params": [model.first.weight]}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    with record(model, opt, tmp_path / "run", record=1) as rec:
        for step in range(5):
            rows, loss = advance(model, opt, step)
            if when == "before":
                scheduler.step()
            rec.step(rows, loss)
            if when == "after":
                scheduler.step()
    traj = Trajectory.open(tmp_path / "run")
    assert traj.learning_rates.tolist() == [[0.5 * factor(s), 0.1 * factor(s)] for s in range(5)]
    for step in range(5):  # and by it the update can be undone: SGD without momentum
        model, x, y = Net(), *data()
        traj.load(model, step)
        torch.manual_seed(step)
        ((model(x[batch(step)]) - y[batch(step)]) ** 2).mean().backward()
        new = model.first.weight - traj.learning_rates[step, 1] * model.first.weight.grad
        torch.testing.assert_close(new, traj.state(step + 1)["first.weight"], rtol=1e-13, atol=1e-15)


def test_groups_added_and_rates_as_tensors(tmp_path):
    model = Net()
    opt = torch.optim.Adam([model.last.weight], lr=torch.tensor(0.5, dtype=F64))
    with record(model, opt, tmp_path / "run") as rec:
        for step in range(3):
            if step == 2:
                opt.add_param_group({"params": [model.first.weight], "lr": 0.25})
            advance(model, opt, step)
            rec.step()
            opt.param_groups[0]["lr"].mul_(0.5)
    rates = Trajectory.open(tmp_path / "run").learning_rates
    assert rates[:, 0].tolist() == [0.5, 0.25, 0.125]
    assert str(rates[:, 1].tolist()) == "[nan, nan, 0.25]"


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_a_gradient_scaler_skipped_is_no_step(tmp_path, fused):
    model, x = nn.Linear(3, 1), data(torch.float32)[0]
    opt = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    states = [state_of(model)]
    with record(model, opt, tmp_path / "run", record="all") as rec:
        for trial in range(6):
            loss = model(x).square().mean() * (math.inf if trial in (0, 3) else 1)
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            rec.step([trial], loss)
            if trial not in (0, 3):
                states.append(state_of(model))
    traj = Trajectory.open(tmp_path / "run")
    assert (rec.done, traj.status) == (4, "complete")
    assert [traj.batch(s).item() for s in range(4)] == [1, 2, 4, 5]
    assert all(same_bits(traj.state(s), states[s]) for s in range(5))
    assert traj.losses.isfinite().all()


def test_gradient_accumulation_closures_and_optimizers_that_call_their_parent(tmp_path):
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # now the parent's step, too, calls hooks
    model, (x, y) = Net(), data()
    for name, opt in [("mine", Mine(model.parameters(), lr=0.1)), ("lbfgs", torch.optim.LBFGS(model.parameters()))]:
        with record(model, opt, tmp_path / name) as rec:
            for step in range(3):

                def closure(opt=opt):
                    opt.zero_grad()
                    loss = ((model(x) - y) ** 2).mean()
                    loss.backward()
                    return loss

                if name == "mine":
                    closure()
                    rec.step()  # no optimizer step yet: an accumulated batch
                rec.step(range(N), opt.step(closure))
                assert rec.done == step + 1
        traj = Trajectory.open(tmp_path / name)
        assert traj.batch(2).tolist() == list(range(N))
        assert same_bits(traj.state(3), state_of(model))


def test_what_is_not_given_and_the_forms_of_what_is(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    given = [
        (None, None),
        ([], 1),
        (np.array([3, 1], dtype=np.int32), np.float32(0.5)),
        (torch.tensor([7], dtype=torch.uint8), torch.tensor(0.25, dtype=torch.bfloat16, requires_grad=True)),
    ]
    with record(model, opt, tmp_path / "run") as rec:
        for step, (indices, loss) in enumerate(given):
            advance(model, opt, step)
            rec.step(indices, loss)
    traj = Trajectory.open(tmp_path / "run")
    assert traj.status == "complete"
    assert math.isnan(traj.losses[0])
    assert traj.losses[1:].tolist() == [1, 0.5, 0.25]
    assert [traj.batch(s).tolist() for s in (1, 2, 3)] == [[], [3, 1], [7]]
    assert traj.batch(1).dtype == torch.int64
    with pytest.raises(Refused, match=r"batch of step 0: got a step recorded without indices.*rec\.step\(indices"):
        traj.batch(0)
    with pytest.raises(Refused, match="step: got 4; expected 0 <= step < 4"):
        traj.batch(4)


def test_indices_are_copied(tmp_path):
    model, rows = Net(), torch.tensor([1, 2])
    opt = adam(model)
    with record(model, opt, tmp_path / "run") as rec:
        for step in range(2):
            rows += step
            advance(model, opt, step)
            rec.step(rows)
    traj = Trajectory.open(tmp_path / "run")
    assert [traj.batch(s).tolist() for s in range(2)] == [[1, 2], [2, 3]]


def test_a_loss_that_is_not_finite_is_a_status(tmp_path):
    model = Net()
    opt = adam(model)
    with record(model, opt, tmp_path / "run") as rec:
        for step, loss in enumerate([1.0, math.nan, 2.0, math.inf]):
            advance(model, opt, step)
            rec.step(None, torch.tensor(loss))
    traj = Trajectory.open(tmp_path / "run")
    assert traj.status == "diverged"
    assert traj.stop == {"reason": "diverged", "step": 4, "loss": None, "diverged_at": 1, "diverged_loss": "nan"}
    assert same_bits(traj.state(4), state_of(model))
    assert str(traj.losses.tolist()) == "[1.0, nan, 2.0, inf]"


@pytest.mark.parametrize(("second", "status"), [(math.inf, "diverged"), (1.0, "complete")])
def test_divergence_is_remembered_by_a_resumed_run(tmp_path, second, status):
    for expected in ("running", status):
        model = Net()
        opt = adam(model)
        with suppress(KeyboardInterrupt), record(model, opt, tmp_path / "run", resume=True) as rec:
            for step in range(rec.done, 4):
                advance(model, opt, step)
                rec.step(None, [None, second, 1.0, 1.0][step])
                if step == 2:
                    raise KeyboardInterrupt
        traj = Trajectory.open(tmp_path / "run")
        assert traj.status == expected
    assert traj.stop.get("diverged_at") == (1 if status == "diverged" else None)  # a loss not given is none


def test_an_interrupt_while_a_snapshot_is_written(tmp_path, monkeypatch):
    module = import_module("ntkit.trajectory.record")
    write, model, until = module.write_bytes, Net(), 6

    def interrupted(path, blob):
        if path.stem == "step-00000004":
            raise KeyboardInterrupt
        write(path, blob)

    monkeypatch.setattr(module, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, adam(model), tmp_path / "run", until)
    assert Trajectory.open(tmp_path / "run").steps == [0, 1, 2, 3]
    monkeypatch.setattr(module, "write_bytes", write)
    steps = []
    run(fresh := Net(), adam(fresh), tmp_path / "run", until, resume=True, on_step=steps.append)
    assert steps == [4, 5]
    run(whole := Net(), adam(whole), tmp_path / "whole", until)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


def test_segments_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("ntkit.trajectory.step_log"), "SEGMENT", 4)
    for until in (3, 4, 9):
        traj = run(model := Net(), adam(model), tmp_path / str(until), until, record=lambda step: step in (2, 3))
        files = sorted(f.stem for f in (tmp_path / str(until) / "log").iterdir())
        assert files == [f"{first:08d}" for first in range(0, until, 4)]
        assert len(traj.losses) == len(traj.learning_rates) == until
        assert all(torch.equal(traj.batch(step), batch(step)) for step in range(until))


def test_a_log_that_ends_before_the_checkpoint_is_not_gone_on_with(tmp_path):
    def until(last, resume, model):
        with suppress(KeyError), record(model, opt := adam(model), tmp_path, record=[0], resume=resume) as rec:
            for step in range(rec.done, last):
                rec.step(*advance(model, opt, step))
            raise KeyError

    until(2, False, Net())
    file = tmp_path / "log" / "00000000.safetensors"
    earlier = file.read_bytes()
    until(5, True, Net())
    file.write_bytes(earlier)  # complete, of this run, and too old
    other = Net()
    advance(other, adam(other), 0)
    with pytest.raises(Refused, match="cut off before step 5"):
        until(7, True, other)


def test_of_a_log_with_a_gap_the_steps_before_it_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("ntkit.trajectory.step_log"), "SEGMENT", 2)
    model = Net()
    with suppress(KeyError), record(model, opt := adam(model), tmp_path) as rec:
        losses = []
        for step in range(7):
            rows, loss = advance(model, opt, step)
            rec.step(rows, loss)
            losses.append(loss.item())
        raise KeyError
    assert Trajectory.open(tmp_path).losses.tolist() == losses
    (tmp_path / "log" / "00000002.safetensors").unlink()
    assert Trajectory.open(tmp_path).losses.tolist() == losses[:2]  # not those of steps 4 to 6 as of 2 to 4


def test_another_process_can_follow(tmp_path):
    model, seen = Net(), []

    def follow(step):
        traj = Trajectory.open(tmp_path / "run")
        assert traj.status == "running"
        seen.append((len(traj.losses), traj.steps[-1]))
        assert traj.state(traj.steps[-1]).keys() == state_of(model).keys()
        assert all(len(traj.batch(s)) for s in range(len(traj.losses)))

    run(model, adam(model), tmp_path / "run", 9, record=2, on_step=follow)
    for step, (logged, newest) in enumerate(seen):
        assert newest == (step + 1) // 2 * 2
        assert newest <= logged <= step + 1


# --- schedules and the budget --------------------------------------------------------------------------------


def test_schedules(tmp_path):
    log = [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724]
    cases = [("log", log), (300, [0, 300, 600, 900]), ([5, 2], [2, 5]), (np.array([7]), [7])]
    for given, steps in [*cases, (lambda s: s % 400 == 1, [1, 401, 801])]:
        assert [s for s in range(1000) if snapshot_rule(given)(s)] == steps
        assert sorted(snapshot_steps(given, 1000)) == sorted({0, *steps, 1000})
    assert all(map(snapshot_rule("all"), range(9)))
    for given, steps in [
        ("log", [0, 1, 2, 3, 4, 5]),
        (np.int64(2), [0, 2, 4, 5]),
        ((np.int64(s) for s in (99, 1)), [0, 1, 5]),
    ]:
        folder = tmp_path / str(len(steps))
        model = Net()
        traj = run(model, adam(model), folder, 5, record=given)
        assert traj.steps == steps
        shutil.rmtree(folder)


@pytest.mark.parametrize("until", [30, 200])
def test_the_budget_thins_evenly_in_log_time(tmp_path, until):
    model = nn.Linear(1, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with record(model, opt, tmp_path / "probe"):
        pass
    size = (tmp_path / "probe" / "snapshots" / "step-00000000.safetensors").stat().st_size
    most = []
    with record(model, opt, tmp_path / "run", record="all", budget=9 * size + 5) as rec:
        for _ in range(until):
            opt.step()
            rec.step()
            most.append(sum(f.stat().st_size for f in (tmp_path / "run" / "snapshots").iterdir()))
    traj = Trajectory.open(tmp_path / "run")
    assert max(most) <= 9 * size + 5
    assert len(traj.steps) == 9
    assert (traj.steps[0], traj.steps[-1]) == (0, until)
    gaps = np.diff(np.log1p(traj.steps))
    assert gaps.max() < 2.5 * math.log1p(until) / 8  # nine evenly spaced would have gaps of that over one


def test_thinning_takes_the_narrowest_and_never_the_ends():
    assert surplus_snapshots(dict.fromkeys(range(5), 10), 50) == []
    assert surplus_snapshots(dict.fromkeys(range(5), 10), 49) == [3]
    assert surplus_snapshots(dict.fromkeys([0, 1, 3, 7, 15, 16], 10), 40) == [15, 1]
    assert surplus_snapshots({0: 10, 5: 10, 9: 10}, 1) == [5]
    assert surplus_snapshots({0: 10, 1: 10}, 1) == []


def test_a_snapshot_given_up_after_opening(tmp_path):
    opened = []
    look = lambda step: opened.append(Trajectory.open(tmp_path / "run"))
    run(model := Net(), adam(model), tmp_path / "run", 5, on_step=look)
    (tmp_path / "run" / "snapshots" / "step-00000002.safetensors").unlink()
    assert opened[-1].status == "running"
    with pytest.raises(Refused, match=r"step 2: got a snapshot that the run deleted.*Open the trajectory again"):
        opened[-1].state(2)
    with pytest.raises(Refused, match=r"step-00000002.safetensors: got a damaged file: no such file"):
        Trajectory.open(tmp_path / "run").state(2)  # nothing deletes snapshots of a run that has ended


def test_a_loop_without_a_step(tmp_path):
    model = Net()
    with record(model, adam(model), tmp_path / "run"):
        pass
    trajectory = Trajectory.open(tmp_path / "run")
    assert (trajectory.steps, trajectory.status) == ([0], "complete")
    assert (trajectory.losses.shape, trajectory.learning_rates.shape) == ((0,), (0, 2))


# --- refusals ------------------------------------------------------------------------------------------------


def foreign():
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=3), "model: got int; expected a torch.nn.Module"),
        (dict(model=nn.LazyLinear(2)), "model's weight: got a tensor without values yet"),
        (dict(model=nn.Linear(2, 2, device="meta")), "model's weight: got a tensor without values"),
        (dict(optimizer=lambda p: None), "optimizer: got a function; expected a torch.optim.Optimizer"),
        (dict(optimizer=foreign()), r"optimizer: got a parameter that is not the model's.*ModuleList"),
        (dict(record="logs"), r"record: got 'logs'.*Did you mean log\?"),
        (dict(record=0), "record: got 0; expected 'log', 'all', an interval in steps"),
        (dict(record=True), "record: got True"),
        (dict(record=None), "record: got None"),
        (dict(record=[1, -1]), "record: got step -1; expected integers >= 0"),
        (dict(record=[1.5, None]), "record: got step 1.5"),
        (dict(budget="2 potatoes"), "budget: got '2 potatoes'; expected bytes, or text"),
        (dict(budget=-5), "budget: got -5"),
        (dict(budget=True), "budget: got True"),
        (dict(budget="1 kB"), r"budget: got 1000 bytes; expected enough for 3 snapshots of \d+ bytes each"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, change, message):
    model = Net()
    with pytest.raises(Refused, match=message):
        record(**(dict(model=model, optimizer=adam(model), path=tmp_path / "run") | change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(loss="1"), "loss: got a str; expected a real number or a scalar tensor"),
        (dict(loss=torch.zeros(2)), r"loss: got a tensor of shape \[2\]"),
        (dict(indices=[0.5]), r"indices: got torch.float32 of shape \[1\]; expected integers"),
        (dict(indices=[[1, 2]]), r"indices: got torch.int64 of shape \[1, 2\]"),
        (dict(indices=torch.tensor([True])), "indices: got torch.bool"),
        (dict(indices="abc"), "indices: got str"),
    ],
)
def test_refusals_of_a_step(tmp_path, step, message):
    with pytest.raises(Refused, match=message):
        recorded(tmp_path / "run", lambda rec, model, opt: (advance(model, opt, 0), rec.step(**step)))


def recorded(folder, loop, make=adam):
    model = Net()
    opt = make(model)
    with record(model, opt, folder) as rec:
        loop(rec, model, opt)
    return rec


def test_steps_that_do_not_match(tmp_path):
    def two(rec, model, opt):
        advance(model, opt, 0)
        advance(model, opt, 1)
        rec.step()

    def one_late(rec, model, opt):
        for step in range(3):
            rec.step()
            advance(model, opt, step)

    def retried(rec, model, opt):
        with pytest.raises(MemoryError):
            advance(model, opt, 0)
        rec.step()

    class Breaking(torch.optim.SGD):
        def step(self, closure=None):
            raise MemoryError

    with pytest.raises(Refused, match="got 2 optimizer steps; expected one complete"):
        recorded(tmp_path / "two", two)
    with pytest.raises(Refused, match=r"with no rec\.step\(\) after it"):
        recorded(tmp_path / "late", one_late)
    assert Trajectory.open(tmp_path / "late").status == "running"
    with pytest.raises(Refused, match=r"got an optimizer\.step\(\) that was interrupted"):
        recorded(tmp_path / "retried", retried, lambda model: Breaking(model.parameters()))
    another = lambda rec, model, opt: [(advance(model, adam(model), s), rec.step()) for s in range(21)]
    with pytest.raises(Refused, match=r"optimizer: got no step of this Adam in 21 calls of rec\.step\(\)"):
        recorded(tmp_path / "another", another)
    rec = recorded(tmp_path / "none", lambda *_: None)
    with pytest.raises(Refused, match="got a call outside the block"):
        rec.step()
