"""Data sets with labels: embedded digits, official files, arrays, torch datasets or the user's own function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from ntkit.base.checks import check_name, nearest, refusal
from ntkit.base.factory import find, is_code
from ntkit.base.memory import check_room
from ntkit.base.tensors import tensor_hash
from ntkit.data.cifar_reader import CIFAR10_EXPECTED, read_cifar10
from ntkit.data.examples import Kind, examples, restored_random_states, stack
from ntkit.data.image_reader import read_image_folder
from ntkit.data.npz_reader import read_npz
from ntkit.data.readers import MNIST_EXPECTED, NO_DOWNLOAD, Files, read_digits, read_mnist
from ntkit.data.splits import class_indices, class_names, draw, held_out
from ntkit.data.text_reader import PADDING, TEXT_SETS, read_text, text_expected

Pair = tuple[Tensor | ArrayLike, Tensor | ArrayLike]  # x and labels


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Examples and labels for training and testing.

    Attributes
    ----------
    x_train, x_test : images ``[n, channels, h, w]`` (pixels of files in [0, 1]), vectors ``[n, ...]``, int64 tokens
        ``[n, t]``.
    y_train, y_test : labels, int64 ``[n]``, values 0 to ``len(classes) - 1``.
    classes : the name of each label.
    name : short name of the data set.
    normalisation : how the values of x were scaled, as a sentence.
    source : the files or records, the split, the classes and the sample.
    kind : ``"images"``, ``"vectors"`` or ``"tokens"``: the content of x.
    vocabulary : the word of each token number of a text set, those of padding (0) and of unknown words (1) first.

    Examples
    --------
    >>> load("digits", classes=(3, 8))
    Data(digits: 285 train, 72 test, 2 classes, images 1 x 8 x 8)
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    name: str
    normalisation: str
    source: str
    kind: Kind
    vocabulary: tuple[str, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x_train.shape[1:])

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the four arrays' dtypes, shapes and bytes."""
        arrays = (self.x_train, self.y_train, self.x_test, self.y_test)
        return tensor_hash(arrays, lambda array: f"{array.dtype} {tuple(array.shape)} ")[:16]

    @property
    def tokens(self) -> int | None:
        """Number of different tokens of a text set, padding and unknown words among them; None for other data."""
        return None if self.vocabulary is None else len(self.vocabulary)

    def sentence(self, tokens: Tensor | ArrayLike) -> str:
        """The words of one example [t], without its padding.

        Raises
        ------
        Refused
            For data without a vocabulary, and for what is not one row of its token numbers.

        Examples
        --------
        >>> import dataclasses
        >>> data = from_tensors((torch.tensor([[2, 3, 0], [3, 1, 2]] * 5), torch.arange(10) % 2))
        >>> text = dataclasses.replace(data, vocabulary=("<padding>", "<unknown>", "small", "words"))
        >>> text.sentence(text.x_train[0])
        'small words'
        """
        if self.vocabulary is None:
            got, expected = "no vocabulary", "a text data set"
            raise refusal(f"data {self.name}", got=got, expected=expected, fix=f"Load one of {', '.join(TEXT_SETS)}.")
        row = torch.as_tensor(tokens)
        size = len(self.vocabulary)
        if row.ndim != 1 or row.is_floating_point() or ((row < 0) | (row >= size)).any():
            got = f"{row.dtype} of shape {list(row.shape)}"
            expected = f"one row of token numbers below {size:,}"
            raise refusal("tokens", got=got, expected=expected, fix="Give one row of x_train or x_test.")
        return " ".join(self.vocabulary[token] for token in row.tolist() if token != PADDING)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        counts = f"{len(self.y_train)} train, {len(self.y_test)} test, {len(self.classes)} classes"
        return f"Data({self.name}: {counts}, {self.kind} {shape})"


