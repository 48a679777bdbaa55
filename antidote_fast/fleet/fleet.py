"""The fleet: thousands of adapters of one base, each pruned as ``prune`` would.

Re-runs are idempotent: what is done is skipped, what was set aside is tried again.
"""

import dataclasses
import functools
import time
from pathlib import Path

from antidote_fast.config.fleet import FleetConfig, parse_shard
from antidote_fast.errors import Interrupted, JobsSetAside
from antidote_fast.files.provenance import versions
from antidote_fast.fleet import folder
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.system import interrupts
from antidote_fast.system.memory import peak_memory_bytes
from antidote_fast.system.progress import count


def run(config: FleetConfig, *, progress=False) -> dict:
    """Do all jobs of the list that are not done.

    Each job's folder, ``output_dir/NAME``, is what ``prune`` writes for its adapter. A job that
    fails is set aside: ``output_dir/failed/NAME.json`` says why, in one line. ``summary.json``
    (``summary-i-of-n.json`` with shards) tells of every job.

    Args:
        config: the base, the list of jobs and the settings.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of the summary.

    Raises:
        JobsSetAside: all other jobs are done; ``report`` of the exception is the summary.
        Interrupted: a signal came; the job in work was finished first, and the same command goes
            on. It has a ``report`` too.
        DataError, UsageError: the list, the base or the fleet's data set is refused, or
            another fleet is at work in output_dir; no job was begun.
        AntidoteError: the disk is full.
    """
    jobs = read_jobs(config)
    shard = parse_shard(config.shard)
    jobs = jobs[shard[0] :: shard[1]]
    tally, engine = Tally(len(jobs)), _engine(config, jobs)
    with folder.locked(config.output_dir, shard), interrupts.remembered() as request:
        try:
            with count(tally.total, "fleet", progress) as show:
                for outcome in engine(lambda: request.made):
                    if outcome["status"] == "failed":
                        folder.set_aside(config.output_dir, outcome)
                    else:
                        folder.forget(config.output_dir, outcome["name"])
                    tally.add(outcome)
                    show(tally.finished, **tally.view())
        finally:
            # Also when the disk is full or the device failed, as far as there is room for it.
            report = _summary(config, tally)
            folder.write_json(folder.summary_path(config.output_dir, shard), report)
    _raise_what_is_left(config, report, request)
    return report


class Tally:
    """Counts of a fleet on its way, of ``total`` jobs."""

    def __init__(self, total):
        self.total, self.outcomes, self._begin = total, [], time.monotonic()
        self.counts = {"done": 0, "skipped": 0, "failed": 0}

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begin

    @property
    def finished(self) -> int:
        """Jobs that are done, were done before, or are set aside."""
        return sum(self.counts.values())

    def add(self, outcome):
        """Count one outcome of :meth:`Worker.run`."""
        self.outcomes.append(outcome)
        self.counts[outcome["status"]] += 1

    def view(self) -> dict:
        """What a progress view shows beside done and total."""
        worked = self.counts["done"] + self.counts["failed"]
        rate = worked / self.seconds if worked else 0.0
        left = self.total - self.finished
        return {
            "failed": self.counts["failed"],
            "skipped": self.counts["skipped"],
            "adapters_per_hour": round(3600 * rate),
            "eta_seconds": round(left / rate) if rate else None,
        }


def _engine(config, jobs):
    """A callable of ``stop`` that gives the jobs' outcomes; what all jobs need is checked here."""
    from antidote_fast.fleet import ray_pool
    from antidote_fast.fleet.worker import Worker

    if config.engine == "ray":
        ray_pool.check_installed()
    worker = Worker(config)
    worker.check_data(jobs)
    on_ray = functools.partial(ray_pool.run, config, jobs)
    return on_ray if config.engine == "ray" else functools.partial(worker.run, jobs)


def _summary(config, tally):
    worked, seconds = tally.counts["done"], tally.seconds
    return {
        "schema_version": folder.SCHEMA_VERSION,
        "stage": "fleet",
        "created": folder.now(),
        "versions": versions(),
        "config": dataclasses.asdict(config),
        "counts": {"jobs": tally.total, **tally.counts, "left": tally.total - tally.finished},
        "seconds": round(seconds, 3),
        "adapters_per_hour": round(3600 * worked / seconds, 1) if worked else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "jobs": tally.outcomes,
    }


def _raise_what_is_left(config, report, request):
    counts = report["counts"]
    if request.made and counts["left"]:
        error = Interrupted(
            f"interrupted with {counts['left']} of {counts['jobs']} jobs left; the same command "
            "goes on"
        )
    elif counts["failed"]:
        first = next(job for job in report["jobs"] if job["status"] == "failed")
        where = Path(config.output_dir) / folder.FAILED
        error = JobsSetAside(
            f"{counts['failed']} of {counts['jobs']} jobs are set aside, {first['name']} first: "
            f"{first['reason']} (all: {where})"
        )
    else:
        return
    error.report = report
    raise error
