"""What this machine does in a second, and which way is the fastest on it: measured once, and kept in files.

The choice of a route rests on four rates, measured by all workers at once, as they will run. They are kept on disk, so
that the same machine makes the same choice tomorrow. Where a file cannot be written defaults hold: a choice that
changes from one process to the next would change the last bits of a resumed run.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import Refused
from ntkit.base.files import write_text
from ntkit.base.workers import spread, workers

_N = 1024  # side of the matrix product measured
_ENOUGH = 0.5  # seconds for one rate: some CPUs have no arithmetic in half precision and take a thousand times as long


@dataclass(frozen=True)
class Rates:
    """Speed of a device in one precision; of a CPU that of one core, while the others are busy, too.

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
_FASTEST: dict[str, str] = {}
_MEASURING = threading.Lock()


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
            _KNOWN[key] = measured if _keep(key, asdict(measured), _file()) else _DEFAULT
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
    _keep(_key(like), asdict(_KNOWN[_key(like)]), _file())
    return _KNOWN[_key(like)]


def fastest(what: str, like: Tensor, ways: Mapping[str, Callable[[], None]]) -> str:
    """Name of the fastest of several ways to the same result: from memory, from the file, or measured now.

    Parameters
    ----------
    what : the task, with all sizes that count.
    like : any tensor; its device and dtype count.
    ways : by name; the first is taken where nothing can be kept.

    Examples
    --------
    >>> fastest("nothing", torch.zeros(1), {"slow": lambda: time.sleep(0.01), "fast": lambda: None})
    'fast'
    """
    key = f"{what} {_precision(like)}"
    if _FASTEST.get(key) not in ways:
        with _MEASURING:  # one worker measures, those that have the same question wait
            if _FASTEST.get(key) not in ways:
                kept = _read_text(_file("fastest")).get(key)
                if kept not in ways:
                    seconds = {name: _seconds(way, like.device, 2) for name, way in ways.items()}
                    kept = min(seconds, key=lambda name: seconds[name])
                    kept = kept if _keep(key, kept, _file("fastest")) else next(iter(ways))
                _FASTEST[key] = kept
    return _FASTEST[key]


def _key(like: Tensor) -> str:
    cuda = like.device.type == "cuda"
    device = torch.cuda.get_device_name(like.device) if cuda else f"{like.device.type} x {workers()} workers"
    return f"{device} {_precision(like)}"


def _precision(like: Tensor) -> str:
    precision = torch.get_float32_matmul_precision() if like.dtype == torch.float32 else ""
    return " ".join(filter(None, (str(like.dtype).removeprefix("torch."), precision, torch.__version__)))


def _file(name: str = "rates") -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "ntkit" / f"{name}.json"


def _read() -> dict[str, Rates]:
    try:
        read = {key: Rates(**{name: float(v) for name, v in value.items()}) for key, value in _kept(_file()).items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # not ours: measured again
    return {key: rates for key, rates in read.items() if all(0 < v < math.inf for v in asdict(rates).values())}


def _read_text(file: Path) -> dict[str, str]:
    return {key: value for key, value in _kept(file).items() if isinstance(value, str)}


def _kept(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # absent, or not ours: measured again
    return kept if isinstance(kept, dict) else {}


def _keep(key: str, value: dict[str, float] | str, file: Path) -> bool:
    kept = {name: asdict(rates) for name, rates in _read().items()} if isinstance(value, dict) else _read_text(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(kept | {key: value}, indent=1) + "\n")
    except (OSError, Refused):
        return False
    return True


def _measure(like: Tensor) -> Rates:
    if like.device.type != "cpu":
        return _measure_here(like)
    found = spread(lambda _: _measure_here(like), range(workers()))
    return Rates(**{name: min(getattr(rates, name) for rates in found) for name in asdict(found[0])})


def _measure_here(like: Tensor) -> Rates:
    with torch.no_grad():
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


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 8) -> float:
    """Seconds of the fastest of some repeats after a first: as many repeats as `_ENOUGH` allows, and at least one."""
    # a worker's own time: what others take on a busy machine is not in it
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: list[float] = []
    while len(times) < 2 or (len(times) <= repeats and sum(times[1:]) < _ENOUGH):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return max(min(times[1:]), 1e-9)  # the least disturbed: other work on the machine only adds
