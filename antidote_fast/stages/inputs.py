"""A stage's inputs, opened and checked against each other before any weight is loaded."""

import contextlib
import dataclasses
import importlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from antidote_fast import backends
from antidote_fast.config.base import check_left_out, each_of
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record, Records
from antidote_fast.distributed.fsdp import is_sharded
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import (
    RUN_INPUTS,
    check_free_space,
    check_output_folder,
    digest_of,
    output_folder,
)
from antidote_fast.files.fingerprint import block_name
from antidote_fast.files.manifest import check_input
from antidote_fast.files.provenance import input_files, run_inputs
from antidote_fast.files.pruned_copy import check_copied
from antidote_fast.files.resume import Run, is_finished, run_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.kinds import Model
from antidote_fast.models.loading import (
    check_not_quantized,
    load_model,
    load_tokenizer,
    open_model,
    pick_device,
)
from antidote_fast.models.targets import natural_key
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.pruning.evidence import Evidence, check_base

NORMS_FILE = "norms.safetensors"
LEARNED_ON = ("dataset", "preserve_dataset", "ordinary_dataset")  # where a score is learned


@dataclass(kw_only=True)
class Inputs:
    """What calibrate or prune starts from, opened and checked; and what a model says of the data.

    Args:
        config: the stage's.
        base, adapter: checkpoints; the adapter is None where a whole model is pruned, and both are
            None with a live model.
        aligned: checkpoint of the model that removed weights fall back to, or None.
        model: a live model, with its adapter on it; None where folders are given.
        device: where weights are pruned.
        backend: what the report says of it, as :func:`describe_backend`.
        records: {field of the config: records} of the data that a model is still to see.
        evidence: the norms that are there, and later those that are collected.
        counts: {"dataset", "preserve_dataset" or "gate": what the report says of that evidence}.
        data: {field of the config: what became of its records}, as of
            :class:`antidote_fast.pruning.report.PruneReport`.
        watch: of every file that is read.
        made_from: everything that decides the result, as :func:`run_inputs`; empty with a live
            model.
        given_tokenizer: in place of the base's own.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the samples.
        begun, pruned_from: clock readings (s): when the inputs were opened, and when the evidence
            was there.
    """

    config: Any
    base: Checkpoint | None = None
    adapter: Checkpoint | None = None
    aligned: Checkpoint | None = None
    model: torch.nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: dict[str, Any] = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)
    counts: dict[str, dict] = field(default_factory=dict)
    data: dict[str, dict[str, int]] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    made_from: dict[str, Any] = field(default_factory=dict)
    given_tokenizer: Any = None
    progress: Any = False
    world: World = ALONE
    begun: float = field(default_factory=time.perf_counter)
    pruned_from: float = 0.0

    @property
    def source(self) -> Checkpoint:
        """The checkpoint whose weights are pruned: the adapter, or the base without one."""
        return self.adapter or self.base

    @property
    def naming_norms(self) -> ActivationNorms | None:
        """Norms whose names say which weights are pruned, where there are any."""
        return next(iter(self.evidence.named_norms.values()), None)

    @property
    def tokenizer(self) -> Any:
        """The one that was given, else the base's own."""
        if self.given_tokenizer is None:
            trust = self.config.trust_remote_code
            self.given_tokenizer = load_tokenizer(self.base.folder, trust_remote_code=trust)
        return self.given_tokenizer

    def add_norms(self, name: str, norms: ActivationNorms | None, counts: dict) -> None:
        """Take norms of the data set of this field, and what the report says of them."""
        kind = "norms" if name == "dataset" else "preserve_norms"
        changed: dict[str, Any] = {kind: norms}
        self.evidence = dataclasses.replace(self.evidence, **changed)
        self.counts[name] = counts
        if "num_dropped" in counts:  # else they were collected before, and of what nobody knows
            self.data[name] = data_of(counts)

    def base_weights(self, keys: Iterable[str]) -> dict[str, torch.Tensor] | None:
        """{parameter name: tensor} of the aligned model, as saved; None without one."""
        return None if self.aligned is None else self.aligned.read(keys, self.progress)

    def is_whole(self, room: int = 0) -> bool:
        """Whether ``resume`` leaves it at what is in output_dir, as the first rank finds it.

        Where it does not, ``room`` bytes must be free on the disk.

        Raises:
            DataError: output_dir must not be written, or is the output of another run.
            NoRoom: the disk is too full.
        """
        config, whole = self.config, False
        with self.world.together():
            if not self.world.rank:
                whole = config.resume and is_finished(config.output_dir, self.made_from)
                if config.resume and not whole:
                    check_output_folder(config.output_dir, config.overwrite)
                if not whole:
                    check_free_space(config.output_dir, room)
        return self.world.gather("yes" if whole else "no")[0] == "yes"

    @property
    def _entries(self):
        """What COMPLETE.json says of a pruned adapter."""
        prunes = isinstance(self.config, PruneConfig) and self.adapter is not None
        return {"base_fingerprint": self.base.fingerprint()} if prunes else {}

    @contextlib.contextmanager
    def output_folder(self, progress: Any = False) -> Iterator[Path]:
        """The staged folder that takes output_dir's name, unless an input has changed meanwhile."""
        config = self.config
        entries = self._entries | {RUN_INPUTS: digest_of(self.made_from)}
        where = (config.output_dir, config.overwrite)
        with output_folder(*where, progress=progress, **entries) as folder:
            yield folder
            self.watch.check()

    @contextlib.contextmanager
    def run_folder(self) -> Iterator[Run]:
        """The same of work that goes on where it was interrupted; its ``digests`` are committed."""
        config = self.config
        options = {"resume": config.resume, "overwrite": config.overwrite}
        with run_folder(config.output_dir, self.made_from, **options) as run:
            yield run
            self.watch.check()
            run.commit(**self._entries)


