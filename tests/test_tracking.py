"""Numbers along training against their definitions, in both forms of the kernel; laws; stopping and going on."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Refused
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.tracking import Tracked, half_squared, scalars, track
from ntkit.tracking import snapshot_numbers as snapshot

N, C = 11, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mlp(outputs: int = C, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def run(model, x, y, loss=half_squared, lr=0.05, steps=8, **more):
    return ntkit.train(model, (x, y), loss, lambda p: torch.optim.SGD(p, lr=lr), steps=steps, **more)


@pytest.fixture(scope="module")
def case():
    x, y = draw(N, 4), draw(N, C, seed=1)
    model = mlp()
    return x, y, model, run(model, x, y)


def aligned(K, Y):
    """Cosine between K and Y Y^T."""
    return float((Y * (K @ Y)).sum() / K.norm() / (Y.T @ Y).norm())


def spread(M, probes=32):
    """Relative standard error of the trace of M as the mean of z^T M z over random signs z."""
    return float((2 * (M.square().sum() - M.diagonal().square().sum()) / probes).sqrt() / M.trace())


@pytest.mark.parametrize("memory", [None, "2 kB"])  # the second: no room for a Gram matrix
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_every_number_is_its_definition(case, outputs, memory):
    x, y, model, trajectory = case
    tracked = track(trajectory, x, y, model=model, k=4, outputs=outputs, memory=memory)
    assert tracked.settings["kernel"] == ("dense" if memory is None else "matrix-free")
    assert tracked.steps == trajectory.steps
    Ks, other = [], mlp()
    for i, step in enumerate(tracked.steps):
        at = {name: values[i] for name, values in tracked.series.items()}
        trajectory.load(other, step)
        shares = {name: tangent_kernel(other, x, params=[f"{name}.weight", f"{name}.bias"]) for name in ("0", "2")}
        K4 = shares["0"] + shares["2"]
        flat = K4.permute(0, 2, 1, 3).reshape(N * C, N * C)
        K = flat if outputs == "full" else K4.diagonal(dim1=2, dim2=3).sum(2)
        Ks.append(K)
        f = other(x).detach()
        values, vectors = torch.linalg.eigh(K)
        values, vectors = values.flip(0), vectors.flip(1)
        assert at["eigenvalues"] == pytest.approx(values[:4].tolist(), rel=1e-9)
        assert at["residual"] < 1e-8
        assert at["trace"] == pytest.approx(float(K.diagonal().sum()), rel=1e-12)
        assert at["tail"] == pytest.approx(float(values[4:].sum()), rel=1e-9)
        assert at["effective_rank"] == pytest.approx(at["trace"] / float(values[0]), rel=1e-9)
        assert at["condition"] == pytest.approx(float(values[0] / values[3]), rel=1e-8)
        for name, v in (("target", y), ("output", f), ("residual", f - y)):
            v = v.reshape(-1, 1) if outputs == "full" else v
            energy = ((vectors[:, :4].T @ v) ** 2).sum(1).cumsum(0) / (v**2).sum()
            assert at[f"energy_{name}"] == pytest.approx(energy.tolist(), abs=1e-8)
        assert at["loss"] == pytest.approx(float(((f - y) ** 2).sum() / (2 * N)), rel=1e-12)
        sharpness = float(torch.linalg.eigvalsh(flat)[-1]) / N
        assert at["sharpness"] == pytest.approx(sharpness, rel=1e-4)
        assert at["stable_learning_rate"] == pytest.approx(2 / sharpness, rel=1e-4)  # 2 N / lambda_1
        assert at["learning_rate"] == 0.05
        # the real next step, since these are all points and the steps are plain
        if step + 1 in trajectory.steps:
            trajectory.load(other, step + 1)
            true = (other(x).detach() - f).reshape(-1)
            linear = -0.05 / N * flat @ (f - y).reshape(-1)
            first = at["first_order"]
            assert first["cosine"] == pytest.approx(float(true @ linear / true.norm() / linear.norm()), rel=1e-9)
            assert first["relative_error"] == pytest.approx(float((true - linear).norm() / true.norm()), rel=1e-6)
            assert first["norm_ratio"] == pytest.approx(float(linear.norm() / true.norm()), rel=1e-9)
        cosine = float((K * Ks[0]).sum() / K.norm() / Ks[0].norm())
        change = float((K - Ks[0]).norm() / Ks[0].norm())
        Y = y.reshape(-1, 1) if outputs == "full" else y
        middle = torch.eye(N, dtype=torch.float64) - 1 / N
        J = torch.kron(middle, torch.eye(C, dtype=torch.float64)) if outputs == "full" else middle
        rest = (vectors[:, 4:] * values[4:] ** 2) @ vectors[:, 4:].T  # K^2 outside the top pairs, which are exact
        for name, M, Z, part in (("alignment", K, Y, rest), ("alignment_centered", J @ K @ J, J @ Y, None)):
            part = M @ M if part is None else part
            tolerance = 1e-9 if memory is None else 2.5 * spread(part) * float(part.trace()) / float(M.norm() ** 2)
            assert at[name] == pytest.approx(aligned(M, Z), rel=tolerance), name
        if memory is None:
            own = [torch.where(torch.arange(C) == c, y, 0).reshape(-1, 1) if outputs == "full" else y[:, [c]]
                   for c in range(C)]  # fmt: skip
            assert at["class_alignment"] == pytest.approx([aligned(J @ K @ J, J @ t) for t in own], rel=1e-9)
            for layer in ("0", "2"):
                share = shares[layer].diagonal(dim1=2, dim2=3).sum(2)
                assert at["layer_trace"][layer] == pytest.approx(float(share.trace()), rel=1e-9)
                wanted = aligned(middle @ share @ middle, middle @ y)
                assert at["layer_alignment"][layer] == pytest.approx(wanted, rel=1e-9)
            a, b = J @ K @ J, J @ Ks[0] @ J
            assert at["cka"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)
            assert at["distance"] == pytest.approx(max(0.0, 1 - cosine), abs=1e-12)
            assert at["change"] == pytest.approx(change, abs=1e-12)
            assert sum(at["layer_trace"].values()) == pytest.approx(at["trace"], rel=1e-9)
            assert at["layer_trace"].keys() == at["layer_alignment"].keys() == {"0", "2"}
            assert at["change_error"] == 0.0
            if i:
                before = float((K * Ks[-2]).sum() / K.norm() / Ks[-2].norm())
                assert at["velocity"] == pytest.approx((1 - before) / (step - tracked.steps[i - 1]), abs=1e-10)
        elif i:  # estimated: within five of its own standard errors of the square
            assert abs(at["change"] ** 2 / change**2 - 1) < 5 * at["change_error"] + 1e-9
    assert tracked.series["velocity"][0] is None


class Products:
    """A matrix of which a tracking sees products alone."""

    device = torch.device("cpu")

    def __init__(self, K):
        self.K, self.shape = K, K.shape

    def __matmul__(self, v):
        return self.K @ v


def estimates(pairs):
    """What is estimated for pairs of kernels, [pairs, 4]: the square of the change, distance, cka; its error."""
    rows = []
    for pair in pairs:
        now, first = (snapshot.KernelProducts(Products(m), len(m)).signature() for m in pair)
        found = snapshot.kernel_change(now, first, first, 1)
        rows.append([found["change"] ** 2, found["distance"], found["cka"], found["change_error"]])
    return torch.tensor(rows, dtype=torch.float64)


def test_estimates_get_better_as_the_square_root_and_say_their_error(monkeypatch):
    n, H = 20, torch.eye(20, dtype=torch.float64) - 1 / 20
    pairs, exact = [], []
    for seed in range(300):
        A, B = draw(2, n, n, seed=seed)
        K, first = A @ A.T + 0.5 * B @ B.T, A @ A.T
        pairs.append((K, first))
        a, b = H @ K @ H, H @ first @ H
        change = (K - first).norm() / first.norm()
        exact.append([change**2, 1 - (K * first).sum() / K.norm() / first.norm(), (a * b).sum() / a.norm() / b.norm()])
    exact, off = torch.tensor(exact, dtype=torch.float64), {}
    for probes in (8, 32, 128):
        monkeypatch.setattr(snapshot, "_PROBES", probes)
        found = estimates(pairs)
        off[probes] = (found[:, :3] - exact).square().mean(0).sqrt() / exact.mean(0)
        z = (found[:, 0] / exact[:, 0] - 1) / found[:, 3]
        # of Student's t with probes - 1 degrees of freedom the mean square is (probes - 1) / (probes - 3)
        assert 0.7 < z.square().mean() * (probes - 3) / (probes - 1) < 1.4, (probes, z.square().mean())
    for few, many in ((8, 32), (32, 128)):
        assert ((off[few] / off[many] - 2).abs() < 0.5).all(), (few, off[few] / off[many])


def test_the_error_of_a_change_is_that_of_a_ratio():
    """Three times the same kernel: the ratio is exact. A change of the diagonal: |K - K_0|^2 is exact, |K_0|^2 not."""
    K = draw(40, 40)
    K = K @ K.T
    found = estimates([(3 * K, K), (K + 9 * torch.eye(40), K)])
    assert found[0, [0, 3]].tolist() == pytest.approx([4, 0], abs=1e-12)
    M = K @ K
    assert float(found[1, 3]) == pytest.approx(spread(M), rel=5 / (2 * 31) ** 0.5)
    assert float(81 * 40 / M.trace() / found[1, 0]) == pytest.approx(1, abs=5 * spread(M))


def test_each_output_on_its_own(case):
    x, y, model, trajectory = case
    tracked = track(trajectory, x, y, model=model, k=3, outputs="diagonal", steps=[0, 8])
    for c, part in itertools.product(range(C), [1]):
        one = track(trajectory, x, model=model, k=3, outputs=lambda out, c=c: out[:, c], steps=[0, 8])
        own = tracked.series["per_output"][part][c]
        assert own["eigenvalues"] == pytest.approx(one.series["eigenvalues"][part], rel=1e-9)
        assert own["energy_output"] == pytest.approx(one.series["energy_output"][part], abs=1e-9)
        V, t = torch.as_tensor(tracked.eigenvectors(8))[c], y[:, [c]]  # of the last snapshot, part 1
        energy = ((V.double().T @ t) ** 2).sum(1).cumsum(0) / (t**2).sum()
        assert own["energy_target"] == pytest.approx(energy.tolist(), abs=1e-6)
    assert tracked.eigenvectors(8).shape == (C, N, 3)


def test_a_linear_model_keeps_its_kernel_and_halving_the_rate_halves_the_error():
    x, y = draw(N, 4), draw(N, 1, seed=1)
    model = nn.Linear(4, 1).double()
    series = track(run(model, x, y), x, y, model=model, k=2).series
    assert max(series["change"]) < 1e-12
    assert all(first["relative_error"] < 1e-10 for first in series["first_order"])
    errors = []
    for lr in (0.02, 0.01, 0.005):
        model = mlp(1)
        found = track(run(model, x, y, lr=lr, steps=1), x, y, model=model, k=2, steps=[0])
        errors.append(found.series["first_order"][0]["relative_error"])
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_bound_on_the_learning_rate_is_where_training_turns():
    x, y = draw(N, 4), draw(N, 1, seed=1)
    model = nn.Linear(4, 1).double()
    bound = track(run(model, x, y, steps=1), x, y, model=model, k=1).series["stable_learning_rate"][0]
    losses = []
    for factor in (0.98, 1.02):
        torch.manual_seed(0)
        again = nn.Linear(4, 1).double()
        losses.append(run(again, x, y, lr=factor * bound, steps=400).losses)
    assert float(losses[0][-1]) < float(losses[0][0])
    assert float(losses[1][-1]) > 10 * float(losses[1][0])


@pytest.mark.parametrize("outputs", [1, 3])
def test_labels_and_losses(outputs):
    x, labels = draw(N, 4), torch.arange(N) % max(2, outputs)
    model = mlp(outputs)

    def loss(out, y):
        return F.cross_entropy(out, y) if outputs > 1 else F.binary_cross_entropy_with_logits(out[:, 0], y.double())

    trajectory = run(model, x, labels, loss)
    tracked = track(trajectory, x, labels, model=model, k=5, steps=[8])
    given = track(trajectory, x, labels, model=model, k=5, steps=[8], loss=loss)
    del given.series["velocity"], tracked.series["velocity"]
    assert given.series == tracked.series  # the default is the usual one
    out = model(x).detach()
    if outputs > 1:
        p = out.softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    else:
        p = out.sigmoid()
        H = (p * (1 - p))[:, :, None]
    K = tangent_kernel(model, x)
    flat = K.permute(0, 2, 1, 3).reshape(N * outputs, -1)
    expected = float(torch.linalg.eigvals(torch.block_diag(*H) @ flat).real.max()) / N
    assert tracked.series["sharpness"][0] == pytest.approx(expected, rel=1e-4)
    assert tracked.series["loss"][0] == pytest.approx(float(loss(out, labels)), rel=1e-12)


def test_stopped_and_gone_on(case, tmp_path):
    x, y, model, trajectory = case
    whole = track(trajectory, x, y, model=model, k=3)
    seen = []

    def stop(record):
        seen.append(record["step"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track(trajectory, x, y, model=model, k=3, path=tmp_path, on_snapshot=stop)
    assert Tracked.open(tmp_path).steps == trajectory.steps[:3]
    (tmp_path / f"step-{trajectory.steps[2]:08d}.json").unlink()  # killed between arrays and numbers
    gone_on = track(trajectory, x, y, model=model, k=3, path=tmp_path, on_snapshot=lambda r: seen.append(r["step"]))
    assert seen == [*trajectory.steps[:3], *trajectory.steps[2:]]
    assert gone_on.series == whole.series
    again = Tracked.open(tmp_path)
    assert again.series == whole.series
    assert (again.eigenvectors(8) == whole.eigenvectors(8)).all()
    with pytest.raises(Refused, match="another k"):
        track(trajectory, x, y, model=model, k=4, path=tmp_path)
    with pytest.raises(Refused, match=r"track\.json"):
        Tracked.open(tmp_path / "nowhere")


def test_the_model_is_left_as_it_was(case):
    x, y, _, trajectory = case
    model = mlp(seed=7).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    track(trajectory, x, y, model=model, k=2)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_dead_network_has_no_spectrum():
    x, y = draw(N, 4), draw(N, 1, seed=1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].bias.fill_(-100.0)
    tracked = track(run(model, x, y, steps=2), x, y, model=model, k=3)
    assert tracked.series["trace"] == [0.0] * 3
    assert tracked.series["eigenvalues"][0] == [None] * 3
    assert tracked.series["stable_learning_rate"] == [None] * 3


def test_a_kernel_of_zeros_in_both_forms():
    """Both factors of a product are zero: neither has a gradient."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = (nn.Parameter(torch.zeros(*shape, dtype=torch.float64)) for shape in ((4, 1), (1, C)))

        def forward(self, x):
            return x @ self.u @ self.v

    x, y = draw(N, 4), draw(N, C, seed=1)
    trajectory = run(Product(), x, y, steps=2)
    for outputs in ("trace", "full"):
        whole, products = (
            track(trajectory, x, y, model=Product(), k=3, outputs=outputs, memory=memory) for memory in (None, "2 kB")
        )
        assert products.settings["kernel"] == "matrix-free"
        assert products.series["status"] == ["the kernel is zero"] * 3
        assert products.series == {name: whole.series[name] for name in products.series}


