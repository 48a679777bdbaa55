"""One worker of a fleet: a base model in memory, adapters read ahead, results written behind.

While the model runs forwards for one adapter, a thread reads and checks the next ones and another
prunes and writes those before it. What a job leaves is what ``prune`` leaves for its adapter.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.data.batches import Examples, batches_of
from antidote_fast.data.load import local_file
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.files.manifest import check_input
from antidote_fast.files.provenance import hash_inputs
from antidote_fast.files.pruned_copy import check_copied, write_pruned
from antidote_fast.files.safe_open import Watch
from antidote_fast.fleet.folder import finished, has_room, is_disk_full
from antidote_fast.fleet.hotswap import AdapterSlot, BaseLost
from antidote_fast.fleet.jobs import Job
from antidote_fast.models.adapters import check_adapter, check_sizes
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.forwards import lean_forward
from antidote_fast.models.loading import load_model, load_tokenizer, open_model, pick_device
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.norms.batches import run_batch
from antidote_fast.norms.collector import NormCollector
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.stages.evidence import prune_weights, weights_to_prune
from antidote_fast.stages.inputs import Inputs, describe_backend, load_data, unseen_data
from antidote_fast.stages.prune import finish, pruned_of

AHEAD = 2  # adapters read before their turn, and results not yet on the disk, in memory
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_ROOM = 1 << 20  # bytes that an adapter takes on the disk, before one has been written
_DATA_SETS = 8  # tokenised data sets kept
_SETS = ("dataset", "preserve_dataset")


class Worker:
    """Prunes adapters on one base model, one job after another.

    Args:
        config: a :class:`FleetConfig`.

    Raises:
        DataError, UsageError: the base is refused, or the backend cannot run.
    """

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        _keep_freed_memory()
        self.base = open_model(config)
        self.device = pick_device(config.device)
        self.backend = describe_backend(config.backend, self.device)
        self._base_hashes = hash_inputs([config.model_name_or_path])
        self._data = collections.OrderedDict()
        self._slot = self._hooked = self._collector = None
        self._hooks = contextlib.ExitStack()
        self._usual = _ROOM

    def check_data(self, jobs: Sequence[Job]) -> None:
        """Read and tokenise the fleet's own data sets, so that one no job could use ends it.

        Raises:
            DataError, UsageError: as :func:`load_records` and :func:`make_batches`.
        """
        for name in _SETS:
            for job in jobs:
                ours = getattr(job.config, name) == getattr(self.config, name)
                if ours and name in unseen_data(job.config):
                    self.data_of(job.config, name)
                    break

    def run(
        self, jobs: Iterable[Job], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, Any]]:
        """Do :class:`Job`s; yields one outcome each, in order, as soon as its folder is in place.

        Args:
            jobs: some.
            stop: looked at between jobs; once it says True no other job is begun.

        Yields:
            dicts of name, adapter, line, status (``"done"``, ``"skipped"`` where the folder was
            whole already, ``"failed"``), achieved, seconds, reason, kind and exit_code.

        Raises:
            AntidoteError: the disk is full, or the device failed: no other job could fare better.
        """
        pending = iter(jobs)
        ahead, behind = collections.deque(), collections.deque()
        reader = concurrent.futures.ThreadPoolExecutor(1, "fleet-reader", _on_one_core)
        writer = concurrent.futures.ThreadPoolExecutor(1, "fleet-writer", _on_one_core)
        try:
            while not stop():
                for job in itertools.islice(pending, 1 + AHEAD - len(ahead)):
                    ahead.append((job, reader.submit(self._read, job)))
                if not ahead:
                    break
                job, read = ahead.popleft()
                behind.append((job, self._compute(read, writer)))
                while behind and (len(behind) > AHEAD or behind[0][1].done()):
                    yield self._outcome(*behind.popleft())
            while behind:
                yield self._outcome(*behind.popleft())
        finally:
            for executor in (reader, writer):
                executor.shutdown(wait=True, cancel_futures=True)
            self._close()

    def _close(self):
        self._hooks.close()
        self._hooked = self._collector = None

    def open_adapter(self, config: Any) -> Checkpoint:
        """A job's adapter, checked by what needs no look at the base's weights."""
        adapter = open_model(config, "adapter")
        check_copied(adapter)
        check_sizes(adapter, {name: entry.shape for name, entry in self.base.tensors.items()})
        check_input(adapter.folder)
        return adapter

    def _read(self, job):
        """In the reader's thread: every check that needs no model, and the tensors."""
        start = time.perf_counter()
        config = job.config
        adapter = self.open_adapter(config)
        hashes = {**self._base_hashes, **hash_inputs([config.adapter])}
        for name in _SETS:
            data = getattr(config, name)
            if data and (file := local_file(data)):
                hashes |= self._hashes_of(file)
        report = finished(job, hashes, self.base.fingerprint())
        if report is not None:
            return _Read(job, report=report)
        check_adapter(adapter, self.base)
        data = {name: self.data_of(config, name) for name in unseen_data(config)}
        tensors = adapter.read(adapter.tensors)
        if hash_inputs([config.adapter], adapter.digests()).items() - hashes.items():
            raise DataError(f"{adapter.folder}: changed while it was in use")
        inputs = Inputs(
            config=config,
            base=self.base,
            adapter=adapter,
            device=self.device,
            backend=self.backend,
            evidence=Evidence(score=config.score),
        )
        return _Read(job, inputs, tensors, data, hashes, seconds=time.perf_counter() - start)

    def _compute(self, reading, writer):
        """A future of the job's report; the forwards are run here, by the thread that calls."""
        done = concurrent.futures.Future()
        if (error := reading.exception()) is not None:
            done.set_exception(error)
            return done
        read = reading.result()
        if read.report is not None:
            done.set_result(("skipped", read.report, 0.0))
            return done
        if read.data and self._slot is None:  # a base that fails ends the fleet
            self._slot = AdapterSlot(self._load)
            self._fingerprint = fingerprint_model(self._slot.model)
        start = time.perf_counter()
        try:
            if read.data:
                self._add_norms(read)
        except BaseLost:  # for every job
            raise
        except Exception as error:
            done.set_exception(error)
            return done
        return writer.submit(self._write, read, read.seconds + time.perf_counter() - start)

    def _add_norms(self, read):
        """Collect the norms of one adapter, on a base that was the one loaded from start to end.

        Where its weights have changed meanwhile it is loaded again, and the norms are collected
        once more: nothing that came of another base is written, nor does the next job meet it.
        """
        for _ in range(2):
            try:
                self._collect(read)
                name = self._slot.changed()
                if name is None:
                    return
            except BaseLost:
                raise
            except Exception:
                self._forget()
                raise
            self._forget()
        raise DataError(
            f"{read.inputs.adapter.folder}: the base's {name!r} changes while this adapter is on it"
        )

    def _forget(self):
        """Leave the base without an adapter and hooks, as it was loaded."""
        self._close()
        self._slot.clear()

    def _collect(self, read):
        """Run one adapter over its data; hooks stay on the model for the next one like it."""
        config = read.job.config
        if not self._slot.fits(read.inputs.adapter):
            self._close()
        live = self._slot.put(read.inputs.adapter, read.tensors)
        wanted = (config.targets, config.ignore, config.aggregation, config.response_only)
        if self._hooked != wanted:
            self._close()
            targets = find_targets(live, config.targets, config.ignore)
            options = {"aggregation": config.aggregation, "response_only": config.response_only}
            options |= {"backend": config.backend, "stop_early": True}
            with contextlib.ExitStack() as stack:
                self._collector = stack.enter_context(NormCollector(targets, **options))
                self._options = stack.enter_context(lean_forward(live, targets))
                self._hooks = stack.pop_all()
            self._hooked = wanted
        for name, batches in read.data.items():
            self._collector.reset()
            with torch.no_grad():
                for batch in batches:
                    run_batch(live, self._collector, batch, self._options)
            norms = ActivationNorms.of(self._collector, fingerprint=self._fingerprint)
            read.inputs.add_norms(name, norms, counts_of(norms) | batches.counts)

    def _write(self, read, calibrated):
        """In the writer's thread: select, prune, and put the job's folder in place."""
        start = time.perf_counter()
        config, inputs = read.job.config, read.inputs
        inputs.begun = start - calibrated
        keys, _ = weights_to_prune(config, inputs.adapter, inputs.naming_norms)
        weights = {key: read.tensors[key].to(self.device) for key in keys}
        report = prune_weights(inputs, weights, together=True)
        entries = {"base_fingerprint": self.base.fingerprint()}
        with output_folder(config.output_dir, config.overwrite, **entries) as folder:
            write_pruned(inputs.adapter, folder, pruned_of(weights, report))
            contents = finish(folder, inputs, report, read.hashes)
            for name in read.data:
                if file := local_file(getattr(config, name)):
                    self._watch_of(file).check()
        self._usual = max(self._usual, len(inputs.adapter.adapter_bytes))
        return "done", contents, calibrated + time.perf_counter() - start

    def _outcome(self, job, future):
        """What became of a job, from the future of its report."""
        try:
            status, report, seconds = future.result()
        except _DEVICE_ERRORS:
            raise
        except Exception as error:
            # A full disk ends the fleet unless it was this one job that wanted too much of it.
            if is_disk_full(error) and not has_room(self.config.output_dir, self._usual):
                raise
            return job.about | {"status": "failed", **_why(error)}
        figures = {"achieved": report.get("achieved"), "seconds": round(seconds, 3)}
        return job.about | {"status": status, **figures}

    def _load(self):
        check_memory(self.config, [self.base])
        model = load_model(self.base.folder, **self.config.load_options)
        self.base.watch.check()  # none of its files changed while it was read
        return model

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(self.base.folder, trust_remote_code=self.config.trust_remote_code)

    def data_of(self, config: PruneConfig, name: str = "dataset") -> Examples:
        """The batches of a data set, on the device and tokenised once for all jobs."""
        settings = (
            getattr(config, name),
            config.num_calibration_samples,
            config.template,
            config.max_seq_length,
            config.batch_size,
        )
        tokenised = self._data.get(settings)
        if tokenised is None:
            try:
                file = local_file(getattr(config, name))
                watch = Watch() if file is None else self._watch_of(file)
                records = load_data(config, None, name)
                watch.check()
                tokenised = batches_of(config, records, self._tokenizer, self.base.config)
                tokenised[:] = [{k: v.to(self.device) for k, v in b.items()} for b in tokenised]
            except AntidoteError as error:  # for every job that names these data
                tokenised = error
            self._data[settings] = tokenised
            if len(self._data) > _DATA_SETS:
                self._data.popitem(last=False)
        self._data.move_to_end(settings)
        if isinstance(tokenised, AntidoteError):
            raise type(tokenised)(str(tokenised))
        return tokenised

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a worker lives as long as its process
    def _hashes_of(self, file):
        self._watch_of(file)
        return hash_inputs([file])

    @functools.cache  # noqa: B019 - as above
    def _watch_of(self, file):
        """What a data file was before this worker first read it, or hashed it."""
        return Watch(file)


