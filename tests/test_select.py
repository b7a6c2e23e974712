"""A part of a model's output, picked by ``select=``: the same numbers as of a module that returns that part alone."""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from benchmarks.families import _missing as repaired  # makes a torchvision importable that was built for another torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from ntkit.explanations.importances import tracking_importance
from ntkit.jacobian.replicas import in_one_thread
from ntkit.trajectory.replay import Replay


class Picks(nn.Module):
    """The oracle: the model behind a module that returns the part."""

    def __init__(self, net, select):
        super().__init__()
        self.net, self.select = net, select

    def forward(self, *args, **kwargs):
        return self.select(self.net(*args, **kwargs))


@dataclass
class Two:
    """Without logits: there is no part that is meant by default."""

    hidden: Tensor
    scores: Tensor


class Rich(nn.Module):
    """Returns two tensors in an object."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(3, 4), nn.Linear(4, 3), form

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.form(h, self.b(h))


def bert(kind):
    """A transformer with random weights, from a configuration alone."""
    repaired("torchvision")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return getattr(transformers, kind)(config)


def tokens(n):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 12, (n, 5), generator=draw)
    mask = (torch.arange(5) < torch.randint(2, 6, (n, 1), generator=draw)).long()
    return {"input_ids": ids, "attention_mask": mask}


def numbers(n):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = {
    "a data class": (lambda: Rich(Two), lambda out: out.scores, numbers),
    "a dict": (lambda: Rich(lambda h, s: {"h": h, "s": s}), lambda out: out["s"][:, :2], numbers),
    "a tuple": (lambda: Rich(lambda h, s: (h, s)), lambda out: out[0], numbers),
    "BERT, pooled": (lambda: bert("BertModel"), lambda out: out.pooler_output, tokens),
    "BERT, logits": (lambda: bert("BertForSequenceClassification"), None, tokens),
}


def logits(out):
    return out.logits


def rows(x, index):
    return {name: t[index] for name, t in x.items()} if isinstance(x, dict) else x[index]


def sgd(params):
    return torch.optim.SGD(params, lr=0.2, momentum=0.5)


def adam(params):
    return torch.optim.Adam(params, lr=0.02)


@cache
def trained(case, optimizer=sgd):
    """A run with `select`, the same run of the oracle, the select function, data and test points."""
    make, select, data = CASES[case]
    torch.manual_seed(0)
    net = make().double()
    oracle = Picks(copy.deepcopy(net), select or logits)
    x, y = data(8), torch.arange(8) % 2
    train, test = (rows(x, slice(0, 6)), y[:6]), (rows(x, slice(6, 8)), y[6:])
    options = {"loss": F.cross_entropy, "optimizer": optimizer, "steps": 5, "batch_size": 3}
    run = ntkit.train(net, train, select=select, **options)
    return run, ntkit.train(oracle, train, **options), select, train, test


def close(found, expected, bound=1e-11):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= bound * (float(expected.abs().max()) + 1e-30)


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_part(case):
    run, other, _, _, _ = trained(case)
    for name, value in run.state(5).items():
        assert torch.equal(value, other.state(5)[f"net.{name}"]), name
    assert torch.equal(run.losses, other.losses)
    assert not run.origin[0]._forward_hooks  # the user's model is as it was
    assert not in_one_thread(Replay(run).model)  # a hook of ours keeps nothing


@pytest.mark.parametrize("case", CASES)
def test_decompositions(case):
    run, other, select, train, (x, y) = trained(case)
    found, expected = ntkit.PathKernel(run).decompose(x), ntkit.PathKernel(other).decompose(x)
    close(found.contributions, expected.contributions)
    close(found.prediction, expected.prediction)
    assert found.error < 1e-12
    opened = ntkit.Trajectory.open(run.path)
    again = ntkit.PathKernel(opened, model=run.origin[0], data=train, loss=F.cross_entropy, select=select)
    assert torch.equal(again.decompose(x).contributions, found.contributions)
    margin = lambda out, y: out.gather(1, y[:, None])[:, 0] - out.logsumexp(1)
    found, expected = (ntkit.PathKernel(one, outputs=margin).decompose(x, y) for one in (run, other))
    close(found.contributions, expected.contributions)
    close(*(ntkit.PathKernel(one, "trace", integration="left")(x) for one in (run, other)))


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("case", CASES)
def test_influence(case, optimizer):
    run, other, _, _, (x, y) = trained(case, optimizer)
    found, expected = (ntkit.influence(one, x, y, checks=1) for one in (run, other))
    close(found.scores, expected.scores, 1e-9)
    assert found.check.error < 1e-3  # finite differences of other runs
    assert found.miss == pytest.approx(expected.miss, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_retrainings(case, tmp_path):
    run, other, select, _, (x, y) = trained(case)
    found = ntkit.Retrainings(run, x, y, path=tmp_path / "again")
    expected = ntkit.Retrainings(other, x, y)
    close(found.without([[0], [1, 2]]), expected.without([[0], [1, 2]]))
    made = CASES[case][0]
    fresh = ntkit.Retrainings(run, x, y, make=lambda seed: made().double())
    own = ntkit.Retrainings(other, x, y, make=lambda seed: Picks(made().double(), select or logits))
    close(fresh.without([[0]], fresh=1), own.without([[0]], fresh=1))


@pytest.mark.parametrize("case", CASES)
def test_importances(case):
    run, other, select, (x, y), (test, _) = trained(case)
    model, oracle = run.origin[0], other.origin[0]
    found = ntkit.target_importance(model.eval(), x, y, F.cross_entropy, select=select)
    expected = ntkit.target_importance(oracle.eval(), x, y, F.cross_entropy)
    close(found.values, expected.values)
    assert found.values.abs().max() > 1e-3
    close(tracking_importance(run).values, tracking_importance(other).values)
    close(ntkit.tracin(run, test).scores, ntkit.tracin(other, test).scores)
    checkpoints = [(model.state_dict(), 0.1)], [(oracle.state_dict(), 0.1)]
    options = {"data": (x, y), "loss": F.cross_entropy}
    close(
        ntkit.tracin(checkpoints[0], test, model=model, select=select, **options).scores,
        ntkit.tracin(checkpoints[1], test, model=oracle, **options).scores,
    )


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("case", CASES)
def test_influence_kernel(case, curvature):
    run, other, select, train, (x, _) = trained(case)
    first = lambda out: out[:, 0] - 0.5 * out[:, 1] ** 2
    few = lambda name: name.endswith(("b.weight", "a.bias", "dense.weight", "classifier.weight"))
    for outputs in ("full", first):
        options = {"damping": 0.7, "curvature": curvature, "outputs": outputs, "params": few}
        args = train, F.cross_entropy
        found = ntkit.InfluenceKernel(run.origin[0].eval(), *args, select=select, **options)
        expected = ntkit.InfluenceKernel(other.origin[0].eval(), *args, **options)
        close(found(x), expected(x), 1e-9)
        v = torch.ones(found.operator(x).shape[0], dtype=torch.float64)
        close(found.operator(x) @ v, expected.operator(x) @ v, 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_conjugate_kernel(case):
    run, other, select, _, (x, _) = trained(case)
    found = ntkit.ConjugateKernel(run.origin[0].eval(), select=select)
    close(found(x), ntkit.ConjugateKernel(other.origin[0].eval())(x))


def test_conjugate_kernel_of_a_part_of_a_layer():
    x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.LSTM(3, 4, batch_first=True), nn.Identity()).double()
    last = ntkit.ConjugateKernel(net, layer="0", select=lambda out: out[0][:, -1])(x)
    phi = net[0](x)[0][:, -1].detach()
    close(last, phi @ phi.T)
    with pytest.raises(ntkit.Refused, match=r"the model's output: got tuple; .* select="):
        ntkit.ConjugateKernel(net, layer="0")(x)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("outputs", ["trace", "full", lambda out: out[:, 0]])
def test_track(case, outputs):
    run, other, select, _, (x, y) = trained(case)
    found = ntkit.track(run, x, y, model=run.origin[0], k=2, select=select, outputs=outputs)
    expected = ntkit.track(other, x, y, model=other.origin[0], k=2, outputs=outputs)
    for name in ("eigenvalues", "loss", "distance", "energy_output"):
        for a, b in zip(found.series[name], expected.series[name], strict=True):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-10), name


def test_a_callable_takes_the_logits_or_the_object():
    """For a model with logits a callable may be written for either."""
    run, _, _, train, (x, _) = trained("BERT, logits")
    net, first = run.origin[0].eval(), lambda out: out[:, 0]
    full = ntkit.TangentKernel(net)(x)[:, :, 0, 0]
    vectors, out = torch.linalg.eigh(full)[1].flip(1), net(**x).logits[:, 0].detach()
    influence = ntkit.InfluenceKernel(net, train, F.cross_entropy, damping=1.0)(x)[:, :, 0, 0]
    for of in (first, lambda out: out.logits[:, 0], lambda out: out["logits"][:, 0]):
        close(ntkit.TangentKernel(net, of)(x), full)
        (energy,) = ntkit.track(run, x, model=net, k=2, outputs=of, steps=[5]).series["energy_output"]
        assert energy == pytest.approx((((vectors.T @ out) ** 2).cumsum(0) / out.square().sum()).tolist())
        close(ntkit.InfluenceKernel(net, train, F.cross_entropy, damping=1.0, outputs=of)(x), influence, 1e-9)
    hidden = copy.deepcopy(net)
    hidden.config.output_hidden_states = True
    of = lambda out: out.logits[:, 0] + out.hidden_states[-1][:, 0, 0]
    with pytest.raises(ntkit.Refused, match="outputs: got a callable that looks at more than the logits"):
        ntkit.InfluenceKernel(hidden, train, F.cross_entropy, damping=1.0, outputs=of)(x)
    with pytest.raises(ntkit.Refused, match=r"outputs: got a callable that failed on the outputs of \d samples"):
        ntkit.TangentKernel(net, lambda out: out.absent)(x)


def calls(run, select, train, x, y):
    """Every function that takes `select`, on a run that was opened from disk."""
    model, opened = run.origin[0].eval(), ntkit.Trajectory.open(run.path)
    options = {"model": model, "data": train, "loss": F.cross_entropy, "select": select}
    args = model, train, F.cross_entropy
    return {
        "train": lambda: ntkit.train(copy.deepcopy(model), train, F.cross_entropy, sgd, 2, select=select),
        "path": lambda: ntkit.PathKernel(opened, **options).decompose(x),
        "influence": lambda: ntkit.influence(opened, x, y, **options),
        "retrainings": lambda: ntkit.Retrainings(opened, x, y, **options),
        "target": lambda: ntkit.target_importance(model, *train, F.cross_entropy, select=select),
        "tracking": lambda: tracking_importance(opened, **options),
        "tracin": lambda: ntkit.tracin(opened, x, **options),
        "influence kernel": lambda: ntkit.InfluenceKernel(*args, damping=1.0, select=select)(x),
        "conjugate": lambda: ntkit.ConjugateKernel(model, select=select)(x),
        "track": lambda: ntkit.track(opened, x, y, model=model, k=2, select=select),
    }


NAMES = list(calls(trained("a data class")[0], None, None, None, None))


@pytest.mark.parametrize("name", NAMES)
def test_what_picks_no_tensor_is_refused(name):
    run, _, _, train, (x, y) = trained("a data class")
    for select, message in (
        (lambda out: None, "select: got a function that returned None; expected a tensor"),
        (lambda out: out.absent, "select: got a function that failed on the model's output, Two"),
        ("scores", "select: got 'scores'; expected a function of the model's output"),
    ):
        with pytest.raises(ntkit.Refused, match=message):
            calls(run, select, train, x, y)[name]()
    if name != "train":  # there the loss takes it as it is
        with pytest.raises(ntkit.Refused, match=r"the model's output: got (a )?tuple; .* select="):
            calls(run, lambda out: (out.scores, out.hidden), train, x, y)[name]()


def test_a_run_opened_from_disk_needs_the_function_again(tmp_path):
    run, _, select, train, (x, _) = trained("a data class")
    options = {"model": run.origin[0], "data": train, "loss": F.cross_entropy}
    with pytest.raises(ntkit.Refused, match="select: got nothing, and the trajectory was opened from disk"):
        ntkit.PathKernel(ntkit.Trajectory.open(run.path), **options)
    wrong = ntkit.PathKernel(ntkit.Trajectory.open(run.path), select=lambda out: out.hidden, **options)
    with pytest.raises(ntkit.Refused, match="different from its replay"):
        wrong.decompose(x)
    net = Rich(Two).double()
    train_into = lambda select: ntkit.train(
        copy.deepcopy(net), train, F.cross_entropy, sgd, 2, path=tmp_path / "run", resume=True, select=select
    )
    train_into(select)
    with pytest.raises(ntkit.Refused, match="other settings: select"):
        train_into(lambda out: out.hidden)


def test_a_folder_of_another_part_is_refused(tmp_path):
    torch.manual_seed(0)
    net, x, y = Rich(Two).double(), numbers(4), torch.arange(4) % 2

    def loop():
        model = copy.deepcopy(net)
        optimizer = sgd(model.parameters())
        with ntkit.record(model, optimizer, tmp_path / "run", record="all") as recorder:
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x).scores, y)
                loss.backward()
                optimizer.step()
                recorder.step(range(4), loss)

    loop()
    run = ntkit.Trajectory.open(tmp_path / "run")
    options = {"model": net, "data": (x, y), "loss": F.cross_entropy}
    first, second = (lambda out: out.scores), (lambda out: 1.0 * out.scores)
    decompose = lambda select: ntkit.PathKernel(run, select=select, **options).decompose(x[:1], path=tmp_path / "path")
    track = lambda select: ntkit.track(run, x, y, model=net, k=1, select=select, path=tmp_path / "track")
    again = lambda select: ntkit.Retrainings(run, x, y, path=tmp_path / "again", select=select, **options)
    decompose(first)
    track(first)
    again(first).without([[0]])
    for call in (decompose, track, again):
        call(first)
        with pytest.raises(ntkit.Refused, match=r"got (another decomposition|a tracking with another|retrainings of)"):
            call(second)
