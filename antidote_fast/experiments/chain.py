"""The stages of one setting, each from the folder of the one before; what is done is kept."""

import fnmatch
import importlib
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from antidote_fast.config.base import StageConfig
from antidote_fast.config.experiment import SECTIONS, ExperimentConfig, RunConfig
from antidote_fast.config.flags import from_values
from antidote_fast.errors import DataError
from antidote_fast.files.places import locked_file
from antidote_fast.files.provenance import is_done, read_report
from antidote_fast.system.progress import Progress


def shared_flags(config: RunConfig | ExperimentConfig) -> dict[str, Any]:
    """The flags that every stage takes from the whole."""
    names = ("overwrite", "seed", "max_seq_length", "template")
    return config.load_options | {name: getattr(config, name) for name in names}


class Chain:
    """The stages of one setting and the models that they make.

    Args:
        base: the model that the first stage begins from.
        shared: flags of every stage.
        batch_size: sequences a forward pass of prune and evaluate.
        sections: flags by kind of stage, over ``shared``; align and prune may be absent.
        folder_of: (kind, dataclass whose folder is empty, name of the model) to the stage's folder.

    Attributes:
        stages: by kind, the dataclasses of the stages that make a model.
        models: by name (base, aligned, attacked, pruned), the flags that say where a model is.

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
    ):
        self._shared, self._batch = shared, {"batch_size": batch_size}
        self._sections, self._folder_of = sections, folder_of
        self._aligned = base
        self.stages: dict[str, StageConfig] = {}
        self.models: dict[str, dict[str, str]] = {"base": {"model_name_or_path": base}}
        if "align" in sections:
            self._aligned = self._add("align", "aligned", self.models["base"])
            self.models["aligned"] = {"model_name_or_path": self._aligned}
        attacked = self._add("finetune", "attacked", {"model_name_or_path": self._aligned})
        self.models["attacked"] = self._place(attacked)
        if "prune" in sections:
            pruned = self._add("prune", "pruned", self._batch | self.models["attacked"])
            self.models["pruned"] = self._place(pruned)
            self.stages["prune"].check_aligned(self.stages["prune"].adapter is not None)

    def evaluation(self, model: str) -> StageConfig:
        """What evaluates one of the models; a drift is measured against the aligned one."""
        drift = self._sections["evaluate"].get("drift_dataset")
        reference = {"reference_model": self._aligned} if drift else {}
        return self._stage("evaluate", self._batch | self.models[model] | reference, model)

    def _add(self, kind, model, places):
        self.stages[kind] = self._stage(kind, places, model)
        return self.stages[kind].output_dir

    def _stage(self, kind, places, model):
        flags = {**self._shared, **places, **self._sections[kind], "output_dir": ""}
        stage = from_values(SECTIONS[kind], flags, kind)
        return replace(stage, output_dir=str(self._folder_of(kind, stage, model)))

    def _place(self, folder):
        if self.stages["finetune"].tuning == "lora":
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
