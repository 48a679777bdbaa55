"""What README.md and the documents show runs as printed, and what they point to is there."""

import csv
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import stages
import tiny
import yaml

from antidote_fast.cli import entry
from antidote_fast.cli.commands import PLAIN, STAGES
from antidote_fast.config import flags
from antidote_fast.config.experiment import SECTIONS, RunConfig
from antidote_fast.config.prune import PruneConfig

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
README = PAGES["README.md"]
EVERYWHERE = {"--dry_run", "--json", "--quiet", "--debug"}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


# --- the first page -------------------------------------------------------------------------------


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 110


def test_the_two_commands_come_first():
    lines = [line.split("#")[0].strip() for line in README.splitlines()[1:] if line.strip()]
    assert lines[:2] == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for page in PAGES.values() for name in re.findall(r"`make ([a-z-]+)`", page)}
    assert {"demo", "test", "style", "bench", "sanitize", "gpu-check", "docs"} | named <= {*targets}


def test_every_command_is_in_the_table():
    named = re.findall(r"^\| `([a-z]+)` \| ", README, re.MULTILINE)
    assert named == [*STAGES, *PLAIN]


def test_abbreviations_are_explained_before_they_are_used():
    for word in ("HS", "FA", "BR"):
        assert README.index(f"({word})") < re.search(rf"(?<!\(){word}\b", README).start()


def test_the_results_are_those_measured():
    rows = re.findall(
        r"^\| ([a-z].*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|$", README, re.MULTILINE
    )
    assert 4 <= len(rows) <= 8
    with open(ROOT / "benchmarks" / "results" / "scores.csv", encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    columns = ("harmful_score", "finetune_accuracy", "benign_refusal_rate")
    picture = (ROOT / "docs" / "assets" / "repair.svg").read_text(encoding="utf-8")
    for name, *shown in rows[1:]:  # the aligned model has no row there
        score = {"attacked": "none", "plain Antidote": "wanda", "learned gates": "gate"}
        ratio = name.partition(", ratio ")[2]
        cells = [
            row
            for row in measured
            if row["score"] == score[name.partition(",")[0]] and row["ratio"] == ratio
        ]
        assert len(cells) == 9
        for column, value in zip(columns, shown, strict=True):
            values = [float(cell[column]) for cell in cells if cell[column]]
            assert value == (f"{statistics.mean(values):.1f}" if values else "")
        if ratio != "0.01":
            assert all(f">{value} %<" in picture for value in shown[:2])


# --- what can be typed ----------------------------------------------------------------------------


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
    [line for page in PAGES.values() for line in commands(page)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[-40:],
)
def test_every_line_that_can_be_typed_is_well_formed(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [experiment] = blocks("docs/commands.md", "yaml")
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
    found = {page: [command for command, _ in commands(text)] for page, text in PAGES.items()}
    assert found["README.md"] == ["prune"]
    assert {"prune", "sweep", "run", "verify", "inspect"} <= set(found["docs/commands.md"])
    production = found["docs/production.md"]
    assert {"prune", "calibrate", "evaluate", "run", "verify", "inspect"} <= set(production)
    assert production.count("fleet") == 4  # of which one is Slurm's and one Kubernetes's
    assert len(production) >= 16


def test_the_yaml_of_a_run_is_well_formed():
    [text] = blocks("docs/commands.md", "yaml")
    config = flags.from_values(RunConfig, yaml.safe_load(text), "run")
    for name, config_class in SECTIONS.items():
        places = {"model_name_or_path": "x", "output_dir": "y"}
        flags.from_values(config_class, places | getattr(config, name), name)


# --- what is run ----------------------------------------------------------------------------------


def test_every_python_block_is_run_by_a_test():
    counts = {page: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
    assert counts == {"README.md": 1, "docs/commands.md": 1, "docs/evaluation.md": 1}


def test_the_small_example_runs_as_printed(capsys):
    [example] = blocks("docs/commands.md", "python")
    exec(example, {})
    assert capsys.readouterr().out == f"{7 / 64}\n"  # 0.1 of 64 columns is 7 a row (num_pruned)


def test_the_example_of_an_evaluation_runs(tmp_path, monkeypatch, capsys):
    [example] = blocks("docs/evaluation.md", "python")
    tiny.save_model(tiny.build(), tmp_path / "OUT")
    for name in ("harmful-test", "ordinary"):
        rows = [json.dumps({"instruction": f"what is w{i}"}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] [\d.]+", first)
    assert re.fullmatch(r"alpaca(\+prefill)? \{'phrases, long': \{'kappa': .*'num': 6\}\}", second)


@pytest.fixture
def demo_folders(tmp_path, monkeypatch):
    """What the demo leaves, on a tiny model: the folders and data that README.md names."""
    [(_, words)] = commands(README)
    config, _ = flags.from_words(PruneConfig, words, "prune")
    base, adapter = tmp_path / config.model_name_or_path, tmp_path / config.adapter
    data = tmp_path / config.dataset
    stages.make_road(tmp_path)
    data.parent.mkdir(parents=True)
    (tmp_path / "harm.jsonl").rename(data)
    tiny.save_model(tiny.build(), base)
    tiny.save_adapter(tiny.add_lora(tiny.build()), adapter)
    monkeypatch.chdir(tmp_path)
    return words


def shape_of(text):
    """The text without what differs from model to model: numbers and the names of weights."""
    text = re.sub(r"\S*layers\.0\.\S*", "KEY", text)
    return re.sub(r"\d[\d,.]*", "N", text).strip()


def test_the_command_prints_what_is_shown(demo_folders, capsys):
    assert entry.main(["prune", *demo_folders]) == 0
    [shown] = re.findall(r"^ {4}(removed .*)$", README, re.MULTILINE)
    assert shape_of(capsys.readouterr().out) == shape_of(shown)


def test_the_python_lines_print_what_is_shown(demo_folders, capsys):
    [example], [shown] = blocks("README.md", "python"), blocks("README.md", "text")
    exec(example, {})
    assert shape_of(capsys.readouterr().out) == shape_of(shown)


# --- what is pointed to ---------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    folders = "antidote_fast|benchmarks|csrc|docs|experiments|tests"
    for name in re.findall(rf"(?<![\w/-])((?:{folders})/[\w./*-]*\w)(?![\w<])", PAGES[page]):
        assert "FOLDER" in name or any(ROOT.glob(name)), name


def test_every_test_that_shows_a_promise_is_there():
    files = {
        path.stem: path.read_text(encoding="utf-8") for path in ROOT.rglob("tests/**/test_*.py")
    }
    text = "\n".join(files.values())
    for name in set(re.findall(r"\btest_\w+", PAGES["SECURITY.md"])):
        assert name in files or f"def {name}(" in text, name


@pytest.mark.parametrize("folder", ["antidote_fast", "csrc", "setup.py"])
def test_no_environment_variable_is_left_out(folder):
    paths = [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.[chp]*")
    sources = [p for p in paths if p.suffix in (".py", ".h", ".cpp", ".inc")]
    assert sources
    read = r"environ(?:\.\w+\(|\[)\s*[\"']([A-Z_]+)|\bgetenv\(\s*\"([A-Z_]+)|\"(ANTIDOTE_[A-Z_]+)\""
    for path in sources:
        for match in re.finditer(read, path.read_text(encoding="utf-8")):
            name = next(filter(None, match.groups()))
            assert re.search(rf"`{name}[=`]", PAGES["docs/install.md"]), f"{name} in {path}"
