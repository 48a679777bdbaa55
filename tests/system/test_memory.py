"""Sizes as people write them, and the memory that is left, from files as Linux writes them."""

import json
import mmap
import struct
from pathlib import Path

import pytest
import torch

from antidote_fast.errors import UsageError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.system.memory import available_memory, format_bytes, parse_bytes, resident_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4_000_000_000),
        ("4 gb", 4_000_000_000),
        ("4GiB", 4 * GIB),
        ("512MB", 512_000_000),
        ("512mib", 512 << 20),
        ("1.5G", 1_500_000_000),
        (".5kB", 500),
        ("2T", 2_000_000_000_000),
        ("123", 123),
        (123, 123),
        ("9007199254740993", 9007199254740993),  # no float holds it
        ("17B", 17),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "max_memory") == size


@pytest.mark.parametrize("text", ["", "GB", "4 GBs", "-4GB", "4,5GB", "1e9", "nan", True, None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match=r"max_memory=.*must be a size such as 4GB") as error:
        parse_bytes(text, "max_memory")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0001B"])
def test_a_size_of_nothing_is_refused(text):
    with pytest.raises(UsageError, match=r"max_memory=.*must be greater than 0"):
        parse_bytes(text, "max_memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_536_000, "1.54 MB"),
        (13_476_839_424, "13.5 GB"),
        (999_700_000, "1 GB"),
        (140_000_000_000, "140 GB"),
        (2_500_000_000_000, "2.5 TB"),
        (2_500_000_000_000_000, "2,500 TB"),
    ],
)
def test_sizes_are_written(size, text):
    assert format_bytes(size) == text


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def _machine(tmp_path, available, cgroup):
    """(proc, cgroups) of a machine with this MemAvailable and this /proc/self/cgroup."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    meminfo = f"MemTotal: 999999999 kB\nMemFree: 1 kB\nMemAvailable:   {available >> 10} kB"
    _write(proc / "meminfo", meminfo)
    _write(proc / "self" / "cgroup", cgroup)
    return {"proc": proc, "cgroups": cgroups}


def _v2(folder, limit, usage, cached=0):
    _write(folder / "memory.max", limit)
    _write(folder / "memory.current", usage)
    _write(folder / "memory.stat", f"anon 5\ninactive_file {cached}\nactive_file 7\nfile 99")


def _v1(folder, limit, usage, cached=0):
    _write(folder / "memory.limit_in_bytes", limit)
    _write(folder / "memory.usage_in_bytes", usage)
    _write(folder / "memory.stat", f"cache 9\ntotal_inactive_file {cached}\ntotal_active_file 3")


def test_the_machine_alone_counts_where_no_cgroup_has_a_limit(tmp_path):
    machine = _machine(tmp_path, 6 * GIB, "0::/job")
    _v2(tmp_path / "cgroup" / "job", "max", 5 * GIB)
    assert available_memory(**machine) == 6 * GIB


def test_a_cgroup_leaves_its_limit_less_what_is_used_and_not_cache(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "0::/job")
    _v2(tmp_path / "cgroup" / "job", 8 * GIB, 5 * GIB, cached=2 * GIB)
    assert available_memory(**machine) == 5 * GIB + 7


def test_a_limit_above_the_machine_does_not_count(tmp_path):
    machine = _machine(tmp_path, 4 * GIB, "0::/job")
    _v2(tmp_path / "cgroup" / "job", 8 * GIB, GIB)
    assert available_memory(**machine) == 4 * GIB


def test_the_tightest_cgroup_above_counts(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "0::/slurm/job_7/step_0")
    _v2(tmp_path / "cgroup" / "slurm" / "job_7" / "step_0", "max", GIB)
    _v2(tmp_path / "cgroup" / "slurm" / "job_7", 4 * GIB, GIB)
    _v2(tmp_path / "cgroup" / "slurm", 32 * GIB, GIB)
    assert available_memory(**machine) == 3 * GIB + 7


def test_in_a_container_the_root_of_the_mount_counts(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "0::/../../kubepods/pod1/abc")
    _v2(tmp_path / "cgroup", 2 * GIB, GIB)
    assert available_memory(**machine) == GIB + 7


def test_the_first_version_of_cgroups_counts(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "9:cpu:/a\n4:cpuset,memory:/docker/abc\n0::/")
    _v1(tmp_path / "cgroup" / "memory" / "docker" / "abc", 8 * GIB, 3 * GIB, cached=GIB)
    _v1(tmp_path / "cgroup" / "memory", 9223372036854771712, 30 * GIB)
    assert available_memory(**machine) == 6 * GIB + 3


def test_the_unified_side_of_a_mixed_machine_counts(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "4:memory:/\n0::/job")
    _v2(tmp_path / "cgroup" / "unified" / "job", 8 * GIB, 2 * GIB)
    assert available_memory(**machine) == 6 * GIB + 7


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path):
    machine = _machine(tmp_path, 64 * GIB, "0::/job")
    _v2(tmp_path / "cgroup" / "job", GIB, 2 * GIB)
    assert available_memory(**machine) == 0


def test_a_machine_without_cgroups_says_what_it_has(tmp_path):
    machine = _machine(tmp_path, 6 * GIB, "0::/gone")
    (machine["proc"] / "self" / "cgroup").unlink()
    assert available_memory(**machine) == 6 * GIB


def test_elsewhere_psutil_says_it(tmp_path):
    psutil = pytest.importorskip("psutil")
    here = available_memory(proc=tmp_path)
    assert 0 < here <= psutil.virtual_memory().total
    assert resident_bytes(proc=tmp_path) == pytest.approx(resident_bytes(), rel=0.05)


def test_a_file_that_no_memory_holds_is_looked_at_and_read_in_part(tmp_path):
    total = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    rows = (2 * total) // 8192
    shapes = {"model.layers.0.q_proj.weight": (4, 8), "model.layers.1.q_proj.weight": (rows, 4096)}
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        offsets = [position, position + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(torch.arange(32).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + position)  # the rest takes no room
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    first = checkpoint.read(["model.layers.0.q_proj.weight"])["model.layers.0.q_proj.weight"]
    assert first.flatten().tolist() == list(range(32))
    assert len(checkpoint.fingerprint()) == 32


def test_this_process_holds_what_it_took():
    before, size = resident_bytes(), 64 << 20
    with mmap.mmap(-1, size) as taken:  # not of the heap, which may have kept as much
        taken.write(b"x" * size)
        assert resident_bytes() - before >= 0.9 * size
    assert available_memory() > 0
