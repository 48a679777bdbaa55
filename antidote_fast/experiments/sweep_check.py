"""What a sweep refuses before weights are loaded, by the functions of evaluate and calibrate."""

import importlib
from dataclasses import dataclass

from antidote_fast.config.sweep import SweepConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.data.load import local_file
from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_output_folder
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_tokenizer, pick_device
from antidote_fast.stages import evaluate
from antidote_fast.stages.gates.answers import check_texts
from antidote_fast.stages.gates.stage import check_stage, texts_of
from antidote_fast.stages.inputs import describe_backend, load_data, open_aligned, open_folders


@dataclass(frozen=True)
class Checked:
    """What a sweep needs, checked, before weights are loaded.

    Args:
        base, adapter, aligned: checkpoints; the last two may be None.
        tokenizer: the base's.
        sets: records to choose on, by harmful, task and benign; those too long are left out.
        datasets: what the report says of them.
        records: {field of the config: calibration records}.
        batches: the same as batches.
        prompts: {field of the config: records that gates are learned on}; empty without.
        judge: options of :func:`antidote_fast.evaluation.judges.get_judge`.
        backend: as :func:`antidote_fast.stages.inputs.describe_backend`.
    """

    base: Checkpoint
    adapter: Checkpoint | None
    aligned: Checkpoint | None
    tokenizer: object
    sets: dict
    datasets: dict
    records: dict
    batches: dict
    prompts: dict
    judge: dict
    backend: dict


def check(config: SweepConfig, progress=False) -> Checked:
    """Everything that can be refused without weights.

    Raises:
        As :func:`antidote_fast.experiments.sweep.run`.
    """
    check_output_folder(config.output_dir, config.overwrite)
    backend = describe_backend(config.backend, pick_device(config.device))
    importlib.import_module("matplotlib")  # for the picture, which is drawn last
    evaluation = config.evaluation()
    judge = evaluate._check_judges(evaluation)
    sets = evaluate._load_sets(evaluation)
    names = [name for name in ("dataset", "preserve_dataset") if _kinds_of(config, name)]
    records = {name: load_data(config, None, name) for name in names}
    prompts = {}
    if config.learned:
        learning = config.learning()
        for name in ("dataset", "preserve_dataset"):
            prompts[name] = load_data(learning, None, name)
    for name, some in sets.items():
        for calibration in (records, prompts):
            _check_apart(config, f"{name}_dataset", some, calibration)
    base, adapter = open_folders(config, progress)
    aligned = open_aligned(config, base, progress)
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)
    sets, datasets = evaluate._drop_long(sets, tokenizer, evaluation, base.config)
    batches = {
        name: batches_of(config, some, tokenizer, base.config) for name, some in records.items()
    }
    if config.learned:
        check_stage(config.learning(), base, adapter is not None)
        check_texts(tokenizer, *prompts.values(), **texts_of(config))
    check_memory(config, [base, adapter])
    parts = (sets, datasets, records, batches, prompts, judge, backend)
    return Checked(base, adapter, aligned, tokenizer, *parts)


def _kinds_of(config, name):
    """The kinds of norms that are collected on the data set of this field."""
    return [k for k in config.kinds if (k == "preserve") == (name == "preserve_dataset")]


def _check_apart(config, field, records, calibration):
    """Refuse prompts to choose on that are calibrated on: what is chosen would look too good."""
    for name, others in calibration.items():
        seen = {record.prompt_key for record in others}
        common = sum(record.prompt_key in seen for record in records)
        if common:
            raise DataError(
                f"{field}={getattr(config, field)!r}: {common} of its {len(records)} prompts are "
                f"in {name}={getattr(config, name)!r}, which calibrates; must be held out from it"
            )


def inputs_of(config) -> list:
    """The files and folders that a sweep reads, for the hashes in its report."""
    data = ("dataset", "preserve_dataset", "harmful_dataset", "task_dataset", "benign_dataset")
    named = (getattr(config, name) for name in data)
    models = (config.model_name_or_path, config.adapter, config.aligned_model)
    return [*models, *(local_file(name) for name in named if name)]
