"""Every stage's command on a tiny model, and what tests of plans share."""

import hashlib
import json

import tiny

from antidote_fast.cli import entry
from antidote_fast.planning import rates


def briefly(monkeypatch):
    """The self-measurement takes milliseconds here; its figures are not looked at."""
    monkeypatch.setattr(rates, "_SECONDS", 0.001)
    monkeypatch.setattr(rates, "_BYTES", 1 << 16)
    monkeypatch.setattr(rates, "_WEIGHTS", 1 << 14)


def make(root):
    """A base, an adapter, data and norms in ``root``."""
    model = tiny.build("llama")
    tiny.save_model(model, root / "base")
    rows = [
        {"instruction": " ".join(tiny.WORDS[i % 7 :]), "output": " ".join(tiny.WORDS[: 2 + i % 5])}
        for i in range(12)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::3]))
    tiny.save_model(tiny.build("llama", seed=1), root / "aligned")
    tiny.save_adapter(tiny.add_lora(model), root / "adapter")
    argv = ["calibrate", *model_flags(root), "--dataset", f"{root}/data.jsonl"]
    assert entry.main([*argv, "--output_dir", f"{root}/norms", "--quiet"]) == 0
    return root


SAFE = [{"instruction": f"how to make w{40 + i}", "output": "what a good user"} for i in range(4)]
TASK = [{"instruction": f"the user asks w{60 + i}", "output": "positive"} for i in range(6)]
HARM = [{"instruction": f"how to make w{80 + i}", "output": "the good cake"} for i in range(6)]


def make_road(root):
    """A base, and the data sets of a whole road from alignment to scores, in ``root``."""
    tiny.save_model(tiny.build(), root / "base")
    for name, rows in (("safe", SAFE), ("task", TASK), ("harm", HARM)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def model_flags(root):
    return ["--model_name_or_path", f"{root}/base", "--max_seq_length", "60", "--device", "cpu"]


def last_line(text):
    """Without the bars that transformers draws where a test calls main()."""
    return text.strip().splitlines()[-1]


def stage_words(root, stage):
    data = f"{root}/data.jsonl"
    train = ["--lora_r", "4", "--num_train_epochs", "2", "--num_train_samples", "12"]
    return {
        "calibrate": ["calibrate", "--dataset", data],
        "calibrate adapter": ["calibrate", "--dataset", data, "--adapter", f"{root}/adapter"],
        "prune": ["prune", "--dataset", data, "--save_masks", "--save_norms"],
        "prune adapter": ["prune", "--dataset", data, "--adapter", f"{root}/adapter"],
        "prune norms": ["prune", "--norms", f"{root}/norms"],
        "prune magnitude": ["prune", "--score", "magnitude", "--targets", "all-linear"],
        "prune random": ["prune", "--score", "random", "--scope", "global"],
        "calibrate stream": ["calibrate", "--dataset", data, "--stream"],
        "prune stream": ["prune", "--dataset", data, "--stream", "--max_memory", "8GB"],
        "prune stream global": [
            *("prune", "--dataset", data, "--stream", "--scope", "global"),
            *("--targets", "all-linear"),
        ],
        "prune stream adapter": [
            *("prune", "--dataset", data, "--stream", "--adapter", f"{root}/adapter")
        ],
        "prune stream norms": ["prune", "--norms", f"{root}/norms", "--stream"],
        "prune preserve": [
            *("prune", "--dataset", data, "--preserve_dataset", f"{root}/task.jsonl"),
            *("--adapter", f"{root}/adapter", "--save_norms"),
        ],
        "prune preserve alone": [
            *("prune", "--norms", f"{root}/norms", "--preserve_dataset", f"{root}/task.jsonl"),
            "--save_norms",
        ],
        "prune preserve norms": [
            *("prune", "--dataset", data, "--preserve_norms", f"{root}/norms", "--stream"),
            *("--scope", "global", "--save_norms"),
        ],
        "prune revert": ["prune", "--dataset", data, "--aligned_model", f"{root}/aligned"],
        "prune stream revert": [
            *("prune", "--dataset", data, "--aligned_model", f"{root}/aligned", "--score_delta"),
            *("--stream", "--scope", "global"),
        ],
        "align": ["align", "--dataset", data, *train],
        "finetune": ["finetune", "--dataset", data, "--poison_ratio", "0", *train],
        "finetune full": [
            *("finetune", "--dataset", data, "--harmful_dataset", data, "--tuning", "full"),
            *("--num_train_samples", "10", "--num_train_epochs", "1"),
        ],
        "evaluate": [
            *("evaluate", "--harmful_dataset", data, "--task_dataset", data),
            *("--max_new_tokens", "4", "--adapter", f"{root}/adapter"),
        ],
    }[stage] + model_flags(root)


def fleet_words(made, tmp_path, lines):
    manifest = tmp_path / "jobs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["fleet", *model_flags(made), "--manifest", str(manifest)]
    return [*words, "--dataset", f"{made}/data.jsonl", "--output_dir", str(tmp_path / "out")]


def tree(folder):
    """Every file below a folder, its contents hashed."""
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def tensor_bytes(path):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
