"""The rows of docs/how-to/neural-tangents.md: what each line computes, by ntkit and by neural-tangents.

Run in neural-tangents' environment it writes that program's values: ``python -m benchmarks.peers.stax_rows FILE.npz``.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "neural-tangents.md"
W, B = 1.2, 0.3  # standard deviations of weights and biases
KINDS, COVERED = ("ntk", "nngp"), ("yes", "sampled", "no")
VECTORS, BRANCHES, IMAGES, SEQUENCES = "Layers of vectors", "Branches", "Layers of images", "Networks on sequences"
FUNCTIONS = "Functions"


class Row(NamedTuple):
    """One row of a table."""

    section: str
    name: str
    theirs: str
    ours: str
    limit: str

    @property
    def verdict(self) -> str:
        """The first word of the last column."""
        return re.match(r"\w+", self.limit)[0]  # pyrefly: ignore


def rows() -> list[Row]:
    """All rows of the page that have a verdict."""
    found, section = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4 and cells[3] != "limit":
            found.append(Row(section, cells[0], cells[1].strip("`"), cells[2].strip("`"), cells[3]))
    return found


def code() -> str:
    """The page's blocks of Python."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


class Data(NamedTuple):
    """What all rows are computed on."""

    x: np.ndarray  # [6, 4]
    x_test: np.ndarray  # [3, 4]
    y: np.ndarray  # [6, 2]
    images: np.ndarray  # [4, 2, 4, 4]
    A: np.ndarray  # [4, 4]
    sequences: np.ndarray  # [4, 5, 3]
    graphs: np.ndarray  # [4, 5, 5]
    masks: np.ndarray  # [4, 5]
    parameters: list[np.ndarray]
    step: list[np.ndarray]


@functools.cache
def data() -> Data:
    """Draw the data."""
    rng = np.random.default_rng(0)
    shapes = [(8, 4), (8,), (2, 8), (2,)]
    normal = rng.standard_normal
    return Data(
        normal((6, 4)), normal((3, 4)), normal((6, 2)), normal((4, 2, 4, 4)), rng.random((4, 4)), normal((4, 5, 3)),
        (rng.random((4, 5, 5)) < 0.6).astype(float), (np.arange(5) < np.array([[5], [3], [4], [2]])).astype(float),
        [normal(shape) for shape in shapes], [0.1 * normal(shape) for shape in shapes],
    )  # fmt: skip


# ---------------------------------------------------------------------- ntkit


@functools.cache
def _page() -> dict[str, Any]:
    """The names that the page's blocks define."""
    names: dict[str, Any] = {}
    exec(code(), names)
    return names


def network(row: Row) -> Any:
    """The module of a row of layers."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = eval(row.ours, _page() | {"A": torch.from_numpy(data().A)})
    if row.section == SEQUENCES:
        return layer.double()
    if row.section == IMAGES:
        body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), layer).double()
        end = [] if body(torch.from_numpy(data().images)).dim() == 2 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        body = nn.Sequential(body, *end)
        features = body(torch.from_numpy(data().images)).shape[1]
    else:
        body = nn.Sequential(nn.Linear(4, 8), layer).double()
        features = body(torch.from_numpy(data().x)).shape[1]
    return nn.Sequential(body, nn.Linear(features, 1)).double()


def samples(row: Row) -> np.ndarray:
    """The samples of a row of layers."""
    d = data()
    if row.section != SEQUENCES:
        return d.images if row.section == IMAGES else d.x
    more = {"Aggregate, a graph per sample": d.graphs, "mask_constant": d.masks[:, :, None]}.get(row.name)
    return d.sequences if more is None else np.concatenate([d.sequences, more], axis=2)


def ours(row: Row, kind: str = "ntk") -> np.ndarray:
    """A row's values by ntkit."""
    import torch

    import ntkit

    if row.section == FUNCTIONS:
        value = eval(row.ours, names_of_functions())
        return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
    kernel = ntkit.InfiniteKernel(network(row), kind, W, B)  # pyrefly: ignore
    return kernel(torch.from_numpy(samples(row))).numpy()