def _keep_freed_memory():
    """Ask glibc to keep what a forward frees for the next one, here and for as long as we run.

    With tensors of other jobs coming and going it gives the top of its heap back after each
    forward and then takes it again page by page: a tenth of a forward of SmolLM2-135M over
    16 x 96 tokens (one Xeon core).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _on_one_core():
    """Kernels that this thread calls run in it alone: no second team of threads on the same cores.

    ``torch.set_num_threads`` would also change what the forwards take. With two threads each on two
    idle Xeon cores a fleet at 16 x 32 tokens took 1.94 times the bare forwards.
    """
    with contextlib.suppress(OSError, AttributeError):  # another OpenMP than torch's usual one
        ctypes.CDLL(None).omp_set_num_threads(1)


@dataclasses.dataclass
class _Read:
    """A job between its threads; ``report`` where it is done already."""

    job: Job
    inputs: Inputs | None = None
    tensors: dict | None = None
    data: dict | None = None
    hashes: dict | None = None
    report: dict | None = None
    seconds: float = 0.0


_DEVICE_ERRORS = (getattr(torch, "AcceleratorError", ()),)


def _why(error):
    """One line, the exception's class and the exit code it stands for."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, AntidoteError):
        return {"reason": text, "kind": kind, "exit_code": error.exit_code}
    return {"reason": f"unexpected failure: {kind}: {text:.300}", "kind": kind, "exit_code": 1}
