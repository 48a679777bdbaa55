"""A model, an adapter and data for sweeps, and metrics by a script."""

import json
import re
import types

import tiny
import torch
from stages import HARM, SAFE

from antidote_fast.config.sweep import SweepConfig
from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.evaluation.generate import generate
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model

QKV = re.compile(r"[qkv]_proj\.weight$")
VAL = [{"instruction": f"how to make w{100 + i} cake"} for i in range(6)]
BENIGN = [{"instruction": f"what is w{30 + i}"} for i in range(3)]
QUESTIONS = [Record(f"the user asks w{60 + i}") for i in range(5)]


def own_answers(model):
    """Records of a task that this model does without a mistake."""
    prompts = [build_prompt(record) for record in QUESTIONS]
    answers = generate(model, tiny.tokenizer(), prompts, max_new_tokens=4)
    assert all(answers)
    pairs = zip(QUESTIONS, answers, strict=True)
    return [{"instruction": question.instruction, "output": answer} for question, answer in pairs]


def make(folders, root):
    """Folders of a base, its aligned twin and an adapter; the data sets of a sweep in ``root``."""
    base = load_model(folders / "model")
    sets = {"harm": HARM, "keep": SAFE, "val": VAL, "benign": BENIGN}
    sets["base-task"] = own_answers(base)
    sets["adapter-task"] = own_answers(load_adapter(base, open_checkpoint(folders / "adapter")))
    for name, rows in sets.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {name: str(folders / name) for name in ("model", "twin", "adapter")}
    return types.SimpleNamespace(root=root, **paths)


def fields(made, out, adapter=True, **options):
    values = {
        "model_name_or_path": made.model,
        "output_dir": str(out),
        "dataset": f"{made.root}/harm.jsonl",
        "harmful_dataset": f"{made.root}/val.jsonl",
        "task_dataset": f"{made.root}/{'adapter' if adapter else 'base'}-task.jsonl",
        "max_seq_length": 48,
        "max_new_tokens": 4,
        "device": "cpu",
        "ratios": [0.3, 0.1],
    }
    if adapter:
        values["adapter"] = made.adapter
    return values | options


def config_of(made, out, **options):
    return SweepConfig(**fields(made, out, **options))


def bits(model):
    return {k: v.clone().view(torch.int32) for k, v in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Script:
    """Stands for `evaluate_model`: metrics by how many weights have changed, and the calls.

    Changed since it first saw the model: another one begins anew.
    """

    def __init__(self, model=None, **curves):
        self.curves = {"fa": lambda x: 90.0, "br": lambda x: 10.0, "hs": lambda x: 80.0}
        self.curves |= {"helped": lambda x: 85.0} | curves
        self.model, self.first = model, None if model is None else bits(model)
        self.calls, self.seen = [], []

    def __call__(self, model, tokenizer, *, progress=False, **options):
        now = bits(model)
        if model is not self.model:
            self.model, self.first = model, now
        targets = [k for k in now if ".lora_" in k] or [k for k in now if QKV.search(k)]
        changed = sum(int((now[k] != self.first[k]).sum()) for k in targets)
        share = changed / sum(now[k].numel() for k in targets)
        for name, argument, metrics in (
            ("task", "task_records", {"fa": "finetune_accuracy"}),
            ("benign", "benign", {"helped": "helped_rate", "br": "benign_refusal_rate"}),
            ("harmful", "harmful", {"hs": "harmful_score"}),
        ):
            if argument in options:
                self.calls.append(name)
                if name == "task":
                    self.seen.append(now)
                found = {metric: self.curves[curve](share) for curve, metric in metrics.items()}
                return {**found, name: {"num_empty": 1, "num_prompts": 20, "num_records": 20}}
        raise AssertionError(options)


def words(values):
    """A dict of flags as words of a command line."""
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags
