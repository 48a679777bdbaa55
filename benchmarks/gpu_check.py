"""What only a GPU can tell, in one call under ten minutes: build, tests, sanitizer, benchmarks.

    make gpu-check            or: python benchmarks/gpu_check.py --out build/gpu-check.json

Each step has a time limit and the next one runs whatever became of it. The one file that is written
holds the device, versions, each step's status and last output, and every benchmark's rows; it is
written again after each step. Exits with 1 where a step failed, with 2 where there is no GPU.
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
    cases = ("--shape", "4096x4096", "14336x4096", "--ratio", "0.05", "--runs", "20")
    return [
        build(),
        Step("tests", python("-m", "pytest", *pytest_options(), *test_files()), 200),
        sanitizer(),
        benchmark("prune", 120, "--quick"),
        benchmark("prune", 120, "--case", *CASES, *cases),
        benchmark("prune_many", 60),
        benchmark("norms", 40),
        benchmark("fusion", 40),
        benchmark("oneshot", 150, "--rounds", "2"),
        benchmark("prune", 60, "--shape", "4096x4096", "--ratio", "0.05", "--compile"),
    ]


def dry_steps():
    """The same code on tiny tensors, on the CPU with interpreted kernels where Triton is there."""
    backend = "triton" if interpretable() else "reference"
    chosen = ("--device", "cpu", "--backend", backend)
    tiny = ("--runs", "2", "--rotated", "2", *chosen)
    many = ("--adapter", "qkv", "--ratio", "0.1", *tiny)
    one = ("--shape", "4x64", "--ratio", "0.1", *tiny)
    last = ("--rounds", "1", "--targets", "qkv")
    listed = [
        Step("ops", python("benchmarks/gpu_check.py", "--ops", "cpu"), 120),
        benchmark("prune", 120, "--case", "row", *CASES, *one),
        benchmark("prune_many", 60, "--shrink", "512", "--rank", "2", "--layers", "1", *many),
        benchmark("norms", 60, "--shape", "8x64", *tiny),
        benchmark("fusion", 60, "--shape", "8x64", *tiny),
        benchmark("oneshot", 60, "--model", "tiny", "--num_sequences", "2", *chosen, *last),
    ]
    for step in listed:
        step.environment["TRITON_INTERPRET"] = "1"
    return listed


def build():
    """Install into the environment that runs this; the extension alone where pip refuses."""
    pip = f"{sys.executable} -m pip install -q --no-build-isolation --no-deps -e ."
    return Step(
        "build", ["sh", "-c", f"{pip} || {sys.executable} setup.py -q build_ext --inplace"], 150
    )


def pytest_options():
    options = ["-q", "-p", "no:cacheprovider", "--durations", "5"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "6"]  # kernels compile on the host, side by side
    return options


def test_files():
    """Tests that say something about a GPU."""
    files = sorted((ROOT / "tests").glob("test_triton*.py"))
    files += [ROOT / "tests" / name for name in ("test_ops.py", "test_norms.py", "test_fusion.py")]
    return [path.relative_to(ROOT) for path in files if path.exists()]


def sanitizer():
    """memcheck over every op; PyTorch's caching allocator would hide a read past the end."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += ["--target-processes", "application-only"]
    if not os.access(tool, os.X_OK):
        command = []
    return Step(
        "memcheck",
        command and command + python("benchmarks/gpu_check.py", "--ops", "cuda"),
        150,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


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


def ops(device):
    """Every op once on small odd shapes, with the backend of this device, against the reference."""
    import torch

    from antidote_fast import (
        Selection,
        accumulate_sq_norm_,
        apply_mask_,
        prune_many_,
        prune_mask,
        select_mask,
    )
    from antidote_fast import score as score_op

    backend = "triton" if device == "cuda" or interpretable() else None
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns, dtype=torch.bfloat16):
        return torch.randn(rows, columns, generator=generator).to(dtype).to(device)

    shapes = [(3, 64), (5, 37)]
    if device == "cuda":
        shapes += [(4, 1000), (2, 4096), (2, 28672)]
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
            norms = [torch.rand(w.shape[1], generator=generator).to(device) for w in weights]
            bases = [matrix(*shape, dtype) for shape in shapes]
            preserved = None if selection.n_m else [n.flip(0) for n in norms]
            results = []
            for name in (backend, "reference"):
                copies = [w.clone() for w in weights]
                _, masks = prune_many_(
                    copies,
                    norms,
                    selection,
                    preserve_norms=preserved,
                    base_weights=bases,
                    return_mask=True,
                    backend=name,
                )
                results.append(([c.cpu() for c in copies], [m.bits.cpu() for m in masks]))
            for ours, expected in zip(*results, strict=True):
                assert all(map(torch.equal, ours, expected)), (selection, dtype)
    for shape in shapes:
        weight, base = matrix(*shape), matrix(*shape)
        norm = torch.rand(shape[1], generator=generator).to(device)
        scores = score_op(weight, norm, base_weight=base, backend=backend)
        assert torch.equal(scores, score_op(weight, norm, base_weight=base, backend="reference"))
        mask = select_mask(scores, Selection(0.2), backend=backend)
        assert mask == select_mask(scores, Selection(0.2), backend="reference")
        mask = prune_mask(weight, None, Selection(0.2), backend=backend)
        apply_mask_(weight, mask, backend=backend)
        assert int((weight == 0).sum()) >= mask.count() > 0
        sums = accumulate_sq_norm_(torch.zeros_like(norm), base, backend=backend)
        torch.testing.assert_close(sums.double(), base.double().square().sum(0), rtol=1e-6, atol=0)
    print(f"every op gives the reference's bits on {device} with {backend or 'the default'}")


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
    options.add_argument("--only", help="steps whose name holds this")
    options.add_argument("--ops", choices=["cpu", "cuda"], help="check the ops, nothing else")
    args = options.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if args.ops:
        return ops(args.ops)
    reason = None if args.dry_run else no_gpu()
    if reason:
        print(f"gpu-check: there is no GPU here: {reason}")
        return 2
    begin = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for step in dry_steps() if args.dry_run else steps():
            if args.only and args.only not in step.name:
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
