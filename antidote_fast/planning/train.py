"""Plans of align, finetune and evaluate."""

import math

from antidote_fast.config import train as configs
from antidote_fast.files.commit import check_output_folder
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.footprint import ADAM_BYTES, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.planning.cost import cost_of
from antidote_fast.planning.plan import Builder, Plan


def plan_train(config) -> Plan:
    """As :func:`antidote_fast.stages.align.run` or ``finetune.run`` would go."""
    from antidote_fast.training import sft

    is_align = isinstance(config, configs.AlignConfig)
    return training(config, sft.check_config(config, merged=is_align))


def training(config, base) -> Plan:
    """A training of the model of a checked checkpoint, whichever the config names."""
    from antidote_fast.data.batches import encode
    from antidote_fast.data.load import load_records, mix
    from antidote_fast.training import defenses, objective, sft

    is_align = isinstance(config, configs.AlignConfig)
    if is_align:
        records = load_records(config.dataset, limit=config.num_train_samples, require_output=True)
    else:
        task = load_records(config.dataset, require_output=True)
        harmful = []
        if config.poison_ratio > 0:
            harmful = load_records(config.harmful_dataset, require_output=True)
        records = mix(task, harmful, config.poison_ratio, config.num_train_samples, config.seed)
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)
    examples = encode(records, tokenizer, config.template, config.max_seq_length)
    check_other_data = defenses.align_objective if is_align else defenses.finetune_objective
    check_other_data(config, tokenizer)
    made = Builder("align" if is_align else "finetune", config, [base])
    lora = config.tuning == "lora"
    adapt = (lambda model: sft.add_lora(model, config)) if lora else None
    cost = cost_of(config, base, adapt)
    steps = objective.plan_steps(examples, config)
    tokens = squares = answers = 0
    widest = (0, 0, 0)
    for batch in (batch for step in steps for batch in step):
        length = max(len(examples[i]["input_ids"]) for i in batch)
        wanted = sum(label != -100 for i in batch for label in examples[i]["labels"][1:])
        tokens += len(batch) * length
        squares += len(batch) * length**2
        answers += wanted
        widest = max(widest, (len(batch), length, wanted), key=lambda b: b[0] * b[1])
    made.plan.data = {
        "sequences": len(examples),
        "optimizer steps": len(steps),
        "tokens with pads, all epochs": tokens,
        "records dropped": examples.num_dropped,
        "truncated": examples.num_truncated,
    }
    made.shape = widest[:2]
    made.training = {"frozen": lora, "adapt": adapt}
    once = cost.training_flops(tokens, squares, answers, frozen=lora)
    # Vaccine goes through twice, RepNoise through harmful text as well, LDIFS ahead once more.
    extra = {
        "vaccine": once,
        "repnoise": once,
        "ldifs": cost.forward_flops(tokens, squares, 0),
    }
    made.compute("train", once + extra.get(config.defense, 0))
    attention = "eager" if made.device.type == "cpu" else "sdpa"
    held = cost.training_bytes(*widest, attention=attention)
    trained = cost.lora if lora else cost.num_weights
    if not lora and held is not None and cost.dtype.itemsize < 4:
        # Rehearsed in the dtype of the weights, whose gradients are fp32; and autocast keeps a copy
        # of each weight that it has cast.
        held += (4 - cost.dtype.itemsize) * trained + cost.weight_bytes
    made.hold("weights", cost.weight_bytes if lora else 4 * trained)
    made.hold("optimizer", ADAM_BYTES * trained)
    if config.defense == "lisa":
        made.hold("anchors", 2 * 4 * trained)
    if config.defense == "ldifs" and not lora:
        made.hold("aligned copy", cost.weight_bytes)
    made.hold("activations and gradients", held)
    whole = is_align or not lora
    plain = cost.weight_bytes - (4 * cost.lora if lora else 0)
    made.plan.bytes_written = plain if whole else 4 * cost.lora
    made.read(base, None, config.dataset, getattr(config, "harmful_dataset", None))
    return made.finish(cost)


def plan_evaluate(config) -> Plan:
    """As :func:`antidote_fast.stages.evaluate.run` would go."""
    from antidote_fast.stages import evaluate

    check_output_folder(config.output_dir, config.overwrite)
    evaluate.check_judges(config)
    sets = evaluate.load_sets(config)
    base, adapter = evaluate.open_models(config)
    return evaluation(config, sets, base, adapter)


def evaluation(config, sets, base, adapter, adapt=None) -> Plan:
    """An evaluation of checked checkpoints; ``adapt`` puts on an adapter that is not there yet."""
    from antidote_fast.data.batches import build_prompt, prompt_ids
    from antidote_fast.stages import evaluate

    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, _ = evaluate.drop_long(sets, tokenizer, config, base.config)
    batches = _drift_batches(config, tokenizer)
    made = Builder("evaluate", config, [base, adapter])
    if adapter is not None:
        adapt = adapt or (lambda model: load_adapter(model, adapter))
    cost = cost_of(config, base, adapt)
    texts = {build_prompt(r, config.template, tokenizer) for rs in sets.values() for r in rs}
    lengths = sorted((len(prompt_ids(text, tokenizer)) for text in texts), reverse=True)
    size = config.batch_size
    chunks = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    new = config.max_new_tokens
    tokens = sum(len(chunk) * chunk[0] for chunk in chunks)
    squares = sum(len(chunk) * chunk[0] ** 2 for chunk in chunks)
    made.compute("read prompts", cost.forward_flops(tokens, squares, len(lengths)))
    # An answer's token looks at the prompt and at the tokens before it.
    seen = sum(len(chunk) * (chunk[0] * new + new**2 // 2) for chunk in chunks)
    count = new * len(lengths)
    made.decode("answer", cost.forward_flops(count, seen, count))
    made.plan.data = {
        "prompts": sum(len(records) for records in sets.values()),
        "different ones": len(lengths),
        "prompt tokens": sum(lengths),
        "answer tokens at most": count,
    }
    made.hold("weights", cost.weight_bytes)
    if chunks:
        made.shape = len(chunks[0]), chunks[0][0]
        made.hold("activations", cost.activation_bytes(len(chunks[0]), chunks[0][0]))
        made.hold("cache", cost.cache_bytes * len(chunks[0]) * (chunks[0][0] + new))
    made.read(base, adapter, *_data_of(config))
    if batches:
        shapes = [batch["input_ids"].shape for batch in batches]
        counts = [math.prod(shape) for shape in shapes]
        squares = sum(count * length**2 for count, length in shapes)
        made.compute("drift", 2 * cost.forward_flops(sum(counts), squares, sum(counts)))
        made.hold("reference model", weight_bytes(base, config.dtype))
        made.shape = max(shapes, key=math.prod)
    if config.harmful_dataset and config.judge != "refusal":
        made.plan.notes.append("the judge, loaded when the model has answered, is not counted")
    made.plan.notes.append("as if every answer had max_new_tokens; most end before")
    return made.finish(cost)


def _drift_batches(config, tokenizer):
    """What the embedding drift is measured on; empty without it."""
    from antidote_fast.data.batches import make_batches
    from antidote_fast.data.load import load_records

    if not config.drift_dataset:
        return []
    records = load_records(config.drift_dataset, limit=config.num_samples, require_output=True)
    options = {"template": config.template, "max_seq_length": config.max_seq_length}
    return make_batches(records, tokenizer, batch_size=config.batch_size, **options)


def _data_of(config):
    names = ("harmful_dataset", "task_dataset", "benign_dataset", "drift_dataset")
    return [getattr(config, name) for name in names]
