"""Labels and targets of any kind, from arrays, files and factories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ntkit.base.checks import Refused
from ntkit.data import from_dataset, from_tensors, load

X = np.arange(24.0).reshape(12, 2)
ROWS = np.arange(12)  # the class of each example, before it is named: 0, 1, 2, 0, 1, 2, ...
CLASS = ROWS % 3


def both(y, **more):
    """The data set whose training and test sets are the same examples."""
    return from_tensors((X, y), (X, y), **more)


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (CLASS, ("0", "1", "2")),
        (CLASS + 1, ("1", "2", "3")),
        (CLASS[:, None], ("0", "1", "2")),
        (np.array([-5, 7, 900])[CLASS], ("-5", "7", "900")),
        (np.array(["ant", "bee", "cat"])[CLASS], ("ant", "bee", "cat")),
        (np.array([b"ant", b"bee", b"cat"])[CLASS], ("ant", "bee", "cat")),
        (np.array(["ant", "bee", "cat"], dtype=object)[CLASS], ("ant", "bee", "cat")),
        (["ant", "bee", "cat"] * 4, ("ant", "bee", "cat")),
        (np.eye(3)[CLASS], ("0", "1", "2")),
        (np.eye(3, dtype=bool)[CLASS], ("0", "1", "2")),
        (torch.eye(3, dtype=torch.bfloat16)[CLASS], ("0", "1", "2")),
        (torch.from_numpy(CLASS).to(torch.uint8), ("0", "1", "2")),
    ],
)
def test_labels_of_every_kind_are_the_same_classes(y, classes):
    data = both(y)
    assert data.classes == classes
    assert data.y_train.tolist() == CLASS.tolist()
    assert data.y_test.dtype == torch.int64
    assert data.targets is None
    assert data.outputs == 3


def test_booleans_are_two_classes_with_one_output():
    data = both(CLASS == 1)
    assert (data.classes, data.outputs) == (("False", "True"), 1)
    assert data.y_train.tolist() == (CLASS == 1).tolist()


def test_the_labels_of_both_sets_count():
    data = from_tensors((X, np.where(CLASS == 2, 7, 9)), (X[:2], np.array([9, 8])))
    assert data.classes == ("7", "8", "9")
    assert data.y_test.tolist() == [2, 1]
    assert data.y_train.unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("y", "names", "labels"),
    [
        (CLASS, "abc", CLASS),
        (CLASS + 1, "abc", CLASS),  # 1 to 3: by their order
        (np.array([7, 8, 9])[CLASS], "abc", CLASS),
        (CLASS % 2, "abc", CLASS % 2),  # no example of c
        (np.array(["a", "b", "c"])[CLASS], "cab", (CLASS + 1) % 3),  # names of text give their order
        (np.array(["a", "b", "c"])[CLASS], "dcab", (CLASS + 1) % 3 + 1),
        (np.eye(3)[CLASS], "abc", CLASS),
        (CLASS == 1, ["no", "yes"], CLASS == 1),
    ],
)
def test_names_of_classes(y, names, labels):
    data = both(y, class_names=list(names))
    assert data.classes == tuple(names)
    assert data.y_train.tolist() == [int(label) for label in labels]


@pytest.mark.parametrize(
    ("y", "more", "message"),
    [
        (CLASS + 1, {"class_names": ["a", "b"]}, r"labels y: got label 2 in row 1; expected 0 to 1"),
        (np.array(["a", "b", "c"])[CLASS], {"class_names": ["a", "b"]}, "got label 'c' in row 2; expected one of a, b"),
        (np.array(["a", None, "c"], dtype=object)[CLASS], {}, "got None in row 1; expected text everywhere"),
        (np.array([1, None, 2], dtype=object)[CLASS], {}, "got None in row 1; expected text everywhere, or integers"),
        (np.array(["a", "", "c"])[CLASS], {}, "got an empty label in row 1"),
        (np.array(["a", "b\n", "c"])[CLASS], {}, "with the character"),
        (np.ones((12, 3), int), {}, r"got int64 of shape \[12, 3\]; expected integers of shape \[n\], or one-hot rows"),
        (np.ones((12, 3, 2)), {}, r"got float64 of shape \[12, 3, 2\]; expected integers, text"),
        (CLASS * 0.5, {"task": "classification"}, "got 0.5 in row 1; expected integers for classes"),
        (CLASS, {"task": "ordinal"}, "task: got 'ordinal'; expected classification or regression"),
        (X, {"class_names": ["a", "b"]}, "class_names: got names of classes for targets that are floats"),
        (np.array(["a", "b", "c"])[CLASS], {"task": "regression"}, "targets y: got text; expected numbers"),
        (CLASS % 2 + 0.0, {}, r"got floats with two values only, 0 and 1; .*\(--task\)"),
        (np.array([1.0, np.inf, 2])[CLASS], {}, r"targets y: got inf in row 1 \(4 such rows\)"),
        (np.stack([ROWS, 0 * ROWS], 1) + 0.0, {}, "got y1, which is 0 in every training example; expected targ"),
        (np.array([2**63], dtype=np.uint64)[0 * CLASS], {}, "expected labels below 2.63"),
    ],
)
def test_refused_targets(y, more, message):
    with pytest.raises(Refused, match=message):
        both(y, **more)


def test_ids_in_place_of_labels_are_refused():
    x, ids = np.zeros((1001, 1)), np.arange(1001)
    with pytest.raises(Refused, match=r"got 1,001 different labels; expected at most 1,000. .*task=regression"):
        from_tensors((x, ids), (x, ids))
    assert from_tensors((x, ids), (x, ids), task="regression").outputs == 1


def test_sets_with_different_kinds_or_numbers_of_targets_are_refused():
    with pytest.raises(Refused, match="test set, targets y: got 2 targets; expected 1, as in the training set"):
        from_tensors((X, X[:, 0]), (X, X))
    with pytest.raises(Refused, match="test set, labels y: got rows of 4; expected rows of 3, as in the training set"):
        from_tensors((X, np.eye(3)[CLASS]), (X, np.eye(4)[CLASS]))
    with pytest.raises(Refused, match="test set, labels y: got text; expected numbers, as in the training set"):
        from_tensors((X, CLASS), (X, np.array(["a", "b", "c"])[CLASS]))


def test_targets_of_a_regression_are_standardized_on_the_training_set():
    y = np.stack([1e5 + 3e4 * np.sin(ROWS), 0.01 * ROWS], 1)
    data = from_tensors((X[:9], y[:9]), (X[9:], y[9:]))
    mean, deviation = y[:9].mean(0), y[:9].std(0)
    assert data.classes == ()
    assert data.outputs == 2
    assert data.targets.names == ("y0", "y1")
    assert np.allclose(data.targets.mean, mean, rtol=1e-14)
    assert np.allclose(data.targets.deviation, deviation, rtol=1e-14)
    assert np.allclose(data.y_train, (y[:9] - mean) / deviation, atol=1e-14)
    assert np.allclose(data.y_test, (y[9:] - mean) / deviation, atol=1e-14)
    assert np.allclose(data.targets.in_units(data.y_test), y[9:], rtol=1e-14)
    assert repr(data) == "Data(tensors: 9 train, 3 test, 2 targets, vectors 2)"


def test_integers_are_targets_where_the_task_says_so():
    data = both(CLASS, task="regression")
    assert data.y_train.shape == (12, 1)
    assert float(data.y_train.double().mean()) == pytest.approx(0, abs=1e-15)
    assert both(CLASS + 0.0, task="classification").classes == ("0", "1", "2")


def test_a_regression_without_a_test_set_is_split_the_same_way_every_time(tmp_path):
    x = np.arange(100.0)[:, None]
    np.savez(tmp_path / "a.npz", X=x, y=np.exp(-x))
    data = load(tmp_path / "a.npz", seed=1)
    assert data.hash == load(tmp_path / "a.npz", seed=2).hash
    train, test = data.x_train.flatten().tolist(), data.x_test.flatten().tolist()
    assert sorted(train + test) == list(range(100))
    assert len(test) == 20
    assert test != list(range(80, 100))
    assert np.allclose(data.targets.in_units(data.y_test)[:, 0], np.exp(-np.array(test)), atol=1e-6)
    assert "fixed split, 80 train / 20 test" in data.source
    few = load(tmp_path / "a.npz", train=11, test=5, seed=3)
    assert (len(few.x_train), len(few.x_test)) == (11, 5)
    assert "11 of 80 train examples, seed 3" in few.source
    assert float(few.y_train.mean()) == pytest.approx(0, abs=1e-6)
    assert few.hash != load(tmp_path / "a.npz", train=11, test=5, seed=4).hash
    with pytest.raises(Refused, match="classes: got classes of a regression; expected none"):
        load(tmp_path / "a.npz", classes=(0, 1))


@pytest.mark.parametrize("x", ["x", "X"])
def test_npz_with_both_spellings_and_labels_of_any_kind(tmp_path, x):
    labels = np.array(["ant", "bee", "cat"])[CLASS]
    np.savez(tmp_path / "a.npz", **{f"{x}_train": X, "y_train": labels, f"{x}_test": X[:3], "y_test": labels[:3]})
    data = load(tmp_path / "a.npz")
    assert (data.classes, data.y_test.tolist()) == (("ant", "bee", "cat"), [0, 1, 2])
    np.savez(tmp_path / "b.npz", **{x: X, "y": np.array([7, 9])[CLASS % 2]})
    data = load(tmp_path / "b.npz", class_names=["seven", "nine"])
    assert data.classes == ("seven", "nine")
    assert set(data.y_train.tolist()) == {0, 1}
    assert load(tmp_path / "b.npz", classes=("9", "7")).classes == ("9", "7")


def test_class_names_rename_those_of_a_data_set():
    names = [f"digit {i}" for i in range(10)]
    data = load("digits", class_names=names)
    assert data.classes == tuple(names)
    assert data.y_train.tolist() == load("digits").y_train.tolist()
    with pytest.raises(Refused, match=r"class_names .--class-names.: got 2 names; expected 10: of 0, 1"):
        load("digits", class_names=["a", "b"])


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("y", [CLASS + 1, np.array(["a", "b", "c"])[CLASS], np.eye(3)[CLASS], X, X[:, 0]])
def test_datasets_and_loaders_have_the_targets_of_arrays(y):
    expected = both(y)
    items = Items(
        [(torch.tensor(row), target.item() if target.ndim == 0 else target) for row, target in zip(X, y, strict=True)]
    )
    assert from_dataset(items, items).hash == expected.hash
    if y.dtype.kind != "U":
        loader = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(y)), batch_size=5)
        made = from_dataset(loader, loader)
        assert (made.hash, made.classes, made.name) == (expected.hash, expected.classes, "TensorDataset")


def test_refused_loaders():
    pairs = TensorDataset(torch.tensor(X), torch.tensor(CLASS))
    with pytest.raises(Refused, match="got a DataLoader with RandomSampler; expected the samples in the order"):
        from_dataset(DataLoader(pairs, batch_size=4, shuffle=True))
    with pytest.raises(Refused, match="batch 0: got a Tensor; expected a pair"):
        from_dataset(DataLoader(torch.ones(4, 2)))
    with pytest.raises(Refused, match="empty set"):
        from_dataset(DataLoader(Items([])))
