"""`Replay`: runs repeated bit for bit, updates as sums of gradients. Changed runs: test_replay_refusals.py."""

from __future__ import annotations

import copy
import math
from importlib import import_module

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
    size,
    summed,
)
from torch import nn

import ntkit
from ntkit.base.batch import take
from ntkit.base.checks import Refused
from ntkit.trajectory import Trajectory, train
from ntkit.trajectory.optimizer_updates import optimizer_class, take_step
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.reruns import Reruns

# Files that are changed here are those of an earlier version: with checksums they are refused when they are read.
pytestmark = pytest.mark.filterwarnings("ignore::ntkit.base.integrity.WithoutChecksum")


# --- updates taken apart -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4])  # 4: the last batch of an epoch is ragged
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_linear_in_the_gradients(name, batch_size):
    trajectory = train(mlp(), data(), mse, OPTIMIZERS[name], steps=8, batch_size=batch_size, seed=3)
    replay = Replay(trajectory)
    steps = check_updates(replay, 1e-12)
    assert replay.bitwise
    assert [len(step.rows) for step in steps] == ([N] * 8 if batch_size is None else [4, 4, 3, 4, 4, 3, 4, 4])
    assert all(torch.equal(step.x, data()[0][step.rows]) for step in steps)
    assert all(torch.equal(step.rows, trajectory.batch(step.step)) for step in steps)
    for step in steps:
        for s, mine in ((step.step, step.before), (step.step + 1, step.after)):
            assert s not in trajectory.steps or same(mine, trajectory.state(s))
    assert all(same(one.after, two.before) for one, two in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("name", ["nesterov", "amsgrad", "adamw groups"])
@pytest.mark.parametrize("extra", ["schedule", "clip", "both"])
def test_schedules_and_clipping(name, extra):
    more = {"schedule": {"schedule": halved}, "clip": {"clip": 0.3}, "both": {"schedule": halved, "clip": 0.3}}[extra]
    trajectory = train(mlp(), data(), mse, OPTIMIZERS[name], steps=8, batch_size=4, **more)
    replay = Replay(trajectory)
    steps = check_updates(replay, 1e-12)
    assert replay.bitwise
    factors = {step.updates["0.weight"].gradient for step in steps}
    assert (min(factors) < 1.0) == (extra != "schedule")
    assert trajectory.settings["clip"] == more.get("clip")


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw amsgrad"])
def test_float32(name):
    replay = Replay(train(mlp(dtype=F32), data(F32), mse, OPTIMIZERS[name], steps=8, batch_size=4, clip=0.5))
    check_updates(replay, 2e-4)
    assert replay.bitwise


def test_a_sum_as_loss_and_a_loss_that_writes_over_the_outputs():
    def over(outputs, y):
        return outputs.sub_(y).mul_(3.0).square().mean()

    for loss in (summed, over):
        check_updates(Replay(train(mlp(), data(), loss, lambda p: torch.optim.SGD(p, lr=0.01), steps=4)), 1e-12)


def test_the_formula_of_each_optimizer():
    p, other = nn.Parameter(torch.tensor([2.0], dtype=F64)), nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([p, other], lr=0.5, momentum=0.8, dampening=0.25, weight_decay=0.1)
    found = []
    for _ in range(2):
        p.grad = torch.ones(1, dtype=F64)
        found.append(take_step(opt, {"p": p, "other": other}, 0.5))
    u = [vars(of["p"]) for of in found]
    assert [of.pop("moments") for of in u] == [None, None]
    assert u[0] == dict(gradient=0.5, coupled=0.1, carry=0, entering=1, direct=0, buffered=0.5, decoupled=0)
    assert u[1] == dict(gradient=0.5, coupled=0.1, carry=0.8, entering=0.75, direct=0, buffered=0.5, decoupled=0)
    assert not any(vars(found[1]["other"]).values())  # it had no gradient
    opt.zero_grad()
    idle = vars(take_step(opt, {"p": p})["p"])
    assert idle.pop("carry") == 1.0
    assert not any(idle.values())
    assert idle["moments"] is None
    p.grad = torch.tensor([3.0], dtype=F64)
    u = take_step(torch.optim.AdamW([p], lr=0.1, weight_decay=0.2, eps=1.0), {"p": p})["p"]
    assert (u.coupled, u.carry, u.entering, u.direct) == (0.0, 0.0, 1 - 0.9, 0.0)
    assert u.decoupled == pytest.approx(0.02, rel=1e-15)
    assert u.buffered.item() == pytest.approx(0.1 / 0.1 / (3.0 + 1.0), rel=1e-12)


def test_unknown_optimizers_are_refused_by_name():
    class Mine(torch.optim.SGD):
        pass

    for made, name in ((torch.optim.RMSprop, "torch.optim.rmsprop.RMSprop"), (Mine, "Mine")):
        with pytest.raises(Refused, match=rf"optimizer: got \S*{name}; expected torch.optim.SGD, Adam or AdamW"):
            Replay(train(mlp(), data(), mse, lambda p, made=made: made(p, lr=0.01), steps=2))
        p = nn.Parameter(torch.ones(1))
        with pytest.raises(Refused, match=name):
            take_step(made([p], lr=0.1), {"p": p})
    assert optimizer_class("torch.optim.adamw.AdamW") is torch.optim.AdamW


# --- the same bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["log", "all", 3, [5]])
@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_in_parts_and_at_once_are_the_same_steps(monkeypatch, kept, name):
    trajectory = train(mlp(), data(), mse, OPTIMIZERS[name], steps=11, batch_size=4, record=kept, clip=0.5)
    whole = Replay(trajectory, moments=True)
    whole.check()
    monkeypatch.setattr(import_module("ntkit.trajectory.replay"), "MEMORY", 0)
    parts = Replay(trajectory, moments=True)
    at_once, in_parts = list(whole.backwards()), []
    for step in parts.backwards():
        in_parts.append(step)
        with torch.no_grad():  # who uses the copy may set it to anything
            for p in parts.model.parameters():
                p.fill_(7.0)
    assert parts._records is None
    assert whole._records is not None
    assert parts.bitwise
    assert whole.bitwise
    assert all(record.before is not None for record in whole._records)  # there is room for those on disk, too
    assert [record.needed().before is None for record in whole._records] == [
        step in trajectory.steps for step in range(11)
    ]
    for a, b in zip(at_once, in_parts, strict=True):
        assert a.step == b.step
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.slope, b.slope)
        assert same(a.before, b.before)
        assert same(a.after, b.after)
        for u, v in zip(a.updates.values(), b.updates.values(), strict=True):
            assert (u.moments is None) == (name == "momentum")
            first, second = ([*vars(update).values()][:-1] + list(update.moments or ()) for update in (u, v))
            assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(first, second, strict=True))
    again = list(parts.backwards())
    assert [step.step for step in again] == [step.step for step in at_once]
    assert torch.equal(again[-1].slope, at_once[-1].slope)


