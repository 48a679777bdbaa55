"""What README.md shows runs as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from antidote_fast.cli.commands import PLAIN, STAGES
from antidote_fast.config import flags
from antidote_fast.config.experiment import SECTIONS, RunConfig
from antidote_fast.config.prune import PruneConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRODUCTION = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
EVERYWHERE = {"--dry_run", "--json", "--quiet", "--debug"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_example_runs_as_printed():
    [example] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{7 / 64}\n"  # 0.1 of 64 columns is 7 a row (num_pruned)
    assert len([line for line in example.splitlines() if line]) == 5


def test_the_two_commands_come_first():
    lines = [line.split("#")[0].strip() for line in README.splitlines()[1:] if line.strip()]
    assert lines[:2] == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "style", "bench", "sanitize", "gpu-check"} <= set(targets)


def test_the_command_line_example_is_well_formed():
    line, *_ = re.findall(r"^    antidote-fast prune (.*)$", README, re.MULTILINE)
    config, _ = flags.from_words(PruneConfig, shlex.split(line), "prune")
    assert (config.adapter, config.ratio) == ("ADAPTER", 0.1)


def commands(text):
    """(command, its words) of every line of a document that a reader could type."""
    for line in text.splitlines():
        match = re.search(
            r"(?:^|\[\"|\b)(?:antidote-fast|-m antidote_fast) ([a-z]+) ([^#`\"]*)", line
        )
        typed = line.startswith((" ", "antidote-fast", "srun", "args:"))
        if match and typed and "..." not in match[2]:
            yield match[1], shlex.split(re.sub(r"\$\{\w+\}", "3", match[2]))


@pytest.mark.parametrize(
    ("command", "words"),
    [*commands(README), *commands(PRODUCTION), *commands(EXPERIMENTS)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[-40:],
)
def test_every_line_that_can_be_typed_is_well_formed(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [experiment] = blocks("yaml")
    Path("experiment.yaml").write_text(experiment)
    Path("experiments").symlink_to(ROOT / "experiments")
    if command in PLAIN:
        assert {word for word in words if word.startswith("--")} <= {"--json"}
        return
    words = [word for word in words if word not in EVERYWHERE]
    config, notices = flags.from_words(STAGES[command].config, words, command)
    assert isinstance(config, STAGES[command].config)
    assert not notices


def test_the_lines_that_can_be_typed_are_found():
    found = [command for command, _ in commands(PRODUCTION)]
    assert {"prune", "calibrate", "evaluate", "run", "verify", "inspect"} <= set(found)
    assert found.count("fleet") == 4  # of which one is Slurm's and one Kubernetes's
    assert len(found) >= 16


def test_every_command_is_in_the_table():
    named = re.findall(r"^\| `([a-z]+)` \| ", README, re.MULTILINE)
    assert named == [*STAGES, *PLAIN]


def test_the_yaml_of_a_run_is_well_formed():
    [text] = blocks("yaml")
    config = flags.from_values(RunConfig, yaml.safe_load(text), "run")
    for name, config_class in SECTIONS.items():
        places = {"model_name_or_path": "x", "output_dir": "y"}
        flags.from_values(config_class, places | getattr(config, name), name)


@pytest.mark.parametrize("folder", ["antidote_fast", "csrc", "setup.py"])
def test_no_environment_variable_is_left_out(folder):
    paths = [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.[chp]*")
    sources = [p for p in paths if p.suffix in (".py", ".h", ".cpp", ".inc")]
    named = set()
    for path in sources:
        named |= set(re.findall(r"\"(ANTIDOTE_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    assert sources
    for name in named:
        assert f"`{name}" in README
