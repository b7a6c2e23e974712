"""What a kernel of so many samples would take: time, disk and network, from rates. Nothing large is computed.

python -m benchmarks.scale                                         # the table of docs/scale.md
python -m benchmarks.scale --measure                               # the rates of this machine, and a test of the model
python -m benchmarks.scale --n 200000 --devices 4 --gemm 1.2e13 --passes 5e12 --memory 40e9

The model. A network with P parameters, C outputs, and F operations for the forward pass of a sample; n samples. All
numbers are float32.

exact     Gradients of a block of T samples (2 T P C numbers fit into a device) are computed once per block of rows, and
          again for each block of columns: n^2 / (2 T) samples, F (1 + 2 C) operations each. Products of gradients:
          n^2 / 2 pairs, 2 P C^2 operations each. On the disk: n^2 C^2 / 2 numbers. Each device reads all samples once.
          The last round of tiles leaves devices idle: times ceil(tiles / devices) / (tiles / devices).
operator  A product K V with k columns is J (J^T V): for each column a pass back and a tangent forward pass, 5 F
          operations and 3 F of the forward pass that both share, over all n samples. Per pass P k numbers are added up.
sketch    Gradients of all samples once, folded into D numbers each (4 P C bytes read at the memory's rate); n D C
          numbers are kept; the D x D system: 2 n D^2 C operations.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ntkit
from benchmarks.common import gemm_rate, median_seconds, save


@dataclass(frozen=True)
class Network:
    """A network as the model sees it."""

    name: str
    parameters: float
    forward: float  # operations per sample
    sample: float  # numbers per sample
    outputs: int = 1


@dataclass(frozen=True)
class Device:
    """Rates of one device and of what it shares with others."""

    gemm: float = 4.0e13  # operations per second of float32 products
    passes: float = 2.0e13  # of forward and backward passes
    memory: float = 1.3e11  # bytes for gradients
    bandwidth: float = 4.0e12  # bytes per second of that memory
    disk: float = 2.0e9  # bytes per second, all devices together
    network: float = 1.0e10  # bytes per second into one device


RESNET = Network("ResNet-18, 32 x 32 pixels", 1.117e7, 1.11e9, 3 * 32 * 32)


def exact(net: Network, n: float, devices: int, rates: Device) -> dict[str, float]:
    """Seconds, bytes on the disk and over the network, of all pairs."""
    C = net.outputs
    block = min(n, math.floor(rates.memory / (8 * net.parameters * C)))
    blocks = math.ceil(n / block)
    tiles = blocks * (blocks + 1) / 2
    idle = math.ceil(tiles / devices) / (tiles / devices)
    gradients = (n + n * blocks / 2) * net.forward * (1 + 2 * C) / rates.passes / devices * idle
    products = n**2 / 2 * 2 * net.parameters * C**2 / rates.gemm / devices * idle
    disk, moved = 2 * n**2 * C**2, 4 * n * net.sample * devices
    writing, reading = disk / rates.disk, 4 * n * net.sample / rates.network
    total = max(gradients + products, writing) + reading
    return {
        "block": block, "gradients, s": gradients, "products, s": products, "writing, s": writing,
        "total, s": total, "disk, GB": disk / 1e9, "network, GB": moved / 1e9,
    }  # fmt: skip


def operator(net: Network, n: float, columns: int, passes: int, devices: int, rates: Device) -> dict[str, float]:
    """Seconds of so many products with `columns` vectors."""
    each = n * net.forward * (3 + 5 * columns) / rates.passes / devices
    added = 8 * net.parameters * columns * passes * (devices > 1)
    total = passes * each + added / rates.network
    return {"a product, s": each, "total, s": total, "disk, GB": 0.0, "network, GB": added * devices / 1e9}


def sketch(net: Network, n: float, dim: int, devices: int, rates: Device) -> dict[str, float]:
    """Seconds of the features and of a ridge regression on them."""
    C = net.outputs
    gradients = n * net.forward * (1 + 2 * C) / rates.passes / devices
    folding = n * 8 * net.parameters * C / rates.bandwidth / devices
    solving = (2 * n * C * dim**2 / devices + dim**3 / 3) / rates.gemm
    disk = 4 * n * dim * C
    total = max(gradients + folding, disk / rates.disk) + solving
    return {"features, s": gradients + folding, "solving, s": solving, "total, s": total, "disk, GB": disk / 1e9,
            "network, GB": 4 * dim**2 * devices * (devices > 1) / 1e9}  # fmt: skip


def table(rates: Device) -> list[dict[str, Any]]:
    """The cases of docs/scale.md."""
    ten = replace(RESNET, outputs=10)
    rows: list[dict[str, Any]] = []
    for devices in (1, 8, 64):
        rows.append(
            {"what": "exact, one output", "n": 60_000, "devices": devices, **exact(RESNET, 6e4, devices, rates)}
        )
    for devices in (1, 8, 64):
        rows.append({"what": "exact, all pairs of ten outputs", "n": 60_000, "devices": devices,
                     **exact(ten, 6e4, devices, rates)})  # fmt: skip
    for devices in (1, 8, 64):
        solved = operator(RESNET, 1e6, 10, 100, devices, rates)
        rows.append({"what": "operator, 100 products with 10 columns", "n": 1_000_000, "devices": devices, **solved})
    for devices in (1, 8, 64):
        folded = sketch(RESNET, 1e6, 8192, devices, rates)
        rows.append({"what": "sketch, 8,192 numbers a sample", "n": 1_000_000, "devices": devices, **folded})
    return rows


# ---------------------------------------------------------------------- this machine


def small() -> tuple[nn.Module, Network]:
    """A convolutional network for the test of the model, and its sizes."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1),
    ]  # fmt: skip
    net = nn.Sequential(*layers)
    operations = 2 * (27 * 32 * 1024 + 288 * 64 * 256 + 576 * 128 * 64 + 128)
    return net, Network("CNN", sum(p.numel() for p in net.parameters()), operations, 3 * 32 * 32)


