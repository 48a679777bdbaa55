"""Plans of calibrate, prune and fleet."""

import math
import re
from dataclasses import dataclass, replace

from antidote_fast import checkpoint as files
from antidote_fast.adapters import load_adapter
from antidote_fast.commit import read_manifest
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.loading import pick_device
from antidote_fast.memory import format_bytes
from antidote_fast.pipeline import config as configs
from antidote_fast.pipeline import estimate
from antidote_fast.pipeline.inputs import run_inputs
from antidote_fast.pipeline.plan import Builder, Plan
from antidote_fast.resume import interrupted_state, is_finished
from antidote_fast.targets import ALL_LINEAR, find_targets, select_keys


def plan_calibrate(config) -> Plan:
    """As :func:`antidote_fast.pipeline.calibrate.run` would go."""
    base, adapter = _opened(config, None)
    made = Builder("calibrate", config, [base, adapter])
    if _is_whole(made, config, base, adapter, None):
        return made.plan
    cost, found = _forward(made, config, base, adapter)
    made.plan.bytes_written = _norm_bytes(found, config)
    made.hold("norms", _norm_bytes(found, config) * 4)  # float64, of a batch and in all
    return made.finish(cost)


def plan_prune(config) -> Plan:
    """As :func:`antidote_fast.pipeline.prune.run` would go."""
    from antidote_fast.pipeline import calibrate
    from antidote_fast.prune import check_base

    base, adapter = _opened(config, config.backend)
    source = adapter or base
    written = _weight_file_bytes(source)
    norms = None
    if config.norms is not None:
        norms = calibrate.load_norms(config.norms)
        check_base(norms, base.fingerprint())
    runs = norms is None and config.score == "wanda"
    made = Builder("prune", config, [base, adapter] if runs else [source])
    if _is_whole(made, config, base, adapter, norms):
        return made.plan
    if runs:
        cost, found = _forward(made, config, base, adapter)
        matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
        channels = _norm_bytes(found, config)
        made.hold("norms", channels * 4)
    else:
        cost = None
        matrices = _named(made, config, source, norms)
        channels = 4 * sum(m.shape[1] for m in matrices)
    return _pruning(made, config, cost, matrices, written, channels)


def _opened(config, backend):
    """(base, adapter or None), refused as the stages refuse them."""
    from antidote_fast.pipeline import calibrate

    calibrate.describe_backend(backend, pick_device(config.device))
    if not config.resume:
        files.check_output_folder(config.output_dir, config.overwrite)
    return calibrate.open_folders(config)


def _is_whole(made, config, base, adapter, norms):
    """Whether ``resume`` leaves it at what is there; else the output folder is checked."""
    from antidote_fast.pipeline import calibrate

    runs = norms is None and getattr(config, "score", "wanda") == "wanda"
    records = calibrate.load_data(config, None) if runs else None
    inputs = run_inputs(config, base, adapter, records=records, norms=norms)
    if config.resume and is_finished(config.output_dir, inputs):
        made.plan.notes.append("output_dir is whole, from these inputs: nothing would be done")
        return True
    files.check_output_folder(config.output_dir, config.overwrite)
    if config.stream:
        options = {"resume": config.resume, "overwrite": config.overwrite}
        if interrupted_state(config.output_dir, inputs, **options):
            made.plan.notes.append("goes on where a run was interrupted: figures are of all of it")
    return False


def _named(made, config, source, norms):
    """The weights of a prune that needs no forward pass."""
    from antidote_fast.pipeline.prune import _weights_to_prune

    if norms is not None:
        made.plan.data = {"sequences": norms.num_sequences, "tokens": norms.num_tokens}
    keys, _ = _weights_to_prune(config, source, norms)
    if norms is not None and (config.targets is not None or config.ignore):
        targets = ALL_LINEAR if config.targets is None else config.targets
        keys = select_keys(keys, targets, config.ignore)
    matrices = _matrices(source, keys, norms)
    made.plan.bytes_read = sum(m.num_bytes for m in matrices)
    return matrices


def pruned_later(config, base, adapt) -> Plan:
    """The prune of a run: of what is not there yet, and is as large as the base or its adapter."""
    files.check_output_folder(config.output_dir, config.overwrite)
    made = Builder("prune", config, [base])
    cost, found = _forward(made, replace(config, adapter=None), base, None, adapt)
    matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
    written = 4 * cost.lora if adapt else _weight_file_bytes(base)
    return _pruning(made, config, cost, matrices, written, _norm_bytes(found, config))


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


