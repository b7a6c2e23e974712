"""Files of data: MNIST, CIFAR-10, npz, folders of images equal what was written; damaged ones are refused by name.

Long because each format has its writer here, apart from the code under test.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import LABELS, ONES, numbers, same

from ntkit.base.checks import Refused
from ntkit.data import load

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HTML = b"  \n<!DOCTYPE html><html><body>Please sign in</body></html>"
RECORD = 3073


# --- making files, byte by byte, apart from the code under test ---


def idx_bytes(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder, sizes=(23, 11), end="", dot=False, zipped=False):
    rng = numbers()
    arrays = {}
    for part, n in zip(("train", "t10k"), sizes, strict=True):
        x, y = rng.integers(0, 256, (n, 5, 7)), np.arange(n) % 10
        for kind, array in (("images-idx3-ubyte", x), ("labels-idx1-ubyte", y)):
            name = f"{part}-{kind}".replace("-idx", ".idx") if dot else f"{part}-{kind}"
            blob = idx_bytes(array)
            (folder / (name + end)).write_bytes(gzip.compress(blob) if zipped else blob)
            arrays[f"{part}-{kind[:6]}"] = array
    return arrays


def cifar_arrays(sizes=(3, 2, 4, 2, 5, 7)):
    rng = numbers(1)
    return [(rng.integers(0, 256, (n, 3072), dtype=np.uint8), (np.arange(n) + i) % 10) for i, n in enumerate(sizes)]


def cifar_names(end=""):
    return [f"data_batch_{i}{end}" for i in range(1, 6)] + [f"test_batch{end}"]


def write_cifar_binary(folder):
    arrays = cifar_arrays()
    for name, (x, y) in zip(cifar_names(".bin"), arrays, strict=True):
        (folder / name).write_bytes(b"".join(bytes([label]) + row.tobytes() for row, label in zip(x, y, strict=True)))
    return arrays


def short_binstring(raw):
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + len(raw).to_bytes(4, "little") + raw


def python2_batch(x, labels):
    """Protocol 2 as Python 2 wrote it: byte strings as BINSTRING, numpy.core's _reconstruct."""
    shape = b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in x.shape) + b"t"
    dtype = b"cnumpy\ndtype\n(" + short_binstring(b"u1") + b"K\x00K\x01tR(K\x03" + short_binstring(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short_binstring(b"b") + b"tR"
    array += b"(K\x01" + shape + dtype + b"\x89" + short_binstring(x.tobytes()) + b"tb"
    values = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = short_binstring(b"data") + array + short_binstring(b"labels") + values
    return b"\x80\x02}(" + entries + short_binstring(b"batch_label") + short_binstring(b"batch") + b"u."


def write_cifar_python(folder, dump):
    arrays = cifar_arrays()
    for name, (x, y) in zip(cifar_names(), arrays, strict=True):
        (folder / name).write_bytes(dump(x, [int(label) for label in y]))
    return arrays


def write_images(folder, classes=("ant", "bee"), each=5, mode="L", size=(7, 5), suffix=".png"):
    from PIL import Image

    rng = numbers(2)
    arrays = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            shape = size[::-1] if mode == "L" else (*size[::-1], 3)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}{suffix}")
            arrays[name, i] = pixels
    return arrays


# --- MNIST ---


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files_under_every_name(tmp_path, end, dot, zipped):
    arrays = write_mnist(tmp_path, end=end, dot=dot, zipped=zipped)
    data = load("mnist", data_dir=str(tmp_path))
    same(data.x_train, arrays["train-images"][:, None])
    same(data.x_test, arrays["t10k-images"][:, None])
    assert data.y_train.tolist() == arrays["train-labels"].tolist()
    assert data.classes == tuple("0123456789")
    assert data.normalization == "pixels / 255, no centering"
    assert "train" in data.source
    assert str(tmp_path) not in data.source


