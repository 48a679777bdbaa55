"""The cells of an experiment: every setting of its grid as the stages that it needs."""

import dataclasses
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidote_fast.config.base import StageConfig, fields_by
from antidote_fast.config.experiment import SECTIONS, ExperimentConfig
from antidote_fast.config.flags import close_to, from_values
from antidote_fast.errors import UsageError
from antidote_fast.experiments.chain import Chain, clean_flags, shared_flags

# Axes with a short name, and the flag that each one is.
AXES = {
    "learning_rate": "finetune.learning_rate",
    "epochs": "finetune.num_train_epochs",
    "poison_ratio": "finetune.poison_ratio",
    "num_train_samples": "finetune.num_train_samples",
    "alpha": "prune.ratio",
    "score": "prune.score",
    "num_calibration_samples": "prune.num_calibration_samples",
    "seed": "seed",
    "model": "model_name_or_path",
}
# Plain fine-tuning without poison, which stands in every table: not a defense of the file's.
CLEAN = "clean"
_OF_POISON = ("finetune.poison_ratio", "finetune.harmful_dataset")
_SET_HERE = ("output_dir", "adapter", "overwrite", "resume", "reference_model", "defense")
_STRENGTHS = {
    "vaccine": ("align.vaccine_rho",),
    "repnoise": ("align.repnoise_alpha", "align.repnoise_beta"),
    "lisa": ("finetune.lisa_rho",),
    "ldifs": ("finetune.ldifs_lambda",),
    "antidote": ("prune.ratio",),
}
# Flags without a default; no name of a file that anybody has.
_PLACES = {"model_name_or_path": "-", "output_dir": "-", "dataset": "-"}
_REQUIRED = {
    "align": _PLACES,
    "finetune": _PLACES | {"poison_ratio": 0},
    "prune": _PLACES,
    "evaluate": {"model_name_or_path": "-", "output_dir": "-", "harmful_dataset": "-"},
}
KINDS = tuple(SECTIONS)


@dataclass(frozen=True)
class Cell:
    """One setting of the grid.

    Args:
        axes: its values by axis, as the file spells them; those of ``prune`` are left out where it
            does not prune, and those of the poison where there is none.
        stages: the dataclass of each stage that it takes, in order; the last one is evaluate.
        keys: a hash of what each stage makes, upstream included: equal keys are the same folder.
        strength: the defense's own strength, in words.
        role: "test", or "tune" for a strength that is tried.
    """

    axes: dict
    stages: dict[str, StageConfig]
    keys: dict[str, str]
    strength: str
    role: str = "test"

    @property
    def base(self) -> str:
        """The model that its first stage begins from."""
        return next(iter(self.stages.values())).model_name_or_path

    @property
    def key(self) -> str:
        """The cell's own: that of its evaluation."""
        return self.keys["evaluate"]


def axes_of(config: ExperimentConfig) -> list[str]:
    """Every axis that the file names, defense and seed among them."""
    named = [name for grid in grids_of(config) for name in grid]
    return list(dict.fromkeys(["defense", *named, "seed"]))


def cells_of(config: ExperimentConfig, chosen: dict[str, dict]) -> list[Cell]:
    """Every cell once, in the file's order, after those without poison (p = 0).

    Unless ``config.clean`` is false, each setting also has a cell of the defense ``CLEAN``, where
    the grid itself does not make the same one (SFT at a poison ratio of 0).

    Args:
        config: the experiment.
        chosen: by defense, the flags of the strength that was chosen for it.

    Raises:
        UsageError: an axis, level, flag or value that is none.
        DataError: data that have to be counted (`clean_flags`), and cannot be read.
    """
    cells, without = {}, {}
    for grid in grids_of(config):
        lists = {"defense": config.defenses, **grid}
        lists.setdefault("seed", [config.seed])
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"grid.{name}={values!r}: must be a list of values")
        for values in itertools.product(*lists.values()):
            axes = dict(zip(lists, values, strict=True))
            cell = make_cell(config, axes, chosen.get(axes["defense"], {}))
            cells.setdefault(cell.key, cell)
            if config.clean:
                cell = make_cell(config, axes | {"defense": CLEAN}, {})
                without.setdefault(cell.key, cell)
    return [*(cell for key, cell in without.items() if key not in cells), *cells.values()]


