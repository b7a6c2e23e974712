"""Text sets: files read whole or refused, the vocabulary, and a network for sentences under every kernel."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Refused
from ntkit.data import Data, from_tensors, load
from ntkit.data.text_reader import LONGEST
from ntkit.networks.built_in import build
from ntkit.networks.text_network import TextNetwork
from ntkit.studies.official_files import official_files
from ntkit.testing import check_kernel

TRAIN = b"""0 What is a fox ?
1 What fowl grabs the spotlight ?
2 What does CPR stand for ?
3 Who was the fox ?
4 Where is the fox ?
5 How many ?
"""
TEST = b"""5 How many fowl , and when was this long sentence ever seen before ?
4 Where ?
"""


def write_trec(folder: Path, train: bytes = TRAIN, test: bytes = TEST) -> Path:
    (folder / "TREC.train.all").write_bytes(train)
    (folder / "TREC.test.all").write_bytes(test)
    return folder


def lines_of(path: Path) -> list[tuple[int, list[str]]]:
    """Labels and words, read another way than the reader does."""
    lines = path.read_bytes().decode("latin-1").split("\n")[:-1]
    return [(int(line[0]), [word for word in line[2:].split(" ") if word]) for line in lines]


# --- reading ---


def test_tokens_are_words_by_frequency_then_alphabet(tmp_path):
    data = load("trec", write_trec(tmp_path))
    assert data.vocabulary is not None
    counts = Counter(word for _, words in lines_of(tmp_path / "TREC.train.all") for word in words)
    assert list(data.vocabulary[2:]) == sorted(counts, key=lambda word: (-counts[word], word))
    assert data.vocabulary[:6] == ("<padding>", "<unknown>", "?", "What", "fox", "the")  # 6, 3, 3 and 3 times
    assert data.tokens == len(data.vocabulary) == 2 + len(counts)
    assert (data.x_train.dtype, data.x_train.shape, data.kind) == (torch.int64, (6, 6), "tokens")
    assert data.x_train[0].tolist() == [3, data.vocabulary.index("is"), data.vocabulary.index("a"), 4, 2, 0]
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 2, 3, 4, 5], [5, 4])
    assert data.classes == ("description", "entity", "abbreviation", "person", "location", "number")
    assert repr(data) == "Data(trec: 6 train, 2 test, 6 classes, tokens 6)"


def test_words_of_the_test_set_alone_are_unknown_and_long_sentences_are_cut(tmp_path):
    data = load("trec", write_trec(tmp_path))
    assert data.sentence(data.x_train[3]) == "Who was the fox ?"
    assert data.sentence(data.x_test[0]) == "How many fowl <unknown> <unknown> <unknown>"
    assert data.sentence(data.x_test[1]) == "Where ?"
    assert data.source == "text files TREC.train.all, TREC.test.all; 1 sentence cut after 6 words"


def test_no_sentence_is_longer_than_the_bound(tmp_path):
    long = b"0 " + b" ".join(b"w%d" % i for i in range(LONGEST + 5)) + b"\n"
    data = load("trec", write_trec(tmp_path, TRAIN + long))
    assert data.input_shape == (LONGEST,)
    assert len(data.sentence(data.x_train[6]).split()) == LONGEST


def test_only_blanks_and_line_feeds_divide_a_file(tmp_path):
    # to Python's own split, the bytes 85 and A0 are blanks and 85, 0B and 1C ends of lines
    train = TRAIN.replace(b"fowl", b"a\x85b c\xa0d e\x0bf\x1cg")
    train = train.replace(b"stand ", b"stand  ").replace(b"?\n", b"? \r\n")
    data = load("trec", write_trec(tmp_path, train))
    assert data.sentence(data.x_train[1]) == "What a\x85b c\xa0d e\x0bf\x1cg grabs the spotlight ?"
    assert data.sentence(data.x_train[2]) == "What does CPR stand for ?"


@pytest.mark.parametrize("code", ["utf-8", "latin-1"])
def test_letters_beyond_ascii_in_both_encodings(tmp_path, code):
    data = load("trec", write_trec(tmp_path, TRAIN.replace(b"CPR", "bÃ©art café".encode(code))))
    assert data.sentence(data.x_train[2]) == "What does bÃ©art café stand for ?"


def test_classes_and_samples_keep_the_numbers_of_the_words(tmp_path):
    whole = load("trec", write_trec(tmp_path))
    part = load("trec", tmp_path, classes=("number", 4), train=2, test=1, seed=3)
    again = load("trec", tmp_path, classes=("number", "location"), train=2, test=1, seed=3)
    assert (part.classes, part.vocabulary) == (("number", "location"), whole.vocabulary)
    assert torch.equal(part.x_train, whole.x_train[[4, 5]])
    assert part.y_train.tolist() == [1, 0]
    assert part.hash == again.hash != whole.hash


def test_sets_without_a_test_part_are_split_as_others_and_words_come_from_the_training_part(tmp_path):
    rows = [(i % 2, f"word{i} common") for i in range(20)]
    (tmp_path / "subj.all").write_bytes(b"".join(b"%d %s\n" % (y, text.encode()) for y, text in rows))
    data = load("subj", tmp_path)
    labels = torch.tensor([y for y, _ in rows])
    same = from_tensors((torch.arange(20)[:, None].float(), labels))
    for x, expected in ((data.x_train, same.x_train), (data.x_test, same.x_test)):
        texts = [rows[int(i)][1] for i in expected[:, 0]]
        assert [data.sentence(row) for row in x] == (
            texts if x is data.x_train else ["<unknown> common" for _ in texts]
        )
    assert data.source == f"text file subj.all; {same.source.partition('; ')[2]}"
    assert "16 train / 4 test" in data.source


def test_the_folder_itself_or_one_named_text(tmp_path):
    (tmp_path / "text").mkdir()
    write_trec(tmp_path / "text")
    assert load("trec", tmp_path).hash == load("trec", tmp_path / "text").hash
    assert official_files(["trec"], tmp_path) == {"trec": tmp_path}


# --- refused ---


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", r"TREC.train.all: got an empty file \(0 bytes\)"),
        (TRAIN.replace(b"2 What", b"6 What"), r"TREC.train.all: got label '6' in line 3; .*Labels are 0 to 5"),
        (TRAIN.replace(b"2 What", b"-1 What"), r"label '-1' in line 3"),
        (TRAIN.replace(b"2 What", b"\xb2 What"), r"label '²' in line 3"),  # a digit to Python's isdigit
        (TRAIN.replace(b"2 What", b"02 What"), r"label '02' in line 3"),
        (TRAIN.replace(b"2 What", b"\t2 What"), r"label '\\+t2' in line 3"),
        (TRAIN + b"0\n", r"a label without words in line 7"),
        (TRAIN + b"0    \n", r"a label without words in line 7"),
        (TRAIN + b"\n", r"an empty line, 7"),
        (b"\n" + TRAIN, r"an empty line, 1"),
        (TRAIN[:-1], r"a last line that does not end, after \d+ bytes \(cut short\)"),
        (TRAIN[: TRAIN.index(b"5 How")], r"TREC.train.all: got no sentence of label 5 \(number\)"),
        (b"3 Who ?\n" * 9, r"got no sentence of label 0 \(description\)"),
        (b"<!DOCTYPE html><html></html>\n", r"an HTML page"),
        (bytes(range(256)) + b"\n", r"label '\\+x00.* in line 1"),
    ],
)
def test_bad_training_files_are_refused_with_their_line(tmp_path, train, message):
    write_trec(tmp_path, train)
    with pytest.raises(Refused, match=message) as caught:
        load("trec", tmp_path)
    assert str(caught.value).isprintable()
    assert "TREC.train.all" in str(caught.value)


def test_bad_test_files_are_refused_by_their_own_name(tmp_path):
    write_trec(tmp_path, TRAIN, TEST + b"7 What ?\n")
    with pytest.raises(Refused, match=r"TREC.test.all: got label '7' in line 3"):
        load("trec", tmp_path)


def test_missing_files_folders_and_pipes_are_named(tmp_path):
    with pytest.raises(Refused, match=r"data_dir for trec: got none; .*TREC.train.all, TREC.test.all.* ever downl"):
        load("trec")
    with pytest.raises(Refused, match=r"got no TREC.train.all, TREC.test.all; "):
        load("trec", tmp_path)
    (tmp_path / "TREC.train.all").write_bytes(TRAIN)
    with pytest.raises(Refused, match=r"got no TREC.test.all; "):
        load("trec", tmp_path)
    os.mkfifo(tmp_path / "TREC.test.all")
    with pytest.raises(Refused, match=r"TREC.test.all: got a pipe"):
        load("trec", tmp_path)
    with pytest.raises(Refused, match=r"Did you mean trec"):
        load("trecs", tmp_path)


def test_what_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    write_trec(tmp_path, TRAIN * 100)
    monkeypatch.setattr("ntkit.base.memory.free_memory", lambda device: 50_000)
    with pytest.raises(Refused, match=r"TREC.train.all: got 0.0 GB of data; .*the free memory"):
        load("trec", tmp_path)


@pytest.mark.parametrize("tokens", [[-1], [10**6], [[2, 3]], [0.5]])
def test_sentence_refuses_what_is_no_row_of_tokens(tmp_path, tokens):
    data = load("trec", write_trec(tmp_path))
    with pytest.raises(Refused, match="one row of token numbers below"):
        data.sentence(torch.tensor(tokens))
    with pytest.raises(Refused, match="data digits: got no vocabulary"):
        load("digits").sentence(torch.tensor([2]))


# --- the network ---


def sentences(n: int, length: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random sentences of 1 to `length` words, padded."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, tokens, (n, length), generator=generator)
    lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
    return torch.where(torch.arange(length) < lengths, words, 0)


def small(outputs: int = 3) -> TextNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TextNetwork(vocabulary=25, outputs=outputs, features=5, channels=4).double().eval()


def test_padding_changes_nothing_and_words_do():
    x, network = sentences(6, 8, 25), small()
    wide = F.pad(x, (0, 5))
    torch.testing.assert_close(network(wide), network(x), rtol=1e-12, atol=1e-12)
    K, wide_K = (ntkit.TangentKernel(network)(z) for z in (x, wide))
    torch.testing.assert_close(wide_K, K, rtol=1e-12, atol=1e-12)
    other = torch.where(x > 0, x % 24 + 1, 0)
    assert (network(other) - network(x)).abs().amax(1).min() > 1e-6


def test_kernel_obeys_the_laws_without_a_fallback():
    network, x1, x2 = small(), sentences(6, 8, 25), sentences(4, 8, 25, seed=1)
    kernel = ntkit.TangentKernel(network)
    check_kernel(kernel, x1, x2)
    assert kernel.fallback(x1) == {}


def test_second_derivatives_agree_with_differences():
    network, x = small(outputs=1), sentences(5, 8, 25)
    params = list(network.parameters())

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(network(x).square().sum(), params, create_graph=True))

    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in params]
    along = sum((g * d).sum() for g, d in zip(gradients(), direction, strict=True))
    products = torch.autograd.grad(along, params)
    ends, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append([g.detach() for g in gradients()])
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    for product, plus, minus in zip(products, *ends, strict=True):
        torch.testing.assert_close(product, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.02),
    ],
)
def test_path_kernel_explains_a_trained_text_network_exactly(optimizer):
    x, y = sentences(20, 8, 25), torch.arange(20) % 3
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    run = ntkit.train(network, (x, y), F.cross_entropy, optimizer, steps=15, batch_size=6)
    result = ntkit.PathKernel(run).decompose(sentences(5, 8, 25, seed=3))
    assert result.error < 1e-12
    assert (result.prediction - result.initial).abs().max() > 0.05
    change = (network.embedding.weight - before["embedding.weight"]).abs().amax(1)
    assert change[1:].min() > 0  # every word occurs


def test_textcnn_is_built_for_sentences_with_a_vocabulary_only(tmp_path):
    data = load("trec", write_trec(tmp_path))
    network = build("textcnn", data.input_shape, 6, 0, data.tokens)
    assert network(data.x_test).shape == (2, 6)
    with pytest.raises(Refused, match=r"--model textcnn: got inputs of shape \(1, 8, 8\) without a vocabulary"):
        build("textcnn", (1, 8, 8), 10, 0)
    with pytest.raises(Refused, match="textcnn"):
        build("textcn", (6,), 6, 0, 9)


def test_analysis_of_sentences_shows_them(tmp_path, short_pages):
    write_trec(tmp_path, TRAIN * 3, TEST + TRAIN)
    settings = ntkit.Settings(data="trec", data_dir=tmp_path, model="textcnn", epochs=1, track_points=4, lr=0.1)
    page = (ntkit.analyze(settings, out=tmp_path / "run") / "report.html").read_text()
    for text in ("Where is the fox ?", "How many fowl &lt;unknown&gt;", "five training sequences"):
        assert text in page
    assert "training images" not in page


# --- the real files ---


def rate_of_words(data: Data, label: str, words: tuple[str, ...]) -> tuple[float, float]:
    """How often a sentence has one of these words: of the class, and of the others."""
    has = torch.tensor([any(word in data.sentence(x).split() for word in words) for x in data.x_train]).double()
    own = data.y_train == data.classes.index(label)
    return float(has[own].mean()), float(has[~own].mean())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("number", ("many", "When", "date")),
        ("person", ("Who",)),
        ("location", ("Where", "city", "country", "state")),
        ("abbreviation", ("abbreviation", "acronym", "stand")),
        ("description", ("How", "Why", "mean", "origin")),
        ("entity", ("color", "animal", "film", "book", "sport")),
    ],
)
def test_trec_classes_have_their_names(shared_data, label, words):
    data = load("trec", shared_data)
    own, others = rate_of_words(data, label, words)
    assert own > 1.5 * others


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("sst2", "positive", ("moving", "funny", "enjoyable", "best")),
        ("sst2", "negative", ("bad", "dull", "worst", "lack")),
        ("rt-polarity", "positive", ("moving", "enjoyable", "best", "engrossing")),
        ("rt-polarity", "negative", ("bad", "dull", "worst", "lack")),
        ("subj", "subjective", ("film", "comedy", "movie", "but")),
        ("subj", "objective", ("mother", "finds", "decides", "town")),
    ],
)
def test_opinions_and_subjectivity_have_their_names(shared_data, name, label, words):
    own, others = rate_of_words(load(name, shared_data), label, words)
    assert own > 1.5 * others


def test_real_sets_have_their_published_sizes_and_words(shared_data):
    expected = {"trec": (5452, 500), "sst2": (6920, 1821), "rt-polarity": (8529, 2133), "subj": (8000, 2000)}
    for name, sizes in expected.items():
        data = load(name, shared_data)
        assert (len(data.y_train), len(data.y_test)) == sizes
    data = load("trec", shared_data)
    train, test = (lines_of(shared_data / "text" / f"TREC.{part}.all") for part in ("train", "test"))
    assert [data.sentence(x) for x in data.x_train] == [" ".join(words) for _, words in train]
    known = {word for _, words in train for word in words}
    assert [data.sentence(x) for x in data.x_test] == [
        " ".join(word if word in known else "<unknown>" for word in words) for _, words in test
    ]
    assert data.y_train.tolist() == [label for label, _ in train]


def test_textcnn_on_trec_has_the_size_of_the_paper(shared_data):
    data = load("trec", shared_data)
    network = build("textcnn", data.input_shape, 6, 0, data.tokens)
    count = sum(p.numel() for p in network.parameters())
    assert count == 1_672_902
    assert network.embedding.weight.numel() > 0.9 * count