def load(
    name_or_path: str | Path = "digits",
    data_dir: str | Path | None = None,
    classes: Sequence[str | int] | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set by name or from files. Nothing is ever downloaded, and no pickle runs code.

    Parameters
    ----------
    name_or_path : ``"digits"`` (embedded in scikit-learn, 8 x 8 pixels / 16; a fixed stratified split, 1,437 / 360),
        ``"mnist"`` or ``"cifar10"`` (official files in `data_dir`); ``"trec"``, ``"sst2"``, ``"rt-polarity"`` or
        ``"subj"``: sentences as token numbers, see `Data.sentence`; or a path: an ``.npz`` file, or a folder of PNG or
        JPEG images in ``train/CLASS/`` and ``test/CLASS/``, or in ``CLASS/`` (pixels as stored: EXIF orientation does
        not turn them). Data without a test set is split 80/20, stratified, always in the same way. In an ``.npz``:
        uint8 of rank 3 or 4 is images (/ 255), floats become float32 unscaled, int16/32/64 of rank 2 is tokens. Or
        ``file.py:factory`` or ``package.module:factory``: a function without arguments that returns a torch dataset, a
        pair of them (training, test), tensors ``(x, y)``, a pair of such pairs, or a `Data`.
    data_dir : folder of the official MNIST or CIFAR-10 files, or of the text sets' files (or with a folder ``text`` of
        them): lines of a label, a blank and words. Their vocabulary is that of the whole training set. Short sentences
        are padded with 0; those longer than the longest of the training set, or than 128 words, are cut there.
    classes : the classes to use, by name or else by index; their order defines the labels 0, 1, ...
    train, test : sizes of stratified samples, in the data's order; None = all examples.
    seed : of these samples.

    Raises
    ------
    Refused
        For an unknown name, absent or damaged files (with file and byte or row), invalid classes, samples larger than
        the data, non-finite values, labels that are not integers in range.

    Examples
    --------
    >>> data = load("digits", classes=(3, 8), train=20, seed=1)
    >>> data.classes, data.x_train.shape, data.y_train.bincount().tolist()
    (('3', '8'), torch.Size([20, 1, 8, 8]), [10, 10])
    """
    files, name, subject = _read(name_or_path, data_dir)
    return _build(files, name, subject, torch.float32, classes, (train, test), seed)


def from_tensors(
    train: Pair,
    test: Pair | None = None,
    classes: Sequence[str] | None = None,
    name: str = "tensors",
) -> Data:
    """Data set of tensors or arrays ``(x, y)``; without a test set, split 80/20, stratified, always in the same way.

    Floats keep their dtype and are not copied; uint8 of rank 3 or 4 is images and is divided by 255; int16, int32 and
    int64 of rank 2 is tokens.

    Parameters
    ----------
    train, test : pairs of x ``[n, ...]`` and integer labels y ``[n]``.
    classes : the names of labels 0, 1, ...; None = their numbers.
    name : short name of the data set.

    Raises
    ------
    Refused
        For empty or non-finite data, different lengths, labels that are not integers from 0 in range.

    Examples
    --------
    >>> x, y = torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2
    >>> from_tensors((x, y), classes=["even", "odd"])
    Data(tensors: 8 train, 2 test, 2 classes, vectors 3)
    """
    return _build(Files(train, test, classes, f"tensors given as {name}"), name, name)


def from_dataset(
    dataset: Dataset[Any],
    test: Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Data:
    """Data set of a map-style torch dataset of ``(x, label)`` pairs; each item is read once, in order.

    Pillow images (gray or RGB) become float32 ``[channels, h, w]``, pixels / 255; tensors and arrays are stacked,
    then as in `from_tensors`. A random transform is drawn once; the global random states are restored.

    Parameters
    ----------
    dataset, test : the training and test sets; without a test set, split 80/20, stratified, always in the same way.
    classes : class names; None = ``dataset.classes`` if it exists.
    name : short name; None = the dataset's type.

    Raises
    ------
    Refused
        For an item that is not such a pair or differs in shape or dtype (with its index), and as `from_tensors`.

    Examples
    --------
    >>> pairs = torch.utils.data.TensorDataset(torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2)
    >>> from_dataset(pairs, name="toy")
    Data(toy: 8 train, 2 test, 2 classes, vectors 3)
    """
    name = name or type(dataset).__name__
    if classes is None:
        own = getattr(dataset, "classes", None)
        classes = [str(item) for item in own] if isinstance(own, list | tuple) else None
    with restored_random_states():
        train_pair = stack(dataset, name)
        test_pair = None if test is None else stack(test, f"{name} (test)")
    return _build(Files(train_pair, test_pair, classes, f"torch dataset {type(dataset).__name__}"), name, name)


def _read(name_or_path: str | Path, data_dir: str | Path | None) -> tuple[Files, str, str]:
    """The content of the files, the name of the data set, and its subject in errors."""
    if name_or_path == "digits":
        return read_digits(), "digits", "digits"
    official: dict[str, tuple[Callable[[Path], Files], str]] = {
        "mnist": (read_mnist, MNIST_EXPECTED),
        "cifar10": (read_cifar10, CIFAR10_EXPECTED),
        **{text: (partial(read_text, name=text), text_expected(text)) for text in TEXT_SETS},
    }
    if isinstance(name_or_path, str) and name_or_path in official:
        read, files = official[name_or_path]
        if data_dir is None:
            expected = f"the folder of {files}"
            raise refusal(f"data_dir for {name_or_path}", got="none", expected=expected, fix=NO_DOWNLOAD)
        folder = Path(os.path.expanduser(data_dir))
        return read(folder), name_or_path, str(folder)
    if is_code("--data", str(name_or_path)):
        return _from_factory(str(name_or_path))
    path = Path(os.path.expanduser(name_or_path))
    name = os.path.basename(os.path.abspath(path))
    if os.path.isdir(path):
        check_name("data", name, "Rename the folder.")
        return read_image_folder(path), name, str(path)
    if path.suffix == ".npz":
        check_name("data", name, "Rename the file.")
        return read_npz(path), path.stem, str(path)
    names = ", ".join(["digits", *official])
    expected = f"{names}, the path of an .npz file or of a folder of images, or file.py:factory"
    if os.path.lexists(path):
        raise refusal(str(path), got="another kind of file", expected=expected, fix="Save arrays with numpy.savez.")
    got = f"{str(name_or_path)!r}, neither the name of a data set nor a file"
    raise refusal("data", got=got, expected=expected, fix=nearest(str(name_or_path), ["digits", *official]))


def _from_factory(place: str) -> tuple[Files, str, str]:
    """Call the user's factory and convert its result, as `_read`."""
    data = find("--data", place, ())()
    name = place.rpartition(":")[2]
    if not isinstance(data, Data):
        pair: Any = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
        if isinstance(pair[0], Dataset):
            data = from_dataset(*pair, name=name)
        elif isinstance(pair[0], tuple | list):
            data = from_tensors(*pair, name=name)
        elif pair[1] is not None:
            data = from_tensors(pair, name=name)
        else:
            expected = "a torch dataset or a pair of tensors (x, y), or two of either (training, test)"
            got = f"a factory that returned a {type(data).__name__}"
            raise refusal(f"--data {place}", got=got, expected=expected, fix="Return one of those.")
    sets = (data.x_train, data.y_train), (data.x_test, data.y_test)
    source = f"{data.source}, made by {place}"
    return Files(*sets, data.classes, source, vocabulary=data.vocabulary), name, place


