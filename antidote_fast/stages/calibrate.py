"""The calibrate stage: activation norms of a model or an adapter, collected once and saved."""

import time
from typing import Any

from antidote_fast.config.prune import CalibrateConfig
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.files.provenance import input_files, read_report, write_report
from antidote_fast.stages.evidence import gather
from antidote_fast.stages.inputs import NORMS_FILE, open_inputs


def run(config: CalibrateConfig, *, progress: Any = False, world: World = ALONE) -> dict:
    """The calibrate stage: writes ``norms.safetensors``, which serves any later selection.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned: data, a model or an adapter that is refused, or no
            weight that matches the targets; output_dir is untouched then.
    """
    inputs = open_inputs(config, progress=progress, world=world)
    if inputs.is_whole():
        return {} if world.rank else read_report(config.output_dir)
    if config.stream:
        with inputs.run_folder() as run:
            gather(inputs, run)
            return _write(inputs, run.output)
    gather(inputs)
    with world.together():
        if world.rank:
            return {}
        with inputs.output_folder() as folder:
            return _write(inputs, folder)


def _write(inputs, folder):
    """Write the norms and report.json; returns what is in that."""
    inputs.evidence.norms.save(folder / NORMS_FILE)
    seconds, config = round(time.perf_counter() - inputs.begun, 3), inputs.config
    results = {"seconds": seconds, **inputs.counts["dataset"], **inputs.backend}
    results["data"] = inputs.data
    return write_report(folder, "calibrate", config, results, inputs=input_files(config))
