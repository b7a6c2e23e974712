"""neural-tangents with structured derivatives, under jax.jit, compilation apart: run by `benchmarks.engine`.

The networks of `benchmarks.workloads` once more, in plain JAX, with the weights that the job brings. Images are
channels-last or channels-first as the job says, dense weights [in, out]; it does not change the kernel, but the time:
a weight transposed inside the network (``x @ w.T``) loses its structure, and neural-tangents is then hundreds of times
slower. So weights are brought into the form in which they are used before the network sees them.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import neural_tangents as nt
import numpy as np
from jax import lax
from jax import numpy as jnp

from benchmarks.peers.job import read_job, report

Arrays = dict[str, Any]


def dense(p: Arrays, name: str, x: Any) -> Any:
    y = lax.dot_general(x, p[f"{name}.weight"], (((x.ndim - 1,), (0,)), ((), ())))
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def conv(p: Arrays, name: str, x: Any, stride: int = 1, padding: int = 0) -> Any:
    order = ("NHWC", "HWIO", "NHWC") if LAYOUT["last"] else ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(
        x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2, dimension_numbers=order
    )
    return y + by_channel(p[f"{name}.bias"]) if f"{name}.bias" in p else y


def by_channel(v: Any) -> Any:
    return v if LAYOUT["last"] else v[:, None, None]


def relu(x: Any) -> Any:
    return jnp.maximum(x, 0.0)


def max_pool(x: Any) -> Any:
    """2 x 2, an odd last row or column on its own."""
    at = (1, 2) if LAYOUT["last"] else (2, 3)
    window = tuple(2 if d in at else 1 for d in range(4))
    odd = [(0, x.shape[d] % 2 if d in at else 0) for d in range(4)]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, odd)


def sequential(p: Arrays, fixed: Arrays, x: Any, layers: list[list[Any]]) -> Any:
    for kind, name, padding in layers:
        if kind == "Linear":
            x = dense(p, name, x)
        elif kind == "Conv2d":
            x = conv(p, name, x, padding=padding)
        elif kind == "ReLU":
            x = relu(x)
        elif kind == "MaxPool2d":
            x = max_pool(x)
        elif kind == "Flatten":  # in torch's order: the dense weights are torch's
            x = x.transpose(0, 3, 1, 2) if x.ndim == 4 and LAYOUT["last"] else x
            x = x.reshape(x.shape[0], -1)
        else:
            raise ValueError(kind)
    return x


def batch_norm(p: Arrays, fixed: Arrays, name: str, x: Any) -> Any:
    mean, var = by_channel(fixed[f"{name}.running_mean"]), by_channel(fixed[f"{name}.running_var"])
    normal = (x - mean) * lax.rsqrt(var + 1e-5)
    return normal * by_channel(p[f"{name}.weight"]) + by_channel(p[f"{name}.bias"])


def resnet18(p: Arrays, fixed: Arrays, x: Any, layers: list[list[Any]]) -> Any:
    h = relu(batch_norm(p, fixed, "norm", conv(p, "stem", x, padding=1)))
    for i in range(8):
        b, stride = f"blocks.{i}", 2 if i in (2, 4, 6) else 1
        y = relu(batch_norm(p, fixed, f"{b}.norm1", conv(p, f"{b}.conv1", h, stride, 1)))
        y = batch_norm(p, fixed, f"{b}.norm2", conv(p, f"{b}.conv2", y, 1, 1))
        if f"{b}.short.0.weight" in p:
            h = batch_norm(p, fixed, f"{b}.short.1", conv(p, f"{b}.short.0", h, stride))
        h = relu(y + h)
    return dense(p, "head", h.mean((1, 2) if LAYOUT["last"] else (2, 3)))


def layer_norm(p: Arrays, name: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Any) -> Any:
    return 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def transformer_block(p: Arrays, b: str, x: Any, heads: int, causal: bool) -> Any:
    n, length, width = x.shape
    qkv = dense(p, f"{b}.qkv", layer_norm(p, f"{b}.norm1", x)).reshape(n, length, 3, heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) * (width // heads) ** -0.5
    if causal:
        later = np.triu(np.ones((length, length), bool), 1)
        scores = jnp.where(later, -1e9, scores)
    mixed = (softmax(scores) @ v).swapaxes(1, 2).reshape(n, length, width)
    x = x + dense(p, f"{b}.out", mixed)
    return x + dense(p, f"{b}.down", gelu(dense(p, f"{b}.up", layer_norm(p, f"{b}.norm2", x))))


def softmax(x: Any) -> Any:
    e = jnp.exp(x - lax.stop_gradient(x.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def vit(p: Arrays, fixed: Arrays, x: Any, layers: list[list[Any]]) -> Any:
    h = conv(p, "patch", x, stride=4)
    h = h if LAYOUT["last"] else h.transpose(0, 2, 3, 1)
    h = h.reshape(len(x), -1, h.shape[-1])
    cls = jnp.broadcast_to(p["cls"], (len(x), 1, h.shape[-1]))
    h = jnp.concatenate([cls, h], 1) + p["position"]
    for i in range(12):
        h = transformer_block(p, f"blocks.{i}", h, 3, causal=False)
    return dense(p, "head", layer_norm(p, "norm", h)[:, 0])


def gpt2(p: Arrays, fixed: Arrays, x: Any, layers: list[list[Any]]) -> Any:
    # a product with unit vectors: it has no rule for a look-up, and is a thousand times slower with one
    units = jax.nn.one_hot(x, len(p["tokens.weight"]))
    h = lax.dot_general(units, p["tokens.weight"], (((2,), (0,)), ((), ()))) + p["position.weight"]
    for i in range(2):
        h = transformer_block(p, f"blocks.{i}", h, 12, causal=True)
    logits = lax.dot_general(layer_norm(p, "norm", h), p["tokens.weight"], (((2,), (1,)), ((), ())))[:, :-1]
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    norm = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = jnp.take_along_axis(logits, x[:, 1:, None], 2)[..., 0]
    return (chosen - norm).mean(1, keepdims=True)


LAYOUT = {"last": True}  # channels last
TABLES = ("tokens.weight", "position.weight")  # embeddings: [entries, width] as they are
FAMILIES = {"sequential": sequential, "resnet18": resnet18, "vit": vit, "gpt2": gpt2}


def main() -> None:
    job = read_job()
    data = np.load(job["inputs"])
    LAYOUT["last"] = job["layout"] == "NHWC"
    channels_last = lambda x: x.transpose(0, 2, 3, 1) if x.ndim == 4 and LAYOUT["last"] else x
    held = {kind: {} for kind in ("param", "fixed", "x")}
    for key, array in data.items():
        kind, name = key.split(":")
        # torch's [out, in, h, w] to [h, w, in, out]
        if kind == "param" and array.ndim == 4 and LAYOUT["last"]:
            array = array.transpose(2, 3, 1, 0)
        elif kind == "param" and name.endswith(".weight") and array.ndim == 2 and name not in TABLES:
            array = np.ascontiguousarray(array.T)
        held[kind][name] = jnp.asarray(channels_last(array) if kind == "x" else array)
    x1, x2 = held["x"]["x1"], held["x"].get("x2")
    family, outputs = FAMILIES[job["family"]], job["outputs"]

    def network(p: Arrays, x: Any) -> Any:
        return family(p, held["fixed"], x, job["layers"])

    kernel_fn = nt.empirical_ntk_fn(
        network,
        trace_axes=(-1,) if outputs == "trace" else (),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    classes = jax.eval_shape(network, held["param"], x1[:1]).shape[1]
    factor = classes if outputs == "trace" else 1  # its trace is the mean
    start = time.perf_counter()
    if job["chunked"]:  # its own way to bound memory
        batched = nt.batch(jax.jit(kernel_fn), batch_size=job["batch"], device_count=0)
        product = lambda: batched(x1, x2, held["param"])
    else:
        compiled = jax.jit(kernel_fn).lower(x1, x2, held["param"]).compile()
        product = lambda: jax.block_until_ready(compiled(x1, x2, held["param"]))
    spent = time.perf_counter() - start
    work = product if factor == 1 else lambda: jax.block_until_ready(product() * factor)
    versions = {"neural-tangents": nt.__version__, "jax": jax.__version__, "numpy": np.__version__}
    report(job, work, compile_seconds=spent, versions=versions)


if __name__ == "__main__":
    main()
