"""Tables, labels, images and loaders as people have them, from public reports: the right values, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from situations import Table
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ntkit.commands.option_file import with_options_of
from ntkit.data import from_dataset, from_tensors, load

SITUATIONS = Table()
AREA, CITY, PRICE = [10.5 * i for i in range(12)], ["Rome", "Oslo"] * 6, [float(i * i) for i in range(12)]
NAMES = ("area", "city", "price")


def lines(delimiter=",", names=NAMES, quote=lambda cell: cell, end="\n", rows=None) -> str:
    rows = zip(map(str, AREA), CITY, map(str, PRICE), strict=True) if rows is None else rows
    return "".join(delimiter.join(map(quote, row)) + end for row in (names, *rows))


def check(folder: Path, text: str, name: str = "t.csv") -> None:
    """The table of this text is the one of areas, cities and prices."""
    (folder / name).write_bytes(text.encode())
    data = load(folder / name, target="price")
    assert data.columns.names == ("area", "city Oslo", "city Rome")
    found = torch.cat([data.targets.in_units(data.y_train), data.targets.in_units(data.y_test)])[:, 0]
    order = found.round().long().sqrt().round().long()
    assert sorted(order.tolist()) == list(range(12))
    x = torch.cat([data.x_train, data.x_test]).double()
    area = x[:, 0] * data.columns.deviation[0] + data.columns.mean[0]
    assert torch.allclose(area, torch.tensor(AREA, dtype=torch.float64)[order], atol=1e-4)
    assert x[:, 2].tolist() == [1.0 - (int(i) % 2) for i in order]


def table(folder: Path, cells, name: str = "a", target=None) -> None:
    """Load a column of these cells beside a target."""
    text = f'"{name}",y\n' + "".join(f'"{cell}",{i / 3}\n' for i, cell in enumerate(cells))
    (folder / "t.csv").write_text(text)
    load(folder / "t.csv", target=target or "y")


# --- forms of tables ---


@SITUATIONS.of("mholt/PapaParse#951")
def a_first_line_that_names_the_separator(folder):
    check(folder, "sep=;\n" + lines(";"))
    check(folder, '"sep=;"\r\n' + lines(";", end="\r\n"))


@SITUATIONS.of("close2/csv#68")
def a_delimiter_at_the_end_of_every_line(folder):
    check(folder, lines(";", end=";\n"))


@SITUATIONS.of("biolab/orange3#7000")
def a_byte_order_mark(folder):
    check(folder, "\ufeff" + lines())


@SITUATIONS.of("AUTOMATIC1111/stable-diffusion-webui#15832")
def blanks_before_quotes(folder):
    check(folder, lines(", ", quote=lambda cell: f'"{cell}"'))


@SITUATIONS.of("UCL-CCS/EasyVVUQ#168")
def blanks_around_names(folder):
    check(folder, lines(" , "))


@SITUATIONS.of("Aternus/csv-to-xlsx#6")
def pipes_and_old_line_ends(folder):
    check(folder, lines("|"))
    check(folder, lines(end="\r"))


@SITUATIONS.of("SheetJS/sheetjs#2239")
def commas_inside_of_quoted_names(folder):
    rows = [("1", "2", f"{i}.5") for i in range(9)]
    (folder / "t.csv").write_text(lines(";", ('"a, in m, wide"', '"b, c"', "y"), rows=rows))
    assert load(folder / "t.csv", target="y").columns.names == ("a, in m, wide", "b, c")


@SITUATIONS.of("cogent3/cogent3#810")
def a_suffix_in_capitals(folder):
    check(folder, lines(), "T.CSV")


@SITUATIONS.of("pandas-dev/pandas#4623", "got a comment in line 1; .* Remove the lines before the names")
def comments_before_the_names(folder):
    check(folder, "# written on Monday\n" + lines())


@SITUATIONS.of("pytorch/tutorials#1708", "got numbers in line 1, such as 5.1; .*Put a line of names first")
def no_line_of_names(folder):
    (folder / "t.csv").write_text("".join(f"{5.1 + i},{3.5 - i},{i % 3}.5,{'ab'[i % 2]}\n" for i in range(12)))
    load(folder / "t.csv", target="a")


@SITUATIONS.of("pandas-dev/pandas#10646")
def names_that_are_positions_or_wavelengths(folder):
    for names in ("0,1,target", "2019,2020,y", "350.5,351,y"):
        (folder / "t.csv").write_text(names + "\n" + "".join(f"{i},{i * i},{i / 3}\n" for i in range(12)))
        assert load(folder / "t.csv", target=names.split(",")[2]).columns.names == tuple(names.split(",")[:2])


@SITUATIONS.of("pandas-dev/pandas#10646", "got column 'Unnamed: 0'; expected no row numbers of pandas. .*index=False")
def row_numbers_that_pandas_wrote_and_read(folder):
    table(folder, range(12), "Unnamed: 0")


@SITUATIONS.of("qri-io/qri#48", "got column 1 without a name; .*index=False")
def row_numbers_that_pandas_wrote(folder):
    table(folder, range(12), "")


# --- numbers in tables ---

WRITTEN = {
    "tidyverse/readr#799": [f"1,{i:03d}" for i in range(12)],
    "JuliaData/CSV.jl#957": [f"1.{i:03d},5" for i in range(12)],
    "im-anishraj/arnio#135": [f"1 {i:03d}" for i in range(12)],
    "h2oai/datatable#771": [f"({i})" for i in range(12)],
    "pandas-dev/pandas#53653": [f"${i}.50" for i in range(12)],
    "pandas-dev/pandas#55329": [f"{i}%" for i in range(12)],
    "biolab/orange3#3875": [f"28,{i}" for i in range(12)],
    "JuliaData/CSV.jl#1147": [f"{i} €" for i in range(12)],
}


@pytest.mark.parametrize("target", ["a", "y"])
@pytest.mark.parametrize("source", WRITTEN)
def test_numbers_that_are_not_written_plainly_are_no_categories(source, target, tmp_path):
    cells = WRITTEN[source]
    message = r"got '.*' in line \d+, column a; expected plain numbers. Write 1.5 and 1234 and -3"
    with pytest.raises(ValueError, match=message) as caught:
        table(tmp_path, cells, target=target)
    assert any(cell in str(caught.value) for cell in cells)


@SITUATIONS.of("rhiever/datacleaner#6")
def texts_with_digits_are_still_texts(folder):
    for cells in (["18-25", "26-40"], ["1st", "2nd"], ["A1", "B2"], ["10:30", "9:15"], [">50%", "<=50%"]):
        text = "a,y\n" + "".join(f"{cells[i % 2]},{i / 3}\n" for i in range(12))
        (folder / "t.csv").write_text(text)
        assert load(folder / "t.csv", target="y").columns.names == tuple(f"a {cell}" for cell in sorted(cells))


@SITUATIONS.of("JuliaData/CSV.jl#530", "got the missing value '#N/A' in line 4, column a")
def missing_values_of_a_spreadsheet_among_texts(folder):
    table(folder, ["x", "z", "#N/A", *"xzxzxzxzx"])


@SITUATIONS.of("biolab/orange3#3875", "got 12 different texts in column date, such as '2020-01-01', in 12 rows; ")
def dates_are_no_categories(folder):
    table(folder, [f"2020-01-{i + 1:02d}" for i in range(12)], "date")


@SITUATIONS.of("WillKoehrsen/feature-selector#45")
def whole_numbers_that_do_not_recur_are_no_labels(folder):
    (folder / "t.csv").write_text("a,y\n" + "".join(f"{i},{i * i}\n" for i in range(12)))
    data = load(folder / "t.csv", target="y")
    assert (data.classes, data.targets.names) == ((), ("y",))


@SITUATIONS.of("teableio/teable#1309")
def booleans_as_text(folder):
    text = "a,b,y\n" + "".join(f"{i},{i % 2 == 0},{'FALSE' if i % 3 else 'TRUE'}\n" for i in range(12))
    (folder / "t.csv").write_text(text)
    data = load(folder / "t.csv", target="y")
    assert (data.classes, data.columns.names) == (("FALSE", "TRUE"), ("a", "b False", "b True"))


@SITUATIONS.of("huggingface/diffusers#13559", r"t\.csv: got a pointer of Git LFS, not the file itself; .*git lfs pull")
def a_pointer_in_place_of_a_table(folder):
    check(folder, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@SITUATIONS.of("hukkin/tomli#304")
def options_in_a_file_with_a_byte_order_mark(folder):
    (folder / "o.toml").write_bytes("\ufefflr = 0.1\n".encode())
    assert with_options_of(folder / "o.toml", []) == ["--lr", "0.1"]


# --- labels ---

X = np.arange(36.0).reshape(12, 3)
CLASS = np.arange(12) % 3


def labels(y, **more):
    return from_tensors((X, y), (X, y), **more)


@SITUATIONS.of("skorch-dev/skorch#502")
def labels_in_a_column(folder):
    assert labels(CLASS[:, None]).y_train.tolist() == CLASS.tolist()


@SITUATIONS.of("microsoft/responsible-ai-toolbox#2127", "floats that are 3 different whole numbers, 0 to 2; .*say task")
def whole_numbers_as_floats_that_may_be_labels(folder):
    assert labels(CLASS + 0.0, task="classification").classes == ("0", "1", "2")
    assert labels(CLASS + 0.0, task="regression").outputs == 1
    assert labels(np.arange(12.0)).outputs == 1  # each once: numbers
    labels(CLASS[:, None] + 0.0)


@SITUATIONS.of("skorch-dev/skorch#130", "rows of 0 and 1, of which some have several 1 or none; ")
def several_labels_per_example(folder):
    labels(np.array([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]] * 4))


@SITUATIONS.of("scikit-learn/scikit-learn#12018", "got the missing label 'nan' in row 1; ")
def missing_labels_made_text(folder):
    labels(np.array(["a", "nan", "b"])[CLASS])


@SITUATIONS.of("scikit-learn/scikit-learn#22628", "got nan in row 0; .*Repair or remove these rows")
def a_label_that_is_no_number(folder):
    labels(np.where(CLASS == 0, np.nan, CLASS), task="classification")


@SITUATIONS.of("apple/turicreate#1531", "got label ' a' beside 'a'; ")
def labels_that_differ_in_blanks(folder):
    labels(np.array(["a", " a", "b"])[CLASS])


@SITUATIONS.of("pytorch/pytorch#15666")
def labels_from_one(folder):
    data = labels(CLASS + 1)
    assert (data.classes, data.y_train.tolist()) == (("1", "2", "3"), CLASS.tolist())


@SITUATIONS.of("shoarora/transformers-trainers#12", "got a token number below 0 in row 0; ")
def negative_integers_are_no_tokens(folder):
    from_tensors(((X - 3).astype(int), CLASS))


@SITUATIONS.of("kentsommer/pytorch-value-iteration-networks#9", "got keys arr_0, arr_1; .*Use these names in numpy.s")
def arrays_without_names(folder):
    np.savez(folder / "a.npz", X, CLASS)
    load(folder / "a.npz")


# --- images ---


def images(folder: Path, *classes: str, each: int = 5, mode: str = "RGB") -> None:
    for seed, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.random.default_rng(100 * seed + i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")


@SITUATIONS.of("pytorch/vision#109")
def files_of_the_system_among_the_images(folder):
    images(folder, "red ant", "模型")
    expected = load(folder).hash
    for name in (".DS_Store", "red ant/.DS_Store", "red ant/Thumbs.db", "模型/desktop.ini"):
        (folder / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
    data = load(folder)
    assert (data.hash, data.classes) == (expected, ("red ant", "模型"))


@SITUATIONS.of("huggingface/datasets#4839")
def a_folder_val_in_place_of_test(folder):
    images(folder, "train/ant", "train/bee", each=4)
    images(folder, "val/ant", "val/bee", each=2)
    data = load(folder)
    assert (len(data.y_train), len(data.y_test), data.classes) == (8, 4, ("ant", "bee"))
    assert "train/CLASS and val/CLASS" in data.source


@SITUATIONS.of("roboflow/roboflow-python#153")
def three_sets_of_which_one_is_left_out(folder):
    images(folder, "train/ant", "train/bee", "valid/ant", "valid/bee")
    images(folder, "test/ant", "test/bee", each=2)
    data = load(folder)
    assert len(data.y_test) == 4
    assert "valid left out" in data.source


@SITUATIONS.of("pytorch/vision#2831", "got a folder in a class folder; .*Name the folder that holds CLASS/")
def a_folder_too_high(folder):
    images(folder, "images/ant", "images/bee")
    load(folder)


@SITUATIONS.of("ultralytics/yolov5#405")
def photographs_with_an_orientation(folder):
    images(folder, "ant", "bee")
    image = Image.open(folder / "ant" / "0.png")
    exif = image.getexif()
    exif[274] = 6
    image.save(folder / "ant" / "9.jpg", exif=exif)
    assert "; 1 with an EXIF orientation, which is not applied" in load(folder).source


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("P", "tensorflow/tensorflow#28256"),
        ("RGBA", "tensorflow/tensorflow#62907"),
        ("LA", "lucidrains/stylegan2-pytorch#108"),
        ("L", "carpedm20/DCGAN-tensorflow#210"),
        ("I;16", "pytorch/vision#8188"),
    ],
)
def test_images_of_mixed_modes_are_refused_by_name(mode, source, tmp_path):
    images(tmp_path, "ant", "bee")
    pixels = np.zeros((6, 6), np.uint16 if mode == "I;16" else np.uint8)
    (Image.fromarray(pixels) if mode == "I;16" else Image.new(mode, (6, 6))).save(tmp_path / "bee" / "9.png")
    with pytest.raises(ValueError, match=rf"bee/9\.png: got .*{mode}; expected .*RGB.* mode|Convert all images"):
        load(tmp_path)


@SITUATIONS.of("pytorch/vision#138", r"0\.png: got an image that cannot be read \(.*\); expected an intact")
def a_truncated_image(folder):
    images(folder, "ant", "bee")
    file = folder / "ant" / "0.png"
    file.write_bytes(file.read_bytes()[:60])
    load(folder)


@SITUATIONS.of("ymy-k/DPText-DETR#1", r"0\.png: got a file that cannot be read as PNG or JPEG, whatever its name")
def another_format_under_the_name_of_png(folder):
    images(folder, "ant", "bee")
    Image.new("RGB", (6, 6)).save(folder / "ant" / "0.png", format="GIF")
    load(folder)


# --- datasets and loaders ---


class Named(TensorDataset):
    classes = ("cat", "dog")


PAIRS = Named(torch.tensor(X), torch.arange(12) % 2)


@SITUATIONS.of("pytorch/pytorch#149272")
def parts_and_joins_keep_the_names_of_classes(folder):
    part = Subset(PAIRS, range(11))
    for dataset in (part, Subset(part, range(10)), ConcatDataset([PAIRS, part])):
        assert from_dataset(dataset).classes == ("cat", "dog")
    assert from_dataset(Subset(PAIRS, range(0, 12, 2))).classes == ("cat", "dog")  # no example of a dog


LOADERS = {
    "pytorch/pytorch#9171": lambda: DataLoader(PAIRS, 4, sampler=WeightedRandomSampler([1.0] * 12, 12)),
    "kevinzakka/recurrent-visual-attention#18": lambda: DataLoader(PAIRS, 4, sampler=SubsetRandomSampler(range(8))),
    "OML-Team/open-metric-learning#140": lambda: DataLoader(
        PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), 4, False)
    ),
    "NVlabs/VILA#123": lambda: DataLoader(PAIRS, 5, drop_last=True),
}


@pytest.mark.parametrize("source", LOADERS)
def test_loaders_that_draw_shuffle_or_drop_samples_are_refused(source):
    with pytest.raises(ValueError, match=r"Sampler; expected the samples in the order|drops samples; expected all"):
        from_dataset(LOADERS[source]())
    assert from_dataset(DataLoader(PAIRS, 6, drop_last=True)).hash == from_dataset(PAIRS).hash  # it drops none


class Stream(IterableDataset):
    def __iter__(self):
        return ((PAIRS[i][0], PAIRS[i][1]) for i in range(12))


@SITUATIONS.of("huggingface/transformers#36501")
def a_loader_of_a_stream(folder):
    assert torch.equal(from_dataset(DataLoader(Stream(), 4)).x_train, from_dataset(PAIRS).x_train)


@SITUATIONS.of("huggingface/transformers#8087", "got Stream, a stream; expected a map-style dataset. Pass a DataLoader")
def a_stream_with_a_length(folder):
    Stream.__len__ = lambda self: 12
    try:
        from_dataset(Stream())
    finally:
        del Stream.__len__


@SITUATIONS.of("pytorch/pytorch#58903", "Pictures, index 0: got a dict; expected a pair")
def items_that_are_dicts(folder):
    class Pictures(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int):
            return {"image": PAIRS[i][0], "label": 0}

    from_dataset(Pictures())


@SITUATIONS.parametrized()
def test_situations(situation, tmp_path):
    situation.check(tmp_path)
