"""Data sets with labels or targets: of arrays, torch datasets and what files hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ntkit.base.checks import refusal
from ntkit.base.memory import check_room
from ntkit.base.tensors import tensor_hash
from ntkit.data.columns import Columns, standardized_columns
from ntkit.data.examples import Kind, examples, names_of_classes, restored_random_states, stack
from ntkit.data.readers import Files
from ntkit.data.splits import class_indices, draw, held_out
from ntkit.data.targets import Targets, Task, in_digits, read_targets, standardized
from ntkit.data.text_reader import PADDING, TEXT_SETS, of_training

_TEXTS = f"Load one of {', '.join(TEXT_SETS)}, or a table of one column of sentences and a target."
Pair = tuple[Tensor | ArrayLike, Tensor | ArrayLike]  # x and labels


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Examples and labels for training and testing.

    Attributes
    ----------
    x_train, x_test : images ``[n, channels, h, w]`` (pixels of files in [0, 1]), vectors ``[n, ...]``, int64 tokens
        ``[n, t]``.
    y_train, y_test : labels, int64 ``[n]``, values 0 to ``len(classes) - 1``; of a regression the targets, floats
        ``[n, outputs]``, standardized on the training set.
    classes : the name of each label; empty for a regression.
    name : short name of the data set.
    normalization : how the values of x were scaled, as a sentence.
    source : the files or records, the split, the classes and the sample.
    kind : ``"images"``, ``"vectors"`` or ``"tokens"``: the content of x.
    vocabulary : the word of each token number of a text set, those of padding (0) and of unknown words (1) first.
    targets : of a regression: names, means and deviations of the targets (`Targets`); None for classes.
    columns : of a table: names, means and deviations of the columns of x (`Columns`); None for other data.

    Examples
    --------
    >>> import ntkit
    >>> ntkit.data.load("digits", classes=(3, 8))
    Data(digits: 285 train, 72 test, 2 classes, images 1 x 8 x 8)
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    name: str
    normalization: str
    source: str
    kind: Kind
    vocabulary: tuple[str, ...] | None = None
    targets: Targets | None = None
    columns: Columns | None = None

    @property
    def outputs(self) -> int:
        """Outputs that a network for these data has: one for two classes, else one per class or per target."""
        if self.targets is not None:
            return len(self.targets.names)
        return 1 if len(self.classes) == 2 else len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x_train.shape[1:])

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the four arrays' dtypes, shapes and bytes, and of targets' units."""
        arrays = [self.x_train, self.y_train, self.x_test, self.y_test]
        if self.targets is not None:
            arrays.append(torch.tensor([self.targets.mean, self.targets.deviation], dtype=torch.float64, device="cpu"))
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
            raise refusal(f"data {self.name}", got=got, expected=expected, fix=_TEXTS)
        row = torch.as_tensor(tokens)
        size = len(self.vocabulary)
        if row.ndim != 1 or row.is_floating_point() or ((row < 0) | (row >= size)).any():
            got = f"{row.dtype} of shape {list(row.shape)}"
            expected = f"one row of token numbers below {size:,}"
            raise refusal("tokens", got=got, expected=expected, fix="Give one row of x_train or x_test.")
        return " ".join(self.vocabulary[token] for token in row.tolist() if token != PADDING)

    def shown(self, y: Tensor) -> str:
        """A label [] as the name of its class, or standardized targets [outputs] as numbers in their own units.

        >>> data = from_tensors((torch.arange(9.0)[:, None], torch.arange(9) % 2), class_names=["even", "odd"])
        >>> data.shown(data.y_train[0])
        'even'
        >>> data = from_tensors((torch.arange(9.0)[:, None], 12345.6 * torch.arange(9.0)))
        >>> data.shown(data.y_train[1])
        '12,350'
        """
        if self.targets is None:
            return self.classes[int(y)]
        return ", ".join(map(in_digits, self.targets.in_units(y.cpu()).tolist()))

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        what = f"{len(self.classes)} classes"
        if self.targets is not None:
            what = f"{self.outputs} target" + ("s" if self.outputs > 1 else "")
        counts = f"{len(self.y_train)} train, {len(self.y_test)} test, {what}"
        return f"Data({self.name}: {counts}, {self.kind} {shape})"


