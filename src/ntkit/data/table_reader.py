"""Tables: CSV, lines of JSON, and Parquet where pyarrow is installed; a column is predicted from the others."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkit.base.checks import check_name, nearest, printable, refusal
from ntkit.base.memory import check_room
from ntkit.base.numbers import few_enough_for_labels
from ntkit.data.readers import Files, open_data, read_whole
from ntkit.data.text_reader import running_text

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = ",;\t|"
_MISSING = {"", "na", "n/a", "nan", "-nan", "null", "?", "#n/a", "#na", "<na>", "#n/a n/a", "1.#qnan", "-1.#ind"}
# numbers as people write them: with a currency, grouped by thousands, with a decimal comma, in percent, (1) for -1
_WRITTEN = re.compile(r"[-+(]?\s?[$€£¥]?\s?\d{1,3}(?:[ ,.'\u2019\u00a0\u202f]?\d{3})*(?:[.,]\d+)?\s?[%$€£¥]?\)?")
_VALUES = 50  # different texts of a column that become indicators
_FEW = 5  # different texts that need not recur
_QUOTED = 80  # characters of a cell that a message quotes
_PER_BYTE = 40  # bytes of memory for each byte of a CSV file, while its cells are text


class _Column(NamedTuple):
    """A column: its name, its cells as text, and where a row is in the file."""

    name: str
    cells: list[str]
    place: Callable[[int], str]


def read_table(path: Path, target: Sequence[str] | None) -> Files:
    """Read a table with named columns; `target` are the columns to predict, the others are x.

    Columns of numbers come first and are marked as such (`Files.numeric`); a column of text becomes one indicator, 0
    or 1, per different value, in alphabetical order. A single column of more texts than that, most with a blank, is
    sentences: token numbers of its words. A single target of text, or of at most 20 distinct integers that occur twice
    on average, is labels; other targets are floats.

    Raises
    ------
    Refused
        With line and column: missing values, rows of another length, text among numbers, numbers that are not written
        plainly; columns of more than 50 different texts, or of others in most rows, beside others; row numbers of
        pandas; a first line of numbers; a target that is no column.
    """
    columns = {".parquet": _parquet, ".jsonl": _json_lines}.get(path.suffix.lower(), _csv)(path)
    names = [column.name for column in columns]
    for name in names:
        check_name(f"column of {path.name}", name, "Rename the column.")
        if re.fullmatch(r"Unnamed: \d+(\.\d+)*", name):
            fix = "Remove the column; pandas leaves it out with to_csv(..., index=False)."
            raise refusal(str(path), got=f"column {name!r}", expected="no row numbers of pandas", fix=fix)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise refusal(str(path), got=f"two columns {twice}", expected="different names", fix="Rename one.")
    chosen = _targets(path, names, target)
    by_name = dict(zip(names, columns, strict=True))
    y, targets = _predicted(path, [by_name[name] for name in chosen])
    others = [column for column in columns if column.name not in chosen]
    source = f"table {path.name}: {', '.join(chosen)} from {len(others)} column{'s' if len(others) > 1 else ''}"
    if len(others) == 1 and _numbers(path, others[0]) is None and _are_sentences(others[0].cells):
        x, vocabulary, cut = running_text(others[0].cells, str(path))
        return Files((x, y), None, None, f"{source} of text{cut}", vocabulary=vocabulary, targets=targets)
    numbers: list[np.ndarray] = []
    indicators: list[np.ndarray] = []
    names_of_x: list[str] = []
    names_of_texts: list[str] = []
    texts = 0
    for column in others:
        if (values := _numbers(path, column)) is not None:
            numbers.append(values)
            names_of_x.append(column.name)
        else:
            found = _indicators(path, column)
            indicators += found.values()
            names_of_texts += [f"{column.name} {printable(value)}" for value in found]
            texts += 1
    if not numbers and not indicators:
        fix = "Add a column, or predict fewer."
        raise refusal(str(path), got="no column beside the target", expected="columns to predict from", fix=fix)
    numeric = [True] * len(numbers) + [False] * len(indicators)
    x = np.stack([*numbers, *indicators], 1)
    if texts:
        source += f", {texts} of them text as {len(indicators)} indicators"
    return Files((x, y), None, None, source, targets=targets, numeric=numeric, columns=[*names_of_x, *names_of_texts])


def _targets(path: Path, names: list[str], target: Sequence[str] | None) -> list[str]:
    if target is None:
        got, expected = "none", f"the column of {path.name} to predict: {', '.join(names[:30])}"
        raise refusal("target (--target)", got=got, expected=expected, fix="Name it, e.g. --target " + names[-1] + ".")
    for name in target:
        if name not in names:
            expected = f"a column of {path.name}"
            raise refusal("target (--target)", got=repr(name), expected=expected, fix=nearest(name, names))
    return list(dict.fromkeys(target))


def _csv(path: Path) -> list[_Column]:
    """The columns of a CSV file; the delimiter is the comma, semicolon or tab that its first line has most of."""
    expected = "a table in UTF-8 with a first line of names"
    raw = read_whole(path, expected)
    check_room(str(path), _PER_BYTE * len(raw))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"bytes that are no UTF-8 in line {raw[: error.start].count(10) + 1:,}"
        raise refusal(str(path), got=got, expected=expected, fix="Save it as UTF-8.") from error
    skipped, delimiter = _delimiter(text)
    lines_of = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in lines_of:
            if (len(row) > 1 or any(map(str.strip, row))) and lines_of.line_num > skipped:  # no line of blanks alone
                rows.append([cell.strip() for cell in row])
                lines.append(lines_of.line_num)
    except csv.Error as error:
        got = f"line {lines_of.line_num:,} that cannot be read ({error})"
        raise refusal(str(path), got=got, expected=expected, fix="Correct the line.") from error
    if len(rows) < 2:
        raise refusal(str(path), got="no rows", expected=expected, fix="Name a table with a first line of names.")
    while len(rows[0]) > 1 and not any(row[-1] for row in rows) and len({len(row) for row in rows}) == 1:
        rows = [row[:-1] for row in rows]  # each line ends in a delimiter
    _check_rows(path, rows, lines)

    def place(row: int) -> str:
        return f"line {lines[row + 1]:,}"

    return [_Column(name, [row[i] for row in rows[1:]], place) for i, name in enumerate(rows[0])]


def _delimiter(text: str) -> tuple[int, str]:
    """Number of lines before the names (a line sep=; as spreadsheets write it), and the delimiter.

    That is the character of these that the line of names has most of, outside of quotes.
    """
    if told := re.match(r"\"?sep=([^\w\s\"]|\t)\"?[,;\t|]*(?=[\r\n])", text):
        return 1, told[1]
    first = re.search(r"[^\r\n]+", text)
    names = re.sub(r"\"[^\"]*\"", "", first[0] if first else "")
    return 0, max(_DELIMITERS, key=names.count)


def _check_rows(path: Path, rows: list[list[str]], lines: list[int]) -> None:
    """Refuse names that are none, and rows of another length."""
    names, expected = rows[0], "a table in UTF-8 with a first line of names"
    if names[0].startswith("#") and len(names) != len(rows[-1]):
        fix = "Remove the lines before the names."
        raise refusal(str(path), got=f"a comment in line {lines[0]:,}", expected=expected, fix=fix)
    if "" in names:
        got = f"column {names.index('') + 1} without a name"
        fix = "Name the column, or remove it; pandas leaves out its row numbers with index=False."
        raise refusal(str(path), got=got, expected=expected, fix=fix)
    if numbers := _numbers_in_place_of_names(names):
        got = f"numbers in line {lines[0]:,}, such as {numbers[0]}"
        raise refusal(str(path), got=got, expected=expected, fix="Put a line of names first.")
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if len(row) != len(names):
            got, fix = f"{len(row)} cell{'s' * (len(row) != 1)} in line {line:,}", "Correct the line."
            if len(names) == 1:
                fix = f"Separate cells by one of these: {' '.join(map(repr, _DELIMITERS))}."
            raise refusal(str(path), got=got, expected=f"{len(names)}, as in line {lines[0]:,}", fix=fix)


def _numbers_in_place_of_names(names: list[str]) -> list[str]:
    """Names that are numbers, where a row is in the place of names: those of years or wavelengths ascend."""
    found = [(name, value) for name in names if (value := _number(name)) is not None and math.isfinite(value)]
    values = [value for _, value in found]
    ascending = all(a < b for a, b in zip(values, values[1:], strict=False))
    if len(found) == 1:
        ascending = values[0].is_integer()
    return [] if ascending else [name for name, _ in found]


def _json_lines(path: Path) -> list[_Column]:
    """The columns of a file of JSON objects, one in a line, all with the keys of the first."""
    expected = "in each line a JSON object with the same keys; values are numbers, text or booleans"
    raw = read_whole(path, expected)
    check_room(str(path), _PER_BYTE * len(raw))
    cells: dict[str, list[str]] = {}
    lines: list[int] = []
    for line, content in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not content.strip():
            continue
        got, row = "", _Pairs()
        try:  # numbers as they are written: an integer of many digits is not made a float
            row = json.loads(content.decode(), parse_int=str, parse_float=str, object_pairs_hook=_Pairs)
            if isinstance(row, _Pairs):  # a half of a pair, as "\\ud800", is no text: no report can show it
                "".join(f"{key}{value}" for key, value in row).encode()
        except (ValueError, RecursionError) as error:
            got = f"line {line:,}, which cannot be read ({error})"
        if got or not isinstance(row, _Pairs):
            got = got or f"no object in line {line:,}"
        elif not row or len(row.keys) != len(set(row.keys)) or (cells and set(row.keys) != set(cells)):
            got = f"{'the keys ' if row else 'no key'}{', '.join(map(printable, row.keys))} in line {line:,}"
        elif nested := [key for key, value in row if isinstance(value, list)]:
            got = f"a list or an object in line {line:,}, key {printable(nested[0])}"
        if got:
            raise refusal(str(path), got=got, expected=expected, fix="Correct the line, or save the table as CSV.")
        for key, value in row:
            cells.setdefault(key, []).append("" if value is None else str(value).strip())
        lines.append(line)
    if not lines or "" in cells:
        raise refusal(str(path), got="no rows" if not lines else "an empty key", expected=expected, fix="Name columns.")
    return [_Column(name, values, lambda row: f"line {lines[row]:,}") for name, values in cells.items()]


class _Pairs(list[tuple[str, Any]]):
    """Keys and values of a JSON object, in their order."""

    @property
    def keys(self) -> list[str]:
        """The keys, a repeated one as often as it is there."""
        return [key for key, _ in self]


def _parquet(path: Path) -> list[_Column]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        got, fix = "a Parquet file, without the package pyarrow", "pip install pyarrow, or save the table as CSV."
        raise refusal(str(path), got=got, expected="pyarrow, which reads it", fix=fix) from error
    handle, stored = open_data(path, "a Parquet file")
    with handle:
        try:
            file: Any = parquet.ParquetFile(handle)
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            check_room(str(path), max(size, 64 * file.metadata.num_rows * file.metadata.num_columns), stored)
            table = file.read()
        except (OSError, ValueError, ArithmeticError, NotImplementedError) as error:
            got, fix = f"a file that cannot be read ({error})", "Write it again."
            raise refusal(str(path), got=got, expected="a Parquet file", fix=fix) from error
    if not table.num_rows:
        raise refusal(str(path), got="no rows", expected="a table", fix="Name a table with rows.")
    columns = []
    for place, name in enumerate(table.column_names):  # by place: two may have one name, which is refused later
        values = table.column(place).to_pylist()
        odd = next((v for v in values if v is not None and not isinstance(v, (bool, int, float, str))), None)
        if odd is not None:
            got, fix = f"column {name} of {type(odd).__name__}s", "Convert it, or remove it."
            raise refusal(str(path), got=got, expected="columns of numbers, text or booleans", fix=fix)
        cells = ["" if v is None else repr(v) if isinstance(v, float) else str(v) for v in values]
        columns.append(_Column(name, cells, lambda row: f"row {row:,}"))
    return columns


def _quoted(cell: str) -> str:
    """A cell in a message; of a long one its start."""
    return repr(cell if len(cell) <= _QUOTED else f"{cell[:_QUOTED]}…")


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _numbers(path: Path, column: _Column) -> np.ndarray | None:
    """The cells as numbers; None for a column of text. Missing values, and text among numbers, are refused."""
    for row, cell in enumerate(column.cells):
        if cell.lower() in _MISSING:
            got = (
                f"{f'the missing value {cell!r}' if cell else 'no value'} in {column.place(row)}, column {column.name}"
            )
            fix = "Fill it in, or remove the row or the column."
            raise refusal(str(path), got=got, expected="a value in each cell", fix=fix)
    values = [_number(cell) for cell in column.cells]
    known = [value for value in values if value is not None]
    if 2 * len(known) < len(values):
        written = [row for row, cell in enumerate(column.cells) if _number(cell) is None and _WRITTEN.fullmatch(cell)]
        if written and 2 * (len(known) + len(written)) > len(values):
            got = f"{_quoted(column.cells[written[0]])} in {column.place(written[0])}, column {column.name}"
            fix = "Write 1.5 and 1234 and -3, not 1,5 or 1,234 or (3), without units."
            raise refusal(str(path), got=got, expected="plain numbers", fix=fix)
        return None
    for row, value in enumerate(values):
        if value is None or not math.isfinite(value):
            got = f"{_quoted(column.cells[row])} in {column.place(row)}, column {column.name}"
            expected = "a finite number, as in most rows of the column"
            raise refusal(str(path), got=got, expected=expected, fix="Correct it, or remove the row.")
    return np.array(known)


def _recur(values: int, rows: int) -> bool:
    """Whether so many different texts in so many rows are categories."""
    return values <= _FEW or (values <= _VALUES and 2 * values <= rows)


def _are_sentences(cells: list[str]) -> bool:
    """Whether a column of text is sentences: no categories, and most values have a blank."""
    values = set(cells)
    return not _recur(len(values), len(cells)) and 2 * sum(" " in value for value in values) > len(values)


def _indicators(path: Path, column: _Column) -> dict[str, np.ndarray]:
    cells = np.array(column.cells)
    values = np.unique(cells)
    if not _recur(len(values), len(cells)):
        got = f"{len(values):,} different texts in column {column.name}, such as {_quoted(str(values[0]))}"
        got += f", in {len(cells):,} rows"
        fix = "Remove the column, or group its values; write dates as numbers."
        if _are_sentences(column.cells):
            fix = f"Sentences: keep {column.name} and the target alone in the table. Else: " + fix
        expected = f"numbers, or texts that recur, at most {_VALUES} different ones"
        raise refusal(str(path), got=got, expected=expected, fix=fix)
    return {str(value): (cells == value).astype(np.float64) for value in values}


def _predicted(path: Path, columns: list[_Column]) -> tuple[np.ndarray, list[str] | None]:
    """Labels [n] of one column, or numbers [n, outputs]; with their names."""
    values = [_numbers(path, column) for column in columns]
    names = [column.name for column in columns]
    if len(columns) == 1 and values[0] is None:
        return np.array(columns[0].cells), names
    for column, numbers in zip(columns, values, strict=True):
        if numbers is None:
            got = f"text in column {column.name}"
            raise refusal("target (--target)", got=got, expected="numbers in all targets", fix="Name one target.")
    y = np.stack([numbers for numbers in values if numbers is not None], 1)
    whole = (y == np.round(y)).all() and np.abs(y).max() < 2**53  # larger numbers are not exact
    if len(columns) == 1 and whole and few_enough_for_labels(len(np.unique(y)), len(y)):
        return y[:, 0].astype(np.int64), names
    return y, names
