"""Fleets on a local Ray: the same bits, poisoned jobs, a killed worker, a signal."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fleets
import offenders
import pytest
from fleets import KINDS, config, manifest, statuses, summary_of, weights_of

from antidote_fast import UsageError
from antidote_fast.errors import AntidoteError, JobsSetAside
from antidote_fast.files.manifest import verify_folder
from antidote_fast.fleet import fleet, ray_pool

ray = pytest.importorskip("ray", reason="ray is not installed (extra: ray)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray of this machine with two CPUs, for all tests of this file but the last."""
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


def on_ray(folders, out, jobs="jobs.jsonl", **options):
    return config(folders, out, jobs, engine="ray", **({"num_workers": 2} | options))


def test_two_actors_write_what_one_process_writes(folders, tmp_path):
    path = manifest(
        folders.root,
        *({"adapter": f"adapters/{name}"} for name in KINDS),
        {"adapter": "adapters/none"},
        name="ray.jsonl",
    )
    with pytest.raises(JobsSetAside, match=r"1 of 15 jobs are set aside, none first: .*no such"):
        fleet.run(on_ray(folders, tmp_path / "ray", path))
    fleet.run(config(folders, tmp_path / "local"))
    for name in KINDS:
        assert verify_folder(tmp_path / "ray" / name) == []
        assert weights_of(tmp_path / "ray" / name) == weights_of(tmp_path / "local" / name), name
    summary = summary_of(tmp_path / "ray")
    assert summary["counts"]["done"] == len(KINDS)
    assert json.loads((tmp_path / "ray/failed/none.json").read_text())["exit_code"] == 3
    with pytest.raises(JobsSetAside) as raised:
        fleet.run(on_ray(folders, tmp_path / "ray", path))
    assert raised.value.report["counts"]["skipped"] == len(KINDS)


def test_nothing_of_an_offender_reaches_the_next(tmp_path_factory, tmp_path):
    customers = offenders.make(tmp_path_factory)
    for name in ("before", "after"):
        fleets.as_prune(customers, name, tmp_path / "alone" / name)
    count = len(customers.says)
    with pytest.raises(JobsSetAside, match=f"{count} of {2 * count + 1} jobs"):
        fleet.run(on_ray(customers, tmp_path / "out", num_workers=1))
    offenders.check_fleet(customers, tmp_path / "out", tmp_path / "alone")


def actors():
    """Process ids of the actors that this process's Ray has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
                raylet = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                parent = Path(f"/proc/{raylet}/stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if title.startswith(b"ray::_Actor") and int(parent) == os.getpid():
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_killed_worker_loses_no_job(folders, tmp_path):
    names = [f"n{i}" for i in range(48)]
    path = manifest(
        folders.root,
        *(
            {"adapter": f"adapters/{kind}", "name": name}
            for name, kind in zip(names, 10 * list(KINDS), strict=False)
        ),
        name="many.jsonl",
    )
    out, killed = tmp_path / "out", []

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if any((out / name).exists() for name in names):
                for pid in actors()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    report = fleet.run(on_ray(folders, out, path))
    thread.join()
    assert len(killed) == 1
    assert set(statuses(report)) == set(names)
    assert len(report["jobs"]) == len(names)
    assert report["counts"]["failed"] == 0
    fleet.run(config(folders, tmp_path / "local"))
    for name, kind in zip(names, 10 * list(KINDS), strict=False):
        assert verify_folder(out / name) == []
        assert weights_of(out / name) == weights_of(tmp_path / "local" / kind)


def acting(act):
    """An actor that does ``act(self, jobs)``; a local class, so that Ray sends its code along."""

    class Acting(ray_pool._Actor):
        def run(self, jobs):
            return act(jobs) or super().run(jobs)

    return Acting


def test_a_job_that_kills_its_worker_is_set_aside(folders, tmp_path, monkeypatch):
    def die_of_dora(jobs):  # as of a fault in a kernel
        if any(job.name == "dora" for job in jobs):
            os._exit(1)

    monkeypatch.setattr(ray_pool, "_Actor", acting(die_of_dora))
    with pytest.raises(JobsSetAside, match=r"1 of 14 .* dora first: its worker died 3 times") as e:
        fleet.run(on_ray(folders, tmp_path / "out"))
    assert e.value.report["counts"] == {
        "jobs": 14,
        "done": 13,
        "skipped": 0,
        "failed": 1,
        "left": 0,
    }


def test_workers_that_all_die_end_the_fleet(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool, "_Actor", acting(lambda jobs: os._exit(1)))
    with pytest.raises(AntidoteError, match="workers died one after another"):
        fleet.run(on_ray(folders, tmp_path / "out"))


def test_a_full_disk_ends_the_fleet(folders, tmp_path, monkeypatch):
    full = [], ("AntidoteError", "No space left on device")
    monkeypatch.setattr(ray_pool, "_Actor", acting(lambda jobs: full))
    with pytest.raises(AntidoteError, match="No space left"):
        fleet.run(on_ray(folders, tmp_path / "out"))


def test_more_workers_than_the_cluster_has_are_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="num_workers=3: the Ray cluster has 2 CPUs"):
        fleet.run(on_ray(folders, tmp_path / "out", num_workers=3))


def test_without_ray_one_line_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AntidoteError, match=r"pip install 'antidote-fast\[ray\]'"):
        fleet.run(on_ray(folders, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_signal_on_the_command_line_stops_the_actors_between_jobs(folders, tmp_path):
    path = manifest(
        folders.root,
        *({"adapter": "adapters/plain", "name": f"s{i}"} for i in range(200)),
        name="long.jsonl",
    )
    out = tmp_path / "out"
    words = [
        *("fleet", "--base", folders.base, "--manifest", path, "--output_dir", out),
        *("--dataset", folders.root / "harmful.jsonl", "--ratio", "0.3"),
        *("--engine", "ray", "--num_workers", "1", "--device", "cpu"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "antidote_fast", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not (out / "s0").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    counts = summary_of(out)["counts"]
    assert 0 < counts["done"] < 200
    assert counts["done"] + counts["left"] == 200
    assert len([p for p in out.iterdir() if p.is_dir()]) == counts["done"]
