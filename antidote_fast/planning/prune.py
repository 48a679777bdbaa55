"""Plans of calibrate and prune."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_output_folder
from antidote_fast.files.provenance import run_inputs
from antidote_fast.files.resume import interrupted_state, is_finished
from antidote_fast.models.loading import load_tokenizer, pick_device
from antidote_fast.models.targets import Target, find_targets
from antidote_fast.planning.gates import learning
from antidote_fast.planning.plan import Builder, Plan, file_bytes
from antidote_fast.pruning.evidence import check_keys
from antidote_fast.stages import prune
from antidote_fast.stages.evidence import Known, weights_to_prune
from antidote_fast.stages.gates.stage import check_stage
from antidote_fast.stages.inputs import describe_backend, load_data, open_aligned, open_folders
from antidote_fast.system.memory import format_bytes


class Matrix(NamedTuple):
    """A weight that may be pruned, as it is saved."""

    key: str
    shape: tuple[int, ...]
    num_bytes: int


def plan_calibrate(config: CalibrateConfig) -> Plan:
    """As :func:`antidote_fast.stages.calibrate.run` would go."""
    base, adapter = _opened(config, None)
    sets = {"dataset": load_data(config, None)}
    made = Builder("calibrate", config, base, adapter)
    inputs = run_inputs(config, base, adapter, records=sets["dataset"])
    if _is_whole(made, inputs):
        return made.plan
    made.plan.bytes_written = _norm_bytes(made, _calibration(made, sets))
    return made.finish()


def plan_prune(config: PruneConfig) -> Plan:
    """As :func:`antidote_fast.stages.prune.run` would go."""
    base, adapter = _opened(config, config.backend)
    known, sets = _evidence(config, base, adapter is not None)
    source = adapter or base
    made = Builder("prune", config, *((base, adapter) if sets else (source,)))
    if _is_whole(made, prune.inputs_for(config, base, adapter, known, sets)):
        return made.plan
    return _pruning(made, source, known, sets)


def pruned_later(config: PruneConfig, base: Checkpoint, adapt: Callable | None) -> Plan:
    """The prune of a run: of what is not there yet, and is as large as the base or its adapter."""
    known, sets = _evidence(config, base, adapt is not None)
    return _pruning(Builder("prune", config, base, adapt=adapt), base, known, sets)


def _evidence(config, base, is_adapter):
    """(what a prune goes by, {field: records} of what it is still to see)."""
    check_stage(config, base, is_adapter)
    known = Known({})
    shapes = {name: entry.shape for name, entry in base.tensors.items()}
    known.aligned = open_aligned(config, shapes, base.config.get("model_type"))
    known.take_given(config)
    if known.named is not None:
        known.check_base(base.fingerprint())
    return known, {name: load_data(config, None, name) for name in known.missing(config)}


def _opened(config, backend):
    """(base, adapter or None), refused as the stages refuse them."""
    describe_backend(backend, pick_device(config.device))
    if not config.resume:
        check_output_folder(config.output_dir, config.overwrite)
    return open_folders(config)


def _is_whole(made, inputs):
    """Whether ``resume`` leaves it at what is there; else the output folder is checked."""
    config, notes = made.config, made.plan.notes
    if config.resume and is_finished(config.output_dir, inputs):
        notes.append("output_dir is whole, from these inputs: nothing would be done")
        return True
    check_output_folder(config.output_dir, config.overwrite)
    if config.stream:
        options = {"resume": config.resume, "overwrite": config.overwrite}
        if interrupted_state(config.output_dir, inputs, **options):
            notes.append("goes on where a run was interrupted: figures are of all of it")
    return False


def _calibration(made, sets) -> list[Target]:
    """Add the forward passes over {field: records}; returns the targets."""
    config = made.config
    tokenizer = load_tokenizer(made.base.folder, trust_remote_code=config.trust_remote_code)
    batches = []
    for name, records in sets.items():
        some = batches_of(config, records, tokenizer, made.base.config)
        shapes = [batch["input_ids"].shape for batch in some]
        counts = {
            "sequences": sum(count for count, _ in shapes),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in some),
            "tokens with pads": sum(map(math.prod, shapes)),
            "records dropped": some.num_dropped,
            "truncated": some.num_truncated,
        }
        prefix = "preserve " if name == "preserve_dataset" else ""
        made.plan.data |= {prefix + what: count for what, count in counts.items()}
        batches += some
    cost = made.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    made.forward("calibrate", [batch["input_ids"].shape for batch in batches])
    activations = cost.activation_bytes(*made.shape)
    if config.stream:
        _stream(made, batches, activations)
    else:
        made.hold("weights", cost.weight_bytes)
        made.hold("activations", activations)
    made.hold("norms", 4 * len(sets) * _norm_bytes(made, targets))  # float64, a batch's and in all
    made.read(made.base, made.adapter, *(getattr(config, name) for name in sets))
    return targets


def _stream(made, batches, activations):
    """What is held of a model that runs block by block; refused where that is too much."""
    from antidote_fast.streaming.blocks import BlockModel
    from antidote_fast.streaming.spill import room_for_hidden

    config, cost = made.config, made.cost
    options = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    model = BlockModel(made.base, made.adapter, device=made.device, **options)
    room, ahead = room_for_hidden(config, model, batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    hidden = tokens * cost.config.hidden_size * cost.dtype.itemsize
    made.hold("embeddings and adapter", model.outside_bytes + 4 * cost.lora)
    made.hold("blocks", (2 + ahead) * max(model.num_bytes(i) for i in range(len(model))))
    made.hold("activations", activations)
    made.hold("hidden states", min(hidden, room))
    if hidden > room:
        made.plan.notes.append(
            f"{format_bytes(hidden - room)} of hidden states go to disk between blocks"
        )


def _pruning(made, source, known, sets):
    """A prune of ``source`` by what is known and what is collected, or learned, on ``sets``."""
    config, plan = made.config, made.plan
    learns, targets, channels = config.score == "gate", [], 0
    if sets and learns:
        targets = learning(made, sets, known.aligned)
    elif sets:
        targets = _calibration(made, sets)
        channels = len(sets) * _norm_bytes(made, targets)
    elif known.named is not None:
        plan.data = {"sequences": known.named.num_sequences, "tokens": known.named.num_tokens}
    if made.adapter is None and made.adapt is not None:  # of an adapter that is not there yet
        targets = targets or find_targets(made.load().model, config.targets, config.ignore)
        matrices = [Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in targets]
        written = 4 * made.cost.lora
    else:
        matrices, written = _saved(made, source, known, targets), file_bytes(source)
    channels += sum(
        value.nbytes
        for norms in (known.norms, known.preserve_norms)
        if norms is not None
        for sums in (norms.sq_sum, norms.norm_sum or {})
        for value in sums.values()
    )
    weights, size = sum(math.prod(m.shape) for m in matrices), sum(m.num_bytes for m in matrices)
    largest = max(matrices, key=lambda m: m.num_bytes)
    bases = [] if known.aligned is None else _matrices(known.aligned, [m.key for m in matrices])
    base_size = sum(m.num_bytes for m in bases)
    copied = written  # the files, before they are written into
    memory = {"weights to prune": size, "masks": weights // 8, "working copy": largest.num_bytes}
    memory["base weights"] = base_size
    if config.stream:
        memory["weights to prune"] = _largest_block(matrices)
        memory["base weights"] = _largest_block(bases)
        if config.scope == "global":  # found in two passes over the targets, pruned in a third
            plan.bytes_read += 2 * (size + base_size * config.score_delta)
        elif targets:  # each block is pruned when it is there for its forward passes
            copied = 0
        if not targets:
            copied -= size  # counted already
    whole = config.scope == "global" and not config.stream
    together = weights if whole else math.prod(largest.shape)
    if config.score == "random":
        memory["scores"] = 4 * together
    elif learns:  # as they were learned, and the copies that are selected from
        memory["scores"] = 4 * (weights + together)
    made.phase(memory)
    made.prunes, made.columns = weights, largest.shape[-1]
    plan.pruned = {"layers": len(matrices), "weights": weights}
    plan.bytes_read += copied + base_size
    plan.bytes_written = written + config.save_norms * channels + config.save_masks * weights // 8
    return made.finish()


def _saved(made, source, known, targets):
    """The weights to prune as they are saved; refused as when they are read and scored."""
    config, keys = made.config, [target.key for target in targets]
    if not targets or known.norms is not None:
        keys, _ = weights_to_prune(config, source, known.named)
        if targets:  # of the data to preserve, beside norms from a file
            check_keys(keys, [target.key for target in targets], "preserve_norms")
    matrices = _matrices(source, keys)
    for name in ("norms", "preserve_norms"):
        norms = getattr(known, name)
        if norms is None:
            continue
        if config.targets is not None or config.ignore:
            norms = norms.subset(keys, name)
        check_keys(keys, norms.sq_sum, name)
        for matrix in matrices:
            columns = matrix.shape[0 if matrix.key in norms.transposed else -1]
            channels = len(norms.act_norm(matrix.key))
            if columns != channels:
                raise DataError(f"{matrix.key}: has {columns} input channels, its norms {channels}")
    return matrices


def _matrices(source, keys):
    matrices = []
    for key in keys:
        name = source.find(key)
        if name is None:
            raise DataError(f"{source.folder}: has no tensor {key!r}")
        entry = source.tensors[name]
        matrices.append(Matrix(key, entry.shape, entry.end - entry.start))
    return matrices


def _largest_block(matrices):
    """Bytes of the targets of one block, the largest."""
    blocks = {}
    for matrix in matrices:
        match = re.search(r"(.*?\.\d+)\.", matrix.key)
        block = match[1] if match else matrix.key
        blocks[block] = blocks.get(block, 0) + matrix.num_bytes
    return max(blocks.values(), default=0)


def _norm_bytes(made, targets):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if made.config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in targets)
