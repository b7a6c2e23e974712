"""Sentences as token numbers: of text sets, each line a label and words divided by blanks, and of a table's column."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import printable, refusal
from ntkit.base.memory import check_room
from ntkit.data.readers import AGAIN, NO_DOWNLOAD, Files, read_whole
from ntkit.data.splits import held_out

PADDING, UNKNOWN = 0, 1  # the first two token numbers
LONGEST = 128  # words of a sentence that are kept: longer than any training sentence of these sets
_MIN_COUNT = 1  # how often a word must occur in the training set to have a number of its own
_PER_BYTE = 40  # bytes of memory for each byte of a file, while its words are text
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")  # of running text: words and marks


class _TextSet(NamedTuple):
    train: str
    test: str | None
    classes: tuple[str, ...]  # the files' labels are their numbers


_QUESTIONS = ("description", "entity", "abbreviation", "person", "location", "number")
_OPINIONS = ("negative", "positive")
_SETS = {
    "trec": _TextSet("TREC.train.all", "TREC.test.all", _QUESTIONS),
    "sst2": _TextSet("stsa.binary.train", "stsa.binary.test", _OPINIONS),
    "rt-polarity": _TextSet("rt-polarity.all", None, _OPINIONS),
    "subj": _TextSet("subj.all", None, ("subjective", "objective")),
}
TEXT_SETS = tuple(_SETS)


class _Sentences(NamedTuple):
    labels: np.ndarray
    words: list[list[str]]


def text_expected(name: str) -> str:
    """The files of a text set, in words."""
    files = [file for file in _SETS[name][:2] if file]
    return f"the file{'s' if len(files) > 1 else ''} {', '.join(files)}"


def read_text(folder: Path, name: str) -> Files:
    """Read a text set by name, in a folder or in its folder ``text``; x are token numbers [n, length].

    The vocabulary is that of the whole training set, before classes or a sample are chosen: the same word has the same
    number in every part of a set. 0 is padding, 1 a word that the training set lacks; the others are in order of their
    frequency there, then of the alphabet. The length is that of the longest training sentence, at most `LONGEST`.
    """
    told = _SETS[name]
    if not os.path.isfile(folder / told.train) and os.path.isdir(folder / "text"):
        folder = folder / "text"
    files = [file for file in told[:2] if file]
    missing = [file for file in files if not os.path.lexists(folder / file)]
    if missing:
        raise refusal(str(folder), got=f"no {', '.join(missing)}", expected=text_expected(name), fix=NO_DOWNLOAD)
    sets = [_sentences(folder / file, told.classes) for file in files]
    train, source = sets[0], f"text file{'s' if len(files) > 1 else ''} {', '.join(files)}"
    absent = np.flatnonzero(np.bincount(train.labels, minlength=len(told.classes)) == 0)
    if len(absent):
        got = f"no sentence of label {absent[0]} ({told.classes[absent[0]]})"
        raise refusal(str(folder / told.train), got=got, expected="sentences of every label", fix=AGAIN)
    if told.test is None:
        *rows, how = held_out(torch.from_numpy(train.labels), str(folder / told.train))
        sets = [_Sentences(train.labels[own], [train.words[i] for i in own.tolist()]) for own in rows]
        source += how
    vocabulary = _vocabulary(sets[0].words)
    length = min(LONGEST, max(map(len, sets[0].words)))
    check_room(str(folder), 8 * length * sum(len(part.words) for part in sets))
    numbers = {word: number for number, word in enumerate(vocabulary)}
    pairs = [(_tokens(part.words, numbers, length), part.labels) for part in sets]
    if cut := sum(len(words) > length for part in sets for words in part.words):
        source += f"; {cut:,} sentence{'s' if cut > 1 else ''} cut after {length} words"
    return Files(pairs[0], pairs[1], told.classes, source, vocabulary=("<padding>", "<unknown>", *vocabulary))


def _sentences(path: Path, classes: tuple[str, ...]) -> _Sentences:
    """Labels and words of a file. UTF-8, as one of these sets is, or else Latin-1, as the others are."""
    expected = "lines of a label, a blank and words"
    raw = read_whole(path, expected)
    check_room(str(path), _PER_BYTE * len(raw))
    if not raw.endswith(b"\n"):
        got = f"a last line that does not end, after {len(raw):,} bytes (cut short)"
        raise refusal(str(path), got=got, expected="whole lines", fix=AGAIN)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    valid = {str(number): number for number in range(len(classes))}
    labels, sentences = [], []
    for line, content in enumerate(text[:-1].split("\n"), 1):  # other line breaks and blanks may be parts of words
        label, _, rest = content.removesuffix("\r").partition(" ")
        words = [word for word in rest.split(" ") if word]
        if label not in valid:
            got = f"label {label[:40]!r} in line {line:,}" if content.strip() else f"an empty line, {line:,}"
            fix = f"Labels are 0 to {len(classes) - 1}. {AGAIN}"
            raise refusal(str(path), got=got, expected=expected, fix=fix)
        if not words:
            raise refusal(str(path), got=f"a label without words in line {line:,}", expected=expected, fix=AGAIN)
        labels.append(valid[label])
        sentences.append(words)
    return _Sentences(np.array(labels), sentences)


def _vocabulary(sentences: list[list[str]]) -> list[str]:
    """Words by frequency, the more frequent first, then by alphabet."""
    counts = Counter(word for words in sentences for word in words)
    kept = [word for word, count in counts.items() if count >= _MIN_COUNT]
    return sorted(kept, key=lambda word: (-counts[word], word))


def _tokens(sentences: list[list[str]], numbers: dict[str, int], length: int) -> np.ndarray:
    """Token numbers [n, length]: words from the left, padding after them; `numbers` counts from 0."""
    tokens = np.full((len(sentences), length), PADDING, dtype=np.int64)
    for row, words in enumerate(sentences):
        own = [numbers.get(word, UNKNOWN - 2) + 2 for word in words[:length]]
        tokens[row, : len(own)] = own
    return tokens


def running_text(sentences: Sequence[str], subject: str) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Token numbers [n, length] of sentences as people write them, the word of each number, and what was cut in words.

    Words are in small letters, marks are words of their own; those after the 128th of a sentence are left out.
    """
    words = [_WORD.findall(sentence.lower()) for sentence in sentences]
    vocabulary = _vocabulary(words)
    length = min(LONGEST, max(map(len, words)))
    check_room(subject, 8 * length * len(words))
    tokens = _tokens(words, {word: number for number, word in enumerate(vocabulary)}, length)
    cut = sum(len(own) > length for own in words)
    how = f"; {cut:,} text{'s' if cut > 1 else ''} cut after {length} words" if cut else ""
    return tokens, ("<padding>", "<unknown>", *map(printable, vocabulary)), how


