"""What the benchmarks share: timing on a CPU or a GPU, the machine's description, rows on disk."""

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from antidote_fast import __version__, backends
from antidote_fast.backends import cpu
from antidote_fast.errors import BackendUnavailable

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATED_ON_CPU = 1 << 30  # bytes: past the last-level cache of any server
TICKS = 2_000_000_000  # a GPU's clock ticks in a second, about
QUEUED = 500_000  # of these: the time that Python has at least to queue a timed call
LONGEST_QUEUED = TICKS // 50


def parser(description, several=False):
    """The options that every benchmark has; ``several`` backends may take part in some."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument(
        "--device", help="such as cuda; default a GPU where there is one, unless --backend cpu"
    )
    options.add_argument("--backend", help="default the one that is picked for the device")
    options.add_argument(
        "--save", action="store_true", help="write the rows to benchmarks/results/"
    )
    options.add_argument(
        "--rows", type=Path, help="append each row to this file as a line of JSON, at once"
    )
    if several:
        options.add_argument("--backends", nargs="+", help="time several of ours in one run")
    return options


def parsed(options, argv=None):
    """The arguments; ``device`` is a torch.device, the GPU's index included."""
    args = options.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu"
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    if hasattr(args, "backends"):
        args.backends = args.backends or [args.backend]
    return args


def ours(args, report):
    """{name in the rows: backend} of those asked for that can run; a note says why one cannot."""
    if len(args.backends) == 1:
        return {"antidote_fast": args.backends[0]}
    found = {}
    for backend in args.backends:
        name = f"antidote_fast {backend}"
        try:
            backends.select(backend, args.device.type)
        except BackendUnavailable as error:
            report.note(name=name, why=str(error))
        else:
            found[name] = backend
    if not found:
        raise SystemExit(f"none of --backends {' '.join(args.backends)} can run here")
    return found


def shape_of(text):
    """(4096, 11008) of "4096x11008"."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def percentile(seconds, share):
    """The value at ``share`` of the sorted times."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(seconds):
    """Microseconds: median, p10, p90, and how many were timed."""
    return {
        "us": round(percentile(seconds, 0.5) * 1e6, 1),
        "us_p10": round(percentile(seconds, 0.1) * 1e6, 1),
        "us_p90": round(percentile(seconds, 0.9) * 1e6, 1),
        "runs": len(seconds),
    }


class Stopwatch:
    """Times calls by name: with ``perf_counter`` on a CPU, with events on a GPU.

    On a GPU a wait is queued first, longer than the call before kept Python, so that what is
    measured is the device's time; how long the call kept Python is in ``host``.
    """

    def __init__(self, device):
        self.device = device
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.host = {}
        self._timed = {}

    def run(self, name, call, *args):
        """Call, and keep its time under ``name``."""
        if self.module is None:
            begin = time.perf_counter()
            call(*args)
            self._timed.setdefault(name, []).append(time.perf_counter() - begin)
            return
        first, last = (self.module.Event(enable_timing=True) for _ in range(2))
        if hasattr(self.module, "_sleep"):
            kept = self.host.get(name, [0])[-1]
            self.module._sleep(min(LONGEST_QUEUED, max(QUEUED, round(1.5 * kept * TICKS))))
        first.record()
        begin = time.perf_counter()
        call(*args)
        self.host.setdefault(name, []).append(time.perf_counter() - begin)
        last.record()
        self._timed.setdefault(name, []).append((first, last))

    def seconds(self, name):
        """Every time under ``name``."""
        if self.module is None:
            return self._timed[name]
        self.module.synchronize(self.device)
        return [first.elapsed_time(last) / 1e3 for first, last in self._timed[name]]

    def median(self, name):
        """The median time under ``name``."""
        return percentile(self.seconds(name), 0.5)

    def row(self, name):
        """What a row says of the times under ``name``."""
        host = self.host.get(name)
        return summary(self.seconds(name)) | (
            {"host_us": round(percentile(host, 0.5) * 1e6, 1)} if host else {}
        )

    def __iter__(self):
        return iter(self._timed)


def take_turns(watch, turns, count, runs, restore=None, limits=None):
    """Time every ``turns[name](i)`` over the rotated copies i, in turn, ``runs`` times each.

    Args:
        watch: a :class:`Stopwatch`.
        turns: {name: call of a copy's number}.
        count: how many copies there are.
        restore: puts copy i back, untimed; all copies that are used next are put back first, so
            that none is left in a cache.
        limits: {name: fewer runs}.
    """
    for done in range(0, runs, count):
        for name, call in turns.items():
            used = range(min(count, runs - done, (limits or {}).get(name, runs) - done))
            for i in used if restore else ():
                restore(i)
            for i in used:
                watch.run(name, call, i)


