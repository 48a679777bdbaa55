"""Calibrate and prune a model that does not fit in memory: safetensors in, safetensors out.

The calibration runs the model block by block. A full model's block is pruned and written as soon as
its norms are there, while the next one is read and runs; an adapter is pruned at the end. Global
scope reads the targets twice more, to find the one edge of all. What is done lies in a run folder
beside output_dir (:mod:`antidote_fast.resume`), from which ``resume`` goes on.
"""

import dataclasses
import re

from antidote_fast import interrupts
from antidote_fast.calibrate import ActivationNorms
from antidote_fast.errors import AntidoteError, Interrupted, NothingPruned
from antidote_fast.global_cut import GlobalCut, find_cut
from antidote_fast.loading import load_tokenizer, pick_device
from antidote_fast.masks import mask_key, masks_file
from antidote_fast.memory import available_memory, format_bytes, parse_bytes, resident_bytes
from antidote_fast.pipeline.calibrate import batches_of, counts_of
from antidote_fast.progress import track
from antidote_fast.prune import check_keys, prune_state_
from antidote_fast.prune_report import LayerReport, PruneReport
from antidote_fast.streaming.blocks import BlockModel
from antidote_fast.streaming.norms import BlockCalibration
from antidote_fast.streaming.sink import Background, ModelSink
from antidote_fast.streaming.spill import Room
from antidote_fast.targets import natural_key
from antidote_fast.writing import read_tensor

_BLOCK = re.compile(r"(.*?\.\d+)\.")
_FIRST_FORWARD = 64 << 20  # of libraries and their buffers; 36 to 50 MB were seen
_SHARE = 0.8  # of the free memory, where max_memory says nothing


def collect_norms(config, base, adapter, records, run, *, tokenizer=None, progress=False):
    """(norms, what the report says of them), block by block; goes on where ``run`` stopped.

    Args:
        config: a :class:`CalibrateConfig` or :class:`PruneConfig`.
        base, adapter: checkpoints, as :func:`antidote_fast.pipeline.calibrate.open_folders`.
        records: the calibration data.
        run: :class:`antidote_fast.resume.Run`.
        tokenizer: instead of the base's own.
        progress: as :func:`antidote_fast.progress.track` takes it.

    Raises:
        Interrupted: a signal came; the block that ran then is done and kept.
        AntidoteError: max_memory is too little, with the figures.
    """
    blocks = _Blocks(config, base, adapter, records, run, tokenizer)
    with interrupts.remembered() as request, Background() as background:
        for _ in blocks.run(request, background, progress, stop_early=True):
            pass
    return blocks.norms(), blocks.counts


