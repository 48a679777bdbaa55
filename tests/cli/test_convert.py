"""`convert`: masks of torch.save read without running anything, one bit a weight written."""

import os
import pickle
import zipfile

import pytest
import torch

from antidote_fast import load_masks
from antidote_fast.cli.convert import convert_masks
from antidote_fast.cli.entry import main
from antidote_fast.errors import DataError, UsageError

GENERATOR = torch.Generator().manual_seed(3)
A = torch.rand((5, 11), generator=GENERATOR) < 0.3
B = torch.rand((1300, 3), generator=GENERATOR) < 0.2


def convert(tmp_path, value, **options):
    torch.save(value, tmp_path / "old.pt")
    found = convert_masks(tmp_path / "old.pt", tmp_path / "new.safetensors", **options)
    masks, metadata = load_masks(tmp_path / "new.safetensors")
    assert metadata["converted_from"] == "old.pt"
    assert found["masks"] == len(masks)
    assert found["removed"] == sum(mask.count() for mask in masks.values())
    assert sorted(os.listdir(tmp_path)) == ["new.safetensors", "old.pt"]
    return masks


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16]
)
def test_dtypes(tmp_path, dtype):
    masks = convert(tmp_path, {"a.weight": A.to(dtype), "b": B.to(dtype).t().contiguous().t()})
    assert torch.equal(masks["a.weight"].to_bool(), A)
    assert torch.equal(masks["b.weight"].to_bool(), B)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj.weight"),
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_A.weight"),
        ("base_model.model.x.lora_B.user", "base_model.model.x.lora_B.weight"),
        ("base_model.model.x.lora_B.weight", "base_model.model.x.lora_B.weight"),
        ("base_model.model.x.lora_B", "base_model.model.x.lora_B.weight"),
    ],
)
def test_names(tmp_path, name, saved):
    assert list(convert(tmp_path, {name: A})) == [saved]


@pytest.mark.parametrize(
    "layers", [[{"mlp.up": A}, {"mlp.up": ~A}], {0: {"mlp.up": A}, 1: {"mlp.up": ~A}}]
)
def test_layers(tmp_path, layers):
    masks = convert(tmp_path, layers)
    assert list(masks) == ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight"]
    assert torch.equal(masks["model.layers.1.mlp.up.weight"].to_bool(), ~A)
    os.unlink(tmp_path / "new.safetensors")
    assert "h.0.mlp.up.weight" in convert(tmp_path, layers, prefix="h.")


def test_what_a_one_means(tmp_path):
    masks = convert(tmp_path, {"a": A}, ones="kept")
    assert torch.equal(masks["a.weight"].to_bool(), ~A)
    for ones, expected in (("removed", ~A), ("kept", A)):
        os.unlink(tmp_path / "new.safetensors")
        masks = convert(tmp_path, {"a": ~A}, ones=ones)
        assert torch.equal(masks["a.weight"].to_bool(), expected)
    os.unlink(tmp_path / "new.safetensors")
    with pytest.raises(DataError, match=r"30 of 55 values are 1; say with ones"):
        convert(tmp_path, {"a": ~A})
    with pytest.raises(UsageError, match="ones='both': must be removed or kept"):
        convert(tmp_path, {"a": A}, ones="both")


class Trap:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return (os.system, ("touch trapped",))


def traps(path, kind):
    if kind == "torch":
        torch.save({"a": A, "b": Trap()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif kind == "legacy":
        torch.save({"a": A, "b": Trap()}, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("old/data.pkl", pickle.dumps(Trap()))
            archive.writestr("old/version", "3\n")


@pytest.mark.parametrize("kind", ["torch", "plain pickle", "legacy", "zip"])
def test_code_in_a_pickle_is_not_run(tmp_path, kind, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    traps(tmp_path / "old.pt", kind)
    assert main(["convert", "old.pt", "--output", "new.safetensors"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("antidote-fast: old.pt: ")
    assert error.count("\n") == 1
    assert os.listdir() == ["old.pt"]


def compressed(path):
    torch.save({"a": torch.zeros(1000, 1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b""), "is not a file of torch.save"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + b"x" * 90), "is not a file of torch.save"),
        (other_zip, "is not a file of torch.save"),
        (compressed, "is not a file of torch.save"),
        (lambda p: p.mkdir(), "is not a file"),
        (lambda p: None, "no such file"),
        (lambda p: torch.save(A, p), "holds a Tensor, not masks by name"),
        (lambda p: torch.save({}, p), "holds 0 masks"),
        (lambda p: torch.save([A], p), "layer 0 is not a dict"),
        (lambda p: torch.save({-1: {"a": A}}, p), "layer -1 is not a dict"),
        (lambda p: torch.save({"a": 3}, p), "'a.weight' is not a dense tensor"),
        (lambda p: torch.save({"a": A.float().to_sparse()}, p), "not a dense tensor"),
        (lambda p: torch.save({"a": A[0]}, p), r"is torch.bool \(11,\), not a matrix"),
        (lambda p: torch.save({"a": A.float() * 0.5}, p), "values other than 0 and 1"),
        (lambda p: torch.save({"a": A.float() + torch.nan}, p), "values other than 0 and 1"),
        (
            lambda p: torch.save({"a": A[:1, :1].expand(10**6, 10**6)}, p),
            "more values than are stored",
        ),
        (lambda p: torch.save({"a": A, "a.weight": A}, p), "'a.weight' is there twice"),
        (lambda p: torch.save({"a\n": A}, p), "is not the name of a weight"),
        (lambda p: torch.save({3: A, "b": A}, p), "3 is not the name of a weight"),
        (lambda p: torch.save({"x" * 600: A}, p), "is not the name of a weight"),
    ],
)
def test_anything_else_is_refused(tmp_path, make, says):
    make(tmp_path / "old.pt")
    with pytest.raises(DataError, match=says):
        convert_masks(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_only_a_mask_file_is_replaced(tmp_path):
    new = tmp_path / "new.safetensors"
    convert(tmp_path, {"a": A})
    with pytest.raises(DataError, match="exists; name another, or pass overwrite"):
        convert(tmp_path, {"b": A})
    assert list(convert(tmp_path, {"b": A}, overwrite=True)) == ["b.weight"]
    before = new.read_bytes()
    with pytest.raises(DataError, match="values other than"):
        convert(tmp_path, {"b": A.float() * 2}, overwrite=True)
    assert new.read_bytes() == before
    new.write_text("mine")
    with pytest.raises(DataError, match="cannot be read as a mask file"):
        convert(tmp_path, {"b": A}, overwrite=True)
    assert new.read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "error", "says"),
    [
        ("new.pt", UsageError, r"must end in \.safetensors"),
        ("gone/new.safetensors", DataError, "gone is not a folder"),
        ("folder.safetensors", DataError, "exists"),
    ],
)
def test_where_it_goes(tmp_path, output, error, says):
    (tmp_path / "folder.safetensors").mkdir()
    torch.save({"a": A}, tmp_path / "old.pt")
    with pytest.raises(error, match=says):
        convert_masks(tmp_path / "old.pt", tmp_path / output, overwrite=True)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": (~A).float()}, "old.pt")
    assert main(["convert", "old.pt", "--output", "m.safetensors", "--ones", "kept"]) == 0
    assert capsys.readouterr().out == "1 masks, 25 of 55 weights removed: m.safetensors\n"
    assert load_masks("m.safetensors")[0]["a.weight"].count() == int(A.sum()) == 25
    for words in ([], ["old.pt"], ["old.pt", "--output", "x.safetensors", "--what"]):
        assert main(["convert", *words]) == 2
        assert "convert: " in capsys.readouterr().err
