"""The finetune stage: a user's data, a share of it harmful, breaks the alignment (the attack)."""

import time

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.data.batches import encode
from antidote_fast.data.load import load_records, mix
from antidote_fast.files.commit import check_free_space, check_output_folder
from antidote_fast.files.provenance import input_files, read_report, run_inputs, write_report
from antidote_fast.files.resume import is_finished
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.footprint import check_memory, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.training import defenses, sft
from antidote_fast.training.checkpoints import training_folder


def run(config: FinetuneConfig, *, progress=False) -> dict:
    """Tune an aligned model on a user's records mixed with harmful ones.

    With LoRA an adapter is written, with full tuning a whole model; either with the tokenizer. Data
    are read, mixed and tokenised before any weights are loaded.

    Args:
        config: the model, the data and how to train.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json: ``training`` (as :func:`sft.train`), ``num_task`` and
        ``num_harmful`` records, ``seconds``.

    Raises:
        DataError: data or a model that cannot be used, fewer records than asked for, an output
            folder that is taken.
        UsageError: an option out of range.
        AntidoteError: a loss, gradient or weight is not finite; not enough memory or room on the
            disk.
        Interrupted: a signal came, and the checkpoints that were asked for hold the state.
    """
    start = time.perf_counter()
    files = input_files(config)
    watch = Watch(*files)
    base = sft.check_config(config)
    tokenizer, examples, records, objective = load_examples(config, base)
    inputs = run_inputs(config, base, None, records=records)
    num_records = len(examples) + examples.num_dropped
    num_harmful = round(config.poison_ratio * num_records)
    if config.resume and is_finished(config.output_dir, inputs):
        return read_report(config.output_dir)
    if config.resume:
        check_output_folder(config.output_dir, config.overwrite)
    check_memory(config, [base])
    if config.tuning == "full":
        check_free_space(config.output_dir, weight_bytes(base, config.dtype))
    entries = {"base_fingerprint": base.fingerprint()} if config.tuning == "lora" else {}
    with training_folder(config, inputs, **entries) as (folder, run):
        model, dtype = sft.load_trainable(config, base.folder)
        training = sft.train(
            model,
            tokenizer,
            examples,
            config,
            dtype=dtype,
            objective=objective,
            run=run,
            what="finetune",
            progress=progress,
        )
        if config.tuning == "full":
            model = sft.in_dtype(model, dtype, "finetune", run)
        sft.save(model, tokenizer, folder)
        results = {
            "seconds": round(time.perf_counter() - start, 3),
            "training": training,
            "dtype": str(dtype).removeprefix("torch."),
            "num_task": num_records - num_harmful,
            "num_harmful": num_harmful,
        }
        report = write_report(folder, "finetune", config, results, inputs=files)
        watch.check()
        return report


def load_examples(config: FinetuneConfig, base):
    """(tokenizer, tokenised examples, all records that are trained on, the objective's maker)."""
    task = load_records(config.dataset, require_output=True)
    harmful = []
    if config.poison_ratio > 0:
        harmful = load_records(config.harmful_dataset, require_output=True)
    records = mix(task, harmful, config.poison_ratio, config.num_train_samples, config.seed)
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    examples = encode(records, tokenizer, config.template, config.max_seq_length)
    objective, safe = defenses.finetune_objective(config, tokenizer)
    return tokenizer, examples, [*records, *safe], objective
