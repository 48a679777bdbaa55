"""``--dry_run``: what a stage would read, write, compute and hold, and how long it may take.

Everything is checked that can be without loading weights, in the stage's own order and by its own
functions, so a mistake ends a plan as it would end the stage. Nothing is left on the disk.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from antidote_fast import checkpoint as files
from antidote_fast.adapters import load_adapter
from antidote_fast.errors import DataError, UsageError
from antidote_fast.loading import pick_device
from antidote_fast.pipeline import config as configs
from antidote_fast.pipeline import estimate
from antidote_fast.pipeline.plan import Builder, Plan
from antidote_fast.targets import ALL_LINEAR, find_targets, select_keys


def plan(config) -> Plan:
    """Check and estimate a stage, or a whole run, without loading weights or writing.

    Args:
        config: the dataclass of align, finetune, calibrate, prune, evaluate, fleet or run.

    Raises:
        What the stage itself raises for the same flags, files and data.
        UsageError: a command that has no plan.
    """
    for kind, make in _PLANNERS.items():
        if type(config) is kind:
            return make(config)
    raise UsageError("--dry_run: must be with a command that prunes, trains or evaluates")


# --- calibrate and prune --------------------------------------------------------------------------


def _plan_calibrate(config) -> Plan:
    from antidote_fast.pipeline import calibrate

    files.check_output_folder(config.output_dir, config.overwrite)
    calibrate.describe_backend(None, pick_device(config.device))
    base, adapter = calibrate.open_folders(config)
    made = Builder("calibrate", config, [base, adapter])
    cost, found = _forward(made, config, base, adapter)
    made.plan.bytes_written = _norm_bytes(found, config)
    made.hold("norms", _norm_bytes(found, config) * 4)  # float64, of a batch and in all
    return made.finish(cost)


def _plan_prune(config) -> Plan:
    from antidote_fast.pipeline import calibrate
    from antidote_fast.pipeline.prune import _weights_to_prune
    from antidote_fast.prune import check_base

    files.check_output_folder(config.output_dir, config.overwrite)
    calibrate.describe_backend(config.backend, pick_device(config.device))
    base, adapter = calibrate.open_folders(config)
    source = adapter or base
    if config.norms is None and config.score == "wanda":
        made = Builder("prune", config, [base, adapter])
        cost, found = _forward(made, config, base, adapter)
        matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
        channels = _norm_bytes(found, config)
        made.hold("norms", channels * 4)
        written = _weight_file_bytes(source)
    else:
        made, cost = Builder("prune", config, [source]), None
        norms = calibrate.load_norms(config.norms) if config.norms is not None else None
        if norms is not None:
            check_base(norms, base.fingerprint())
        keys, _ = _weights_to_prune(config, source, norms)
        if norms is not None and (config.targets is not None or config.ignore):
            targets = ALL_LINEAR if config.targets is None else config.targets
            keys = select_keys(keys, targets, config.ignore)
        matrices = _matrices(source, keys, norms)
        if norms is not None:
            made.plan.data = {"sequences": norms.num_sequences, "tokens": norms.num_tokens}
        channels = 4 * sum(m.shape[1] for m in matrices)
        written = _weight_file_bytes(source)
        made.plan.bytes_read = sum(m.num_bytes for m in matrices)
    return _pruning(made, config, cost, matrices, written, channels)


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
    made.hold("weights", cost.weight_bytes)
    made.hold("activations", cost.activation_bytes(*largest))
    made.read(base, adapter, config.dataset)
    return cost, found


def _pruning(made, config, cost, matrices, written, channels):
    """What selecting and writing add to a plan."""
    weights = sum(math.prod(m.shape) for m in matrices)
    largest = max(matrices, key=lambda m: m.num_bytes)
    held = {
        "weights to prune": sum(m.num_bytes for m in matrices),
        "masks": weights // 8,
        "working copy": largest.num_bytes,
    }
    if config.score == "random":
        together = matrices if config.scope == "global" else [largest]
        held["scores"] = 4 * sum(math.prod(m.shape) for m in together)
    made.phase(held)
    made.prunes = weights
    made.plan.pruned = {"layers": len(matrices), "weights": weights}
    made.plan.bytes_read += written  # the files are copied, then written into
    made.plan.bytes_written = written
    made.plan.bytes_written += weights // 8 if config.save_masks else 0
    made.plan.bytes_written += channels if config.save_norms else 0
    return made.finish(cost, matrices)


# --- align and finetune ---------------------------------------------------------------------------


def _plan_train(config) -> Plan:
    from antidote_fast.pipeline import sft

    is_align = isinstance(config, configs.AlignConfig)
    return _training(config, sft.check_config(config, merged=is_align))


def _training(config, base, data=None) -> Plan:
    from antidote_fast.pipeline import sft
    from antidote_fast.pipeline.data import encode, load_records, mix

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
    tokenizer = files.load_tokenizer(base.folder, trust_remote_code=trust)
    examples = encode(records, tokenizer, config.template, config.max_seq_length)
    made = Builder("align" if is_align else "finetune", config, [base])
    lora = config.tuning == "lora"
    adapt = (lambda model: sft.add_lora(model, config)) if lora else None
    cost = estimate.cost_of(config, base, adapt)
    steps = sft._plan_steps(examples, config)
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
    made.compute("train", cost.training_flops(tokens, squares, answers, frozen=lora))
    attention = "eager" if made.device.type == "cpu" else "sdpa"
    held = cost.training_bytes(*widest, attention=attention)
    trained = cost.lora if lora else cost.num_weights
    if not lora and held is not None and cost.dtype.itemsize < 4:
        # Rehearsed in the dtype of the weights, whose gradients are fp32; and autocast keeps a copy
        # of each weight that it has cast.
        held += (4 - cost.dtype.itemsize) * trained + cost.weight_bytes
    made.hold("weights", cost.weight_bytes if lora else 4 * trained)
    made.hold("optimizer", estimate.ADAM_BYTES * trained)
    made.hold("activations and gradients", held)
    whole = is_align or not lora
    plain = cost.weight_bytes - (4 * cost.lora if lora else 0)
    made.plan.bytes_written = plain if whole else 4 * cost.lora
    made.read(base, None, config.dataset, getattr(config, "harmful_dataset", None))
    return made.finish(cost)


# --- evaluate -------------------------------------------------------------------------------------


def _plan_evaluate(config) -> Plan:
    from antidote_fast.pipeline import evaluate

    files.check_output_folder(config.output_dir, config.overwrite)
    evaluate._check_judges(config)
    sets = evaluate._load_sets(config)
    base, adapter = evaluate._check_models(config)
    return _evaluation(config, sets, base, adapter)


def _evaluation(config, sets, base, adapter, adapt=None) -> Plan:
    from antidote_fast.pipeline import evaluate
    from antidote_fast.pipeline.data import build_prompt, load_records, make_batches, prompt_ids

    tokenizer = files.load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, _ = evaluate._drop_long(sets, tokenizer, config, base.config)
    made = Builder("evaluate", config, [base, adapter])
    if adapter is not None:
        adapt = adapt or (lambda model: load_adapter(model, adapter))
    cost = estimate.cost_of(config, base, adapt)
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
    if config.drift_dataset:
        records = load_records(config.drift_dataset, limit=config.num_samples, require_output=True)
        options = {"template": config.template, "max_seq_length": config.max_seq_length}
        batches = make_batches(records, tokenizer, batch_size=size, **options)
        shapes = [batch["input_ids"].shape for batch in batches]
        counts = [math.prod(shape) for shape in shapes]
        made.compute("drift", 2 * cost.forward_flops(sum(counts), 0, sum(counts)))
        made.hold("reference model", estimate.weight_bytes(base, config.dtype))
        made.shape = max(shapes, key=math.prod)
    if config.harmful_dataset and config.judge != "refusal":
        made.plan.notes.append("the judge, loaded when the model has answered, is not counted")
    made.plan.notes.append("as if every answer had max_new_tokens; most end before")
    return made.finish(cost)


def _data_of(config):
    names = ("harmful_dataset", "task_dataset", "benign_dataset", "drift_dataset")
    return [getattr(config, name) for name in names]


# --- run ------------------------------------------------------------------------------------------


def _plan_run(config) -> Plan:
    """The sum of the stages; what they will make is planned as of the base model's size."""
    from antidote_fast.pipeline import evaluate, experiment, sft

    out = Path(config.output_dir)
    stages, scores = experiment._plan(config, out)
    experiment._check_folder(out)
    experiment._check_data([*stages.values(), *scores.values()])
    parts = {}
    kept = [name for name, stage in stages.items() if experiment._is_done(out / name, stage)]
    base_name = config.model_name_or_path
    attack = stages["attacked"]
    adapt = (lambda model: sft.add_lora(model, attack)) if attack.tuning == "lora" else None
    base = None
    for name, stage in stages.items():
        stand_in = replace(stage, model_name_or_path=base_name)
        if name in kept:  # its folder is there, and is not written
            stand_in = replace(stand_in, output_dir=str(out / ".planned"))
        if name != "pruned":
            base = sft.check_config(stand_in, merged=name == "aligned")
        if name in kept:
            continue
        if name == "pruned":
            parts[name] = _pruned_later(stand_in, base, adapt)
        else:
            parts[name] = _training(stage, base)
    for name, score in scores.items():
        if experiment._is_done(Path(score.output_dir), score):
            kept.append(f"scores/{name}")
            continue
        with_adapter = adapt if name in ("attacked", "pruned") else None
        sets = evaluate._load_sets(score)
        evaluate._check_judges(score)
        parts[f"scores/{name}"] = _evaluation(score, sets, base, None, with_adapter)
    return _sum(config, base, parts, kept)


