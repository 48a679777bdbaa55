"""Scores as they are declared, and one that a test adds with a module and a line."""

import json

import plain_prune
import pytest
import torch
import toy_scores

from antidote_fast import Evidence, Selection, prune_state_
from antidote_fast.cli import entry
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.config.scores import SCORES, Score
from antidote_fast.errors import UsageError
from antidote_fast.masks import load_masks
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.global_cut import find_cut
from antidote_fast.pruning.scores import score_module

SCOPES = ["row", "tensor", "global"]
PLACE = Score("place", "place in the matrix", own_matrix=True, module="toy_scores")
ROOT = Score("root", "|W| * root of the norm", needs_norms=True, module="toy_scores")


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """Both scores in the table, as two more lines would put them there."""
    for score in (PLACE, ROOT):
        monkeypatch.setitem(SCORES, score.name, score)


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"m.0.q_proj.weight": (5, 12), "m.1.q_proj.weight": (9, 7)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def norms():
    generator = torch.Generator().manual_seed(1)
    sums = {key: torch.rand(w.shape[1], generator=generator) for key, w in weights().items()}
    return ActivationNorms(sums, num_sequences=1, num_tokens=4)


def masks_of(evidence, selection):
    """The masks of a prune, which in global scope are also those of a weight at a time."""
    state = weights()
    report = prune_state_(state, evidence, selection, seed=3, return_masks=True)
    assert report.score == evidence.score
    masks = {key: mask.to_bool() for key, mask in report.masks.items()}
    assert all(
        torch.equal(state[key], w.masked_fill(masks[key], 0)) for key, w in weights().items()
    )
    if selection.scope == "global":
        cut = find_cut(list(state), weights().get, evidence, selection, seed=3)
        assert all(cut.mask(key, w) == report.masks[key] for key, w in weights().items())
    return masks


@pytest.mark.parametrize("name", SCORES)
def test_every_score_has_a_module_with_what_its_declaration_says(name):
    module = score_module(name)
    assert module.__doc__.startswith(f"Score {name}")
    assert hasattr(module, "row_scores") == SCORES[name].own_matrix
    assert hasattr(module, "channel_norm") != SCORES[name].own_matrix


@pytest.mark.parametrize("scope", SCOPES)
def test_a_matrix_of_its_own(scope):
    selection = Selection(0.3, scope=scope)
    scores = {
        key: toy_scores.row_scores(key, weight, None, 3)(0, len(weight))
        for key, weight in weights().items()
    }
    expected = plain_prune.masks(scores, None, selection)
    masks = masks_of(Evidence(score="place"), selection)
    assert all(torch.equal(masks[key], expected[key]) for key in expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_another_factor_of_the_input_channel(scope):
    selection = Selection(0.3, scope=scope)
    state, found = weights(), norms()
    scores = {key: w.abs() * found.act_norm(key, scope).sqrt() for key, w in state.items()}
    expected = plain_prune.masks(scores, None, selection)
    masks = masks_of(Evidence(found, "root"), selection)
    assert all(torch.equal(masks[key], expected[key]) for key in expected)
    with pytest.raises(UsageError, match="norms=None: must be given where score='root'"):
        prune_state_(state, Evidence(score="root"), selection)


def test_from_the_command_line(folders, tmp_path, capsys):
    words = ["prune", "--model_name_or_path", f"{folders}/model", "--output_dir"]
    words += [str(tmp_path / "out"), "--score", "place", "--seed", "3", "--save_masks"]
    assert entry.main([*words, "--dry_run"]) == 0
    assert entry.main(words) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["score"] == "place"
    for mask in load_masks(tmp_path / "out" / "masks.safetensors")[0].values():
        order = toy_scores.row_scores("", torch.empty(mask.shape), None, 3)(0, mask.shape[0])
        assert torch.equal(mask.to_bool(), plain_prune.masks({"": order}, None, Selection(0.1))[""])
    capsys.readouterr()
    assert entry.main([*words, "--preserve_dataset", "x"]) == 2
    assert "preserve_dataset='x': must be left out with score place" in capsys.readouterr().err
    assert entry.main(["prune", "--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert "{wanda,magnitude,random,gate,place,root}" in help_text
    assert "place = place in the matrix; root = |W| * root of the norm." in help_text


def test_what_configs_make_of_declarations():
    values = {"model_name_or_path": "m", "output_dir": "o"}
    with pytest.raises(UsageError, match="dataset=None: must be a file or hub name unless norms"):
        PruneConfig(**values, score="root")
    with pytest.raises(UsageError, match="score='owl': must be one of wanda, magnitude, random"):
        PruneConfig(**values, score="owl")
    with pytest.raises(UsageError, match=r"score='gate': must be one of wanda, .*random, place"):
        FleetConfig(**values, manifest="x", score="gate")
    assert FleetConfig(**values, manifest="x", score="place").score == "place"