def trials_of(config: ExperimentConfig) -> dict[str, list[tuple[dict, Cell]]]:
    """By defense, the strengths to try: (flags, cell), on the seed and prompts of ``tune``.

    Raises:
        UsageError: a tune section that is malformed, or whose seed is one of the grid's.
    """
    tune = config.tune
    if tune is None:
        return {}
    for name in tune:
        if name not in ("at", "evaluate", "seed", "strengths"):
            raise UsageError(f"tune.{name}: is none of at, evaluate, seed, strengths")
    seeds = {seed for grid in grids_of(config) for seed in grid.get("seed", [config.seed])}
    seed = tune.get("seed")
    if not isinstance(seed, int) or seed in seeds:
        raise UsageError(f"tune.seed={seed!r}: must be an integer that is no seed of the grid")
    trials = {}
    for defense, flags in (tune.get("strengths") or {}).items():
        if defense not in config.defenses:
            raise UsageError(f"tune.strengths.{defense}: must be among defenses")
        if not isinstance(flags, dict) or not all(isinstance(v, list) for v in flags.values()):
            raise UsageError(f"tune.strengths.{defense}={flags!r}: must be lists of values by flag")
        axes = {"defense": defense, **(tune.get("at") or {}), "seed": seed}
        evaluate = {f"evaluate.{k}": v for k, v in (tune.get("evaluate") or {}).items()}
        trials[defense] = []
        for values in itertools.product(*flags.values()):
            strength = dict(zip(flags, values, strict=True))
            cell = make_cell(config, axes, strength | evaluate, role="tune")
            trials[defense].append((strength, cell))
    return trials


def make_cell(config: ExperimentConfig, axes: dict, extra: dict, *, role: str = "test") -> Cell:
    """The stages of one setting.

    Args:
        config: the experiment.
        axes: a value for each axis; of the defense also ``CLEAN``.
        extra: further flags, as ``section.flag``; they override everything else.
        role: of the cell.
    """
    defense, _, after = axes["defense"].partition("+")
    prunes = "antidote" in (defense, after)
    if prunes and config.prune is None:
        raise UsageError(f"prune=null: must be given with defense {axes['defense']}")
    sections = {kind: dict(getattr(config, kind) or {}) for kind in KINDS}
    for kind, flags in sections.items():
        for name in flags:
            if name in _SET_HERE:
                raise UsageError(f"{kind}.{name}={flags[name]!r}: is set by the experiment itself")
    shared = {"model_name_or_path": config.model_name_or_path, **shared_flags(config)}
    if config.align is not None:
        sections["align"].setdefault("seed", config.seed)
    for axis, value in axes.items():
        for name, each in _flags_of(config, axis, value).items():
            _put(sections, shared, name, each, f"grid.{axis}")
    if config.align is not None and config.align_seeds:
        sections["align"]["seed"] = shared["seed"]
    for name, each in extra.items():
        _put(sections, shared, name, each, "tune")
    trained = _STRENGTHS.get(defense, ("",))[0].partition(".")[0]
    if trained in ("align", "finetune"):
        sections[trained]["defense"] = defense
    if config.align is None:
        if trained == "align":
            raise UsageError(f"align=null: must be given with defense {defense}")
        del sections["align"]
    if not prunes:
        del sections["prune"]
    attack = from_values(SECTIONS["finetune"], _PLACES | sections["finetune"], "finetune")
    if defense == CLEAN:
        sections["finetune"] |= clean_flags(attack)
    elif attack.poison_ratio == 0:  # so that it is the same as the clean one
        sections["finetune"].pop("harmful_dataset", None)
    folders = _HashedFolders(config)
    base = shared.pop("model_name_or_path")
    chain = Chain(base, shared, config.batch_size, sections, folders)
    stages = chain.stages | {"evaluate": chain.evaluation(list(chain.models)[-1])}
    shown = {k: v for k, v in axes.items() if _applies(config, k, prunes, defense != CLEAN)}
    return Cell(shown, stages, folders.keys, _strength(defense, after, stages), role)