@pytest.mark.parametrize("name", ["momentum", "adamw groups"])
def test_a_recorded_loop(tmp_path, name):
    for kept in ("log", "all", lambda step: step == 5):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        replay = of_loop(loop(folder, OPTIMIZERS[name], record=kept, clip=0.4), clip=0.4)
        steps = check_updates(replay, 1e-12)
        assert replay.bitwise
        assert [len(step.rows) for step in steps] == [3, 4, 5, 3, 4, 5, 3, 4]
    assert any(step.updates["0.weight"].gradient < 1.0 for step in steps)


def test_a_loop_held_to_a_budget(tmp_path):
    trajectory = loop(tmp_path, record="all", budget=2800)
    assert 0 < len(trajectory.steps) < 9
    replay = of_loop(trajectory)
    check_updates(replay, 1e-12)
    assert replay.bitwise


class Tied(nn.Module):
    """A tied pair, a frozen layer, a layer the optimizer does not get, one without gradients, a buffer; two inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.frozen, self.left, self.unused = nn.Linear(D, 5), nn.Linear(5, 5), nn.Linear(2, 2)
        self.first, self.again, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)
        self.double()

    def forward(self, x, z):
        h = torch.tanh(self.left(self.frozen(x))) + self.scale * z.sum(1, keepdim=True)
        return self.last(torch.tanh(self.again(torch.tanh(self.first(h)))))


UPDATED = ["unused.bias", "first.weight", "first.bias", "again.bias", "last.weight"]


def test_tied_frozen_and_left_out_parameters_and_inputs_of_several_tensors():
    x, y = data()
    for inputs in ((x, x**2), {"z": x**2, "x": x}):
        model = Tied()
        names = {id(p): name for name, p in model.named_parameters()}

        def chosen(params, names=names):
            return torch.optim.Adam([p for p in params if names[id(p)] in UPDATED], lr=0.01)

        replay = Replay(train(model, (inputs, y), mse, chosen, steps=6, batch_size=4, clip=0.1))
        assert replay.names == UPDATED
        assert replay.initial().keys() >= {"again.weight", "scale", "frozen.weight"}
        for step in replay.backwards():
            assert type(step.x) is type(inputs)
            taken = take(inputs, step.rows)
            leaves = lambda batch: list(batch.values()) if isinstance(batch, dict) else list(batch)
            assert all(map(torch.equal, leaves(step.x), leaves(taken)))
            assert torch.equal(step.after["unused.bias"], step.before["unused.bias"])
            u = step.updates["unused.bias"]
            assert (u.gradient, u.direct, u.buffered) == (0.0, 0.0, 0.0)
            assert step.updates["last.weight"].gradient < 1.0
        assert replay.bitwise
        assert same(replay.final(), model.state_dict() | {"scale": model.scale})


def test_attributes_and_the_users_model_is_left_alone():
    torch.manual_seed(0)
    model = mlp()
    trajectory = train(model, data(), mse, ADAM, steps=5, batch_size=4)
    model.train()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(2, dtype=F64)
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():  # gradients are on where they are needed
        replay = Replay(trajectory)
        replay.check()
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    assert flags == [(False, True), (True, True), (True, True), (True, False)]
    assert same(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not replay.model.training
    assert replay.model is not model
    assert all(p.grad is None for p in replay.model.parameters())
    assert (replay.n, replay.steps, replay.names) == (N, 5, ["0.weight", "0.bias", "2.weight", "2.bias"])
    assert torch.equal(replay.x, data()[0])
    assert torch.equal(replay.y, data()[1])
    assert same(replay.initial(), mlp().state_dict())
    assert same(replay.final(), trajectory.state(5))


def test_origin_is_what_train_was_called_with(tmp_path):
    model, (x, y) = mlp(), data()
    trajectory = train(model, [x, y], mse, SGD, steps=2, path=tmp_path)
    assert trajectory.origin[0] is model
    assert trajectory.origin[1][0] is x
    assert trajectory.origin[2] is mse
    opened = Trajectory.open(tmp_path)
    assert opened.origin is None
    with pytest.raises(Refused, match=r"model, data, loss: got nothing, and the trajectory was opened from disk"):
        Replay(opened)
    with pytest.raises(Refused, match=r"^loss: got nothing.*Pass loss="):
        Replay(opened, mlp(), (x, y))
    replay = Replay(opened, mlp(), (x, y), mse)
    replay.check()
    assert replay.bitwise


# --- clip in training ----------------------------------------------------------------------------------------


def test_train_clips_as_a_plain_loop_does_and_resumes(tmp_path):
    model, (x, y) = mlp(), data()
    plain = copy.deepcopy(model)
    trajectory = train(model, (x, y), mse, ADAM, steps=6, clip=0.2, path=tmp_path / "run")
    opt = ADAM(list(plain.parameters()))
    for _ in range(6):
        opt.zero_grad()
        mse(plain(x), y).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.2) > 0.2
        opt.step()
    assert same(trajectory.state(6), plain.state_dict())
    for wrong in (0.0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(Refused, match=r"clip: got .*expected a finite norm > 0, or None"):
            train(mlp(), (x, y), mse, ADAM, steps=6, clip=wrong)
    with pytest.raises(Refused, match=r"clip \(was 0.2, now null\)"):
        train(mlp(), (x, y), mse, ADAM, steps=6, path=tmp_path / "run", resume=True)


# --- networks that are no function of one example ------------------------------------------------------------


def test_dropout_and_batch_norm():
    for layer, name in ((nn.Dropout(0.2), "Dropout"), (nn.BatchNorm1d(7), "BatchNorm1d")):
        trajectory = train(mlp(layer), data(), mse, SGD, steps=3)
        with pytest.raises(Refused, match=rf"layer '2' \({name}\): got "):
            Replay(trajectory)
    replay = Replay(train(mlp(nn.Dropout(0.0)), data(), mse, SGD, steps=3))
    replay.check()
    assert replay.bitwise


def test_batch_norm_in_a_recorded_loop(tmp_path):
    def normed():
        return mlp(nn.BatchNorm1d(7).double())

    frozen = normed().eval()
    assert checked(loop(tmp_path / "frozen", model=frozen).path, model=normed()).bitwise
    loop(tmp_path / "moving", SGD, model=normed())
    with pytest.raises(
        Refused, match=r"'2.(running_mean|running_var|num_batches_tracked)' at step 1: got another value"
    ):
        checked(tmp_path / "moving", model=normed())
    loop(tmp_path / "dropout", model=mlp(nn.Dropout(0.5)))
    with pytest.raises(Refused, match=r"snapshot of step 1 .*differs in train mode"):
        checked(tmp_path / "dropout", model=mlp(nn.Dropout(0.5)))


class Counting(nn.Module):
    """A buffer that moves at each forward pass of training."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.net(x)


