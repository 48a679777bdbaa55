"""Checkpoints read strictly, written whole, and byte for byte where nothing was pruned."""

import json
import shutil
import struct

import huggingface_hub
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from antidote_fast import checkpoint as ck
from antidote_fast.calibrate import ActivationNorms
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.files import inside
from antidote_fast.fingerprint import fingerprint_model
from antidote_fast.prune import prune_model_, prune_state_
from antidote_fast.selection import Selection


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model (two shapes of file), its twin of another seed, and an adapter."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.save_model(tiny.build(), root / "model")
    tiny.save_model(tiny.build(), root / "sharded", max_shard_size="20KB")
    tiny.save_model(tiny.build(seed=1), root / "twin")
    tiny.save_model(tiny.build("gpt2"), root / "gpt2")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    return root


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        shutil.copytree(folders / name, tmp_path / name)
        return tmp_path / name

    return copy


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def data_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# Fingerprints


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixtral", "qwen3_moe"])
def test_fingerprint_of_folder_and_model_agree(kind, tmp_path):
    model = tiny.build(kind)
    tiny.save_model(model, tmp_path / "m", max_shard_size="20KB")
    expected = ck.open_checkpoint(tmp_path / "m").fingerprint()
    assert len(expected) == 32
    assert fingerprint_model(model) == expected
    assert fingerprint_model(tiny.add_lora(model, modules_to_save=["o_proj"])) == expected
    for dtype in ("bfloat16", "float32"):
        assert fingerprint_model(ck.load_model(tmp_path / "m", dtype=dtype)) == expected
    assert fingerprint_model(tiny.build(kind, seed=1)) != expected


def test_fingerprint_of_half_precision_files(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        tiny.save_model(tiny.build(dtype=dtype), tmp_path / str(dtype))
        expected = ck.open_checkpoint(tmp_path / str(dtype)).fingerprint()
        for loaded in ("float32", "bfloat16", "auto"):
            model = ck.load_model(tmp_path / str(dtype), dtype=loaded)
            assert fingerprint_model(model) == expected


def test_fingerprint_unknown():
    assert fingerprint_model(torch.nn.Linear(2, 2)) == ""
    assert fingerprint_model(tiny.build().to("meta")) == ""
    model = tiny.build()
    packed = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj.weight = packed
    assert fingerprint_model(model) == ""


def test_fingerprint_changes_with_the_merged_adapter():
    model = tiny.build()
    merged = tiny.add_lora(tiny.build()).merge_and_unload()
    assert fingerprint_model(merged) != fingerprint_model(model)


# Loading


@pytest.mark.parametrize("name", ["model", "sharded", "gpt2"])
def test_load_model(folders, name):
    model = ck.load_model(folders / name)
    reference = tiny.build("gpt2" if name == "gpt2" else "llama")
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert not model.training
    assert ck.load_model(folders / name, dtype="bfloat16").dtype == torch.bfloat16


def test_load_tokenizer_changes_nothing(folders):
    tokenizer = ck.load_tokenizer(folders / "model")
    assert tokenizer.pad_token is None
    assert (
        tokenizer("how to make a cake")["input_ids"]
        == tiny.tokenizer()("how to make a cake")["input_ids"]
    )


def test_load_adapter_keeps_the_dtype_of_the_file(folders, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        live = tiny.add_lora(tiny.build(), dtype=dtype)
        tiny.save_adapter(live, tmp_path / str(dtype))
        for base in ("float32", "bfloat16"):
            model = ck.load_adapter(
                ck.load_model(folders / "model", dtype=base), tmp_path / str(dtype)
            )
            saved = load_file(tmp_path / str(dtype) / "adapter_model.safetensors")
            loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            assert set(loaded) == set(saved)
            for key, value in saved.items():
                assert value.dtype == dtype
                assert loaded[key].dtype == dtype
                assert torch.equal(loaded[key], value)
            assert not model.training


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["o_proj"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"lora_bias": False, "bias": "none"},
    ],
)
def test_adapters_that_are_understood(folders, tmp_path, options):
    live = tiny.add_lora(tiny.build(), **options)
    tiny.save_adapter(live, tmp_path / "a")
    adapter = ck.open_checkpoint(tmp_path / "a")
    ck.check_adapter(adapter, ck.open_checkpoint(folders / "model"))
    model = ck.load_adapter(ck.load_model(folders / "model"), adapter)
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, live(input_ids=ids).logits)


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
        ck.load_model(name)
    with pytest.raises(DataError, match=match):
        ck.load_tokenizer(name)
    with pytest.raises(DataError, match=match):
        ck.load_adapter(tiny.build(), name)


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
        ck.load_model("some/model")
    assert "\n" not in str(caught.value)


