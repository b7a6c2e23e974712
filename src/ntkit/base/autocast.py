"""Arithmetic at the precision of its numbers, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off inside, on every device: it would multiply matrices of float32 in bfloat16.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast():
    ...     print((torch.eye(2) @ torch.eye(2)).dtype)
    torch.float32
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
