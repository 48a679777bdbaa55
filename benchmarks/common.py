"""What the benchmarks share: interleaved timing, the machine's description, rows on disk."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from antidote_fast import __version__
from antidote_fast.backends import cpu

RESULTS = Path(__file__).parent / "results"


def parser(description):
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument(
        "--save", action="store_true", help="write the rows to benchmarks/results/"
    )
    return options


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


def timed(call, *args):
    """Seconds that one call takes."""
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def machine():
    """Device, versions, commit and date: what a row must be read with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": _processor(),
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
        "antidote_fast": __version__,
        **{name: _version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(row):
    """One row on one line."""
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def finish(name, rows, save):
    """Write the rows beside the machine's description where asked for."""
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, **machine(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.name}", file=sys.stderr)