def test_missing_mnist_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(Refused, match=r"got no t10k-labels-idx1-ubyte; expected the four MNIST files .*downloaded"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(Refused, match=r"absent: got no train-images-idx3-ubyte, train-labels"):
        load("mnist", data_dir=tmp_path / "absent")


TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TRAIN_X, lambda b: idx_bytes(np.zeros(23)), "magic number 2049 at byte 0, a file of labels; .*2051"),
        (TRAIN_Y, lambda b: idx_bytes(np.zeros((23, 5, 7))), "magic number 2051 at byte 0, a file of images; .*2049"),
        (TRAIN_X, lambda b: b"\0\0\x0d\x03" + b[4:], "magic number 3331 at byte 0; "),
        (TRAIN_X, lambda b: b[:-9], r"got 812 bytes \(cut short\); expected 821 bytes for 23 x 5 x 7 images"),
        (TRAIN_X, lambda b: b + b"ab", r"got 823 bytes \(2 trailing bytes from byte 821\)"),
        (TRAIN_X, lambda b: b[:10], "got 10 bytes; expected a header of 16 bytes"),
        (TRAIN_X, lambda b: b[:3], "got 3 bytes; expected a header"),
        (TRAIN_X, lambda b: b"\0\0\x08\x03" + b"\xff" * 12, "got 16 bytes .cut short"),
        (TRAIN_X, lambda b: b"", "an empty file"),
        (TRAIN_X, lambda b: HTML, "an HTML page"),
        (TRAIN_X, lambda b: gzip.compress(b)[:-20], "a gzip file cut short at byte"),
        (TRAIN_X, lambda b: gzip.compress(b)[:-8] + bytes(8), "gzip data that cannot be unpacked"),
        (TRAIN_X, lambda b: gzip.compress(b) + b"junk", "gzip data that cannot be unpacked, in the part from byte"),
        (TRAIN_Y, lambda b: idx_bytes(np.arange(22) % 10), "got 22 labels; expected 23, as many as train-images"),
        (TRAIN_Y, lambda b: b[:13] + b"\x0b" + b[14:], r"label 11 in row 5 \(byte 13\); expected labels 0 to 9"),
        ("t10k-images-idx3-ubyte", lambda b: idx_bytes(np.zeros((11, 5, 6))), r"test set: got examples \[1, 5, 6\]"),
    ],
)
def test_broken_idx_files_are_refused_by_name_and_byte(tmp_path, name, change, message):
    write_mnist(tmp_path)
    blob = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(blob))
    with pytest.raises(Refused, match=message) as caught:
        load("mnist", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert name in str(caught.value) or "test set" in message


def test_empty_idx_set_is_refused(tmp_path):
    write_mnist(tmp_path, sizes=(23, 0))
    with pytest.raises(Refused, match=r"test set, x: got an empty set"):
        load("mnist", data_dir=tmp_path)


def test_concatenated_gzip_members_are_one_file(tmp_path):
    arrays = write_mnist(tmp_path)
    blob = (tmp_path / TRAIN_X).read_bytes()
    (tmp_path / TRAIN_X).write_bytes(gzip.compress(blob[:100]) + gzip.compress(blob[100:]))
    same(load("mnist", data_dir=tmp_path).x_train, arrays["train-images"][:, None])


# --- CIFAR-10 ---


def check_cifar(data, arrays):
    x = np.concatenate([x for x, _ in arrays[:-1]]).reshape(-1, 3, 32, 32)
    same(data.x_train, x)
    same(data.x_test, arrays[-1][0].reshape(-1, 3, 32, 32))
    assert data.y_train.tolist() == np.concatenate([y for _, y in arrays[:-1]]).tolist()
    assert data.y_test.tolist() == arrays[-1][1].tolist()
    assert data.classes[3] == "cat"
    assert data.x_train.is_contiguous()


@pytest.mark.parametrize("sub", [".", "cifar-10-batches-bin"])
def test_cifar_binary(tmp_path, sub):
    (tmp_path / sub).mkdir(exist_ok=True)
    arrays = write_cifar_binary(tmp_path / sub)
    data = load("cifar10", data_dir=tmp_path)
    check_cifar(data, arrays)
    assert "data_batch_3.bin (4)" in data.source
    two = load("cifar10", data_dir=tmp_path, classes=("frog", 5))
    assert two.classes == ("frog", "dog")
    assert torch.equal(two.x_train[two.y_train == 1], data.x_train[data.y_train == 5])


@pytest.mark.parametrize("sub", [".", "cifar-10-batches-py"])
@pytest.mark.parametrize(
    "dump",
    [
        python2_batch,
        lambda x, y: pickle.dumps({b"data": x, b"labels": y, b"filenames": [b"a.png"]}, protocol=2),
        lambda x, y: pickle.dumps({"data": x, "labels": y}, protocol=4),
        lambda x, y: pickle.dumps({"data": np.asfortranarray(x), "labels": y}, protocol=4),
    ],
)
def test_cifar_python(tmp_path, sub, dump):
    (tmp_path / sub).mkdir(exist_ok=True)
    arrays = write_cifar_python(tmp_path / sub, dump)
    check_cifar(load("cifar10", data_dir=tmp_path), arrays)


def test_the_python2_fixture_is_what_pickle_reads():
    x = numbers().integers(0, 256, (2, 3072), dtype=np.uint8)
    read = pickle.loads(python2_batch(x, [4, 2]), encoding="bytes")
    assert read[b"labels"] == [4, 2]
    assert (read[b"data"] == x).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b[:-1],
            r"got 12,291 bytes: 3 complete records up to byte 9,219, then 3,072 bytes; expected a multiple",
        ),
        (lambda b: b[: 2 * RECORD] + b"\x0a" + b[2 * RECORD + 1 :], r"label 10 in row 2 \(byte 6,146\)"),
        (lambda b: HTML, "an HTML page"),
        (lambda b: b"", "an empty file"),
    ],
)
def test_broken_cifar_binary(tmp_path, change, message):
    write_cifar_binary(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Refused, match=f"data_batch_3.bin: .*{message}"):
        load("cifar10", data_dir=tmp_path)


