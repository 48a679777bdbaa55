"""Compiles every Triton kernel that the backend launches, for GPUs that are not there.

    python tests/support/aot.py [--all] [--arch 80 90] [--json FILE]

The backend is called as on a GPU, on empty CPU tensors of real models' shapes, and each launch is
recorded instead of made: Triton's own binder says which signature, constants and alignments that
launch would have. Then each is compiled, and read: registers, stack and shared memory from
``cuobjdump``, instructions from the PTX. Exits with 1 where a kernel breaks a rule of
:func:`problems`. No GPU is needed; ``triton.compile`` refuses only a process that interprets.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from aot_calls import calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from antidote_fast.backends.triton_kernels import launch

ARCHES = (80, 90)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}  # bytes a program: of sm_86 and sm_89 as well
REGISTERS = 64 * 1024  # of a multiprocessor
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
# What approximates by definition; it places pivots, and never makes a score.
APPROXIMATE = ("sqrt.approx", "rcp.approx", "ex2.approx", "rsqrt.approx", "div.full")


class Recorder:
    """Stands in for ``launch.run`` and keeps each different launch once."""

    def __init__(self, arches=ARCHES):
        self.arches = arches
        self.launches = {}
        self.calls = 0
        self.label = ""

    def run(self, kernel, grid, *args, device, num_warps, max_registers=None, **constants):
        """As ``launch.run``, but only keeps what would be compiled."""
        self.calls += 1
        options = {**OPTIONS, "num_warps": num_warps}
        if max_registers is not None:
            options["maxnreg"] = max_registers
        for arch in self.arches:
            target = GPUTarget("cuda", arch, 32)
            backend = make_backend(target)
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            keywords = {**constants, **options}
            bound, specialization, rest = bind(*args, **keywords)
            parsed, signature, constexprs, attrs = kernel._pack_args(
                backend, keywords, bound, specialization, rest
            )
            key = (kernel.fn.__module__, kernel.fn.__name__, arch, str(specialization), str(parsed))
            if key in self.launches:
                continue
            source = ASTSource(kernel, signature, constexprs, attrs)
            described = {
                "kernel": kernel.fn.__name__,
                "topic": kernel.fn.__module__.rpartition(".")[2],
                "arch": arch,
                "num_warps": num_warps,
                "constants": {name: _plain(value) for name, value in constants.items()},
                "first_call": self.label,
            }
            self.launches[key] = (described, source, target, options)


def record(named_calls, arches=ARCHES):
    """({key: launch} of everything that the calls launch, labels of calls that launch nothing)."""
    recorder, silent = Recorder(arches), []
    usual, launch.run = launch.run, recorder.run
    try:
        for recorder.label, call in named_calls:
            before = recorder.calls
            call()
            if recorder.calls == before:
                silent.append(recorder.label)
    finally:
        launch.run = usual
    return recorder.launches, silent


def compile_all(launches, processes=2):
    """A row for each launch: what was recorded, and what the compiler made of it."""
    global _work  # forked children read it: kernels and their sources do not pickle
    _work = list(launches.values())
    # The slowest first, so that no process is left alone with one at the end.
    order = sorted(range(len(_work)), key=lambda i: -_size(_work[i][0]))
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        rows = dict(zip(order, pool.map(_compile, order), strict=True))
    return [rows[i] for i in range(len(_work))]


def _compile(index):
    described, source, target, options = _work[index]
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # one kernel that does not compile is a row, not the end
        return {**described, "error": f"{type(error).__name__}: {error}"[:2000]}
    cubin = compiled.asm["cubin"]
    usage = {n: int(v) for n, v in re.findall(r"\b([A-Z]+):(\d+)", _read(cubin, "-res-usage"))}
    spilled = usage["STACK"] or usage["LOCAL"]
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"\bld\.global\S*", ptx)
    return {
        **described,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", _read(cubin, "-sass"))) if spilled else 0,
        "shared": usage["SHARED"] + compiled.metadata.shared,
        "fma": sorted(set(re.findall(r"\bfma\.\S*f32\b", ptx))),
        "ftz": sorted(
            name
            for name in set(re.findall(r"\b[a-z][\w.]*\.ftz\S*", ptx))
            if not name.startswith(APPROXIMATE)
        ),
        "loads": len(loads),
        "loads_of_16": sum(_bytes(name) == 16 for name in loads),
        "loads_of_8": sum(_bytes(name) == 8 for name in loads),
    }


def _bytes(instruction):
    """How many bytes a thread's vector load takes; 0 where it is no vector."""
    found = re.search(r"\.v(\d)\.[a-z]+(\d+)$", instruction)
    return int(found[1]) * int(found[2]) // 8 if found else 0