def test_a_buffer_that_moves():
    with pytest.raises(
        Refused, match=r"'calls' at step 1: got another value than at step 0: the forward pass changes it"
    ):
        Replay(train(Counting(), data(), mse, SGD, steps=3)).check()


class Returning(nn.Module):
    """Outputs of another kind."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = mlp(), how

    def forward(self, x):
        return self.how(self.net(x))


@pytest.mark.parametrize(
    ("how", "loss", "message"),
    [
        (lambda out: (out, out), lambda out, y: mse(out[0], y), "the model's output: got a tuple; expected one tensor"),
        (lambda out: out.T, lambda out, y: mse(out.T, y), r"the model's output: got shape \[2, 11\]"),
        (lambda out: out.mean(), lambda out, y: (out - y.mean()) ** 2, r"the model's output: got shape \[\]"),
    ],
    ids=["tuple", "transposed", "scalar"],
)
def test_outputs_that_are_not_one_tensor(how, loss, message):
    with pytest.raises(Refused, match=message):
        Replay(train(Returning(how), data(), loss, SGD, steps=2)).check()


class Branching(nn.Module):
    """Half of the steps do not use the second layer: it gets no gradient there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(D, 2).double(), nn.Linear(2, 1).double()

    def forward(self, x):
        h = self.first(x)
        return h.sum(1, keepdim=True) if float(x[0, 0]) > 0 else self.second(h)