def test_examples_that_come_again_nested_layers_and_groups():
    """Three points three times: a kernel of rank 3. Where the last layer alone moves, first order is exact."""
    x, y = draw(3, 4).repeat(3, 1), draw(9, 1, seed=1)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 1)).double()
    groups = lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.0}, {"params": p[2:]}], lr=0.1)
    trajectory = ntkit.train(model, (x, y), half_squared, groups, steps=2)
    tracked = track(trajectory, x, y, model=model, k=5)
    for i, step in enumerate(tracked.steps):
        trajectory.load(model, step)
        K = tangent_kernel(model, x).reshape(9, 9)
        values, vectors = (t.flip(-1) for t in torch.linalg.eigh(K))
        found = {name: series[i] for name, series in tracked.series.items()}
        assert found["eigenvalues"][3:] == [None, None]
        assert found["eigenvalues"][:3] == pytest.approx(values[:3].tolist())
        assert found["condition"] == pytest.approx(float(values[0] / values[2]))
        energy = ((vectors.T @ y) ** 2 / (y**2).sum()).cumsum(0)[:3, 0]
        assert found["energy_target"][:3] == pytest.approx(energy.tolist())
        assert found["energy_target"][3:] == [None, None]
        assert found["layer_trace"].keys() == {"0.0", "1"}
        assert sum(found["layer_trace"].values()) == pytest.approx(float(K.trace()))
        assert found["first_order"]["relative_error"] < 1e-10


