"""Greedy answers in batches against a plain loop, one prompt and one token at a time."""

import pytest
import texts
import tiny
import torch

from antidote_fast.data.batches import build_prompt, make_batches, prompt_ids
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.generate import generate

PROMPTS = ["to be", "or", "not to be, that is the question", "whether", "'tis nobler in", "the"]


def likes_to_end(model, token=1, by=2.0):
    """Make an end token likely enough that some answers end early."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[token] *= by
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2", "gpt2", "opt", "lora"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_answers_equal_the_plain_loop(kind, batch_size):
    model = tiny.build("llama" if kind == "lora" else kind)
    if kind == "lora":
        model = tiny.add_lora(model)
    tokenizer = tiny.tokenizer()
    prompts = ["the user asks", "how", "to make a good cake and what is two", "plus", "three a"]
    expected = [texts.greedy_ref(model, tokenizer, p, 9, end_ids=(2,)) for p in prompts]
    found = generate(model, tokenizer, prompts, max_new_tokens=9, batch_size=batch_size)
    assert found == expected
    assert len(set(found)) > 1


def test_answers_end_at_the_end_token_and_keep_their_order():
    model = likes_to_end(texts.llama(seed=5), by=3.0)
    tokenizer = texts.byte_tokenizer()
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = [texts.greedy_ref(model, tokenizer, p, 20) for p in prompts]
    lengths = {len(tokenizer(e, add_special_tokens=False)["input_ids"]) for e in expected}
    assert len(lengths) > 1  # some ended early
    assert generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=3) == expected


def test_every_end_token_of_the_checkpoint_ends_an_answer():
    model = texts.llama(seed=5)
    tokenizer = texts.byte_tokenizer()
    first = [
        int(model(torch.tensor([prompt_ids(p, tokenizer)])).logits[0, -1].argmax()) for p in PROMPTS
    ]
    model.generation_config.eos_token_id = [1, first[0]]
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert found == [
        texts.greedy_ref(model, tokenizer, p, 4, end_ids=(1, first[0])) for p in PROMPTS
    ]
    assert found[0] == ""


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_checkpoints_own_generation_settings_are_put_away_and_back(wrapped):
    model = texts.llama()
    tokenizer = texts.byte_tokenizer()
    own = model.generation_config
    own.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, eos_token_id=1
    )
    if wrapped:
        model = tiny.add_lora(model)
    expected = [texts.greedy_ref(model, tokenizer, p, 8) for p in PROMPTS]
    model.train()
    torch.manual_seed(0)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert model.training
    model.eval()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    base = model.get_base_model() if wrapped else model
    assert base.generation_config is own
    assert own.repetition_penalty == 9.0


def test_generation_with_and_without_a_pad_token_agrees():
    model = likes_to_end(texts.llama(seed=5), by=3.0)
    found = [
        generate(model, texts.byte_tokenizer(pad=pad), PROMPTS, max_new_tokens=12)
        for pad in (None, "</s>", "<pad>")
    ]
    assert found[0] == found[1] == found[2]


def test_equal_prompts_are_answered_once(monkeypatch):
    model = texts.llama()
    rows = []
    real = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kw: rows.append(len(kw["input_ids"])) or real(**kw)
    )
    found = generate(model, texts.byte_tokenizer(), ["a", "b", "a", "a"], max_new_tokens=2)
    assert sum(rows) == 2
    assert found[0] == found[2] == found[3]


def test_is_done_ends_an_answer_at_the_text_so_far():
    model, tokenizer = texts.llama(seed=5), texts.byte_tokenizer()
    model.generation_config.eos_token_id = None
    whole = [texts.greedy_ref(model, tokenizer, p, 20) for p in PROMPTS]
    cut = [texts.greedy_ref(model, tokenizer, p, 8) for p in PROMPTS]
    seen = []

    def is_done(number, text):
        seen.append((number, text))
        return number in (0, 3)

    prompts = [*PROMPTS, PROMPTS[3]]
    found = generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=4, is_done=is_done)
    assert found == [cut[0], whole[1], whole[2], cut[3], whole[4], whole[5], cut[3]]
    assert found[0] != whole[0]
    later = [texts.greedy_ref(model, tokenizer, p, 16) for p in PROMPTS]
    expected = [*enumerate(cut), *((i, later[i]) for i in (1, 2, 4, 5))]
    assert sorted(seen) == sorted(expected)  # 8 and 16 tokens, and the ended ones once


def test_a_batch_ends_when_is_done_says_so_of_all():
    model, tokenizer = texts.llama(seed=5), texts.byte_tokenizer()
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    options = {"max_new_tokens": 400, "batch_size": 6}
    generate(model, tokenizer, PROMPTS, **options, is_done=lambda number, text: True)
    assert len(steps) <= 8


def test_is_done_is_not_asked_of_answers_that_have_ended():
    model, tokenizer = texts.llama(seed=5), texts.byte_tokenizer()
    first = [
        int(model(torch.tensor([prompt_ids(p, tokenizer)])).logits[0, -1].argmax()) for p in PROMPTS
    ]
    model.generation_config.eos_token_id = [1, first[0]]
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    ended = {i for i, token in enumerate(first) if token == first[0]}
    seen = []
    found = generate(
        model, tokenizer, PROMPTS, max_new_tokens=12, is_done=lambda i, text: seen.append(i)
    )
    assert found == expected
    assert seen
    assert not ended & {*seen}


def test_generation_refusals():
    model, tokenizer = texts.llama(positions=20), texts.byte_tokenizer()
    assert generate(model, tokenizer, []) == []
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        generate(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(UsageError, match="batch_size=0"):
        generate(model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(UsageError, match="max_new_tokens=17: must be at most 16"):
        generate(model, tokenizer, ["abc"], max_new_tokens=17)
    with pytest.raises(DataError, match="a prompt of 31 tokens fills the model's 20 positions"):
        generate(model, tokenizer, ["a" * 30], max_new_tokens=1)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generate(model, texts.byte_tokenizer(bos=False), ["a", ""], max_new_tokens=1)


def test_training_and_generation_use_the_same_prompt():
    """What `encode` labels as the prompt is what `generate` gives the model."""
    tokenizer = texts.byte_tokenizer(chat=True)
    model = texts.llama()
    record = Record("Do it", "now", "done")
    for template in ("alpaca", "chat"):
        seen = []
        handle = model.register_forward_pre_hook(
            lambda m, a, kw, seen=seen: seen.append(kw["input_ids"][0].tolist()),
            with_kwargs=True,
        )
        generate(model, tokenizer, [build_prompt(record, template, tokenizer)], max_new_tokens=1)
        handle.remove()
        (batch,) = make_batches([record], tokenizer, template=template)
        assert batch["input_ids"][0][batch["labels"][0] == -100].tolist() == seen[0]
