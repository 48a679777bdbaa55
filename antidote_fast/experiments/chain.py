"""The stages of one setting, each from the folder of the one before; what is done is kept."""

import fnmatch
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from antidote_fast.config.base import StageConfig
from antidote_fast.config.experiment import SECTIONS, ExperimentConfig, RunConfig
from antidote_fast.config.flags import from_values
from antidote_fast.config.train import FinetuneConfig
from antidote_fast.data.load import load_records, mix
from antidote_fast.errors import DataError
from antidote_fast.files.places import locked_file
from antidote_fast.files.provenance import is_done, read_report
from antidote_fast.system.progress import Progress


def shared_flags(config: RunConfig | ExperimentConfig) -> dict[str, Any]:
    """The flags that every stage takes from the whole."""
    names = ("overwrite", "seed", "max_seq_length", "template")
    return config.load_options | {name: getattr(config, name) for name in names}


def clean_flags(attack: FinetuneConfig) -> dict[str, Any]:
    """The flags in which the fine-tuning without poison (p = 0) differs from the attack.

    It takes as many records as the attack, all of them the task's. Where ``num_train_samples`` is
    None the data are read, to count them.

    Raises:
        DataError: they have to be counted, and cannot be read.
    """
    count = attack.num_train_samples
    if count is None and attack.poison_ratio > 0:
        sources = (attack.dataset, attack.harmful_dataset)
        task, harmful = (load_records(source, require_output=True) for source in sources)
        count = len(mix(task, harmful, attack.poison_ratio))
    return {"poison_ratio": 0.0, "harmful_dataset": None, "num_train_samples": count}


def check_clean(stages: Iterable[FinetuneConfig]) -> None:
    """Refuse fine-tunings without poison for which the task has too few records.

    Raises:
        DataError: naming the data set and what is needed.
    """
    needed: dict[str, int] = {}
    for stage in stages:
        needed[stage.dataset] = max(needed.get(stage.dataset, 0), stage.num_train_samples or 0)
    for source, count in needed.items():
        there = len(load_records(source, require_output=True))
        if there < count:
            raise DataError(
                f"finetune.dataset={source!r}: has {there} records, and {count} are needed for the "
                "model without poison (p = 0), which takes as many as the poisoned one; give more, "
                "lower num_train_samples, or leave that model out with clean=false"
            )


class Chain:
    """The stages of one setting and the models that they make.

    Args:
        base: the model that the first stage begins from.
        shared: flags of every stage.
        batch_size: sequences a forward pass of prune and evaluate.
        sections: flags by kind of stage, over ``shared``; align and prune may be absent.
        folder_of: (kind, dataclass whose folder is empty, name of the model) to the stage's folder.
        clean: also tune a model without poison, where the attack has some (`clean_flags`).

    Attributes:
        stages: by kind, the dataclasses of the stages that make a model; a finetune without poison
            beside the attack as ``clean``.
        models: by name (base, aligned, clean, attacked, pruned), the flags that say where a model
            is.

    Raises:
        UsageError: a section's flag is unknown, missing or out of range.
    """

    def __init__(
        self,
        base: str,
        shared: Mapping[str, Any],
        batch_size: int,
        sections: Mapping[str, Mapping[str, Any]],
        folder_of: Callable[[str, StageConfig, str], str],
        clean: bool = False,
    ):
        self._shared, self._batch = shared, {"batch_size": batch_size}
        self._sections, self._folder_of = sections, folder_of
        self._aligned = base
        self.stages: dict[str, StageConfig] = {}
        self.models: dict[str, dict[str, str]] = {"base": {"model_name_or_path": base}}
        if "align" in sections:
            self._aligned = self._add("align", "aligned", self.models["base"])
            self.models["aligned"] = {"model_name_or_path": self._aligned}
        source = {"model_name_or_path": self._aligned}
        attack = self._stage("finetune", source, "attacked")
        if clean and attack.poison_ratio > 0:
            flags = self._sections["finetune"] | clean_flags(attack)
            self.stages["clean"] = self._stage("finetune", source, "clean", flags)
            self.models["clean"] = self._place(self.stages["clean"].output_dir, attack)
        self.stages["finetune"] = attack
        self.models["attacked"] = self._place(attack.output_dir, attack)
        if "prune" in sections:
            pruned = self._add("prune", "pruned", self._batch | self.models["attacked"])
            self.models["pruned"] = self._place(pruned, attack)
            self.stages["prune"].check_aligned(self.stages["prune"].adapter is not None)

    def evaluation(self, model: str) -> StageConfig:
        """What evaluates one of the models; a drift is measured against the aligned one."""
        drift = self._sections["evaluate"].get("drift_dataset")
        reference = {"reference_model": self._aligned} if drift else {}
        return self._stage("evaluate", self._batch | self.models[model] | reference, model)

    def _add(self, kind, model, places):
        self.stages[kind] = self._stage(kind, places, model)
        return self.stages[kind].output_dir

    def _stage(self, kind, places, model, section=None):
        section = self._sections[kind] if section is None else section
        flags = {**self._shared, **places, **section, "output_dir": ""}
        stage = from_values(SECTIONS[kind], flags, kind)
        return replace(stage, output_dir=str(self._folder_of(kind, stage, model)))

    def _place(self, folder, attack):
        if attack.tuning == "lora":
            return {"model_name_or_path": self._aligned, "adapter": folder}
        return {"model_name_or_path": folder}


