"""Prompts that begin alike: the shared tokens are computed once and nothing else changes."""

import pytest
import tiny
import torch

from antidote_fast.data.batches import prompt_ids
from antidote_fast.evaluation import generate as module
from antidote_fast.evaluation.generate import generate
from antidote_fast.models.forwards import left_padded_cache, plain_cache

HEAD = "the user asks how to make a good cake and what is "
PROMPTS = [HEAD + rest for rest in ("two plus", "w40 w41 w42 w43", "three", "a", "w50 w51")]


def alone(model, tokenizer, prompts, count):
    """Greedy answers by whole forward passes, one prompt at a time, without a cache."""
    answers = []
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer)
        new = []
        while len(new) < count:
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixtral"])
@pytest.mark.parametrize("adapter", [False, True], ids=["model", "peft"])
def test_answers_are_those_of_each_prompt_alone(kind, adapter):
    tokenizer = tiny.tokenizer()
    model = tiny.build(kind)
    if adapter and kind == "mixtral":
        pytest.skip("one sort of model is enough")
    if adapter:
        model = tiny.add_lora(model)
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=3)
    handle.remove()
    assert answers == alone(model, tokenizer, PROMPTS, 6)
    assert any(answers)
    shared = len(HEAD.split())
    if not adapter:  # the first call of a batch is the shared tokens, once; the next what is left
        assert calls[0] == (1, shared)
        assert calls[1] == (3, 4)


def test_a_cache_of_another_kind_is_not_shared(monkeypatch):
    model = tiny.build()
    monkeypatch.setattr(module, "plain_cache", lambda output: None)
    whole = generate(model, tiny.tokenizer(), PROMPTS, max_new_tokens=6, batch_size=5)
    monkeypatch.undo()
    assert whole == generate(model, tiny.tokenizer(), PROMPTS, max_new_tokens=6, batch_size=5)
    model.config.sliding_window = 8
    sliding = tiny.build("mistral")
    sliding.config.sliding_window = 8
    output = sliding(input_ids=torch.arange(4, 16)[None], use_cache=True)
    assert plain_cache(output) is None


def test_shared_tokens_leave_one_of_each_prompt():
    assert module._num_shared([[1, 2, 3], [1, 2, 4]]) == 2
    assert module._num_shared([[1, 2], [1, 2, 4]]) == 1
    assert module._num_shared([[1, 2, 3], [1, 2, 3]]) == 2
    assert module._num_shared([[5, 2], [1, 2]]) == 0
    assert module._num_shared([[5], [5]]) == 0


def test_a_cache_that_is_passed_on_warns_of_no_name(recwarn):
    generate(tiny.build(), tiny.tokenizer(), PROMPTS, max_new_tokens=2, batch_size=5)
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


@pytest.mark.parametrize("pads", [[0, 2, 3], [5, 0]])
def test_a_left_padded_cache_is_that_of_a_left_padded_batch(pads):
    model = tiny.build()
    ids = torch.arange(10, 14)
    cache = left_padded_cache(plain_cache(model(input_ids=ids[None], use_cache=True)), pads)
    for row, pad in enumerate(pads):
        kept = max(4 - pad, 0)
        alone = plain_cache(model(input_ids=ids[None, : max(kept, 1)], use_cache=True))
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            for name in ("keys", "values"):
                states = getattr(layer, name)[row]
                assert states.shape[-2] == 4
                assert not states[:, : 4 - kept].any()
                found, wanted = states[:, 4 - kept :], getattr(expected, name)[0, :, :kept]
                torch.testing.assert_close(found, wanted)
