"""The thread model that runs CUDA code without a GPU: it is right, and it sees what is wrong.

``simt_toys.cu`` is compiled against ``csrc/simt`` with the flags of ``make sanitize``, and called
in processes of its own, which the sanitizers may end.
"""

import os
import shutil
import subprocess
from pathlib import Path

import filelock
import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    *("-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-ffp-contract=off"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-Wall", "-Werror", "-pthread", "-DANTIDOTE_SIMT", "-Icsrc"),
]
SCHEDULES = ["0", "1", "2", "3"]  # ascending, descending, two random ones
POISON = int.from_bytes(b"\xcb" * 4, "little", signed=True)
NAN = 0x7FFFFFFF  # of all arithmetic on a GPU


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Calls a toy: (name, variant, *schedules) -> the finished process."""
    if shutil.which("g++") is None:
        pytest.skip("csrc/simt is compiled with g++, which is not installed")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share one build
    program = folder / "simt-toys"
    with filelock.FileLock(str(program) + ".lock"):
        if not program.exists():
            unfinished = program.with_suffix(".unfinished")
            sources = ["tests/support/simt_toys.cu", *sorted(ROOT.glob("csrc/simt/*.cpp"))]
            command = ["g++", *FLAGS, "-x", "c++", *sources, "-o", unfinished]
            subprocess.run(command, cwd=ROOT, check=True)
            unfinished.rename(program)
    # A sanitizer that is preloaded into this process must not be loaded twice there.
    foreign = ("LD_PRELOAD", "ASAN_OPTIONS")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"

    def call(name, variant="", *schedules):
        command = [program, name, variant, *schedules]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return call


def results(done):
    """A list of integers for each line."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [[int(value) for value in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "expected", "report"),
    [
        ("past static", list(range(63, -1, -1)), "heap-buffer-overflow"),
        ("past dynamic", list(range(63, -1, -1)), "heap-buffer-overflow"),
        ("past global", list(range(64)), "heap-buffer-overflow"),
        ("vector", [5 + 8], "misaligned address"),
    ],
)
def test_sanitizers_see_bad_addresses(toys, name, expected, report):
    assert results(toys(name, "right")) == [expected]
    done = toys(name, "wrong")
    assert done.returncode != 0
    assert report in done.stderr
    assert "simt_toys.cu" in done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("barrier", list(range(63, -1, -1))),
        ("second barrier", [12] * 64),
        ("ties", [int(column in (40, 62)) for column in range(64)]),
        ("grid", [21] * 6),
    ],
)
def test_orders_of_threads_show_what_is_missing(toys, name, expected):
    assert results(toys(name, "right", *SCHEDULES)) == [expected] * len(SCHEDULES)
    wrong = results(toys(name, "wrong", *SCHEDULES))
    assert len(wrong) == len(SCHEDULES)
    assert any(each != expected for each in wrong)
    assert len({tuple(each) for each in wrong}) > 1  # seen without knowing the answer, too


def test_a_schedule_is_the_same_each_time(toys):
    seeds = [*SCHEDULES, "4", "2", "0"]
    count = [line[0] for line in results(toys("append", "", *seeds))]
    assert count == [64] * len(seeds)
    orders = [line[1:] for line in results(toys("append", "", *seeds))]
    assert orders[0] == orders[6] == list(range(64))
    assert orders[1] == list(range(63, -1, -1))
    assert orders[2] == orders[5]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_unwritten_shared_memory_is_poison(toys):
    assert results(toys("unwritten", "", *SCHEDULES)) == [[POISON, POISON]] * len(SCHEDULES)


