"""Data that people have: blank lines, long texts, numbers beyond the precision, integers of numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ntkit import data, probes
from ntkit.base.checks import Refused
from ntkit.commands.analyze import _unlearned

ROWS = [(i, i % 2) for i in range(30)]


def test_a_line_of_blanks_is_no_row(tmp_path):
    for name, blank in (("one.csv", ""), ("other.csv", "   ")):
        lines = ["x,y", *(f"{x},{y}" for x, y in ROWS[:9]), blank, *(f"{x},{y}" for x, y in ROWS[9:]), blank]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    one, other = (data.load(tmp_path / name, target="y") for name in ("one.csv", "other.csv"))
    assert one.hash == other.hash
    assert len(one.x_train) + len(one.x_test) == 30


def test_one_cell_is_said_in_the_singular(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,0\n2\n")
    with pytest.raises(Refused, match="got 1 cell in line 3; expected 2"):
        data.load(tmp_path / "a.csv", target="y")


@pytest.mark.parametrize("empty", [0, 2])
def test_a_line_of_json_without_keys_is_refused(tmp_path, empty):
    lines = [json.dumps({"x": x, "y": y}) for x, y in ROWS]
    lines.insert(empty, "{}")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(Refused, match=f"got no key in line {empty + 1}; expected in each line"):
        data.load(tmp_path / "a.jsonl", target="y")


def test_lines_of_json_without_any_key_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(Refused, match="got no key in line 1"):
        data.load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("place", ["x", "key", "y"])
def test_half_a_pair_in_json_is_refused_with_its_line(tmp_path, place):
    lines = [f'{{"x": "a b {x}", "y": "{y}"}}' for x, y in ROWS]
    half = {"x": ('"a b 0"', '"\\ud800"'), "key": ('"x"', '"\\ud800"'), "y": ('"0"}', '"\\ud800"}')}[place]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0].replace(*half), *lines[1:]]))
    with pytest.raises(Refused, match="got line 1, which cannot be read"):
        data.load(tmp_path / "a.jsonl", target="y")
    pair = ['{"x": "a b \\ud83d\\ude00", "y": "0"}', *lines]  # a whole pair is one character
    (tmp_path / "b.jsonl").write_text("\n".join(pair))
    assert "\U0001f600" in data.load(tmp_path / "b.jsonl", target="y").vocabulary


def test_a_long_cell_is_quoted_by_its_start(tmp_path):
    long = "word " * 3000
    for name, cells in (("a", [f"{long}{x}" for x, _ in ROWS]), ("b", ["9" * 999, *(str(x) for x, _ in ROWS[1:])])):
        lines = ["t,x,y", *(f"{cell},{x},{y}" for cell, (x, y) in zip(cells, ROWS, strict=True))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        with pytest.raises(Refused, match=f"{cells[0][:80]}…") as refused:
            data.load(tmp_path / f"{name}.csv", target="y")
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize(("value", "said"), [(1e300, "1e[+]300"), (-1e45, "-1e[+]45")])
@pytest.mark.parametrize("column", ["x", "y"])
def test_a_test_value_too_far_to_be_standardized_is_refused(tmp_path, value, said, column):
    """Wherever the odd row is, the data hold no infinity: in training it counts for the deviation."""
    finite = 0
    for place in range(30):
        rows = [{"x": x, "y": x + 0.5} for x, _ in ROWS]
        rows[place][column] = value
        (tmp_path / "a.csv").write_text("\n".join(["x,y", *(f"{row['x']},{row['y']}" for row in rows)]))
        try:
            found = data.load(tmp_path / "a.csv", target="y")
        except Refused as refused:
            what = {"x": "column x", "y": "target y"}[column]
            pattern = f"{what}: got {said}, where the training set's standard deviation is .*; expected values that can"
            with pytest.raises(Refused, match=pattern):
                raise refused
        else:
            finite += 1
            assert all(part.isfinite().all() for part in (found.x_train, found.y_train, found.x_test, found.y_test))
    assert finite == 24  # the size of the training set


def test_numbers_that_float32_does_not_hold_are_refused(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    for factor, message in ((1e300, "got .*e[+]\\d+ in row 0 .*; expected values of at most 3.4e[+]38"),
                            (1e-300, "got no value above .*e-300; expected some above 1.2e-38")):  # fmt: skip
        np.savez(tmp_path / "a.npz", x=factor * x, y=y)
        with pytest.raises(Refused, match=message):
            data.load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=np.where(x > 0, x, 1e-300 * x), y=y)  # some vanish beside others
    assert np.allclose(data.load(tmp_path / "a.npz").x_train.max(), x.max(), atol=2)
    np.savez(tmp_path / "a.npz", x=0 * x, y=y)
    assert not data.load(tmp_path / "a.npz").x_train.any()


def test_integers_that_int64_does_not_hold_are_refused():
    x = np.ones((20, 2))
    with pytest.raises(Refused, match=r"got 10{30} in row 0; expected integers below 2\^63"):
        data.from_tensors((x, [10**30 + i % 2 for i in range(20)]))
    assert data.from_tensors((x, [2**62 + i % 2 for i in range(20)])).classes == (str(2**62), str(2**62 + 1))


def test_transforms_take_integers_of_numpy():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(probes.shift(np.int64(2), np.int32(-1))(x), probes.shift(2, -1)(x))
    assert torch.equal(probes.shuffle_patches(np.int64(4), np.uint8(3))(x), probes.shuffle_patches(4, 3)(x))
    own, other = (
        {name: [t.parameters for t in group] for name, group in probes.standard(shape).items()}
        for shape in ((8, 8), (np.int64(8), np.int64(8)))
    )
    assert own == other
    with pytest.raises(Refused, match=r"seed: got 1180591620717411303424; expected an integer from 0 to 2\^63 - 1"):
        probes.shuffle_patches(2, seed=2**70)


def test_complex_images_are_refused():
    with pytest.raises(Refused, match=r"got complex numbers .*; expected images of real numbers"):
        probes.zoom(0.5)(torch.ones(1, 1, 8, 8, dtype=torch.complex64))


def test_characters_that_move_the_cursor_are_shown_as_their_escapes(tmp_path):
    rows = [json.dumps({"x": f"so \x1b[31m red \u202e and w{x}", "y": y}) for x, y in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = data.load(tmp_path / "a.jsonl", target="y")
    assert {"\\x1b", "\\u202e", "red"} <= set(found.vocabulary)
    assert all(word.isprintable() for word in found.vocabulary)
    assert found.sentence(found.x_train[0]).startswith("so \\x1b [ 31m red \\u202e and w")


def test_classes_in_the_test_set_alone_are_said():
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    names, y = ["a", "b", "c"], torch.tensor([0, 1, 0, 1, 0, 1])
    told = _unlearned(data.from_tensors((x[:6], y), (x[6:], torch.tensor([0, 2, 2, 1])), class_names=names))
    assert told.startswith("2 of 4 test examples are of classes without a training example (c): ")
    assert _unlearned(data.from_tensors((x[:6], y), (x[6:], torch.tensor([0, 1, 0, 1])), class_names=names)) == ""
    assert _unlearned(data.from_tensors((x[:6], x[:6, 0] ** 2), (x[6:], x[6:, 0] ** 2))) == ""
