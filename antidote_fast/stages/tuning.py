"""What align and finetune share: data are checked, a model is loaded, tuned and written."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from antidote_fast.config.train import TrainConfig
from antidote_fast.data.batches import Examples, encode_in
from antidote_fast.data.records import Record
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_free_space, check_output_folder
from antidote_fast.files.provenance import input_files, read_report, run_inputs, write_report
from antidote_fast.files.resume import is_finished
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.footprint import check_memory, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.training import sft
from antidote_fast.training.checkpoints import training_folder


class TrainingData(NamedTuple):
    """What a model is trained on, tokenised.

    Args:
        tokenizer: the model's.
        examples: as :func:`antidote_fast.data.batches.encode`.
        records: all that decide the result, those that a defense takes among them.
        make_objective: gives what a step's loss is, as :func:`sft.train` takes it.
        counts: what the report says of the records.
    """

    tokenizer: Any
    examples: Examples
    records: list[Record]
    make_objective: Callable
    counts: dict[str, int]


def tokenised(
    config: TrainConfig,
    base: Checkpoint,
    records: list[Record],
    objective_of: Callable,
    counts: dict[str, int] | None = None,
) -> TrainingData:
    """Tokenise records, and the further ones of the config's defense.

    ``objective_of`` gives (the objective's maker, further records) of a config and a tokenizer,
    ``counts`` is what the report says of the records.
    """
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    examples = encode_in(records, tokenizer, config.used_templates, config.max_seq_length)
    make_objective, others = objective_of(config, tokenizer)
    return TrainingData(tokenizer, examples, [*records, *others], make_objective, counts or {})


def tune(
    config: TrainConfig,
    stage: str,
    load_examples: Callable[[Any, Checkpoint], TrainingData],
    *,
    merges: bool = False,
    progress: Any = False,
) -> dict:
    """Tune a model and write it, or its new adapter, with the tokenizer and the report.

    Args:
        config: the model, the data and how to train.
        stage: its name, for messages and the report.
        load_examples: reads what it trains on, from the config and the model's checkpoint.
        merges: merge an adapter into the weights and write a whole model.
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
    base = sft.check_config(config, merged=merges)
    data = load_examples(config, base)
    made_from = run_inputs(config, base, records={"dataset": data.records})
    if config.resume:
        if is_finished(config.output_dir, made_from):
            return read_report(config.output_dir)
        check_output_folder(config.output_dir, config.overwrite)
    check_memory(config, [base])
    is_whole = merges or config.tuning == "full"
    if is_whole:
        check_free_space(config.output_dir, weight_bytes(base, config.dtype))
    entries = {} if is_whole else {"base_fingerprint": base.fingerprint()}
    with training_folder(config, made_from, **entries) as (folder, run):
        model, dtype = sft.load_trainable(config, base.folder)
        how: dict[str, Any] = {"dtype": dtype, "objective": data.make_objective, "run": run}
        about = (model, data.tokenizer, data.examples, config)
        training = sft.train(*about, **how, what=stage, progress=progress)
        if config.tuning == "full":
            model = sft.in_dtype(model, dtype, stage, run)
        elif merges:
            model = sft.merged(model, stage, run)
        sft.save(model, data.tokenizer, folder)
        results = {
            "seconds": round(time.perf_counter() - start, 3),
            "training": training,
            "dtype": str(dtype).removeprefix("torch."),
            **data.counts,
        }
        report = write_report(folder, stage, config, results, inputs=files)
        watch.check()
        return report