def prune_model(
    config,
    base,
    records,
    run,
    *,
    norms,
    keys,
    roles,
    preserve_norms=None,
    aligned=None,
    tokenizer=None,
    progress=False,
):
    """Prune a full model into ``run.output``, block by block.

    Args:
        config: a :class:`PruneConfig`.
        base: the model's checkpoint.
        records: the calibration data; not used where ``norms`` are given or the score needs none.
        run: :class:`antidote_fast.resume.Run`.
        norms: given ones, or None.
        keys: names of the weights; None where the calibration finds them.
        roles: ``transposed`` and ``routed`` names among them.
        preserve_norms: norms of the same weights on data to preserve, or None.
        aligned: checkpoint of the model whose values removed weights take, or None.
        tokenizer, progress: as :func:`collect_norms`.

    Returns:
        (PruneReport, norms or None, what the report says of them, {file name: SHA-256}).

    Raises:
        As :func:`collect_norms` and :func:`antidote_fast.prune.prune_state_`; NothingPruned.
    """
    counts = {} if norms is None else counts_of(norms)
    with interrupts.remembered() as request, Background() as background:
        blocks = None
        if config.score == "wanda" and norms is None:
            blocks = _Blocks(config, base, None, records, run, tokenizer)
            targets = blocks.calibration.targets
            keys = [target.key for target in targets]
            roles = {
                "transposed": [target.key for target in targets if target.transposed],
                "routed": [target.key for target in targets if target.routed],
            }
        if preserve_norms is not None:
            if config.targets is not None or config.ignore:
                preserve_norms = preserve_norms.subset(keys, "preserve_norms")
            check_keys(keys, preserve_norms.sq_sum, "preserve_norms")
        writer = _Writer(config, base, run, keys, roles, preserve_norms, aligned)
        if blocks is not None and config.scope != "global":
            for tensors, part in blocks.run(request, background, progress, writer=writer):
                writer.prune(tensors, part)
        else:
            if blocks is not None:
                for _ in blocks.run(request, background, progress, stop_early=True):
                    pass
                background.wait()
                norms = blocks.norms()
            writer.rewrite(norms, request, background, progress)
        background.wait()
        digests = writer.finish()
    if blocks is not None:
        norms, counts = blocks.norms(), blocks.counts
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
        done = self.state.get("next", 0)
        self._parts = [
            ActivationNorms.load(self._norms_file(i))
            for i in range(done)
            if self._norms_file(i).exists()
        ]
        self._records = {
            "num_records": len(records),
            "num_dropped": batches.num_dropped,
            "num_truncated": batches.num_truncated,
        }

    @property
    def counts(self):
        """What the report says of the norms."""
        about = {"spilled_bytes": self.calibration.spilled_bytes}
        return {**counts_of(self._parts[0]), **self._records, **about}

    def norms(self):
        """The norms of all targets."""
        return ActivationNorms.joined(self._parts)

    def run(self, request, background, progress, *, writer=None, stop_early=False):
        """Run what is left; yields (tensors as saved, norms or None) of each block.

        With a writer each block's tensors are written once the caller has them back. With
        ``stop_early`` blocks behind the last target are not read.
        """
        calibration, model = self.calibration, self._model
        first, end = self.state.get("next", 0), len(model)
        if stop_early:
            end = calibration.last + 1
        if writer is not None and not first:
            names = {name for i in range(len(model)) for name in model.saved_names(i)}
            background.submit(writer.copy_others, names)
        if first <= calibration.last:
            calibration.begin(self.state.get("hidden"))
        unsaved = 0
        steps = calibration.steps(range(first, end), self._prefetch)
        for index, tensors, norms in track(steps, "stream", progress, total=end - first):
            if norms is not None:
                self._parts.append(norms)
            yield tensors, norms
            unsaved += model.num_bytes(index)
            state = before = kept = None
            # Keeping must not cost more than the block itself did.
            if unsaved >= calibration.hidden_bytes or request.made or index + 1 == end:
                unsaved = 0
                hidden, kept, before = calibration.keep()
                state = {**self.state, "next": index + 1, "hidden": hidden}
            background.submit(self._finish, index, norms, writer, tensors, state, kept, before)
            tensors = None
            if request.made:
                background.wait()
                raise Interrupted(
                    f"interrupted after block {index + 1} of {len(model)}; the same command with "
                    "--resume goes on"
                )

    def _finish(self, index, norms, writer, tensors, state, kept, before):
        """In the background: a block's norms and weights, then the state that tells of them."""
        if norms is not None:
            norms.save(self._norms_file(index))
        if writer is not None:
            writer.write(tensors)
        if state is None:
            return
        if kept is not None:
            kept.sync()
        self.state = {**state, **(writer.state() if writer is not None else {})}
        self._run.save(self.state)
        if before is not None:
            before.close()

    def _norms_file(self, index):
        return self._run.folder / f"norms-{index:05d}.safetensors"


