"""`verify`, and inputs that are no longer what was written: refused before anything is computed."""

import json
import os
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.cli import entry, verify
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.errors import DataError
from antidote_fast.files import manifest
from antidote_fast.files.checkpoint import Checkpoint, open_checkpoint
from antidote_fast.files.commit import check_output_folder, output_folder
from antidote_fast.files.manifest import check_input, sha256_file
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.stages import calibrate, evidence, inputs, prune


@pytest.fixture(scope="module")
def ours(tmp_path_factory, folders):
    """A pruned model, a pruned adapter and norms, written by this tool."""
    root = tmp_path_factory.mktemp("ours")
    base, adapter = str(folders / "model"), str(folders / "adapter")
    (root / "data.jsonl").write_text('{"instruction": "how to make a cake", "output": "two"}\n')
    options = {"model_name_or_path": base, "save_masks": True, "score": "magnitude"}
    prune.run(PruneConfig(**options, output_dir=str(root / "model")))
    prune.run(PruneConfig(**options, adapter=adapter, output_dir=str(root / "adapter")))
    calibrate.run(
        CalibrateConfig(
            model_name_or_path=base,
            dataset=str(root / "data.jsonl"),
            output_dir=str(root / "norms"),
        )
    )
    return root


@pytest.fixture
def copies(ours, tmp_path, monkeypatch):
    shutil.copytree(ours, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def flip(path, place=-5):
    """One bit of one weight."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_whole_folders(copies, capsys):
    assert entry.main(["verify", "model", "adapter", "norms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("model", "adapter", "norms"), strict=True):
        count = len([p for p in (copies / name).iterdir() if p.name != "COMPLETE.json"])
        assert line.startswith(f"{name}: whole: {count} files, ")


def test_json(copies, capsys):
    flip(copies / "model" / "model.safetensors")
    assert entry.main(["verify", "model", "adapter", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["problems"] == ["model.safetensors: contents changed"]
    assert found["adapter"]["problems"] == []
    assert found["adapter"]["hashes"] is True
    size = sum(p.stat().st_size for p in (copies / "adapter").iterdir())
    assert found["adapter"]["bytes"] == size - (copies / "adapter/COMPLETE.json").stat().st_size


def cut(folder):
    tiny.truncate(folder / "model.safetensors")


def swapped(folder):
    """Another file of the same size, malformed."""
    path = folder / "model.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    size = path.stat().st_size
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size - 8 - len(text)))


def linked(folder):
    (folder / "model.safetensors").rename(folder / "x")
    (folder / "model.safetensors").symlink_to("x")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: flip(f / "model.safetensors"), ["model.safetensors: contents changed"]),
        (lambda f: flip(f / "masks.safetensors"), ["masks.safetensors: contents changed"]),
        (cut, ["model.safetensors: ", " bytes, not "]),
        (
            swapped,
            ["model.safetensors: contents changed; tensor 'a' does not follow the one before it"],
        ),
        (lambda f: (f / "config.json").unlink(), ["config.json: missing"]),
        (lambda f: (f / "extra.txt").write_text(""), ["extra.txt: not in COMPLETE.json"]),
        (lambda f: (f / "COMPLETE.json").write_text("{"), ["COMPLETE.json: is damaged"]),
        (linked, ["model.safetensors: is a link", "x: not in COMPLETE.json"]),
    ],
)
def test_each_file_that_is_not_whole_is_named(copies, damage, says, capsys):
    damage(copies / "model")
    assert entry.main(["verify", "adapter", "model"]) == 3
    seen = capsys.readouterr()
    assert "adapter: whole: " in seen.out
    for part in says:
        assert part in seen.out
    assert all(line.startswith(("model: ", "adapter: ")) for line in seen.out.splitlines())
    assert "1 of 2 folders not whole, model first" in seen.err


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def drop_tensor(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def cut_shard(folder):
    tiny.truncate(sorted(folder.glob("*.safetensors"))[-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_shard, r"model-00002-of-\d+.safetensors: missing"),
        (drop_tensor, r"model-00001-of-\d+.safetensors: tensor .* of the index is missing"),
        (cut_shard, r"model-\d+-of-\d+.safetensors: is truncated"),
        (lambda f: (f / "config.json").write_text("["), "config.json: is not valid JSON"),
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: [p.unlink() for p in f.iterdir()], "is neither a model, an adapter, nor"),
    ],
)
def test_folders_of_others_are_checked_without_hashes(copy_of, damage, says, capsys):
    folder = copy_of("sharded")
    assert entry.main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "nothing missing or cut short: " in out
    assert "no COMPLETE.json, so a weight that changed cannot be seen" in out
    damage(folder)
    [problem] = verify.verify(folder)["problems"]
    assert re.match(says, problem), problem
    assert entry.main(["verify", str(folder)]) == 3


@pytest.mark.parametrize("words", [[], ["--all", "x"]])
def test_refusals(words, capsys):
    assert entry.main(["verify", *words]) == 2
    assert "verify takes" in capsys.readouterr().err


# --- inputs ---------------------------------------------------------------------------------------


@pytest.fixture
def no_compute(monkeypatch):
    """Any forward, load or selection fails the test."""

    def never(*arguments, **options):
        raise AssertionError("something was computed")

    for module, name in ((inputs, "load_model"), (evidence, "prune_state_")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(Checkpoint, "read", never)


@pytest.mark.parametrize("command", ["calibrate", "prune"])
@pytest.mark.parametrize(
    ("damaged", "options"),
    [
        ("model/model.safetensors", {"model_name_or_path": "model"}),
        ("model/config.json", {"model_name_or_path": "model"}),
        ("adapter/adapter_model.safetensors", {"adapter": "adapter"}),
    ],
)
def test_a_flipped_bit_of_an_input_is_refused_before_compute(
    command, damaged, options, copies, folders, no_compute, capsys
):
    path = copies / damaged
    if path.suffix == ".json":
        path.write_text(path.read_text().replace(": ", ":  ", 1))
    else:
        flip(path)
    words = {"model_name_or_path": str(folders / "model"), "dataset": "data.jsonl"} | options
    argv = [command, *(w for k, v in words.items() for w in (f"--{k}", v)), "--output_dir", "out"]
    assert entry.main(argv) == 3
    error = capsys.readouterr().err
    size = "bytes, not" if path.suffix == ".json" else "contents changed since it was written"
    assert damaged in error
    assert size in error
    assert not os.path.exists("out")


@pytest.mark.parametrize("name", ["norms", "norms/norms.safetensors"])
def test_changed_norms_are_refused(name, copies, folders, no_compute, capsys):
    flip(copies / "norms" / "norms.safetensors")
    argv = ["prune", "--model_name_or_path", str(folders / "model"), "--norms", name]
    assert entry.main([*argv, "--output_dir", "out"]) == 3
    assert "norms.safetensors: contents changed since it was written" in capsys.readouterr().err


def test_every_loader_refuses_it(copies, folders):
    flip(copies / "model" / "model.safetensors")
    flip(copies / "adapter" / "adapter_model.safetensors")
    with pytest.raises(DataError, match="contents changed"):
        load_model("model")
    with pytest.raises(DataError, match="contents changed"):
        load_adapter(tiny.build(), "adapter")
    adapter, base = open_checkpoint("adapter"), open_checkpoint(folders / "model")
    with pytest.raises(DataError, match="contents changed"):
        check_adapter(adapter, base)


def test_what_is_not_read_may_change(copies):
    (copies / "model" / "README.md").write_text("my own words")
    (copies / "model" / "notes.txt").write_text("added")
    check_input(copies / "model")
    assert torch.isfinite(load_model("model").model.norm.weight).all()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "COMPLETE.json").write_text("{"), "its COMPLETE.json is damaged"),
        (lambda f: (f / "config.json").unlink(), "config.json: missing; COMPLETE.json lists it"),
    ],
)
def test_a_damaged_list_of_files(copies, damage, says):
    damage(copies / "model")
    with pytest.raises(DataError, match=says):
        check_input("model")


def test_hashed_once_while_it_stays(copies, monkeypatch):
    calls = []
    monkeypatch.setattr(manifest, "sha256_file", lambda p: calls.append(p) or sha256_file(p))
    for _ in range(2):
        check_input("norms")
    assert [p.name for p in calls] == ["norms.safetensors"]
    flip(copies / "norms" / "norms.safetensors")
    os.utime(copies / "norms" / "norms.safetensors", ns=(1, 1))
    with pytest.raises(DataError, match="contents changed"):
        check_input("norms")


def test_another_tools_file_of_that_name_says_nothing(copy_of):
    folder = copy_of("model")
    (folder / "COMPLETE.json").write_text('{"tool": "other"}')
    check_input(folder)
    (folder / "COMPLETE.json").write_text('{"tool": "antidote-fast", "files": 3}')
    with pytest.raises(DataError, match="is damaged"):
        check_input(folder)


def test_verify_goes_so_deep_and_no_deeper(tmp_path, monkeypatch):
    with output_folder(tmp_path / "out") as staged:
        (staged / "masks.txt").write_text("x")
    (tmp_path / "out" / "loop").symlink_to(tmp_path)
    assert verify.verify(tmp_path / "out")["problems"] == ["loop: not in COMPLETE.json"]
    deep = tmp_path / "deep"
    deep.joinpath(*"d" * 40).mkdir(parents=True)
    limit = "holds more than 100000 files, or folders more than 32 deep"
    assert verify.verify(deep)["problems"] == [limit]
    shutil.move(deep / "d", tmp_path / "out" / "d")
    assert verify.verify(tmp_path / "out")["problems"] == [limit]
    with pytest.raises(DataError, match="more than 32 deep"):
        check_output_folder(tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out" / "d")
    (tmp_path / "out" / "loop").unlink()
    monkeypatch.setattr(manifest, "_MAX_FILES", 1)
    assert "more than 1 files" in verify.verify(tmp_path / "out")["problems"][0]
