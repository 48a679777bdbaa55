"""What only a GPU can tell, in one call under ten minutes: build, tests, sanitizers, benchmarks.

    make gpu-check            or: python benchmarks/gpu_check.py --out build/gpu-check.json

Both backends for GPUs take part, ``cuda`` and ``triton``. Each step has a time limit and the next
one runs whatever became of it; what the time for all steps does not reach is skipped, and said to
be. ``--only norms linear`` runs the steps whose names hold one of these words. The one file that is
written holds the device, versions, each step's status and last output, and every benchmark's rows;
it is written again after each step. Exits with 1 where a step failed, with 2 where there is no GPU.
Needs no network and no virtual environment.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL = 6000  # characters of a step's output that are kept
BUDGET = 570  # seconds in all
CASES = ("tensor", "preserve", "base", "2:4", "mask")
BACKENDS = ("cuda", "triton")
WIDTHS = (1000, 4096, 28672)  # of weights on a GPU, beside small ones


@dataclass
class Step:
    """One command; ``rows`` is whether it is a benchmark that writes rows."""

    name: str
    command: list
    limit: int
    rows: bool = False
    environment: dict = field(default_factory=dict)


def python(*words):
    return [sys.executable, *map(str, words)]


def benchmark(name, limit, *words):
    """A step that runs ``bench_<name>.py``."""
    label = " ".join([name, *words])
    return Step(label, python(f"benchmarks/bench_{name}.py", *words), limit, rows=True)


def steps():
    """What runs on a GPU, in this order: what is wrong shows before what is slow."""
    both = ("--backends", *BACKENDS)
    cases = ("--shape", "4096x4096", "14336x4096", "--ratio", "0.05", "--runs", "20")
    one = ("--shape", "4096x4096", "--ratio", "0.05")
    few = ("--ratio", "0.01", "0.05", "--runs", "8")
    return [
        build(),
        tests("cuda", 100, "test_cuda", "test_ops", "test_fusion"),
        tests("triton", 140, "test_triton"),
        *(ops_step(backend, 60) for backend in BACKENDS),
        sanitizer("memcheck", "cuda", 60),
        sanitizer("racecheck", "cuda", 70),
        sanitizer("synccheck", "cuda", 40),
        benchmark("shared_atomics", 40),
        benchmark("prune", 110, "--quick", *both),
        benchmark("prune", 60, "--case", *CASES, *cases, *both),
        benchmark("prune_many", 50, "--graph", "--ratio", "0.05", *both),
        benchmark("prune_many", 60, "--model", "--graph", *few, *both),
        benchmark("norms", 30, *both),
        benchmark("linear", 30, "--graph", *both),
        benchmark("fusion", 30),
        benchmark("oneshot", 120, "--rounds", "2"),
        benchmark("prune", 60, *one, "--graph", "--compile", *both),
        sanitizer("memcheck", "triton", 120),
    ]


def dry_steps():
    """The same code on tiny tensors, on the CPU with interpreted kernels where Triton is there."""
    backend = "triton" if interpretable() else "reference"
    chosen = ("--device", "cpu", "--backend", backend)
    tiny = ("--runs", "2", "--rotated", "2", *chosen)
    many = ("--shrink", "512", "--rank", "2", "--layers", "1", "--ratio", "0.1")
    several = ("--device", "cpu", "--backends", "cuda", "reference", "--rotated", "2")
    one = ("--shape", "4x64", "--ratio", "0.1", *tiny)
    last = ("--rounds", "1", "--targets", "qkv")
    listed = [
        ops_step(backend, 120, "cpu"),
        benchmark("prune", 120, "--case", "row", *CASES, *one),
        benchmark("prune_many", 60, "--adapter", "qkv", *many, *tiny),
        benchmark("prune_many", 60, "--model", *many, "--runs", "2", *several),
        benchmark("norms", 60, "--shape", "8x64", *tiny),
        benchmark("linear", 60, "--tokens", "8", *one),
        benchmark("fusion", 60, "--shape", "8x64", *tiny),
        benchmark("oneshot", 60, "--model", "tiny", "--num_sequences", "2", *chosen, *last),
    ]
    for step in listed:
        step.environment["TRITON_INTERPRET"] = "1"
    return listed


def build():
    """Install into the environment that runs this; the extensions alone where pip refuses."""
    pip = f"{sys.executable} -m pip install -q --no-build-isolation --no-deps -e ."
    step = Step("build", ["sh", "-c", f"{pip} || {sys.executable} setup.py -q build_ext -i"], 150)
    if "ANTIDOTE_CUDA_ARCHS" not in os.environ:  # the time is better spent than on other GPUs
        step.environment["ANTIDOTE_CUDA_ARCHS"] = architecture()
    return step


def architecture():
    """The GPU's compute capability as the compilers write it, such as "90"."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def tests(name, limit, *beginnings):
    """Test files by how their names begin; what needs no GPU, ahead-of-time compiling, is not."""
    options = ["-q", "-p", "no:cacheprovider", "--durations", "5"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8"]  # kernels compile on the host, side by side
    found = (ROOT / "tests").rglob("test_*.py")
    files = [f.relative_to(ROOT) for f in sorted(found) if f.name.startswith(beginnings)]
    files = [file for file in files if not file.stem.endswith("_compile")]
    return Step(f"tests {name}", python("-m", "pytest", *options, *files), limit)


def ops_step(backend, limit, device="cuda"):
    """Every op once with one backend."""
    words = ("--ops", device, "--backend", backend)
    return Step(f"ops {backend}", python("benchmarks/gpu_check.py", *words), limit)


def sanitizer(tool, backend, limit):
    """A tool of compute-sanitizer over every op.

    PyTorch's caching allocator would hide a read past the end.
    """
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    step = ops_step(backend, limit)
    step.name = f"{tool} {backend}"
    step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    step.command = [found, *options, *step.command] if os.access(found, os.X_OK) else []
    return step


def run(step, left, folder):
    """A step's record; what it starts ends with it."""
    record = {"name": step.name, "command": " ".join(map(str, step.command))}
    if not step.command:
        return {**record, "status": "skipped", "why": "compute-sanitizer is not installed here"}
    if left < 10:
        return {**record, "status": "skipped", "why": "the time for all steps is used up"}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environment}
    command = list(map(str, step.command))
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    if step.rows:
        command += ["--rows", str(rows)]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=min(step.limit, left))
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "timed out"
    record |= {
        "status": status,
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - begin, 1),
        "tail": output[-TAIL:],
    }
    if step.rows and rows.exists():
        record["rows"] = [json.loads(line) for line in rows.read_text().splitlines()]
    return record