class _Writer:
    """A pruned model on its way to ``run.output``, and the report of it."""

    def __init__(self, config, base, run, keys, roles, preserve_norms, aligned):
        self._config, self._base, self._run = config, base, run
        self._selection = config.selection
        self._preserve_norms, self._aligned = preserve_norms, aligned
        self._device = pick_device(config.device)
        self._roles = roles
        self._saved = {base.find(key): key for key in keys}
        before = run.state.get("writer", {})
        self._layers = [LayerReport(**layer) for layer in before.get("layers", ())]
        self._skipped = dict(before.get("skipped", {}))
        self._seconds = before.get("seconds", 0.0)
        self._backends = set(before.get("backends", ()))
        self._written = list(before.get("written", ()))
        self._sink = ModelSink(base, run.output, self._written, before.get("digests"))
        self._masks = None
        if config.save_masks:
            shapes = {key: self._shape(key, roles) for key in sorted(keys, key=natural_key)}
            about = {"score": config.score, "scope": config.scope, "ratio": str(config.ratio)}
            path = run.output / "masks.safetensors"
            self._masks = masks_file(path, shapes, about, keep=bool(self._written))

    def copy_others(self, names):
        """Copy what is in no block as it is, unless an interrupted run has."""
        others = [x for x in self._base.tensors if x not in names and x not in set(self._written)]
        self._sink.copy(others)
        self._written += others

    def prune(self, tensors, norms, cut=None):
        """Prune the targets among a block's tensors, {name as saved: tensor}, in place."""
        weights = {
            self._saved[name]: tensor for name, tensor in tensors.items() if name in self._saved
        }
        routed = set(self._roles.get("routed", ())) | (norms.routed if norms else set())
        for key in [key for key in weights if key in routed]:
            if norms is not None and self._config.score == "wanda" and not norms.sq_sum[key].any():
                self._skipped[key] = "routed expert that no token reached"
                del weights[key]
        if not weights:
            return
        if norms is not None and set(norms.sq_sum) != set(weights):
            norms = norms.subset(weights)
        kept = self._preserve_norms
        there = {key: tensor.to(self._device) for key, tensor in weights.items()}
        report = prune_state_(
            there,
            norms,
            self._selection,
            score=self._config.score,
            seed=self._config.seed,
            backend=self._config.backend,
            return_masks=self._masks is not None,
            cross_check=self._config.cross_check,
            preserve_norms=None if kept is None else kept.subset(weights),
            base_weights=None if self._aligned is None else self._aligned.read(weights),
            cut=cut,
            **{role: [k for k in names if k in there] for role, names in self._roles.items()},
        )
        for key, tensor in weights.items():
            if there[key] is not tensor:
                tensor.copy_(there[key])
        self._layers += report.layers
        self._backends.add(report.backend)
        self._seconds += report.seconds
        for key, mask in (report.masks or {}).items():
            self._masks.write(mask_key(key), mask.bits)

    def write(self, tensors):
        """Write a block's tensors, pruned or not."""
        self._sink.write(tensors)
        self._written += tensors

    def state(self):
        """What :meth:`__init__` takes up again; what it tells of is on the disk."""
        self._sink.sync()
        if self._masks is not None:
            self._masks.sync()
        # The next block may be pruned already, and is not yet written.
        written = {self._saved.get(name) for name in self._written}
        layers = [dataclasses.asdict(x) for x in list(self._layers) if x.key in written]
        return {
            "writer": {
                "layers": layers,
                "skipped": self._skipped,
                "seconds": self._seconds,
                "backends": sorted(self._backends),
                "written": list(self._written),
                "digests": self._sink.digests,
            }
        }

    def rewrite(self, norms, request, background, progress):
        """Read, prune and write block after block, with norms that are there or a score without."""
        cut = self._cut(norms, request, progress) if self._selection.scope == "global" else None
        groups = {}
        for name in self._base.tensors:
            match = _BLOCK.match(name)
            groups.setdefault(match[1] if match else "", []).append(name)
        done = set(self._written)
        background.submit(
            self.copy_others, {n for group, ns in groups.items() if group for n in ns}
        )
        background.wait()
        left = [
            names
            for group, names in sorted(groups.items(), key=lambda item: natural_key(item[0]))
            if group and not done.issuperset(names)
        ]
        for number, names in enumerate(track(left, "prune", progress), 1):
            pruned = [name for name in names if name in self._saved]
            tensors = {name: read_tensor(self._base.tensors[name]) for name in pruned}
            self.prune(tensors, norms, cut)
            others = [name for name in names if name not in tensors]
            background.submit(self._finish, tensors, others)
            tensors = None
            if request.made:
                background.wait()
                raise Interrupted(
                    f"interrupted after block {number} of {len(left)} that were left; the same "
                    "command with --resume goes on"
                )

    def finish(self):
        """Name the files; returns their digests."""
        if not self._layers:
            raise NothingPruned(
                f"nothing to prune: {len(self._skipped)} weights, all of routed experts that no "
                "token reached"
            )
        self._sink.finish()
        return self._sink.digests

    def report(self) -> PruneReport:
        """As :func:`antidote_fast.prune.prune_state_` gives it; the masks are in their file."""
        return PruneReport(
            score=self._config.score,
            scope=self._selection.scope,
            ratio=self._selection.ratio,
            largest=self._selection.largest,
            n_m=None,
            seed=self._config.seed,
            backend="+".join(sorted(self._backends)),
            layers=sorted(self._layers, key=lambda layer: natural_key(layer.key)),
            skipped=self._skipped,
            seconds=self._seconds,
            preserve_ratio=self._selection.preserve.ratio if self._config.preserves else None,
            score_delta=self._selection.score_delta,
            reverted=self._aligned is not None,
        )

    def _finish(self, tensors, others):
        self._sink.copy(others)
        self._written += others
        self.write(tensors)
        self._run.save({**self._run.state, **self.state()})

    def _cut(self, norms, request, progress):
        if "cut" in self._run.state:
            return GlobalCut.from_dict(self._run.state["cut"], norms, self._preserve_norms)
        transposed = set(self._roles.get("transposed", ())) | (norms.transposed if norms else set())
        names = {key: name for name, key in self._saved.items()}

        def read(key):
            if request.made:
                raise Interrupted("interrupted; the same command with --resume goes on")
            return upright(key, read_tensor(self._base.tensors[names[key]]))

        def read_base(key):
            return upright(key, self._aligned.read([key])[key])

        def upright(key, tensor):
            return tensor.t().contiguous() if key in transposed else tensor

        keys = list(names)
        if norms is not None and self._config.score == "wanda":
            keys = [k for k in keys if k not in norms.routed or norms.sq_sum[k].any()]
        cut = find_cut(
            keys,
            read,
            norms,
            self._selection,
            score=self._config.score,
            seed=self._config.seed,
            preserve_norms=self._preserve_norms,
            read_base=None if self._aligned is None else read_base,
            progress=progress,
        )
        self._run.save({**self._run.state, "cut": cut.to_dict()})
        return cut

    def _shape(self, key, roles):
        rows, columns = self._base.tensors[self._base.find(key)].shape
        return (columns, rows) if key in roles.get("transposed", ()) else (rows, columns)


