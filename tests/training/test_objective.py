"""The loss of responses with shared prompts: the same loss and gradients, fewer tokens."""

import pytest
import tiny
import torch

from antidote_fast.training import objective
from antidote_fast.training.objective import response_logits, response_loss


def batch_of(shared, rows=4, length=22):
    """Rows that begin with the same ``shared`` tokens; one of them is shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared] = torch.arange(rows)  # and no token more
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, : length - 8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, batch, **options):
    model.zero_grad()
    with response_logits(model) as choose:
        loss = response_loss(model, batch, choose, **options)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("shared", [12, 3, 0])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_shared_prefix_changes_no_gradient(arch, shared):
    model = tiny.build(arch).double().eval()
    batch = batch_of(shared)
    loss, expected = gradients(model, batch)
    found, shared_gradients = gradients(model, batch, share_prefix=True)
    assert found == pytest.approx(loss, rel=1e-6)
    assert shared_gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_prefix_goes_through_once():
    model = tiny.build().eval()
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape))
    )
    gradients(model, batch_of(12), share_prefix=True)
    handle.remove()
    assert seen == [(1, 12), (4, 10)]


def test_another_cache_gets_the_whole_batch(monkeypatch):
    model = tiny.build().eval()
    monkeypatch.setattr(objective, "plain_cache", lambda output: None)
    batch = batch_of(12)
    assert gradients(model, batch, share_prefix=True)[0] == gradients(model, batch)[0]


def test_prompts_that_are_all_alike_keep_what_predicts_their_responses():
    model = tiny.build().double().eval()
    batch = {name: value[:1].repeat(3, 1) for name, value in batch_of(12).items()}
    loss, expected = gradients(model, batch)
    found, shared = gradients(model, batch, share_prefix=True)
    assert found == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5)


def test_longrope_gets_the_whole_batch_where_it_is_long():
    """The shared tokens alone would have the frequencies of a short text."""
    import transformers

    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        original_max_position_embeddings=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    found = gradients(model, batch_of(12), share_prefix=True)[0]
    assert found == pytest.approx(gradients(model, batch_of(12))[0], rel=1e-6)


def test_the_cache_goes_by_its_name_of_today(recwarn):
    gradients(tiny.build(), batch_of(12), share_prefix=True)
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]