def captured(device, call):
    """A CUDA graph of what ``call`` queues, ready to be replayed.

    The call must have run before: what compiles or loads code at first use cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph


def graphs(device, backend, calls, report, about, tables):
    """One graph a call; none, and a note, where there are no graphs or a call cannot be in one."""
    before = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        if before is None:
            raise RuntimeError(f"there are no CUDA graphs on {device.type}")
        if tables and backends.select(backend, device.type).NAME == "triton":
            raise RuntimeError("its table lies in memory that is gone when a graph is replayed")
        return [captured(device, call) for call in calls]
    except RuntimeError as error:
        report.note(**about, why=str(error).splitlines()[0][:300])
        if before is not None:
            torch.cuda.set_stream(before)  # a capture that failed leaves its own
        return []


def in_graphs(turns, count, args, report, about, check, tables=False):
    """{"<name>, graph": replay of a copy's number} of ours, where that can be.

    Args:
        turns: holds ours by name, as :func:`take_turns` takes them.
        count: how many copies there are: each has a graph.
        check: called with a label and the replay for copy 0, raises where the result is wrong.
        tables: whether a call hands a table of matrices to the device.
    """
    added = {}
    for name, backend in args.ours.items():
        label = f"{name}, graph"
        calls = [functools.partial(turns[name], i) for i in range(count)]
        made = graphs(args.device, backend, calls, report, {**about, "name": label}, tables)
        if made:
            check(label, made[0].replay)
            added[label] = lambda i, made=made: made[i].replay()
    return added


def as_words(tensor):
    """A contiguous tensor's memory as int32; an odd 16-bit element at its end is left out."""
    flat = tensor.view(-1)
    per_word = 4 // flat.element_size()
    return flat[: flat.numel() // per_word * per_word].view(torch.int32)


def synchronize(device):
    """Wait until the device has done all that was queued."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def stopped(device, call, *args, **options):
    """(what the call returns, wall-clock seconds until the device has done it)."""
    synchronize(device)
    begin = time.perf_counter()
    result = call(*args, **options)
    synchronize(device)
    return result, time.perf_counter() - begin


def rotation(num_bytes, device, at_least=1):
    """How many copies of a matrix leave none of them in a cache when its turn comes."""
    if device.type == "cpu":
        wanted = ROTATED_ON_CPU
    else:
        properties = torch.get_device_module(device).get_device_properties(device)
        wanted = 4 * (getattr(properties, "L2_cache_size", 0) or 64 << 20)
    return max(at_least, -(-wanted // max(num_bytes, 1)))


def machine(device):
    """Device, versions, commit and date: what a row must be read with."""
    on_cpu = {"isa": cpu.isa() if cpu.ISAS else None, "threads": torch.get_num_threads()}
    return {
        "device": _processor() if device.type == "cpu" else _gpu(device),
        **(on_cpu if device.type == "cpu" else _about_gpu(device)),
        "antidote_fast": __version__,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit():
    """What git calls this tree; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def version(name):
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device):
    return torch.get_device_module(device).get_device_name(device)


def _about_gpu(device):
    properties = torch.get_device_module(device).get_device_properties(device)
    return {
        "processors": getattr(properties, "multi_processor_count", None),
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "triton": version("triton"),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Report:
    """Rows of one benchmark: shown as they come, written where the options say."""

    def __init__(self, name, args):
        self.name, self.args, self.rows = name, args, []

    def add(self, row):
        """Show a row on one line, and keep it."""
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        self.rows.append(row)
        if self.args.rows:
            with open(self.args.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps({"benchmark": self.name, **row}) + "\n")

    def note(self, **what):
        """A row that holds no time: what could not be measured, and why."""
        self.add({"note": True, **what})

    def finish(self):
        """Write the rows beside the machine's description where ``--save`` asks for it."""
        if not self.args.save:
            return
        RESULTS.mkdir(exist_ok=True)
        about = machine(self.args.device)
        name = self.name
        if self.args.device.type != "cpu":
            name += "-" + re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        path = RESULTS / f"{name}.json"
        contents = {"benchmark": self.name, **about, "rows": self.rows}
        path.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"wrote {path.name}", file=sys.stderr)