def ops(device, backend):
    """Every op once on small odd shapes, with one backend, against the reference on the CPU."""
    import torch

    from antidote_fast import (
        Selection,
        accumulate_sq_norm_,
        apply_mask_,
        prune_linear_,
        prune_many_,
        prune_mask,
        select_mask,
    )
    from antidote_fast import score as score_op

    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns, dtype=torch.bfloat16):
        return torch.randn(rows, columns, generator=generator).to(dtype)

    def norm_of(columns):
        return torch.rand(columns, generator=generator)

    def there(tensors):
        return [tensor.to(device) for tensor in tensors]

    shapes = [(3, 64), (5, 37)]
    if device == "cuda":
        shapes += [(3, columns) for columns in WIDTHS]
    selections = [
        Selection(0.1),
        Selection(0.3, largest=False),
        Selection(0.1, scope="tensor"),
        Selection(n_m=(2, 4)),
        Selection(0.1, score_delta=True),
        Selection(0.1, scope="global"),
    ]
    for selection in selections:
        for dtype in (torch.bfloat16, torch.float32)[: 2 if selection is selections[0] else 1]:
            weights = [matrix(*shape, dtype) for shape in shapes]
            norms = [norm_of(w.shape[1]) for w in weights]
            bases = [matrix(*shape, dtype) for shape in shapes]
            preserved = None if selection.n_m else [n.flip(0) for n in norms]
            results = []
            for name, place in ((backend, there), ("reference", list)):
                copies = place([w.clone() for w in weights])
                _, masks = prune_many_(
                    copies,
                    place(norms),
                    selection,
                    preserve_norms=preserved and place(preserved),
                    base_weights=place(bases),
                    return_mask=True,
                    backend=name,
                )
                results.append(([c.cpu() for c in copies], [m.bits.cpu() for m in masks]))
            for ours, expected in zip(*results, strict=True):
                assert all(map(torch.equal, ours, expected)), (selection, dtype)
    for shape in shapes:
        weight, base, norm = matrix(*shape), matrix(*shape), norm_of(shape[1])
        moved, moved_base, moved_norm = there([weight, base, norm])
        scores = score_op(moved, moved_norm, base_weight=moved_base, backend=backend)
        expected = score_op(weight, norm, base_weight=base, backend="reference")
        assert torch.equal(scores.cpu(), expected)
        mask = select_mask(scores, Selection(0.2), backend=backend)
        same = select_mask(expected, Selection(0.2), backend="reference")
        assert torch.equal(mask.bits.cpu(), same.bits)
        mask = prune_mask(moved, None, Selection(0.2), backend=backend)
        same = prune_mask(weight, None, Selection(0.2), backend="reference")
        assert torch.equal(mask.bits.cpu(), same.bits)
        apply_mask_(moved, mask, backend=backend)
        apply_mask_(weight, same, backend="reference")
        assert torch.equal(moved.cpu(), weight)
        sums = accumulate_sq_norm_(torch.zeros_like(moved_norm), moved_base, backend=backend)
        wanted = base.double().square().sum(0)
        torch.testing.assert_close(sums.cpu().double(), wanted, rtol=1e-6, atol=0)
        options = {"return_norm": True, "backend": backend}
        _, norm = prune_linear_(moved, moved_base, Selection(0.3), **options)
        torch.testing.assert_close(norm.cpu().double(), wanted.sqrt(), rtol=1e-6, atol=0)
        prune_many_([weight], [norm.cpu()], Selection(0.3), backend="reference")
        assert torch.equal(moved.cpu(), weight)
    print(f"{backend}: every op gives the reference's bits on {device}")