def _forward(made, config, base, adapter, adapt=None):
    """Data, model and targets of a calibration: (cost, targets)."""
    from antidote_fast.pipeline import calibrate

    records = calibrate.load_data(config, None)
    trust = config.trust_remote_code
    tokenizer = files.load_tokenizer(base.folder, trust_remote_code=trust)
    batches = calibrate.batches_of(config, records, tokenizer, base.config)
    if adapter is not None:
        adapt = adapt or (lambda model: load_adapter(model, adapter))
    cost = estimate.cost_of(config, base, adapt)
    found = find_targets(cost.model, config.targets, config.ignore)
    shapes = [batch["input_ids"].shape for batch in batches]
    tokens = sum(math.prod(shape) for shape in shapes)
    squares = sum(count * length**2 for count, length in shapes)
    sequences = sum(count for count, _ in shapes)
    made.plan.data = {
        "sequences": sequences,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "tokens with pads": tokens,
        "records dropped": batches.num_dropped,
        "truncated": batches.num_truncated,
    }
    largest = max(shapes, key=math.prod)
    made.shape = largest
    made.compute("calibrate", cost.forward_flops(tokens, squares, sequences))
    if getattr(config, "stream", False):
        _stream(made, config, base, adapter, batches, cost, tokens)
    else:
        made.hold("weights", cost.weight_bytes)
        made.hold("activations", cost.activation_bytes(*largest))
    made.read(base, adapter, config.dataset)
    return cost, found


def _stream(made, config, base, adapter, batches, cost, tokens):
    """What is held of a model that runs block by block; refused where that is too much."""
    from antidote_fast.pipeline import stream
    from antidote_fast.streaming.blocks import BlockModel

    model = BlockModel(
        base,
        adapter,
        dtype=config.dtype,
        device=made.device,
        trust_remote_code=config.trust_remote_code,
    )
    room, ahead = stream.room_for_hidden(config, model, batches)
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


def _pruning(made, config, cost, matrices, written, channels):
    """What selecting and writing add to a plan."""
    weights = sum(math.prod(m.shape) for m in matrices)
    largest = max(matrices, key=lambda m: m.num_bytes)
    held = {
        "weights to prune": sum(m.num_bytes for m in matrices),
        "masks": weights // 8,
        "working copy": largest.num_bytes,
    }
    copied = written  # the files, before they are written into
    if getattr(config, "stream", False):
        held["weights to prune"] = _largest_block(matrices)
        targets = sum(m.num_bytes for m in matrices)
        if config.scope == "global":  # found in two passes over the targets, pruned in a third
            made.plan.bytes_read += 2 * targets
        elif cost is not None:  # each block is pruned when it is there for its forward passes
            copied = 0
        if cost is None:
            copied -= targets  # counted already
    if config.score == "random":
        streamed = getattr(config, "stream", False)
        together = matrices if config.scope == "global" and not streamed else [largest]
        held["scores"] = 4 * sum(math.prod(m.shape) for m in together)
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
    """As :func:`antidote_fast.pipeline.fleet.run` would go, as if nothing were done yet."""
    from antidote_fast.pipeline.fleet_manifest import read_manifest_file
    from antidote_fast.pipeline.fleet_worker import _AHEAD, Worker

    jobs = read_manifest_file(config)
    index, count = configs.parse_shard(config.shard)
    jobs = jobs[index::count]
    worker = Worker(config)
    worker.check_data(jobs)
    made = Builder("fleet", config, [worker.base])
    made.read(worker.base, config.dataset)
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
        if job.config.score != "wanda":
            continue
        if cost is None:
            cost = estimate.cost_of(config, worker.base, lambda m, a=adapter: load_adapter(m, a))
        try:
            batches, *_ = worker._data_of(job.config)
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
    made.hold("adapters on their way", 2 * (1 + _AHEAD) * largest)
    return made.finish(cost, matrices)


def _job_flops(cost, config, shapes):
    """Of the forwards for one adapter, which end with the last target's input."""
    found = find_targets(cost.model, config.targets, config.ignore)
    tokens = sum(math.prod(shape) for shape in shapes)
    squares = sum(number * length**2 for number, length in shapes)
    return cost.flops_until([target.weight for target in found], tokens, squares)


def _adapter_of(job, base):
    adapter = files.open_checkpoint(job.config.adapter)
    if not adapter.is_adapter:
        raise DataError(f"adapter={job.config.adapter!r}: is a whole model, not an adapter")
    files.check_adapter(adapter, base)
    return adapter


def _norm_bytes(found, config):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in found)


def _weight_file_bytes(source):
    return sum(file.stat().st_size for file in source.weight_files)
