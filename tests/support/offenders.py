"""Adapters that would change their base, each with what its refusal says."""

import json
import types

import fleets
import tiny
import torch
from safetensors.torch import load_file, save_file

INTO_THE_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
_Q = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
_FOREIGN = {
    "embeddings": "base_model.model.model.embed_tokens.weight",
    "norm": "base_model.model.model.norm.weight",
    "wrapped": _Q,
    "stray": "base_model.model.model.another.weight",
}


def make(tmp_path_factory):
    """As :func:`fleets.make`, on a base with biases: adapters before and after, and offenders."""
    root = tmp_path_factory.mktemp("offenders")
    base = tiny.build("qwen2")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    tiny.save_model(base, root / "base")
    tensors = load_file(root / "base" / "model.safetensors")

    def save(name, seed, change=None, **options):
        model = tiny.build("qwen2")
        model.load_state_dict(tensors)
        model = tiny.add_lora(model, seed=seed, **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.mul_(-2)
        tiny.save_adapter(model, root / "adapters" / name, **(change or {}))

    save("before", 1)
    save("after", 2)
    says = {}
    for number, kind in enumerate(INTO_THE_BASE):
        real = kind.startswith("pissa") or kind == "olora"  # the others want data or packages
        options = {"init_lora_weights": kind} if real else {}
        change = {"init_lora_weights": kind} | ({"loftq_config": {}} if kind == "loftq" else {})
        save(kind, 3 + number, change, **options)
        says[kind] = f"init_lora_weights='{kind}' changes the base's own weights"
    for kind in ("all", "lora_only"):
        save(f"bias_{kind}", 9, bias=kind)
        says[f"bias_{kind}"] = f"bias='{kind}' replaces biases of the base"
    for kind, key in _FOREIGN.items():
        save(kind, 10)
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        value = 2 * tensors.get(name, torch.ones(3))
        path = root / "adapters" / kind / "adapter_model.safetensors"
        save_file(load_file(path) | {key: value}, path)
        says[kind] = f"holds '{key}'"
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, fleets.ROWS)))
    jobs = [{"adapter": "adapters/before"}]
    for kind in says:
        jobs.append({"adapter": f"adapters/{kind}"})
        jobs.append({"adapter": "adapters/after", "name": f"after_{kind}"})
    fleets.manifest(root, *jobs)
    return types.SimpleNamespace(
        root=root, base=root / "base", adapters=root / "adapters", says=says
    )


def check_fleet(folders, out, alone):
    """Each offender is set aside by name; what comes after it equals what ``prune`` makes alone."""
    for kind, says in folders.says.items():
        record = json.loads((out / "failed" / f"{kind}.json").read_text())
        assert says in record["reason"], record
        assert record["exit_code"] == 3
        assert not (out / kind).exists()
        assert fleets.weights_of(out / f"after_{kind}") == fleets.weights_of(alone / "after"), kind
    assert fleets.weights_of(out / "before") == fleets.weights_of(alone / "before")