def test_hub_name_that_is_there(monkeypatch, folders):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: folders / "model")
    assert ck.resolve_folder("some/model") == folders / "model"


def test_wrong_kind_of_folder(folders, tmp_path):
    with pytest.raises(DataError, match="is a PEFT adapter"):
        ck.load_model(folders / "adapter")
    with pytest.raises(DataError, match="whole model"):
        ck.load_adapter(tiny.build(), folders / "model")
    with pytest.raises(DataError, match="is a file"):
        ck.load_model(folders / "model" / "config.json")
    with pytest.raises(DataError, match=r"neither config\.json"):
        ck.load_model(tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer"):
        ck.load_tokenizer(folders / "adapter")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_bad_device(folders, device):
    with pytest.raises(UsageError, match="device="):
        ck.load_model(folders / "model", device=device)


def test_bad_dtype(folders):
    with pytest.raises(UsageError, match="dtype='int8'"):
        ck.load_model(folders / "model", dtype="int8")
    assert ck.load_model(folders / "model", dtype=torch.float16).dtype == torch.float16


# Broken folders


def truncate(path, by=100):
    path.write_bytes(path.read_bytes()[:-by])


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
        (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors: is truncated"),
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
            lambda f: edit(f / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.y"})),
            "auto_map",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(intermediate_size=64)),
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
        ck.load_model(folder)
    assert "\n" not in str(caught.value)


def test_broken_tokenizer(copy_of):
    folder = copy_of("model")
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": "x.y"}))
    with pytest.raises(DataError, match="tokenizer asks to run code"):
        ck.load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        ck.load_tokenizer(folder)


INDEX = "model.safetensors.index.json"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: shards(f)[1].unlink(), r"model-00002.*missing"),
        (lambda f: truncate(shards(f)[2]), r"model-00003.*is truncated"),
        (
            lambda f: edit(f / INDEX, lambda i: i["weight_map"].update(more=shards(f)[0].name)),
            "tensor 'more' of the index is missing",
        ),
        (
            lambda f: edit(
                f / INDEX,
                lambda i: i["weight_map"].update({NORM: shards(f)[0].name}),
            ),
            "lies in",
        ),
        (lambda f: edit(f / INDEX, lambda i: i["weight_map"].update(x="../y")), "not a plain file"),
        (lambda f: edit(f / INDEX, lambda i: i["weight_map"].update(x="y.bin")), r"'y\.bin'; only"),
        (lambda f: edit(f / INDEX, lambda i: i["weight_map"].clear()), "has no weight_map"),
        (lambda f: shutil.copy(shards(f)[0], shards(f)[1]), "is in two files"),
    ],
)
def test_broken_shards(copy_of, damage, match):
    folder = copy_of("sharded")
    damage(folder)
    with pytest.raises(DataError, match=match):
        ck.load_model(folder)