def test_missing_cifar_files_are_named(tmp_path):
    with pytest.raises(Refused, match=r"got no CIFAR-10 files; expected data_batch_1.bin .* nothing is ever"):
        load("cifar10", data_dir=tmp_path)
    write_cifar_binary(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(Refused, match=r"got no data_batch_4.bin; expected"):
        load("cifar10", data_dir=tmp_path)


def batch(x, labels):
    return pickle.dumps({b"data": x, b"labels": labels}, protocol=4)


class Hostile:
    def __init__(self, call, *arguments):
        self.made = (call, arguments)

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, protocol):
    victim = tmp_path / "owned"
    blob = pickle.dumps({b"data": Hostile(os.mkdir, str(victim))}, protocol=protocol)
    write_cifar_python(tmp_path, lambda x, y: blob)
    with pytest.raises(Refused, match=r"data_batch_1: got a pickle that asks for (posix|nt).mkdir; .*executed"):
        load("cifar10", data_dir=tmp_path)
    assert not victim.exists()
    pickle.loads(blob)  # the same bytes do run where nothing is restricted
    assert victim.is_dir()


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (pickle.dumps({b"data": Hostile(eval, "1")}), "asks for (builtins|__builtin__).eval"),
        (b"cnumpy\nload\n.", "asks for numpy.load"),
        (b"cnumpy\ndtype.type\n.", "asks for numpy.dtype.type"),
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "asks for numpy.ndarray.__init__"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00base64tR.", "cannot be read .codec b?'base64'"),
        (b"\x82\x01.", "cannot be read"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]})[:-9],
            r"pickle of [\d,]+ bytes that",
        ),
        (HTML, "an HTML page"),
        (pickle.dumps([1, 2]), "no array under the key data"),
        (pickle.dumps({b"data": [1]}), "no array under the key data"),
        (batch(np.zeros((2, 3071), np.uint8), [1, 2]), r"data u1 of shape \(2, 3071\) and 2 labels; expected data u1"),
        (batch(np.zeros((2, 3072)), [1, 2]), r"data f8 of shape \(2, 3072\)"),
        (batch(np.zeros((2, 3072), np.uint8), None), r"shape \(2, 3072\) and 0 labels"),
        (batch(np.zeros((2, 3072), np.uint8), [1]), r"shape \(2, 3072\) and 1 labels"),
        (batch(np.zeros((2, 3072), np.uint8), [1, 2]).replace(b"M\x00\x0c", b"M\x00\x0d"), r"shape \(2, 3328\)"),
        (batch(np.array([[{}]]), [1]), r"data O8 of shape \(1, 1\)"),
        (batch(np.zeros((2, 3072), np.uint8), [1, 10]), "label 10 in row 1"),
        (batch(np.zeros((2, 3072), np.uint8), [1, True]), "label True in row 1"),
    ],
)
def test_broken_pickles(tmp_path, blob, message):
    write_cifar_python(tmp_path, python2_batch)
    (tmp_path / "test_batch").write_bytes(blob)
    with pytest.raises(Refused, match=f"test_batch: got .*{message}"):
        load("cifar10", data_dir=tmp_path)


# --- npz ---


