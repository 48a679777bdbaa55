"""The prune stage on several ranks, as torchrun starts them: calibrate together, write once."""

import time

from antidote_fast.checkpoint import check_output_folder
from antidote_fast.pipeline.calibrate import calibrate_folder, check_ranks, open_folders
from antidote_fast.pipeline.prune import prune_folder


def prune(config, *, world, progress=False) -> dict:
    """Prune a folder into another; the ranks share the samples, rank 0 prunes and writes.

    The norms are the same on every rank, and so would be the masks. Where nothing is collected
    (saved norms, a score without data) the other ranks have nothing to do.

    Args:
        config: a :class:`PruneConfig`.
        world: of :func:`antidote_fast.distributed.session`.
        progress: as :func:`antidote_fast.progress.track` takes it; of rank 0.

    Returns:
        The contents of report.json; empty on the ranks that do not write.

    Raises:
        As :func:`antidote_fast.pipeline.prune.run`, on the rank where it went wrong; PeerFailed on
        the others. UsageError: stream or device_map.
    """
    start = time.perf_counter()
    norms = counts = None
    with world.together():
        check_ranks(config, world)
        check_output_folder(config.output_dir, config.overwrite)
        base, adapter = open_folders(config, progress)
    if config.score == "wanda" and config.norms is None:
        norms, counts = calibrate_folder(config, base, adapter, progress=progress, world=world)
    with world.together():
        if world.rank:
            return {}
        return prune_folder(config, norms=norms, counts=counts, progress=progress, start=start)[1]