def of_training(tokens: Tensor, vocabulary: Sequence[str], rows: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Tokens [n, t] and vocabulary renumbered as if the sentences in `rows` were the only ones with words.

    Words that they lack become unknown, the others are in order of their frequency there, then of the alphabet; the
    length becomes that of the longest of them.

    >>> words = ("<padding>", "<unknown>", "a", "b", "c")
    >>> of_training(torch.tensor([[2, 3], [3, 0], [4, 3]]), words, torch.tensor([1]))
    (tensor([[1],
            [2],
            [1]]), ('<padding>', '<unknown>', 'b'))
    """
    own = tokens[rows]
    counts = own.flatten().bincount(minlength=len(vocabulary))
    counts[: UNKNOWN + 1] = 0
    kept = sorted(counts.nonzero().flatten().tolist(), key=lambda token: (-int(counts[token]), vocabulary[token]))
    numbers = torch.full((len(vocabulary),), UNKNOWN, device="cpu")
    numbers[PADDING] = PADDING
    numbers[kept] = torch.arange(UNKNOWN + 1, UNKNOWN + 1 + len(kept), device="cpu")
    length = int((own != PADDING).sum(1).max())
    return numbers[tokens[:, :length]], (*vocabulary[: UNKNOWN + 1], *(vocabulary[token] for token in kept))
