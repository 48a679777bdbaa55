"""Plans of calibrate, prune and fleet."""

import math
import re
from dataclasses import dataclass

from antidote_fast.config.fleet import parse_shard
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files import pruned_copy as files
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import check_output_folder, check_parent
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.resume import interrupted_state
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.cost import cost_of
from antidote_fast.planning.gates import learning
from antidote_fast.planning.plan import Builder, Plan
from antidote_fast.system.memory import format_bytes


def plan_calibrate(config) -> Plan:
    """As :func:`antidote_fast.stages.calibrate.run` would go."""
    from antidote_fast.stages.inputs import open_inputs

    inputs = open_inputs(config)
    base, adapter, sets = inputs.base, inputs.adapter, inputs.records
    made = Builder("calibrate", config, [base, adapter])
    if _is_whole(made, config, inputs):
        return made.plan
    cost, found = _forward(made, config, base, adapter, sets)
    made.plan.bytes_written = _norm_bytes(found, config)
    made.hold("norms", _norm_bytes(found, config) * 4)  # float64, of a batch and in all
    return made.finish(cost)


def plan_prune(config) -> Plan:
    """As :func:`antidote_fast.stages.prune.run` would go."""
    from antidote_fast.pruning.evidence import check_keys
    from antidote_fast.stages.inputs import open_inputs

    inputs = open_inputs(config)
    base, adapter, sets, source = inputs.base, inputs.adapter, inputs.records, inputs.source
    evidence = inputs.evidence
    written = _weight_file_bytes(source)
    made = Builder("prune", config, [base, adapter] if sets else [source])
    if _is_whole(made, config, inputs):
        return made.plan
    cost, channels = None, 0
    if sets:
        if config.score == "gate":
            cost, found = learning(made, config, base, adapter, sets, aligned=inputs.aligned)
        else:
            cost, found = _forward(made, config, base, adapter, sets)
            channels = len(sets) * _norm_bytes(found, config)
            made.hold("norms", channels * 4)
        matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
    kept = evidence.preserve_norms
    if cost is None or evidence.norms is not None:
        named = _named(made, inputs)
        if cost is not None:  # of the data to preserve, beside norms from a file
            check_keys([m.key for m in named], [m.key for m in matrices], "preserve_norms")
        matrices = named
    elif kept is not None:
        keys = [m.key for m in matrices]
        if config.targets is not None or config.ignore:
            kept = kept.subset(keys, "preserve_norms")
        check_keys(keys, kept.sq_sum, "preserve_norms")
        _matrices(source, keys, kept)
    channels += sum(map(_saved_bytes, evidence.named_norms.values()))
    return _pruning(made, config, cost, matrices, written, channels, inputs.aligned)


def _is_whole(made, config, inputs):
    """Whether ``resume`` leaves it at what is there; else the output folder is checked."""
    if inputs.is_whole():
        made.plan.notes.append("output_dir is whole, from these inputs: nothing would be done")
        return True
    if config.stream:
        options = {"resume": config.resume, "overwrite": config.overwrite}
        if interrupted_state(config.output_dir, inputs.made_from, **options):
            made.plan.notes.append("goes on where a run was interrupted: figures are of all of it")
    return False


def _named(made, inputs):
    """The weights of a prune that needs no forward pass, or whose norms are partly there."""
    from antidote_fast.stages.evidence import weights_to_prune

    norms, source = inputs.naming_norms, inputs.source
    if norms is not None and not made.plan.data:
        made.plan.data = {"sequences": norms.num_sequences, "tokens": norms.num_tokens}
    keys, _ = weights_to_prune(inputs.config, source, norms)
    matrices = _matrices(source, keys, inputs.evidence.norms)
    _matrices(source, keys, inputs.evidence.preserve_norms)
    return matrices


def pruned_later(config, base, adapt) -> Plan:
    """The prune of a run: of what is not there yet, and is as large as the base or its adapter."""
    from antidote_fast.stages.inputs import load_data, open_aligned

    check_output_folder(config.output_dir, config.overwrite)
    made = Builder("prune", config, [base])
    names = ["dataset"] if config.preserve_dataset is None else ["dataset", "preserve_dataset"]
    sets = {name: load_data(config, None, name) for name in names}
    aligned = open_aligned(config, base)
    if config.score == "gate":
        cost, found = learning(made, config, base, None, sets, adapt, aligned)
        channels = 0
    else:
        cost, found = _forward(made, config, base, None, sets, adapt)
        channels = len(sets) * _norm_bytes(found, config)
    matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
    written = 4 * cost.lora if adapt else _weight_file_bytes(base)
    return _pruning(made, config, cost, matrices, written, channels, aligned)


@dataclass(frozen=True)
class _Matrix:
    key: str
    shape: tuple[int, int]
    num_bytes: int