def measured() -> tuple[Device, list[dict[str, Any]]]:
    """Rates of this machine, and what the model says beside what a kernel takes."""
    model, net = small()
    x, y = torch.randn(256, 3, 32, 32), torch.zeros(256, dtype=torch.long)

    def passes() -> None:
        out = model(x)
        cross_entropy(torch.cat([out, -out], 1), y).backward()

    rates = Device(gemm=gemm_rate(), passes=3 * len(x) * net.forward / median_seconds(passes, 3), memory=1e9)
    rows = []
    for n in (250, 500, 1000):
        kernel = ntkit.TangentKernel(model, "trace", memory="1 GB")
        samples = torch.randn(n, 3, 32, 32)
        took = median_seconds(lambda kernel=kernel, samples=samples: kernel(samples), 1)
        said = exact(net, n, 1, replace(rates, disk=math.inf, network=math.inf))["total, s"]
        rows.append({"n": n, "measured, s": took, "model, s": said, "ratio": took / said})
    return rates, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    for name in ("n", "parameters", "forward", "sample", "outputs", "devices"):
        parser.add_argument(f"--{name}", type=float)
    for name, value in vars(Device()).items():
        parser.add_argument(f"--{name}", type=float, default=value)
    options = parser.parse_args()
    if options.measure:
        rates, rows = measured()
        save("scale_measured", rows, gemm=rates.gemm, passes=rates.passes)
        return
    rates = Device(**{name: getattr(options, name) for name in vars(Device())})
    given = {name: value for name in ("parameters", "forward", "sample") if (value := getattr(options, name))}
    if options.n is None:
        save("scale", table(rates), rates=vars(rates))
        return
    net = replace(RESNET, **given, outputs=int(options.outputs or 1))
    for key, value in exact(net, options.n, int(options.devices or 1), rates).items():
        print(f"{key:>14} {value:,.4g}")


if __name__ == "__main__":
    main()