def test_links_out_of_the_folder(copy_of, tmp_path):
    folder = copy_of("model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match="is a link out of its folder"):
        ck.load_model(folder)
    with pytest.raises(DataError, match="not a plain file name"):
        inside(folder, "..")


def test_links_of_the_hub_cache(copy_of, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in copy_of("model").iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert ck.load_model(snapshot).config.hidden_size == 32


# Adapters of another base


def test_adapter_fits_its_base(folders):
    adapter = ck.open_checkpoint(folders / "adapter")
    ck.check_adapter(adapter, ck.open_checkpoint(folders / "model"))
    ck.check_adapter(adapter, ck.open_checkpoint(folders / "sharded"))


@pytest.mark.parametrize(
    ("layers", "match"),
    [(1, r"adapts .*layers\.1.* lacks"), (3, r"does not adapt .*layers\.2")],
)
def test_adapter_with_other_layers(folders, tmp_path, layers, match):
    tiny.save_model(tiny.build(layers=layers), tmp_path / "m")
    adapter = ck.open_checkpoint(folders / "adapter")
    with pytest.raises(DataError, match=match):
        ck.check_adapter(adapter, ck.open_checkpoint(tmp_path / "m"))
    with pytest.raises(DataError, match=r"lacks|no place|cannot be put"):
        ck.load_adapter(ck.load_model(tmp_path / "m"), adapter)


def test_adapter_of_other_shapes(folders, tmp_path):
    tiny.save_model(tiny.build("opt"), tmp_path / "opt")
    adapter = ck.open_checkpoint(folders / "adapter")
    with pytest.raises(DataError, match=r"lacks|which in the base"):
        ck.check_adapter(adapter, ck.open_checkpoint(tmp_path / "opt"))
    with pytest.raises(DataError, match="lacks"):
        ck.check_adapter(adapter, ck.open_checkpoint(folders / "gpt2"))
    model = tiny.build()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 32, bias=False)
    tiny.save_model(model, tmp_path / "wide")
    with pytest.raises(DataError, match=r"q_proj' as \(32, 32\), which in the base .* \(32, 48\)"):
        ck.check_adapter(adapter, ck.open_checkpoint(tmp_path / "wide"))
    with pytest.raises(DataError, match="cannot be put on this model"):
        ck.load_adapter(model, adapter)


def test_adapter_of_a_twin_base(folders, tmp_path):
    adapter = folders / "adapter"
    base, twin = (ck.open_checkpoint(folders / n) for n in ("model", "twin"))
    # Recorded when this tool wrote the adapter.
    with ck.output_folder(tmp_path / "ours", base_fingerprint=base.fingerprint()) as staged:
        ck.write_pruned(adapter, staged, {})
    ours = ck.open_checkpoint(tmp_path / "ours")
    ck.check_adapter(ours, base)
    with pytest.raises(DataError, match="made for another base model"):
        ck.check_adapter(ours, twin)
    # Or named by PEFT, where that folder is still there.
    for name, where in (("named", str(folders / "model")), ("gone", "/no/such/folder")):
        shutil.copytree(adapter, tmp_path / name)
        edit(
            tmp_path / name / "adapter_config.json",
            lambda c, where=where: c.update(base_model_name_or_path=where),
        )
    named = ck.open_checkpoint(tmp_path / "named")
    ck.check_adapter(named, base)
    ck.check_adapter(named, ck.open_checkpoint(folders / "sharded"))
    with pytest.raises(DataError, match="made for another base model"):
        ck.check_adapter(named, twin)
    ck.check_adapter(ck.open_checkpoint(tmp_path / "gone"), twin)


def change_adapter(change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (change_adapter(lambda t: t.pop(FIRST)), r"q_proj' lacks lora_A"),
        (
            change_adapter(lambda t: t.update({FIRST: torch.ones(3, 32)})),
            r"ranks 3 \(A\) and 4 \(B\)",
        ),
        (change_adapter(lambda t: t.update({FIRST: torch.ones(32)})), r"has shape \(32,\)"),
        (change_adapter(lambda t: t.clear() or t.update(x=torch.ones(1))), "holds no LoRA factors"),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(r=10**9)),
            "its config says 1000000000",
        ),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(peft_type="IA3")),
            "type IA3",
        ),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(use_qalora=True)),
            "use_qalora is not understood",
        ),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(init_lora_weights="mica")),
            "mica",
        ),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(auto_map={"x": "y"})),
            "auto_map",
        ),
        (lambda f: truncate(f / "adapter_model.safetensors"), "is truncated"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            r"adapter_model\.bin; only safetensors",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            r"has no adapter_model\.safetensors",
        ),
    ],
)
def test_broken_adapter(copy_of, damage, match):
    folder = copy_of("adapter")
    damage(folder)
    with pytest.raises(DataError, match=match):
        ck.load_adapter(tiny.build(), folder)


def test_adapter_with_tensors_left_over(copy_of):
    folder = copy_of("adapter")
    extra = {
        FIRST.replace("q_proj", "o_proj"): torch.ones(4, 32),
        FIRST.replace("q_proj.lora_A", "o_proj.lora_B"): torch.ones(32, 4),
    }
    change_adapter(lambda t: t.update(extra))(folder)
    with pytest.raises(DataError, match="has 2 tensors that this model has no place for"):
        ck.load_adapter(tiny.build(), folder)


# Writing