class Maker:
    """Makes the folders of stages, each of them once, and none that is done."""

    def __init__(self, progress: Progress = False):
        self._progress = progress
        self._done: dict[str, bool] = {}
        self._reports: dict[str, dict] = {}

    def is_done(self, stage: StageConfig) -> bool:
        """Whether the folder is whole, of these settings and of files that have not changed."""
        folder = stage.output_dir
        if folder not in self._done:
            self._done[folder] = is_done(folder, stage)
        return self._done[folder]

    def make(self, kind: str, stage: StageConfig, run: Callable[..., dict] | None = None) -> dict:
        """The report of a stage, which runs unless it is done.

        An interrupted training that keeps checkpoints goes on from the last one.

        Args:
            kind: such as ``"align"``.
            stage: its dataclass.
            run: what runs it; default that of :mod:`antidote_fast.stages`.

        Raises:
            What the stage raises; DataError where its folder holds something else and ``overwrite``
            is not set.
        """
        folder = stage.output_dir
        if folder not in self._reports:
            if not self.is_done(stage):
                again = {"overwrite": stage.overwrite and Path(folder).exists()}
                if getattr(stage, "save_steps", None) is not None:
                    again["resume"] = True
                run = run or importlib.import_module(f"antidote_fast.stages.{kind}").run
                run(replace(stage, **again), progress=self._progress)
                self._done[folder] = True
            self._reports[folder] = read_report(folder)
        return self._reports[folder]


def check_own_folder(output_dir: str | os.PathLike, names: Collection[str], command: str) -> None:
    """Refuse an output folder that is a file, or holds what the command does not write.

    Args:
        output_dir: the folder, which may be absent.
        names: patterns of what the command leaves in it. A killed one may leave files of these
            names with a dot before them and more behind it, as its lock is.
        command: run, experiment or demo.

    Raises:
        DataError: naming what is in the way.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output_dir={str(folder)!r}: exists and is not a folder")
    accepted = [*names, *(f".{Path(name).stem}.*" for name in (*names, command))]
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in accepted):
            raise DataError(
                f"output_dir={str(folder)!r}: holds {path.name!r}, which no {command} made; name "
                "another folder"
            )


def at_work(output_dir: str, command: str) -> AbstractContextManager:
    """Holds the lock of an output folder, which is made; DataError where another process does."""
    busy = DataError(f"output_dir={output_dir!r}: another {command} is at work there")
    return locked_file(Path(output_dir) / f".{command}.lock", busy, make=True)