def room_for_hidden(config, model, batches):
    """(bytes for hidden states and arguments of blocks, whether the next block is read ahead).

    Raises:
        AntidoteError: max_memory, or what is free, is too little for the blocks alone.
    """
    now = resident_bytes()
    limit = now + int(_SHARE * available_memory())
    if config.max_memory is not None:
        limit = parse_bytes(config.max_memory, "max_memory")
    block = max(model.num_bytes(i) for i in range(len(model)))
    tokens = max(batch["input_ids"].numel() for batch in batches)
    values = tokens * _widths(model) + _FIRST_FORWARD
    # A block in use, one on its way to the disk, one read ahead.
    for prefetch in (True, False):
        fixed = max(now + model.outside_bytes, now + (2 + prefetch) * block + values)
        if fixed < limit:
            return limit - fixed, prefetch
    where = "the free memory" if config.max_memory is None else f"max_memory={config.max_memory!r}"
    raise AntidoteError(
        f"{where}: {format_bytes(limit)} is less than the {format_bytes(fixed)} that this needs: "
        f"{format_bytes(now)} in use, {format_bytes(block)} a block; a smaller batch_size needs "
        f"{format_bytes(values)} less at most"
    )


def _widths(model):
    """Bytes a token that a block holds on its way, about: fp32, the widest layers."""
    config = model.model.config
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return 4 * (6 * hidden + 3 * (inner if isinstance(inner, int) else max(inner)))
