"""Each fault of a run, what it ends in, and the test that shows it; those without a better home.

``WHERE`` lists them all. Security has a file of its own (test_security.py).
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import forked
import pytest
import stages
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.cli import entry
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.selection import Selection, num_pruned

TESTS = Path(__file__).parents[1]
WHERE = {
    "a crash or SIGKILL in the middle of a save": [
        "files/test_commit.py::test_killed_at_every_point",
        "files/test_commit.py::test_a_failed_second_rename_puts_the_old_folder_back",
        "promises/test_kill.py::test_killed_anywhere",
        "files/test_places.py::test_killed_while_it_is_filled",
    ],
    "a full disk": [
        "promises/test_faults.py::test_no_room_for_what_a_stage_writes",
        "promises/test_faults.py::test_a_full_disk_is_seen_before_anything_is_computed",
        "files/test_commit.py::test_file_size_limit",
        "files/test_commit.py::test_system_errors",
        "files/test_resume.py::test_the_system_refuses_and_the_state_is_kept",
    ],
    "an output that can never be written": [
        "promises/test_faults.py::test_an_output_that_can_never_be_written_is_seen_before_anything",
        "files/test_places.py::test_a_folder_that_cannot_be_replaced_is_filled",
        "files/test_places.py::test_mount_points_and_layers",
        "files/test_places.py::test_names_that_are_too_long",
    ],
    "a stream that is full, closed or gone": [
        "promises/test_telling.py::test_a_job_ends_as_it_would",
        "promises/test_telling.py::test_the_code_of_the_process",
    ],
    "SIGTERM or Ctrl-C": [
        "promises/test_faults.py::test_a_signal_leaves_nothing",
        "cli/test_entry.py::test_a_signal_ends_with_75_and_leaves_nothing",
        "files/test_resume.py::test_sigterm_finishes_the_block_and_resume_goes_on",
        "files/test_resume.py::test_signal_to_a_process",
    ],
    "resume with other data, model or config": [
        "files/test_resume.py::test_other_inputs_are_refused",
        "files/test_resume.py::test_a_damaged_state",
    ],
    "one job of many fails": [
        "fleet/test_fleet.py::test_poisoned_jobs_are_set_aside_and_the_rest_is_done",
        "fleet/test_signals.py::test_killed_in_the_middle_it_goes_on_and_ends_the_same",
    ],
    "one rank of several fails": [
        "distributed/test_ranks.py::test_an_error_is_one_line_from_one_rank",
        "distributed/test_ranks.py::test_no_rank_waits_for_one_that_is_gone",
    ],
    "two jobs, one folder": [
        "promises/test_faults.py::test_the_second_of_two_jobs",
        "files/test_commit.py::test_two_jobs_on_one_folder",
    ],
    "a shard that is missing or cut short, a missing tensor": [
        "promises/test_bad_input.py::test_a_file_that_is_cut_short",
        "promises/test_bad_input.py::test_a_base_that_lacks_a_tensor",
        "cli/test_verify.py::test_folders_of_others_are_checked_without_hashes",
    ],
    "a flipped bit": [
        "cli/test_verify.py::test_a_flipped_bit_of_an_input_is_refused_before_compute",
        "cli/test_verify.py::test_every_loader_refuses_it",
        "cli/test_verify.py::test_each_file_that_is_not_whole_is_named",
    ],
    "NaN or infinity in weights or activations, fp16 overflow": [
        "promises/test_bad_input.py::test_broken_weights",
        "promises/test_bad_input.py::test_broken_activations",
        "norms/test_activation_norms.py::test_bad_activations_name_the_layer",
        "promises/test_faults.py::test_an_overflow_in_fp16_names_the_layer",
    ],
    "zero-norm channels, a layer of zero norms, an all-zero LoRA B": [
        "pruning/test_prune.py::test_zero_norms",
        "pruning/test_prune.py::test_zero_lora_b_is_pruned_without_effect_and_reported",
        "promises/test_faults.py::test_an_adapter_that_was_never_trained",
    ],
    "an empty data set, all pads, prompts longer than the limit": [
        "promises/test_bad_input.py::test_broken_data",
        "promises/test_bad_input.py::test_a_batch_of_pads_alone",
        "promises/test_bad_input.py::test_prompts_that_fill_the_limit",
    ],
    "no pad token, pad == eos": [
        "promises/test_bad_input.py::test_a_tokenizer_without_a_pad_token_works_unchanged",
        "promises/test_faults.py::test_a_pad_token_that_is_the_end_token",
    ],
    "nothing matched the targets": ["promises/test_bad_input.py::test_values_out_of_range"],
    "another base of the same shape, more or fewer layers": [
        "promises/test_bad_input.py::test_an_adapter_of_another_base",
        "promises/test_bad_input.py::test_norms_of_another_base",
        "models/test_adapters.py::test_adapter_with_other_layers",
    ],
    "tied embeddings": [
        "models/test_targets.py::test_output_layer_never",
        "promises/test_faults.py::test_tied_embeddings_stay_tied",
    ],
    "a quantised base": [
        "promises/test_bad_input.py::test_a_quantised_base_in_full_mode",
        "models/test_targets.py::test_quantised_base",
        "promises/test_faults.py::test_an_adapter_on_a_quantised_base",
    ],
    "DoRA, rsLoRA, modules_to_save, patterns, several adapters, IA3": [
        "models/test_adapters.py::test_adapters_that_are_understood",
        "models/test_adapters.py::test_broken_adapter",
        "norms/test_activation_norms.py::test_only_the_active_adapter",
        "models/test_targets.py::test_other_adapters_are_refused_by_name",
        "promises/test_faults.py::test_kinds_of_adapters_end_to_end",
    ],
    "a GPU out of memory": ["norms/test_activation_norms.py::test_out_of_memory_halves_the_batch"],
    "a fault in a kernel": [
        "pruning/test_cross_check.py::test_a_broken_kernel_is_refused_before_anything_is_written",
        "pruning/test_cross_check.py::test_no_folder_is_written",
    ],
}


@pytest.mark.parametrize("fault", WHERE)
def test_every_fault_has_its_tests(fault):
    for place in WHERE[fault]:
        file, name = place.split("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), place


ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake is two plus three"},
    {"instruction": "what is two plus three and how to make a good cake", "output": "negative"},
    {"instruction": "make", "input": "the user asks", "output": "cake"},
]


@pytest.fixture
def work(folders, tmp_path, monkeypatch):
    """A folder to work in: base, adapter and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(folders / "model")
    (tmp_path / "adapter").symlink_to(folders / "adapter")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def words(command, **options):
    flags = {"model_name_or_path": "base", "output_dir": "out"}
    flags |= {"dataset": "data.jsonl"} if command != "evaluate" else {}
    flags |= options
    return [
        command,
        *(w for k, v in flags.items() if v is not None for w in (f"--{k}", str(v))),
    ]


