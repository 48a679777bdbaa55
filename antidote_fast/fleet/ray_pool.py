"""A fleet on Ray: one actor a GPU (or CPU core), on one machine or many that share the files.

Jobs are handed out a few at a time. A job may be begun twice, where the actor died that had it: a
job's folder appears whole or not at all, so that does no harm.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import signal

from antidote_fast import errors
from antidote_fast.data.load import local_file
from antidote_fast.errors import AntidoteError, UsageError

_AT_ONCE = 8  # jobs that an actor is handed at a time, at most
_ATTEMPTS = 3  # of a job whose actor died each time
_DEATHS = 5  # of actors, with no job done in between
_POLL_SECONDS = 0.5


def check_installed():
    """Refuse ``--engine ray`` without Ray: an AntidoteError says what to install."""
    if importlib.util.find_spec("ray") is None:
        raise AntidoteError("engine=ray: ray is not installed; pip install 'antidote-fast[ray]'")


def run(config, jobs, stop):
    """Outcomes of the jobs, as :meth:`Worker.run` gives them, in the order in which they end.

    A Ray that is initialised, or that ``RAY_ADDRESS`` names, is used; else one is started here and
    ended afterwards.

    Raises:
        UsageError: more workers than the cluster has GPUs or CPU cores.
        AntidoteError: the disk is full, or actors die and no job gets done.
    """
    config = _with_paths(config)
    jobs = [dataclasses.replace(job, config=_with_paths(job.config)) for job in jobs]
    with _ray(config) as ray:
        count, resources = _workers(ray, config)
        count = min(count, max(1, len(jobs)))
        size = max(1, min(_AT_ONCE, len(jobs) // (2 * count)))
        queue = collections.deque(jobs[i : i + size] for i in range(0, len(jobs), size))
        # Two threads: one to be told to stop while the other works.
        actor = ray.remote(_Actor).options(max_concurrency=2, **resources)
        yield from _Pool(ray, lambda: actor.remote(config), count).run(queue, stop)


class _Actor:
    """Runs in a process of its own, where it holds the base."""

    def __init__(self, config):
        self.config, self.worker, self.stopped = config, None, False

    def run(self, jobs):
        """(outcomes, None), or (those until then, (class, message)) of what ends the fleet."""
        from antidote_fast.fleet.worker import Worker

        outcomes = []
        try:
            if self.worker is None:
                self.worker = Worker(self.config)
            outcomes.extend(self.worker.run(jobs, lambda: self.stopped))
        except Exception as error:
            return outcomes, (type(error).__name__, str(error) or type(error).__name__)
        return outcomes, None

    def stop(self):
        self.stopped = True


class _Pool:
    """Hands jobs to actors, and gives those of a dead one to another."""

    def __init__(self, ray, make, count):
        self.ray, self.make, self.idle = ray, make, [make() for _ in range(count)]
        self.running, self.attempts, self.deaths = {}, collections.Counter(), 0

    def run(self, queue, stop):
        told = False
        while queue or self.running:
            if stop() and not told:
                told = True
                queue.clear()
                for actor, _ in self.running.values():
                    actor.stop.remote()
            while queue and self.idle:
                actor, part = self.idle.pop(), queue.popleft()
                self.running[actor.run.remote(part)] = actor, part
            if not self.running:
                return
            ready, _ = self.ray.wait(list(self.running), timeout=_POLL_SECONDS)
            for reference in ready:
                actor, part = self.running.pop(reference)
                try:
                    outcomes, failure = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError:
                    raise
                except self.ray.exceptions.RayError as error:
                    yield from self._died(part, queue, told, error)
                    continue
                self.idle.append(actor)
                self.deaths = 0 if outcomes else self.deaths
                yield from outcomes
                if failure is not None:
                    raise getattr(errors, failure[0], AntidoteError)(failure[1])

    def _died(self, part, queue, told, error):
        """Jobs of a dead actor go back, one by one; outcomes of those that had their chances."""
        self.deaths += 1
        line = " ".join(str(error).split())[:200]
        if self.deaths >= _DEATHS * max(1, len(self.running) + len(self.idle)):
            raise AntidoteError(f"Ray: {self.deaths} workers died one after another: {line}")
        self.idle.append(self.make())
        for job in part:
            self.attempts[job.name] += 1
            if self.attempts[job.name] >= _ATTEMPTS:
                reason = f"its worker died {_ATTEMPTS} times: {line}"
                outcome = {"status": "failed", "reason": reason, "kind": type(error).__name__}
                yield job.about | outcome | {"exit_code": 1}
            elif not told:
                queue.append([job])


@contextlib.contextmanager
def _ray(config):
    """The ``ray`` module, initialised."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    # Ray takes SIGTERM for itself; the fleet wants it to finish its jobs.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    here = {}
    if not os.environ.get("RAY_ADDRESS"):
        here = {"include_dashboard": False}
        if config.device == "cpu":
            here["num_gpus"] = 0
        if config.num_workers and config.num_workers > (os.cpu_count() or 1):
            here["num_cpus"] = config.num_workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
    ray.init(configure_logging=False, log_to_driver=False, **here)
    with contextlib.suppress(ValueError):  # not the main thread
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _workers(ray, config):
    """(how many actors, what Ray is told that each one needs)."""
    has = ray.cluster_resources()
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and has.get("GPU", 0) > 0)
    kind, most = ("GPU", int(has.get("GPU", 0))) if on_gpu else ("CPU", int(has.get("CPU", 0)))
    count = config.num_workers or (most if on_gpu else 1)
    if count > most or not most:
        raise UsageError(f"num_workers={count}: the Ray cluster has {most} {kind}s")
    return count, {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _with_paths(config):
    """The same with whole paths: an actor's current folder is another one."""
    paths = {"output_dir": os.path.abspath(config.output_dir)}
    if os.path.isdir(config.model_name_or_path):
        paths["model_name_or_path"] = os.path.abspath(config.model_name_or_path)
    for name in ("dataset", "preserve_dataset"):
        data = getattr(config, name)
        if data is not None and local_file(data) is not None:
            paths[name] = os.path.abspath(data)
    return dataclasses.replace(config, **paths)
