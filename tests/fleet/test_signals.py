"""Fleets that are told to stop, or killed, in processes of their own; then they go on."""

import signal

import fleets
import forked
import pytest
from fleets import KINDS, config, summary_of, weights_of

from antidote_fast.files.manifest import verify_folder
from antidote_fast.fleet import fleet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


_SLOW = """
import sys, time
from antidote_fast import cli
from antidote_fast.fleet import worker
real = worker.Worker._add_norms
def slow(self, read):
    print(read.job.name, flush=True)
    time.sleep(0.5)
    return real(self, read)
worker.Worker._add_norms = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def slow_fleet(folders, out):
    words = [
        *("fleet", "--base", folders.base, "--manifest", folders.root / "jobs.jsonl"),
        *("--dataset", folders.root / "harmful.jsonl", "--output_dir", out, "--ratio", "0.3"),
    ]
    return forked.Process(_SLOW, *words)


def begun(process, count):
    return [process.stdout.readline().strip() for _ in range(count)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_job_in_work_finish(number, folders, tmp_path):
    out = tmp_path / "out"
    process = slow_fleet(folders, out)
    names = begun(process, 3)
    assert names == list(KINDS)[:3]
    process.send_signal(number)
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    counts = summary_of(out)["counts"]
    assert counts["done"] == 3
    assert counts["left"] == len(KINDS) - 3
    assert f"interrupted with {counts['left']} of {len(KINDS)} jobs left" in err
    assert f"3 of {len(KINDS)} adapters pruned" in stdout
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(names)
    report = fleet.run(config(folders, out))
    assert [job["status"] for job in report["jobs"]] == ["skipped"] * 3 + ["done"] * (
        len(KINDS) - 3
    )


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(folders, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    for count in (2, 4):
        process = slow_fleet(folders, out)
        begun(process, count)
        process.kill()
        process.communicate(timeout=60)
        for path in out.iterdir():
            assert not path.is_dir() or path.name.startswith(".") or verify_folder(path) == []
    fleet.run(config(folders, out))
    fleet.run(config(folders, whole))
    for name in KINDS:
        assert verify_folder(out / name) == []
        assert weights_of(out / name) == weights_of(whole / name)
