"""What this machine does in a second: measured once per device, precision and thread count, and kept in a file.

The choice of a route rests on three rates. They are kept on disk, so that the same machine makes the same choice
tomorrow. Where the file cannot be written defaults hold: a choice that changes from one process to the next would
change the last bits of a resumed run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ntkit.base.checks import Refused
from ntkit.base.files import write_text

_N = 1024  # side of the matrix product measured
_ENOUGH = 0.5  # seconds for one rate: some CPUs have no arithmetic in half precision and take a thousand times as long


@dataclass(frozen=True)
class Rates:
    """Speed of a device in one precision.

    ``product``: floating-point operations per second of a large matrix product. ``batched``: of many small ones (a
    sample's gradient of a convolution). ``entries``: numbers per second read, multiplied and added in place. ``fresh``:
    numbers per second written to memory just taken from the system, which a CPU pays for page by page.
    """

    product: float
    batched: float
    entries: float
    fresh: float


_DEFAULT = Rates(product=2.0**37, batched=2.0**36, entries=2.0**30, fresh=2.0**28)
_KNOWN: dict[str, Rates] = {}


def rates_for(like: Tensor) -> Rates:
    """Rates of the device and precision of `like`: from memory, from the file, or measured now (a tenth of a second).

    Parameters
    ----------
    like : any tensor; its device and dtype count.

    Examples
    --------
    >>> rates_for(torch.zeros(1)).product > 0
    True
    """
    key = _key(like)
    if key not in _KNOWN:
        kept = _read()
        if key in kept:
            _KNOWN[key] = kept[key]
        else:
            measured = _measure(like)
            _KNOWN[key] = measured if _keep(key, measured) else _DEFAULT
    return _KNOWN[key]


def calibrate(like: Tensor, rates: Rates | None = None) -> Rates:
    """Measure the rates of `like`'s device and precision again, or set them to `rates`; for this and later processes.

    Examples
    --------
    >>> before = rates_for(torch.zeros(1))
    >>> calibrate(torch.zeros(1), Rates(1e11, 5e10, 1e9, 3e8)).product
    100000000000.0
    >>> calibrate(torch.zeros(1), before) == before
    True
    """
    _KNOWN[_key(like)] = rates or _measure(like)
    _keep(_key(like), _KNOWN[_key(like)])
    return _KNOWN[_key(like)]


def _key(like: Tensor) -> str:
    cuda = like.device.type == "cuda"
    device = torch.cuda.get_device_name(like.device) if cuda else f"{like.device.type} x {torch.get_num_threads()}"
    precision = torch.get_float32_matmul_precision() if like.dtype == torch.float32 else ""
    return " ".join(filter(None, (device, str(like.dtype).removeprefix("torch."), precision, torch.__version__)))


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ntkit" / "rates.json"


def _read() -> dict[str, Rates]:
    try:
        kept = json.loads(_file().read_text())
        return {key: Rates(**{name: float(v) for name, v in value.items()}) for key, value in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent, or not ours: measured again


def _keep(key: str, rates: Rates) -> bool:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        kept = {name: asdict(value) for name, value in (_read() | {key: rates}).items()}
        write_text(_file(), json.dumps(kept, indent=1) + "\n")
    except (OSError, Refused):
        return False
    return True


def _measure(like: Tensor) -> Rates:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        draw = torch.Generator().manual_seed(0)
        a = torch.randn(_N, _N, generator=draw).to(like)
        left, right = a[:512].reshape(16, 64, 512), a.reshape(16, 512, 128)[:, :, :128]
        total = a.clone()
        small = a[: _N // 4, : _N // 4].contiguous()
        side = _N if 4**3 * _seconds(lambda: small @ small, like.device, 2) < _ENOUGH else _N // 4
        square = a[:side, :side].contiguous()
        return Rates(
            product=_rounded(2 * side**3, _seconds(lambda: square @ square, like.device)),
            batched=_rounded(2 * 16 * 64 * 512 * 128, _seconds(lambda: torch.bmm(left, right), like.device)),
            entries=_rounded(_N**2, _seconds(lambda: total.addcmul_(a, a, value=1e-3), like.device)),
            # large enough that the allocator gives it back to the system each time
            fresh=_rounded(16 * _N**2, _seconds(lambda: total.new_empty(16 * _N**2).zero_(), like.device, 3)),
        )


def _rounded(work: float, seconds: float) -> float:
    return float(f"{work / seconds:.2g}")


def _seconds(work: Callable[[], Tensor], device: torch.device, repeats: int = 8) -> float:
    """Seconds of the fastest of some repeats after a first: as many repeats as `_ENOUGH` allows, and at least one."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= repeats and sum(times[1:]) < _ENOUGH):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)  # the least disturbed: other work on the machine only adds
