"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch

#: Bytes that are taken without asking: asking costs 0.1 ms.
ALWAYS = 16 << 20


def available() -> int:
    """Bytes a process may still take without swapping, or being killed for it by the limit of its control group."""
    return min(_of_the_machine(), _of_the_group())


def _of_the_group(folder: str = "/sys/fs/cgroup") -> int:
    """What a container or a batch job may still take; its page cache can be had back."""
    try:
        limit = (Path(folder) / "memory.max").read_text(encoding="ascii").strip()
        used = int((Path(folder) / "memory.current").read_text(encoding="ascii"))
        lines = (Path(folder) / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return sys.maxsize
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return sys.maxsize if limit == "max" else max(0, int(limit) - used + cached)


def _of_the_machine() -> int:
    """Free pages alone would leave out what the page cache holds."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free(device: str | torch.device) -> int:
    """Bytes that may still be taken, on this machine or a CUDA device of it."""
    device = torch.device(device)
    if device.type != "cuda":
        return available()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def refuse_beyond(caller: str, size: int, device: torch.device, way_out: str) -> None:
    """Raise before a result of `size` bytes is begun that `device` has no room for.

    Raises:
        MemoryError: with the estimate, what is free and the way out.
    """
    if size <= ALWAYS:
        return
    room = free(device)
    if size > room:
        raise MemoryError(
            f"{caller}: the result needs {size / 1e9:.1f} GB, {room / 1e9:.1f} GB of memory are free; {way_out}"
        )


@functools.cache
def cache(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Bytes of a core's own cache: the largest that it shares with no other, 1 MiB where the system does not say."""
    sizes = []
    for index in Path(folder).glob("index*"):
        try:
            kind, size, cores = ((index / name).read_text().strip() for name in ("type", "size", "shared_cpu_list"))
        except OSError:
            continue
        if kind != "Instruction" and "," not in cores and "-" not in cores and size.endswith("K"):
            sizes.append(int(size.removesuffix("K")) * 1024)
    return max(sizes, default=1 << 20)