def open_inputs(
    config: CalibrateConfig,
    in_memory: Mapping[str, Any] | None = None,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    progress: Any = False,
    world: World = ALONE,
) -> Inputs:
    """Open what calibrate or prune reads, and refuse what does not go together.

    No weights are loaded. The same checks in the same order for a run, a dry run and a live model.

    Args:
        config: a :class:`CalibrateConfig` or :class:`PruneConfig`.
        in_memory: {field of the config: what is in memory already}: records of ``dataset`` and
            ``preserve_dataset``, :class:`ActivationNorms` as ``norms`` and ``preserve_norms``.
        model: a live model to prune in place of the folder that the config names; ``adapter`` is
            loaded onto it.
        tokenizer: in place of the base's own; a live model needs it where data are to be seen.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the samples; all must call.

    Raises:
        DataError, UsageError, BackendUnavailable: naming what is refused.
        PeerFailed: another rank refused.
    """
    inputs = Inputs(config=config, given_tokenizer=tokenizer, progress=progress, world=world)
    in_memory = {} if in_memory is None else in_memory
    with world.together():
        if model is None and world.size > 1:
            why = "with torchrun; one process streams a model through one device"
            check_left_out(config, ["stream"], why)
            why = "with torchrun, which gives each rank a GPU of its own; start one process"
            check_left_out(config, ["device_map"], why)
        inputs.watch = Watch(*input_files(config))
        if config.output_dir and not (config.resume or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
        if model is None:  # where it is spread over devices, targets may fit on none of them
            inputs.device = pick_device("cpu" if config.device_map else config.device)
        else:
            inputs.device = next(model.parameters()).device
        inputs.backend = describe_backend(getattr(config, "backend", None), inputs.device)
        if model is None:
            inputs.base, inputs.adapter = open_folders(config, progress)
            is_adapter = inputs.adapter is not None
        else:
            inputs.model = load_adapter(model, config.adapter) if config.adapter else model
            is_adapter = bool(getattr(inputs.model, "peft_config", None))
        if isinstance(config, PruneConfig):
            learner = learner_of(config)
            if learner is not None:
                learner.check_stage(config, inputs.base, is_adapter, world)
            if model is not None:
                _check_live_aligned(config, inputs.model, is_adapter)
            inputs.aligned = open_aligned(config, inputs.base or inputs.model, progress)
            inputs.evidence = Evidence(score=config.score)
            _add_saved_norms(inputs, in_memory)
        unseen = unseen_data(config, inputs.evidence)
        if unseen and model is not None and tokenizer is None:
            raise UsageError("tokenizer=None: must be the tokenizer of the live model")
        inputs.records = {name: load_data(config, in_memory.get(name), name) for name in unseen}
        if model is None:
            seen: dict[str, Any] = {"records": inputs.records, "norms": inputs.evidence.named_norms}
            about = (config, inputs.base, inputs.adapter)
            inputs.made_from = run_inputs(*about, **seen, aligned=inputs.aligned)
    return inputs


def learner_of(config: CalibrateConfig) -> Any:
    """The module that learns the config's score before the prune; None where it is computed."""
    name = config.scoring.learner if isinstance(config, PruneConfig) else None
    return None if name is None else importlib.import_module(name)


def unseen_data(config: CalibrateConfig, evidence: Evidence | None = None) -> list[str]:
    """The fields that name data which a model is to see, beside the evidence that is there."""
    evidence = evidence or Evidence()
    if not isinstance(config, PruneConfig):
        return ["dataset"]
    learns = config.scoring.learner is not None and evidence.scores is None
    learns_on = [name for name in LEARNED_ON if learns and getattr(config, name) is not None]
    needed = {
        "dataset": config.scoring.needs_norms and evidence.norms is None,
        "preserve_dataset": config.preserves and evidence.preserve_norms is None,
    }
    return learns_on or [name for name, is_needed in needed.items() if is_needed]


def open_folders(config: Any, progress: Any = False) -> tuple[Checkpoint, Checkpoint | None]:
    """(base, adapter or None), checked by their headers, hashes and what lies beside the weights.

    No weights are loaded.

    Raises:
        DataError: a folder that is not there or is damaged, a model and an adapter that do not go
            together, or what cannot be pruned.
    """
    base = open_model(config)
    check_input(base.folder, progress)
    if config.adapter is None:
        check_not_quantized(base)
        check_copied(base)
        return base, None
    adapter = open_model(config, "adapter")
    check_copied(adapter)
    check_adapter(adapter, base)
    return base, adapter


def load_folders(config: Any, base: Checkpoint, adapter: Checkpoint | None) -> torch.nn.Module:
    """The model of these checkpoints as the config says, its adapter on it."""
    device_map = getattr(config, "device_map", None)
    model = load_model(base.folder, device_map=device_map, **config.load_options)
    return model if adapter is None else load_adapter(model, adapter)


def _check_live_aligned(config, model, is_adapter):
    """Refuse an aligned model beside a live one whose weights cannot take its values."""
    why = "where weights are sharded; or prune the saved checkpoint"
    if is_adapter:
        why = "with an adapter, whose zero already falls back to the aligned model"
    if is_adapter or any(map(is_sharded, model.parameters())):
        check_left_out(config, ["aligned_model"], why)


def open_aligned(
    config: Any, pruned: Checkpoint | Model, progress: Any = False
) -> Checkpoint | None:
    """Checkpoint of ``config.aligned_model``, checked by its headers and hashes; None without one.

    Its blocks must be as those of the model to prune, a live one or its checkpoint.

    Raises:
        DataError: no such model, an adapter, a quantised model, or another architecture; the
            message names the first tensor that differs.
    """
    if config.aligned_model is None:
        return None
    where = f"aligned_model={config.aligned_model!r}"
    aligned = open_model(config, "aligned_model")
    check_not_quantized(aligned)
    check_input(aligned.folder, progress)
    weights: Any
    if isinstance(pruned, Checkpoint):
        model_type, weights = pruned.config.get("model_type"), pruned.tensors
    else:
        model_type, weights = pruned.config.model_type, dict(pruned.named_parameters())
    theirs = aligned.config.get("model_type")
    if theirs != model_type:
        raise DataError(f"{where}: is a {theirs} model, and the one to prune is {model_type}")
    ours, others = _block_shapes(weights), _block_shapes(aligned.tensors)
    for name in sorted(ours.keys() | others.keys(), key=natural_key):
        if ours.get(name) != others.get(name):
            raise DataError(
                f"{where}: has {name!r} as {others.get(name, 'no tensor')}, and the model to prune "
                f"as {ours.get(name, 'no tensor')}"
            )
    return aligned


def _block_shapes(weights):
    """{name within its block: shape} of the matrices among named tensors, or entries of files."""
    named = {block_name(name): tuple(each.shape) for name, each in weights.items()}
    return {name: shape for name, shape in named.items() if name is not None and len(shape) == 2}


def _add_saved_norms(inputs, in_memory):
    """Take the norms that are there: in memory, or in the files that the config names."""
    for name, data in (("norms", "dataset"), ("preserve_norms", "preserve_dataset")):
        norms, path = in_memory.get(name), getattr(inputs.config, name)
        if norms is None and path is not None:
            norms = load_norms(path, name)
        if norms is not None:
            inputs.add_norms(data, norms, counts_of(norms))
    if inputs.base is not None and inputs.evidence.named_norms:
        fingerprint = inputs.base.fingerprint()
        for name, norms in inputs.evidence.named_norms.items():
            check_base(norms, fingerprint, name)


def data_of(counts: Mapping[str, int]) -> dict[str, int]:
    """What became of the records of a data set, from what the report says of their batches."""
    over = counts.get("num_over_limit", 0)
    return {
        "num_records": counts["num_records"] + over,
        "num_used": counts["num_records"] - counts["num_dropped"],
        "num_dropped_long": counts["num_dropped"],
        "num_truncated": counts["num_truncated"],
        "num_over_limit": over,
    }


def load_data(config: Any, records: list[Record] | None, name: str = "dataset") -> Records:
    """The records of the data set that the field ``name`` says, or of ``records``, as many as used.

    Of what a score is learned on, prompts that the aligned model answers have a limit of their own;
    in ``preserve_dataset`` they are left out where ``ordinary_dataset`` has them.
    """
    learns = learner_of(config) is not None
    if records is None:
        records = load_records(getattr(config, name), require_output=not learns)
    if not learns or name == "dataset":
        return Records(records).limited(config.num_calibration_samples)
    is_prompt = [name == "ordinary_dataset" or not record.output.strip() for record in records]
    left = {True: config.num_ordinary_samples, False: config.num_calibration_samples}
    kept = Records()
    for record, prompt in zip(records, is_prompt, strict=True):
        if prompt and name == "preserve_dataset" and config.ordinary_dataset is not None:
            kept.num_without_output += 1
        elif left[prompt]:
            left[prompt] -= 1
            kept.append(record)
        else:
            kept.num_over_limit += 1
    return kept


def load_norms(path: str | os.PathLike, name: str = "norms") -> ActivationNorms:
    """Norms from a file, or from the folder that calibrate wrote."""
    path = Path(path)
    path = path / NORMS_FILE if path.is_dir() else path
    check_input(path.parent, only=path.name)
    return ActivationNorms.load(path, name)


def describe_backend(name: str | None, device: torch.device) -> dict[str, Any]:
    """What the report says of the backend; an unknown or unavailable one is refused."""
    try:
        module = backends.select(name, device.type)
        kernels = {"cpu_isa": module.isa()} if module.NAME == "cpu" else {}
    except ValueError as error:
        raise UsageError(str(error)) from None
    wish = os.environ.get(backends.ENVIRONMENT)
    asked = f"backend={name}" if name else wish and f"{backends.ENVIRONMENT}={wish}"
    return {
        "backend": module.NAME,
        **kernels,
        "backend_reason": asked or f"first that is available for {device.type} tensors",
        "backends": {key: why or "available" for key, why in backends.available().items()},
    }


def check_data(stages: Iterable[Any]) -> None:
    """Read every data set once before hours are spent on the first stage."""
    sources = set()
    for stage in stages:
        # As evaluate reads them: the drift is measured on alignment data, from the train split.
        tests = isinstance(stage, EvaluateConfig)
        for name, source in vars(stage).items():
            if name.endswith("dataset") or name == "held_out_from":
                aside = name in ("drift_dataset", "held_out_from")
                split = "test" if tests and not aside else "train"
                sources |= {(one, split) for one in each_of(source)}
    for source, split in sorted(sources):
        load_records(source, split=split)