def test_steps_in_any_form(case, tmp_path):
    x, y, model, trajectory = case
    for i, steps in enumerate(([8, 0, 2, 2], np.array([8, 2, 0, 2]), torch.tensor([0, 0, 2, 8]))):
        tracked = track(trajectory, x, y, model=model, k=np.int64(2), steps=steps, path=tmp_path / str(i))
        assert tracked.steps == Tracked.open(tmp_path / str(i)).steps == [0, 2, 8]
        assert all(type(step) is int for step in tracked.steps)


def test_a_tracking_without_a_snapshot_yet(case, tmp_path, monkeypatch):
    x, y, model, trajectory = case

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkit.tracking.tracker._Tracker.measure", stop)
    with pytest.raises(KeyboardInterrupt):
        track(trajectory, x, y, model=model, k=2, path=tmp_path / "t")
    assert "snapshots=0" in repr(Tracked.open(tmp_path / "t"))


def test_refusals(case):
    x, y, model, trajectory = case
    with pytest.raises(Refused, match=r"y: got shape \(10, 3\)"):
        track(trajectory, x, y[:10], model=model)
    with pytest.raises(Refused, match="k: got 99; expected an integer from 1 to 11"):
        track(trajectory, x, y, model=model, k=99)
    for k in ("3", 2.0, True, None):
        with pytest.raises(Refused, match="k: got"):
            track(trajectory, x, y, model=model, k=k)
    for steps, got in (([], "none"), ([5], "5"), ("all", "'all'"), ([True], "True"), ([1, [0]], "[0]")):
        with pytest.raises(Refused, match=re.escape(f"steps: got {got}; expected")):
            track(trajectory, x, y, model=model, k=2, steps=steps)
    with pytest.raises(Refused, match="model's parameters"):
        track(trajectory, x, model=mlp(2), k=2)
    with pytest.raises(Refused, match="diagonal"):
        track(trajectory, x, model=model, k=2, outputs="diagonal", memory="1 kB")


