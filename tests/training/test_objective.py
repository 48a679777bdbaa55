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
