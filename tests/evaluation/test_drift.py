"""The harmful embedding drift against a plain computation."""

import pytest
import texts
import tiny
import torch

from antidote_fast.data.batches import collate
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.drift import embedding_drift
from antidote_fast.models.blocks import attention_modules


def drift_ref(model, reference, rows):
    """Row by row, without padding, from the modules' outputs."""
    total, per_token, tokens = 0.0, 0.0, 0
    for ids in rows:
        outputs = []
        for each in (model, reference):
            kept = []
            hooks = [
                m.register_forward_hook(
                    lambda m, a, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
                )
                for _, m in attention_modules(each)
            ]
            with torch.no_grad():
                each(input_ids=torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            outputs.append(kept)
        for ours, theirs in zip(*outputs, strict=True):
            difference = (ours - theirs).double().reshape(len(ids), -1)
            total += difference.norm().item()
            per_token += difference.norm(dim=1).sum().item()
        tokens += len(ids)
    return total, per_token / (tokens * len(kept))


ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_drift_equals_the_plain_computation(kind, batch_size):
    model, reference = tiny.build(kind, seed=0), tiny.build(kind, seed=1)
    model.train()
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": row} for row in ROWS]
    batches = [collate(rows[i : i + batch_size], tokenizer) for i in range(0, 3, batch_size)]
    found = embedding_drift(model, reference, batches)
    assert model.training
    total, per_token = drift_ref(model.eval(), reference, ROWS)
    assert found["embedding_drift_sum"] == pytest.approx(total, rel=1e-4)
    assert found["embedding_drift_per_token"] == pytest.approx(per_token, rel=1e-4)
    assert (found["num_layers"], found["num_sequences"], found["num_tokens"]) == (2, 3, 10)
    assert embedding_drift(reference, reference, batches)["embedding_drift_sum"] == 0
    assert not any(m._forward_hooks for m in model.modules())


def test_drift_of_an_adapter_against_its_own_base():
    base = tiny.build(seed=0)
    model = tiny.add_lora(tiny.build(seed=0))
    batches = [collate([{"input_ids": row} for row in ROWS], tiny.tokenizer())]
    own = embedding_drift(model, None, batches)
    assert own == embedding_drift(model, base, batches)
    assert own["embedding_drift_sum"] > 0
    with pytest.raises(UsageError, match="reference=None"):
        embedding_drift(base, None, batches)


def test_drift_refusals():
    batches = [collate([{"input_ids": [5, 6]}], tiny.tokenizer())]
    with pytest.raises(DataError, match="2 attention blocks here, 3 in reference"):
        embedding_drift(tiny.build(), tiny.build(layers=3), batches)
    with pytest.raises(DataError, match="no tokens"):
        embedding_drift(tiny.build(), tiny.build(), [])
    with pytest.raises(DataError, match="do not match"):
        embedding_drift(tiny.build(), texts.llama(hidden=64), batches)
    with pytest.raises(DataError, match="no attention modules found in Linear"):
        attention_modules(torch.nn.Linear(2, 2))
    broken = tiny.build()
    with torch.no_grad():
        broken.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        embedding_drift(broken, tiny.build(), batches)
