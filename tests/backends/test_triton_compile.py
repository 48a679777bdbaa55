"""Every Triton kernel, compiled ahead of time for sm_80 and sm_90: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "triton-kernels.txt"


def compiled(folder, *arguments):
    """(the finished process, what it wrote): Triton compiles in no process that interprets."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    found = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/aot.py", "--json", found, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done, json.loads(found.read_text()) if found.exists() else None


def test_every_kernel_keeps_the_rules(tmp_path):
    done, found = compiled(tmp_path)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(done.stdout)  # registers and shared memory; `make tests` prints it
    assert found is not None, done.stderr
    assert found["problems"] == []
    assert done.returncode == 0
    assert {row["arch"] for row in found["rows"]} == {80, 90}
    assert all(row["registers"] > 0 for row in found["rows"])
    assert any(row["loads_of_16"] for row in found["rows"])


def test_each_broken_rule_is_named(tmp_path):
    done, found = compiled(tmp_path, "--calls", "broken_kernels:calls", "--arch", "90")
    assert done.returncode == 1
    narrow, spills, fused, silent = found["problems"]
    assert "narrow_kernel" in narrow
    assert "none of its" in narrow
    assert "spilling_kernel" in spills
    assert "bytes of stack" in spills
    assert "fused_kernel" in fused
    assert "fuses multiply-add: fma.rn.f32" in fused
    assert silent == "silent: nothing went through launch.run"
    fine = found["rows"][0]
    assert fine["loads_of_16"] == fine["loads"] > 0
    labels = [row["first_call"] for row in found["rows"]]
    assert labels == ["one", "narrow", "spills", "fused"]  # "again" makes nothing new