def test_phases_of_a_decayed_run():
    x, y = draw(N, 4), draw(N, 1, seed=1)
    model = mlp(1)
    trajectory = run(model, x, y, lr=0.4, steps=12, record="all", schedule=lambda step: 1.0 if step < 5 else 0.25)
    tracked = track(trajectory, x, y, model=model, k=2)
    assert tracked.series["learning_rate"] == pytest.approx([0.4] * 5 + [0.1] * 8)
    one, two = tracked.phases()
    assert (one["start"], one["stop"], two["start"], two["stop"]) == (0, 4, 5, 12)
    assert two["learning_rate"] == pytest.approx(0.1)
    top = [row[0] for row in tracked.series["eigenvalues"]]
    assert one["lambda_1"] == [top[0], top[4]]
    assert two["lambda_1"] == [top[5], top[12]]
    assert two["stability"] == pytest.approx(tracked.series["sharpness"][12] * 0.05)
    assert track(trajectory, x, model=model, k=2).phases()[0]["trace"][0] == tracked.series["trace"][0]


def test_tensorboard(case, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x, y, model, trajectory = case
    tracked = track(trajectory, x, y, model=model, k=3)
    tracked.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(e.step, e.value) for e in events.Scalars("ntkit/eigenvalues/1")]
    expected = [row[0] for row in tracked.series["eigenvalues"]]
    assert [s for s, _ in read] == tracked.steps
    assert [v for _, v in read] == pytest.approx(expected, rel=1e-6)


