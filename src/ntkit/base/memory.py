"""Memory: how much is free, how much the user allows, and how much a file may take."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from ntkit.base.checks import parse_bytes, refusal

_RATIO, _SMALL = 50, 2**28  # images and tables unpack to 2 to 30 times their bytes; a thousand times is a bomb


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of scratch memory from a number or a text such as "500 MB"; None stays None."""
    return parse_bytes(memory, "memory", "Give the scratch memory allowed.")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; on a CPU at most a quarter of a second ago: asking costs a tenth of a small call."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _free_now_and_then(int(4 * time.monotonic()))


@lru_cache(1)
def _free_now_and_then(quarter: int) -> int:
    import psutil

    return psutil.virtual_memory().available


def check_room(subject: str, needed: int, stored: int | None = None) -> None:
    """Refuse data that do not fit into the free memory, before it is taken.

    Parameters
    ----------
    subject : the file, in error messages.
    needed : bytes that the data take.
    stored : bytes that they take on disk, where they may be compressed: a small file that claims to be huge is refused.

    Raises
    ------
    Refused
        With both sizes.
    """
    if stored is not None and needed > max(_SMALL, _RATIO * stored):
        got = f"{stored:,} bytes that say they unpack to {needed:,}"
        fix = "If they really do, save them without compression."
        raise refusal(subject, got=got, expected=f"at most {_RATIO} times their size", fix=fix)
    if needed > (free := free_memory(torch.device("cpu"))):
        expected = f"at most {free / 1e9:.1f} GB, the free memory"
        raise refusal(subject, got=f"{needed / 1e9:.1f} GB of data", expected=expected, fix="Keep fewer examples.")


def bytes_in_words(number: float) -> str:
    """Bytes as text.

    >>> bytes_in_words(2.34e9), bytes_in_words(4.2e6)
    ('2.3 GB', '4.2 MB')
    """
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"
