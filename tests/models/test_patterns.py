"""Patterns of other people's configs: what PEFT makes of them, in a time that is bounded."""

import json
import re
import shutil
import subprocess

import fleets
import peft
import pytest
import tiny
import torch
from fleets import weights_of
from peft.utils.other import get_pattern_key

from antidote_fast import DataError
from antidote_fast.cli import entry
from antidote_fast.errors import JobsSetAside
from antidote_fast.fleet import fleet
from antidote_fast.models import patterns
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model

EVIL = "(?:[^X]|[^Y])" * 28 + "Z"
SEEN = r"^(?!.*visual).*(?:q_proj|v_proj).*"
NAMES = [name for name, _ in tiny.build().named_modules() if name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.0.self_attn.q_proj",
        "self.attn.q_proj",
        r"^model\.layers\.(0|1|2)\.self_attn\.[qv]_proj$",
        r".*\.q_proj",
        r"layers\.\d+\.(?:mlp|attn)\.up(?:_proj)?",
        SEEN,
        r"(?:.*?(?:language|model).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.[\d]{1,}\.x)",
        r"(?:.*\.)*(?P<what>[qk])_proj(?<!k_proj)",
        "a)|(q_proj",
    ],
)
def test_matches_are_those_of_peft(pattern):
    ends = patterns.first_matches([pattern, ".*k_proj"], NAMES, "end", "rank_pattern", "a")
    for name in NAMES:
        expected = get_pattern_key([pattern, ".*k_proj"], name)
        assert ends.get(name, name) == expected
    if "a)" not in pattern:
        whole = patterns.first_matches([pattern], NAMES, "whole", "target_modules", "a")
        assert list(whole) == [name for name in NAMES if re.fullmatch(pattern, name)]


def test_many_plain_names_are_matched_apart():
    names = [f"model.layers.{i}.q_proj" for i in range(300)]
    found = patterns.first_matches(names, names, "end", "rank_pattern", "a")
    assert found == {name: name for name in names}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (EVIL, r"takes over 0\.1 s, or 1 GiB, to match with \d+ modules"),
        ("(", "is not a pattern"),
        (r"(\w+)\2", "is not a pattern"),
        ("*", "is not a pattern"),
        ("", "is not a pattern"),
        (7, "7 is not a pattern"),
        ("x" * 2000, "longer than 1024"),
        ("a\nb", "not printable"),
    ],
)
def test_patterns_that_are_refused(pattern, says, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(DataError, match=f"^there: rank_pattern: .*(?:{says})"):
        patterns.first_matches(["fine", pattern], NAMES, "end", "rank_pattern", "there")


FIELDS = {
    "rank_pattern": {EVIL: 4},
    "alpha_pattern": {EVIL: 8},
    "target_modules": EVIL,
    "exclude_modules": EVIL,
    "modules_to_save": [EVIL],
    "layers_pattern": [EVIL],
}


def hostile(folders, root):
    """Adapters with a pattern without end in each field, and one whose start never ends."""
    changes = {name: {name: value} for name, value in FIELDS.items()}
    changes["layers_pattern"]["layers_to_transform"] = [0]
    changes["pissa"] = {"init_lora_weights": "pissa_niter_1000000000"}
    for name, change in changes.items():
        shutil.copytree(folders.adapters / "plain", root / name)
        tiny.edit_json(root / name / "adapter_config.json", lambda c, new=change: c.update(new))
    return changes


def test_no_pattern_stops_a_job_or_a_fleet(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    names = list(hostile(folders, tmp_path / "bad"))
    words = ["--model_name_or_path", str(folders.base), "--output_dir", str(tmp_path / "out")]
    words += ["--dataset", str(folders.root / "harmful.jsonl"), "--ratio", "0.3"]
    for name in names:
        for more in ([], ["--dry_run"], ["--stream"], ["--score", "magnitude"]):
            adapter = ["--adapter", str(tmp_path / "bad" / name)]
            assert entry.main(["prune", *words, *adapter, *more]) == 3
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert ("init_lora_weights" if name == "pissa" else f"{name}: '(?:") in last
    assert not (tmp_path / "out").exists()
    jobs = [{"adapter": str(tmp_path / "bad" / name)} for name in names]
    jobs = [{"adapter": "adapters/plain", "name": "before"}, *jobs, {"adapter": "adapters/after"}]
    path = fleets.manifest(folders.root, *jobs, name="patterns.jsonl")
    with pytest.raises(JobsSetAside, match=f"{len(names)} of {len(jobs)} jobs"):
        fleet.run(fleets.config(folders, tmp_path / "fleet", path))
    for name in names:
        record = json.loads((tmp_path / "fleet" / "failed" / f"{name}.json").read_text())
        assert record["exit_code"] == 3
    fleets.as_prune(folders, "after", tmp_path / "alone")
    assert weights_of(tmp_path / "fleet" / "after") == weights_of(tmp_path / "alone")


def test_a_look_ahead_prunes_to_the_bytes_of_the_names(folders, tmp_path):
    live = tiny.add_lora(tiny.build(), target_modules=["q_proj", "v_proj"])
    tiny.save_adapter(live, tmp_path / "names")
    shutil.copytree(tmp_path / "names", tmp_path / "ahead")
    change = {"target_modules": SEEN, "exclude_modules": r".*\.visual\..*"}
    tiny.edit_json(tmp_path / "ahead" / "adapter_config.json", lambda c: c.update(change))
    outs = []
    for name in ("names", "ahead"):
        fleets.as_prune(folders, tmp_path / name, tmp_path / f"{name}-out")
        outs.append(weights_of(tmp_path / f"{name}-out"))
    assert outs[0] == outs[1]
    said = json.loads((tmp_path / "ahead-out" / "adapter_config.json").read_text())
    assert said["target_modules"] == SEEN


def test_patterns_load_as_peft_loads_them(folders, tmp_path):
    options = {
        "rank_pattern": {r"layers\.0\..*(?:q|k)_proj": 2, "v_proj": 3},
        "alpha_pattern": {r"(?!x).*\.1\..*v_proj": 3, "q_proj": 5},
        "target_modules": SEEN.replace("v_proj", "k_proj|v_proj"),
    }
    tiny.save_adapter(tiny.add_lora(tiny.build(), **options), tmp_path / "a")
    ours = load_adapter(load_model(folders.base), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "a").eval()
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            mine = ours.get_submodule(name)
            assert (mine.r, mine.lora_alpha) == (module.r, module.lora_alpha)
            assert mine.scaling == module.scaling
    ids = torch.arange(4, 12)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    mine, said = (m.peft_config["default"].to_dict() for m in (ours, theirs))
    assert mine == said


def test_a_fleet_pays_for_a_pattern_once(folders, tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def popen(*args, **options):
        started.append(args)
        return real(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    options = {"rank_pattern": {r"layers\.0\..*q_proj": 2}, "alpha_pattern": {r".*[k]_proj": 3}}
    counts = []
    for number in range(5):
        live = tiny.add_lora(tiny.build(), seed=number, **options)
        tiny.save_adapter(live, tmp_path / f"a{number}")
    for jobs in (1, 5):
        patterns._match_apart.cache_clear()
        started.clear()
        rows = [{"adapter": str(tmp_path / f"a{number}")} for number in range(jobs)]
        path = fleets.manifest(folders.root, *rows, name=f"once{jobs}.jsonl")
        fleet.run(fleets.config(folders, tmp_path / f"out{jobs}", path))
        counts.append(len(started))
    assert counts[0] == counts[1] > 0
