"""How much memory is free, to be asked before large arrays are made."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

#: Linux's MADV_POPULATE_WRITE.
_POPULATE = 23
#: Memory of more bytes than this is always new, page by page, where glibc gives it (M_MMAP_THRESHOLD's limit).
_NEW = 32 << 20

#: Results of up to this many bytes are made without asking, since asking takes 0.1 ms.
ALWAYS = 16 << 20


def available() -> int:
    """Bytes that this process may still take without swapping, being killed or being refused.

    This is the least of what the machine has, what each control group of the process allows (v1 and v2, up to the root:
    a container's, a batch job's, a user session's), and ``ulimit -v`` and ``-d``.
    """
    return min(_of_the_machine(), _of_the_groups(), _of_the_process())


def resident() -> int:
    """Bytes of memory that this process takes now; 0 where the system does not say."""
    fields = _text(Path("/proc/self/statm")).split()
    return int(fields[1]) * resource.getpagesize() if len(fields) > 1 else 0


def limits() -> dict[str, int]:
    """The limits whose least is `available`, in bytes; ``sys.maxsize`` where there is none."""
    return {"machine": _of_the_machine(), "control groups": _of_the_groups(), "ulimit": _of_the_process()}


def _of_the_groups(membership: str = "/proc/self/cgroup", mounts: str = "/proc/self/mountinfo") -> int:
    """Bytes that this process's control groups and their parents leave; page cache counts as free."""
    try:
        told = Path(membership).read_text(encoding="utf-8"), Path(mounts).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return sys.maxsize
    return min((_left_in(folder, kind) for folder, kind in _groups(*told)), default=sys.maxsize)


@functools.lru_cache(1)
def _groups(membership: str, mounts: str) -> list[tuple[Path, str]]:
    """(folder, kind) of each control group with memory limits that what the system says of a process names."""
    found: list[tuple[Path, str]] = []
    for _, controllers, group in (line.split(":", 2) for line in membership.splitlines() if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for root, point in _mounted(mounts.splitlines(), kind):
            inside = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
            folder = Path(point) / inside
            found += [(each, kind) for each in (folder, *folder.parents) if each.is_relative_to(point)]
    return found


def _mounted(lines: Sequence[str], kind: str) -> Iterator[tuple[str, str]]:
    """(group, directory) of each mount point of control groups with memory limits."""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or len(described) < 3 or described[0] != kind:
            continue
        if kind == "cgroup2" or "memory" in described[2].split(","):
            yield fields[3], fields[4]


_FILES: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file "),
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file "),
}


def _left_in(folder: Path, kind: str) -> int:
    names, used, cached = _FILES[kind]
    limits = [int(text) for name in names if (text := _text(folder / name)).isdigit()]
    taken = _text(folder / used)
    if not limits or not taken.isdigit():
        return sys.maxsize
    lines = _text(folder / "memory.stat").splitlines()
    back = next((int(line.split()[1]) for line in lines if line.startswith(cached)), 0)
    return max(0, min(limits) - int(taken) + back)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _of_the_process() -> int:
    """Bytes that ``ulimit -v`` (addresses) and ``-d`` (data) leave this process."""
    left = sys.maxsize
    fields = _text(Path("/proc/self/statm")).split()
    for kind, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and len(fields) > field:
            left = min(left, max(0, limit - int(fields[field]) * resource.getpagesize()))
    return left


def _of_the_machine() -> int:
    """Bytes free on the machine, including page cache that can be dropped."""
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
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator, for reuse
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def refuse_beyond(caller: str, size: int, device: torch.device, way_out: str) -> None:
    """Refuse a result of `size` bytes that does not fit in the free memory of `device`, before it is computed.

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
    """Bytes of a core's largest cache that no other core shares; 1 MiB where the system does not say."""
    sizes = []
    for index in Path(folder).glob("index*"):
        try:
            kind, size, cores = ((index / name).read_text().strip() for name in ("type", "size", "shared_cpu_list"))
        except OSError:
            continue
        if kind != "Instruction" and "," not in cores and "-" not in cores and size.endswith("K"):
            sizes.append(int(size.removesuffix("K")) * 1024)
    return max(sizes, default=1 << 20)


def touch(piece: Tensor) -> None:
    """Have the pages of a piece of a large new tensor made at once, just before numbers are written to it.

    One call for many pages takes four fifths of the time that their first touches take, one by one.  Where the system
    has no such call, or refuses it, nothing is lost: pages are then made as they are touched.
    """
    advise = _advise()
    if advise is None or piece.device.type != "cpu" or piece.untyped_storage().nbytes() <= _NEW:
        return
    page = resource.getpagesize()
    first, last = -(-piece.data_ptr() // page) * page, (piece.data_ptr() + piece.nbytes) // page * page
    if piece.is_contiguous() and last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _POPULATE)


@functools.cache
def keep_freed() -> None:
    """Have glibc keep up to 64 MB of freed memory for what is made next, in place of giving it back to the system.

    It keeps twice the largest array that was ever freed, of at most 32 MB.  Where all arrays are smaller, but many,
    their memory is given back at the end of each call otherwise, and its pages made again in the next: a quarter of
    the time of a transformer's per-sample gradients.  So nearly 32 MB are taken and freed, no page of which is touched;
    glibc changes nothing if the user has set its limits (``MALLOC_TRIM_THRESHOLD_``), nor does any other allocator.
    """
    with suppress(RuntimeError):  # no address left, as under `ulimit -v`
        torch.empty(_NEW - (1 << 16), dtype=torch.uint8, device="cpu")


@functools.cache
def _advise() -> Callable[..., int] | None:
    """The system's madvise, on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return found
