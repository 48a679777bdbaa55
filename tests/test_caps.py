"""What a config of others may ask for: ranks, counts, patterns, nesting; refused at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from antidote_fast import checkpoint as ck
from antidote_fast import patterns
from antidote_fast.adapter_config import MAX_RANK
from antidote_fast.errors import DataError

ROOT = Path(__file__).parents[1]


EVIL = "(?:[^X]|[^Y])" * 28 + "Z"
FIELDS = {
    "rank_pattern": {EVIL: 4},
    "alpha_pattern": {EVIL: 8},
    "target_modules": EVIL,
    "exclude_modules": EVIL,
    "modules_to_save": [EVIL],
    "layers_pattern": [EVIL],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_pattern_that_backtracks_reaches_nobody(copy_of, folders, name, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    folder = copy_of("adapter")
    change = {name: FIELDS[name]}
    if name == "layers_pattern":
        change["layers_to_transform"] = [0]
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update(change))
    says = rf"{name}: '\(\?:.*" + (
        "is not a module's name" if name == "modules_to_save" else r"takes over 0\.1 s"
    )
    with pytest.raises(DataError, match=says) as refused:
        ck.load_adapter(tiny.build(), folder)
    assert len(str(refused.value)) < len(str(folder)) + 220
    with pytest.raises(DataError, match=says):
        ck.check_adapter(ck.open_checkpoint(folder), ck.open_checkpoint(folders / "model"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": MAX_RANK + 1}, "rank 4097: must be an integer from 1 to 4096"),
        ({"r": True}, "rank True: must be"),
        ({"r": 4.0}, r"rank 4\.0: must be"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank 1000000000000: must be"),
        ({"rank_pattern": {f"m{i}": 4 for i in range(3000)}}, "must hold at most 2048"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dict, not list"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must hold"),
        ({"rank_pattern": {f"m{i}": i + 1 for i in range(300)}}, "at most 256 different values"),
        ({"modules_to_save": [f"m{i}" for i in range(65)]}, "must hold at most 64 names"),
        ({"lora_alpha": float("nan")}, "alpha nan: must be a number of at most 1048576"),
        ({"lora_alpha": 10**400}, "alpha 1000.*: must be a number of at most"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha '8': must be a number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0: must be at least 0 and less than 1"),
        ({"layers_to_transform": list(range(3000))}, "layers_to_transform must hold at most 2048"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform: 0\.5 is not a number"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: -1 is not a number"),
        ({"use_dora": "yes"}, "use_dora='yes': must be true or false"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "changes the base's own weights"),
        ({"init_lora_weights": 7}, "init_lora_weights=7: must be true, false, gaussian"),
        ({"target_modules": "a" * 1025}, "longer than 1024 characters"),
        ({"target_modules": "a\nb"}, "not printable"),
        ({"target_modules": ".*", "layers_pattern": "layers"}, "layers_pattern: must be left out"),
    ],
)
def test_caps_of_an_adapters_config(copy_of, change, says):
    folder = copy_of("adapter")
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(DataError, match=says):
        ck.load_adapter(tiny.build(), folder)


def test_caps_of_a_model(copy_of):
    folder = copy_of("model")
    tiny.edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=10**6))
    with pytest.raises(DataError, match="num_hidden_layers=1000000, and it holds 21 tensors"):
        ck.load_model(folder)


def test_a_config_file_of_aliases_of_aliases(tmp_path):
    """Written out it would hold 2 ** 40 values; a process of its own has ten seconds for it."""
    lines = ["l0: &l0 [x, x]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 40)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "antidote_fast", "prune", "--config", "bomb.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "more than 10 aliases" in done.stderr
    assert done.stderr.count("\n") == 1
