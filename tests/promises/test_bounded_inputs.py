"""What a customer's files may cost others: nothing is hashed or read that no job needs."""

import json
import os
import shutil

import fleets
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.cli.entry import main
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.errors import DataError, JobsSetAside
from antidote_fast.files import checkpoint, manifest, provenance, safe_open
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import check_input
from antidote_fast.fleet import fleet, worker
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.stages import evaluate

HUGE = 4 << 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


@pytest.fixture
def adapter(folders, tmp_path):
    """A copy with a COMPLETE.json."""
    with output_folder(tmp_path / "adapter") as staged:
        shutil.copytree(folders.adapters / "plain", staged, dirs_exist_ok=True)
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def nothing_long_is_hashed(monkeypatch):
    for module in (manifest, provenance):
        real = module.sha256_file

        def only_short(path, real=real):
            assert os.stat(path).st_size < 1 << 30, path
            return real(path)

        monkeypatch.setattr(module, "sha256_file", only_short)


def sparse(path, size=HUGE):
    with open(path, "ab") as file:
        file.truncate(size)


def listed(folder, name):
    """The file's entry in COMPLETE.json, with some hash."""
    entry = {"bytes": (folder / name).stat().st_size, "sha256": "0" * 64}
    tiny.edit_json(folder / "COMPLETE.json", lambda c: c["files"].update({name: entry}))


def add(folder, new):
    """More tensors, {name: bytes}, in the file of weights; they are holes."""
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    end = len(rest)
    for name, (shape, size) in new.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    os.truncate(path, 8 + len(text) + end)


def reason(folders, out, **job):
    """Why a fleet sets this job aside; None where it is done."""
    fleets.manifest(folders.root, job, name="one.jsonl")
    try:
        fleet.run(fleets.config(folders, out, jobs="one.jsonl"))
    except JobsSetAside as error:
        return error.report["jobs"][0]["reason"]
    return None


def test_a_long_file_that_is_listed_and_not_read(folders, adapter, tmp_path):
    sparse(adapter / "junk.bin")
    sparse(adapter / "norms.safetensors")
    for name in ("junk.bin", "norms.safetensors"):
        listed(adapter, name)
    assert reason(folders, tmp_path / "out", adapter=str(adapter)) is None
    fleets.as_prune(folders, "plain", tmp_path / "alone")
    here, alone = tmp_path / "out" / "adapter", tmp_path / "alone"
    assert fleets.weights_of(here) == fleets.weights_of(alone)
    assert not (here / "junk.bin").exists()


