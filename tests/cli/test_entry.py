"""The command line: help, flags, aliases, exit codes, one-line errors, env and inspect."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import warnings

import forked
import pytest
import torch

from antidote_fast import PackedMask, __version__, save_masks
from antidote_fast.cli import entry, inspect
from antidote_fast.cli.commands import PLAIN, STAGES
from antidote_fast.config import flags
from antidote_fast.config.experiment import ExperimentConfig, RunConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.config.train import AlignConfig
from antidote_fast.errors import BackendUnavailable, DataError, NothingPruned, UsageError
from antidote_fast.files.commit import output_folder
from antidote_fast.stages import prune
from antidote_fast.system.progress import command_line_progress, json_lines, track

PRUNE = ["prune", "--model_name_or_path", "m", "--output_dir", "o", "--dataset", "d"]


@pytest.fixture
def seen(monkeypatch):
    """Replaces the prune stage by one that keeps the config it was called with."""
    calls = []

    def run(config, *, progress=False):
        calls.append((config, progress))
        return {"stage": "prune", "seconds": 1.25}

    monkeypatch.setattr(prune, "run", run)
    return calls


def failing(monkeypatch, error):
    def run(config, *, progress=False):
        raise error

    monkeypatch.setattr(prune, "run", run)


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(words, capsys):
    assert entry.main(words) == 0
    out = capsys.readouterr().out
    for name in (*STAGES, *PLAIN):
        assert f"\n  {name} " in out
    assert "for safety, not for speed" in out


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_tells_every_field(name, capsys):
    assert entry.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: antidote-fast {name} ")
    for field in STAGES[name].config.__dataclass_fields__:
        assert f"--{field}" in out
    assert "class '" not in out
    assert "Literal" not in out


@pytest.mark.parametrize("name", PLAIN)
def test_help_of_env_and_inspect(name, capsys):
    assert entry.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: antidote-fast {name}")


def test_version(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"antidote-fast {__version__}\n"


# --- flags ----------------------------------------------------------------------------------------


def test_flags_make_the_dataclass(seen):
    words = ["--ratio", "0.2", "--scope=tensor", "--paper", "false", "--seed", "7"]
    assert entry.main([*PRUNE, *words]) == 0
    [(config, _)] = seen
    assert config == PruneConfig(
        model_name_or_path="m", output_dir="o", dataset="d", ratio=0.2, scope="tensor", seed=7
    )


def test_a_list_flag_takes_words_as_they_are(seen):
    words = ["--ignore", "re:.*lm_head", "re:a,b", "--targets=all-linear", "--overwrite"]
    assert entry.main([*PRUNE, *words]) == 0
    [(config, _)] = seen
    assert config.ignore == ["re:.*lm_head", "re:a,b"]
    assert config.targets == ["all-linear"]
    assert config.overwrite is True


@pytest.mark.parametrize(
    ("word", "targets"),
    [('["q_proj", "k_proj"]', ["q_proj", "k_proj"]), ("null", None), ("q_proj", ["q_proj"])],
)
def test_a_list_flag_takes_json_too(seen, word, targets):
    assert entry.main([*PRUNE, "--targets", word]) == 0
    assert seen[0][0].targets == targets


def test_yaml_with_flags_overriding(seen, tmp_path):
    file = tmp_path / "prune.yaml"
    file.write_text("model_name_or_path: m\noutput_dir: o\ndataset: d\nratio: 0.3\nseed: 5\n")
    assert entry.main(["prune", "--config", str(file), "--ratio", "0.4"]) == 0
    [(config, _)] = seen
    assert (config.ratio, config.seed) == (0.4, 5)


def test_aliases_are_taken_with_a_notice(seen, capsys):
    assert entry.main([*PRUNE, "--nsamples", "9", "--dense_ratio=0.25"]) == 0
    [(config, _)] = seen
    assert (config.num_calibration_samples, config.ratio) == (9, 0.25)
    err = capsys.readouterr().err
    assert "--nsamples is taken as --num_calibration_samples" in err
    assert "--dense_ratio is taken as --ratio (the fraction removed" in err


ALIGNED = "base_model is taken as {}aligned_model (the aligned model; --base is the model of an ada"


def test_the_aligned_models_flag_and_its_name_of_earlier(seen, capsys, tmp_path):
    file = tmp_path / "prune.yaml"
    file.write_text("base_model: twin\nmodel_name_or_path: m\noutput_dir: o\ndataset: d\n")
    for words, prefix in (
        ([*PRUNE, "--aligned_model", "twin"], None),
        ([*PRUNE, "--base_model", "twin"], "--"),
        (["prune", "--config", str(file)], ""),
    ):
        assert entry.main([*words, "--base", "other"]) == 0
        config, _ = seen.pop()
        assert (config.aligned_model, config.model_name_or_path) == ("twin", "other")
        err = capsys.readouterr().err
        assert err == "" if prefix is None else ALIGNED.format(prefix) in err
    file.write_text("base_model: twin\naligned_model: other\n")
    assert entry.main(["prune", "--config", str(file)]) == 2
    assert "base_model: must be left out with aligned_model" in capsys.readouterr().err


def test_the_aligned_models_flag_in_sections(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: o\nfinetune: {}\nevaluate: {}\nprune: {base_model: twin}\n")
    words = ["--model_name_or_path", "m", "--config", str(file)]
    config, notices = flags.from_words(RunConfig, words, "run")
    assert config.prune == {"aligned_model": "twin"}
    assert ALIGNED.format("") in notices[0]
    config, notices = flags.from_words(RunConfig, [*words, "--prune.base_model", "other"], "run")
    assert config.prune == {"aligned_model": "other"}
    assert notices[0].startswith("--prune." + ALIGNED.format("--prune.")[:28])
    grid = "finetune: {}\nevaluate: {}\ngrid: {prune.base_model: [a, b]}\noutput_dir: o\n"
    file.write_text("model_name_or_path: m\n" + grid)
    config, notices = flags.from_words(ExperimentConfig, [str(file)], "experiment")
    assert config.grid == {"prune.aligned_model": ["a", "b"]}
    assert len(notices) == 1


def test_dashes_do_for_underscores(seen):
    words = ["prune", "--model-name-or-path", "m", "--output-dir=o", "--dataset", "d"]
    assert entry.main(words) == 0
    assert seen[0][0].model_name_or_path == "m"


def test_sections_of_a_run_take_flags():
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--align.dataset", "a"]
    words += ["--finetune.lora_targets", "q_proj", "v_proj", "--finetune.dataset", "f"]
    words += ["--prune.paper", "--prune.ratio", "0.2", "--evaluate.task", "sst2"]
    config, _ = flags.from_words(RunConfig, words, "run")
    assert config.align == {"dataset": "a"}
    assert config.finetune == {"lora_targets": ["q_proj", "v_proj"], "dataset": "f"}
    assert config.prune == {"paper": True, "ratio": 0.2}


def test_defaults_reach_the_dataclass_unchanged():
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--dataset", "d"]
    config, _ = flags.from_words(AlignConfig, words, "align")
    assert config == AlignConfig(model_name_or_path="m", output_dir="o", dataset="d")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ratoi", "0.1"], "--ratoi: prune has no such flag; did you mean --ratio?"),
        (["--ratio", "high"], "--ratio=high: must be a number"),
        (["--ratio", "0"], "ratio=0.0: must be in (0, 1]"),
        (["--ratio", "1.5"], "ratio=1.5: must be in (0, 1]"),
        (["--ratio", "-0.1"], "ratio=-0.1: must be in (0, 1]"),
        (["--ratio", ".nan"], "ratio=nan: must be in (0, 1]"),
        (["--dense_ratio", "2"], "ratio=2.0: must be in (0, 1]"),
        (["--score", "owl"], "score='owl': must be one of wanda, magnitude, random, gate"),
        (["--scope", "column"], "--scope=column: must be one of 'row', 'tensor', 'global'"),
        (["--seed", "1.5"], "--seed=1.5: must be an integer"),
        (["--seed", "-1"], "seed=-1: must be an integer in [0, 2**64)"),
        (["--batch_size", "0"], "batch_size=0: must be greater than 0"),
        (["--paper", "--scope", "tensor"], "scope='tensor': must be row with paper"),
        (["stray"], "stray: prune has no such flag"),
        (["--ratio"], "--ratio: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(words, says, seen, capsys):
    assert entry.main([*PRUNE, *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert says in err[-1]
    assert len(err) == 1 or "is taken as" in err[0]
    assert not seen


def test_a_missing_flag_is_named(capsys):
    assert entry.main(["prune", "--model_name_or_path", "m"]) == 2
    assert "--output_dir: required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (None, 3, "--config: "),
        ("ratoi: 0.1\n", 2, "ratoi: prune has no such flag; did you mean ratio?"),
        ("ratio: high\n", 2, "--ratio=high: must be a number"),
        ("backend: [a]\n", 2, "--backend=['a']: must be a text"),
        ("gate_templates: chat\n", 2, "--gate_templates=chat: must be a list of texts"),
        ("ratio: [\n", 2, "onfig"),
        ("seed:\nratio: 0.1\n", 2, "seed=null: must be given, or left out for its default"),
        ("{a: &a [x], b: [" + "*a, " * 11 + "]}", 2, "more than 10 aliases"),
        ("[" * 40, 2, "nested deeper than 32"),
        ("x: \x00\n", 2, "not valid YAML"),
        ("only words", 2, "onfig"),
    ],
)
def test_a_wrong_config_file(text, code, says, tmp_path, seen, capsys):
    file = tmp_path / "prune.yaml"
    if text is not None:
        file.write_text(text)
    assert entry.main([*PRUNE, "--config", str(file)]) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not seen


def test_unknown_command(capsys):
    assert entry.main(["prunne"]) == 2
    assert "'prunne': no such command; did you mean prune?" in capsys.readouterr().err


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("ratio=2: must be in (0, 1]"), 2, "ratio=2: must be in (0, 1]"),
        (BackendUnavailable("backend='cuda': no GPU"), 2, "backend='cuda': no GPU"),
        (DataError("x.jsonl: line 3:\n broken"), 3, "x.jsonl: line 3: broken"),
        (NothingPruned("nothing matched"), 4, "nothing matched"),
        (KeyboardInterrupt(), 75, "interrupted; nothing is left half-written"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 1, "f: No space left on device"),
        (MemoryError(), 1, "out of memory; try a smaller --batch_size"),
        (ImportError("No module named 'peft'", name="peft"), 1, "pip install 'antidote-fast[hf]'"),
        (ImportError("x", name="matplotlib"), 1, "pip install 'antidote-fast[plot]'"),
        (ZeroDivisionError("by\nzero"), 1, "unexpected failure: ZeroDivisionError: by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_failure_is_one_line_with_its_code(error, code, says, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert entry.main(PRUNE) == code
    err = capsys.readouterr().err
    assert err.startswith("antidote-fast: ")
    assert says in err
    assert err.count("\n") == 1


def test_the_traceback_comes_with_debug_only(monkeypatch, capsys):
    failing(monkeypatch, ZeroDivisionError("here"))
    assert entry.main([*PRUNE, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_warnings_and_logs_stay_quiet_and_are_put_back(monkeypatch, capsys):
    def run(config, *, progress=False):
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("transformers").warning("noise")
        return {"stage": "prune"}

    monkeypatch.setattr(prune, "run", run)
    assert entry.main(PRUNE) == 0
    assert "noise" not in capsys.readouterr().err
    assert logging.root.manager.disable == logging.NOTSET


def test_quiet_prints_nothing(seen, capsys):
    assert entry.main([*PRUNE, "--quiet"]) == 0
    assert seen[0][1] is False
    assert capsys.readouterr() == ("", "")


def test_a_stage_ends_with_one_line(seen, capsys):
    assert entry.main(PRUNE) == 0
    assert capsys.readouterr().out == "prune in 1.2 s: o\n"


def test_module_runs_as_the_script():
    done = subprocess.run(
        [sys.executable, "-m", "antidote_fast", "prune", "--ratoi", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75_and_leaves_nothing(number, tmp_path):
    code = (
        "import signal, sys, time\n"
        "from antidote_fast import cli\n"
        "from antidote_fast.files.commit import output_folder\n"
        "from antidote_fast.stages import prune\n"
        # A shell starts background jobs with this one ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def run(config, *, progress=False):\n"
        "    with output_folder(config.output_dir) as folder:\n"
        "        (folder / 'half').write_text('x')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "prune.run = run\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["prune", "--model_name_or_path", "m", "--dataset", "d"]
    process = forked.Process(code, *words, "--output_dir", tmp_path / "sub" / "out")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "interrupted; nothing is left half-written" in err
    assert list(tmp_path.iterdir()) == []


# --- progress -------------------------------------------------------------------------------------


def test_progress_is_json_lines_where_there_is_no_terminal(capsys):
    with command_line_progress() as progress:
        assert list(track([1, 2, 3], "calibrate", progress)) == [1, 2, 3]
    [line] = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields.pop("seconds") >= 0
    assert fields == {"step": "calibrate", "done": 3, "total": 3}


def test_json_lines_tell_how_far_a_long_loop_is(capsys):
    assert list(json_lines(iter("ab"), "train", None, every=0.0)) == ["a", "b"]
    done = [json.loads(line)["done"] for line in capsys.readouterr().err.splitlines()]
    assert done == [1, 2, 2]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    with command_line_progress() as progress:
        assert list(track(range(3), "calibrate", progress)) == [0, 1, 2]
    err = capsys.readouterr().err
    assert "calibrate" in err
    assert "3/3" in err


def test_track_off_and_with_tqdm(capsys):
    items = [1, 2]
    assert track(items, "x", False) is items
    assert list(track(items, "x", True)) == items
    assert "x: 100%" in capsys.readouterr().err


# --- env and inspect ------------------------------------------------------------------------------


def test_env_tells_backends_and_versions(capsys):
    assert entry.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"] == "available"
    assert entry.main(["env"]) == 0
    assert "backends:\n  cpu" in capsys.readouterr().out


def test_env_says_why_there_is_no_extension(monkeypatch):
    from antidote_fast import backends
    from antidote_fast.backends import cuda

    cpu, _ = backends.load("cpu")
    reason = "the extension is not built"
    monkeypatch.setattr(backends, "load", lambda name: (cpu, reason if name == "cpu" else None))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "no such file", raising=False)
    found = inspect.environment()
    assert found["cpu extension"] == reason
    assert found["cuda extension"].startswith(f"{reason} (no such file); reinstall where")
    assert found["CUDA compiler"].startswith("none found")
    assert found["C++ compiler"].startswith("none found")
    assert found["backends"]["cpu"] == reason


def masks_file(path):
    bits = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
    save_masks(path, {"layer.weight": PackedMask(bits, (2, 3))}, {"score": "wanda"})
    return path


def test_inspect_masks(tmp_path, capsys):
    file = masks_file(tmp_path / "masks.safetensors")
    assert entry.main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "masks"
    assert found["score"] == "wanda"
    assert found["removed"] == "3 of 6"
    assert found["masks"] == {"layer.weight": "[2, 3], 3 removed"}


def test_inspect_tells_a_folder_that_is_not_whole(tmp_path, capsys):
    with output_folder(tmp_path / "out") as folder:
        masks_file(folder / "masks.safetensors")
        (folder / "report.json").write_text('{"schema_version": 1, "stage": "prune"}')
    assert entry.main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2, all hashes as recorded" in out
    assert "3 of 6" in out
    (tmp_path / "out" / "report.json").write_text('{"schema_version": 1, "stage": "align"}')
    assert entry.main(["inspect", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert "not whole: report.json: contents changed" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "inspect takes one file or folder, 0 were given"),
        (["a", "b"], 2, "inspect takes one file or folder, 2 were given"),
        (["{tmp}/nope"], 3, "no such file or folder"),
        (["{tmp}", "--all"], 2, "--all: inspect takes --json only"),
        (["{tmp}/text"], 3, "is truncated or not a safetensors file"),
        (["{tmp}/other.safetensors"], 3, "neither norms nor masks of this tool"),
        (["{tmp}"], 3, "neither a model, an adapter, nor written by this tool"),
    ],
)
def test_inspect_refusals(words, code, says, tmp_path, capsys):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not tensors")
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert entry.main(["inspect", *words]) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_entry_point_sets_what_libraries_read(monkeypatch, capsys):
    names = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")
    names += ("HF_DATASETS_DISABLE_PROGRESS_BARS",)
    for name in names:
        monkeypatch.setenv(name, "x")  # so that monkeypatch puts them back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["antidote-fast", "--version"])
    with pytest.raises(SystemExit) as ended:
        entry.entry_point()
    assert ended.value.code == 0
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
