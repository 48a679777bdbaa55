"""Adapters as PEFT and others save them are taken, in a fleet and alone, and give the same bytes.

Embeddings, output layers and tied ones are where their files differ most from plain LoRA's.
"""

import json

import fleets
import peft
import pytest
import tiny
import torch

from antidote_fast.errors import DataError
from antidote_fast.fleet import fleet

QKV = ["q_proj", "k_proj", "v_proj"]
SAVES_EMBEDDINGS = ("tokens saved", "embedding", "linear saved")
KINDS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "tokens saved": {"trainable_token_indices": [1, 5]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "linear": {"target_modules": "all-linear"},
    "linear saved": {"target_modules": "all-linear"},
    "less": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "ahead": {"target_modules": r"^(?!.*visual).*(?:q_proj|v_proj).*"},
    "layers": {"target_modules": QKV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "orthogonal": {"init_lora_weights": "orthogonal", "lora_alpha": 7.5},
}
EXTRA = {  # of other tools, other releases of PEFT, and fields that say nothing
    "unsloth_fixed": True,
    "inference_mode": False,
    "base_model_name_or_path": "unsloth/some-base-bnb-4bit",
    "peft_version": "0.99.0",
    "corda_config": None,
    "eva_config": {"rho": 2.0, "tau": 0.99},
    "init_lora_weights": "eva",
    "qalora_group_size": 16,
    "layer_replication": [],
}


@pytest.mark.parametrize("base", ["llama", "llama_tied"])
def test_adapters_that_people_have(base, tmp_path):
    tiny.save_model(tiny.build(base), tmp_path / "base")
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, fleets.ROWS)))
    folders = type("Folders", (), {"root": tmp_path, "base": tmp_path / "base"})
    folders.adapters = tmp_path / "adapters"
    jobs = []
    for number, (kind, options) in enumerate({**KINDS, "extra": {}}.items()):
        name = kind.replace(" ", "-")
        model = tiny.add_lora(tiny.build(base), seed=number, **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key or "trainable_tokens_delta" in key:
                    parameter.mul_(1.3)
        model.save_pretrained(
            folders.adapters / name, save_embedding_layers=kind in SAVES_EMBEDDINGS
        )
        if kind == "extra":
            path = folders.adapters / name / "adapter_config.json"
            tiny.edit_json(path, lambda c: c.update(EXTRA))
        jobs.append({"adapter": f"adapters/{name}"})
    fleets.manifest(tmp_path, *jobs)
    report = fleet.run(fleets.config(folders, tmp_path / "out"))
    assert report["counts"]["done"] == len(jobs)
    for name in ("embedding", "head", "tokens-saved", "tied"):
        fleets.as_prune(folders, name, tmp_path / "alone" / name)
        alone, here = (fleets.weights_of(tmp_path / p / name) for p in ("alone", "out"))
        assert alone == here, name
        peft.PeftModel.from_pretrained(tiny.build(base), tmp_path / "out" / name)


def test_a_head_that_is_not_tied_is_not_replaced(tmp_path):
    """ensure_weight_tying says nothing of a base whose two are apart."""
    tiny.save_model(tiny.build(), tmp_path / "base")
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, fleets.ROWS)))
    model = tiny.add_lora(
        tiny.build("llama_tied"), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    tiny.save_adapter(model, tmp_path / "adapters" / "tied")
    folders = type("Folders", (), {"root": tmp_path, "base": tmp_path / "base"})
    folders.adapters = tmp_path / "adapters"
    with pytest.raises(DataError, match=r"holds 'base_model.model.lm_head.weight' with other"):
        fleets.as_prune(folders, "tied", tmp_path / "out")
