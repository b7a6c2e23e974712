"""Tensors, datasets, factories and choices of data; formats of files: test_data_files.py."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ntkit.base.checks import Refused
from ntkit.base.tensors import tensor_hash
from ntkit.data import from_dataset, from_tensors, load


def numbers(seed=0):
    return np.random.default_rng(seed)


def same(tensor, pixels):
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.tensor(np.asarray(pixels) / 255, dtype=torch.float32))


# --- digits, choice of classes, sub-samples ---


def test_digits_are_scikit_learns_and_the_split_is_fixed_and_stratified():
    from sklearn.datasets import load_digits

    data = load("digits", seed=5)
    assert data.hash == load(seed=6).hash
    assert (len(data.x_train), len(data.x_test), data.input_shape) == (1437, 360, (1, 8, 8))
    assert data.kind == "images"
    assert data.normalization == "pixels / 16, no centering"
    assert "fixed stratified split, 1,437 train / 360 test, independent of seed" in data.source
    everything = load_digits()
    truth = sorted((tuple(row), int(label)) for row, label in zip(everything.data, everything.target, strict=True))
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert truth == sorted((tuple((16 * row).flatten().tolist()), int(label)) for row, label in zip(x, y, strict=True))
    share = data.y_test.bincount() - torch.cat([data.y_train, data.y_test]).bincount() * 360 / 1797
    assert share.abs().max() < 1


def test_classes_give_labels_in_the_order_named():
    data, whole = load("digits", classes=("8", 3)), load("digits")
    assert data.classes == ("8", "3")
    keep = (whole.y_train == 3) | (whole.y_train == 8)
    assert torch.equal(data.x_train, whole.x_train[keep])
    assert torch.equal(data.y_train, (whole.y_train[keep] == 3).long())
    assert data.y_train.dtype == torch.int64
    assert "classes 8, 3" in data.source


@pytest.mark.parametrize("count", [1, 9, 10, 11, 33, 100, 1436, 1437])
def test_a_sub_sample_is_stratified_in_order_and_repeats_with_its_seed(count):
    whole = load("digits")
    data, again, other = (load("digits", train=count, seed=seed) for seed in (3, 3, 4))
    assert len(data.y_train) == len(data.x_train) == count
    assert len(data.y_test) == 360
    exact = whole.y_train.bincount() * count / 1437
    assert (data.y_train.bincount(minlength=10) - exact).abs().max() < 1
    assert count < 10 or data.y_train.bincount(minlength=10).min() >= 1
    assert data.hash == again.hash
    assert (data.hash == other.hash) == (count == 1437)
    place = {tuple(row.flatten().tolist()): i for i, row in enumerate(whole.x_train)}
    rows = [place[tuple(row.flatten().tolist())] for row in data.x_train]
    assert rows == sorted(set(rows))
    assert torch.equal(whole.y_train[rows], data.y_train)


def test_train_and_test_draws_are_stated():
    data = load("digits", classes=(3, 8), train=20, test=7, seed=2)
    assert (len(data.x_train), len(data.x_test)) == (20, 7)
    assert "20 of 285 train examples, stratified, seed 2" in data.source
    assert "7 of 72 test examples" in data.source


def test_a_rare_class_is_kept_in_both_parts():
    y = np.array([0] * 40 + [1] * 2 + [2])
    data = from_tensors((np.arange(43.0)[:, None], y))
    assert len(data.y_test) == 9
    assert data.y_test.bincount(minlength=3).tolist()[1:] == [1, 0]
    assert data.y_train.bincount(minlength=3).tolist()[1:] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"classes": (3, 12)},
            "classes: got 12; expected a class of the data. Did you mean .* Options: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.",
        ),
        ({"classes": (3, -1)}, "classes: got -1"),
        ({"classes": (3, True)}, "classes: got True"),
        ({"classes": (3, "3")}, "got 3, 3; expected a sequence of at least two different classes"),
        ({"classes": (3,)}, "got 3; expected a sequence of at least two"),
        ({"classes": ()}, "got none; expected"),
        ({"classes": "38"}, "got '38'; expected a sequence"),
        ({"train": 1438}, "train: got 1,438 examples; expected at most 1,437"),
        ({"test": 73, "classes": (3, 8)}, "test: got 73 examples; expected at most 72"),
        ({"train": 0}, "train: got 0; expected an integer of at least 1"),
        ({"train": 2.5}, "train: got 2.5"),
        ({"train": True}, "train: got True"),
        ({"train": 5, "seed": -1}, "seed: got -1"),
        ({"name_or_path": "minst"}, "Did you mean mnist"),
        ({"name_or_path": "mnist"}, "data_dir for mnist: got none; .*train-images-idx3-ubyte.* nothing is ever"),
        ({"name_or_path": "cifar10"}, "data_dir for cifar10: got none; .*data_batch_1.bin.* nothing is ever downl"),
    ],
)
def test_refused_choices(arguments, message):
    with pytest.raises(Refused, match=message):
        load(**arguments)


def test_a_class_without_examples_is_refused(tmp_path):
    y = np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", x_train=np.ones((6, 2)), y_train=y, x_test=np.ones((2, 2)), y_test=y[:2])
    with pytest.raises(Refused, match=r"classes: got '2', which has no examples in the test set"):
        load(tmp_path / "a.npz", classes=(0, 2))
    assert load(tmp_path / "a.npz", classes=(1, 0)).y_test.tolist() == [1, 0]


def test_hashes_on_disk_keep_their_values():
    """Of named tensors (run.json of a trajectory), of unnamed ones (track.json), of a data set (results.json)."""
    x, y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])
    assert tensor_hash({"x": x, "y": y})[:16] == "e88d864e55ed12df"
    assert tensor_hash([x, y])[:16] == "7b49fd14d990d440"
    assert from_tensors((x, y), (x, y)).hash == "36ff38e827770b25"


def test_hash_sees_values_dtype_and_shape():
    x, y = torch.arange(12.0).reshape(6, 2), torch.arange(6) % 2
    base = from_tensors((x, y), (x, y))
    assert len(base.hash) == 16
    assert base.hash == from_tensors((x.clone(), y.int()), (x, y), class_names=["a", "b"]).hash
    moved = x.clone()
    moved[5, 1] = torch.nextafter(moved[5, 1], torch.tensor(99.0))
    others = [
        from_tensors((moved, y), (x, y)),
        from_tensors((x, y), (moved, y)),
        from_tensors((x, 1 - y), (x, y)),
        from_tensors((x.double(), y), (x.double(), y)),
        from_tensors((x[:, :, None], y), (x[:, :, None], y)),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 6


def test_repr_is_one_short_line():
    assert repr(load("digits", classes=(3, 8))) == "Data(digits: 285 train, 72 test, 2 classes, images 1 x 8 x 8)"


ONES, LABELS = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])


# --- tensors and datasets ---


def test_from_tensors_keeps_dtype_and_names():
    x, y = torch.arange(10.0, dtype=torch.float64).reshape(5, 2).requires_grad_(), np.array([0, 1, 1, 0, 1], np.uint8)
    data = from_tensors((x, y), (x[:2], y[:2]), class_names=["no", "yes"], name="toy")
    assert data.x_train.dtype == torch.float64
    assert not data.x_train.requires_grad
    assert x.requires_grad
    assert torch.equal(data.x_train, x)
    assert (data.classes, data.name, data.kind) == (("no", "yes"), "toy", "vectors")
    assert data.y_train.tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("pair", "classes", "message"),
    [
        ((ONES, LABELS), ["a"], "labels y: got label 1 in row 1; expected 0 to 0"),
        ((ONES, LABELS), ["a", "a"], "class_names: got a, a; expected different names"),
        (ONES, None, r"got a ndarray; expected a pair \(x, y\)"),
        ((ONES, "abc"), None, r"labels y: got <U3 of shape \[\]; expected integers, text"),
        (("abc", LABELS), None, "not a numeric array"),
        (([[1.0], [2.0, 3.0]], [0, 1]), None, "not a numeric array"),
        ((torch.ones(2, 0), [0, 1]), None, "empty set"),
    ],
)
def test_refused_tensors(pair, classes, message):
    with pytest.raises(Refused, match=message):
        from_tensors(pair, class_names=classes)


class Pairs(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return item() if callable(item) else item


def test_from_dataset_of_pillow_images():
    from PIL import Image

    pixels = numbers(4).integers(0, 256, (6, 3, 3, 3), dtype=np.uint8)  # a size that could be mistaken for channels
    data = from_dataset(Pairs([(Image.fromarray(image), i % 2) for i, image in enumerate(pixels)]), name="photos")
    pixels_again = torch.cat([data.x_train, data.x_test]).mul(255).round().flatten(1).tolist()
    assert sorted(pixels_again) == sorted(image.transpose(2, 0, 1).flatten().tolist() for image in pixels)
    assert data.classes == ("cat", "dog")
    assert data.normalization == "pixels / 255, no centering"
    gray = Pairs([(Image.fromarray(image[..., 0]), 0) for image in pixels])
    same(from_dataset(gray, test=gray).x_train, pixels[:, None, :, :, 0])


def test_from_dataset_of_tensors_equals_from_tensors():
    x, y = torch.arange(22.0).reshape(11, 2), torch.arange(11) % 2
    items = [
        (row, [int(label), label, np.int64(label)][i % 3]) for i, (row, label) in enumerate(zip(x, y, strict=True))
    ]
    assert from_dataset(Pairs(items)).hash == from_tensors((x, y)).hash
    assert from_dataset(Pairs(items), test=Pairs(items[:3])).y_test.tolist() == [0, 1, 0]


def test_from_dataset_leaves_the_random_states():
    def noisy():
        return torch.rand(2) + random.random() + float(np.random.rand()), 1  # noqa: NPY002

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    from_dataset(Pairs([noisy] * 5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_loading_leaves_the_random_states():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    load("digits", train=50, seed=9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "without a length; expected a map-style"),
        (Pairs([]), "empty set"),
        (Pairs([(torch.ones(2), 0), torch.ones(3)]), r"index 1: got a Tensor; expected a pair"),
        (Pairs([(torch.ones(2), 0), (torch.ones(3), 0)]), r"index 1: got \[3\] torch.float32; expected \[2\]"),
        (Pairs([(torch.ones(2), 0), (torch.ones(2).double(), 0)]), r"index 1: got \[2\] torch.float64"),
        (
            Pairs([(torch.ones(2), 0), (torch.ones(2), 0.5)]),
            r"index 1: got label 0.5; expected one like that at index 0",
        ),
        (Pairs([(torch.ones(2), None)]), r"index 0: got label None; expected a label"),
        (Pairs([(torch.ones(2), 7)] * 3), r"label 7 in row 0; expected 0 to 1"),
        (Pairs([(torch.full((2,), torch.inf), 1)] * 3), r"inf in row 0 \(3 such rows\)"),
        (Pairs([("text", 1)]), r"index 0: got str that is not a numeric array"),
    ],
)
def test_refused_datasets(dataset, message):
    with pytest.raises(Refused, match=message):
        from_dataset(dataset)


MAKERS = """
import torch, ntkit
x, y = torch.arange(60.0).reshape(20, 3) / 60, torch.arange(20) % 2
def pair(): return x, y
def pairs(): return (x, y), (x[:6], y[:6])
def dataset(): return torch.utils.data.TensorDataset(x, y)
def datasets(): return dataset(), dataset()
def four(): return x, y, x[:6], y[:6]
def loader(): return torch.utils.data.DataLoader(dataset(), batch_size=7)
def loaders(): return loader(), loader()
def data(): return ntkit.data.from_tensors((x, y), class_names=["even", "odd"])
def nonsense(): return 7
"""


@pytest.mark.parametrize(
    ("maker", "train", "test"),
    [
        ("pair", 16, 4),
        ("pairs", 20, 6),
        ("dataset", 16, 4),
        ("datasets", 20, 20),
        ("four", 20, 6),
        ("loader", 16, 4),
        ("loaders", 20, 20),
        ("data", 16, 4),
    ],
)
def test_the_users_own_data_by_name(maker, train, test, tmp_path):
    (tmp_path / "mine.py").write_text(MAKERS)
    made = load(f"{tmp_path / 'mine.py'}:{maker}")
    assert (len(made.x_train), len(made.x_test), made.kind) == (train, test, "vectors")
    assert made.classes == (("even", "odd") if maker == "data" else ("0", "1"))
    assert f"mine.py:{maker}" in made.source
    few = load(f"{tmp_path / 'mine.py'}:{maker}", classes=[1, 0], train=4, test=4)
    assert few.classes == made.classes[::-1]


def test_the_users_own_data_refused_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(MAKERS)
    with pytest.raises(Refused, match=r"--data .*mine\.py:dta: got no factory 'dta'.*Did you mean data"):
        load(f"{tmp_path / 'mine.py'}:dta")
    with pytest.raises(Refused, match=r"got a factory that returned a int; expected tensors \(x, y\)"):
        load(f"{tmp_path / 'mine.py'}:nonsense")
    (tmp_path / "more.py").write_text("def sized(n): pass\n")
    with pytest.raises(Refused, match=r"more\.py:sized: got a factory that could not be called .*'n'.*default values"):
        load(f"{tmp_path / 'more.py'}:sized")
