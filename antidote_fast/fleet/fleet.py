"""The fleet: thousands of adapters of one base, each pruned as ``prune`` would.

Re-runs are idempotent: what is done is skipped, what was set aside is tried again.
"""

import collections
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
    index, number = shard = parse_shard(config.shard)
    jobs = read_jobs(config)[index::number]
    outcomes, counts = [], collections.Counter(done=0, skipped=0, failed=0)
    begin, engine = time.monotonic(), _engine(config, jobs)
    with folder.locked(config.output_dir, shard), interrupts.remembered() as request:
        try:
            with count(len(jobs), "fleet", progress) as show:
                for outcome in engine(lambda: request.made):
                    if outcome["status"] == "failed":
                        folder.set_aside(config.output_dir, outcome)
                    else:
                        folder.forget(config.output_dir, outcome["name"])
                    outcomes.append(outcome)
                    counts[outcome["status"]] += 1
                    show(counts.total(), **_view(counts, len(jobs), time.monotonic() - begin))
        finally:
            # Also when the disk is full or the device failed, as far as there is room for it.
            seconds, left = time.monotonic() - begin, len(jobs) - counts.total()
            report = {
                "schema_version": folder.SCHEMA_VERSION,
                "stage": "fleet",
                "created": folder.now(),
                "versions": versions(),
                "config": dataclasses.asdict(config),
                "counts": {"jobs": len(jobs), **counts, "left": left},
                "seconds": round(seconds, 3),
                "adapters_per_hour": round(3600 * counts["done"] / seconds, 1) or None,
                "peak_memory_bytes": peak_memory_bytes(),
                "jobs": outcomes,
            }
            folder.write_json(folder.summary_path(config.output_dir, shard), report)
    if request.made and left:
        error = Interrupted(
            f"interrupted with {left} of {len(jobs)} jobs left; the same command goes on"
        )
    elif counts["failed"]:
        first = next(job for job in outcomes if job["status"] == "failed")
        error = JobsSetAside(
            f"{counts['failed']} of {len(jobs)} jobs are set aside, {first['name']} first: "
            f"{first['reason']} (all: {Path(config.output_dir) / folder.FAILED})"
        )
    else:
        return report
    error.report = report
    raise error


def _view(counts, total, seconds):
    """What a progress view shows beside done and total."""
    rate = (counts["done"] + counts["failed"]) / seconds
    return {
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "adapters_per_hour": round(3600 * rate),
        "eta_seconds": round((total - counts.total()) / rate) if rate else None,
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
