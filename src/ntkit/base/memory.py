"""Memory: how much is free, and how much the user allows."""

from __future__ import annotations

import torch

from ntkit.base.checks import parse_bytes


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of scratch memory from a number or a text such as "500 MB"; None stays None."""
    return parse_bytes(memory, "memory", "Give the scratch memory allowed.")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
