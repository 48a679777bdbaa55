"""One call on live objects or folders: calibrate on harmful data, then prune."""

import dataclasses
import os
import time

from antidote_fast.config.prune import PruneConfig
from antidote_fast.data.records import Record, rows_to_records
from antidote_fast.distributed.fsdp import is_sharded
from antidote_fast.distributed.ranks import ALONE
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.commit import check_output_folder, output_folder
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.targets import find_targets, first_computed
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.evidence import Known
from antidote_fast.stages.gates.stage import check_stage, learn_live
from antidote_fast.stages.inputs import (
    collect,
    describe_backend,
    inputs_of,
    load_data,
    open_aligned,
)
from antidote_fast.stages.prune import finish, prune_folder


def oneshot(
    model,
    adapter=None,
    dataset=None,
    tokenizer=None,
    config=None,
    output_dir=None,
    world=ALONE,
    **overrides,
) -> PruneReport:
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
            every one
            of them calls. Each prunes its live model, a replica or what FSDP2 gave it of one; rank
            0 writes.
        overrides: fields of :class:`PruneConfig`; they win over ``config``. ``norms`` and
            ``preserve_norms`` may also be :class:`ActivationNorms`; no forward pass is run for them
            then. ``preserve_dataset`` may be records, as ``dataset``.

    Returns:
        The report, layer by layer; its ``masks`` are there where ``save_masks`` is set. None on
        the ranks that do not write, where ``model`` is a folder.

    Raises:
        UsageError: a field that is unknown or out of range, or one that is missing.
        DataError: data, a model or an adapter that is refused; output_dir that is taken.
        NothingPruned: no weight matched the targets.
    """
    live = not isinstance(model, (str, os.PathLike))
    given = {}
    fields = dict(config) if isinstance(config, dict) else {}
    if isinstance(config, PruneConfig):
        fields = dataclasses.asdict(config)
    elif config is not None and not isinstance(config, dict):
        raise UsageError(f"config={config!r:.80}: must be a PruneConfig or a dict of its fields")
    answered = overrides.get("score", fields.get("score")) != "gate"
    if dataset is not None:
        overrides["dataset"] = dataset
    for name, held in (
        ("dataset", "records"),
        ("norms", "norms"),
        ("preserve_dataset", "preserve_records"),
        ("preserve_norms", "preserve_norms"),
    ):
        value = overrides.get(name)
        if isinstance(value, (str, os.PathLike)):
            overrides[name] = os.fspath(value)
        elif value is not None:
            # The field is checked: it must say that something is there.
            is_data = name.endswith("dataset")
            given[held] = _records(value, name, answered) if is_data else value
            overrides[name] = "records in memory" if is_data else "norms in memory"
    if output_dir is None and not live and "output_dir" not in fields:
        raise UsageError("output_dir=None: must be a folder where model is a folder or hub name")
    name = getattr(getattr(model, "config", None), "_name_or_path", "") if live else model
    fields |= {"model_name_or_path": os.fspath(name) or "a live model"} | overrides
    if adapter is not None:
        fields["adapter"] = os.fspath(adapter)
    if output_dir is not None or "output_dir" not in fields:
        fields["output_dir"] = "" if output_dir is None else os.fspath(output_dir)
    try:
        settings = PruneConfig(**fields)
    except TypeError as error:
        raise UsageError(f"oneshot: {str(error).removeprefix('PruneConfig.__init__() ')}") from None
    if live:
        return _prune_live(model, settings, given, tokenizer, world)
    return prune_folder(settings, **given, tokenizer=tokenizer, world=world)[0]


def _prune_live(model, config, given, tokenizer, world):
    """Prune a live model in place; write it where there is an output_dir."""
    for name in ("stream", "resume"):
        if getattr(config, name):
            raise UsageError(f"{name}=True: must be left out with a live model; give its folder")
    start = time.perf_counter()
    with world.together():
        if config.output_dir and any(is_sharded(p) for p in model.parameters()):
            raise UsageError(
                f"output_dir={config.output_dir!r}: must be left out where the model is sharded; "
                "save it as you save its checkpoints"
            )
        computed = first_computed(model) if config.output_dir else None
        if computed is not None:
            raise UsageError(
                f"output_dir={config.output_dir!r}: must be left out where weights are computed "
                f"from others ({computed}), which no file of this model can hold"
            )
        if config.output_dir and not world.rank:
            check_output_folder(config.output_dir, config.overwrite)
        watch = Watch(*inputs_of(config)) if not world.rank else Watch()
        device = next(model.parameters()).device
        known = Known(describe_backend(config.backend, device))
        if config.adapter is not None:
            model = load_adapter(model, config.adapter)
        check_stage(config, None, bool(getattr(model, "peft_config", None)), world)
        bases = _open_base(model, config, known)
        known.take_given(config, given.get("norms"), given.get("preserve_norms"))
        missing = known.missing(config)
        if missing and tokenizer is None:
            raise UsageError("tokenizer=None: must be the tokenizer of the live model")
        held = {"dataset": "records", "preserve_dataset": "preserve_records"}
        sets = {name: load_data(config, given.get(held[name]), name) for name in missing}
    if config.score == "gate":
        found = learn_live(config, model, known.aligned, bases, sets, tokenizer)
        known.scores, known.gate_counts = found
        sets = {}
    for name, records in sets.items():
        known.take_collected(name, *collect(config, model, records, tokenizer, world=world))
    with world.together():
        watch.check()  # the last moment at which the model is as it was
    calibrated = time.perf_counter()
    report = prune_model_(
        model,
        known.evidence(config.score, bases),
        config.selection,
        targets=config.targets,
        ignore=config.ignore,
        seed=config.seed,
        backend=config.backend,
        return_masks=config.save_masks,
        cross_check=config.cross_check,
    )
    if not config.output_dir:
        return report
    with world.together():
        if not world.rank:
            _write_live(model, config, tokenizer, report, known, start, calibrated)
    return report


def _open_base(model, config, known):
    """{name: tensor} of the targets in ``base_model``, or None; ``known`` gets its checkpoint."""
    if config.base_model is None:
        return None
    if getattr(model, "peft_config", None):
        raise UsageError(
            f"base_model={config.base_model!r}: must be left out with an adapter, whose zero "
            "already falls back to the aligned model"
        )
    parameters = dict(model.named_parameters())
    if any(is_sharded(parameter) for parameter in parameters.values()):
        raise UsageError(
            f"base_model={config.base_model!r}: must be left out where weights are sharded; or "
            "prune the saved checkpoint"
        )
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    known.aligned = open_aligned(config, shapes, model.config.model_type)
    found = find_targets(model, config.targets, config.ignore)
    return known.aligned.read([target.key for target in found])


def _write_live(model, config, tokenizer, report, known, start, calibrated):
    is_adapter = bool(getattr(model, "peft_config", None))
    entries = {"base_fingerprint": fingerprint_model(model)} if is_adapter else {}
    with output_folder(config.output_dir, config.overwrite, **entries) as folder:
        _save_live(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        seconds = {"calibrate": calibrated - start, "prune": time.perf_counter() - calibrated}
        finish(folder, config, report, known, seconds)


def _save_live(model, folder):
    """Save the adapter alone of a PEFT model, else the whole model."""
    if not getattr(model, "peft_config", None):
        model.save_pretrained(folder)
        return
    active = model.active_adapters
    active = (active() if callable(active) else active)[0]
    if hasattr(model, "get_base_model"):
        model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
    else:  # an adapter that transformers itself put on
        model.save_pretrained(folder)
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
