"""The align stage: a base model tuned on safe data, written as a whole model."""

import time

from antidote_fast.config.train import AlignConfig
from antidote_fast.data.batches import encode
from antidote_fast.data.load import load_records
from antidote_fast.files.commit import check_free_space, check_output_folder
from antidote_fast.files.provenance import input_files, read_report, run_inputs, write_report
from antidote_fast.files.resume import is_finished
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.footprint import check_memory, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.training import defenses, sft
from antidote_fast.training.checkpoints import training_folder


def run(config: AlignConfig, *, progress=False) -> dict:
    """Tune a model on safe records and write it with its tokenizer.

    With LoRA the adapter is merged, so that a later stage starts from an ordinary model (the
    paper's double LoRA). Data are read and tokenised before any weights are loaded.

    Args:
        config: the model, the data and how to train.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json: ``training`` (as :func:`sft.train`) and ``seconds``.

    Raises:
        DataError: data or a model that cannot be used, an output folder that is taken.
        UsageError: an option out of range.
        AntidoteError: a loss, gradient or weight is not finite; not enough memory or room on the
            disk.
        Interrupted: a signal came, and the checkpoints that were asked for hold the state.
    """
    start = time.perf_counter()
    files = input_files(config)
    watch = Watch(*files)
    base = sft.check_config(config, merged=True)
    tokenizer, examples, records, objective = load_examples(config, base)
    inputs = run_inputs(config, base, None, records=records)
    if config.resume and is_finished(config.output_dir, inputs):
        return read_report(config.output_dir)
    if config.resume:
        check_output_folder(config.output_dir, config.overwrite)
    check_memory(config, [base])
    check_free_space(config.output_dir, weight_bytes(base, config.dtype))
    with training_folder(config, inputs) as (folder, run):
        model, dtype = sft.load_trainable(config, base.folder)
        training = sft.train(
            model,
            tokenizer,
            examples,
            config,
            dtype=dtype,
            objective=objective,
            run=run,
            what="align",
            progress=progress,
        )
        if config.tuning == "lora":
            model = sft.merged(model, "align", run)
        else:
            model = sft.in_dtype(model, dtype, "align", run)
        sft.save(model, tokenizer, folder)
        results = {
            "seconds": round(time.perf_counter() - start, 3),
            "training": training,
            "dtype": str(dtype).removeprefix("torch."),
        }
        report = write_report(folder, "align", config, results, inputs=files)
        watch.check()
        return report


def load_examples(config: AlignConfig, base):
    """(tokenizer, tokenised examples, all records that are trained on, the objective's maker)."""
    records = load_records(config.dataset, limit=config.num_train_samples, require_output=True)
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    examples = encode(records, tokenizer, config.template, config.max_seq_length)
    objective, harmful = defenses.align_objective(config, tokenizer)
    return tokenizer, examples, [*records, *harmful], objective