def names_of_functions() -> dict[str, Any]:
    """What the lines of the table of functions are about."""
    import torch
    from torch import nn

    import ntkit

    x, x_test, y = (torch.from_numpy(t) for t in data()[:3])
    step = [torch.from_numpy(s) for s in data().step]
    model = nn.Sequential(nn.Linear(4, 8), _page()["Apply"](torch.erf), nn.Linear(8, 2)).double()
    for p, value in zip(model.parameters(), data().parameters, strict=True):
        p.data = torch.from_numpy(value)
    ntk, nngp = (ntkit.InfiniteKernel(model, kind, W, B) for kind in KINDS)  # pyrefly: ignore
    return _page() | {
        "x": x, "x_test": x_test, "y": y, "model": model, "step": step, "ntk": ntk, "nngp": nngp, "W": W, "b": B,
        "S": nngp(x), "T": ntk(x), "S_test": nngp(x_test, x), "T_test": ntk(x_test, x), "S_tests": nngp(x_test),
    }  # fmt: skip


# ---------------------------------------------------------------------- neural-tangents


class _Stax:
    """`stax` with the standard deviations of all rows."""

    def __getattr__(self, name: str) -> Any:
        from neural_tangents import stax

        layer = getattr(stax, name)
        weighted = name in ("Dense", "Conv", "ConvLocal", "ConvTranspose")
        return functools.partial(layer, W_std=W, b_std=B) if weighted else layer


def theirs(row: Row, kind: str = "ntk") -> np.ndarray:
    """A row's values by neural-tangents."""
    import jax
    import jax.numpy as jnp
    import neural_tangents as nt

    stax, d = _Stax(), data()
    names = {"stax": stax, "jnp": jnp, "jax": jax, "nt": nt, "A": jnp.asarray(d.A), "W": W, "b": B}
    if row.section == FUNCTIONS:
        return np.asarray(eval(row.theirs, names | _their_names(stax)))
    layer, more = eval(row.theirs, names), {}
    x = d.sequences if row.section == SEQUENCES else d.x
    if row.section == SEQUENCES:
        function = layer[2]
        if row.name == "mask_constant":
            x = np.where(d.masks[:, :, None] > 0, x, 1e3)
            more = {"mask_constant": 1e3}
    elif row.section == IMAGES:
        x = d.images.transpose(0, 2, 3, 1)
        body = stax.serial(stax.Conv(8, (3, 3), padding="SAME"), stax.Relu(), layer)
        flat = "Glob" in row.theirs or row.name == "Flatten"
        function = stax.serial(body, *([] if flat else [stax.GlobalAvgPool()]), stax.Dense(1))[2]
    else:
        function = stax.serial(stax.Dense(8), layer, stax.Dense(1))[2]
    if row.name.startswith("Aggregate"):
        pattern = d.graphs if row.section == SEQUENCES else np.broadcast_to(d.A, (len(x), 4, 4))
        more = {"pattern": (jnp.asarray(pattern), jnp.asarray(pattern))}
    return np.asarray(function(jnp.asarray(x), None, kind, **more))


def _their_names(stax: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    d = data()
    x, x_test = jnp.asarray(d.x), jnp.asarray(d.x_test)
    init_fn, wide, kernel_fn = stax.serial(stax.Dense(512), stax.Erf(), stax.Dense(2))
    params = [jnp.asarray(p) for p in d.parameters]

    def f(p: Any, x: Any, **_: Any) -> Any:
        return jax.scipy.special.erf(x @ p[0].T + p[1]) @ p[2].T + p[3]

    return {
        "x": x, "x_test": x_test, "y": jnp.asarray(d.y), "y_test": jnp.zeros((3, 2)), "f": f, "params": params,
        "there": [p + s for p, s in zip(params, d.step, strict=True)], "init_fn": init_fn, "wide": wide,
        "kernel_fn": kernel_fn, "key": jax.random.PRNGKey(0),
        "S": kernel_fn(x, x, "nngp"), "T": kernel_fn(x, x, "ntk"), "S_test": kernel_fn(x_test, x, "nngp"),
        "T_test": kernel_fn(x_test, x, "ntk"), "S_tests": kernel_fn(x_test, x_test, "nngp"),
    }  # fmt: skip


def main() -> None:
    """Write the values of all rows by neural-tangents."""
    import jax

    jax.config.update("jax_enable_x64", True)
    values = {}
    for row in rows():
        for kind in KINDS:
            try:
                values[f"{row.name} {kind}"] = theirs(row, kind)
            except Exception as error:
                values[f"{row.name} {kind}"] = np.array(f"{type(error).__name__}: {error}"[:300])
    np.savez(sys.argv[1], **values)


if __name__ == "__main__":
    main()