@pytest.mark.parametrize("name", ["dampening", "adam l2", "adamw"])
def test_parameters_without_a_gradient_in_some_steps(name):
    (x, y), model, plain = data(), Branching(), Branching()
    trajectory = train(model, (x, y), mse, OPTIMIZERS[name], steps=12, batch_size=2, record="all", clip=1.0)
    opt = OPTIMIZERS[name](list(plain.parameters()))
    steps = list((replay := Replay(trajectory)).backwards())[::-1]
    buffers, unused = dict.fromkeys(replay.names, 0.0), set()
    for step in steps:
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        opt.zero_grad()
        mse(plain(x[step.rows]), y[step.rows]).backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in plain.named_parameters()}
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        opt.step()
        for name, p in plain.named_parameters():
            assert torch.equal(step.after[name], p)
            u, gradient = step.updates[name], gradients[name]
            d = u.coupled * before[name] + (0.0 if gradient is None else u.gradient * gradient)
            buffers[name] = u.carry * buffers[name] + u.entering * d
            made = -u.direct * d - u.buffered * buffers[name] - u.decoupled * before[name]
            assert size(made - (p.detach() - before[name])) <= 1e-13
            unused |= {step.step} if gradient is None else set()
    assert 0 < len(unused) < 12
    assert replay.bitwise


class Writing(nn.Module):
    """Writes into its input, as a first layer with inplace=True does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(D, 1).double()

    def forward(self, x):
        x -= 0.5
        return self.layer(x)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_model_that_writes_into_its_input(batch_size):
    x, y = data()
    kept, model, plain = x.clone(), Writing(), Writing()
    options = dict(batch_size=batch_size, target_loss=None if batch_size is None else -1.0)
    trajectory = train(model, (x, y), mse, SGD, steps=7, **options)
    opt = SGD(list(plain.parameters()))
    for step in range(7):
        rows = trajectory.batch(step)
        opt.zero_grad()
        mse(plain(kept[rows]), y[rows]).backward()
        opt.step()
    assert torch.equal(model.layer.weight, plain.layer.weight)
    replay = Replay(trajectory)
    check_updates(replay, 1e-12)
    assert replay.bitwise
    outputs, _ = Reruns(replay).run(torch.ones(3, N, dtype=F64), lambda out, k: out.clone(), x)
    torch.testing.assert_close(outputs, plain(kept.clone()).detach().expand(3, N, 1), rtol=1e-12, atol=1e-14)
    ntkit.influence(trajectory, x[:2], y[:2], measure="logit")
    assert torch.equal(x, kept)


def test_a_loss_that_goes_round_the_outputs():
    model = mlp()
    penalised = lambda out, y: mse(out, y) + model[0].weight.square().sum()
    trajectory = train(model, data(), penalised, SGD, steps=3)
    with pytest.raises(Refused, match=r"snapshot of step 1 .*'0.weight'"):
        Replay(trajectory).check()
    only = lambda out, y: model[0].weight.square().sum()
    only.__qualname__ = penalised.__qualname__
    with pytest.raises(Refused, match="loss: got a value that does not depend on the model's outputs"):
        Replay(trajectory, loss=only).check()


def test_what_was_captured_on_a_gpu_is_made_again_without(tmp_path):
    train(mlp(), data(), mse, ADAM, steps=4, path=tmp_path)
    edit(tmp_path, lambda run: run["settings"]["optimizer"]["groups"][0].update(capturable=True))
    assert checked(tmp_path).bitwise