def test_scalars():
    record = {"loss": 0.5, "energy_target": [i / 10 for i in range(10)], "status": "x", "k": None, "trace": math.pi}
    assert scalars(record) == {
        "loss": 0.5, "energy_target/1": 0.0, "energy_target/5": 0.4, "energy_target/10": 0.9, "trace": math.pi,
    }  # fmt: skip


def test_numbers_of_another_run_are_never_taken_for_this_one(tmp_path):
    x, y = draw(N, 4), draw(N, 1, seed=1)
    slow, fast = (run(mlp(1), x, y, lr=lr, steps=8) for lr in (0.05, 0.5))  # the same start
    track(slow, x, y, model=mlp(1), k=2, path=tmp_path)
    with pytest.raises(Refused, match="another run"):
        track(fast, x, y, model=mlp(1), k=2, path=tmp_path)
    outputs = mlp(3)
    both = run(outputs, x, draw(N, 3))
    track(both, x, model=outputs, k=2, path=tmp_path / "c", outputs=lambda out: out[:, 0])
    with pytest.raises(Refused, match="another output"):
        track(both, x, model=outputs, k=2, path=tmp_path / "c", outputs=lambda out: out[:, 1])
    labels = torch.arange(N) % 3
    track(both, x, labels, model=outputs, k=2, path=tmp_path / "l", loss=nn.CrossEntropyLoss())
    with pytest.raises(Refused, match="another loss"):
        track(both, x, labels, model=outputs, k=2, path=tmp_path / "l", loss=nn.CrossEntropyLoss(label_smoothing=0.3))