def test_an_asynchronous_copy_arrives_when_it_is_waited_for(toys):
    assert results(toys("pipeline", "right")) == [[0, POISON, 1]]
    assert results(toys("pipeline", "wrong")) == [[POISON, POISON, 1]]


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        ("two barriers", ["threads 0-39 at __syncthreads in", "threads 40-63 at __syncthreads in"]),
        ("barrier and warp", ["0-39 at __syncthreads in", "40-63 at __syncwarp(0xffffffff) in"]),
        ("lane ended", ["threads 0-2 4-31 at __shfl_sync(0xffffffff)", "threads 3 ended"]),
        ("lane elsewhere", ["threads 0-2 4-31 at __ballot_sync", "threads 3 at __ballot_sync"]),
        ("masks differ", ["at __any_sync(0xffffffff)", "threads 3 at __any_sync(0x0000000f)"]),
        ("not in mask", ["__ballot_sync in simt_toys.cu:", "is not in its mask 0x0000000f"]),
        ("width", ["a shuffle of width 12"]),
        ("grid, a thread ended", ["block 1: threads 0-2 4-63 at grid_sync in", "threads 3 ended"]),
        ("grid, no cooperation", ["grid_sync in a launch that is not cooperative"]),
        ("spin", ["thread 3: threads spin and nobody gets on"]),
        ("trap", ["thread 3: __trap()"]),
        ("exception", ["an exception in device code: thrown"]),
        ("copy size", ["an asynchronous copy of 12 bytes"]),
        ("copy alignment", ["an asynchronous copy of 16 bytes with misaligned addresses"]),
        ("copy to global", ["an asynchronous copy to what is no shared memory"]),
        ("nested", ["a launch in device code"]),
        ("large shared", ["50000 bytes of static"]),
        ("nothing", ["fine"]),
        ("nothing, half ended", ["fine"]),
    ],
)
def test_what_cannot_go_on_fails_and_says_why(toys, how, messages):
    done = toys("fail", how, "0", "1", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        said, left, after = line.split(" | ")
        for message in messages:
            assert message in said
        assert left == "0 left"  # nothing stays on the stacks of a failed launch
        assert after == "then no error 63"


def test_impossible_launches_are_refused(toys):
    shapes = toys("refuse").stdout.splitlines()
    assert shapes == [
        "invalid launch: 1 blocks of 1025 threads and 0 bytes",
        "invalid launch: 1 blocks of 0 threads and 0 bytes",
        "invalid launch: 1 blocks of 1 threads and 232449 bytes",
        "invalid launch: 2147483648 blocks of 1 threads and 0 bytes",
        "too large to be cooperative: 65 blocks of 1 threads and 0 bytes",
    ]


def test_two_processor_threads_launch_at_once(toys):
    assert results(toys("two at a time", "", "2")) == [[1]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_operations(toys, schedule):
    lanes = range(32)
    each = {
        "shfl": [50] * 32,
        "shfl of 8": [10 * (i // 8 * 8 + (i + 9) % 8) for i in lanes],
        "up": [10 * (i - 3 if i >= 3 else i) for i in lanes],
        "up of 16": [10 * (i - 3 if i % 16 >= 3 else i) for i in lanes],
        "down": [10 * (i + 3 if i <= 28 else i) for i in lanes],
        "down of 16": [10 * (i + 3 if i % 16 <= 12 else i) for i in lanes],
        "xor": [2**40 + (i ^ 1) for i in lanes],
        "xor of 16": [10 * (i if i < 16 else i - 16) for i in lanes],
        "ballot": [sum(1 << i for i in lanes if i % 3 == 0)] * 32,
        "any": [1] * 32,
        "all": [1] * 32,
        "match": [0x0F0F0F0F if i // 4 % 2 == 0 else 0xF0F0F0F0 for i in lanes],
        "add": [sum(range(-20, 12)) + (32 << 33)] * 32,
        "min": [-20] * 32,
        "max": [11] * 32,
        "unsigned min": [0] * 32,
        "unsigned max": [2**32 - 1] * 32,
        "or": [15] * 32,
        "and": [0xE0 | 0x10] * 32,
        "xor of all": [0] * 32,
        "two masks": [15] * 16 + [31] * 16,
        "source outside the mask": [POISON] * 16 + [0] * 16,
        "block count, or": [11 + 100] * 32,
        "block or, and": [0 + 10 + 0] * 32,
    }
    found = results(toys("lanes", "", schedule))
    assert dict(zip(each, found, strict=True)) == each


def test_atomics(toys):
    # The old value and the new one of add, max, max, min, min, or, and, xor, exch, cas, cas.
    steps = [12, 15, 15, 15, 15, 21, 21, 21, 21, 20, 20, 23, 23, 6, 6, 3, 3, 40, 40, 40, 40, 50]
    assert results(toys("atomics")) == [[*steps, 50, -1], [*steps, 50, 50], [*steps, 50, 50]]


def test_bits_and_numbers(toys):
    each = {
        "popc": [8, 9],
        "ffs": [0, 8, 41],
        "clz": [32, 31, 0, 64, 63],
        "brev": [0x80000000, 0x800F0000],
        "byte_perm": [0x77225500, 0x800000FF],
        "funnelshift": [0x28, 0x28000000, 6, 5],
        "mulhi": [3, 3],
        "NaN of mul, sub, add, sqrt, div, fma, double": [NAN] * 7,
        "abs of a NaN": [0x7FC12345],
        "-0, the root of 2": [0x80000000, 0x3FB504F3],
        "a denormal, infinity": [2, 0x7F800000],
        "one rounding": [0x33800000, 0x3F800000],
        "min, max": [1, 2**32 - 1, -1, 3],
        "min, max with a NaN": [0x40000000, 0x3F800000],
    }
    assert results(toys("numbers")) == [[value for values in each.values() for value in values]]
