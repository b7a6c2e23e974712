"""Embeddings in the path kernel and in influence: the rows of the words at hand, and the dense way beside them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import ntkit
from ntkit.explanations import step_graph
from ntkit.explanations.embedding_lookups import find_lookups
from ntkit.explanations.step_graph import StepGraph
from ntkit.kernels.path import effects, row_gradients, sweep

WORDS = 13


class Padded(nn.Module):
    """The network of most of these tests: word 0 is padding, whose embedding counts nevertheless."""

    def __init__(self, words: int = WORDS, features: int = 4) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(words, features, padding_idx=0), nn.Linear(features, 3)
        nn.init.normal_(self.words.weight)  # of padding, too

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(self.words(tokens)).mean(1))


class Two(nn.Module):
    """Two embeddings, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 4, padding_idx=2), nn.Embedding(7, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        pairs = self.words(tokens) + torch.sin(self.words(tokens.flip(1))) * self.places(tokens % 7)
        return self.last(torch.tanh(pairs.mean(1)))


class Tied(nn.Module):
    """The last layer's weight is the embedding's: all its rows have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 4), nn.Embedding(WORDS, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return (torch.tanh((self.words(tokens) + self.places(tokens)).mean(1)) @ self.words.weight.T)[:, :3]


class Scaled(nn.Module):
    """The embedding's weight is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(WORDS, 4)), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(F.embedding(tokens, 2 * self.weight).mean(1)))


NETWORKS = {"padded": Padded, "two": Two, "tied": Tied, "scaled": Scaled}
BY_ROWS = {"padded": {"words.weight"}, "two": {"words.weight", "places.weight"}, "tied": {"places.weight"}}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.2),
    "decay": partial(torch.optim.SGD, lr=0.2, weight_decay=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "momentum, L2": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True),
    "adam, L2": partial(torch.optim.Adam, lr=0.02, weight_decay=0.02),
    "amsgrad": partial(torch.optim.Adam, lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
}


