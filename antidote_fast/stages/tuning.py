"""What align and finetune share: data are checked, a model is loaded, tuned and written."""

import time
from collections.abc import Callable
from typing import Any

from antidote_fast.config.train import TrainConfig
from antidote_fast.data.batches import encode
from antidote_fast.files.commit import check_free_space, check_output_folder
from antidote_fast.files.provenance import input_files, read_report, run_inputs, write_report
from antidote_fast.files.resume import is_finished
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.footprint import check_memory, weight_bytes
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.training import sft
from antidote_fast.training.checkpoints import training_folder


def tune(
    config: TrainConfig,
    stage: str,
    load: Callable[[Any], tuple[list, dict]],
    make_objective: Callable[[Any, Any], tuple[Any, list]],
    *,
    merges: bool = False,
    progress: Any = False,
) -> dict:
    """Tune a model and write it, or its new adapter, with the tokenizer and the report.

    Args:
        config: the model, the data and how to train.
        stage: its name, for messages and the report.
        load: gives the config's records to train on, and what the report says of them.
        make_objective: gives what a step's loss is, and the further records that it takes, from the
            config and the tokenizer.
        merges: merge an adapter into the weights and write a whole model.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json.

    Raises:
        What the stages say.
    """
    start = time.perf_counter()
    files = input_files(config)
    watch = Watch(*files)
    base = sft.check_config(config, merged=merges)
    records, about = load(config)
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    examples = encode(records, tokenizer, config.template, config.max_seq_length)
    objective, others = make_objective(config, tokenizer)
    made_from = run_inputs(config, base, None, records=[*records, *others])
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
        training = sft.train(
            model,
            tokenizer,
            examples,
            config,
            dtype=dtype,
            objective=objective,
            run=run,
            what=stage,
            progress=progress,
        )
        if config.tuning == "full":
            model = sft.in_dtype(model, dtype, stage, run)
        elif merges:
            model = sft.merged(model, stage, run)
        sft.save(model, tokenizer, folder)
        results = {
            "seconds": round(time.perf_counter() - start, 3),
            "training": training,
            "dtype": str(dtype).removeprefix("torch."),
            **about,
        }
        report = write_report(folder, stage, config, results, inputs=files)
        watch.check()
        return report
