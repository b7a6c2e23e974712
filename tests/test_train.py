"""`train` against plain loops, bit for bit; nothing global changed; refusals. Interrupts: test_train_resume.py."""

from __future__ import annotations

import copy
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from train_case import F64, OPTIMIZERS, SGD, D, N, Noisy, data, halved, mlp, mse, same_bits

from ntkit.base.checks import Refused
from ntkit.trajectory import load_weights, train
from ntkit.trajectory.batch_order import batch_indices
from ntkit.trajectory.snapshots import snapshot_steps

# --- the same bits as a loop written by hand -----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_plain_loop(name, batch_size):
    x, y = data()
    model = mlp()
    plain = copy.deepcopy(model)
    traj = train(model, (x, y), mse, OPTIMIZERS[name], steps=9, batch_size=batch_size, record="all", seed=3)

    opt = OPTIMIZERS[name](list(plain.parameters()))
    losses = []
    for step in range(9):
        assert same_bits(traj.state(step), plain.state_dict())
        rows = traj.batch(step)
        opt.zero_grad()
        loss = mse(plain(x[rows]), y[rows])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert same_bits(traj.state(9), plain.state_dict())
    assert same_bits(model.state_dict(), plain.state_dict())
    assert traj.losses.dtype == F64
    assert traj.losses.tolist() == losses
    assert losses[0] != losses[-1]
    assert traj.status == "complete"
    assert traj.stop == {"reason": "steps", "step": 9, "loss": None}
    assert (traj.steps, len(traj)) == (list(range(10)), 10)


def test_inputs_as_tuple_and_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, 1).double(), nn.Linear(D, 1).double()

        def forward(self, x, y):
            return self.a(x) - 2 * self.b(y)

    x, y = data()
    start = Two()
    states = []
    for inputs in ((x, x**2), {"y": x**2, "x": x}):
        model = copy.deepcopy(start)
        states.append(train(model, (inputs, y), mse, SGD, steps=5, batch_size=3).state(5))
    assert same_bits(*states)
    assert not same_bits(states[0], start.state_dict())


# --- batches and recorded steps ------------------------------------------------------------------------------


def test_each_epoch_is_a_permutation_with_a_ragged_last_batch():
    n, b = 11, 4
    epochs = []
    for epoch in range(3):
        rows = [batch_indices(7, n, b, 3 * epoch + k) for k in range(3)]
        assert [len(r) for r in rows] == [4, 4, 3]
        epochs.append(torch.cat(rows).tolist())
        assert sorted(epochs[-1]) == list(range(n))
    assert len({tuple(e) for e in epochs}) == 3
    assert torch.cat([batch_indices(8, n, b, k) for k in range(3)]).tolist() != epochs[0]
    assert batch_indices(7, n, None, 5).tolist() == list(range(n))


def test_a_batch_cannot_be_spoiled_by_its_receiver():
    first = batch_indices(7, 11, 4, 0)
    kept = first.clone()
    first.zero_()
    assert batch_indices(7, 11, 4, 0).tolist() == kept.tolist()


def test_recorded_steps():
    assert sorted(snapshot_steps("log", 100)) == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 100]
    assert sorted(snapshot_steps("log", 1)) == [0, 1]
    assert sorted(snapshot_steps("all", 3)) == [0, 1, 2, 3]
    assert sorted(snapshot_steps(np.array([5, 2]), 9)) == [0, 2, 5, 9]
    for record, steps in [([4], [0, 4, 9]), (4, [0, 4, 8, 9]), (lambda step: step % 7 == 2, [0, 2, 9])]:
        assert train(mlp(), data(), mse, SGD, steps=9, record=record).steps == steps
    traj = train(mlp(), data(), mse, SGD, steps=9, record=[4])
    with pytest.raises(Refused, match=r"step 5: got a step that was not recorded.*nearest: 0, 4, 9"):
        traj.state(5)
    with pytest.raises(Refused, match="step: got 9; expected 0 <= step < 9"):
        traj.batch(9)


