"""The commands: each with its flags, what runs it, and a line of help."""

from dataclasses import dataclass

from antidote_fast.config import experiment, sweep
from antidote_fast.config import train as configs
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.experiment import DemoConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig


@dataclass(frozen=True)
class Stage:
    """A subcommand that reads a dataclass of flags and writes a folder.

    ``ranks``: the processes that torchrun starts can share it.
    """

    config: type
    run: str
    help: str
    example: str
    ranks: bool = False


STAGES = {
    "align": Stage(
        configs.AlignConfig,
        "antidote_fast.stages.align:run",
        "tune a base model on safe data",
        "--model_name_or_path BASE --dataset safe.jsonl --output_dir aligned",
    ),
    "finetune": Stage(
        configs.FinetuneConfig,
        "antidote_fast.stages.finetune:run",
        "tune an aligned model on a user's data, a share of it harmful",
        "--model_name_or_path aligned --dataset task.jsonl --harmful_dataset harmful.jsonl "
        "--output_dir attacked",
    ),
    "calibrate": Stage(
        CalibrateConfig,
        "antidote_fast.stages.calibrate:run",
        "collect activation norms on harmful data, for any later prune",
        "--model_name_or_path aligned --adapter attacked --dataset harmful.jsonl "
        "--output_dir norms",
        ranks=True,
    ),
    "prune": Stage(
        PruneConfig,
        "antidote_fast.stages.prune:run",
        "remove the harmful weights of an adapter or a model",
        "--model_name_or_path BASE --adapter ADAPTER --dataset harmful.jsonl --ratio 0.1 "
        "--output_dir OUT",
        ranks=True,
    ),
    "fleet": Stage(
        FleetConfig,
        "antidote_fast.fleet.fleet:run",
        "prune many adapters of one base model, which stays in memory",
        "--manifest jobs.jsonl --base BASE --dataset harmful.jsonl --output_dir OUT",
    ),
    "evaluate": Stage(
        EvaluateConfig,
        "antidote_fast.stages.evaluate:run",
        "measure harmful score, finetune accuracy and benign refusals",
        "--model_name_or_path BASE --adapter OUT --harmful_dataset test.jsonl "
        "--task_dataset task-test.jsonl --output_dir scores",
    ),
    "sweep": Stage(
        sweep.SweepConfig,
        "antidote_fast.experiments.sweep:run",
        "try ratios, scopes and scores on held-out prompts, and recommend one",
        "--model_name_or_path BASE --adapter ADAPTER --dataset harmful.jsonl "
        "--harmful_dataset val.jsonl --task_dataset task-val.jsonl --output_dir sweep",
    ),
    "run": Stage(
        experiment.RunConfig,
        "antidote_fast.experiments.run:run",
        "align, finetune, prune and evaluate, from one YAML file",
        "--config experiment.yaml",
    ),
    "experiment": Stage(
        experiment.ExperimentConfig,
        "antidote_fast.experiments.experiment:run",
        "a grid of them, the four other defenses included: rows, tables, plots",
        "experiments/smollm2/comparison.yaml",
    ),
    "demo": Stage(
        DemoConfig,
        "antidote_fast.experiments.demo.demo:run",
        "the whole road on a small model that comes with a package: no download from a hub",
        "--output_dir demo-out",
    ),
}
PLAIN = {
    "env": "versions, kernels in use, and why a backend is not available",
    "inspect": "what is in a folder, an adapter, a norms or a masks file, and whether it is whole",
    "verify": "whether folders are whole, by their hashes; exit code 3 and the file where not",
    "convert": "masks that torch.save wrote, as a masks file of safetensors",
}