class _HashedFolders:
    """Gives each stage a folder named by a hash of what it makes, those before it included.

    Attributes:
        keys: the hashes by kind of stage.
    """

    def __init__(self, config):
        self._place = Path(config.stages or Path(config.output_dir) / "stages")
        self.keys = {}
        # What a folder's path stands for, so that keys do not depend on where things lie.
        self._meaning = {}

    def __call__(self, kind, stage, model):
        # Without defaults, so that a flag that is new one day leaves keys as they are.
        defaults = _defaults(kind)
        asides = {each.name for each in fields_by(stage, "nothing")}
        settings = {
            name: self._meaning.get(value, value) if isinstance(value, str) else value
            for name, value in dataclasses.asdict(stage).items()
            if name not in asides and value != getattr(defaults, name)
        }
        text = json.dumps([kind, settings], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = str(self._place / f"{kind}-{key}")
        self._meaning[folder] = f"{kind}:{key}"
        self.keys[kind] = key
        return folder


@functools.cache
def _defaults(kind):
    return from_values(SECTIONS[kind], _REQUIRED[kind], kind)


def grids_of(config: ExperimentConfig) -> list[dict[str, Any]]:
    """The grids whose cells are joined.

    Raises:
        UsageError: an axis that is none.
    """
    grids = config.grid if isinstance(config.grid, list) else [config.grid]
    for grid in grids:
        for name in grid:
            if name not in (*AXES, *config.levels, "defense") and "." not in name:
                near = close_to(name, [*AXES, *config.levels])
                raise UsageError(f"grid.{name}: is no axis{near}")
    return grids


def _flags_of(config, axis, value):
    """The flags that a value of an axis stands for."""
    if axis not in (*config.levels, "defense"):
        return {AXES.get(axis, axis): value}
    levels = {str(name): flags for name, flags in config.levels.get(axis, {}).items()}
    if axis == "defense":
        parts = ["sft"] if value == CLEAN else str(value).split("+")
        return {name: each for part in parts for name, each in levels.get(part, {}).items()}
    if str(value) not in levels:
        raise UsageError(f"grid.{axis}={value!r}: must be among levels.{axis}: {', '.join(levels)}")
    return levels[str(value)]


def _applies(config, axis, prunes, poisons):
    """Whether an axis can make a difference to a cell that prunes, or is poisoned, or not."""
    touched = {AXES.get(axis, axis)}
    if axis in config.levels:
        touched = {flag for flags in config.levels[axis].values() for flag in flags}
    without = {flag for flag in touched if flag.startswith("prune.") and not prunes}
    without |= set() if poisons else touched.intersection(_OF_POISON)
    return axis == "defense" or not touched or touched != without


def _put(sections, shared, name, value, where):
    section, dot, flag = name.partition(".")
    if dot and section in sections and flag not in _SET_HERE:
        sections[section][flag] = value
    elif not dot and name in shared:
        shared[name] = value
    else:
        raise UsageError(
            f"{where}: {name}: must be a flag as section.flag, section one of {', '.join(KINDS)}"
        )


def _strength(defense, after, stages):
    names = [name.split(".") for each in (defense, after) for name in _STRENGTHS.get(each, ())]
    return " ".join(f"{flag}={getattr(stages[kind], flag):g}" for kind, flag in names)