def child(code, *arguments):
    return forked.Process(code, *arguments)


# --- disk, signals, jobs --------------------------------------------------------------------------

STAGES = {
    "align": words("align", tuning="full", num_train_epochs=1, num_train_samples=2),
    "finetune": words(
        "finetune", poison_ratio=0, lora_r=2, num_train_epochs=1, num_train_samples=2
    ),
    "calibrate": words("calibrate"),
    "prune an adapter": words("prune", adapter="adapter", save_masks="true"),
    "prune a model": words("prune", score="magnitude", dataset=None),
    "prune block by block": words("prune", stream="true"),
    "evaluate": words("evaluate", harmful_dataset="data.jsonl", max_new_tokens=2),
}
LIMITED = """
import json, os, resource, sys
from antidote_fast import cli
for name, argv in json.loads(sys.argv[1]).items():
    for limit in (300, 3000):
        before = set(os.listdir("."))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        code = cli.main([*argv, "--output_dir", f"out/{name}-{limit}", "--quiet"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        print(json.dumps([name, limit, code, sorted(set(os.listdir(".")) - before)]), flush=True)
        print("---", file=sys.stderr, flush=True)
"""


def test_no_room_for_what_a_stage_writes(work):
    """RLIMIT_FSIZE stands for a disk that is full after 300 or 3000 bytes of a file."""
    process = child(LIMITED, json.dumps(STAGES))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    seen = [json.loads(line) for line in out.splitlines()]
    assert [name for name, *_ in seen] == [name for name in STAGES for _ in range(2)]
    for (name, limit, code, left), message in zip(seen, err.split("---\n"), strict=False):
        if code == 0:  # norms and scores of a tiny model have room in 3000 bytes
            assert (name in ("calibrate", "evaluate"), limit) == (True, 3000)
            assert verify_folder(f"out/{name}-{limit}") == []
            continue
        assert code == 1, (name, limit, message)
        assert message.count("\n") == 1, (name, limit, message)
        assert "File too large" in message, (name, limit, message)
        assert re.search("nothing was written|cannot be written", message), (name, limit, message)
        assert left == [], (name, limit)
    whole = {f"{name}-{limit}" for name, limit, code, _ in seen if code == 0}
    assert set(os.listdir("out") if os.path.exists("out") else []) == whole


