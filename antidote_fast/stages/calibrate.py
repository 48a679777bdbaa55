"""The calibrate stage, and what calibration and pruning share: folders, data, norms."""

import time

from antidote_fast.config.prune import CalibrateConfig
from antidote_fast.distributed.ranks import ALONE
from antidote_fast.files.commit import check_output_folder, digest_of, output_folder
from antidote_fast.files.provenance import read_report, run_inputs, write_report
from antidote_fast.files.resume import MANIFEST_ENTRY, is_finished, run_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.loading import pick_device
from antidote_fast.stages.inputs import (
    NORMS_FILE,
    calibrate_folder,
    check_ranks,
    describe_backend,
    inputs_of,
    load_data,
    open_folders,
    said_by_first,
)


def run(config: CalibrateConfig, *, progress=False, world=ALONE) -> dict:
    """The calibrate stage: writes ``norms.safetensors``, which serves any later selection.

    Args:
        config: the model, the adapter and the data.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the samples (:func:`antidote_fast.distributed.session`);
            rank 0
            writes.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned: data, a model or an adapter that is refused, or no
            weight that matches the targets; output_dir is untouched then.
    """
    start = time.perf_counter()
    with world.together():
        check_ranks(config, world)
        watch = Watch(*inputs_of(config))
        if not (config.resume or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
        backend = describe_backend(None, pick_device(config.device))
        base, adapter = open_folders(config, progress)
        records = load_data(config, None)
        inputs = run_inputs(config, base, adapter, records=records)
        finished = config.resume and not world.rank and is_finished(config.output_dir, inputs)
        if config.resume and not (finished or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
    if said_by_first(finished, world):
        return read_report(config.output_dir) if finished else {}
    if config.stream:
        about = watch, backend, start
        return _run_streamed(config, base, adapter, records, inputs, about, progress)
    [(norms, counts)] = calibrate_folder(
        config, base, adapter, {"dataset": records}, progress=progress, world=world
    )
    with world.together():
        if world.rank:
            return {}
        entries = {MANIFEST_ENTRY: digest_of(inputs)}
        with output_folder(config.output_dir, config.overwrite, **entries) as folder:
            report = _write(config, folder, norms, {**counts, **backend}, start)
            watch.check()
        return report


def _run_streamed(config, base, adapter, records, inputs, about, progress):
    from antidote_fast.streaming import job

    watch, backend, start = about

    with run_folder(
        config.output_dir, inputs, resume=config.resume, overwrite=config.overwrite
    ) as run:
        norms, counts = job.collect_norms(config, base, adapter, records, run, progress=progress)
        report = _write(config, run.output, norms, {**counts, **backend}, start)
        watch.check()
        run.commit()
    return report


def _write(config, folder, norms, about, start):
    norms.save(folder / NORMS_FILE)
    results = {"seconds": round(time.perf_counter() - start, 3), **about}
    return write_report(folder, "calibrate", config, results, inputs=inputs_of(config))
