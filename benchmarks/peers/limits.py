"""One infinite-width kernel, by ntkit or by neural-tangents' stax under jax.jit: run by `benchmarks.infinite`."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.job import read_job, report

W_STD, B_STD = 1.4142135623730951, 0.1
_NODES = 25  # of neural-tangents' quadrature, along each axis: "a good place to start", its documentation says


def ours(job: dict[str, Any], x1: np.ndarray, x2: np.ndarray | None) -> Callable[[], Any]:
    """ntkit, on the module."""
    import torch

    import ntkit
    from benchmarks.peers import limit_networks as networks

    torch.set_num_threads(job["threads"])
    made = {"transposed": networks.transposed, "U-Net": networks.UNet, "attention": networks.Attention}
    if "network" in job:
        model = made[job["network"]](x1.shape[-1] if x1.ndim == 3 else x1.shape[1])
    else:
        model = networks.stack(x1.shape[1], job["depth"], x1.ndim == 4, job.get("activation", "ReLU"))
    kernel = ntkit.InfiniteKernel(model, "ntk", W_STD, B_STD)
    t1 = torch.from_numpy(x1)
    t2 = None if x2 is None else torch.from_numpy(x2)
    return lambda: kernel(t1, t2).numpy()


def theirs(job: dict[str, Any], x1: np.ndarray, x2: np.ndarray | None) -> Callable[[], Any]:
    """neural-tangents, the whole matrix under one jit, in batches where the job says so."""
    import jax

    jax.config.update("jax_enable_x64", x1.dtype == np.float64)
    import neural_tangents as nt
    from neural_tangents import stax

    if x1.ndim == 4:
        x1, x2 = (None if x is None else np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in (x1, x2))
    layers = _stax_layers(job, x1.ndim == 4)
    _, _, function = stax.serial(*layers, stax.Dense(1, W_std=W_STD, b_std=B_STD))
    if job["batch"]:
        batched = nt.batch(jax.jit(lambda a, b: function(a, b, "ntk")), batch_size=job["batch"], store_on_device=False)
        return lambda: np.asarray(batched(x1, x2))
    kernel = jax.jit(lambda a, b: function(a, b, "ntk"))
    return lambda: np.asarray(kernel(x1, x2).block_until_ready())


def _stax_layers(job: dict[str, Any], images: bool) -> list[Any]:
    """The layers of a job's network up to the last dense one; those of `limit_networks`, in their words."""
    import jax
    from neural_tangents import stax

    stds = {"W_std": W_STD, "b_std": B_STD}
    conv = stax.Conv(64, (3, 3), padding="SAME", **stds)
    up = stax.ConvTranspose(64, (4, 4), strides=(2, 2), padding="SAME", **stds)
    name = job.get("network")
    if name == "transposed":
        return [conv, stax.Relu(), up, stax.Relu(), up, stax.Relu(), stax.GlobalAvgPool()]
    if name == "U-Net":
        below = stax.serial(stax.Relu(), stax.AvgPool((2, 2), (2, 2)), conv, stax.Relu(), up)
        joined = [stax.FanOut(2), stax.parallel(stax.Identity(), below), stax.FanInConcat(-1)]
        return [conv, *joined, conv, stax.Relu(), stax.GlobalAvgPool()]
    if name == "attention":
        attention = stax.GlobalSelfAttention(32, 32, 32, 4, True, W_STD, W_STD, W_STD, W_STD, B_STD)
        return [stax.Dense(32, **stds), stax.Relu(), attention, stax.GlobalAvgPool()]
    tanh = job.get("activation") == "tanh"
    activation = stax.ElementwiseNumerical(jax.numpy.tanh, deg=_NODES) if tanh else stax.Relu()
    layers = [conv if images else stax.Dense(64, **stds), activation] * job["depth"]
    return [*layers, stax.GlobalAvgPool()] if images else layers


def main() -> None:
    """Make the data of the job and report one way's time, memory and values."""
    job = read_job()
    rng = np.random.default_rng(0)
    n1, n2, shape = job["n1"], job["n2"], job["shape"]
    x1 = rng.standard_normal((n1, *shape)).astype(job["dtype"])
    x2 = rng.standard_normal((n2, *shape)).astype(job["dtype"]) if n2 else None
    work = (ours if job["who"] == "ntkit" else theirs)(job, x1, x2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # libraries and data
    report(job, work, before_gb=before)


if __name__ == "__main__":
    main()