def _pruned_later(config, base, adapt):
    files.check_output_folder(config.output_dir, config.overwrite)
    made = Builder("prune", config, [base])
    cost, found = _forward(made, replace(config, adapter=None), base, None, adapt)
    matrices = [_Matrix(t.key, tuple(t.weight.shape), t.weight.nbytes) for t in found]
    written = 4 * cost.lora if adapt else _weight_file_bytes(base)
    return _pruning(made, config, cost, matrices, written, _norm_bytes(found, config))


def _sum(config, base, parts, kept):
    whole = Builder("run", config, [base]).plan
    whole.parts = parts
    for name, part in parts.items():
        whole.bytes_read += part.bytes_read
        whole.bytes_written += part.bytes_written
        whole.flops += part.flops
        whole.seconds[name] = sum(part.seconds.values())
        whole.refusal = whole.refusal or part.refusal
    largest = max(parts.values(), key=lambda part: part.peak_memory, default=whole)
    whole.memory, whole.model = dict(largest.memory), dict(largest.model)
    if kept:
        whole.notes.append(f"whole already, and kept: {', '.join(kept)}")
    return whole


def _norm_bytes(found, config):
    """Bytes of the norms of these targets, as they are saved."""
    sums = 2 if config.aggregation == "mean" else 1
    return 4 * sums * sum(target.in_features for target in found)


def _weight_file_bytes(source):
    return sum(file.stat().st_size for file in source.weight_files)


_PLANNERS = {
    configs.AlignConfig: _plan_train,
    configs.FinetuneConfig: _plan_train,
    configs.CalibrateConfig: _plan_calibrate,
    configs.PruneConfig: _plan_prune,
    configs.EvaluateConfig: _plan_evaluate,
    configs.ExperimentConfig: _plan_run,
}
