"""`LightningCallback` and `TransformersCallback` in real trainings: what they record is what the framework did."""

from __future__ import annotations

import sys
from collections import UserDict
from pathlib import Path

import pytest
import torch
from processes import script
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.families import _missing as repaired  # makes a torchvision importable that was built for another torch

import ntkit
from ntkit.base.checks import Refused
from ntkit.trajectory import Trajectory

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_states(traj, states):
    assert traj.steps == sorted(states)
    for step, state in states.items():
        assert traj.state(step).keys() >= state.keys()
        assert all(torch.equal(traj.state(step)[name], tensor) for name, tensor in state.items()), step


def test_the_module_needs_no_framework_and_says_what_is_missing():
    code = (
        "import sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'transformers'): sys.modules[name] = None\n"
        "import ntkit.trajectory.callbacks as callbacks\n"
        "from ntkit import Refused\n"
        "for name in ('Lightning', 'Transformers'):\n"
        "    try: getattr(callbacks, name + 'Callback')\n"
        "    except Refused as refused: print(refused)\n"
        "assert not hasattr(callbacks, 'KerasCallback')\n"
    )
    done = script(code).done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "callback: got no lightning in this Python; expected the package lightning. Run: pip install lightning",
        "callback: got no transformers in this Python; expected the package transformers. "
        "Run: pip install transformers",
    ]


# --- Lightning -----------------------------------------------------------------------------------------------


def rows_dataset():
    x = torch.randn(14, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": x[i], "y": x[i].sum(0, keepdim=True), "row": i} for i in range(14)]


def lightning_parts(name):
    repaired("torchvision")
    pl = pytest.importorskip(name, reason=f"{name} is not installed")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

        def training_step(self, batch, batch_idx):
            return {"loss": nn.functional.mse_loss(self.net(batch["x"]), batch["y"])}

        def configure_optimizers(self):
            opt = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Spy(pl.Callback):
        """Keeps states and losses on its own, in the optimizer's step and around it."""

        def __init__(self):
            self.states, self.losses, self.rows, self.rates = {}, [], [], []

        def on_train_start(self, trainer, module):
            self.states[0] = copied(module)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.rates.append([group["lr"] for group in optimizer.param_groups])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"].item())
            self.rows.append(batch["row"].tolist())
            if trainer.global_step not in self.states:  # else another batch of the next step: running statistics move
                self.states[trainer.global_step] = copied(module)

    def fit(*callbacks, module=None, **options):
        loader = torch.utils.data.DataLoader(rows_dataset(), batch_size=3)  # 5 batches, the last of 2 rows
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options)
        module = module or Module()
        trainer.fit(module, loader)
        return module

    return pl, Module, Spy, fit


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(tmp_path, name):
    pl, _, Spy, fit = lightning_parts(name)
    from ntkit import LightningCallback

    spy = Spy()
    callback = LightningCallback(tmp_path / "run", record="all", indices="row")
    assert isinstance(callback, pl.Callback) or name == "pytorch_lightning"  # made of the other one, which works too
    module = fit(callback, spy, max_epochs=2, accumulate_grad_batches=2)
    traj = Trajectory.open(tmp_path / "run")
    assert traj.status == "complete"
    assert callback.recorder.done == 6  # 5 batches an epoch are 2 + 2 + 1
    assert_states(traj, spy.states)
    assert_states(traj, spy.states | {6: copied(module)})
    assert traj.learning_rates.tolist() == spy.rates
    assert len({rate for (rate,) in spy.rates}) == 6
    groups = [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]
    for step, group in enumerate(groups):
        assert traj.batch(step).tolist() == [row for i in group for row in spy.rows[i]]
        assert traj.losses[step].item() == pytest.approx(sum(spy.losses[i] for i in group), rel=1e-6)


