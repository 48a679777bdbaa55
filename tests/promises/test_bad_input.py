"""What a person can get wrong: exit code, one line, and an output folder that is not touched.

By the command line, in process for speed; a few in a process of their own.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.cli import entry
from antidote_fast.data.load import load_records

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus three", "output": "three"},
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Sound folders, which the tests copy and break."""
    root = tmp_path_factory.mktemp("sound")
    tiny.save_model(tiny.build(), root / "base")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    return root


@pytest.fixture
def work(origin, tmp_path, monkeypatch):
    """An empty current folder with links to what is sound."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(origin / name)
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def words(command="prune", **options):
    """A command line that works, with ``options`` replaced; None leaves one out."""
    given = {
        "model_name_or_path": "base",
        "adapter": "adapter",
        "dataset": "harmful.jsonl",
        "output_dir": "out",
        **options,
    }
    flags = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return [command, *(word for pair in flags for word in pair)]


def refused(argv, code, says, capsys):
    """The exit code, one line that says it, and no output folder."""
    assert entry.main(argv) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("antidote-fast: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "unexpected failure" not in lines[0]
    assert not os.path.lexists("out")
    assert not [name for name in os.listdir() if "partial" in name or name.endswith(".lock")]


def copy(origin, name, to):
    """A copy of a sound folder whose files may be changed."""
    to.mkdir()
    for file in (origin / name).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_sound_command_line_works(work):
    assert entry.main(words()) == 0
    assert (work / "out" / "report.json").exists()


# --- models, adapters, files that are not there ---------------------------------------------------


@pytest.mark.parametrize("command", ["calibrate", "prune"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_name_or_path": "./nope"}, "model_name_or_path='./nope': no such folder"),
        ({"model_name_or_path": "no/such-model"}, "model_name_or_path='no/such-model': no such"),
        ({"model_name_or_path": "harmful.jsonl"}, "'harmful.jsonl': is a file"),
        ({"model_name_or_path": "adapter"}, "'adapter': is a PEFT adapter; give its base"),
        ({"adapter": "./nope"}, "adapter='./nope': no such folder"),
        ({"adapter": "base"}, "adapter='base': is a whole model, not an adapter"),
        ({"dataset": "nope.jsonl"}, "nope.jsonl: no such file"),
        ({"dataset": "nobody/nothing"}, "nobody/nothing"),
        ({"dataset": "."}, ".: is a directory"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value.values()),
)
def test_what_is_not_there(command, options, says, work, capsys):
    refused(words(command, **options), 3, says, capsys)


def test_no_such_norms(work, capsys):
    refused(words(norms="nope.safetensors"), 3, "norms='nope.safetensors': no such file", capsys)
    refused(words(norms="harmful.jsonl"), 3, "norms='harmful.jsonl'", capsys)
    refused(words(norms="adapter"), 3, "no such file", capsys)


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("align", {"dataset": "nope.jsonl"}, "nope.jsonl: no such file"),
        ("align", {"model_name_or_path": "./nope"}, "no such folder"),
        ("finetune", {"harmful_dataset": "nope.jsonl"}, "nope.jsonl: no such file"),
        ("finetune", {"harmful_dataset": "harmful.jsonl", "dataset": "nope.jsonl"}, "no such file"),
        ("evaluate", {"dataset": None, "harmful_dataset": "nope.jsonl"}, "no such file"),
        ("evaluate", {"dataset": None, "benign_dataset": "harmful.jsonl", "adapter": "x"}, "'x'"),
    ],
)
def test_other_stages_check_first_too(command, options, says, work, capsys):
    adapter = {"adapter": None} if command != "evaluate" else {}
    refused(words(command, **(adapter | options)), 3, says, capsys)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "bad.jsonl: is empty"),
        ("\n\n", "bad.jsonl: is empty"),
        ("[]", "no records"),
        (json.dumps(ROWS[0]) + "\n{broken\n", "bad.jsonl: line 2: not valid JSON"),
        (json.dumps(ROWS[0]) + "\n7\n", "bad.jsonl: line 2: must be a JSON object"),
        ('{"question": "x"}', "bad.jsonl: line 1: column 'answer' is missing"),
        ('{"instruction": "x"}', "bad.jsonl: line 1: column 'output' is missing"),
        ('{"instruction": "x", "output": 3}', "column 'output' must be a string, got int"),
        ('{"instruction": "x", "output": ""}', "empty output"),
    ],
)
def test_broken_data(text, says, work, capsys):
    (work / "bad.jsonl").write_text(text)
    refused(words(dataset="bad.jsonl"), 3, says, capsys)


def test_prompts_that_fill_the_limit(work, capsys):
    says = "all 2 prompts have 8 tokens or more: raise max_seq_length"
    refused(words(max_seq_length=8), 3, says, capsys)


def test_a_batch_of_pads_alone(work, capsys, monkeypatch):
    from antidote_fast.data import batches as data_batches

    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batches = data_batches.Examples([batch])
    monkeypatch.setattr(data_batches, "make_batches", lambda *args, **kwargs: batches)
    refused(words(), 3, "hold 0 tokens to count", capsys)


def test_a_tokenizer_without_a_pad_token_works_unchanged(work):
    before = (work / "base" / "tokenizer_config.json").read_bytes()
    assert tiny.tokenizer().pad_token is None
    assert entry.main(words(adapter=None, output_dir="full")) == 0
    assert (work / "full" / "tokenizer_config.json").read_bytes() == before


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.01", "nan", "inf", "high"])
def test_ratio_outside_of_its_range(ratio, work, capsys):
    refused(words(ratio=ratio), 2, "ratio=", capsys)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"targets": "no_such_layer"}, 4, "nothing to prune"),
        ({"targets": "lm_head", "adapter": None}, 2, "lm_head"),
        ({"ignore": "re:.*"}, 4, "nothing to prune"),
        ({"targets": "re:("}, 2, "is not a pattern"),
        ({"targets": "re:(", "score": "random"}, 2, "is not a pattern"),
        ({"targets": "no_such_layer", "score": "magnitude"}, 4, "nothing to prune"),
        ({"backend": "gpu"}, 2, "backend='gpu': must be one of"),
        ({"device": "nope"}, 2, "device='nope': cannot be used"),
        ({"template": "chat"}, 2, "template='chat': the tokenizer has no chat template"),
        ({"max_seq_length": 0}, 2, "max_seq_length=0: must be greater than 0"),
    ],
)
def test_values_out_of_range(options, code, says, work, capsys):
    refused(words(**options), code, says, capsys)


def test_a_backend_that_is_not_there(work, capsys, monkeypatch):
    from antidote_fast import backends

    reference, _ = backends.load("reference")
    monkeypatch.setattr(backends, "load", lambda name: (reference, "the extension is not built"))
    refused(words(backend="cpu"), 2, "backend='cpu': the extension is not built", capsys)


@pytest.mark.parametrize("command", ["calibrate", "prune"])
@pytest.mark.parametrize("name", ["ANTIDOTE_BACKEND", "ANTIDOTE_CPU_ISA"])
def test_a_wrong_environment_variable(command, name, work, capsys, monkeypatch):
    from antidote_fast import backends

    if name == "ANTIDOTE_CPU_ISA" and backends.load("cpu")[1] is not None:
        pytest.skip("the extension is not built")
    monkeypatch.setenv(name, "gpu")
    refused(words(command), 2, f"{name}='gpu': must be one of", capsys)
    assert entry.main(["env"]) == 0  # which tells what is wrong


# --- checkpoints ----------------------------------------------------------------------------------


def test_pickles_are_refused(work, origin, capsys):
    for name, flag in (("base", "model_name_or_path"), ("adapter", "adapter")):
        folder = copy(origin, name, work / f"pickled-{name}")
        [file] = folder.glob("*model.safetensors")
        torch.save(
            load_file(file),
            folder / file.with_suffix(".bin").name.replace("model.bin", "pytorch_model.bin"),
        )
        file.unlink()
        says = "only safetensors are read (a pickle can run code)"
        refused(words(**{flag: str(folder)}), 3, says, capsys)


class Trap:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_a_pickle_is_never_opened(work, origin, capsys):
    folder = copy(origin, "adapter", work / "trap")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(words(adapter="trap"), 3, "only safetensors are read", capsys)
    assert not (work / "trapped").exists()


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_file_that_is_cut_short(name, work, origin, capsys):
    folder = copy(origin, name, work / "cut")
    [file] = folder.glob("*model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    flag = "model_name_or_path" if name == "base" else "adapter"
    refused(words(**{flag: "cut"}), 3, "is truncated", capsys)


def test_a_base_that_lacks_a_tensor(work, origin, capsys):
    folder = copy(origin, "base", work / "lacks")
    edit(folder / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(words(model_name_or_path="lacks"), 3, "lacks 1 tensors that the model needs", capsys)


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_a_model_that_transformers_does_not_know(score, work, origin, capsys):
    folder = copy(origin, "base", work / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "no_such_model"
    (folder / "config.json").write_text(json.dumps(config))
    argv = words(model_name_or_path="foreign", adapter=None, score=score)
    refused(argv, 3, "foreign: cannot be loaded: ", capsys)


def test_remote_code_is_refused(work, origin, capsys):
    folder = copy(origin, "base", work / "remote")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(words(model_name_or_path="remote"), 3, "auto_map", capsys)


@pytest.mark.parametrize("options", [{"seed": 1}, {"layers": 1}, {"layers": 3}])
def test_an_adapter_of_another_base(options, work, capsys):
    tiny.save_model(tiny.build(**options), work / "other")
    adapter = copy(work, "adapter", work / "made")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(work / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused(words(model_name_or_path="other", adapter="made"), 3, "base", capsys)


def test_norms_of_another_base(work, capsys):
    assert entry.main(words("calibrate", output_dir="norms")) == 0
    capsys.readouterr()
    tiny.save_model(tiny.build(seed=1), work / "other")
    says = "norms: were collected on another base model"
    refused(words(model_name_or_path="other", norms="norms", dataset=None), 3, says, capsys)
    # Norms of the adapter, where the model itself is to be pruned.
    argv = words(adapter=None, norms="norms", dataset=None)
    refused(argv, 3, "has no tensor 'base_model.model.", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value, work, origin, capsys):
    folder = copy(origin, "adapter", work / "nan")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit(folder / "adapter_model.safetensors", lambda t: t[key].view(-1)[3:4].fill_(value))
    refused(words(adapter="nan", score="magnitude"), 3, f"{key}: holds NaN or infinity", capsys)


def test_broken_activations(work, origin, capsys):
    folder = copy(origin, "base", work / "nan")
    key = "model.layers.0.mlp.down_proj.weight"
    edit(folder / "model.safetensors", lambda t: t[key].fill_(float("nan")))
    refused(words(model_name_or_path="nan"), 3, "layers.1.self_attn", capsys)


def test_a_quantised_base_in_full_mode(work, origin, capsys):
    folder = copy(origin, "base", work / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    argv = words(model_name_or_path="quantised", adapter=None)
    refused(argv, 3, "is quantised (gptq)", capsys)


# --- the output folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["align", "finetune", "calibrate", "prune", "evaluate", "demo"])
def test_a_folder_of_someone_else_is_untouched(command, overwrite, work, capsys):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("mine")
    options = {"adapter": None} if command in ("align", "finetune") else {}
    if command == "finetune":
        options["poison_ratio"] = 0
    if command == "evaluate":
        options |= {"dataset": None, "harmful_dataset": "harmful.jsonl"}
    argv = ["demo", "--output_dir", "out"] if command == "demo" else words(command, **options)
    assert entry.main([*argv, *overwrite]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "output_dir='out'" in err
    assert os.listdir("out") == ["thesis.txt"]
    assert (work / "out" / "thesis.txt").read_text() == "mine"


def test_a_run_does_not_write_among_other_files(work, capsys):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("mine")
    argv = ["run", "--model_name_or_path", "base", "--output_dir", "out"]
    argv += ["--finetune.dataset", "harmful.jsonl", "--finetune.poison_ratio", "0"]
    argv += ["--prune.dataset", "harmful.jsonl", "--evaluate.harmful_dataset", "harmful.jsonl"]
    assert entry.main(argv) == 3
    assert "holds 'thesis.txt', which no run made" in capsys.readouterr().err
    assert os.listdir("out") == ["thesis.txt"]


def test_an_empty_folder_is_taken(work):
    (work / "out").mkdir()
    assert entry.main(words()) == 0
    assert (work / "out" / "COMPLETE.json").exists()


def test_a_failure_with_overwrite_leaves_the_old_folder(work, capsys):
    assert entry.main(words()) == 0
    before = {f.name: f.read_bytes() for f in (work / "out").iterdir()}
    assert entry.main([*words(dataset="nope.jsonl"), "--overwrite"]) == 3
    assert entry.main([*words(targets="no_such_layer"), "--overwrite"]) == 4
    assert {f.name: f.read_bytes() for f in (work / "out").iterdir()} == before


# --- in a process of its own ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"ratio": "2"}, 2, "ratio=2.0: must be in (0, 1]"),
        ({"model_name_or_path": "./nope"}, 3, "model_name_or_path='./nope': no such folder"),
        ({"targets": "no_such_layer"}, 4, "nothing to prune"),
        ({}, 0, ""),
    ],
)
def test_nothing_else_reaches_the_terminal(options, code, says, work):
    if code:
        done = forked.run(forked.COMMAND, *words(**options))
    else:  # what an import would say, too
        done = subprocess.run(
            [sys.executable, "-m", "antidote_fast", *words(**options)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            timeout=120,
        )
    assert done.returncode == code
    lines = [line for line in done.stderr.splitlines() if not line.startswith('{"step"')]
    assert len(lines) == (1 if code else 0), done.stderr
    assert says in done.stderr
    assert (work / "out").exists() == (code == 0)


def test_the_fixture_data_are_sound(work):
    assert len(load_records("harmful.jsonl")) == 2