def test_npz_of_images_vectors_and_tokens(tmp_path):
    rng, y, path = numbers(3), np.arange(12) % 3, tmp_path / "mine.npz"

    def through_file(x):
        np.savez(path, x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
        return load(str(path))

    pixels = rng.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
    data = through_file(pixels)
    same(data.x_train, pixels.transpose(0, 3, 1, 2))
    assert data.x_train.is_contiguous()
    assert (data.name, data.kind, data.classes) == ("mine", "images", ("0", "1", "2"))
    same(through_file(pixels[..., 0]).x_train, pixels[:, None, :, :, 0])
    same(through_file(pixels[..., :1]).x_test, pixels[:5, None, :, :, 0])
    same(through_file(pixels.transpose(0, 3, 1, 2)).x_train, pixels.transpose(0, 3, 1, 2))
    for shape, kind in (((12, 2, 5, 7), "images"), ((12, 4), "vectors"), ((12, 4, 3), "vectors")):
        values = rng.normal(size=shape)
        data = through_file(values.astype(">f8"))
        assert (data.kind, data.x_train.dtype) == (kind, torch.float32)
        assert torch.equal(data.x_train, torch.tensor(values, dtype=torch.float32))
        assert data.normalization == "values as given, no scaling or centering"
    for dtype in (np.int16, np.int32, np.int64):
        words = rng.integers(0, 900, (12, 6)).astype(dtype)
        data = through_file(words)
        assert (data.kind, data.x_train.dtype) == ("tokens", torch.int64)
        assert data.x_train.tolist() == words.tolist()


def test_npz_without_a_test_set_is_split_the_same_way_every_time(tmp_path):
    x, y = np.arange(50.0)[:, None], np.repeat([0, 1, 2], [30, 15, 5])
    np.savez(tmp_path / "a.npz", x=x, y=y)
    data = load(tmp_path / "a.npz", seed=1)
    assert data.hash == load(tmp_path / "a.npz", seed=2).hash
    assert data.y_train.bincount().tolist() == [24, 12, 4]
    assert data.y_test.bincount().tolist() == [6, 3, 1]
    train, test = data.x_train.flatten().tolist(), data.x_test.flatten().tolist()
    assert sorted(train + test) == list(range(50))
    assert train == sorted(train)
    assert [y[int(value)] for value in test] == data.y_test.tolist()
    assert test != list(range(24, 30)) + list(range(42, 45)) + [49]


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def odd_zip(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("y.npy", content)
    return buffer.getvalue()


CLAIM = b"{'descr': '<f8', 'fortran_order': False, 'shape': (9000000000000, 9), }"
HUGE = np.lib.format.magic(1, 0) + b"v\0" + CLAIM.ljust(117) + b"\n"
NAN = np.where(np.arange(12).reshape(6, 2) == 7, np.nan, 1.0)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"PK not really", "not a zip archive, or one cut short"),
        (pickle.dumps({"x": 1}), "not a zip archive"),
        (npz(x=ONES, y=LABELS)[:-30], "not a zip archive, or one cut short"),
        (npz(x=ONES, y=LABELS).replace(ONES.tobytes(), (2 * ONES).tobytes()), "x cannot be read .*CRC"),
        (npz(x=ONES, y=np.array([{}] * 6, dtype=object)), "y cannot be read .*Object arrays cannot be loaded"),
        (npz(x_train=ONES, y_train=LABELS, y=LABELS), "keys x_train, y, y_train; expected x_train, y_train, x_test"),
        (odd_zip(b"hello"), "cannot be read|not a numeric array"),
        (odd_zip(HUGE), "x cannot be read"),
        (HTML, "an HTML page"),
        (b"", "an empty file"),
        (npz(x=NAN, y=LABELS), "x: got nan in row 3 .1 such rows.; expected finite"),
        (npz(x=ONES * 1e300, y=LABELS), "x: got 1e.300 in row 0 .6 such rows.; expected values of at most 3.4e.38"),
        (npz(x=ONES, y=LABELS + 0.0), "y: got floats with two values only, 0 and 1"),
        (npz(x=ONES, y=ONES.astype(int)), "labels y: got int64 of shape .6, 2."),
        (npz(x=ONES, y=LABELS + 0j), "labels y: got complex128 of shape .6."),
        (npz(x=ONES, y=NAN), "targets y: got nan in row 3 .1 such rows.; expected finite"),
        (npz(x=ONES, y=ONES[:, 0]), "targets y: got y, which is 1 in every training example"),
        (npz(x=ONES, y=np.array(["a", "b", " ", "a", "b", "a"])), "labels y: got an empty label in row 2"),
        (npz(x=ONES, y=LABELS[:5]), "got 6 examples and 5 labels"),
        (npz(x=ONES[:0], y=LABELS[:0]), "empty set"),
        (npz(x=ONES[:, 0], y=LABELS), r"x: got shape \[6\]; expected \[n, ...\]"),
        (npz(x=np.array([["a"], ["b"]]), y=LABELS[:2]), "not a numeric array"),
        (npz(x=ONES.astype(np.uint8), y=LABELS), r"x: got torch.uint8 of shape \[6, 2\]; expected floats, uint8 im"),
        (npz(x=ONES + 0j, y=LABELS), "got torch.complex128"),
        (npz(x=np.ones((6, 5, 7, 4), np.uint8), y=LABELS), "expected 1 or 3 channels"),
        (npz(x=ONES[:2], y=LABELS[:2]), "2 examples, no class with two"),
        (npz(x=ONES[:1], y=ONES[:1, 0]), "got 1 example; expected enough for a test set"),
        (npz(x_train=ONES, y_train=LABELS, x_test=ONES[:, :1], y_test=LABELS), r"got examples \[1\] .*expected \[2\]"),
        (
            npz(x_train=ONES, y_train=LABELS, x_test=ONES, y_test=LABELS.astype(str)),
            "test set, labels y: got text; expected numbers, as in the training set",
        ),
        (npz(x_train=ONES, y_train=LABELS, x_test=NAN, y_test=LABELS), "test set, x: got nan in row 3"),
    ],
)
def test_broken_npz(tmp_path, blob, message):
    path = tmp_path / "broken.npz"
    path.write_bytes(blob)
    with pytest.raises(Refused, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_an_unreadable_file_and_folder_are_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    np.savez(tmp_path / "a.npz", x=ONES, y=LABELS)
    with monkeypatch.context() as patch:
        patch.setattr("os.open", denied)
        with pytest.raises(Refused, match=r"a.npz: got Permission denied"):
            load(tmp_path / "a.npz")
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(Refused, match=f"{tmp_path.name}: got Permission denied"):
        load(tmp_path)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("1,2")
    with pytest.raises(Refused, match=r"a.xlsx: got another kind of file"):
        load(tmp_path / "a.xlsx")
    with pytest.raises(Refused, match=r"none.npz: got no such file"):
        load(tmp_path / "none.npz")
    with pytest.raises(Refused, match=r"neither the name of a data set nor a file"):
        load(tmp_path / "nowhere")
    # a Path is a path, even where a data set has that name
    with pytest.raises(Refused, match=r"neither the name of a data set nor a file"):
        load(Path("mnist"))


# --- image folders ---


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_image_folder_with_a_split(tmp_path, mode, channels):
    train = write_images(tmp_path / "train", mode=mode)
    test = write_images(tmp_path / "test", mode=mode, each=2)
    (tmp_path / "train" / "ant" / ".hidden").write_text("ignored")
    data = load(tmp_path)
    assert data.classes == ("ant", "bee")
    assert data.input_shape == (channels, 5, 7)
    for x, arrays in ((data.x_train, train), (data.x_test, test)):
        pixels = np.stack([value for _, value in sorted(arrays.items())]).reshape(len(x), 5, 7, channels)
        same(x, pixels.transpose(0, 3, 1, 2))
    assert data.y_train.tolist() == [0] * 5 + [1] * 5
    assert load(tmp_path, classes=("bee", "ant")).y_test.tolist() == [1, 1, 0, 0]


def test_image_folder_is_split_80_20(tmp_path):
    write_images(tmp_path, classes=("a", "b", "c"), each=5, suffix=".jpeg", mode="RGB")
    data = load(str(tmp_path))
    assert data.y_train.bincount().tolist() == [4, 4, 4]
    assert data.y_test.bincount().tolist() == [1, 1, 1]


def break_image(path, what):
    from PIL import Image

    if what in ("RGBA", "P", "1", "I;16", "RGB"):
        Image.new(what, (7, 5)).save(path)
    elif what == "size":
        Image.new("L", (5, 7)).save(path)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:60])
    elif what == "gif":
        Image.new("L", (7, 5)).save(path, format="GIF")
    else:
        path.write_bytes(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("RGBA", "got mode RGBA; expected 8-bit gray"),
        ("P", "got mode P;"),
        ("1", "got mode 1;"),
        ("I;16", "got mode I(;16)?;"),
        ("RGB", "got 7 x 5 RGB; expected 7 x 5 L, as 0.png"),
        ("size", "got 5 x 7 L; expected 7 x 5 L"),
        ("cut", "cannot be read"),
        ("gif", "cannot be read"),
        (b"not an image", "cannot be read"),
        (HTML, "an HTML page"),
        (b"", "an empty file"),
    ],
)
def test_broken_images_are_named(tmp_path, what, message):
    write_images(tmp_path)
    break_image(tmp_path / "bee" / "3.png", what)
    with pytest.raises(Refused, match=f"3.png: got .*{message}|3.png: {message}") as caught:
        load(tmp_path)
    assert str(tmp_path / "bee" / "3.png") in str(caught.value)