def sentences(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Words 0 to 5 are in every second sentence, often twice; one sentence is all padding."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, WORDS, (n, 5), generator=g), torch.randint(0, 3, (n,), generator=g)
    x[::2] %= 6
    x[1] = 0
    return x, y


def trained(name: str = "padded", optimizer: str = "momentum", make=None, **settings):
    torch.manual_seed(0)
    model = (make or NETWORKS[name])().double()
    settings = {"steps": 9, "batch_size": 4} | settings
    return ntkit.train(model, sentences(11, seed=1), F.cross_entropy, OPTIMIZERS[optimizer], **settings)


@contextmanager
def dense():
    """The way of every other parameter, for embeddings, too."""
    with (
        mock.patch.object(effects, "row_gradient", return_value=None),
        mock.patch.object(row_gradients, "row_gradient", return_value=None),
        mock.patch.object(step_graph, "find_lookups", return_value={}),
    ):
        yield


def close(found: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    size = float(expected.norm())
    assert size > 0
    assert float((found - expected).norm()) <= relative * size
    assert not float((found * (1 + 20 * relative) - expected).norm()) <= relative * size  # the comparison can fail


# ---------------------------------------------------------------------- the path kernel


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_decompositions_by_rows_and_by_all_entries_agree(name, optimizer):
    run, (test, _) = trained(name, optimizer), sentences(4, seed=2)
    kernel = ntkit.PathKernel(run, memory="1 GB")
    found = kernel.decompose(test, layers=True, steps=True)
    with dense():
        expected = kernel.decompose(test, layers=True)
    assert found.error <= 1e-12
    close(found.contributions, expected.contributions)
    for layer, share in expected.layers.items():
        close(found.layers[layer], share)
    if expected.regularization.any():
        close(found.regularization, expected.regularization)
    else:
        assert not found.regularization.any()


@pytest.mark.parametrize("settings", [{"clip": 0.05}, {"batch_size": None}, {"batch_size": 1}])
@pytest.mark.parametrize("integration", ["quadrature", "left"])
def test_other_integrations_by_rows(integration, settings):
    run, (test, _) = trained(optimizer="momentum, L2", **settings), sentences(4, seed=2)
    kernel = ntkit.PathKernel(run, integration=integration, memory="1 GB")
    found = kernel.decompose(test)
    with dense():
        expected = kernel.decompose(test)
    close(found.contributions, expected.contributions)


def test_rows_looked_up_by_an_index_and_words_of_a_bag():
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bag = nn.Parameter(torch.randn(WORDS, 2, 2)), nn.EmbeddingBag(WORDS, 4, mode="sum")
            self.shift, self.last = nn.Parameter(torch.randn(WORDS)), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.table[tokens - WORDS].flatten(2).mean(1) + self.bag(tokens) + self.shift[tokens].mean(1, True)
            return self.last(torch.tanh(hidden))

    run, (test, _) = trained(optimizer="nesterov", make=Indexed), sentences(4, seed=2)
    kernel = ntkit.PathKernel(run, integration="left", memory="1 GB")
    found = kernel.decompose(test, layers=True)
    with dense():
        expected = kernel.decompose(test, layers=True)
    for layer, share in expected.layers.items():
        close(found.layers[layer], share)


def test_a_killed_sweep_goes_on(tmp_path):
    run, (test, _) = trained(optimizer="adamw"), sentences(4, seed=2)
    stepped, taken = sweep.Sweep.step, []

    def step(self, made):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(made.step)
        stepped(self, made)

    with (
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SECONDS", 0),
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SHARE", 99),
    ):
        with mock.patch.object(sweep.Sweep, "step", step), pytest.raises(KeyboardInterrupt):
            ntkit.PathKernel(run, memory="1 GB").decompose(test, path=tmp_path / "found")
        found = ntkit.PathKernel(run, memory="1 GB").decompose(test, path=tmp_path / "found")
    close(found.contributions, ntkit.PathKernel(run, memory="1 GB").decompose(test).contributions)


# ---------------------------------------------------------------------- influence


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_influences_by_rows_and_by_all_entries_agree(name, optimizer):
    run, test = trained(name, optimizer), sentences(4, seed=2)
    found = ntkit.influence(run, *test, layers=True)
    with dense():
        expected = ntkit.influence(run, *test, layers=True)
    check = found.check  # finite differences of training itself, and how far they can be trusted
    assert check.error < max(1e-7, 2 * check.own_error)
    close(found.scores, expected.scores)
    for layer, share in expected.layers.items():
        close(found.layers[layer], share)


@pytest.mark.parametrize(
    "settings", [{"clip": 0.05}, {"at": 0.5}, {"curvature": "gauss-newton"}, {"batch_size": None}, {"batch_size": 1}]
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adam, L2"])
@pytest.mark.parametrize("name", ["padded", "two"])
def test_clipping_weights_and_curvatures_by_rows(name, optimizer, settings):
    options = {key: settings[key] for key in settings.keys() & {"at", "curvature"}}
    run, test = trained(name, optimizer, **{k: v for k, v in settings.items() if k not in options}), sentences(4, 2)
    found = ntkit.influence(run, *test, **options)
    with dense():
        expected = ntkit.influence(run, *test, **options)
    close(found.scores, expected.scores)
    if "curvature" not in options:
        assert found.check.error < 1e-7


def test_sparse_gradients_of_an_embedding():
    def make(sparse: bool) -> nn.Module:
        model = Padded()
        model.words.sparse = sparse
        return model

    found, expected = (
        ntkit.influence(trained(optimizer="sgd", make=partial(make, sparse)), *sentences(4, 2)).scores
        for sparse in (True, False)
    )
    close(found, expected)


def test_an_embedding_in_a_checkpoint():
    class Again(Padded):
        def forward(self, tokens: Tensor) -> Tensor:
            return checkpoint(super().forward, tokens, use_reentrant=False)

    found, expected = (
        ntkit.influence(trained(optimizer="sgd", make=make), *sentences(4, 2)).scores for make in (Again, Padded)
    )
    close(found, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_which_parameters_go_by_rows(name):
    model = NETWORKS[name]()
    tokens = torch.tensor([[5, 9, 9], [2, 0, 5]])
    params = dict(model.named_parameters())
    found = find_lookups(model(tokens), params)
    assert found.keys() == BY_ROWS.get(name, set())
    if name == "padded":
        assert found["words.weight"].rows.tolist() == [2, 5, 9]
    if name == "two":
        assert found["words.weight"].rows.tolist() == [0, 5, 9]
        assert found["places.weight"].rows.tolist() == [0, 2, 5]
    for parameter in found:  # a hook sees the whole gradient
        params[parameter].register_hook(lambda grad: grad)
    assert not find_lookups(model(tokens), params)


# ---------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.fixture
def _one_worker():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_worker")
def test_no_gradient_of_an_embedding_is_formed():
    """A sweep holds effects [test points, outputs, entries] and the parameters; else nothing of the full width."""
    words, features = 3000, 4
    run, test = trained(make=partial(Padded, words, features), batch_size=8), sentences(2, seed=2)
    accumulated, products = sweep.Sweep._accumulated, StepGraph.products

    def largest(call):
        sizes = []

        def measured(*args):
            with Largest() as mode:
                result = call(*args)
            sizes.append(mode.numbers)
            return result

        return sizes, measured

    def sizes_of_largest() -> tuple[int, int]:
        sweep_sizes, sweep_step = largest(accumulated)
        graph_sizes, graph_products = largest(products)
        with (
            mock.patch.object(sweep.Sweep, "_accumulated", sweep_step),
            mock.patch.object(StepGraph, "products", graph_products),
        ):
            ntkit.PathKernel(run, memory="1 GB").decompose(test[0])
            ntkit.influence(run, *test)
        return max(sweep_sizes), max(graph_sizes)

    entries = words * features
    in_sweep, in_graph = sizes_of_largest()
    assert in_sweep == 2 * 3 * entries
    assert in_graph < entries
    with dense():
        in_sweep, in_graph = sizes_of_largest()
    assert in_sweep >= 8 * entries
    assert in_graph >= entries
