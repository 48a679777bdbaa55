"""One call on live objects or folders: calibrate on harmful data, then prune."""

import dataclasses
import os
import time
from collections.abc import Iterable
from typing import Any

import torch

from antidote_fast.config.base import check_left_out, with_new_names
from antidote_fast.config.prune import PruneConfig
from antidote_fast.config.scores import SCORES
from antidote_fast.data.records import Record, rows_to_records
from antidote_fast.distributed.fsdp import is_sharded
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.commit import output_folder
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.models.targets import find_targets, first_computed
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.evidence import gather
from antidote_fast.stages.inputs import open_inputs
from antidote_fast.stages.prune import finish, prune_folder

_IN_MEMORY = ("dataset", "norms", "preserve_dataset", "preserve_norms", "ordinary_dataset")


def oneshot(
    model: str | os.PathLike | torch.nn.Module,
    adapter: str | os.PathLike | None = None,
    dataset: str | os.PathLike | Iterable[Record | dict] | None = None,
    tokenizer: Any = None,
    config: PruneConfig | dict[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    world: World = ALONE,
    **overrides: Any,
) -> PruneReport | None:
    """Calibrate on harmful data and prune, once: adapter in, adapter out; model in, model out.

    Args:
        model: a folder or hub name, or a live transformers or PEFT model, which is pruned in place.
        adapter: adapter folder or hub name on top of ``model``.
        dataset: a JSON or JSONL file or hub name, or an iterable of records (``Record``, or dicts
            with ``instruction``, ``output`` and optionally ``input``).
        tokenizer: of a live model; a folder brings its own unless one is given.
        config: a :class:`PruneConfig`, or a dict of its fields; default its defaults.
        output_dir: the folder to write; a live model may do without.
        world: the ranks that share the samples (:func:`antidote_fast.distributed.world`);
            every one of them calls. Each prunes its live model, a replica or what FSDP2 gave it of
            one; rank 0 writes.
        overrides: fields of :class:`PruneConfig`; they win over ``config``. ``norms`` and
            ``preserve_norms`` may also be :class:`ActivationNorms`; no forward pass is run for them
            then. ``preserve_dataset`` and ``ordinary_dataset`` may be records, as ``dataset``.

    Returns:
        The report, layer by layer; its ``data`` says what became of the records, its ``masks`` are
        there where ``save_masks`` is set. None on the ranks that do not write, where ``model`` is a
        folder.

    Raises:
        UsageError: a field that is unknown or out of range, or one that is missing.
        DataError: data, a model or an adapter that is refused; output_dir that is taken.
        NothingPruned: no weight matched the targets.
    """
    live = not isinstance(model, (str, os.PathLike))
    if config is not None and not isinstance(config, (PruneConfig, dict)):
        raise UsageError(f"config={config!r:.80}: must be a PruneConfig or a dict of its fields")
    fields = with_new_names(dict(vars(config) if isinstance(config, PruneConfig) else config or {}))
    place = getattr(getattr(model, "config", None), "_name_or_path", "") if live else model
    values: dict[str, Any] = {"model_name_or_path": place or "a live model"} | overrides
    arguments = {"adapter": adapter, "dataset": dataset, "output_dir": output_dir}
    values |= {name: value for name, value in arguments.items() if value is not None}
    score = SCORES.get(values.get("score", fields.get("score")))
    answered = score is None or score.learner is None
    in_memory = {}
    for name, value in values.items():
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif name in _IN_MEMORY and value is not None and not isinstance(value, str):
            is_data = name.endswith("dataset")
            in_memory[name] = _records(value, name, answered) if is_data else value
            # The field is checked: it must say that something is there.
            values[name] = "records in memory" if is_data else "norms in memory"
    fields |= with_new_names(values)
    if not live and "output_dir" not in fields:
        raise UsageError("output_dir=None: must be a folder where model is a folder or hub name")
    fields.setdefault("output_dir", "")
    try:
        settings = PruneConfig(**fields)
    except TypeError as error:
        raise UsageError(f"oneshot: {str(error).removeprefix('PruneConfig.__init__() ')}") from None
    if live:
        return _prune_live(model, settings, in_memory, tokenizer, world)
    return prune_folder(settings, in_memory, tokenizer=tokenizer, world=world)[0]


def _prune_live(model, config, in_memory, tokenizer, world):
    """Prune a live model in place; write it where there is an output_dir."""
    check_left_out(config, ["stream", "resume"], "with a live model; give its folder")
    with world.together():
        _check_writable(model, config)
    inputs = open_inputs(config, in_memory, model=model, tokenizer=tokenizer, world=world)
    if inputs.aligned is not None:
        keys = [target.key for target in find_targets(model, config.targets, config.ignore)]
        bases = inputs.base_weights(keys)
        inputs.evidence = dataclasses.replace(inputs.evidence, base_weights=bases)
    gather(inputs)
    with world.together():
        inputs.watch.check()  # the last moment at which the model is as it was
    inputs.pruned_from = time.perf_counter()
    options = config.prune_options | config.picked("targets", "ignore")
    report = prune_model_(inputs.model, inputs.evidence, config.selection, **options)
    report.data = inputs.data
    with world.together():
        if config.output_dir and not world.rank:
            entries: dict[str, Any] = {}
            if getattr(inputs.model, "peft_config", None):
                entries["base_fingerprint"] = fingerprint_model(inputs.model)
            with output_folder(config.output_dir, config.overwrite, **entries) as folder:
                _save_live(inputs.model, folder)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                finish(folder, inputs, report)
    return report


def _check_writable(model, config):
    """Refuse an output_dir for a model that no file can hold as it is."""
    where = f"output_dir={config.output_dir!r}: must be left out where"
    if not config.output_dir:
        return
    if any(map(is_sharded, model.parameters())):
        raise UsageError(f"{where} the model is sharded; save it as you save its checkpoints")
    if computed := first_computed(model):
        why = f"weights are computed from others ({computed}), which no file of this model can hold"
        raise UsageError(f"{where} {why}")


def _save_live(model, folder):
    """Save the adapter alone of a PEFT model, else the whole model."""
    if not hasattr(model, "get_base_model"):  # or with an adapter that transformers itself put on
        model.save_pretrained(folder)
        return
    active = model.active_adapters[0]
    model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
    # PEFT puts any adapter that is not called "default" into a folder of its name.
    inner = folder / active
    if inner.is_dir():
        for file in inner.iterdir():
            os.replace(file, folder / file.name)
        inner.rmdir()


def _records(dataset, name, require_output):
    """Records from what a caller holds in memory, as the argument ``name``."""
    rows = list(dataset)
    if not rows:
        raise DataError(f"{name}: no records")
    if all(isinstance(row, Record) for row in rows):
        return rows
    named = [(f"{name}: record {number}", row) for number, row in enumerate(rows, 1)]
    for where, row in named:
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be a Record or a dict, not {type(row).__name__}")
    return rows_to_records(named, name, role=None, require_output=require_output)