def test_images_of_mixed_sizes_are_resized_and_their_centers_cut_out(tmp_path):
    """Pillow alone gives the pixels: the shorter side to 4 pixels, bilinear and antialiased, then the center."""
    from PIL import Image

    sizes = {"a": [(8, 8), (9, 4), (4, 10)], "b": [(16, 12), (5, 7), (2, 3)]}
    expected = []
    for name, own in sizes.items():
        (tmp_path / name).mkdir()
        for i, (width, height) in enumerate(own):
            pixels = numbers(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            short = min(width, height)
            size = round(4 * width / short), round(4 * height / short)
            resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
            top, left = (resized.shape[0] - 4) // 2, (resized.shape[1] - 4) // 2
            expected.append(resized[top : top + 4, left : left + 4].transpose(2, 0, 1))
    with pytest.raises(Refused, match=r"1.png: got 9 x 4 RGB; expected 8 x 8 RGB, as 0.png. Resize them: --resize 4 "):
        load(tmp_path)
    data = load(tmp_path, resize=4)
    assert data.input_shape == (3, 4, 4)
    assert data.classes == ("a", "b")
    assert "shorter side resized to 4 pixels (Pillow, bilinear, antialiased), then the center cut out" in data.source
    found = torch.cat([data.x_train, data.x_test]).mul(255).round().flatten(1).tolist()
    assert sorted(found) == sorted(image.flatten().tolist() for image in expected)


def test_resizing_an_image_of_the_size_asked_for_changes_nothing(tmp_path):
    write_images(tmp_path, size=(6, 6))
    assert load(tmp_path, resize=6).hash == load(tmp_path).hash


@pytest.mark.parametrize("size", [0, -3, True, 2.5, 5000])
def test_refused_sizes(tmp_path, size):
    write_images(tmp_path)
    with pytest.raises(Refused, match=r"resize .--resize.: got .*; expected a number of pixels from 1 to 4,096"):
        load(tmp_path, resize=size)


def test_odd_folders_are_refused(tmp_path):
    with pytest.raises(Refused, match="no class folders"):
        load(tmp_path)
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", classes=("ant",))
    with pytest.raises(Refused, match=r"class 'bee' in only one of train and test"):
        load(tmp_path)
    (tmp_path / "test" / "bee").mkdir()
    with pytest.raises(Refused, match=r"bee: got an empty class folder"):
        load(tmp_path)
    (tmp_path / "test" / "bee" / "notes.txt").write_text("x")
    with pytest.raises(Refused, match=r"notes.txt: got a file that is not .png"):
        load(tmp_path)


# --- the real files ---


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="no shared MNIST files")
def test_real_mnist_threes_and_eights():
    start = time.perf_counter()
    data = load("mnist", data_dir=SHARED / "mnist", classes=(3, 8))
    assert time.perf_counter() - start < 10
    assert (len(data.y_train), len(data.y_test), data.input_shape) == (11982, 1984, (1, 28, 28))
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)


@pytest.mark.skipif(not (SHARED / "cifar-10").is_dir(), reason="no shared CIFAR-10 files")
def test_real_cifar_two_and_dogs():
    data = load("cifar10", data_dir=SHARED / "cifar-10", classes=("cat", "dog"))
    assert (len(data.y_train), len(data.y_test), data.input_shape) == (10000, 2000, (3, 32, 32))
    assert data.y_train.bincount().tolist() == [5000, 5000]
    assert data.hash == load("cifar10", data_dir=SHARED / "cifar-10", classes=(3, "5")).hash