@pytest.mark.parametrize("name", ["model", "sharded", "gpt2"])
def test_write_pruned_model(folders, tmp_path, name):
    source = folders / name
    model = ck.load_model(source)
    norms = ActivationNorms.collect(model, tiny.batches())
    prune_model_(model, norms, Selection(0.25))
    tensors, transposed = ck.read_prunable(ck.open_checkpoint(source), norms)
    assert set(transposed) == norms.transposed
    prune_state_(tensors, norms, Selection(0.25))
    with ck.output_folder(tmp_path / "out") as staged:
        ck.write_pruned(source, staged, tensors)
    out = tmp_path / "out"
    assert ck.verify_folder(out) == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    before, after = ck.open_checkpoint(source), ck.open_checkpoint(out)
    assert set(before.tensors) == set(after.tensors)
    for key in set(before.tensors) - set(tensors):
        assert torch.equal(before.read([key])[key], after.read([key])[key])
    # Bytes outside of the pruned tensors are the source's own.
    old, new = data_of(source), data_of(out)
    assert set(new) == set(old) | {"COMPLETE.json"}
    for file, data in old.items():
        spans = [
            (e.start, e.end)
            for k, e in before.tensors.items()
            if k in tensors and e.file.name == file
        ]
        changed = {i for i, (a, b) in enumerate(zip(data, new[file], strict=True)) if a != b}
        assert len(data) == len(new[file])
        assert all(any(s <= i < e for s, e in spans) for i in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_write_pruned_adapter(folders, tmp_path, dtype):
    tiny.save_adapter(tiny.add_lora(tiny.build(), dtype=dtype), tmp_path / "in")
    source = ck.open_checkpoint(tmp_path / "in")
    model = ck.load_adapter(ck.load_model(folders / "model"), source)
    norms = ActivationNorms.collect(model, tiny.batches())
    norms.save(tmp_path / "norms.safetensors")
    # From here on no model is there.
    norms = ActivationNorms.load(tmp_path / "norms.safetensors")
    assert norms.fingerprint == ck.open_checkpoint(folders / "model").fingerprint()
    tensors, transposed = ck.read_prunable(source, norms)
    assert transposed == []
    report = prune_state_(tensors, norms, Selection(0.25))
    assert len(report.layers) == 12
    with ck.output_folder(tmp_path / "out") as staged:
        ck.write_pruned(source, staged, tensors)
    prune_model_(model, norms, Selection(0.25))
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "model")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False)
    live = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert value.dtype == dtype
        assert torch.equal(value, live[key])
        assert (value == 0).sum() >= value.numel() // 5
    for key, value in peft.get_peft_model_state_dict(loaded, save_embedding_layers=False).items():
        torch.testing.assert_close(value, live[key].to(value.dtype), rtol=0, atol=0)
    old, new = data_of(tmp_path / "in"), data_of(tmp_path / "out")
    assert new["adapter_config.json"] == old["adapter_config.json"]


def test_write_pruned_refuses(folders, tmp_path, monkeypatch):
    source = folders / "model"
    key = "model.layers.0.self_attn.q_proj.weight"
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    for tensors, match in (
        ({"nonesuch": torch.ones(1)}, "has no tensor 'nonesuch'"),
        ({key: torch.ones(2, 2)}, r"is torch.float32 \(32, 32\) on disk"),
        ({key: torch.ones(32, 32, dtype=torch.bfloat16)}, r"not torch\.bfloat16"),
    ):
        with pytest.raises(DataError, match=match):
            ck.write_pruned(source, tmp_path, tensors)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AntidoteError, match="GB needed"):
        ck.write_pruned(source, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_only_known_files_are_copied(copy_of, tmp_path):
    folder = copy_of("adapter")
    for name in ("optimizer.pt", "evil.py", "report.json", "COMPLETE.json", "LICENSE", "x.bin"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-1").mkdir()
    with ck.output_folder(tmp_path / "out") as staged:
        ck.write_pruned(folder, staged, {})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "COMPLETE.json",
        "LICENSE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_prefix_left_out_of_the_file(copy_of):
    """GPT-2 on the hub has h.0..., the live model transformer.h.0...."""
    folder = copy_of("gpt2")
    path = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = ck.load_model(folder)
    checkpoint = ck.open_checkpoint(folder)
    assert fingerprint_model(model) == checkpoint.fingerprint()
    norms = ActivationNorms.collect(model, tiny.batches())
    read, transposed = ck.read_prunable(checkpoint, norms)
    assert list(read) == norms.keys == transposed
    assert torch.equal(read[norms.keys[0]], model.get_parameter(norms.keys[0]))
    bare, transposed = ck.read_prunable(checkpoint)
    assert list(bare) == transposed == [k.removeprefix("transformer.") for k in norms.keys]
    assert (
        checkpoint.find("wte.weight") == checkpoint.find("transformer.wte.weight") == "wte.weight"
    )


def test_read_prunable(folders, copy_of):
    model = ck.open_checkpoint(folders / "model")
    assert len(ck.read_prunable(model)[0]) == 6
    assert len(ck.read_prunable(model, targets="all-linear")[0]) == 14
    adapter = ck.open_checkpoint(folders / "adapter")
    assert len(ck.read_prunable(adapter)[0]) == 12
    assert len(ck.read_prunable(adapter, targets=["q_proj"])[0]) == 4
    with pytest.raises(DataError, match="has no tensor 'x'"):
        model.read(["x"])
    folder = copy_of("model")
    edit(
        folder / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq"}),
    )
    with pytest.raises(DataError, match=r"is quantised \(gptq\)"):
        ck.read_prunable(ck.open_checkpoint(folder))