@pytest.mark.parametrize("name", ["momentum", "groups"])
def test_a_schedule_is_that_of_lambda_lr(tmp_path, name):
    (x, y), model = data(), mlp()
    plain = copy.deepcopy(model)
    traj = train(model, (x, y), mse, OPTIMIZERS[name], steps=9, batch_size=4, schedule=halved)
    opt = OPTIMIZERS[name](list(plain.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, halved)
    used = []
    for step in range(9):
        used.append([group["lr"] for group in opt.param_groups])
        opt.zero_grad()
        mse(plain(x[traj.batch(step)]), y[traj.batch(step)]).backward()
        opt.step()
        scheduler.step()
    assert same_bits(traj.state(9), plain.state_dict())
    assert traj.learning_rates.dtype == F64
    assert traj.learning_rates.tolist() == used
    assert traj.settings["schedule"] == "halved"
    tensor = lambda p: torch.optim.Adam(p, lr=torch.tensor(0.25))
    traj = train(mlp(), (x, y), mse, tensor, steps=4, schedule=halved)
    assert traj.learning_rates.flatten().tolist() == [0.25, 0.25, 0.25, 0.125]


def test_on_step_sees_every_step_and_loss():
    seen = []
    traj = train(mlp(), data(), mse, SGD, steps=5, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(traj.losses.tolist()))


# --- how a run ends ------------------------------------------------------------------------------------------


def test_target_full_batch_stops_at_the_first_step_that_reaches_it():
    model = mlp(nn.BatchNorm1d(7, affine=False).double())
    losses = train(copy.deepcopy(model), data(), mse, SGD, steps=40).losses
    target = float(losses[17])
    first = int((losses <= target).nonzero()[0])
    traj = train(model, data(), mse, SGD, steps=40, target_loss=target)
    assert 0 < first <= 17
    assert traj.stop == {"reason": "target", "step": first, "loss": float(losses[first])}
    assert traj.steps[-1] == first
    assert len(traj.losses) == first
    assert model[2].num_batches_tracked == first  # the forward that found the target is not part of the run
    assert same_bits(traj.state(first), model.state_dict())


def test_target_minibatch_is_the_whole_loss_in_eval_mode_after_an_epoch():
    x, y = data()
    model = mlp(nn.Dropout(0.3))
    reference = copy.deepcopy(model)
    free = train(reference, (x, y), mse, SGD, steps=60, batch_size=4, record="all")
    reference.eval()
    after_epoch = {}
    for step in range(3, 61, 3):
        free.load(reference, step)
        after_epoch[step] = mse(reference(x), y).item()
    target = 0.5 * (after_epoch[3] + min(after_epoch.values()))
    first = min(step for step, value in after_epoch.items() if value <= target)
    traj = train(model, (x, y), mse, SGD, steps=60, batch_size=4, target_loss=target)
    assert (traj.stop["reason"], traj.stop["step"]) == ("target", first)
    assert traj.stop["loss"] == pytest.approx(after_epoch[first], rel=1e-12)
    assert same_bits(traj.state(first), free.state(first))
    for limit, last in [(traj.stop["loss"], first), (1e9, 3)]:  # reached exactly; at the start already, but asked later
        traj = train(mlp(nn.Dropout(0.3)), (x, y), mse, SGD, steps=60, batch_size=4, target_loss=limit)
        assert (traj.stop["reason"], traj.stop["step"]) == ("target", last)


def test_divergence_is_a_status_and_keeps_the_last_finite_step(tmp_path):
    x, y = data()
    model = nn.Linear(D, 1).double()
    plain = copy.deepcopy(model)
    wild = lambda p: torch.optim.SGD(p, lr=1e40)
    traj = train(model, (x, y), mse, wild, steps=50, path=tmp_path / "run")
    opt = wild(plain.parameters())
    values, states = [], []
    while not values or np.isfinite(values[-1]):
        states.append(copy.deepcopy(plain.state_dict()))
        opt.zero_grad()
        loss = mse(plain(x), y)
        values.append(loss.item())
        loss.backward()
        opt.step()
    previous = dict(states[-2])
    bad = len(values) - 1
    assert 0 < bad < 50
    assert traj.status == "diverged"
    assert traj.stop == {
        "reason": "diverged",
        "step": bad - 1,
        "loss": values[bad - 1],
        "diverged_at": bad,
        "diverged_loss": str(values[bad]),
    }
    assert traj.steps[-1] == bad - 1
    assert same_bits(traj.state(bad - 1), previous)
    assert same_bits(dict(model.state_dict()), previous)
    assert traj.losses.tolist() == values[: bad - 1]
    fresh = copy.deepcopy(plain)
    assert train(fresh, (x, y), mse, wild, steps=50, path=tmp_path / "run", resume=True).status == "diverged"
    assert same_bits(dict(fresh.state_dict()), previous)


def test_an_update_that_breaks_the_last_step_or_a_start_that_is_broken():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    traj = train(model, data(), mse, lambda p: torch.optim.SGD(p, lr=float("inf")), steps=1)
    assert (traj.status, traj.stop["step"], traj.stop["diverged_at"]) == ("diverged", 0, 1)
    assert same_bits(model.state_dict(), start)
    with torch.no_grad():
        model[0].bias[2] = float("nan")
    traj = train(model, data(), mse, SGD, steps=3)
    assert (traj.status, traj.stop["step"], traj.stop["diverged_at"], traj.steps) == ("diverged", 0, 0, [0])
    assert len(traj.losses) == 0


# --- what is recorded, and loading ---------------------------------------------------------------------------


def test_tied_weights_and_buffers_are_recorded():
    model = Noisy()
    plain = copy.deepcopy(model)
    traj = train(model, data(), mse, SGD, steps=3, record="all")
    assert traj.settings["aliases"] == {"again.weight": "middle.weight"}
    state = traj.state(3)
    assert state.keys() == model.state_dict().keys() | {"calls"}
    assert torch.equal(state["again.weight"], model.middle.weight)
    x = data()[0]
    mean = 0.1 * plain.first(x).mean(0)  # momentum 0.1, from zero
    torch.testing.assert_close(traj.state(1)["norm.running_mean"], mean, rtol=1e-12, atol=1e-14)
    assert traj.state(0)["norm.running_mean"].abs().max() == 0
    assert [int(traj.state(s)["calls"]) for s in range(4)] == [0, 1, 2, 3]
    traj.load(plain, 2)
    assert plain.again.weight is plain.middle.weight
    assert plain.calls == 2
    assert same_bits(dict(plain.state_dict()), {k: v for k, v in traj.state(2).items() if k != "calls"})


class Counting(nn.Module):
    """A buffer that each forward pass replaces, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.inner(x) * (1 + self.calls / 10)


@pytest.mark.parametrize("target", [None, -1.0])  # the second: evaluated after each epoch, never reached
def test_a_buffer_that_forward_replaces(tmp_path, target):
    x, y = data()
    plain = Counting()
    opt = SGD(list(plain.parameters()))
    states = [copy.deepcopy(plain.state_dict())]
    for step in range(7):
        rows = batch_indices(0, N, 4, step)
        opt.zero_grad()
        mse(plain(x[rows]), y[rows]).backward()
        opt.step()
        states.append(copy.deepcopy(plain.state_dict()))

    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    options = dict(steps=7, batch_size=4, record="all", target_loss=target, path=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(Counting(), (x, y), mse, SGD, on_step=stop, **options)
    traj = train(model := Counting(), (x, y), mse, SGD, resume=True, **options)
    for step in range(8):
        assert same_bits(traj.state(step), states[step])
    assert same_bits(model.state_dict(), states[7])


def test_a_buffer_that_changes_its_shape_is_refused():
    class Growing(Counting):
        def forward(self, x):
            self.calls = torch.zeros(2, dtype=F64)
            return self.inner(x)

    with pytest.raises(Refused, match=r"model's calls: got \[2\] torch.float64; expected \[\] torch.float64"):
        train(Growing(), data(), mse, SGD, steps=2)


def test_a_learning_rate_in_a_tensor_keeps_its_value():
    rate = torch.tensor(0.1)
    sgd = lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], lr=rate)
    runs = [train(mlp(), data(), mse, sgd, steps=4, schedule=lambda step: 0.5**step) for _ in range(2)]
    assert rate == torch.tensor(0.1)
    for traj in runs:
        expected = [[0.1 * 0.5**step] * 2 for step in range(4)]
        torch.testing.assert_close(traj.learning_rates, torch.tensor(expected, dtype=F64), rtol=1e-7, atol=0)


def test_clipping_refuses_a_sparse_gradient():
    rows = torch.arange(N) % 4
    model = nn.Embedding(4, 1, sparse=True, dtype=F64)
    with pytest.raises(Refused, match="clip: got a sparse gradient"):
        train(model, (rows, data()[1]), mse, SGD, steps=2, clip=1.0)


def test_the_temporary_folder_lives_as_long_as_the_trajectory():
    traj = train(mlp(), data(), mse, SGD, steps=2)
    folder = traj.path
    assert folder.is_dir()
    del traj
    assert not folder.exists()


def test_load_checks_everything_before_it_changes_anything(tmp_path):
    traj = train(mlp(), data(), mse, SGD, steps=2)
    other = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 2), nn.Linear(2, 2)).double()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        Refused,
        match=r"2 missing: 3\.weight, 3\.bias; 2 of another shape: 2\.weight \[1, 7\] \(model: \[2, 7\]\), 2\.bias",
    ):
        traj.load(other, 2)
    with pytest.raises(Refused, match=r"2 unexpected: 2\.bias, 2\.weight"):
        traj.load(other[:2], 2)
    with pytest.raises(Refused, match=r"4 of a dtype that would lose digits: 0\.weight torch\.float64"):
        traj.load(mlp().float(), 2)
    assert same_bits(before, other.state_dict())

    wide = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(Refused, match=r"8 missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, \.\.\.;"):
        load_weights(wide, tmp_path / "other.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(Refused, match=r"empty\.safetensors: got nothing; expected tensors by name"):
        load_weights(wide, tmp_path / "empty.safetensors")


def test_load_weights(tmp_path):
    source, model = Noisy(), Noisy()
    nn.init.ones_(source.middle.weight)
    tensors = {k: v.clone() for k, v in source.state_dict().items()}
    save_file(tensors, tmp_path / "both.safetensors")
    load_weights(model, tmp_path / "both.safetensors")
    assert same_bits(source.state_dict(), model.state_dict())
    save_file(tensors | {"again.weight": tensors["again.weight"] + 1}, tmp_path / "untied.safetensors")
    with pytest.raises(Refused, match=r"1 tied in the model, different here: again\.weight"):
        load_weights(model, tmp_path / "untied.safetensors")
    del tensors["middle.weight"]
    save_file(tensors, tmp_path / "one.safetensors")
    model = Noisy()
    load_weights(model, tmp_path / "one.safetensors")
    assert same_bits(source.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in model.parameters())

    torch.save(source.state_dict(), tmp_path / "model.pt")
    load_weights(model, tmp_path / "model.pt")
    assert same_bits(source.state_dict(), model.state_dict())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-9])
    with pytest.raises(Refused, match="not a complete safetensors file"):
        load_weights(model, tmp_path / "cut.safetensors")
    with pytest.raises(Refused, match="got no such file"):
        load_weights(model, tmp_path / "absent.safetensors")
    assert same_bits(source.state_dict(), model.state_dict())


# --- nothing global changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_global_is_changed(fails):
    model = mlp(nn.Dropout(0.2), nn.BatchNorm1d(7).double())
    model.train()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x, y = (t.clone().requires_grad_() for t in data())
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    frozen = model[0].bias.detach().clone()

    def on_step(step, loss):
        assert all(m.training for m in model.modules())
        if fails and step == 2:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") if fails else nullcontext():
        train(model, (x, y), mse, SGD, steps=4, batch_size=4, on_step=on_step)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert np.random.get_state()[1].tolist() == rng[2]  # noqa: NPY002
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 4
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert x.grad is None
    assert torch.equal(model[0].bias, frozen)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_runs_where_gradients_are_off_and_whatever_the_random_state():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            states.append(train(mlp(nn.Dropout(0.5)), data(), mse, SGD, steps=3).state(3))
            assert not torch.is_grad_enabled()
    assert same_bits(*states)
    other = train(mlp(nn.Dropout(0.5)), data(), mse, SGD, steps=3, seed=1).state(3)
    assert not same_bits(states[0], other)


# --- refusals ------------------------------------------------------------------------------------------------

X, Y = data()
BAD = X.clone()
BAD[4, 1] = float("nan")
BAD[7, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=(X[:0], Y[:0])), "x: got an empty set; expected at least one sample"),
        (dict(data=(X, Y[:5])), "x: got 11 rows; expected 5, as y has"),
        (dict(data=({"a": X, "b": X[:2]}, Y)), r"x: got tensors with \[2, 11\] samples"),
        (dict(data=((X, object()), Y)), r"x\[1\]: got object; expected a tensor or array with samples"),
        (dict(data=X), "data: got Tensor"),
        (
            dict(data=(X, torch.tensor(1.0))),
            "y: got a tensor without axes; expected a tensor or array with samples",
        ),
        (dict(data=(BAD, Y)), r"x: got nan at index \(4, 1\); expected finite values"),
        (dict(data=(X, BAD[:, :2])), r"y: got nan at index \(4, 1\)"),
        (dict(steps=0), "steps: got 0"),
        (dict(steps=2.0), "steps: got 2.0"),
        (dict(seed=None), "seed: got None"),
        (dict(target_loss=float("nan")), "target_loss: got nan"),
        (dict(batch_size=0), "batch_size: got 0; expected 1 <= batch_size <= 11"),
        (dict(batch_size=12), "batch_size: got 12"),
        (dict(record="logs"), r"record: got 'logs'.*Did you mean log\?"),
        (dict(record=None), "record: got None"),
        (dict(record=[1, 4]), "record: got step 4; expected integers from 0 to steps = 3"),
        (dict(record=[1.0]), "record: got step 1.0"),
        (dict(record=0), "record: got 0; expected 'log', 'all', an interval in steps"),
        (dict(schedule=0.5), "schedule: got a float; expected a function of the step"),
        (dict(schedule=lambda step: math.nan), "schedule: got nan at step 0; expected a finite factor"),
        (dict(schedule=lambda step: None), "schedule: got None at step 0"),
        (dict(loss=lambda o, y: (o - y) ** 2), r"loss: got shape \[11, 1\]; expected a scalar"),
        (dict(loss=lambda o, y: 1.0), "loss: got float"),
        (dict(loss=lambda o, y: y.sum()), "loss: got a value that does not depend on the parameters"),
        (dict(loss=lambda o, y: mse(o.detach(), y)), "does not depend on the parameters"),
        (dict(optimizer=lambda p: None), "optimizer: got a function returning NoneType"),
        (dict(optimizer=SGD([nn.Parameter(X.clone())])), "optimizer: got a SGD; expected a function"),
        (dict(optimizer=lambda p: SGD([nn.Parameter(X.clone())])), "got a parameter that is not a trainable one"),
        (dict(optimizer=torch.optim.LBFGS), "LBFGS, which evaluates the loss several times"),
        (dict(optimizer=lambda p: torch.optim.SGD(p, differentiable=True)), "optimizer: got differentiable=True"),
        (
            dict(data=(X, torch.arange(N)), loss=lambda o, y: mse(o, y.double())),
            r"loss: got outputs \[11, 1\] and targets",
        ),
        (dict(data=(X, Y[:, 0] > 0), loss=lambda o, y: mse(o, y.double())), r"loss: got outputs \[11, 1\] and targets"),
        (dict(model=nn.Tanh()), "model: got no trainable parameters"),
        (dict(resume=True), "resume: got no path"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, change, message):
    arguments = dict(model=mlp(), data=(X, Y), loss=mse, optimizer=SGD, steps=3, path=tmp_path / "run") | change
    if change == dict(resume=True):
        del arguments["path"]
    with pytest.raises(Refused, match=message):
        train(**arguments)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy():
    x, y = torch.randn(N, D, dtype=F64), torch.randn(N, 1, dtype=F64)
    runs = []
    for whole, real in ((int, float), (np.int64, np.float32)):
        torch.manual_seed(0)
        model, numbers = nn.Linear(D, 1).double(), {"batch_size": whole(4), "seed": whole(3), "record": whole(2)}
        run = train(model, (x, y), mse, SGD, whole(5), **numbers, target_loss=real(2.0**-20))
        runs.append((run, model.weight.detach().clone()))
    (one, first), (other, second) = runs
    assert one.settings == other.settings
    assert torch.equal(first, second)
    assert other.settings["record"] == 2
    for target in ("0.1", torch.tensor([0.1]), math.nan):
        with pytest.raises(Refused, match="target_loss: got"):
            train(model, (x, y), mse, SGD, 5, target_loss=target)
