"""No adapter changes the base that the next one meets: in a fleet, alone, and on live objects."""

import json
import shutil

import fleets
import offenders
import peft
import pytest
import sweeps
import tiny
import torch
from fleets import config, weights_of
from safetensors.torch import load_file, save_file

from antidote_fast import DataError, oneshot
from antidote_fast.cli import entry
from antidote_fast.errors import JobsSetAside
from antidote_fast.experiments import sweep
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.fleet import fleet, worker
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model


@pytest.fixture(scope="module")
def customers(tmp_path_factory):
    return offenders.make(tmp_path_factory)


@pytest.fixture(scope="module")
def alone(customers, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    for name in ("before", "after"):
        fleets.as_prune(customers, name, out / name)
    return out


def test_nothing_of_an_offender_reaches_the_next_of_a_fleet(customers, alone, tmp_path):
    count = len(customers.says)
    with pytest.raises(JobsSetAside, match=f"{count} of {2 * count + 1} jobs"):
        fleet.run(config(customers, tmp_path))
    offenders.check_fleet(customers, tmp_path, alone)


def state_of(model):
    """All that an adapter could change: modules, their attributes, flags, and every bit."""
    modules = {name: (id(m), sorted(vars(m))) for name, m in model.named_modules()}
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    bits = {k: v.clone().view(torch.int32) for k, v in model.state_dict().items()}
    return modules, flags, bits


def same_state(first, second):
    bits = zip(first[2].values(), second[2].values(), strict=True)
    return first[:2] == second[:2] and all(torch.equal(a, b) for a, b in bits)


def test_live_objects_are_left_as_they_were(customers):
    model = load_model(customers.base)
    before = state_of(model)
    for kind, says in customers.says.items():
        adapter = customers.adapters / kind
        with pytest.raises(DataError) as refused:
            oneshot(model, adapter, fleets.ROWS, tiny.tokenizer(), ratio=0.3)
        assert says in str(refused.value)
        assert same_state(state_of(model), before), kind


def test_a_live_adapter_that_changed_its_base_is_refused(customers):
    for options in ({"init_lora_weights": "pissa"}, {"bias": "all"}):
        live = tiny.add_lora(tiny.build("qwen2"), **options)
        with pytest.raises(DataError, match=r"changes the base|replaces biases"):
            oneshot(live, dataset=fleets.ROWS, tokenizer=tiny.tokenizer(), ratio=0.3)


def test_a_load_that_fails_half_way_leaves_the_model(customers, tmp_path):
    """Its modules are wrapped by then, as a tensor is found to be missing."""
    short = tmp_path / "short"
    shutil.copytree(customers.adapters / "before", short)
    path = short / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.1.self_attn.v_proj" not in k}
    save_file(tensors, path)
    model = load_model(customers.base).train()
    model.lm_head.register_forward_hook(lambda *_: None)
    before = state_of(model)
    with pytest.raises(DataError, match="lacks 2 tensors"):
        load_adapter(model, short)
    assert same_state(state_of(model), before)
    assert all(module.training for module in model.modules())


def test_the_base_is_not_copied_for_nothing(customers, tmp_path, monkeypatch):
    greedy = tmp_path / "greedy"
    shutil.copytree(customers.adapters / "before", greedy)
    change = {"modules_to_save": ["model"]}
    tiny.edit_json(greedy / "adapter_config.json", lambda c: c.update(change))
    monkeypatch.setattr(peft.LoraModel, "__init__", None)
    with pytest.raises(DataError, match=r"lacks 26 tensors .*model\.model\.embed_tokens\.weight"):
        load_adapter(load_model(customers.base), greedy)


def test_every_road_refuses_before_any_work(customers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("antidote_fast.stages.inputs.load_model", None)
    data = str(customers.root / "harmful.jsonl")
    flags = ["--model_name_or_path", str(customers.base), "--output_dir", str(tmp_path / "out")]
    roads = {
        "prune": [[], ["--dry_run"], ["--stream"], ["--score", "magnitude"]],
        "calibrate": [[]],
    }
    gate = ["--score", "gate", "--preserve_dataset", data, "--scope", "row"]
    roads["prune"].append(gate)
    for kind, says in customers.says.items():
        adapter = ["--adapter", str(customers.adapters / kind), "--dataset", data]
        for command, more in roads.items():
            for extra in more:
                assert entry.main([command, *flags, *adapter, *extra]) == 3, (kind, command, extra)
                last = capsys.readouterr().err.strip().splitlines()[-1]
                assert says in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_sweep_refuses_before_any_work(dry, folders, copy_of, tmp_path, capsys, monkeypatch):
    made = sweeps.make(folders, tmp_path)
    offender = copy_of("adapter")
    change = {"init_lora_weights": "pissa"}
    tiny.edit_json(offender / "adapter_config.json", lambda c: c.update(change))
    monkeypatch.setattr(sweep, "load_model", None)
    values = sweeps.fields(made, tmp_path / "out", adapter=True) | {"adapter": str(offender)}
    assert entry.main(["sweep", *sweeps.words(values), *dry]) == 3
    assert "init_lora_weights='pissa' changes" in capsys.readouterr().err


def test_a_copy_of_the_base_is_left_out(customers, alone, tmp_path):
    """PEFT saves the embeddings with an adapter that targets them."""
    copies = tmp_path / "copies"
    shutil.copytree(customers.adapters / "after", copies)
    path = copies / "adapter_model.safetensors"
    base = load_file(customers.base / "model.safetensors")
    more = {
        "base_model.model.model.embed_tokens.base_layer.weight": base["model.embed_tokens.weight"],
        "base_model.model.lm_head.weight": base["lm_head.weight"],
    }
    save_file(load_file(path) | more, path)
    for options in ({}, {"stream": True}):
        fleets.as_prune(customers, copies, tmp_path / str(len(options)), **options)
        found = load_file(tmp_path / str(len(options)) / "adapter_model.safetensors")
        for key, value in load_file(alone / "after" / "adapter_model.safetensors").items():
            assert torch.equal(found[key], value), key
        assert all(torch.equal(found[key], value) for key, value in more.items())


def test_peft_opens_no_file(customers, tmp_path):
    folder = tmp_path / "gone"
    shutil.copytree(customers.adapters / "before", folder)
    adapter = open_checkpoint(folder)
    tensors = adapter.read(adapter.tensors)
    shutil.rmtree(folder)
    live = load_adapter(load_model(customers.base), adapter, tensors=tensors)
    there = load_adapter(load_model(customers.base), customers.adapters / "before")
    ids = torch.arange(4, 12)[None]
    assert torch.equal(live(input_ids=ids).logits, there(input_ids=ids).logits)


def test_what_is_saved_says_what_the_file_said(customers, tmp_path):
    change = {"init_lora_weights": "gaussian", "base_model_name_or_path": "someone/base"}
    said = tmp_path / "said"
    shutil.copytree(customers.adapters / "before", said)
    tiny.edit_json(said / "adapter_config.json", lambda c: c.update(change))
    model, tokenizer = load_model(customers.base), tiny.tokenizer()
    oneshot(model, said, fleets.ROWS, tokenizer, ratio=0.3, output_dir=tmp_path / "out")
    before, after = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (said, tmp_path / "out")
    )
    for each in (before, after):
        each["target_modules"].sort()
    assert after == before


# --- behind our back ------------------------------------------------------------------------------


def spoil(monkeypatch, job, names, times):
    """While ``job`` runs, weights of the base are written to, past autograd's count of versions."""
    real, done = worker.Worker._collect, []

    def collect(self, read):
        if read.job.name == job and len(done) < times:
            done.append(1)
            self._slot.put(read.inputs.adapter, read.tensors)
            for name, parameter in self._slot.model.named_parameters():
                if name.endswith(names):
                    parameter.data[0] *= -1
        return real(self, read)

    monkeypatch.setattr(worker.Worker, "_collect", collect)


@pytest.mark.parametrize(
    "names",
    [
        ("embed_tokens.weight",),
        ("k_proj.base_layer.bias",),
        ("q_proj.base_layer.weight", "norm.weight"),
    ],
)
def test_a_base_written_to_is_loaded_again(names, customers, alone, tmp_path, monkeypatch):
    rows = [
        {"adapter": "adapters/before"},
        {"adapter": "adapters/after", "name": "struck"},
        {"adapter": "adapters/after"},
    ]
    path = fleets.manifest(customers.root, *rows, name="struck.jsonl")
    spoil(monkeypatch, "struck", names, times=1)
    report = fleet.run(config(customers, tmp_path, path))
    assert report["counts"]["failed"] == 0
    for name, same in (("before", "before"), ("struck", "after"), ("after", "after")):
        assert weights_of(tmp_path / name) == weights_of(alone / same), name


def test_a_job_that_always_writes_to_it_is_set_aside(customers, alone, tmp_path, monkeypatch):
    rows = [{"adapter": "adapters/before", "name": "evil"}, {"adapter": "adapters/after"}]
    path = fleets.manifest(customers.root, *rows, name="evil.jsonl")
    spoil(monkeypatch, "evil", ("model.norm.weight",), times=9)
    with pytest.raises(JobsSetAside, match=r"1 of 2 jobs .*'model\.norm\.weight' changes while"):
        fleet.run(config(customers, tmp_path, path))
    assert not (tmp_path / "evil").exists()
    assert weights_of(tmp_path / "after") == weights_of(alone / "after")