def from_tensors(
    train: Pair,
    test: Pair | None = None,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "tensors",
    task: Task | None = None,
) -> Data:
    """Data set of tensors or arrays ``(x, y)``; without a test set, split 80/20, stratified, always in the same way.

    Floats keep their dtype and are not copied; uint8 of rank 3 or 4 is images and is divided by 255; int16, int32 and
    int64 of rank 2 is tokens.

    Parameters
    ----------
    train, test : pairs of x ``[n, ...]`` and y: labels ``[n]`` (integers, text, booleans), one-hot rows ``[n, C]``, or
        float targets ``[n]`` or ``[n, outputs]`` of a regression, which are standardized on the training set.
    class_names : the names of labels 0, 1, ..., or one per different label, in ascending order; None = the labels.
    name : short name of the data set.
    task : ``"classification"`` or ``"regression"``; None = a regression where the targets are floats.

    Raises
    ------
    Refused
        For empty or non-finite data, different lengths, labels or targets that are missing or of mixed kinds.

    Examples
    --------
    >>> x, y = torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2
    >>> from_tensors((x, y), class_names=["even", "odd"])
    Data(tensors: 8 train, 2 test, 2 classes, vectors 3)
    >>> prices = from_tensors((x, 1000 * x.sum(1)))
    >>> prices, prices.targets.names
    (Data(tensors: 8 train, 2 test, 1 target, vectors 3), ('y',))
    """
    return build(Files(train, test, class_names, f"tensors given as {name}"), name, name, task=task)


def from_dataset(
    train: Dataset[Any] | DataLoader,
    test: Dataset[Any] | DataLoader | None = None,
    *,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    task: Task | None = None,
) -> Data:
    """Data set of a map-style torch dataset of ``(x, y)`` pairs, or of a loader's batches; each is read once, in order.

    Pillow images (gray or RGB) become float32 ``[channels, h, w]``, pixels / 255; tensors and arrays are stacked,
    then as in `from_tensors`. A random transform is drawn once; the global random states are restored.

    Parameters
    ----------
    train, test : the training and test sets; without a test set, split 80/20, stratified, always in the same way.
    class_names : names of the classes; None = ``train.classes`` if it exists, of a Subset those of the whole.
    name : short name; None = the dataset's type.
    task : as in `from_tensors`.

    Raises
    ------
    Refused
        For an item that is not such a pair or differs in shape or dtype (with its index), a loader that shuffles, draws
        by weights or drops samples, and as `from_tensors`.

    Examples
    --------
    >>> pairs = torch.utils.data.TensorDataset(torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2)
    >>> from_dataset(pairs, name="toy")
    Data(toy: 8 train, 2 test, 2 classes, vectors 3)
    """
    whole = train.dataset if isinstance(train, DataLoader) else train
    kind = type(whole).__name__
    name = name or kind
    if class_names is None and task != "regression":
        class_names = names_of_classes(whole)
    with restored_random_states():
        train_pair = stack(train, name)
        test_pair = None if test is None else stack(test, f"{name} (test)")
    return build(Files(train_pair, test_pair, class_names, f"torch dataset {kind}"), name, name, task=task)