def _build(
    files: Files,
    name: str,
    subject: str,
    float_dtype: torch.dtype | None = None,
    classes: Sequence[str | int] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> Data:
    """Check, split, select classes, sample; only then convert pixels to floats."""
    source = files.source
    training_set, test_set = f"{subject}, training set", f"{subject}, test set"
    x, y, kind = examples(files.train, subject if files.test is None else training_set, float_dtype)
    if files.test is None:
        sets = [(x, y), (x, y)]
        names = class_names(files.classes, {subject: y})
        *rows, how = held_out(y, subject)
        source += how
    else:
        x_test, y_test, kind_test = examples(files.test, test_set, float_dtype)
        if x.shape[1:] != x_test.shape[1:] or x.dtype != x_test.dtype or kind != kind_test:
            got = f"examples {list(x_test.shape[1:])} {x_test.dtype}"
            expected = f"{list(x.shape[1:])} {x.dtype}, as in the training set"
            raise refusal(test_set, got=got, expected=expected, fix="Prepare both sets the same way.")
        sets = [(x, y), (x_test, y_test)]
        names = class_names(files.classes, {training_set: y, test_set: y_test})
        rows = [torch.arange(len(y)), torch.arange(len(y_test))]
    labels = [y[index] for (_, y), index in zip(sets, rows, strict=True)]
    if classes is not None:
        indices = class_indices(classes, names)
        new_label = torch.full((len(names),), -1)
        new_label[indices] = torch.arange(len(indices))
        for part, where in enumerate(("training", "test")):
            new = new_label[labels[part]]
            rows[part], labels[part] = rows[part][new >= 0], new[new >= 0]
            absent = (labels[part].bincount(minlength=len(indices)) == 0).nonzero()
            if len(absent):
                got = f"{names[indices[int(absent[0])]]!r}, which has no examples in the {where} set"
                expected = "classes with examples in both sets"
                raise refusal("classes", got=got, expected=expected, fix="Choose another class.")
        names = tuple(names[index] for index in indices)
        source += f"; classes {', '.join(names)}"
    for part, (count, where) in enumerate(zip(counts, ("train", "test"), strict=True)):
        if count is not None:
            sample = draw(labels[part], count, where, seed, part)
            source += f"; {count:,} of {len(labels[part]):,} {where} examples, stratified, seed {seed}"
            rows[part], labels[part] = rows[part][sample], labels[part][sample]
    inputs = [x if len(index) == len(x) else x[index] for (x, _), index in zip(sets, rows, strict=True)]
    normalisation = "token ids as given" if kind == "tokens" else "values as given, no scaling or centering"
    if files.vocabulary is not None:
        normalisation = f"words as numbers, {len(files.vocabulary):,} with padding (0) and unknown words (1)"
    if x.dtype == torch.uint8:
        check_room(subject, 4 * sum(x.numel() for x in inputs))
        inputs = [x.to(torch.float32, memory_format=torch.contiguous_format).div_(files.scale) for x in inputs]
        normalisation = f"pixels / {files.scale:.0f}, no centering"
    y_train, y_test = (y.to(x.device) for y in labels)
    return Data(inputs[0], y_train, inputs[1], y_test, names, name, normalisation, source, kind, files.vocabulary)
