"""Plans of calibrate and prune: what a model says of the data, and what is pruned by it."""

import collections
import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.errors import DataError
from antidote_fast.files.resume import interrupted_state
from antidote_fast.files.tensor_file import TensorEntry
from antidote_fast.models.targets import Target, find_targets
from antidote_fast.planning.plan import Plan
from antidote_fast.pruning.evidence import check_keys
from antidote_fast.stages.evidence import weights_to_prune
from antidote_fast.stages.gates.answers import Answers, check_texts, fill_pools, fits, kinds_of
from antidote_fast.stages.gates.stage import kinds, texts_of
from antidote_fast.stages.inputs import LEARNED_ON, Inputs, learner_of, open_inputs
from antidote_fast.system.memory import format_bytes

# As if the aligned model refused every harmful prompt and answered every ordinary one.
_REFUSAL, _ANSWER = "I cannot help with that request", "This is how that is done"


def plan_calibrate(config: CalibrateConfig) -> Plan:
    """As :func:`antidote_fast.stages.calibrate.run` would go."""
    inputs = open_inputs(config)
    plan = Plan("calibrate", config, inputs.base, inputs.adapter)
    if _is_whole(plan, inputs):
        return plan
    plan.bytes_written = _norm_bytes(config, _calibration(plan, inputs))
    return plan.finish()


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
    plan = Plan("prune", config, *folders, adapt=adapt)
    if _is_whole(plan, inputs):
        return plan
    learns, targets, norm_bytes = learner_of(config) is not None, [], 0
    if inputs.records:
        targets = (_learning if learns else _calibration)(plan, inputs)
        norm_bytes = 0 if learns else len(inputs.records) * _norm_bytes(config, targets)
    elif (norms := inputs.naming_norms) is not None:
        plan.data = {"sequences": norms.num_sequences, "tokens": norms.num_tokens}
    if adapt is None:
        weights, written = _saved(inputs, targets), inputs.source.file_bytes
    else:
        targets = targets or find_targets(plan.load().model, config.targets, config.ignore)
        saved = functools.partial(TensorEntry, Path(), torch.float32, start=0)
        weights = {t.key: saved(tuple(t.weight.shape), end=t.weight.nbytes) for t in targets}
        written = 4 * plan.cost.lora
    for norms in inputs.evidence.named_norms.values():
        sums = (*norms.sq_sum.values(), *(norms.norm_sum or {}).values())
        norm_bytes += sum(value.nbytes for value in sums)
    plan.prunes = sum(entry.num_elements for entry in weights.values())
    plan.pruned = {"layers": len(weights), "weights": plan.prunes}
    plan.bytes_written = written + config.save_norms * norm_bytes
    plan.bytes_written += config.save_masks * plan.prunes // 8
    bases = {} if inputs.aligned is None else {key: inputs.aligned.entry(key) for key in weights}
    _pruning(plan, weights, bases, written, bool(inputs.records), learns)
    return plan.finish()


def _is_whole(plan, inputs: Inputs):
    """Whether ``resume`` leaves it at what is there."""
    config = inputs.config
    if inputs.is_whole():
        plan.notes.append("output_dir is whole, from these inputs: nothing would be done")
        return True
    options = {"resume": config.resume, "overwrite": config.overwrite}
    if config.stream and interrupted_state(config.output_dir, inputs.made_from, **options):
        plan.notes.append("goes on where a run was interrupted: figures are of all of it")
    return False


def _calibration(plan, inputs) -> list[Target]:
    """Add the forward passes over the data; returns the targets."""
    config, batches = plan.config, []
    for name, records in inputs.records.items():
        some = batches_of(config, records, inputs.tokenizer, plan.base.config)
        shapes = [batch["input_ids"].shape for batch in some]
        counts = {
            "sequences": sum(count for count, _ in shapes),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in some),
            "tokens with pads": sum(map(math.prod, shapes)),
            "records dropped": some.num_dropped,
            "truncated": some.num_truncated,
        }
        prefix = "preserve " if name == "preserve_dataset" else ""
        plan.data |= {prefix + what: count for what, count in counts.items()}
        plan.read(getattr(config, name))
        batches += some
    cost = plan.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    plan.forward("calibrate", [batch["input_ids"].shape for batch in batches])
    if config.stream:
        _stream(plan, batches)
    else:
        plan.hold("weights", cost.weight_bytes)
        plan.hold("activations", cost.peak_bytes(*plan.shape))
    # float64, of a batch and in all
    plan.hold("norms", 4 * len(inputs.records) * _norm_bytes(config, targets))
    plan.read(plan.base, plan.adapter)
    return targets


