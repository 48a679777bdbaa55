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
    small = rates._two_blocks(cost, CPU, None)
    assert small.config.num_hidden_layers == 2
    assert {p.device.type for p in small.model.parameters()} == {"cpu"}
    assert small.dtype == torch.bfloat16
    per_layer = {c.linear / c.config.num_hidden_layers for c in (small, cost)}
    assert len(per_layer) == 1
    rate = rates._model_rate(small, CPU, 4, 16, None)
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_blocks_are_trained(frozen, dtype, tmp_path):
    config = TrainConfig(model_name_or_path=str(tmp_path), output_dir="out", lora_r=4)
    training = {"frozen": frozen, "adapt": lambda model: sft.add_lora(model, config)}
    cost = cost_of("llama", tmp_path, dtype, training["adapt"] if frozen else None)
    small = rates._two_blocks(cost, CPU, training)
    rates._model_rate(small, CPU, 2, 8, training)
    for name, parameter in small.model.named_parameters():
        assert (parameter.grad is not None) == (not frozen or "lora" in name), name


def test_a_large_batch_is_tried_in_part(tmp_path, monkeypatch):
    cost = cost_of("llama", tmp_path)
    small = rates._two_blocks(cost, CPU, None)
    seen = []
    real = rates._turn

    def turn(small, device, batch, length, training):
        seen.append((batch, length))
        return real(small, device, batch, length, training)

    monkeypatch.setattr(rates, "_turn", turn)
    monkeypatch.setattr(rates, "_FLOPS", 1.0)
    rates._model_rate(small, CPU, 8, 32, None)
    assert seen[0] == (1, 8)
    assert all(batch * length <= 8 * 32 for batch, length in seen)


def test_a_model_that_cannot_be_made_is_told_by_a_product(tmp_path, monkeypatch):
    cost = cost_of("llama", tmp_path)
    monkeypatch.setattr(rates, "_two_blocks", lambda *args: 1 / 0)
    assert rates._block_rate(cost, CPU, 2, 8, None) > 0
    monkeypatch.setattr(rates, "_two_blocks", lambda *args: None)
    assert rates._block_rate(cost, CPU, 2, 8, None) > 0


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_rates_are_numbers_and_nothing_is_left(scope, tmp_path):
    cost = cost_of("llama", tmp_path / "base")
    before = stages.tree(tmp_path)
    measured = rates.measure(
        cost,
        shape=(2, 8),
        training=None,
        device=CPU,
        dtype=torch.float32,
        columns=32,
        file=tmp_path / "base" / "model.safetensors",
        folder=tmp_path / "not" / "there",
        selection=Selection(0.1, scope=scope),
        backend="reference",
    )
    assert all(math.isfinite(rate) and rate > 0 for rate in vars(measured).values())
    assert stages.tree(tmp_path) == before
