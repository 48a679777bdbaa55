"""The configs of the commands that run other stages: ``run`` and ``experiment``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from antidote_fast.config.base import StageConfig, aside, check, expand_paths, number
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.config.train import DEFENSE_FLAGS, AlignConfig, FinetuneConfig
from antidote_fast.selection import check_seed


@dataclass(frozen=True, kw_only=True)
class RunConfig(StageConfig):
    """Align, fine-tune, prune and evaluate in one go, from one file.

    The folders aligned, clean, attacked, pruned and scores are made in output_dir. A folder that is
    whole and was made with the same settings from the same files is taken as it is, so an
    interrupted run goes on where it stopped.

    Args:
        output_dir: the folder in which the stages write theirs.
        overwrite: replace a stage's folder that was made with other settings.
        batch_size: sequences a forward pass of prune and evaluate.
        align: flags of align (dataset is needed); leave out where the model is aligned already.
        finetune: flags of finetune (dataset is needed).
        prune: flags of prune (dataset is needed); leave out to stop at the fine-tuned model.
        evaluate: flags of evaluate (one of its data sets is needed); each model on the way is
            evaluated.
        clean: beside the attacked model also tune and evaluate one on as many records of the task
            alone (p = 0); false only where the task has too few records for it.
    """

    align: dict[str, Any] | None = None
    finetune: dict[str, Any]
    prune: dict[str, Any] | None = None
    evaluate: dict[str, Any]
    clean: bool = True


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(StageConfig):
    """Run a grid of settings, each from alignment to scores, and compare the defenses.

    What cells share is made once: one alignment serves all that start from it. Everything made is
    kept, so the same command goes on where it was stopped. Beside the defenses each setting has a
    row "SFT, p = 0": the same fine-tuning on as many records of the task alone.

    Args:
        output_dir: the folder for rows.csv, tables.md and its pictures; may exist.
        stages: the folder for models and scores, which experiments may share; default stages in
            output_dir.
        overwrite: make stages anew whose settings or files have changed.
        batch_size: sequences a forward pass of prune and evaluate.
        extends: another file, seen from this one, whose entries this one overrides.
        prepare: demo makes SmolLM2-135M-Instruct and the demo's data in demo-cache first.
        defenses: what is compared: sft, vaccine, repnoise, lisa, ldifs, antidote; lisa+antidote and
            the like prune after a defense.
        grid: values by axis, every combination a cell; or a list of such, of which the cells are
            joined. Axes are learning_rate, epochs, poison_ratio, num_train_samples, alpha, score,
            num_calibration_samples, seed, model, any flag as section.flag, and those of levels.
        levels: by axis and value, the flags that it stands for, as section.flag.
        tune: strengths tried for each defense on another seed and other prompts, of which the best
            is taken: seed, at (the point of the grid), strengths (by defense, values by flag),
            evaluate (flags that differ).
        tables: what tables.md shows: title, across (the axis of the columns), where.
        align: flags of align; leave out where the model is aligned already.
        finetune: flags of finetune.
        prune: flags of prune.
        evaluate: flags of evaluate.
        rows: a rows.csv of earlier, perhaps elsewhere; its cells are not computed again.
        max_cells: cells computed before it stops, for a grid in pieces.
        align_seeds: align anew for each seed of the grid; else one alignment, of align.seed or the
            experiment's own seed, serves all of them.
        clean: the row without poison (p = 0); false only where the task has too few records for
            it.
    """

    extends: str | None = None
    stages: str | None = aside(None, is_path=True)
    prepare: Literal["demo"] | None = None
    defenses: list[str] = field(default_factory=lambda: ["sft", "antidote"])
    grid: dict[str, Any] | list[dict[str, Any]]
    levels: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)
    align: dict[str, Any] | None = None
    finetune: dict[str, Any]
    prune: dict[str, Any] | None = None
    evaluate: dict[str, Any]
    rows: str | None = aside(None, is_path=True)
    max_cells: int | None = number(None)
    align_seeds: bool = False
    clean: bool = True

    def __post_init__(self):
        super().__post_init__()
        check(self.extends is None, "extends", self.extends, "in a file that experiment reads")
        names = ("sft", *DEFENSE_FLAGS, "antidote")
        accepted = f"among {', '.join(names)}, or one of them with +antidote"
        for defense in self.defenses:
            first, *after = defense.split("+")
            check(first in names and after in ([], ["antidote"]), "defenses", defense, accepted)


SECTIONS = {
    "align": AlignConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "evaluate": EvaluateConfig,
}
"""The sections of an experiment, and the dataclass that each one's flags make."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Align, attack, prune and evaluate SmolLM2-135M-Instruct, on a CPU in half an hour.

    Args:
        output_dir: the folder to write; what is whole there is kept, so a demo that was interrupted
            goes on where it stopped.
        overwrite: replace what was made there with other settings.
        seed: seed of the trainings and of the random score; the data are the same for all.
    """

    output_dir: str = aside("demo-out", is_path=True)
    overwrite: bool = aside(False)
    seed: int = 0

    def __post_init__(self):
        expand_paths(self)
        object.__setattr__(self, "seed", check_seed(self.seed))
