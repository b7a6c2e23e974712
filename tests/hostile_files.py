"""Files made to harm: each maker writes one below a folder and returns what opens it. Numbers are drawn from `rng`.

Long because of the number of file formats.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.lib import format as npy

from ntkit.data import load
from ntkit.trajectory import load_weights

MARK = "executed"  # a file that code of a hostile file would make
Maker = Callable[[Random, Path], Callable[[], object]]
REFUSED: dict[str, Maker] = {}  # none of these can be opened
EITHER: dict[str, Maker] = {}  # damaged at random: refused, or opened with values that obey the rules


def refused(maker: Maker) -> Maker:
    REFUSED[maker.__name__] = maker
    return maker


def either(maker: Maker) -> Maker:
    EITHER[maker.__name__] = maker
    return maker


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def flipped(rng: Random, content: bytes) -> bytes:
    """Content with a few bytes changed, cut, doubled or moved."""
    blob = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(blob))
        how = rng.randrange(4)
        if how == 0:
            blob[at] = rng.randrange(256)
        elif how == 1:
            blob[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        elif how == 2:
            del blob[at : at + rng.randint(1, 9)]
        else:
            blob[at:at] = blob[at : at + rng.randint(1, 99)]
    return bytes(blob)


# --- npz ---

X, Y = np.linspace(0, 1, 60).reshape(20, 3), np.arange(20) % 2


def npz(compressed=False, **arrays) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def opened(tmp: Path, blob: bytes) -> Callable[[], object]:
    path = write(tmp / "a.npz", blob)
    return lambda: load(path)


def header(text: str, version=(1, 0)) -> bytes:
    body = text.encode("latin-1") + b"\n"
    return npy.magic(*version) + len(body).to_bytes(2 if version == (1, 0) else 4, "little") + body


def zipped(members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def array_bytes(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@cache
def deflated(n: int) -> tuple[bytes, int, int]:
    """An array of zeros as a member of a zip file: its bytes, checksum and size."""
    array = header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({n // 10000}, 100, 100), }}") + bytes(n)
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
    return squeeze.compress(array) + squeeze.flush(), zlib.crc32(array), len(array)


@cache
def zeros(n: int) -> bytes:
    return zlib.compress(bytes(n), 1)


@refused
def npz_bomb(rng, tmp):
    n = rng.randint(280, 320) * 10**6
    with zipfile.ZipFile(tmp / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w") as member:
            member.write(header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({n // 10000}, 100, 100), }}"))
            for _ in range(n // 10**6):
                member.write(bytes(10**6))
        archive.writestr("y.npy", array_bytes(np.zeros(n // 10000, np.uint8)))
    return lambda: load(tmp / "a.npz")


@refused
def npz_size_is_a_lie(rng, tmp):
    """The table of contents and the header claim far more than is stored, or less."""
    claim = rng.choice([10**4, 10**9, 10**12, 7])
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({claim}, 3), }}"
    blob = bytearray(zipped({"x.npy": header(text) + X.tobytes(), "y.npy": array_bytes(Y)}))
    at = blob.index(b"PK\x01\x02")
    if rng.random() < 0.5:
        blob[at + 24 : at + 28] = struct.pack("<I", min(24 * claim + len(header(text)), 2**32 - 2))
    return opened(tmp, bytes(blob))


@refused
def npz_header_is_absurd(rng, tmp):
    shape = rng.choice(
        ["(-1, 3)", "20", "(20.0, 3)", "(True, 3)", "('a',)", "(20, 3", "(" * 5000, "-" * 9000 + "1", "[20, 3]",
         "(0, 10**18)", "(0, 1000000000000000000)", "(2**62, 2**62)", "(4611686018427387904, 4)", "None", "(1,) * 40",
         "(" + "1, " * 70 + ")", "{}", "__import__('os').system('touch executed')"]
    )  # fmt: skip
    descr = rng.choice(["'<f8'", "'<f8'", "'|O'", "'|S0'", "'<U400000000'", "[('a', '<f8')]", "'|V8'", "'M8[s]'", "7"])
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    version = rng.choice([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)])
    return opened(tmp, zipped({"x.npy": header(text, version) + X.tobytes(), "y.npy": array_bytes(Y)}))


@refused
def npz_of_objects(rng, tmp):
    evil = np.array([Reduced(os.mkdir, str(tmp / MARK))] * 20, dtype=object)
    return opened(tmp, npz(x=X, y=evil) if rng.random() < 0.5 else npz(x=evil[:, None], y=Y))


@refused
def npz_methods(rng, tmp):
    method = rng.choice([zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    blob = bytearray(zipped({"x.npy": array_bytes(X), "y.npy": array_bytes(Y)}, method))
    if rng.random() < 0.5:  # a method that nobody knows
        at = blob.index(b"PK\x01\x02")
        blob[at + 10 : at + 12] = struct.pack("<H", rng.randint(20, 98))
    return opened(tmp, bytes(blob))


@refused
def npz_encrypted(rng, tmp):
    blob = bytearray(npz(x=X, y=Y))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        blob[blob.index(mark) + place] |= 1
    return opened(tmp, bytes(blob))


@refused
def npz_entries_overlap(rng, tmp):
    """Every entry of the table of contents is the same stretch of the file, as in the best bombs."""
    data, crc, size = deflated(280_000_000)
    names = ["x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"]
    sizes = struct.pack("<III", crc, len(data), size)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes + struct.pack("<HH", 11, 0) + b"x_train.npy"
    directory = b"".join(
        b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name.encode() for name in names
    )  # fmt: skip
    body = local + data
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 4, 4, len(directory), len(body), 0)
    return opened(tmp, body + directory + end)


@refused
def npz_table_of_contents_is_huge(rng, tmp):
    members = {f"{'m' * 60}{i}.npy": b"" for i in range(rng.randint(38_000, 40_000))}
    return opened(tmp, zipped(members | {"x.npy": array_bytes(X), "y.npy": array_bytes(Y)}, zipfile.ZIP_STORED))


@refused
def npz_without_its_arrays(rng, tmp):
    names = rng.choice([("x.npy",), ("x", "y"), ("../x.npy", "y.npy"), ("Z.npy", "y.npy"), ("a\nb\x1b[2J.npy",), ()])
    return opened(tmp, zipped({name: array_bytes(X) for name in names}))


@refused
def npz_values(rng, tmp):
    n = len(Y)
    wrong = rng.choice([
        {"x": X + np.inf, "y": Y}, {"x": X * np.nan, "y": Y}, {"x": X[:0], "y": Y[:0]}, {"x": X, "y": Y * 1.0},
        {"x": X, "y": Y + 0j}, {"x": X, "y": Y[:-1]}, {"x": X > 0, "y": Y}, {"x": X + 0j, "y": Y},
        {"x": X, "y": np.full(n, "a\x1b[2J")}, {"x": X, "y": np.array(["a", ""])[Y]},
        {"x": np.array(1.0), "y": Y}, {"x": X, "y": np.array(1)}, {"x": X.astype("U5"), "y": Y},
        {"x": X, "y": np.array([b"a", b"\xff"])[Y]}, {"x": np.zeros(n, [("a", float)]), "y": Y},
        {"x": X, "y": np.where(Y, np.nan, X[:, 0])}, {"x": X, "y": np.ones((n, 3), int)},
        {"x": X, "y": Y.astype(np.uint64) + 2**63}, {"x": X[:1], "y": Y[:1]}, {"x": X, "y": np.arange(n)},
        {"x_train": X, "y_train": Y, "x_test": X[:, :2], "y_test": Y}, {"x": X.astype("M8[s]"), "y": Y},
        {"x_train": X, "y_train": Y, "x_test": X.astype(np.uint8), "y_test": Y}, {"x": X.astype(np.uint16), "y": Y},
        {"x": X.astype(np.longdouble), "y": Y}, {"x": np.zeros((n, 4, 4, 5), np.uint8), "y": Y},
    ])  # fmt: skip
    return opened(tmp, npz(rng.random() < 0.5, **wrong))


@either
def npz_flipped(rng, tmp):
    return opened(tmp, flipped(rng, npz(rng.random() < 0.5, x=X, y=Y)))


# --- CSV ---

ROWS = b"a,b,c\n" + b"".join(b"%d,%s,%f\n" % (i, b"xyz"[i % 3 : i % 3 + 1], i / 7) for i in range(20))


def table(tmp: Path, content: bytes) -> Callable[[], object]:
    path = write(tmp / "a.csv", content)
    return lambda: load(path, target="c")


@refused
def csv_values(rng, tmp):
    return table(tmp, rng.choice([
        b"", b"\0" * 999, b"a,b,c\n", b"a,b,c\n1,2\n" * 9, ROWS.replace(b"a,", b"a\x1b[2J,"), ROWS + b'1,x,"2\n',
        ROWS.replace(b"3,", b",", 1), ROWS + b"1e999,x,2\n", ROWS + b"1,x,nan\n", ROWS + b"1,\xff,2\n",
        b"c,c\n1,2\n3,4.5\n", b"c\n1.5\n2.5\n3\n", ROWS + b"1,x,2\n".replace(b"x", b"y" * 200_000),
        b"a,c\n" + b"".join(b"t%d,%f\n" % (i, i / 7) for i in range(99)), ROWS.replace(b"\n", b"\n,", 3),
        b"<!doctype html>" + ROWS, ROWS.decode().encode("utf-16"), ROWS + b"1,x\x1b[2J,--\n",
    ]))  # fmt: skip


@either
def csv_flipped(rng, tmp):
    return table(tmp, flipped(rng, ROWS))


# --- idx, gzip ---


def mnist(tmp: Path, n=20) -> dict[str, bytes]:
    found = {}
    for part in ("train", "t10k"):
        images, labels = np.arange(n * 12) % 256, np.arange(n) % 10
        found[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 2051, n, 3, 4) + images.astype(np.uint8).tobytes()
        found[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 2049, n) + labels.astype(np.uint8).tobytes()
    for name, blob in found.items():
        write(tmp / name, blob)
    return found


def with_idx(tmp: Path, change: Callable[[bytes], bytes], name="train-images-idx3-ubyte") -> Callable[[], object]:
    write(tmp / name, change(mnist(tmp)[name]))
    return lambda: load("mnist", data_dir=tmp)


@refused
def idx_header_is_absurd(rng, tmp):
    sizes = [rng.choice([0, 1, 2**32 - 1, 2**31, 65536, 20]) for _ in range(3)]
    sizes[rng.randrange(3)] = rng.choice([2**32 - 1, 2**32 - 9, 0])
    packed = rng.random() < 0.5

    def change(blob):
        out = struct.pack(">IIII", 2051, *sizes) + blob[16:]
        return gzip.compress(out) if packed else out

    return with_idx(tmp, change)


@refused
def gz_bomb(rng, tmp):
    """Behind a small header or a fitting one, as one member or as hundreds."""
    n = rng.choice([20, 600_000, 1_200_000])
    member = gzip.compress(bytes(10**7))
    start = gzip.compress(struct.pack(">IIII", 2051, n, 28, 28))
    return with_idx(tmp, lambda blob: start + member * 94)


@refused
def gz_of_tiny_members(rng, tmp):
    return with_idx(tmp, lambda blob: gzip.compress(blob[:40]) + gzip.compress(b"") * rng.randint(20_000, 60_000))


@refused
def gz_is_cut(rng, tmp):
    return with_idx(tmp, lambda blob: gzip.compress(blob)[: -rng.randint(1, 30)])


@refused
def idx_with_more_behind(rng, tmp):
    extra = bytes(rng.randint(1, 9))
    return with_idx(tmp, lambda b: b + extra if rng.random() < 0.5 else gzip.compress(b) + gzip.compress(extra))


@refused
def idx_sparse(rng, tmp):
    """A file of a terabyte that takes no room on the disk."""
    mnist(tmp)
    name = rng.choice(["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
    head = struct.pack(">IIII", 2051, 2**20, 2**10, 2**10) if "images" in name else struct.pack(">II", 2049, 2**32 - 1)
    with open(tmp / name, "wb") as handle:
        handle.write(head)
        handle.truncate(2**40 + len(head))
    return lambda: load("mnist", data_dir=tmp)


@either
def idx_flipped(rng, tmp):
    packed = rng.random() < 0.5
    return with_idx(tmp, lambda blob: flipped(rng, gzip.compress(blob) if packed else blob))


# --- CIFAR-10 ---


class Reduced:
    def __init__(self, call, *arguments):
        self.made = (call, arguments)

    def __reduce__(self):
        return self.made


def cifar(tmp: Path, blob: bytes) -> Callable[[], object]:
    good = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}, protocol=4)
    for name in [f"data_batch_{i}" for i in range(2, 6)] + ["test_batch"]:
        write(tmp / name, good)
    write(tmp / "data_batch_1", blob)
    return lambda: load("cifar10", data_dir=tmp)


def laughs(kind: bytes, depth: int, last: bytes) -> bytes:
    """Nested pairs, each of the one before twice: 2 ** depth values when printed, copied or hashed."""
    level = b"".join(b"q" + bytes([i]) + b"0h" + bytes([i]) + b"h" + bytes([i]) + kind for i in range(depth))
    return b"\x80\x02}K\x01" + level + last


@refused
def pickle_runs_code(rng, tmp):
    mark = str(tmp / MARK)
    call = rng.choice([(os.mkdir, mark), (os.system, f"mkdir {mark}"), (eval, f"__import__('os').mkdir({mark!r})")])
    return cifar(tmp, pickle.dumps({b"data": Reduced(*call)}, protocol=rng.randint(0, 5)))


@refused
def pickle_takes_memory(rng, tmp):
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6
    encode = b"c_codecs\nencode\n"
    return cifar(tmp, rng.choice([
        b"\x80\x04}r\xff\xff\xff\x3f.",  # a memo of a billion places
        b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b".",  # a bytearray
        b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b".",  # bytes
        b"\x80\x02" + encode + b"q\x01" + text + b"q\x02" + b"0h\x01h\x02X\x06\x00\x00\x00latin1\x86R" * 5000 + b".",
        b"\x80\x02" + b"N" * 20_000_000 + b".",
        b"\x80\x02" + b"(" * 3_000_000 + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    ]))  # fmt: skip


@refused
def pickle_takes_for_ever(rng, tmp):
    return cifar(tmp, rng.choice([
        laughs(b"\x86", 200, b"Ns."),  # a key that is hashed
        laughs(b"\x86", 200, b"q\xff0X\x04\x00\x00\x00dataq\xfe0h\xfeh\xffs."),
        b"\x80\x02cnumpy\ndtype\n" + laughs(b"\x86", 200, b"\x85R.")[2:],  # a name that is printed
        b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b".",
        b"I" + b"9" * 10**6 + b"\n.",
        b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b".",
    ]))  # fmt: skip


@either
def pickle_flipped(rng, tmp):
    data = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2], b"filenames": [b"a", b"b"]}
    blob = pickle.dumps(data, protocol=rng.choice([2, 4]))
    return cifar(tmp, flipped(rng, blob[:300]) + blob[300:] if rng.random() < 0.5 else flipped(rng, blob))


# --- images ---


def png(width=5, height=4, mode="L") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def folder_of_images(tmp: Path, name="4.png", blob: bytes | None = None) -> Callable[[], object]:
    for label in ("ant", "bee"):
        for i in range(4):
            write(tmp / "set" / label / f"{i}.png", png())
    if blob is not None:
        write(tmp / "set" / "bee" / name, blob)
    return lambda: load(tmp / "set")


@refused
def image_bomb(rng, tmp):
    """A picture of 0.5 to 4e9 million pixels in a few hundred bytes, alone or among small ones."""
    width, height = rng.choice([(8000, 8000), (13000, 13000), (20000, 20000), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1)])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    blob = start + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    call = folder_of_images(tmp, "4.png", blob)
    if rng.random() < 0.5:
        for path in (tmp / "set").rglob("*.png"):
            path.write_bytes(blob)
    return call


@refused
def image_text_bomb(rng, tmp):
    text = b"comment\0\0" + zeros(10**8)
    blob = png()
    return folder_of_images(tmp, "4.png", blob[:33] + chunk(b"zTXt", text) + blob[33:])


@refused
def image_of_another_kind(rng, tmp):
    from PIL import Image

    kind = rng.randrange(8)
    buffer = io.BytesIO()
    if kind == 0:
        frames = [Image.new("L", (5, 4), i) for i in range(3)]
        frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    elif kind == 1:
        Image.new("CMYK", (5, 4)).save(buffer, "JPEG")
    elif kind == 2:
        Image.new(rng.choice(["P", "1", "I;16", "RGBA", "LA"]), (5, 4)).save(buffer, "PNG")
    elif kind == 3:
        Image.new("L", (5, 4)).save(buffer, rng.choice(["GIF", "BMP", "TIFF", "EPS", "PDF", "PPM"]))
    else:
        buffer.write(rng.choice([b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"GIF89a", png()[:40], b"\0" * 99]))
    name = rng.choice(["4.png", "4.jpg"]) if kind else "4.png"
    return folder_of_images(tmp, name, buffer.getvalue())


@either
def image_flipped(rng, tmp):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (5, 4), 7).save(buffer, rng.choice(["PNG", "JPEG"]))
    return folder_of_images(tmp, "4.png", flipped(rng, buffer.getvalue()))


@refused
def class_names(rng, tmp):
    call = folder_of_images(tmp)
    name = rng.choice([b"\xff\xfe", b"two\nlines", b"\x1b[2J", b"tab\t", b"caf\xe9", "\u202etxt".encode(), b"\x7f"])
    os.makedirs(os.fsencode(tmp) + b"/set/" + name)
    write(Path(os.fsdecode(os.fsencode(tmp) + b"/set/" + name + b"/1.png")), png())
    return call


@refused
def no_files(rng, tmp):
    """What is no file where a file is expected: as the data, as one file of it, behind a link."""
    place = tmp / rng.choice(["a.npz", "set/bee/4.png", "train-images-idx3-ubyte", "data_batch_1"])
    folder_of_images(tmp)
    kind = rng.randrange(6)
    call = {
        "a.npz": lambda: load(place),
        "4.png": lambda: load(tmp / "set"),
        "train-images-idx3-ubyte": lambda: load("mnist", data_dir=tmp),
        "data_batch_1": lambda: load("cifar10", data_dir=tmp),
    }[place.name]
    if place.name.startswith("train"):
        mnist(tmp)
        place.unlink()
    if place.name.startswith("data"):
        cifar(tmp, b"")
        place.unlink()
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        place.symlink_to(place)
    elif kind == 2:
        place.symlink_to(tmp / "nowhere")
    elif kind == 3:
        place.mkdir()
    else:
        place.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/tty", "/proc/self/mem"]))
    return call


@refused
def paths(rng, tmp):
    name = rng.choice(
        ["n" * 300, "n" * 300 + ".npz", "a\0b.npz", "a\0b", "~no-such-user/x.npz", "\udcff.npz", "a\n.npz"]
    )
    return lambda: load(str(tmp / name))


# --- weights ---


@refused
def weights_header(rng, tmp):
    weight = '{"weight":{"dtype":"F32","shape":%s,"data_offsets":[0,8]}'
    offsets = weight % "[1,2]" + ',"bias":{"dtype":"F32","shape":[1],"data_offsets":[%s]}}'
    text = rng.choice([
        offsets % "4,8", offsets % "0,4", offsets % "8,12000", offsets % "-1,3", offsets % "12,8", "[" * 10**5, "{}",
        '{"a":' * 10**4, '{"a":NaN}', "null", weight % "[4611686018427387904,4]" + "}",
        '{"weight":{"dtype":"X9","shape":[1,2],"data_offsets":[0,8]}}', '{"a":"' + "b" * 5 * 10**6 + '"}',
    ])  # fmt: skip
    length = rng.choice([len(text)] * 3 + [2**63, 10**8 + 1, 0])
    path = write(tmp / "w.safetensors", struct.pack("<Q", length) + text.encode() + bytes(12))
    return lambda: load_weights(torch.nn.Linear(2, 1), path)


@refused
def weights_that_are_a_pickle(rng, tmp):
    path = tmp / "w.safetensors"
    write(path, pickle.dumps(Reduced(os.mkdir, str(tmp / MARK)), protocol=rng.randint(0, 5)))
    return lambda: load_weights(torch.nn.Linear(2, 1), path)