def _matrices(source, keys, norms):
    """The saved weights of these names; refused as when they are read."""
    found = []
    for key in keys:
        name = source.find(key)
        if name is None:
            raise DataError(f"{source.folder}: has no tensor {key!r}")
        entry = source.tensors[name]
        found.append(_Matrix(key, entry.shape, entry.end - entry.start))
        if norms is not None:
            columns = entry.shape[0 if key in norms.transposed else -1]
            channels = len(norms.act_norm(key))
            if columns != channels:
                raise DataError(f"{key}: has {columns} input channels, its norms {channels}")
    return found


def _forward(made, config, base, adapter, sets, adapt=None):
    """Data, model and targets of a calibration on {field: records}: (cost, targets)."""
    from antidote_fast.data.batches import batches_of

    trust = config.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)
    batches = []
    for name, records in sets.items():
        some = batches_of(config, records, tokenizer, base.config)
        batches += some
        made.plan.data |= _about(some, "preserve " if name == "preserve_dataset" else "")
    if adapter is not None:
        adapt = adapt or (lambda model: load_adapter(model, adapter))
    cost = cost_of(config, base, adapt)
    found = find_targets(cost.model, config.targets, config.ignore)
    shapes = [batch["input_ids"].shape for batch in batches]
    tokens = sum(math.prod(shape) for shape in shapes)
    squares = sum(count * length**2 for count, length in shapes)
    sequences = sum(count for count, _ in shapes)
    largest = max(shapes, key=math.prod)
    made.shape = largest
    made.compute("calibrate", cost.forward_flops(tokens, squares, sequences))
    if getattr(config, "stream", False):
        _stream(made, config, base, adapter, batches, cost, tokens)
    else:
        made.hold("weights", cost.weight_bytes)
        made.hold("activations", cost.activation_bytes(*largest))
    made.read(base, adapter, *(getattr(config, name) for name in sets))
    return cost, found


def _about(batches, prefix):
    """What a plan says of a data set."""
    shapes = [batch["input_ids"].shape for batch in batches]
    about = {
        "sequences": sum(count for count, _ in shapes),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "tokens with pads": sum(math.prod(shape) for shape in shapes),
        "records dropped": batches.num_dropped,
        "truncated": batches.num_truncated,
    }
    return {prefix + name: value for name, value in about.items()}


def _stream(made, config, base, adapter, batches, cost, tokens):
    """What is held of a model that runs block by block; refused where that is too much."""
    from antidote_fast.streaming.blocks import BlockModel
    from antidote_fast.streaming.spill import room_for_hidden

    model = BlockModel(
        base,
        adapter,
        dtype=config.dtype,
        device=made.device,
        trust_remote_code=config.trust_remote_code,
    )
    room, ahead = room_for_hidden(config, model, batches)
    block = max(model.num_bytes(i) for i in range(len(model)))
    hidden = tokens * cost.config.hidden_size * cost.dtype.itemsize
    made.hold("embeddings and adapter", model.outside_bytes + 4 * cost.lora)
    made.hold("blocks", (2 + ahead) * block)
    made.hold("activations", _block_activations(cost, batches))
    made.hold("hidden states", min(hidden, room))
    if hidden > room:
        made.plan.notes.append(
            f"{format_bytes(hidden - room)} of hidden states go to disk between blocks"
        )


def _block_activations(cost, batches):
    """What a forward pass holds beside the hidden states: as of the whole model."""
    return cost.activation_bytes(*max((b["input_ids"].shape for b in batches), key=math.prod))


def _pruning(made, config, cost, matrices, written, channels, aligned=None):
    """What selecting and writing add to a plan."""
    weights = sum(math.prod(m.shape) for m in matrices)
    largest = max(matrices, key=lambda m: m.num_bytes)
    held = {
        "weights to prune": sum(m.num_bytes for m in matrices),
        "masks": weights // 8,
        "working copy": largest.num_bytes,
    }
    bases = [] if aligned is None else _matrices(aligned, [m.key for m in matrices], None)
    base_bytes = sum(m.num_bytes for m in bases)
    held["base weights"] = base_bytes
    made.plan.bytes_read += base_bytes
    copied = written  # the files, before they are written into
    if getattr(config, "stream", False):
        held["weights to prune"] = _largest_block(matrices)
        held["base weights"] = _largest_block(bases) if bases else 0
        targets = sum(m.num_bytes for m in matrices)
        if config.scope == "global":  # found in two passes over the targets, pruned in a third
            made.plan.bytes_read += 2 * (targets + base_bytes * config.score_delta)
        elif cost is not None:  # each block is pruned when it is there for its forward passes
            copied = 0
        if cost is None:
            copied -= targets  # counted already
    if config.score == "random":
        streamed = getattr(config, "stream", False)
        together = matrices if config.scope == "global" and not streamed else [largest]
        held["scores"] = 4 * sum(math.prod(m.shape) for m in together)
    elif config.score == "gate":  # as they were learned, and the copies that are selected from
        together = matrices if config.scope == "global" else [largest]
        held["scores"] = 4 * (weights + sum(math.prod(m.shape) for m in together))
    made.phase(held)
    made.prunes = weights
    made.plan.pruned = {"layers": len(matrices), "weights": weights}
    made.plan.bytes_read += copied
    made.plan.bytes_written = written
    made.plan.bytes_written += weights // 8 if config.save_masks else 0
    made.plan.bytes_written += channels if config.save_norms else 0
    return made.finish(cost, matrices)


