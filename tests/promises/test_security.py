"""SECURITY.md, promise by promise: nothing is run, nothing leaves, nothing is told.

Pickles and remote code: test_bad_input.py, test_convert.py. What a file may hold: test_caps.py,
test_fuzz.py. Inputs that were changed: test_verify.py. What reaches a native kernel: test_ops.py.
"""

import json
import os
import shutil
import socket

import huggingface_hub
import numpy as np
import peft
import pytest
import sampling
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast import ops
from antidote_fast.cli import entry
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files import pruned_copy as ck
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.masks import PackedMask, save_masks
from antidote_fast.models import loading
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.selection import Selection

# --- nothing is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"])
@pytest.mark.parametrize("name", ["model", "adapter"])
def test_a_pickle_is_named_and_never_opened(copy_of, name, ending, monkeypatch):
    folder = copy_of(name)
    [weights] = folder.glob("*model.safetensors")
    weights.rename(folder / f"{weights.stem}{ending}")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    load = load_model if name == "model" else lambda f: load_adapter(tiny.build(), f)
    with pytest.raises(DataError, match=rf"are in \w*model\{ending}; only safetensors are read"):
        load(folder)


def test_no_weights_beside_a_pickle_are_preferred(copy_of, monkeypatch):
    """PEFT and transformers fall back to a pickle; with safetensors there it is not looked at."""
    folder = copy_of("adapter")
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    load_adapter(tiny.build(), folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "adapter_config.json"])
def test_code_of_a_checkpoint_is_refused(copy_of, name):
    folder = copy_of("adapter" if name.startswith("adapter") else "model")
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    tiny.edit_json(folder / name, lambda c: c.update(auto_map={"AutoTokenizer": ["evil.A", None]}))
    read = load_tokenizer if name.startswith("tokenizer") else open_checkpoint
    with pytest.raises(DataError, match="auto_map"):
        read(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("version", "refused"), [("5.4.9", True), ("4.57.1", True), ("5.5.0", False)]
)
def test_a_transformers_whose_configs_can_run_code(folders, monkeypatch, version, refused):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    for load in (load_model, load_tokenizer):
        if not refused:
            load(folders / "model")
            continue
        with pytest.raises(AntidoteError, match=f"transformers {version} is installed; 5.5 or lat"):
            load(folders / "model")
    assert loading.import_transformers is not None