def test_changes_are_from_the_first_step_asked_for_also_when_gone_on(case, tmp_path):
    x, y, model, trajectory = case
    track(trajectory, x, y, model=model, k=2, path=tmp_path, steps=[8])
    again = track(trajectory, x, y, model=model, k=2, path=tmp_path, steps=[8, 0])
    fresh = track(trajectory, x, y, model=model, k=2, steps=[0, 8])
    assert again.steps == [0, 8]
    assert again.series == fresh.series
    assert again.series["change"][1] > 0


@pytest.mark.parametrize("labels", [[-1, 1], [1, 2, 3]])
def test_labels_are_numbered_from_zero(labels):
    x = draw(N, 4)
    model = mlp(1 if len(labels) == 2 else 3)
    trajectory = run(model, x, draw(N, 1 if len(labels) == 2 else 3))
    y = torch.tensor([labels[i % len(labels)] for i in range(N)], dtype=torch.int32)
    with pytest.raises(Refused, match="labels from"):
        track(trajectory, x, y, model=model, k=2)
    track(trajectory, x, y.clamp(min=0) % 2, model=model, k=2, steps=[0])  # int32 is as good as int64


@pytest.mark.parametrize("y", [draw(N, 1, seed=1)[:, 0], torch.arange(N) % 2])
def test_a_loss_that_compares_each_output_with_each_target_is_refused(y):
    x, model = draw(N, 4), mlp(1)
    trajectory = run(model, x, draw(N, 1), steps=1)
    pairs = lambda out, y: F.mse_loss(out, y.double())  # [N, 1] and [N] broadcast to [N, N]
    with pytest.raises(Refused, match="each with each"):
        track(trajectory, x, y, model=model, k=2, loss=pairs)
    own = track(trajectory, x, y, model=model, k=2, loss=lambda out, y: F.mse_loss(out[:, 0], y.double()))
    trajectory.load(model, 1)
    expected = (model(x)[:, 0] - y).square().mean()
    assert own.series["loss"][1] == pytest.approx(float(expected.detach()), rel=1e-12)


