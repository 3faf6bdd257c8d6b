"""How many bytes are free on the host and on GPUs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that new tensors may take on a device; None for devices that do not tell."""
    if device.type == "cpu":
        return host_free_bytes()
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return None


def host_free_bytes() -> int:
    """Return what the host has free, swap included, within the limit of its container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMINFO.is_file():
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE))
        if "MemAvailable" in fields:
            free = (int(fields["MemAvailable"]) + int(fields.get("SwapFree", 0))) * 1024
    return max(min(free, _container_free_bytes(free)), 0)


def _container_free_bytes(otherwise: int) -> int:
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cache = re.search(r"^file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such container, or "max": no limit
        return otherwise
    return limit - used + (int(cache.group(1)) if cache else 0)


def free_places() -> dict[str, int]:
    """Return the free bytes of the host and of every GPU, by name."""
    places = {"host": host_free_bytes()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            places[f"GPU {index} ({torch.cuda.get_device_name(index)})"] = torch.cuda.mem_get_info(index)[0]
    return places