def test_long_weights_that_are_listed(folders, adapter, tmp_path):
    add(adapter, {"base_model.model.x.weight": ([HUGE // 4], HUGE)})
    listed(adapter, "adapter_model.safetensors")
    says = "of 4398046511104 bytes, more than anything in the base"
    assert says in reason(folders, tmp_path / "out", adapter=str(adapter))
    options = {"harmful_dataset": str(folders.root / "harmful.jsonl"), "adapter": str(adapter)}
    options |= {"model_name_or_path": str(folders.base), "output_dir": str(tmp_path / "scores")}
    with pytest.raises(DataError, match=says):
        evaluate.run(EvaluateConfig(**options))


def test_long_texts_that_are_listed(adapter):
    sparse(adapter / "a.txt")
    listed(adapter, "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: with it more than 1 GiB lie beside"):
        check_input(adapter)


@pytest.mark.parametrize("kind", ["absent", "of the base", "twice"])
def test_tensors_that_no_module_needs(folders, adapter, tmp_path, kind):
    """Each of a size that the base has, and together more than all of it."""
    (adapter / "COMPLETE.json").unlink()
    saved = {"absent": ["zzz"], "of the base": ["norm"], "twice": None}[kind]
    tiny.edit_json(adapter / "adapter_config.json", lambda c: c.update(modules_to_save=saved))
    if kind == "absent":
        new = {f"base_model.model.zzz.{i}.weight": ([128, 32], 16384) for i in range(40)}
        says = "holds more than 262144 bytes that the base has no place for"
    elif kind == "of the base":
        new = {"base_model.model.model.norm.weight": ([128, 32], 16384)}
        says = "of 16384 bytes, more than anything in the base"
    else:
        place = "layers.0.self_attn.q_proj"
        new = {
            f"base_model.model.{other}.{place}.lora_{factor}.weight": (shape, 512)
            for other in ("a.model", "b.model")
            for factor, shape in (("A", [4, 32]), ("B", [32, 4]))
        }
        says = "more often than the base has it"
    add(adapter, new)
    assert says in reason(folders, tmp_path / "out", adapter=str(adapter))


@pytest.mark.parametrize("kind", ["long", "pipe"])
def test_data_that_cannot_be_read_are_not_hashed(folders, tmp_path, kind):
    data = tmp_path / "data.jsonl"
    sparse(data) if kind == "long" else os.mkfifo(data)
    why = reason(
        folders, tmp_path / "out", adapter=str(folders.adapters / "plain"), dataset=str(data)
    )
    says = {"long": "larger than 4 GiB", "pipe": "not a regular file"}[kind]
    assert why == f"{data}: {says}"


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize("size", [1 << 33, HUGE])
def test_norms_of_holes(folders, tmp_path, capsys, size, dry):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = tmp_path / "norms"
    folder.mkdir()
    norms = ActivationNorms({key: torch.ones(32)}, num_sequences=1, num_tokens=1)
    norms.save(folder / "norms.safetensors")
    path = folder / "norms.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[f"{key}.sq_sum"].update(shape=[size // 4], data_offsets=[0, size])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)
    words = ["--model_name_or_path", str(folders.base), "--adapter"]
    words += [str(folders.adapters / "plain"), "--output_dir", str(tmp_path / "out")]
    assert main(["prune", *words, "--norms", str(folder), *dry]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert f"{size >> 30} GiB, of which next to nothing is stored" in line
    assert not (tmp_path / "out").exists()


def test_what_is_stored_is_read(tmp_path, monkeypatch):
    """A file without holes, one that is short, and one on a disk that does not tell."""
    monkeypatch.setattr(safe_open, "_MAX_HOLES", 1 << 16)
    save_file({"x": torch.ones(1 << 16)}, tmp_path / "whole")
    assert checkpoint.read_tensor_file(tmp_path / "whole")[1]["x"].sum() == 1 << 16
    sparse(tmp_path / "short", 1 << 16)
    assert len(safe_open.read_file(tmp_path / "short", 1 << 20)) == 1 << 16
    sparse(tmp_path / "untold", 1 << 20)
    assert len(safe_open.read_file(tmp_path / "untold", 1 << 20)) == 1 << 20  # no block at all
    (tmp_path / "holes").write_bytes(b"x")
    sparse(tmp_path / "holes", 1 << 20)
    with pytest.raises(DataError, match="next to nothing is stored"):
        safe_open.read_file(tmp_path / "holes", 1 << 20)


def test_norms_beside_a_long_file(folders, adapter):
    """Of the folder of norms only those are hashed."""
    norms = ActivationNorms({"x.weight": torch.ones(4)}, num_sequences=1, num_tokens=1)
    with output_folder(adapter.with_name("norms")) as staged:
        norms.save(staged / "norms.safetensors")
    sparse(adapter.with_name("norms") / "other.safetensors")
    listed(adapter.with_name("norms"), "other.safetensors")
    from antidote_fast.stages.inputs import load_norms

    for name in ("norms", "norms/norms.safetensors"):
        assert load_norms(adapter.parent / name).keys == ["x.weight"]


# --- a fleet's inputs that change -----------------------------------------------------------------


def before(monkeypatch, module, name, change):
    real, left = getattr(module, name), [change]

    def changed(*arguments, **options):
        if left:
            left.pop()()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, changed)


def test_data_that_change_while_a_fleet_runs(folders, tmp_path, monkeypatch):
    """They were read before their hash was taken: no report says that they were others."""
    data = tmp_path / "data.jsonl"
    shutil.copy(folders.root / "harmful.jsonl", data)
    fleets.manifest(folders.root, {"adapter": str(folders.adapters / "plain")}, name="one.jsonl")
    change = lambda: data.write_text(json.dumps(fleets.ROWS[0]))  # noqa: E731
    before(monkeypatch, worker, "check_copied", change)
    with pytest.raises(JobsSetAside, match=r"data\.jsonl: changed while it was in use"):
        fleet.run(fleets.config(folders, tmp_path / "out", jobs="one.jsonl", dataset=str(data)))
    assert not (tmp_path / "out" / "plain").exists()


def test_a_base_that_changes_while_a_fleet_loads_it(folders, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(folders.base, base)

    def change():
        tensors = load_file(base / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] += 1
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    before(monkeypatch, worker, "load_model", change)
    fleets.manifest(folders.root, {"adapter": str(folders.adapters / "plain")}, name="one.jsonl")
    options = {"jobs": "one.jsonl", "model_name_or_path": str(base)}
    with pytest.raises(DataError, match=r"model\.safetensors: changed while it was in use"):
        fleet.run(fleets.config(folders, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "plain").exists()


# --- what an adapter may ask ----------------------------------------------------------------------


def test_an_adapter_learns_nothing_of_a_folder_that_it_names(folders, adapter, tmp_path):
    (adapter / "COMPLETE.json").unlink()
    yours = tmp_path / "yours"
    yours.mkdir()
    (yours / "config.json").write_text("{}")
    (yours / "a-name-that-is-secret.bin").write_text("x")
    change = {"base_model_name_or_path": str(yours)}
    tiny.edit_json(adapter / "adapter_config.json", lambda c: c.update(change))
    assert reason(folders, tmp_path / "out", adapter=str(adapter)) is None
    for name in list(yours.iterdir()):
        name.unlink()
    tiny.save_model(tiny.build(seed=7), yours)
    why = reason(folders, tmp_path / "other", adapter=str(adapter))
    assert "was made for another base model" in why
    assert checkpoint.open_checkpoint(yours).fingerprint() not in why


def test_a_refusal_of_peft_is_short(folders, adapter, tmp_path):
    (adapter / "COMPLETE.json").unlink()
    change = {"trainable_token_indices": {"x" * 100_000: [1]}}
    tiny.edit_json(adapter / "adapter_config.json", lambda c: c.update(change))
    assert len(reason(folders, tmp_path / "out", adapter=str(adapter))) < 600


def test_a_report_of_somebody_else_is_not_shown(adapter, tmp_path, capsys):
    yours = tmp_path / "report.json"
    yours.write_text(json.dumps({"schema_version": 1, "stage": "a secret", "config": {}}))
    assert provenance.read_report(tmp_path)["stage"] == "a secret"
    (adapter / "report.json").symlink_to(yours)
    assert provenance.read_report(adapter) is None
    (adapter / "COMPLETE.json").unlink()
    assert main(["inspect", str(adapter)]) == 0
    assert "secret" not in capsys.readouterr().out
    (adapter / "report.json").unlink()
    sparse(adapter / "report.json")
    assert provenance.read_report(adapter) is None
