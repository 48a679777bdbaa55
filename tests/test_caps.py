"""What a config of others may ask for: ranks, counts, patterns, nesting; refused at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from antidote_fast import checkpoint as ck
from antidote_fast.adapters import MAX_RANK
from antidote_fast.errors import DataError
from antidote_fast.patterns import problem_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [
        ("q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        (r"^model\.layers\.(0|1|2)\.self_attn\.[qv]_proj$", True),
        (r".*\.q_proj", True),
        (r"layers\.\d+\.(?:mlp|attn)\.up(?:_proj)?", True),
        (
            r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.[\d]{1,}\.x)",
            True,
        ),
        ("(a+)+$", False),
        ("(a|a)*$", False),
        ("(.*)*x", False),
        ("(?:a?){30}a{30}", False),
        ("a?" * 30 + "a" * 30, False),
        (".*" * 7, False),
        (r"(\w+)\1", False),
        ("(?=a)b", False),
        ("a**", False),
        ("(", False),
        ("x" * 2000, False),
        ("a\nb", False),
        (7, False),
    ],
)
def test_patterns_that_could_run_for_ever(pattern, fine):
    assert (problem_of(pattern, 6) is None) == fine


@pytest.mark.parametrize(
    "name",
    ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"],
)
def test_a_pattern_that_backtracks_reaches_nobody(copy_of, folders, name):
    folder = copy_of("adapter")
    evil = "(" + "[a-z]+" * 3 + ")+$"
    value = (
        {evil: 4} if name.endswith("_pattern") else [evil] if name == "modules_to_save" else evil
    )
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update({name: value}))
    with pytest.raises(DataError, match=rf"{name}.*repeats a group"):
        ck.load_adapter(tiny.build(), folder)
    with pytest.raises(DataError, match=rf"{name}.*repeats a group"):
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
