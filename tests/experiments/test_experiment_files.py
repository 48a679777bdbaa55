"""The experiments that come with the project: their files, their cells, the paper's settings."""

from pathlib import Path

import pytest
import yaml

from antidote_fast.config import flags
from antidote_fast.config.experiment import ExperimentConfig
from antidote_fast.experiments import grid, tables

ROOT = Path(__file__).parents[2]

# Cells of defenses, and those without poison; table 1 has these among its own.
SIZES = {"t1": (30, 0), "t2": (30, 5), "t3": (30, 5), "t4": (30, 5), "t5": (24, 4), "t6": (24, 4)}
SIZES |= {"t7": (2, 1), "t10": (6, 1), "t11": (12, 2), "t13": (7, 1)}
DEMO_SIZES = {"t1": (30, 0), "t2": (24, 4), "t3": (18, 3), "t4": (24, 4), "t5": (12, 2)}
DEMO_SIZES |= {"t6": (6, 1), "t7": (2, 1), "t10": (6, 1), "t11": (10, 2), "t13": (5, 1)}
DEMO_SIZES |= {"comparison": (54, 9)}


@pytest.mark.parametrize("name", [*SIZES, *(f"smollm2/{name}" for name in DEMO_SIZES)])
def test_the_experiments_that_come_with_the_project_are_well_formed(name):
    path = ROOT / "experiments" / f"{name}.yaml"
    found, _ = flags.from_words(ExperimentConfig, [str(path)], "experiment")
    cells = grid.cells_of(found, {})
    sizes = DEMO_SIZES if "/" in name else SIZES
    clean = [cell for cell in cells if cell.axes["defense"] == "clean"]
    assert (len(cells) - len(clean), len(clean)) == sizes[name.rpartition("/")[2]]
    poison = [cell.stages["finetune"].poison_ratio for cell in cells if "prune" not in cell.stages]
    assert 0 in poison
    axes = grid.axes_of(found)
    assert found.tables
    for spec in found.tables:
        tables.check_spec(spec, axes)
    grid.trials_of(found)


def test_every_experiment_file_is_tested():
    found = {p.stem for p in (ROOT / "experiments").glob("*.yaml")}
    assert found == {*SIZES, "paper"}
    found = {p.stem for p in (ROOT / "experiments/smollm2").glob("*.yaml")}
    assert found == {*DEMO_SIZES, "demo"}


def test_the_papers_settings():
    text = (ROOT / "experiments/paper.yaml").read_text()
    paper = yaml.safe_load(text)
    assert paper["finetune"]["poison_ratio"] == 0.2
    found, _ = flags.from_words(ExperimentConfig, [str(ROOT / "experiments/t3.yaml")], "x")
    cell = grid.cells_of(found, {})[-1]
    attack, judged = cell.stages["finetune"], cell.stages["evaluate"]
    assert (attack.num_train_epochs, attack.lora_r, attack.lora_alpha) == (20, 256, 4)
    assert cell.stages["align"].learning_rate == 1e-3
    assert cell.stages["prune"].ratio == 0.05
    assert (judged.judge, judged.num_samples, judged.task) == ("beaver-dam", 1000, "gsm8k")
    assert judged.reference_model == cell.stages["align"].output_dir
