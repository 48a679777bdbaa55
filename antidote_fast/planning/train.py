"""Plans of align, finetune and evaluate."""

from collections.abc import Callable

from antidote_fast.config.base import each_of
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.train import AlignConfig, TrainConfig
from antidote_fast.data.batches import prompt_ids
from antidote_fast.evaluation.conditions import kinds_asked
from antidote_fast.models.footprint import ADAM_BYTES, weight_bytes
from antidote_fast.planning.plan import Plan
from antidote_fast.stages import align, evaluate, finetune
from antidote_fast.training import objective, sft


def plan_train(config: TrainConfig) -> Plan:
    """As :func:`antidote_fast.stages.align.run` or ``finetune.run`` would go."""
    is_align, lora, defense = (
        isinstance(config, AlignConfig),
        config.tuning == "lora",
        config.defense,
    )
    base = sft.check_config(config, merged=is_align)
    examples = (align if is_align else finetune).load_examples(config, base).examples
    adapt = (lambda model: sft.add_lora(model, config)) if lora else None
    plan = Plan("align" if is_align else "finetune", config, base, adapt=adapt)
    cost = plan.load()
    steps = objective.plan_steps(examples, config)
    batches = []  # (sequences, tokens of each, response tokens)
    for batch in (batch for step in steps for batch in step):
        length = max(len(examples[i]["input_ids"]) for i in batch)
        wanted = sum(label != -100 for i in batch for label in examples[i]["labels"][1:])
        batches.append((len(batch), length, wanted))
    plan.data = {
        "sequences": len(examples),
        "optimizer steps": len(steps),
        "tokens with pads, all epochs": sum(count * length for count, length, _ in batches),
        "records dropped": examples.num_dropped,
        "truncated": examples.num_truncated,
    }
    plan.trains = True
    # Vaccine goes through twice, RepNoise through harmful text as well, LDIFS ahead once more.
    flops = cost.training.of_batches(batches) * (1 + (defense in ("vaccine", "repnoise")))
    if defense == "ldifs":
        flops += cost.forward.of_batches((count, length, 0) for count, length, _ in batches)
    plan.compute("train", flops)
    trained = cost.lora if lora else cost.num_weights
    plan.hold("weights", cost.weight_bytes if lora else 4 * trained)
    plan.hold("optimizer", ADAM_BYTES * trained)
    if defense == "lisa":
        plan.hold("anchors", 2 * 4 * trained)
    if defense == "ldifs" and not lora:
        plan.hold("aligned copy", cost.weight_bytes)
    more = 0
    if not lora and cost.dtype.itemsize < 4:
        # Rehearsed in the dtype of the weights, whose gradients are fp32; and autocast keeps a copy
        # of each weight that it has cast.
        more = (4 - cost.dtype.itemsize) * trained + cost.weight_bytes
    plan.train(batches, more)
    factors = 4 * cost.lora
    plan.bytes_written = factors if lora and not is_align else cost.weight_bytes - factors
    plan.read(base, config.dataset, getattr(config, "harmful_dataset", None))
    return plan.finish()


def plan_evaluate(config: EvaluateConfig, adapt: Callable | None = None) -> Plan:
    """As :func:`antidote_fast.stages.evaluate.run` would go; ``adapt``: as :class:`Plan`."""
    inputs = evaluate.open_inputs(config)
    base, tokenizer, new = inputs.base, inputs.tokenizer, inputs.max_new_tokens
    plan = Plan("evaluate", config, base, inputs.adapter, adapt)
    cost = plan.load()
    lengths: dict[int, list[int]] = {}  # by how many tokens an answer may take
    asked = 0
    for condition in inputs.conditions:
        for kind, named in kinds_asked(condition, inputs.sets_by_kind).items():
            for records in named.values():
                texts = {condition.prompt(record, tokenizer) for record in records}
                lengths.setdefault(new[kind], []).extend(
                    len(prompt_ids(text, tokenizer)) for text in texts
                )
                asked += len(records)
    plan.data = {
        "conditions": len(inputs.conditions),
        "prompts": asked,
        "different ones": sum(map(len, lengths.values())),
        "prompt tokens": sum(map(sum, lengths.values())),
        "answer tokens at most": sum(most * len(some) for most, some in lengths.items()),
    }
    cache = 0
    for most, some in lengths.items():
        plan.generate(some, most)
        cache = max(cache, min(config.batch_size, len(some)) * (max(some) + most))
    plan.hold("weights", cost.weight_bytes)
    if lengths:
        plan.hold("activations", cost.peak_bytes(*plan.shape))
        plan.hold("cache", cost.cache_bytes * cache)
    data = [n for kind in evaluate.KINDS for n in each_of(getattr(config, f"{kind}_dataset"))]
    plan.read(base, inputs.adapter, *data, *each_of(config.held_out_from), config.drift_dataset)
    if inputs.drift_batches:
        shapes = [batch["input_ids"].shape for batch in inputs.drift_batches]
        flops = cost.forward.of_batches((n, length, n * length) for n, length in shapes)
        plan.compute("drift", 2 * flops)
        plan.hold("reference model", weight_bytes(base, config.dtype))
    if config.harmful_dataset and not config.only_phrases:
        plan.notes.append("the judge, loaded when the model has answered, is not counted")
    plan.notes.append("as if every answer had max_new_tokens; most end before")
    return plan.finish()
