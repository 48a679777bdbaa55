"""How many bytes there are: sizes as people write them, and the memory this process may take."""

import contextlib
import re
import sys
from pathlib import Path

from antidote_fast.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1000**_power}
_SIZE = re.compile(r"(\d+|\d*\.\d+)\s*([A-Za-z]*)")


def parse_bytes(text: str | int, argument: str) -> int:
    """A size in bytes from ``4GB`` (4e9), ``4GiB``, ``512MB``, ``1.5G`` or a plain integer.

    Args:
        text: what a person wrote, or an int.
        argument: what an error message calls it.

    Raises:
        UsageError: not a size, or not above 0.
    """
    match = _SIZE.fullmatch(str(text).strip())
    factor = match and _UNITS.get(match[2].upper())
    if isinstance(text, bool) or not factor:
        raise UsageError(f"{argument}={text!r}: must be a size such as 4GB, 512MiB or 4000000000")
    # An integer stays exact; a fraction of a unit is rounded down.
    size = int(match[1]) * factor if match[1].isdigit() else int(float(match[1]) * factor)
    if size < 1:
        raise UsageError(f"{argument}={text!r}: must be greater than 0")
    return size


def format_bytes(size: int) -> str:
    """``1536000`` as ``1.54 MB``: decimal units, as disks and :func:`parse_bytes` count."""
    size = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def available_memory(*, proc: str | Path = "/proc", cgroups: str | Path = "/sys/fs/cgroup") -> int:
    """Bytes that this process may still take: of the machine, and of its control groups.

    On Linux that is ``MemAvailable`` or, where less, what a cgroup (v1 or v2, this process's own or
    one above it) leaves between its limit and its use; cached file pages, which the kernel gives
    back, are not counted as used. Elsewhere psutil says it.

    Args:
        proc, cgroups: where those file systems are mounted.
    """
    available = _kilobytes(Path(proc) / "meminfo", "MemAvailable")
    if available is None:
        import psutil

        return psutil.virtual_memory().available
    rooms = [_room(folder) for folder in _cgroup_folders(Path(proc), Path(cgroups))]
    return max(0, min([available, *(room for room in rooms if room is not None)]))


def resident_bytes(*, proc: str | Path = "/proc") -> int:
    """Bytes of memory this process holds now."""
    size = _kilobytes(Path(proc) / "self" / "status", "VmRSS")
    if size is None:
        import psutil

        return psutil.Process().memory_info().rss
    return size


def peak_memory_bytes() -> int:
    """The most memory that this process has held, in bytes."""
    # getrusage() would count what the process was forked from as well.
    size = _kilobytes(Path("/proc/self/status"), "VmHWM")
    if size is not None:
        return size
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let :func:`peak_memory_bytes` begin anew where the system can, and CUDA's peak as well."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_device_memory_bytes() -> int | None:
    """The most that torch has held on this process's GPU, in bytes; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated()


def _kilobytes(path, name):
    """Bytes of the line ``name: N kB`` of a file; None where there is none."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{name}:\s*(\d+) kB", path.read_text(encoding="utf-8"), re.MULTILINE)
        return match and 1024 * int(match[1])
    return None


def _cgroup_folders(proc, cgroups):
    """The memory cgroups of this process, from its own up to the root of the mount."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        roots = []
        if hierarchy == "0":
            roots = [cgroups, cgroups / "unified"]
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
        for root in roots:
            # In a container the path may be the host's, and its own cgroup the root of the mount.
            own = root / path.lstrip("/")
            folders += [f for f in (own, *own.parents) if f == root or f.is_relative_to(root)]
    return folders


def _room(folder):
    """Bytes between a cgroup's limit and its use; None where it has no limit, or is none."""
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            allowed = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
        except (OSError, ValueError):
            continue
        if not allowed.isdigit():  # "max"
            return None
        cached = 0
        with contextlib.suppress(OSError):
            stat = (folder / "memory.stat").read_text()
            lines = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
            cached = sum(map(int, lines))
        return int(allowed) - used + cached
    return None
