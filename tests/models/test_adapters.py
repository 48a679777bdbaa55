"""Adapters: what is understood, which base they fit, and how strictly they load."""

import shutil

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.errors import DataError
from antidote_fast.files import pruned_copy as ck
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import load_model


def test_load_adapter_keeps_the_dtype_of_the_file(folders, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        live = tiny.add_lora(tiny.build(), dtype=dtype)
        tiny.save_adapter(live, tmp_path / str(dtype))
        for base in ("float32", "bfloat16"):
            model = load_adapter(load_model(folders / "model", dtype=base), tmp_path / str(dtype))
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
    adapter = open_checkpoint(tmp_path / "a")
    check_adapter(adapter, open_checkpoint(folders / "model"))
    model = load_adapter(load_model(folders / "model"), adapter)
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, live(input_ids=ids).logits)


def test_adapter_fits_its_base(folders):
    adapter = open_checkpoint(folders / "adapter")
    check_adapter(adapter, open_checkpoint(folders / "model"))
    check_adapter(adapter, open_checkpoint(folders / "sharded"))


@pytest.mark.parametrize(
    ("layers", "match"),
    [(1, r"adapts .*layers\.1.* lacks"), (3, r"does not adapt .*layers\.2")],
)
def test_adapter_with_other_layers(folders, tmp_path, layers, match):
    tiny.save_model(tiny.build(layers=layers), tmp_path / "m")
    adapter = open_checkpoint(folders / "adapter")
    with pytest.raises(DataError, match=match):
        check_adapter(adapter, open_checkpoint(tmp_path / "m"))
    with pytest.raises(DataError, match=r"lacks|no place|cannot be put"):
        load_adapter(load_model(tmp_path / "m"), adapter)


def test_adapter_of_other_shapes(folders, tmp_path):
    tiny.save_model(tiny.build("opt"), tmp_path / "opt")
    adapter = open_checkpoint(folders / "adapter")
    with pytest.raises(DataError, match=r"lacks|which in the base"):
        check_adapter(adapter, open_checkpoint(tmp_path / "opt"))
    with pytest.raises(DataError, match="lacks"):
        check_adapter(adapter, open_checkpoint(folders / "gpt2"))
    model = tiny.build()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 32, bias=False)
    tiny.save_model(model, tmp_path / "wide")
    with pytest.raises(DataError, match=r"q_proj' as \(32, 32\), which in the base .* \(32, 48\)"):
        check_adapter(adapter, open_checkpoint(tmp_path / "wide"))
    with pytest.raises(DataError, match="cannot be put on this model"):
        load_adapter(model, adapter)


def test_adapter_of_a_twin_base(folders, tmp_path):
    adapter = folders / "adapter"
    base, twin = (open_checkpoint(folders / n) for n in ("model", "twin"))
    # Recorded when this tool wrote the adapter.
    with output_folder(tmp_path / "ours", base_fingerprint=base.fingerprint()) as staged:
        ck.write_pruned(open_checkpoint(adapter), staged, {})
    ours = open_checkpoint(tmp_path / "ours")
    check_adapter(ours, base)
    with pytest.raises(DataError, match="made for another base model"):
        check_adapter(ours, twin)
    # Or named by PEFT, where that folder is still there.
    for name, where in (("named", str(folders / "model")), ("gone", "/no/such/folder")):
        shutil.copytree(adapter, tmp_path / name)
        tiny.edit_json(
            tmp_path / name / "adapter_config.json",
            lambda c, where=where: c.update(base_model_name_or_path=where),
        )
    named = open_checkpoint(tmp_path / "named")
    check_adapter(named, base)
    check_adapter(named, open_checkpoint(folders / "sharded"))
    with pytest.raises(DataError, match="made for another base model"):
        check_adapter(named, twin)
    check_adapter(open_checkpoint(tmp_path / "gone"), twin)


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
            lambda f: tiny.edit_json(f / "adapter_config.json", lambda c: c.update(r=10**9)),
            "rank 1000000000: must be an integer from 1 to 4096",
        ),
        (
            lambda f: tiny.edit_json(
                f / "adapter_config.json", lambda c: c.update(peft_type="IA3")
            ),
            "type IA3",
        ),
        (
            lambda f: tiny.edit_json(
                f / "adapter_config.json", lambda c: c.update(use_qalora=True)
            ),
            "use_qalora is not understood",
        ),
        (
            lambda f: tiny.edit_json(
                f / "adapter_config.json", lambda c: c.update(init_lora_weights="mica")
            ),
            "mica",
        ),
        (
            lambda f: tiny.edit_json(
                f / "adapter_config.json", lambda c: c.update(auto_map={"x": "y"})
            ),
            "auto_map",
        ),
        (lambda f: tiny.truncate(f / "adapter_model.safetensors"), "is truncated"),
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
        load_adapter(tiny.build(), folder)


def test_adapter_with_tensors_left_over(copy_of):
    folder = copy_of("adapter")
    extra = {
        FIRST.replace("q_proj", "o_proj"): torch.ones(4, 32),
        FIRST.replace("q_proj.lora_A", "o_proj.lora_B"): torch.ones(32, 4),
    }
    change_adapter(lambda t: t.update(extra))(folder)
    with pytest.raises(DataError, match="has 2 tensors that this model has no place for"):
        load_adapter(tiny.build(), folder)
