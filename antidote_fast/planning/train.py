"""Plans of align, finetune and evaluate."""

from collections.abc import Callable

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.train import AlignConfig, TrainConfig
from antidote_fast.data.batches import build_prompt, make_batches, prompt_ids
from antidote_fast.data.load import load_records
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_output_folder
from antidote_fast.models.footprint import ADAM_BYTES, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.planning.plan import Builder, Plan


def plan_train(config: TrainConfig) -> Plan:
    """As :func:`antidote_fast.stages.align.run` or ``finetune.run`` would go."""
    from antidote_fast.training import sft

    return training(config, sft.check_config(config, merged=isinstance(config, AlignConfig)))


def training(config: TrainConfig, base: Checkpoint) -> Plan:
    """A training of the model of a checked checkpoint, whichever the config names."""
    from antidote_fast.stages import align, finetune
    from antidote_fast.training import objective, sft

    is_align, lora = isinstance(config, AlignConfig), config.tuning == "lora"
    examples = (align if is_align else finetune).load_examples(config, base)[1]
    adapt = (lambda model: sft.add_lora(model, config)) if lora else None
    made = Builder("align" if is_align else "finetune", config, base, adapt=adapt)
    cost = made.load()
    steps = objective.plan_steps(examples, config)
    batches = []  # (sequences, tokens of each, response tokens)
    for batch in (batch for step in steps for batch in step):
        length = max(len(examples[i]["input_ids"]) for i in batch)
        wanted = sum(label != -100 for i in batch for label in examples[i]["labels"][1:])
        batches.append((len(batch), length, wanted))
    tokens = sum(count * length for count, length, _ in batches)
    squares = sum(count * length**2 for count, length, _ in batches)
    made.plan.data = {
        "sequences": len(examples),
        "optimizer steps": len(steps),
        "tokens with pads, all epochs": tokens,
        "records dropped": examples.num_dropped,
        "truncated": examples.num_truncated,
    }
    made.trains = True
    flops = cost.training.of(tokens, squares, sum(wanted for _, _, wanted in batches))
    # Vaccine goes through twice, RepNoise through harmful text as well, LDIFS ahead once more.
    ahead = cost.forward.of(tokens, squares, 0) if config.defense == "ldifs" else 0
    made.compute("train", flops * (1 + (config.defense in ("vaccine", "repnoise"))) + ahead)
    trained = cost.lora if lora else cost.num_weights
    made.hold("weights", cost.weight_bytes if lora else 4 * trained)
    made.hold("optimizer", ADAM_BYTES * trained)
    if config.defense == "lisa":
        made.hold("anchors", 2 * 4 * trained)
    if config.defense == "ldifs" and not lora:
        made.hold("aligned copy", cost.weight_bytes)
    more = 0
    if not lora and cost.dtype.itemsize < 4:
        # Rehearsed in the dtype of the weights, whose gradients are fp32; and autocast keeps a copy
        # of each weight that it has cast.
        more = (4 - cost.dtype.itemsize) * trained + cost.weight_bytes
    made.train(*max(batches, key=lambda batch: batch[0] * batch[1]), more)
    factors = 4 * cost.lora
    made.plan.bytes_written = factors if lora and not is_align else cost.weight_bytes - factors
    made.read(base, config.dataset, getattr(config, "harmful_dataset", None))
    return made.finish()


def plan_evaluate(config: EvaluateConfig) -> Plan:
    """As :func:`antidote_fast.stages.evaluate.run` would go."""
    from antidote_fast.stages import evaluate

    check_output_folder(config.output_dir, config.overwrite)
    evaluate._check_judges(config)
    sets = evaluate._load_sets(config)
    return evaluation(config, sets, *evaluate._check_models(config))


def evaluation(
    config: EvaluateConfig,
    sets: dict,
    base: Checkpoint,
    adapter: Checkpoint | None,
    adapt: Callable | None = None,
) -> Plan:
    """An evaluation of checked checkpoints; ``adapt`` puts on an adapter that is not there yet."""
    from antidote_fast.stages import evaluate

    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, _ = evaluate._drop_long(sets, tokenizer, config, base.config)
    drift_batches = _drift_batches(config, tokenizer)
    made = Builder("evaluate", config, base, adapter, adapt)
    cost = made.load()
    texts = {build_prompt(r, config.template, tokenizer) for rs in sets.values() for r in rs}
    lengths = [len(prompt_ids(text, tokenizer)) for text in texts]
    new = config.max_new_tokens
    made.plan.data = {
        "prompts": sum(len(records) for records in sets.values()),
        "different ones": len(lengths),
        "prompt tokens": sum(lengths),
        "answer tokens at most": new * len(lengths),
    }
    made.generate(lengths, new)
    made.hold("weights", cost.weight_bytes)
    if lengths:
        batch, length = made.shape
        made.hold("activations", cost.activation_bytes(batch, length))
        made.hold("cache", cost.cache_bytes * batch * (length + new))
    data = (config.harmful_dataset, config.task_dataset, config.benign_dataset)
    made.read(base, adapter, *data, config.drift_dataset)
    if drift_batches:
        made.forward("drift", [batch["input_ids"].shape for batch in drift_batches], times=2)
        made.hold("reference model", weight_bytes(base, config.dtype))
    if config.harmful_dataset and config.judge != "refusal":
        made.plan.notes.append("the judge, loaded when the model has answered, is not counted")
    made.plan.notes.append("as if every answer had max_new_tokens; most end before")
    return made.finish()


def _drift_batches(config, tokenizer):
    """What the embedding drift is measured on; empty without it."""
    if not config.drift_dataset:
        return []
    records = load_records(config.drift_dataset, limit=config.num_samples, require_output=True)
    options = {"template": config.template, "max_seq_length": config.max_seq_length}
    return make_batches(records, tokenizer, batch_size=config.batch_size, **options)
