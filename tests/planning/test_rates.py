"""The short measurement behind a plan: every kind of model can be tried, and nothing is left."""

import math
import types

import pytest
import stages
import tiny
import torch

from antidote_fast.config.train import TrainConfig
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.planning import cost, rates
from antidote_fast.selection import Selection
from antidote_fast.training import sft

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    stages.briefly(monkeypatch)


def cost_of(kind, folder, dtype="auto", adapt=None):
    tiny.save_model(tiny.build(kind, layers=3), folder)
    config = types.SimpleNamespace(dtype=dtype, trust_remote_code=False)
    return cost.cost_of(config, open_checkpoint(folder), adapt)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixtral", "qwen3_moe"])
def test_two_blocks_of_every_kind_of_model_run(kind, tmp_path):
    cost = cost_of(kind, tmp_path, "bfloat16")
    model, small = rates._two_blocks(cost, CPU)
    assert small.config.num_hidden_layers == 2
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.dtype == small.dtype == torch.bfloat16
    per_layer = {c.forward.square / c.config.num_hidden_layers for c in (small, cost)}
    assert len(per_layer) == 1
    rate = rates._model_rate(model, small, 4, 16, False)
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_blocks_are_trained(frozen, dtype, tmp_path):
    config = TrainConfig(model_name_or_path=str(tmp_path), output_dir="out", lora_r=4)
    adapt = (lambda model: sft.add_lora(model, config)) if frozen else None
    cost = cost_of("llama", tmp_path, dtype, adapt)
    model, small = rates._two_blocks(cost, CPU, True, adapt)
    rates._model_rate(model, small, 2, 8, True)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not frozen or "lora" in name), name


def test_a_large_batch_is_tried_in_part(tmp_path, monkeypatch):
    cost = cost_of("llama", tmp_path)
    model, small = rates._two_blocks(cost, CPU)
    seen = []
    real = rates._turn

    def turn(model, dtype, ids, trains):
        seen.append(tuple(ids.shape))
        return real(model, dtype, ids, trains)

    monkeypatch.setattr(rates, "_turn", turn)
    monkeypatch.setattr(rates, "_FLOPS", 1)
    rates._model_rate(model, small, 8, 32, False)
    assert seen[0] == (1, 8)
    assert all(batch * length <= 8 * 32 for batch, length in seen)


def test_a_model_that_cannot_be_made_is_told_by_a_product(tmp_path, monkeypatch):
    cost = cost_of("llama", tmp_path)
    monkeypatch.setattr(rates, "_two_blocks", lambda *args: 1 / 0)
    assert rates.block_rate(cost, CPU, (2, 8)) > 0
    monkeypatch.setattr(rates, "_two_blocks", lambda *args: None)
    assert rates.block_rate(cost, CPU, (2, 8)) > 0


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_rates_are_numbers_and_nothing_is_left(scope, tmp_path):
    tiny.save_model(tiny.build(), tmp_path / "base")
    before = stages.tree(tmp_path)
    selection = Selection(0.1, scope=scope)
    measured = (
        rates.read_rate(tmp_path / "base" / "model.safetensors"),
        rates.write_rate(tmp_path / "not" / "there"),
        rates.prune_rate(CPU, torch.float32, 32, selection, "reference"),
    )
    assert all(math.isfinite(rate) and rate > 0 for rate in measured)
    assert stages.tree(tmp_path) == before