def build(
    files: Files,
    name: str,
    subject: str,
    float_dtype: torch.dtype | None = None,
    classes: Sequence[str | int] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
    task: Task | None = None,
) -> Data:
    """Check, split, select classes, sample; only then convert pixels to floats and standardize."""
    source = files.source
    training_set, test_set = f"{subject}, training set", f"{subject}, test set"
    float_dtype = float_dtype if files.numeric is None else torch.float64  # until it is standardized
    x, y, kind = examples(files.train, subject if files.test is None else training_set, float_dtype)
    if files.test is None:
        (target,), names = read_targets({subject: y}, files.classes, task)
        *rows, how = held_out(target if names else torch.zeros(len(target), dtype=torch.int64, device="cpu"), subject)
        source += how
        if files.vocabulary is not None:  # of all examples so far
            x, vocabulary = of_training(x, files.vocabulary, rows[0])
            files = files._replace(vocabulary=vocabulary)
        sets = [(x, target), (x, target)]
    else:
        x_test, y_test, kind_test = examples(files.test, test_set, float_dtype)
        if x.shape[1:] != x_test.shape[1:] or x.dtype != x_test.dtype or kind != kind_test:
            got = f"examples {list(x_test.shape[1:])} {x_test.dtype}"
            expected = f"{list(x.shape[1:])} {x.dtype}, as in the training set"
            raise refusal(test_set, got=got, expected=expected, fix="Prepare both sets the same way.")
        pair, names = read_targets({training_set: y, test_set: y_test}, files.classes, task)
        sets = [(x, pair[0]), (x_test, pair[1])]
        rows = [torch.arange(len(part), device="cpu") for part in (x, x_test)]
    labels = [y[index] for (_, y), index in zip(sets, rows, strict=True)]
    if classes is not None:
        if not names:
            fix = "Leave out the classes, or say task=classification (--task)."
            raise refusal("classes", got="classes of a regression", expected="none", fix=fix)
        rows, labels, names = _of_classes(classes, names, rows, labels)
        source += f"; classes {', '.join(names)}"
    for part, (count, where) in enumerate(zip(counts, ("train", "test"), strict=True)):
        if count is not None:
            groups = labels[part] if names else torch.zeros(len(labels[part]), dtype=torch.int64, device="cpu")
            sample = draw(groups, count, where, seed, part)
            how = "stratified, " if names else ""
            source += f"; {count:,} of {len(labels[part]):,} {where} examples, {how}seed {seed}"
            rows[part], labels[part] = rows[part][sample], labels[part][sample]
    inputs = [x if len(index) == len(x) else x[index] for (x, _), index in zip(sets, rows, strict=True)]
    inputs, normalization, columns = _scaled(files, inputs, kind, subject)
    targets = None
    if not names:
        dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
        labels, targets = standardized(labels, files.targets, subject, dtype)
    y_train, y_test = (y.to(x.device) for y in labels)
    optional = files.vocabulary, targets, columns
    return Data(inputs[0], y_train, inputs[1], y_test, names, name, normalization, source, kind, *optional)


def _of_classes(
    classes: Sequence[str | int], names: tuple[str, ...], rows: list[Tensor], labels: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
    """Rows, labels and names of some classes, in the order in which they are named."""
    indices = class_indices(classes, names)
    new_label = torch.full((len(names),), -1, device="cpu")
    new_label[indices] = torch.arange(len(indices), device="cpu")
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for own, label, where in zip(rows, labels, ("training", "test"), strict=True):
        new = new_label[label]
        kept[0].append(own[new >= 0])
        kept[1].append(new[new >= 0])
        absent = (kept[1][-1].bincount(minlength=len(indices)) == 0).nonzero()
        if len(absent):
            got = f"{names[indices[int(absent[0])]]!r}, which has no examples in the {where} set"
            expected = "classes with examples in both sets"
            raise refusal("classes", got=got, expected=expected, fix="Choose another class.")
    return *kept, tuple(names[index] for index in indices)


def _scaled(files: Files, inputs: list[Tensor], kind: Kind, subject: str) -> tuple[list[Tensor], str, Columns | None]:
    """Inputs with pixels as floats or standardized columns; what was done to the values, as a sentence; the columns."""
    if inputs[0].dtype == torch.uint8:
        check_room(subject, 4 * sum(x.numel() for x in inputs))
        inputs = [x.to(torch.float32, memory_format=torch.contiguous_format).div_(files.scale) for x in inputs]
        return inputs, f"pixels / {files.scale:.0f}, no centering", None
    if files.numeric is not None:
        return standardized_columns(inputs, tuple(files.columns or ()), tuple(files.numeric), subject)
    if files.vocabulary is not None:
        return inputs, f"words as numbers, {len(files.vocabulary):,} with padding (0) and unknown words (1)", None
    return inputs, "token ids as given" if kind == "tokens" else "values as given, no scaling or centering", None
