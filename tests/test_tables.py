"""Tables as data: columns of numbers and text, targets, and what is refused with line and column."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from ntkit.base.checks import Refused
from ntkit.data import load

LINES = [
    "area,city,rooms,price",
    *(f"{30 + 7 * i},{('Rome', 'Oslo', 'Bern')[i % 3]},{i % 4},{1000.5 * i}" for i in range(25)),
]


def table(folder, lines=LINES, name="homes.csv", **more):
    (folder / name).write_text("\n".join(lines) + "\n", newline="")
    return load(folder / name, **more)


def test_columns_are_standardized_on_the_training_set_and_texts_are_indicators(tmp_path):
    data = table(tmp_path, target="price", train=15)
    assert (data.input_shape, data.targets.names, data.kind) == ((5,), ("price",), "vectors")
    shown = {f"area {30 + 7 * i}, rooms {i % 4}, city {('Rome', 'Oslo', 'Bern')[i % 3]}" for i in range(25)}
    assert {data.columns.shown(x) for x in torch.cat([data.x_train, data.x_test])} <= shown
    assert data.x_train.dtype == data.y_train.dtype == torch.float32
    rows = np.round((data.targets.in_units(data.y_train)[:, 0] / 1000.5).numpy()).astype(int)
    expected = np.array([[30 + 7 * i, i % 4] for i in rows], dtype=float)
    expected = (expected - expected.mean(0)) / expected.std(0)
    assert np.allclose(data.x_train[:, :2], expected, atol=1e-6)
    cities = np.array([[i % 3 == city for city in (2, 1, 0)] for i in rows])  # Bern, Oslo, Rome
    assert data.x_train[:, 2:].tolist() == cities.astype(float).tolist()
    assert data.normalization == (
        "2 columns of numbers standardized on the training set; 3 indicators of text as 0 and 1"
    )
    assert data.source.startswith("table homes.csv: price from 3 columns, 1 of them text as 3 indicators; fixed split")
    test = np.round((data.targets.in_units(data.y_test)[:, 0] / 1000.5).numpy()).astype(int)
    area = 30 + 7 * rows.astype(float)
    assert np.allclose(data.x_test[:, 0], (30 + 7 * test - area.mean()) / area.std(), atol=1e-6)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ([line.replace(",", ";") for line in LINES], "homes.csv"),
        ([line.replace(",", "\t") for line in LINES], "homes.tsv"),
        ([",".join(f'"{cell}"' for cell in line.split(",")) for line in LINES], "homes.csv"),
        (["\ufeff" + LINES[0], *LINES[1:], ""], "homes.csv"),
        ([line + "\r" for line in LINES], "homes.csv"),
        ([LINES[0], "", *LINES[1:]], "homes.csv"),
    ],
)
def test_other_forms_of_the_same_table(tmp_path, lines, name):
    (tmp_path / "one").mkdir()
    assert table(tmp_path, lines, name, target="price").hash == table(tmp_path / "one", target="price").hash


def test_the_target_decides_the_task(tmp_path):
    data = table(tmp_path, target="city")
    assert (data.classes, data.outputs, data.input_shape) == (("Bern", "Oslo", "Rome"), 3, (3,))
    data = table(tmp_path, target="rooms")  # few whole numbers: labels
    assert data.classes == ("0", "1", "2", "3")
    assert table(tmp_path, target="rooms", task="regression").targets.names == ("rooms",)
    assert table(tmp_path, target="rooms", class_names=list("abcd")).classes == ("a", "b", "c", "d")
    assert table(tmp_path, target="area").targets.names == ("area",)  # many whole numbers: a regression
    data = table(tmp_path, target=["price", "area"])
    assert (data.targets.names, data.outputs, data.input_shape) == (("price", "area"), 2, (4,))
    labels = [LINES[0], *(f"{i % 21},a,{i % 2},0" for i in range(42))]
    assert table(tmp_path, labels, target="area").classes == ()
    assert len(table(tmp_path, labels, target="area", task="classification").classes) == 21


@pytest.mark.parametrize("factor", ["e-200", "e200"])
def test_numbers_whose_squares_float64_does_not_hold_are_standardized_alike(tmp_path, factor):
    plain = ["length,other,y", *(f"{30 + 7 * i},{i % 5},{i % 7 + 0.5}" for i in range(25))]
    extreme = [plain[0], *(",".join(cell + factor for cell in line.split(",")) for line in plain[1:])]
    one, other = (
        table(tmp_path, lines, name, target="y", task="regression")
        for lines, name in ((plain, "one.csv"), (extreme, "other.csv"))
    )
    assert torch.allclose(other.x_train, one.x_train, atol=1e-6)
    assert torch.allclose(other.y_train, one.y_train, atol=1e-6)
    assert other.targets.deviation[0] == pytest.approx(float(f"1{factor}") * one.targets.deviation[0], rel=1e-12)


def test_whole_numbers_beyond_the_exact_ones_are_no_labels(tmp_path):
    lines = ["length,y", *(f"{30 + 7 * i},{i % 3}e30" for i in range(25))]
    with pytest.raises(Refused, match=r"got floats that are 3 different whole numbers, 0 to 2e\+30; .*--task"):
        table(tmp_path, lines, target="y")


def test_a_column_that_is_constant_in_training_is_only_centered(tmp_path):
    data = table(tmp_path, ["a,b,y", *(f"{i},7,{i / 3}" for i in range(10))], target="y")
    assert data.x_train[:, 1].unique().tolist() == [0]
    assert (
        data.normalization == "2 columns of numbers standardized on the training set (1 constant there, only centered)"
    )


def changed(line, old, new):
    return [*LINES[: line - 1], LINES[line - 1].replace(old, new), *LINES[line:]]


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (LINES, {}, r"target .--target.: got none; expected the column of homes.csv to predict: area, city, rooms, pr"),
        (LINES, {"target": "prize"}, r"got 'prize'; expected a column of homes.csv. Did you mean price"),
        (LINES, {"target": ["price", "city"]}, "got text in column city; expected numbers in all targets"),
        (changed(4, "44,", ","), {"target": "price"}, "got no value in line 4, column area; expected a value in each"),
        (changed(4, "Bern", " "), {"target": "price"}, "got no value in line 4, column city"),
        (changed(4, "44,", "NaN,"), {"target": "price"}, "got the missing value 'NaN' in line 4, column area"),
        (changed(4, "2001.0", "NA"), {"target": "price"}, "got the missing value 'NA' in line 4, column price"),
        (changed(4, "44,", "none,"), {"target": "price"}, "got 'none' in line 4, column area; expected a finite numb"),
        (changed(4, "44,", "inf,"), {"target": "price"}, "got 'inf' in line 4, column area; expected a finite number"),
        (changed(4, "44,", "4_4,"), {"target": "price"}, "got '4_4' in line 4, column area"),
        (changed(4, "44,", "44,1,"), {"target": "price"}, "got 5 cells in line 4; expected 4, as in line 1"),
        (changed(1, "area", ""), {"target": "price"}, r"got column 1 without a name; .*index=False"),
        (changed(1, "area", "city"), {"target": "price"}, "got two columns city"),
        (changed(4, "44,", '"44,'), {"target": "price"}, r"got line \d+ that cannot be read"),
        (LINES[:1], {"target": "price"}, "got no rows"),
        (
            [line.replace(",", ";").replace(".5", ",5").replace(".0", ",0") for line in LINES],
            {"target": "price"},
            "got '0,0' in line 2, column price; expected plain numbers",
        ),
        (["y", "0.1", "0.2", "0.4"], {"target": "y"}, "got no column beside the target"),
        (["a,y", *(f"{i}th,{i / 3}" for i in range(51))], {"target": "y"}, "51 different texts .*Remove the column"),
        (
            ["a,b,y", *(f"text {i},{i},{i / 3}" for i in range(51))],
            {"target": "y"},
            "51 different texts in column a, such.*Sentences: keep a and the target alone in the table",
        ),
        (LINES, {"target": "price", "classes": ("a", "b")}, "got classes of a regression"),
        (LINES, {"target": "price", "resize": 8}, r"resize .--resize.: got 8 for data that are no folder of images"),
    ],
)
def test_refused_tables(tmp_path, lines, more, message):
    with pytest.raises(Refused, match=message):
        table(tmp_path, lines, **more)


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,y\n1,\xff\n")
    with pytest.raises(Refused, match="bytes that are no UTF-8 in line 2"):
        load(tmp_path / "a.csv", target="y")
    (tmp_path / "a.csv").write_text("<!DOCTYPE html>")
    with pytest.raises(Refused, match="an HTML page"):
        load(tmp_path / "a.csv", target="y")
    with pytest.raises(Refused, match="neither the name of a data set nor a file"):
        load(tmp_path / "b.csv", target="y")
    with pytest.raises(Refused, match="got 'y' for data that are no table; expected none, or a table"):
        load("digits", target="y")


def test_parquet_without_pyarrow_names_the_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(Refused, match=r"without the package pyarrow; .* pip install pyarrow, or save the table as CSV"):
        load(tmp_path / "a.parquet", target="y")


def test_parquet_holds_the_same_table(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [line.split(",") for line in LINES[1:]]
    kinds = {"area": int, "city": str, "rooms": int, "price": float}
    columns = {name: [kind(row[i]) for row in rows] for i, (name, kind) in enumerate(kinds.items())}
    parquet.write_table(pyarrow.table(columns), tmp_path / "homes.parquet")
    assert load(tmp_path / "homes.parquet", target="price").hash == table(tmp_path, target="price").hash
    columns["area"][3] = None
    parquet.write_table(pyarrow.table(columns), tmp_path / "homes.parquet")
    with pytest.raises(Refused, match="got no value in row 3, column area"):
        load(tmp_path / "homes.parquet", target="price")


def json_lines(folder, rows, name="homes.jsonl", **more):
    (folder / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return load(folder / name, **more)


def rows_of_lines():
    kinds = {"area": int, "city": str, "rooms": int, "price": float}
    cells = [line.split(",") for line in LINES[1:]]
    return [{name: kind(cell) for (name, kind), cell in zip(kinds.items(), row, strict=True)} for row in cells]


def test_lines_of_json_hold_the_same_table(tmp_path):
    rows = rows_of_lines()
    expected = table(tmp_path, target="price").hash
    assert json_lines(tmp_path, rows, target="price").hash == expected
    other_order = [dict(reversed(row.items())) if i else row for i, row in enumerate(rows)]
    assert json_lines(tmp_path, [*other_order[:3], "\n", *other_order[3:]], target="price").hash == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1, 2]\n", "got no object in line 4; expected in each line a JSON object with the same keys"),
        ('{"area": 1}\n', "got the keys area in line 4"),
        ('{"area": 1, "area": 2, "city": "a", "rooms": 1, "price": 1.0}\n', "the keys area, area, city, .* in line 4"),
        ('{"area": [1], "city": "a", "rooms": 1, "price": 1.0}\n', "a list or an object in line 4, key area"),
        ('{"area": {"m": 1}, "city": "a", "rooms": 1, "price": 1.0}\n', "a list or an object in line 4, key area"),
        ('{"area": null, "city": "a", "rooms": 1, "price": 1.0}\n', "got no value in line 4, column area"),
        (
            '{"area": NaN, "city": "a", "rooms": 1, "price": 1.0}\n',
            "got the missing value 'nan' in line 4, column area",
        ),
        ('{"area": 1,\n', "got line 4, which cannot be read"),
        ("[" * 100_000 + "\n", "got line 4, which cannot be read"),
    ],
)
def test_refused_lines_of_json(tmp_path, row, message):
    rows = rows_of_lines()
    with pytest.raises(Refused, match=message):
        json_lines(tmp_path, [*rows[:3], row, *rows[3:]], target="price")


WORDS = ["Good", "bad", "plot", "plays", "it's", "long", "fun", "dull"]
SENTENCES = [" ".join([f"Film{i % 13}", *(WORDS[(i * k) % 8] for k in (1, 3, 5)[: 1 + i % 3]), "!"]) for i in range(60)]


def test_a_column_of_sentences_alone_becomes_token_numbers_of_the_training_words(tmp_path):
    rows = [{"text": text, "mark": ("low", "high")[i % 2]} for i, text in enumerate(SENTENCES)]
    rows[7]["text"] = "Never-seen WORDS, once."
    data = json_lines(tmp_path, rows, target="mark")
    assert (data.kind, data.classes, len(data.y_train), len(data.y_test)) == ("tokens", ("high", "low"), 48, 12)
    assert data.source.startswith("table homes.jsonl: mark from 1 column of text; fixed stratified split")
    known = {row["text"].lower().replace("-", " - ").replace(",", " ,").replace(".", " .") for row in rows}
    train = [data.sentence(x) for x in data.x_train]
    assert set(train) <= known
    counts = Counter(word for sentence in train for word in sentence.split())
    assert list(data.vocabulary[2:]) == sorted(counts, key=lambda word: (-counts[word], word))
    assert data.x_train.shape[1] == data.x_test.shape[1] == max(len(sentence.split()) for sentence in train)
    marks = {known_text: row["mark"] for row in rows for known_text in [row["text"].lower()]}
    assert all(marks.get(text, rows[7]["mark"]) == data.classes[y] for text, y in zip(train, data.y_train, strict=True))


def test_words_that_only_test_sentences_have_are_unknown(tmp_path):
    texts = [f"word{i} and others{i}" for i in range(60)]
    data = json_lines(tmp_path, [{"text": text, "y": i / 7} for i, text in enumerate(texts)], target="y")
    assert data.targets is not None
    assert {data.sentence(x) for x in data.x_test} == {"<unknown> and <unknown>"}
    assert {data.sentence(x) for x in data.x_train} < set(texts)
    part = load(tmp_path / "homes.jsonl", target="y", train=5)
    assert part.vocabulary == data.vocabulary
    assert {data.sentence(x) for x in part.x_train} < set(texts)


def test_long_sentences_are_cut_and_said_so(tmp_path):
    texts = [f"a{i} " + "b " * (150 if i == 3 else 5) for i in range(60)]
    data = json_lines(tmp_path, [{"text": text, "y": i % 2} for i, text in enumerate(texts)], target="y")
    assert "1 column of text; 1 text cut after 128 words; fixed" in data.source
    assert data.x_train.shape[1] <= 128


def test_texts_that_recur_are_categories_and_not_sentences(tmp_path):
    rows = [
        {"place": f"by the {('sea', 'lake', 'wood', 'road', 'hill', 'town')[i % 6]}", "y": i / 7} for i in range(60)
    ]
    assert json_lines(tmp_path, rows, target="y").input_shape == (6,)
