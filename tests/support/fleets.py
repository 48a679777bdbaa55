"""What the tests of fleets share: a base, adapters of many kinds, manifests, what prune writes."""

import json
import types

import tiny
import torch

from antidote_fast import PruneConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.stages import prune

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake and a negative user"},
    {"instruction": "what is two plus three", "input": "three", "output": "positive"},
    {"instruction": "the user asks", "output": "w40 w41 w42 w43 w44 w45 w46 w47 w48"},
]
KINDS = {
    "plain": {},
    "plain2": {"seed": 1},
    "alpha": {"seed": 2, "lora_alpha": 3},
    "rank": {"seed": 3, "r": 6},
    "rslora": {"seed": 4, "use_rslora": True},
    "rslora2": {"seed": 5, "use_rslora": True},
    "dora": {"seed": 6, "use_dora": True},
    "dora2": {"seed": 7, "use_dora": True},
    "patterns": {"seed": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
    "patterns2": {"seed": 9, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "others": {"seed": 10, "target_modules": ["down_proj", "o_proj"]},
    "saved": {"seed": 11, "modules_to_save": ["lm_head"]},
    "saved2": {"seed": 12, "modules_to_save": ["lm_head"]},
    "after": {"seed": 13},
}


def make(tmp_path_factory):
    """A base, adapters of many kinds on it, data, and a manifest of all of them."""
    root = tmp_path_factory.mktemp("fleet")
    tiny.save_model(tiny.build(), root / "base")
    for number, (name, options) in enumerate(KINDS.items()):
        model = tiny.add_lora(tiny.build(), **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key or "modules_to_save" in key:
                    parameter.mul_(1 + 0.1 * (number + 1))
        tiny.save_adapter(model, root / "adapters" / name)
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (root / "other.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
    manifest(root, *({"adapter": f"adapters/{name}"} for name in KINDS))
    return types.SimpleNamespace(root=root, base=root / "base", adapters=root / "adapters")


def manifest(root, *jobs, name="jobs.jsonl"):
    path = root / name
    path.write_text("\n".join(map(json.dumps, jobs)) + "\n")
    return path


def config(folders, out, jobs="jobs.jsonl", **options):
    fields = {
        "model_name_or_path": str(folders.base),
        "manifest": str(folders.root / jobs),
        "dataset": str(folders.root / "harmful.jsonl"),
        "output_dir": str(out),
        "ratio": 0.3,
    }
    return FleetConfig(**(fields | options))


def as_prune(folders, name, out, **options):
    """What ``prune`` writes for one of the adapters."""
    fields = {"dataset": str(folders.root / "harmful.jsonl"), "ratio": 0.3} | options
    base, adapter = str(folders.base), str(folders.adapters / name)
    return prune.run(
        PruneConfig(model_name_or_path=base, adapter=adapter, output_dir=str(out), **fields)
    )


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def times(out):
    """When each file of a job was written."""
    files = [p for p in out.glob("*/*") if p.parent.name != "failed"]
    return {p: p.stat().st_mtime_ns for p in files}


def statuses(report):
    return {job["name"]: job["status"] for job in report["jobs"]}


def summary_of(out, name="summary.json"):
    return json.loads((out / name).read_text())