def test_lightning_options_and_what_goes_wrong(tmp_path):
    _, Module, _, fit = lightning_parts("lightning.pytorch")
    from ntkit import LightningCallback

    fit(LightningCallback(tmp_path / "a", record=2, budget="9 kB"), max_epochs=1)
    traj = Trajectory.open(tmp_path / "a")
    assert (len(traj.losses), traj.steps[0], traj.steps[-1]) == (5, 0, 5)
    assert len(traj.steps) < 5
    assert sum(f.stat().st_size for f in (tmp_path / "a" / "snapshots").iterdir()) <= 9000
    with pytest.raises(Refused, match="got a step recorded without indices"):
        traj.batch(0)
    with pytest.raises(
        Refused, match=r"indices: got a batch with \['row', 'x', 'y'\]; expected a batch that is a dict"
    ):
        fit(LightningCallback(tmp_path / "b", indices="idx"), max_epochs=1)
    with pytest.raises(Refused, match=r"holds a run"):
        fit(LightningCallback(tmp_path / "a"), max_epochs=1)

    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("mine")
            return super().training_step(batch, batch_idx)

    failing = Failing()
    with pytest.raises(RuntimeError, match="mine"):
        fit(LightningCallback(tmp_path / "c"), module=failing, max_epochs=1)
    traj = Trajectory.open(tmp_path / "c")
    assert (traj.status, len(traj.losses), traj.steps) == ("running", 3, [0, 1, 2, 3])

    class Two(Module):
        def configure_optimizers(self):
            self.automatic_optimization = False
            return [torch.optim.SGD(self.parameters()), torch.optim.SGD(self.parameters())]

    with pytest.raises(Refused, match="LightningCallback: got 2 optimizers; expected one"):
        fit(LightningCallback(tmp_path / "d"), module=Two(), max_epochs=1)
    assert not (tmp_path / "d").exists()


# --- Hugging Face --------------------------------------------------------------------------------------------


def hugging_face(tmp_path, callback, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Spy(transformers.TrainerCallback):
        def __init__(self):
            self.states, self.losses, self.rates = {}, [], []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.states[0] = copied(model)

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append([group["lr"] for group in optimizer.param_groups])

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.states[state.global_step] = copied(model)

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.losses += [logs["loss"]] if "loss" in logs else []

    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    config = transformers.BertConfig(
        **sizes, max_position_embeddings=8, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(0, 30, (6,)), "labels": i % 2} for i in range(20)]
    settings = dict(
        output_dir=tmp_path / "theirs", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-2,
    )  # fmt: skip
    spy = Spy()
    spy.data, spy.seen = data, []
    handle = model.register_forward_pre_hook(lambda m, a, k: spy.seen.append(k["input_ids"].clone()), with_kwargs=True)
    arguments = transformers.TrainingArguments(**(settings | options))
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback, spy])
    trainer.train()
    handle.remove()
    return model, spy


def transformers_callback(*args, **kwargs):
    repaired("transformers")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from ntkit import TransformersCallback

    return TransformersCallback(*args, **kwargs)


def test_transformers(tmp_path):
    callback = transformers_callback(tmp_path / "run", record="all")
    model, spy = hugging_face(tmp_path, callback, logging_steps=1)
    traj = Trajectory.open(tmp_path / "run")
    assert (traj.status, callback.recorder.done) == ("complete", 10)  # 10 batches an epoch, two to a step
    assert_states(traj, spy.states)
    assert_states(traj, spy.states | {10: copied(model)})
    assert traj.learning_rates.tolist() == spy.rates
    assert len({tuple(rates) for rates in spy.rates}) == 10  # the Trainer lets them fall
    assert len(set(spy.losses)) > 5
    assert traj.losses.tolist() == spy.losses


def test_transformers_rows_where_the_rest_is_dropped(tmp_path):
    callback = transformers_callback(tmp_path / "run", record="all")
    options = dict(per_device_train_batch_size=3, dataloader_drop_last=True, gradient_accumulation_steps=1)
    _, spy = hugging_face(tmp_path, callback, logging_steps=1, **options)
    traj = Trajectory.open(tmp_path / "run")
    ids = torch.stack([sample["input_ids"] for sample in spy.data])
    rows = [traj.batch(step) for step in range(len(traj.losses))]
    assert [len(part) for part in rows] == [3] * 12
    assert torch.equal(ids[torch.cat(rows)], torch.cat(spy.seen))


@pytest.mark.parametrize("workers", [0, 2])
def test_transformers_rows(tmp_path, workers):
    """Rows of batches, read ahead or not, with a last batch that is smaller."""
    callback = transformers_callback(tmp_path / "run", record="all")
    options = dict(per_device_train_batch_size=3, dataloader_num_workers=workers)
    _, spy = hugging_face(tmp_path, callback, logging_steps=1, **options)
    traj = Trajectory.open(tmp_path / "run")
    ids = torch.stack([sample["input_ids"] for sample in spy.data])
    rows = [traj.batch(step) for step in range(len(traj.losses))]
    assert torch.equal(ids[torch.cat(rows)], torch.cat(spy.seen))
    assert sorted({len(part) for part in rows}) == [2, 6]  # of 20: three steps of two batches, one of a batch of 2
    assert sorted(torch.cat(rows)[:20].tolist()) == list(range(20))  # older releases stop within the second pass