def test_the_sharpness_of_a_loss_that_couples_samples_is_not_told():
    x, y, model = draw(N, 4), draw(N, 1, seed=1), nn.Linear(4, 1).double()
    root = lambda out, y: F.mse_loss(out, y).sqrt()
    trajectory = run(model, x, y, loss=root, steps=1)
    tracked = track(trajectory, x, y, model=model, k=2, loss=root)
    assert tracked.series["sharpness"] == tracked.series["stable_learning_rate"] == [None, None]
    before = model(x).detach()
    trajectory.load(model, 0)
    assert tracked.series["loss"][0] == pytest.approx(float(root(model(x), y).detach()), rel=1e-12)
    change = float((before - model(x).detach()).norm())  # of a linear model, to first order and in truth
    assert tracked.series["first_order"][0]["relative_error"] * change < 1e-12
    weighted = lambda out, y: (torch.arange(1.0, N + 1)[:, None] * (out - y) ** 2).mean()  # each sample has its own
    inputs = torch.cat([x, torch.ones(N, 1)], 1)
    hessian = 2 / N * inputs.T @ (torch.arange(1.0, N + 1)[:, None] * inputs)
    found = track(trajectory, x, y, model=model, k=2, loss=weighted, steps=[0]).series["sharpness"][0]
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian.double())[-1]), rel=1e-5)


def test_class_weights_and_snapshots_that_are_not_finite(tmp_path):
    x, labels = draw(N, 4).float(), torch.arange(N) % 3
    model = mlp(3).float()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ntkit.record(model, optimizer, path=tmp_path / "run", record="all") as rec:
        for step in range(3):
            optimizer.zero_grad()
            loss(model(x), labels).backward()
            optimizer.step()
            if step == 1:
                with torch.no_grad():
                    model[0].weight[0, 0] = math.nan
            rec.step()
    tracked = track(ntkit.Trajectory.open(tmp_path / "run"), x, labels, model=model, k=2, loss=loss)
    assert tracked.series["eigenvalues"][0] is not None
    assert tracked.series["eigenvalues"][2] is None
    assert tracked.series["status"][2] == "parameters that are not finite"
    (phase,) = tracked.phases()
    assert phase["lambda_1"] == [tracked.series["eigenvalues"][0][0], None]
    model.load_state_dict(mlp(3).float().state_dict())
    assert tracked.series["loss"][0] == pytest.approx(float(loss(mlp(3).float()(x), labels).detach()), rel=1e-5)


def test_groups_that_came_later_have_no_first_order(tmp_path):
    x, y = draw(N, 4), draw(N, 1, seed=1)
    model = mlp(1)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with ntkit.record(model, optimizer, path=tmp_path / "run", record="all") as rec:
        for step in range(3):
            if step == 1:
                optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
            optimizer.zero_grad()
            half_squared(model(x), y).backward()
            optimizer.step()
            rec.step()
    tracked = track(ntkit.Trajectory.open(tmp_path / "run"), x, y, model=model, k=2)
    assert tracked.series["first_order"] == [None] * 4