# --- nothing leaves -------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Every attempt to reach a network or the hub."""
    made = []

    def forbidden(name):
        def call(*arguments, **options):
            made.append((name, arguments[:2]))
            raise OSError("there is no network")

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden(name))
    monkeypatch.setattr(socket, "getaddrinfo", forbidden("getaddrinfo"))
    for name in ("snapshot_download", "hf_hub_download", "file_exists", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, forbidden(name))
    monkeypatch.setattr(
        peft.utils.save_and_load, "file_exists", forbidden("file_exists"), raising=False
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return made


@pytest.mark.parametrize(
    "named", ["someone/their-base", "http://example.org/x", "../../etc", "", None]
)
def test_the_base_that_an_adapter_names_is_never_downloaded(
    named, calls, copy_of, folders, tmp_path
):
    folder = copy_of("adapter")
    change = {"base_model_name_or_path": named, "revision": "main"}
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update(change))
    (tmp_path / "data.jsonl").write_text('{"instruction": "how to", "output": "two plus"}\n')
    words = ["--model_name_or_path", str(folders / "model"), "--adapter", str(folder)]
    words += ["--dataset", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert entry.main(["prune", *words]) == 0
    assert calls == []


def test_a_link_or_a_pipe_leads_nowhere(copy_of, tmp_path):
    (tmp_path / "outside").mkdir()
    secret = tmp_path / "outside" / "config.json"
    secret.write_text('{"model_type": "llama"}')
    folder = copy_of("model")
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        inner = folder / name
        inner.rename(tmp_path / "outside" / f"kept-{name}")
        for make in (
            lambda p: p.symlink_to(secret),
            os.mkfifo,
            lambda p: p.symlink_to("/dev/zero"),
        ):
            make(inner)
            read = load_tokenizer if name.startswith("tokenizer") else open_checkpoint
            with pytest.raises(
                DataError, match=r"is a link out of its folder|is not a regular file"
            ):
                read(folder)
            inner.unlink()
        (tmp_path / "outside" / f"kept-{name}").rename(inner)
    load_model(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", 3, "x\0"]
)
def test_an_index_stays_in_its_folder(copy_of, name):
    folder = copy_of("sharded")
    index = folder / "model.safetensors.index.json"
    tiny.edit_json(index, lambda c: c["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(DataError, match="is not a plain file name"):
        open_checkpoint(folder)


def test_no_token_and_no_link_is_copied(copy_of, tmp_path):
    folder = copy_of("adapter")
    (tmp_path / "id").write_text("secret")
    for name in ("token.txt", "hf_token.json", ".hidden.json", "api-key.txt", "auth_token.model"):
        (folder / name).write_text("secret")
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.json", "NOTICE"):
        (folder / name).write_text("{}")
    with output_folder(tmp_path / "out") as staged:
        ck.write_pruned(open_checkpoint(folder), staged, {})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "COMPLETE.json",
        "NOTICE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    (folder / "notes.txt").symlink_to(tmp_path / "id")
    with (
        pytest.raises(DataError, match=r"notes\.txt: is a link out of its folder"),
        output_folder(tmp_path / "second") as staged,
    ):
        ck.write_pruned(open_checkpoint(folder), staged, {})
    assert not (tmp_path / "second").exists()


# --- nothing is told ------------------------------------------------------------------------------

MANIFEST = {"tool": "antidote-fast", "schema_version": 1, "files": {}}
CANARY = "zzcanaryzz"
ROW = {"instruction": f"how to {CANARY}", "input": CANARY, "output": f"{CANARY} two plus three"}
BROKEN = [
    [json.dumps(ROW), '{"instruction": "' + CANARY],
    [json.dumps({f"{CANARY}?": CANARY})],  # a single word may be a column's name, and is shown
    [json.dumps({f"how to {CANARY}": CANARY, "text": CANARY})],
    [json.dumps({"sentence": CANARY, "label": CANARY})],
    [json.dumps({"instruction": [CANARY], "output": CANARY})],
    [json.dumps({"instruction": CANARY, "output": ""})],
    [json.dumps(ROW), json.dumps([CANARY])],
    [json.dumps({"prompt": CANARY, "response": CANARY, "is_safe": CANARY})],
    [json.dumps(ROW)[:-1] + ', "' + CANARY + '": NaN, }'],
]


def told(work, capfd):
    """Where the canary is, apart from the data themselves."""
    out, err = capfd.readouterr()
    places = [name for name, text in (("stdout", out), ("stderr", err)) if CANARY in text]
    for path in work.rglob("*"):
        if path.is_file() and path.suffix != ".jsonl" and CANARY.encode() in path.read_bytes():
            places.append(str(path))
    return places


@pytest.fixture
def work(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "adapter"):
        shutil.copytree(folders / name, tmp_path / name)
    (tmp_path / "good.jsonl").write_text("\n".join([json.dumps(ROW)] * 3))
    return tmp_path


def words(command, out, **options):
    flags = {"model_name_or_path": "model", "output_dir": out} | options
    return [command, *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]


def test_no_stage_tells_what_the_data_say(work, capfd):
    data = {"dataset": "good.jsonl"}
    jobs = [
        words("calibrate", "norms", **data),
        words("prune", "pruned", adapter="adapter", save_norms="true", save_masks="true", **data),
        words(
            "finetune",
            "tuned",
            poison_ratio=0.5,
            harmful_dataset="good.jsonl",
            lora_r=2,
            num_train_epochs=1,
            num_train_samples=2,
            **data,
        ),
        words("align", "aligned", tuning="lora", lora_r=2, num_train_epochs=1, **data),
        words(
            "evaluate",
            "scores",
            harmful_dataset="good.jsonl",
            task_dataset="good.jsonl",
            benign_dataset="good.jsonl",
            reference_model="model",
            drift_dataset="good.jsonl",
            max_new_tokens=2,
        ),
    ]
    for job in jobs:
        assert entry.main(job) == 0, job
        assert (work / job[4] / "report.json").is_file()
    assert entry.main(["inspect", "pruned"]) == 0
    assert told(work, capfd) == []


@pytest.mark.parametrize("lines", BROKEN)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_error_tells_what_the_data_say(lines, debug, work, capfd):
    (work / "bad.jsonl").write_text("\n".join(lines))
    assert entry.main([*words("calibrate", "out", dataset="bad.jsonl"), *debug]) == 3
    assert told(work, capfd) == []
    assert not (work / "out").exists()


def test_nor_does_a_failure_in_the_middle(work, capfd):
    tiny.truncate(work / "model" / "model.safetensors")
    assert entry.main(words("calibrate", "out", dataset="good.jsonl")) == 3
    shutil.copytree(work / "adapter", work / "again")
    options = {"dataset": "good.jsonl", "max_seq_length": 4}
    assert entry.main(words("prune", "out", **options)) == 3
    assert told(work, capfd) == []


def test_no_escape_sequence_reaches_the_terminal(work, capfd):
    """Names and metadata of files are shown; a terminal obeys what is in them."""
    escape, half = "\x1b]0;x\x07\x9b2J", "\ud800"
    masks = {"a\x1b[2J.weight": PackedMask(torch.ones(1, 1, dtype=torch.uint8), (1, 8))}
    (work / "data\x1b[2J.jsonl").write_text("{}")
    assert entry.main(words("prune", "out", dataset="data\x1b[2J.jsonl")) == 3
    save_masks("masks.safetensors", masks)
    assert entry.main(["inspect", "masks.safetensors"]) == 3
    save_masks("masks.safetensors", {"a.weight": masks.popitem()[1]}, {"note": escape})
    assert entry.main(["inspect", "masks.safetensors"]) == 0
    (work / "model" / "\x1b[2J.txt").write_text("x")
    (work / "model" / "COMPLETE.json").write_text(json.dumps(MANIFEST))
    assert entry.main(["verify", "model"]) == 3
    index = work / "model" / "model.safetensors.index.json"
    (work / "model" / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a" + half: escape}}))
    assert entry.main(words("prune", "out", score="magnitude")) == 3
    out, err = capfd.readouterr()
    for text in (out, err):
        assert "x1b" in text
        assert text.replace("\n", "").isprintable()


# --- what reaches a native kernel -----------------------------------------------------------------


@settings(max_examples=sampling.examples(150, 50), deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(0, 9)),
    strides=st.tuples(st.integers(0, 12), st.integers(0, 3)),
    offset=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    norm_stride=st.integers(0, 2),
    scope=st.sampled_from(["row", "tensor"]),
)
def test_odd_views_are_refused_or_pruned_exactly(shape, strides, offset, dtype, norm_stride, scope):
    """Any shape, stride and offset: a refusal that writes nothing, or the reference's result and no
    byte outside of the view changed."""
    storage = torch.arange(1, 200, dtype=torch.float32).sin().to(dtype)
    norms = torch.linspace(0.5, 2, 40)
    weight = storage.as_strided(shape, strides, offset)
    norm = norms.as_strided((shape[1],), (norm_stride,), 1)
    before, expected = storage.clone(), weight.clone()
    selection = Selection(0.4, scope=scope)
    try:
        ops.prune_(weight, norm, selection)
    except (ValueError, TypeError):
        assert torch.equal(storage, before)
        return
    ops.prune_(expected.contiguous(), norm.contiguous(), selection, backend="reference")
    assert torch.equal(weight, expected)
    inside = np.zeros(len(storage), dtype=bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            inside[offset + row * strides[0] + column * strides[1]] = True
    assert torch.equal(storage[~inside], before[~inside])
