"""Plans of calibrate and prune: what a model says of the data, and what is pruned by it."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from antidote_fast.config.prune import CalibrateConfig, GateMixture, PruneConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.errors import DataError
from antidote_fast.files.resume import interrupted_state
from antidote_fast.models.targets import Target, find_targets
from antidote_fast.planning.plan import Builder, Plan, file_bytes
from antidote_fast.pruning.evidence import check_keys
from antidote_fast.stages.evidence import weights_to_prune
from antidote_fast.stages.gates.answers import Answers, check_texts, fill_pools, fits, ordinary_of
from antidote_fast.stages.gates.stage import texts_of
from antidote_fast.stages.inputs import Inputs, learner_of, open_inputs
from antidote_fast.system.memory import format_bytes

# As if the aligned model refused every harmful prompt and answered every ordinary one.
_REFUSAL, _ANSWER = "I cannot help with that request", "This is how that is done"


def plan_calibrate(config: CalibrateConfig) -> Plan:
    """As :func:`antidote_fast.stages.calibrate.run` would go."""
    inputs = open_inputs(config)
    made = Builder("calibrate", config, inputs.base, inputs.adapter)
    if _is_whole(made.plan, inputs):
        return made.plan
    made.plan.bytes_written = _norm_bytes(config, _calibration(made, inputs))
    return made.finish()


def plan_prune(config: PruneConfig, adapt: Callable | None = None) -> Plan:
    """As :func:`antidote_fast.stages.prune.run` would go.

    Args:
        config: the stage's.
        adapt: puts an adapter on the model that is to be pruned, and is not there yet.
    """
    stand_in = config
    if adapt is not None:  # a whole model is in its place, which needs an aligned one
        stand_in = replace(config, aligned_model=config.aligned_model or config.model_name_or_path)
    inputs = open_inputs(stand_in)
    if config.aligned_model is None:
        inputs.aligned = None
    folders = (inputs.base, inputs.adapter) if inputs.records else (inputs.source,)
    made = Builder("prune", config, *folders, adapt=adapt)
    plan, evidence, source = made.plan, inputs.evidence, inputs.source
    if _is_whole(plan, inputs):
        return plan
    learns, targets, norm_bytes = learner_of(config) is not None, [], 0
    if inputs.records:
        targets = (_learning if learns else _calibration)(made, inputs)
        norm_bytes = 0 if learns else len(inputs.records) * _norm_bytes(config, targets)
    elif inputs.naming_norms is not None:
        norms = inputs.naming_norms
        plan.data = {"sequences": norms.num_sequences, "tokens": norms.num_tokens}
    if adapt is None:
        matrices, written = _saved(inputs, targets), file_bytes(source)
    else:
        targets = targets or find_targets(made.load().model, config.targets, config.ignore)
        matrices = [Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in targets]
        written = 4 * made.cost.lora
    for norms in evidence.named_norms.values():
        for sums in (norms.sq_sum, norms.norm_sum or {}):
            norm_bytes += sum(value.nbytes for value in sums.values())
    bases = inputs.aligned and _matrices(inputs.aligned, [matrix.key for matrix in matrices])
    _pruning(made, matrices, bases or [], written, bool(targets), learns)
    weights = sum(math.prod(matrix.shape) for matrix in matrices)
    plan.pruned = {"layers": len(matrices), "weights": weights}
    plan.bytes_written = written + config.save_norms * norm_bytes
    plan.bytes_written += config.save_masks * weights // 8
    return made.finish()


class Matrix(NamedTuple):
    """A weight that may be pruned, as it is saved."""

    key: str
    shape: tuple[int, ...]
    num_bytes: int


def _is_whole(plan, inputs: Inputs):
    """Whether ``resume`` leaves it at what is there."""
    config = inputs.config
    if inputs.is_whole():
        plan.notes.append("output_dir is whole, from these inputs: nothing would be done")
        return True
    if config.stream:
        options = {"resume": config.resume, "overwrite": config.overwrite}
        if interrupted_state(config.output_dir, inputs.made_from, **options):
            plan.notes.append("goes on where a run was interrupted: figures are of all of it")
    return False


def _calibration(made, inputs) -> list[Target]:
    """Add the forward passes over the data; returns the targets."""
    config, base = made.config, made.base
    batches = []
    for name, records in inputs.records.items():
        some = batches_of(config, records, inputs.tokenizer, base.config)
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
        made.read(getattr(config, name))
        batches += some
    cost = made.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    made.forward("calibrate", [batch["input_ids"].shape for batch in batches])
    if config.stream:
        _stream(made, batches)
    else:
        made.hold("weights", cost.weight_bytes)
    made.hold("activations", cost.activation_bytes(*made.shape))
    # float64, of a batch and in all
    made.hold("norms", 4 * len(inputs.records) * _norm_bytes(config, targets))
    made.read(base, made.adapter)
    return targets


def _stream(made, batches):
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
    made.hold("hidden states", min(hidden, room))
    if hidden > room:
        made.plan.notes.append(
            f"{format_bytes(hidden - room)} of hidden states go to disk between blocks"
        )


def _learning(made, inputs) -> list[Target]:
    """Add answers of the aligned model, and steps forwards and back; returns the targets."""
    config, mixture, texts = made.config, GateMixture(), texts_of(made.config)
    tokenizer, new = inputs.tokenizer, mixture.answer_tokens
    harmful, preserve = inputs.records["dataset"], inputs.records["preserve_dataset"]
    check_texts(tokenizer, harmful, preserve, **texts)

    def answers(records, text):
        text = " ".join([text] * new)  # of more tokens than are generated
        return [text if fits(record, tokenizer, **texts) else None for record in records]

    answered = Answers(answers(harmful, _REFUSAL), answers(ordinary_of(preserve), _ANSWER))
    pools = fill_pools(tokenizer, harmful, preserve, answered, answer_tokens=new, **texts).examples
    cost = made.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    cost.model.requires_grad_(False)
    for target in targets:
        target.weight.requires_grad_(True)
    asked, batches = [], []
    tokens = squares = logits = 0
    for kind, examples in pools.items():
        wanted = [sum(label != -100 for label in example["labels"]) for example in examples]
        lengths = [len(example["labels"]) for example in examples]
        if kind != "task":
            asked += [length - n for length, n in zip(lengths, wanted, strict=True)]
        a_step = getattr(mixture, kind)
        tokens += a_step * sum(lengths) / len(lengths)
        squares += a_step * sum(length**2 for length in lengths) / len(lengths)
        logits += a_step * sum(wanted) / len(wanted)
        rows = min(a_step, config.batch_size)
        batches.append((rows, max(lengths), rows * max(wanted)))
    made.generate(asked, new)
    made.compute("learn gates", int(config.gate_steps * cost.training.of(tokens, squares, logits)))
    made.plan.data = {
        "harmful prompts": len(pools["harmful"]),
        "task records": len(pools.get("task", ())),
        "ordinary prompts": len(pools.get("ordinary", ())),
        "steps": config.gate_steps,
    }
    made.hold("weights", cost.weight_bytes)
    made.train(*max(batches, key=lambda batch: batch[0] * batch[1]))
    size = sum(target.weight.nbytes for target in targets)
    # Three fp32 matrices a target and their gradients, and the weights as they were.
    made.hold("gates", 4 * 4 * sum(target.weight.numel() for target in targets))
    made.hold("copy of the targets", size)
    made.read(made.base, made.adapter, inputs.aligned, config.dataset, config.preserve_dataset)
    if inputs.aligned is not None:
        made.hold("base of the targets", size)
        made.plan.bytes_read += size
    made.plan.notes.append("as if the aligned model refused every harmful prompt, and no other")
    return targets


def _pruning(made, matrices, bases, written, sees_data, learns):
    """What selecting and writing read and hold, when the model has been given back."""
    config = made.config
    size, base_size = (sum(m.num_bytes for m in some) for some in (matrices, bases))
    weights, largest = (
        sum(math.prod(m.shape) for m in matrices),
        max(matrices, key=lambda m: m.num_bytes),
    )
    made.prunes, made.columns = weights, largest.shape[-1]
    made.plan.bytes_read += written + base_size  # the files, before they are written into
    memory = {"weights to prune": size, "masks": weights // 8, "base weights": base_size}
    memory["working copy"] = largest.num_bytes
    if config.stream:
        memory["weights to prune"], memory["base weights"] = map(_largest_block, (matrices, bases))
        if config.scope == "global":  # found in two passes over the targets, pruned in a third
            made.plan.bytes_read += 2 * (size + base_size * config.score_delta)
        elif sees_data:  # each block is pruned when it is there for its forward passes
            made.plan.bytes_read -= written
        if not sees_data:
            made.plan.bytes_read -= size  # counted already
    whole = config.scope == "global" and not config.stream
    together = weights if whole else math.prod(largest.shape)
    if config.score == "random":
        memory["scores"] = 4 * together
    elif learns:  # as they were learned, and the copies that are selected from
        memory["scores"] = 4 * (weights + together)
    made.phase(memory)


def _saved(inputs, targets) -> list[Matrix]:
    """The weights to prune as they are saved; refused as when they are read and scored."""
    config, evidence = inputs.config, inputs.evidence
    keys = [target.key for target in targets]
    if not targets or evidence.norms is not None:
        keys, _ = weights_to_prune(config, inputs.source, inputs.naming_norms)
        if targets:  # of the data to preserve, beside norms from a file
            check_keys(keys, [target.key for target in targets], "preserve_norms")
    matrices = _matrices(inputs.source, keys)
    if config.targets is not None or config.ignore:
        evidence = evidence.narrowed(keys)
    for name, norms in evidence.named_norms.items():
        check_keys(keys, norms.sq_sum, name)
        for key, shape, _ in matrices:
            columns, channels = (
                shape[0 if key in norms.transposed else -1],
                len(norms.act_norm(key)),
            )
            if columns != channels:
                raise DataError(f"{key}: has {columns} input channels, its norms {channels}")
    return matrices


def _matrices(source, keys) -> list[Matrix]:
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


def _norm_bytes(config, targets):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in targets)