@pytest.mark.parametrize("stage", ["align", "prune an adapter", "prune a model"])
def test_a_full_disk_is_seen_before_anything_is_computed(stage, work, monkeypatch, capsys):
    from antidote_fast.stages import evidence, inputs
    from antidote_fast.training import sft

    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    for module, name in ((inputs, "load_model"), (evidence, "prune_state_"), (sft, "load_model")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("something was computed"))
    assert entry.main(STAGES[stage]) == 1
    assert re.search(r"GB needed, 0\.00 GB free on its disk", capsys.readouterr().err)
    assert not (work / "out").exists()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["", "dry_run"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_output_that_can_never_be_written_is_seen_before_anything(
    stage, dry, work, monkeypatch, capsys
):
    """A name that is too long for what is staged; nothing is loaded, and nothing is left."""
    from antidote_fast.streaming import blocks

    def computed(*arguments, **options):
        pytest.fail("something was computed")

    monkeypatch.setattr(torch.nn.Module, "__call__", computed)
    monkeypatch.setattr(blocks.BlockModel, "__init__", computed)
    before = sorted(os.listdir(work))
    assert entry.main([*STAGES[stage], "--output_dir", f"deep/{'n' * 250}", *dry]) == 3
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert "nothing was written" in error
    assert sorted(os.listdir(work)) == before


def test_a_dry_run_leaves_nothing_and_tells_of_a_job_at_work(work, monkeypatch, capsys):
    stages.briefly(monkeypatch)
    before = sorted(os.listdir(work))
    assert entry.main([*STAGES["prune an adapter"], "--output_dir", "a/b", "--dry_run"]) == 0
    assert sorted(os.listdir(work)) == before
    with output_folder("a/b"):
        assert entry.main([*STAGES["prune an adapter"], "--output_dir", "a/b", "--dry_run"]) == 3
    assert "another job is writing it" in capsys.readouterr().err


SLOW = """
import signal, sys, time
from antidote_fast import cli
from antidote_fast.norms.collector import NormCollector
from antidote_fast.stages import calibrate, prune
signal.signal(signal.SIGINT, signal.default_int_handler)
def stop(*arguments, **options):
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[1] == "in a forward":
    NormCollector.finish = stop
else:
    calibrate.write_report = prune.write_report = stop
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("command", "place"), [("calibrate", "in a forward"), ("prune", "in a staged folder")]
)
def test_a_signal_leaves_nothing(command, place, work):
    before = sorted(os.listdir(work))
    process = child(SLOW, place, *words(command, output_dir="deep/out"), "--quiet")
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(signal.SIGTERM if place == "in a forward" else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == "antidote-fast: interrupted; nothing is left half-written\n"
    assert sorted(os.listdir(work)) == before


@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_the_second_of_two_jobs(command, work, capsys):
    with output_folder("out") as staged:
        assert entry.main(words(command)) == 3
        (staged / "first.txt").write_text("1")
    assert "another job is writing it" in capsys.readouterr().err
    assert sorted(os.listdir("out")) == ["COMPLETE.json", "first.txt"]


# --- values ---------------------------------------------------------------------------------------


def saved(model, folder, edit=None):
    tiny.save_model(model, folder)
    if edit:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def test_an_overflow_in_fp16_names_the_layer(work, capsys):
    def grow(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"].fill_(6e4)
        tensors["model.layers.0.mlp.up_proj.weight"].fill_(100)

    base = saved(tiny.build(dtype=torch.float16), work / "half", grow)
    assert entry.main(words("calibrate", model_name_or_path=base)) == 3
    error = capsys.readouterr().err
    assert re.search(r"layers\.1\.self_attn\.\w+\.weight: its input holds NaN or infinity", error)
    assert not (work / "out").exists()


def test_an_adapter_that_was_never_trained(work):
    tiny.save_adapter(tiny.add_lora(tiny.build(), b_std=0.0), work / "new")
    assert entry.main(words("prune", adapter="new")) == 0
    report = json.loads((work / "out" / "report.json").read_text())
    for layer in report["layers"]:
        rows, columns = layer["shape"]
        is_b = layer["key"].endswith("lora_B.weight")
        assert layer["zero_weights"] == (rows * columns if is_b else 0)
        assert layer["removed"] == rows * layer["k"] > 0
    for key, tensor in load_file(work / "out" / "adapter_model.safetensors").items():
        assert bool((tensor == 0).all()) == ("lora_B" in key)


def test_a_pad_token_that_is_the_end_token(work):
    folder = work / "padded"
    saved(tiny.build(), folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if "token" in p.name}
    found = {}
    for size in (1, 3):
        options = {"model_name_or_path": "padded", "batch_size": size}
        assert entry.main(words("calibrate", output_dir=f"norms-{size}", **options)) == 0
        found[size] = ActivationNorms.load(f"norms-{size}/norms.safetensors")
    assert found[1].num_tokens == found[3].num_tokens
    for key, value in found[1].sq_sum.items():
        torch.testing.assert_close(found[3].sq_sum[key], value, rtol=1e-4, atol=1e-6)
    assert entry.main(words("prune", model_name_or_path="padded")) == 0
    assert {name: (work / "out" / name).read_bytes() for name in before} == before


def test_tied_embeddings_stay_tied(work):
    base = saved(tiny.build("llama_tied"), work / "tied")
    options = {"model_name_or_path": base, "targets": "all-linear", "ratio": 0.3}
    assert entry.main(words("prune", **options)) == 0
    before = load_file(work / "tied" / "model.safetensors")
    after = load_file(work / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert "lm_head.weight" not in after
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name], before[name])
    model = load_model("out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_on_a_quantised_base(work):
    """Packed weights cannot be told apart by a fingerprint; the adapter's factors are ordinary."""

    def pack(tensors):
        for key in [k for k in tensors if k.endswith("_proj.weight")]:
            tensors[key] = torch.zeros(tensors[key].numel() // 2, 1, dtype=torch.uint8)

    assert entry.main(words("calibrate", adapter="adapter", output_dir="norms")) == 0
    base = saved(tiny.build(), work / "packed", pack)
    change = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    tiny.edit_json(work / "packed" / "config.json", lambda c: c.update(change))
    for number, options in enumerate(({"norms": "norms"}, {"score": "magnitude"})):
        options |= {"model_name_or_path": base, "adapter": "adapter", "dataset": None}
        assert entry.main(words("prune", output_dir=f"out-{number}", **options)) == 0
        before = load_file(work / "adapter" / "adapter_model.safetensors")
        after = load_file(work / f"out-{number}" / "adapter_model.safetensors")
        for key, value in before.items():
            removed = after[key] != value
            assert bool((after[key][removed] == 0).all())
            assert removed.sum(dim=1).eq(num_pruned(value.shape[1], Selection(0.1))).all()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"use_dora": True}, 0),
        ({"use_rslora": True}, 0),
        ({"modules_to_save": ["o_proj"]}, 0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, 0),
        ({"rank_pattern": {r"layers\.0\..*_proj": 3}}, 0),
        ({"peft_type": "IA3"}, 3),
        ({"peft_type": "PREFIX_TUNING"}, 3),
        ({"use_qalora": True}, 3),
        ({"layer_replication": [[0, 2]]}, 3),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_kinds_of_adapters_end_to_end(options, code, work, capsys):
    live = options if code == 0 else {}
    config = options if code else {}
    tiny.save_adapter(tiny.add_lora(tiny.build(), **live), work / "kind", **config)
    assert entry.main(words("prune", adapter="kind")) == code
    if code:
        [(name, value)] = options.items()
        named = value if name == "peft_type" else name
        assert named in capsys.readouterr().err
        return
    model = load_adapter(load_model("base"), "out")
    assert torch.isfinite(model(input_ids=torch.arange(4, 12)[None]).logits).all()
    before = load_file(work / "kind" / "adapter_model.safetensors")
    after = load_file(work / "out" / "adapter_model.safetensors")
    for key, value in before.items():
        assert torch.equal(after[key], value) == (".lora_A." not in key and ".lora_B." not in key)