def _read(cubin, what):
    """What ``cuobjdump`` says of a compiled kernel; it comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def problems(row):
    """What is wrong with a compiled kernel, one line each; empty where nothing is.

    No registers in memory; shared memory that the GPU has; a score that is one multiply, rounded
    once, denormals kept; loads of 16 bytes where the constants say ``VEC`` (8 are enough where a
    thread holds no more).
    """
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spills"] or row["local"]:  # a stack that no instruction touches does no harm
        found.append(
            f"spills: {row['stack']} bytes of stack, {row['local']} local, "
            f"{row['spills']} instructions that store or load them"
        )
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"takes {row['shared']} bytes of shared memory")
    if row["registers"] * 32 * row["num_warps"] > REGISTERS:
        found.append(f"takes {row['registers']} registers in {row['num_warps']} warps")
    if row["fma"]:
        found.append(f"fuses multiply-add: {', '.join(row['fma'])}")
    if row["ftz"]:
        found.append(f"flushes denormals: {', '.join(row['ftz'])}")
    for name, values in _vector_tiles(row):
        if not row["loads_of_16"] and (values >= 8 or not row["loads_of_8"]):
            found.append(f"{name}, but none of its {row['loads']} loads takes 16 bytes")
    return found


def _vector_tiles(row):
    """(the constant that promises vectors, values a thread) of each tile of a kernel."""
    constants = row["constants"]
    for name in constants:
        part = name.removeprefix("VEC")  # "_SHORT", where a kernel has several kinds of tile
        groups = constants.get(f"G{part}", constants.get("GROUPS"))
        if not name.startswith("VEC") or not constants[name] or groups == 0:
            continue
        values = 8 * groups * constants.get(f"R{part}", 1) if groups else 1 << 20
        yield name, values // (32 * row["num_warps"])


def title(row):
    """The kernel with its constants, such as ``prune_rows_kernel(R=1, G=512) 8 warps, sm_90``."""
    constants = ", ".join(f"{name}={value}" for name, value in row["constants"].items())
    return f"{row['kernel']}({constants}) {row['num_warps']} warps, sm_{row['arch']}"


def table(rows):
    """Lines: kernel, constants, architecture, registers, shared memory, programs at once on a
    processor, loads of 16 and of 8 bytes among all."""
    head = (
        "kernel",
        "constants",
        "warps",
        "sm",
        "registers",
        "shared",
        "programs",
        "16+8 B/loads",
        "for",
    )
    lines = [head]
    for row in sorted(rows, key=lambda r: (r["topic"], r["kernel"], r["arch"], -_size(r))):
        constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
        start = (row["kernel"], constants, row["num_warps"], row["arch"])
        if "error" in row:
            lines.append((*start, "error", "", "", "", row["first_call"]))
            continue
        wide = f"{row['loads_of_16']}+{row['loads_of_8']}/{row['loads']}"
        end = (row["registers"], row["shared"], _programs(row), wide, row["first_call"])
        lines.append((*start, *end))
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(head))]
    return [
        "  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True))
        for line in lines
    ]


def _programs(row):
    """How many programs a multiprocessor holds at once, by registers and shared memory."""
    registers = -(-row["registers"] // 8) * 8 * 32 * row["num_warps"]
    by_shared = SHARED_LIMIT[row["arch"]] // max(row["shared"], 1)
    return min(REGISTERS // max(registers, 1), by_shared, 64 // row["num_warps"], 32)


def _size(described):
    """How long a kernel takes to compile, roughly: its tile."""
    size = 1
    for name, value in described["constants"].items():
        if name in ("R", "G", "BLOCK_SIZE") and isinstance(value, int):
            size *= max(value, 1)
    return size


def _plain(value):
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--all", action="store_true", help="every shape and option; minutes")
    options.add_argument("--arch", type=int, nargs="+", default=ARCHES, choices=ARCHES)
    options.add_argument("--json", type=Path, help="write the rows there too")
    options.add_argument("--calls", help="module:function of other calls to record")
    args = options.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: kernels cannot be compiled in such a process")
    made = calls(every=args.all)
    if args.calls:
        module, _, name = args.calls.partition(":")
        made = getattr(__import__(module), name)()
    with torch.no_grad():
        launches, silent = record(made, args.arch)
    rows = compile_all(launches)
    print("\n".join(table(rows)))
    wrong = [f"{title(row)}: {problem}" for row in rows for problem in problems(row)]
    wrong += [f"{label}: nothing went through launch.run" for label in silent]
    for line in wrong:
        print(line, file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "problems": wrong}, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
