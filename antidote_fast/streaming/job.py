"""Calibrate and prune a model that does not fit in memory: safetensors in, safetensors out.

The calibration runs the model block by block. A full model's block is pruned and written as soon as
its norms are there, while the next one is read and runs; an adapter is pruned at the end. Global
scope reads the targets twice more, to find the one edge of all. What is done lies in a run folder
beside output_dir (:mod:`antidote_fast.files.resume`), from which ``resume`` goes on.
"""

from dataclasses import replace

from antidote_fast.data.batches import batches_of
from antidote_fast.errors import Interrupted
from antidote_fast.models.loading import load_tokenizer, pick_device
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.pruning.evidence import check_keys
from antidote_fast.streaming.blocks import BlockModel
from antidote_fast.streaming.norms import BlockCalibration
from antidote_fast.streaming.sink import Background
from antidote_fast.streaming.spill import Room, room_for_hidden
from antidote_fast.streaming.writer import Writer
from antidote_fast.system import interrupts
from antidote_fast.system.progress import track


def collect_norms(config, base, adapter, records, run, *, tokenizer=None, progress=False):
    """(norms, what the report says of them), block by block; goes on where ``run`` stopped.

    Args:
        config: a :class:`CalibrateConfig` or :class:`PruneConfig`.
        base, adapter, records: as the stage opened them.
        run: :class:`antidote_fast.files.resume.Run`.

    Raises:
        Interrupted: a signal came; the block that ran then is done and kept.
        AntidoteError: max_memory is too little, with the figures.
    """
    blocks = _Blocks(config, base, adapter, records, run, tokenizer)
    with interrupts.remembered() as request, Background() as background:
        blocks.run(request, background, progress)
    return blocks.norms(), blocks.counts


def prune_model(
    config, base, records, run, evidence, *, keys=(), aligned=None, tokenizer=None, progress=False
):
    """Prune a full model into ``run.output``, block by block.

    Args:
        config, base, records, run: as :func:`collect_norms`; ``records`` is None where the evidence
            is whole without.
        evidence: :class:`antidote_fast.pruning.evidence.Evidence`, without weights of ``aligned``.
        keys: names of the weights; not looked at where the calibration finds them.
        aligned: checkpoint of the model whose values removed weights take, or None.

    Returns:
        (PruneReport, norms or None, what the report says of them, {file name: SHA-256}).

    Raises:
        As :func:`collect_norms` and :func:`antidote_fast.pruning.prune.prune_state_`;
        NothingPruned.
    """
    norms, blocks = evidence.norms, None
    counts = {} if norms is None else counts_of(norms)
    with interrupts.remembered() as request, Background() as background:
        if records is not None:
            blocks = _Blocks(config, base, None, records, run, tokenizer)
            targets = blocks.calibration.targets
            keys = [target.key for target in targets]
            transposed = {target.key for target in targets if target.transposed}
            routed = {target.key for target in targets if target.routed}
            evidence = replace(evidence, transposed=transposed, routed=routed)
        preserve_norms = evidence.preserve_norms
        if preserve_norms is not None:
            if config.targets is not None or config.ignore:
                preserve_norms = preserve_norms.subset(keys, "preserve_norms")
                evidence = replace(evidence, preserve_norms=preserve_norms)
            check_keys(keys, preserve_norms.sq_sum, "preserve_norms")
        writer = Writer(config, base, run, keys, evidence, aligned)
        in_turn = config.scope != "global"
        if blocks is not None:
            blocks.run(request, background, progress, writer if in_turn else None)
            background.wait()
            norms, counts = blocks.norms(), blocks.counts
        if blocks is None or not in_turn:
            writer.rewrite(norms, request, background, progress)
            background.wait()
        digests = writer.finish()
    return writer.report(), norms, counts, digests


class _Blocks:
    """The calibration, as far as an interrupted run has not done it."""

    def __init__(self, config, base, adapter, records, run, tokenizer):
        trust = config.trust_remote_code
        tokenizer = tokenizer or load_tokenizer(base.folder, trust_remote_code=trust)
        batches = batches_of(config, records, tokenizer, base.config)
        device = pick_device(config.device)
        self.state = run.state
        self._run = run
        self._model = BlockModel(
            base, adapter, dtype=config.dtype, device=device, trust_remote_code=trust
        )
        limit, self._prefetch = room_for_hidden(config, self._model, batches)
        self.calibration = BlockCalibration(
            self._model,
            batches,
            run.folder,
            Room(limit),
            targets=config.targets,
            ignore=config.ignore,
            response_only=config.response_only,
            aggregation=config.aggregation,
            backend=getattr(config, "backend", None),
            fingerprint=base.fingerprint(),
        )
        files = map(self._norms_file, range(self.state.get("next", 0)))
        self._parts = [ActivationNorms.load(file) for file in files if file.exists()]
        self._records = batches.counts

    @property
    def counts(self):
        """What the report says of the norms."""
        about = {"spilled_bytes": self.calibration.spilled_bytes}
        return {**counts_of(self._parts[0]), **self._records, **about}

    def norms(self):
        """The norms of all targets."""
        return ActivationNorms.joined(self._parts)

    def run(self, request, background, progress, writer=None):
        """Run what is left.

        With a writer each block is pruned and written once its norms are there; without, blocks
        behind the last target are not read.
        """
        calibration, model = self.calibration, self._model
        first, end = self.state.get("next", 0), len(model)
        if writer is None:
            end = calibration.last + 1
        elif not first:
            names = {name for i in range(len(model)) for name in model.saved_names(i)}
            background.submit(writer.copy_others, names)
        if first <= calibration.last:
            calibration.begin(self.state.get("hidden"))
        unsaved = 0
        steps = calibration.steps(range(first, end), self._prefetch)
        for index, tensors, norms in track(steps, "stream", progress, total=end - first):
            if norms is not None:
                self._parts.append(norms)
            if writer is not None:
                writer.prune(tensors, norms)
            unsaved += model.num_bytes(index)
            state = before = spilled = None
            # Keeping must not cost more than the block itself did.
            if unsaved >= calibration.hidden_bytes or request.made or index + 1 == end:
                unsaved = 0
                hidden, spilled, before = calibration.keep()
                state = {**self.state, "next": index + 1, "hidden": hidden}
            background.submit(self._finish, index, norms, writer, tensors, state, spilled, before)
            tensors = None
            if request.made:
                background.wait()
                raise Interrupted(
                    f"interrupted after block {index + 1} of {len(model)}; the same command with "
                    "--resume goes on"
                )

    def _finish(self, index, norms, writer, tensors, state, spilled, before):
        """In the background: a block's norms and weights, then the state that tells of them."""
        if norms is not None:
            norms.save(self._norms_file(index))
        if writer is not None:
            writer.write(tensors)
        if state is None:
            return
        if spilled is not None:
            spilled.sync()
        self.state = {**state, **(writer.state() if writer is not None else {})}
        self._run.save(self.state)
        if before is not None:
            before.close()

    def _norms_file(self, index):
        return self._run.folder / f"norms-{index:05d}.safetensors"