def test_transformers_from_recording_to_kernels_and_the_path(tmp_path):
    """`track` and `PathKernel` read what the callback records: a model that returns an object, a tokenizer's batch."""
    callback = transformers_callback(tmp_path / "run", record="all")
    model, spy = hugging_face(tmp_path, callback, logging_steps=1, optim="sgd", gradient_accumulation_steps=1)
    ids = torch.stack([sample["input_ids"] for sample in spy.data])
    batch, y = UserDict(input_ids=ids, attention_mask=torch.ones_like(ids)), torch.arange(20) % 2
    run = Trajectory.open(tmp_path / "run")
    model.eval()
    tracked = ntkit.track(run, batch, y, model=model, k=3)
    assert list(tracked.steps) == list(range(21))
    expected = ntkit.TangentKernel(model, "trace")(batch)
    top = torch.linalg.eigvalsh(expected.double())[-1]
    assert abs(float(tracked.series["eigenvalues"][-1][0]) / float(top) - 1) < 1e-4  # float32
    path = ntkit.PathKernel(run, model=model, data=(batch, y), loss=nn.functional.cross_entropy, clip=1.0)
    test = UserDict(input_ids=ids[:4].roll(1, 1), attention_mask=torch.ones_like(ids[:4]))
    result = path.decompose(test)
    assert result.contributions.shape == (4, 2, 20)
    assert result.error < 1e-4  # in float32
    with torch.no_grad():
        outputs = model(**test).logits
    total = result.initial + result.contributions.sum(-1) + result.regularization
    assert float((total - outputs).abs().max()) < 1e-4 * float(outputs.abs().max())


def test_what_the_trainer_recorded_is_explained(tmp_path):
    """Influence, retrainings and importances read it: by default of the logits, with select= of what it picks."""
    callback = transformers_callback(tmp_path / "run", record="all")
    sgd = dict(optim="sgd", gradient_accumulation_steps=1, num_train_epochs=1)
    model, spy = hugging_face(tmp_path, callback, logging_steps=1, **sgd)
    ids, y = torch.stack([sample["input_ids"] for sample in spy.data]), torch.arange(20) % 2
    batch, loss = UserDict(input_ids=ids, attention_mask=torch.ones_like(ids)), nn.functional.cross_entropy
    test, labels = UserDict(input_ids=ids[:2].roll(1, 1), attention_mask=torch.ones_like(ids[:2])), y[:2]
    run, of = Trajectory.open(tmp_path / "run"), {"model": model.eval(), "data": (batch, y), "loss": loss}
    logits, twice = (lambda out: out["logits"]), (lambda out: 2.0 * out.logits)

    def numbers(**select):
        again = ntkit.Retrainings(run, test, labels, clip=1.0, **of, **select)
        values = again.without([[], [0, 1]])
        assert float((values[0] - again.values).abs().max()) < 1e-5  # without none: the run itself
        influence = ntkit.influence(run, test, labels, checks=1, clip=1.0, **of, **select)
        assert influence.check.error < 1e-2  # finite differences of runs in float64
        return {
            "influence": influence.scores,
            "without": values,
            "tracking": ntkit.tracking_importance(run, clip=1.0, **of, **select).values,
            "tracin": ntkit.tracin(run, test, output=0, steps=[0, 10], **of, **select).scores,
            "target": ntkit.target_importance(model, batch, y, loss, **select).values,
        }

    found, same = numbers(), numbers(select=logits)
    for name, value in found.items():
        assert torch.equal(value, same[name]), name
        assert float(value.abs().max()) > 0, name
    other = ntkit.target_importance(model, batch, y, lambda out, y: loss(out / 2, y), select=twice).values
    assert torch.allclose(other, found["target"] / 2, rtol=1e-5)
    with pytest.raises(Refused, match="different from its replay"):  # the run took the loss of the logits themselves
        ntkit.influence(run, test, labels, clip=1.0, **of, select=twice)


def test_transformers_options_and_what_goes_wrong(tmp_path):
    size = 40_000
    callback = transformers_callback(tmp_path / "a", record=3, budget=4 * size)
    _, spy = hugging_face(tmp_path, callback, logging_steps=5)
    traj = Trajectory.open(tmp_path / "a")
    assert (traj.steps[0], traj.steps[-1]) == (0, 10)
    assert {3, 6, 9} & set(traj.steps)
    assert sum(f.stat().st_size for f in (tmp_path / "a" / "snapshots").iterdir()) <= 4 * size
    assert len(spy.losses) == 2
    assert traj.losses.isnan().all()  # means over five steps are no step's loss
    assert traj.status == "complete"
    best = dict(load_best_model_at_end=True, eval_strategy="no", save_strategy="no")
    with pytest.raises(Refused, match="got load_best_model_at_end=True; expected a model that keeps its last state"):
        hugging_face(tmp_path, transformers_callback(tmp_path / "b"), **best)
    assert not (tmp_path / "b").exists()
