"""Models and tokenizers read strictly: what is missing, broken or unsafe is one line."""

import json
import shutil
import struct

import huggingface_hub
import huggingface_hub.errors
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import check_inside
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model, load_tokenizer, resolve_folder


@pytest.mark.parametrize("name", ["model", "sharded", "gpt2"])
def test_load_model(folders, name):
    model = load_model(folders / name)
    reference = tiny.build("gpt2" if name == "gpt2" else "llama")
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert not model.training
    assert load_model(folders / name, dtype="bfloat16").dtype == torch.bfloat16


def test_load_tokenizer_changes_nothing(folders):
    tokenizer = load_tokenizer(folders / "model")
    assert tokenizer.pad_token is None
    assert (
        tokenizer("how to make a cake")["input_ids"]
        == tiny.tokenizer()("how to make a cake")["input_ids"]
    )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./no/such/folder", "no such folder$"),
        ("/nowhere/at/all", "no such folder$"),
        ("not a name", "no such folder$"),
    ],
)
def test_no_such_folder(name, match):
    with pytest.raises(DataError, match=match):
        load_model(name)
    with pytest.raises(DataError, match=match):
        load_tokenizer(name)
    with pytest.raises(DataError, match=match):
        load_adapter(tiny.build(), name)


def http_error(kind):
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("x"), "nor can the hub be reached"),
        (ConnectionError("x"), "nor can the hub be reached"),
        (http_error(huggingface_hub.errors.RepositoryNotFoundError), "on the hub it is not there"),
        (http_error(huggingface_hub.errors.GatedRepoError), "needs access rights"),
    ],
)
def test_hub_names(monkeypatch, error, match):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=match) as caught:
        load_model("some/model")
    assert "\n" not in str(caught.value)


def test_hub_name_that_is_there(monkeypatch, folders):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: folders / "model")
    assert resolve_folder("some/model") == folders / "model"


def test_wrong_kind_of_folder(folders, tmp_path):
    with pytest.raises(DataError, match="is a PEFT adapter"):
        load_model(folders / "adapter")
    with pytest.raises(DataError, match="whole model"):
        load_adapter(tiny.build(), folders / "model")
    with pytest.raises(DataError, match="is a file"):
        load_model(folders / "model" / "config.json")
    with pytest.raises(DataError, match=r"neither config\.json"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(folders / "adapter")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_bad_device(folders, device):
    with pytest.raises(UsageError, match="device="):
        load_model(folders / "model", device=device)


def test_bad_dtype(folders):
    with pytest.raises(UsageError, match="dtype='int8'"):
        load_model(folders / "model", dtype="int8")
    assert load_model(folders / "model", dtype=torch.float16).dtype == torch.float16


def drop_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def rewrite_header(change):
    def apply(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: tiny.truncate(f / "model.safetensors"), r"model\.safetensors: is truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or not a safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 90), "not a safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"x" * 8),
            "malform",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (
            drop_tensor,
            r"lacks 1 tensors that the model needs, 'model\.layers\.1\.self_attn\.v_proj",
        ),
        (to_pickle, r"pytorch_model\.bin; only safetensors are read"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), "cannot be loaded"),
        (
            lambda f: tiny.edit_json(
                f / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.y"})
            ),
            "auto_map",
        ),
        (
            lambda f: tiny.edit_json(f / "config.json", lambda c: c.update(intermediate_size=64)),
            "cannot be loaded",
        ),
        (rewrite_header(lambda h: h[NORM].update(shape=[-1])), "malformed"),
        (rewrite_header(lambda h: h[NORM].update(shape=[31])), "malformed"),
        (rewrite_header(lambda h: h[NORM].update(shape="ab")), "malformed"),
        (rewrite_header(lambda h: h[NORM].pop("dtype")), "malformed"),
        (rewrite_header(lambda h: h.pop(NORM)), "does not follow|has bytes after"),
        (rewrite_header(lambda h: h.clear()), "has bytes after"),
    ],
)
def test_broken_model(copy_of, damage, match):
    folder = copy_of("model")
    damage(folder)
    with pytest.raises(DataError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_broken_tokenizer(copy_of):
    folder = copy_of("model")
    tiny.edit_json(
        folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": "x.y"})
    )
    with pytest.raises(DataError, match="tokenizer asks to run code"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        load_tokenizer(folder)


INDEX = "model.safetensors.index.json"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: shards(f)[1].unlink(), r"model-00002.*missing"),
        (lambda f: tiny.truncate(shards(f)[2]), r"model-00003.*is truncated"),
        (
            lambda f: tiny.edit_json(
                f / INDEX, lambda i: i["weight_map"].update(more=shards(f)[0].name)
            ),
            "tensor 'more' of the index is missing",
        ),
        (
            lambda f: tiny.edit_json(
                f / INDEX,
                lambda i: i["weight_map"].update({NORM: shards(f)[0].name}),
            ),
            "lies in",
        ),
        (
            lambda f: tiny.edit_json(f / INDEX, lambda i: i["weight_map"].update(x="../y")),
            "not a plain file",
        ),
        (
            lambda f: tiny.edit_json(f / INDEX, lambda i: i["weight_map"].update(x="y.bin")),
            r"'y\.bin'; only",
        ),
        (
            lambda f: tiny.edit_json(f / INDEX, lambda i: i["weight_map"].clear()),
            "has no weight_map",
        ),
        (lambda f: shutil.copy(shards(f)[0], shards(f)[1]), "is in two files"),
    ],
)
def test_broken_shards(copy_of, damage, match):
    folder = copy_of("sharded")
    damage(folder)
    with pytest.raises(DataError, match=match):
        load_model(folder)


def test_links_out_of_the_folder(copy_of, tmp_path):
    folder = copy_of("model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match="is a link out of its folder"):
        load_model(folder)
    with pytest.raises(DataError, match="not a plain file name"):
        check_inside(folder, "..")


def test_links_of_the_hub_cache(copy_of, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in copy_of("model").iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_model(snapshot).config.hidden_size == 32
