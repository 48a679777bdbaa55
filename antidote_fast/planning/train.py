"""Plans of align, finetune and evaluate."""

from collections.abc import Callable

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.train import AlignConfig, TrainConfig
from antidote_fast.data.batches import build_prompt, prompt_ids
from antidote_fast.models.footprint import ADAM_BYTES, weight_bytes
from antidote_fast.planning.plan import Builder, Plan
from antidote_fast.stages import align, evaluate, finetune
from antidote_fast.training import objective, sft


def plan_train(config: TrainConfig) -> Plan:
    """As :func:`antidote_fast.stages.align.run` or ``finetune.run`` would go."""
    is_align, lora = isinstance(config, AlignConfig), config.tuning == "lora"
    base = sft.check_config(config, merged=is_align)
    examples = (align if is_align else finetune).load_examples(config, base).examples
    adapt = (lambda model: sft.add_lora(model, config)) if lora else None
    builder = Builder("align" if is_align else "finetune", config, base, adapt=adapt)
    cost = builder.load()
    steps = objective.plan_steps(examples, config)
    batches = []  # (sequences, tokens of each, response tokens)
    for batch in (batch for step in steps for batch in step):
        length = max(len(examples[i]["input_ids"]) for i in batch)
        wanted = sum(label != -100 for i in batch for label in examples[i]["labels"][1:])
        batches.append((len(batch), length, wanted))
    tokens = sum(count * length for count, length, _ in batches)
    squares = sum(count * length**2 for count, length, _ in batches)
    builder.plan.data = {
        "sequences": len(examples),
        "optimizer steps": len(steps),
        "tokens with pads, all epochs": tokens,
        "records dropped": examples.num_dropped,
        "truncated": examples.num_truncated,
    }
    builder.trains = True
    flops = cost.training.of(tokens, squares, sum(wanted for _, _, wanted in batches))
    # Vaccine goes through twice, RepNoise through harmful text as well, LDIFS ahead once more.
    ahead = cost.forward.of(tokens, squares, 0) if config.defense == "ldifs" else 0
    builder.compute("train", flops * (1 + (config.defense in ("vaccine", "repnoise"))) + ahead)
    trained = cost.lora if lora else cost.num_weights
    builder.hold("weights", cost.weight_bytes if lora else 4 * trained)
    builder.hold("optimizer", ADAM_BYTES * trained)
    if config.defense == "lisa":
        builder.hold("anchors", 2 * 4 * trained)
    if config.defense == "ldifs" and not lora:
        builder.hold("aligned copy", cost.weight_bytes)
    more = 0
    if not lora and cost.dtype.itemsize < 4:
        # Rehearsed in the dtype of the weights, whose gradients are fp32; and autocast keeps a copy
        # of each weight that it has cast.
        more = (4 - cost.dtype.itemsize) * trained + cost.weight_bytes
    builder.train(*max(batches, key=lambda batch: batch[0] * batch[1]), more)
    factors = 4 * cost.lora
    builder.plan.bytes_written = factors if lora and not is_align else cost.weight_bytes - factors
    builder.read(base, config.dataset, getattr(config, "harmful_dataset", None))
    return builder.finish()


def plan_evaluate(config: EvaluateConfig, adapt: Callable | None = None) -> Plan:
    """As :func:`antidote_fast.stages.evaluate.run` would go.

    Args:
        config: the stage's.
        adapt: puts an adapter on the model that is not there yet.
    """
    inputs = evaluate.open_inputs(config)
    base, tokenizer, new = inputs.base, inputs.tokenizer, config.max_new_tokens
    builder = Builder("evaluate", config, base, inputs.adapter, adapt)
    cost = builder.load()
    records = [record for some in inputs.sets.values() for record in some]
    texts = {build_prompt(record, config.template, tokenizer) for record in records}
    lengths = [len(prompt_ids(text, tokenizer)) for text in texts]
    builder.plan.data = {
        "prompts": len(records),
        "different ones": len(lengths),
        "prompt tokens": sum(lengths),
        "answer tokens at most": new * len(lengths),
    }
    builder.generate(lengths, new)
    builder.hold("weights", cost.weight_bytes)
    if lengths:
        batch, length = builder.shape
        builder.hold("activations", cost.activation_bytes(batch, length))
        builder.hold("cache", cost.cache_bytes * batch * (length + new))
    data = (config.harmful_dataset, config.task_dataset, config.benign_dataset)
    builder.read(base, inputs.adapter, *data, config.drift_dataset)
    if inputs.drift_batches:
        shapes = [batch["input_ids"].shape for batch in inputs.drift_batches]
        builder.forward("drift", 2 * shapes, every_logit=True)
        builder.hold("reference model", weight_bytes(base, config.dtype))
    if config.harmful_dataset and config.judge != "refusal":
        builder.plan.notes.append("the judge, loaded when the model has answered, is not counted")
    builder.plan.notes.append("as if every answer had max_new_tokens; most end before")
    return builder.finish()