def _largest_block(matrices):
    """Bytes of the targets of one block, the largest."""
    blocks = {}
    for matrix in matrices:
        match = re.search(r"(.*?\.\d+)\.", matrix.key)
        block = match[1] if match else matrix.key
        blocks[block] = blocks.get(block, 0) + matrix.num_bytes
    return max(blocks.values())


def plan_fleet(config) -> Plan:
    """As :func:`antidote_fast.fleet.fleet.run` would go, as if nothing were done yet."""
    from antidote_fast.fleet.jobs import read_jobs
    from antidote_fast.fleet.worker import AHEAD, Worker
    from antidote_fast.stages.inputs import unseen_data

    jobs = read_jobs(config)
    index, count = parse_shard(config.shard)
    jobs = jobs[index::count]
    check_parent(config.output_dir)
    worker = Worker(config)
    worker.check_data(jobs)
    made = Builder("fleet", config, [worker.base])
    made.read(worker.base, config.dataset, config.preserve_dataset)
    adapters, refused, done, cost, flops = [], [], 0, None, 0
    shapes = [(1, 1)]
    for job in jobs:
        try:
            adapter = _adapter_of(job, worker.base)
            adapters.append((job, adapter, sum(e.end - e.start for e in adapter.tensors.values())))
        except AntidoteError as error:
            refused.append(f"{job.name}: {error}")
            continue
        done += read_manifest(job.config.output_dir) is not None
        names = unseen_data(job.config)
        if not names:
            continue
        if cost is None:
            cost = cost_of(config, worker.base, lambda m, a=adapter: load_adapter(m, a))
        try:
            batches = [b for name in names for b in worker.data_of(job.config, name)[0]]
        except AntidoteError as error:
            refused.append(f"{job.name}: {error}")
            continue
        shapes = [batch["input_ids"].shape for batch in batches]
        flops += _job_flops(cost, job.config, shapes)
    made.shape = max(shapes, key=math.prod)
    made.plan.data = {"jobs": len(jobs), "refused": len(refused), "with a folder already": done}
    made.plan.notes += [f"would be set aside: {line}" for line in refused[:3]]
    size = sum(number for *_, number in adapters)
    made.plan.bytes_read += 2 * size  # read, and copied before it is written into
    made.plan.bytes_written = size
    matrices = [
        _Matrix(key, entry.shape, entry.end - entry.start)
        for _, adapter, _ in adapters[:1]
        for key, entry in adapter.tensors.items()
        if ".lora_" in key and len(entry.shape) == 2
    ]
    made.prunes = len(adapters) * sum(math.prod(m.shape) for m in matrices)
    if cost is not None:
        made.compute("calibrate", flops)
        made.hold("weights", cost.weight_bytes)
        made.hold("activations", cost.activation_bytes(*made.shape))
    largest = max((number for *_, number in adapters), default=0)
    made.hold("adapters on their way", 2 * (1 + AHEAD) * largest)
    return made.finish(cost, matrices)


def _job_flops(cost, config, shapes):
    """Of the forwards for one adapter, which end with the last target's input."""
    found = find_targets(cost.model, config.targets, config.ignore)
    tokens = sum(math.prod(shape) for shape in shapes)
    squares = sum(number * length**2 for number, length in shapes)
    return cost.flops_until([target.weight for target in found], tokens, squares)


def _adapter_of(job, base):
    adapter = open_checkpoint(job.config.adapter)
    if not adapter.is_adapter:
        raise DataError(f"adapter={job.config.adapter!r}: is a whole model, not an adapter")
    files.check_copied(adapter)
    check_adapter(adapter, base)
    return adapter


def _saved_bytes(norms):
    """Bytes of norms that are there, as they are saved."""
    kinds = (norms.sq_sum, norms.norm_sum or {})
    return sum(value.nbytes for sums in kinds for value in sums.values())


def _norm_bytes(found, config):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in found)


def _weight_file_bytes(source):
    return sum(file.stat().st_size for file in source.weight_files)