def interpretable():
    """Whether the Triton backend can run on CPU tensors here, under its interpreter."""
    found = importlib.util.find_spec("triton")
    return bool(found) and importlib.util.find_spec("antidote_fast.backends.triton") is not None


def no_gpu():
    """Why there is no GPU to check, in a line; None where there is one."""
    if not importlib.util.find_spec("torch"):
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False"


def about(dry):
    """Device and versions, of this process; a broken build must not stop the record."""
    try:
        import torch

        sys.path.insert(0, str(ROOT / "benchmarks"))
        import common

        return common.machine(torch.device("cpu" if dry else "cuda"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check.json")
    options.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU")
    options.add_argument("--only", nargs="+", help="steps whose name holds one of these")
    options.add_argument("--ops", choices=["cpu", "cuda"], help="check the ops, nothing else")
    options.add_argument("--backend", default="cuda", help="with --ops")
    args = options.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if args.ops:
        return ops(args.ops, args.backend)
    reason = None if args.dry_run else no_gpu()
    if reason:
        print(f"gpu-check: there is no GPU here: {reason}")
        return 2
    begin = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for step in dry_steps() if args.dry_run else steps():
            if args.only and not any(word in step.name for word in args.only):
                continue
            records.append(run(step, BUDGET - (time.perf_counter() - begin), Path(folder)))
            _show(records[-1])
            _write(args, records, begin)
    wrong = [record["name"] for record in records if record["status"] in ("failed", "timed out")]
    print(f"gpu-check: {len(records) - len(wrong)} of {len(records)} steps did not fail")
    return 1 if wrong else 0


def _show(record):
    line = f"{record['status']:>9}  {record['name']}  {record.get('seconds', 0)} s"
    print(line + (f"  ({record['why']})" if "why" in record else ""), flush=True)
    if record["status"] in ("failed", "timed out"):
        print(record["tail"][-1500:], flush=True)


def _write(args, records, begin):
    contents = {
        **about(args.dry_run),
        "dry_run": args.dry_run,
        "seconds": round(time.perf_counter() - begin, 1),
        "steps": records,
    }
    args.out.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