def _stream(plan, batches):
    """What is held of a model that runs block by block; refused where that is too much."""
    from antidote_fast.streaming.blocks import BlockModel
    from antidote_fast.streaming.spill import room_for_hidden

    config, cost = plan.config, plan.cost
    options = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    model = BlockModel(plan.base, plan.adapter, device=plan.device, **options)
    room, ahead = room_for_hidden(config, model, batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    hidden = tokens * cost.config.hidden_size * cost.dtype.itemsize
    plan.hold("embeddings and adapter", model.outside_bytes + 4 * cost.lora)
    plan.hold("blocks", (2 + ahead) * max(model.num_bytes(i) for i in range(len(model))))
    plan.hold("activations", cost.peak_bytes(*plan.shape))
    plan.hold("hidden states", min(hidden, room))
    if hidden > room:
        size = format_bytes(hidden - room)
        plan.notes.append(f"{size} of hidden states go to disk between blocks")


def _learning(plan, inputs) -> list[Target]:
    """Add answers of the aligned model, and steps forwards and back; returns the targets."""
    config, mixture, texts = plan.config, plan.config.mixture, texts_of(plan.config)
    tokenizer, new = inputs.tokenizer, mixture.answer_tokens
    sets = kinds(inputs.records)
    check_texts(tokenizer, **sets, **texts)

    def answers(records, text):
        text = " ".join([text] * new)  # of more tokens than are generated
        return [
            text if fits(record, tokenizer, template, config.max_seq_length) else None
            for template in config.gate_templates or [config.template]
            for record in records
        ]

    _, ordinary = kinds_of(sets["preserve"], sets["ordinary"])
    answered = Answers(answers(sets["harmful"], _REFUSAL), answers(ordinary, _ANSWER))
    options = {"answers": answered, "answer_tokens": new}
    pools = fill_pools(tokenizer, **sets, **texts, **options).examples
    cost = plan.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    cost.model.requires_grad_(False)
    for target in targets:
        target.weight.requires_grad_(True)
    prompts, batches, a_step = [], [], []
    for kind, examples in pools.items():
        wanted = [sum(label != -100 for label in example["labels"]) for example in examples]
        lengths = [len(example["labels"]) for example in examples]
        if kind != "task":
            prompts += [length - n for length, n in zip(lengths, wanted, strict=True)]
        count = getattr(mixture, kind)
        share = count / len(examples)  # of each, on the average
        a_step += [(share, n, share * m) for n, m in zip(lengths, wanted, strict=True)]
        rows = min(count, config.batch_size)
        batches.append((rows, max(lengths), rows * max(wanted)))
    plan.generate(prompts, new)
    plan.compute("learn gates", int(config.gate_steps * cost.training.of_batches(a_step)))
    plan.data = {
        "harmful prompts": len(pools["harmful"]),
        "task records": len(pools.get("task", ())),
        "ordinary prompts": len(pools.get("ordinary", ())),
        "steps": config.gate_steps,
    }
    plan.hold("weights", cost.weight_bytes)
    plan.train(batches)
    size = sum(target.weight.nbytes for target in targets)
    # Three fp32 matrices a target and their gradients, and the weights as they were.
    plan.hold("gates", 4 * 4 * sum(target.weight.numel() for target in targets))
    plan.hold("copy of the targets", size)
    plan.read(plan.base, plan.adapter, inputs.aligned, *(getattr(config, n) for n in LEARNED_ON))
    if inputs.aligned is not None:
        plan.hold("base of the targets", size)
        plan.bytes_read += size
    plan.notes.append("as if the aligned model refused every harmful prompt, and no other")
    return targets


def _pruning(plan, weights, bases, written, sees_data, learns):
    """What selecting and writing read and hold, when the model has been given back."""
    config = plan.config
    size, base_size = (sum(e.num_bytes for e in some.values()) for some in (weights, bases))
    largest = max(weights.values(), key=lambda entry: entry.num_bytes)
    plan.columns = largest.shape[-1]
    plan.bytes_read += written + base_size  # the files, before they are written into
    memory = {"weights to prune": size, "masks": plan.prunes // 8, "base weights": base_size}
    memory["working copy"] = largest.num_bytes
    if config.stream:
        memory["weights to prune"], memory["base weights"] = map(_largest_block, (weights, bases))
        if config.scope == "global":  # found in two passes over the targets, pruned in a third
            plan.bytes_read += 2 * (size + base_size * config.score_delta)
        elif sees_data:  # each block is pruned when it is there for its forward passes
            plan.bytes_read -= written
        if not sees_data:
            plan.bytes_read -= size  # counted already
    whole = config.scope == "global" and not config.stream
    together = plan.prunes if whole else largest.num_elements
    if learns:  # as they were learned, and the copies that are selected from
        memory["scores"] = 4 * (plan.prunes + together)
    elif config.scoring.own_matrix:
        memory["scores"] = 4 * together
    plan.phase(memory)


def _saved(inputs, targets) -> dict[str, TensorEntry]:
    """The weights to prune as they are saved; refused as when they are read and scored."""
    config, evidence = inputs.config, inputs.evidence
    keys = [target.key for target in targets]
    if not targets or evidence.norms is not None:
        keys, _ = weights_to_prune(config, inputs.source, inputs.naming_norms)
        if targets:  # of the data to preserve, beside norms from a file
            check_keys(keys, [target.key for target in targets], "preserve_norms")
    weights = {key: inputs.source.entry(key) for key in keys}
    if config.targets is not None or config.ignore:
        evidence = evidence.narrowed(keys)
    for name, norms in evidence.named_norms.items():
        check_keys(keys, norms.sq_sum, name)
        for key, entry in weights.items():
            columns = entry.shape[0 if key in norms.transposed else -1]
            channels = len(norms.act_norm(key))
            if columns != channels:
                raise DataError(f"{key}: has {columns} input channels, its norms {channels}")
    return weights


def _largest_block(weights):
    """Bytes of the targets of one block, the largest."""
    blocks = collections.Counter()
    for key, entry in weights.items():
        match = re.match(r".*?\.\d+\.", key)
        blocks[match[0] if match else key] += entry.num_bytes
    return max(blocks.values(), default=0)


def _norm_bytes(config, targets):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in targets)
