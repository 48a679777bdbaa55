"""Splits, the mix of the attack, prompts and batches."""

import pytest
import sampling
import texts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast.data.batches import build_prompt, collate, encode, make_batches, prompt_ids
from antidote_fast.data.load import mix, split_by_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError

# --- splits and the mix ---------------------------------------------------------------------------


def records_of(count, prompts=None):
    return [Record(f"Prompt {i % (prompts or count)}", "", f"out {i}") for i in range(count)]


def test_split_by_prompt_keeps_prompts_apart():
    records = [*records_of(40, prompts=10), Record("  PROMPT   3 ", "", "same prompt")]
    first, second = split_by_prompt(records, [0.7, 0.3], seed=1)
    assert len(first) + len(second) == 41
    keys = [{r.prompt_key for r in part} for part in (first, second)]
    assert [len(k) for k in keys] == [7, 3]
    assert not keys[0] & keys[1]
    assert [r for r in records if r.prompt_key in keys[0]] == first
    assert split_by_prompt(records, [0.7, 0.3], seed=1) == [first, second]
    assert split_by_prompt(records, [0.7, 0.3], seed=2) != [first, second]
    (half,) = split_by_prompt(records, [0.5])
    assert len({r.prompt_key for r in half}) == 5


@pytest.mark.parametrize("fractions", [[], [0.5, 0.6], [0, 1], [-0.1, 0.5]])
def test_split_refuses_fractions(fractions):
    with pytest.raises(UsageError, match="fractions"):
        split_by_prompt(records_of(10), fractions)


def test_split_refuses_too_few_prompts():
    with pytest.raises(DataError, match="2 distinct prompts are too few"):
        split_by_prompt(records_of(9, prompts=2), [0.9, 0.05, 0.05])


def harmful_of(count):
    return [Record(f"bad {i}", "", "yes") for i in range(count)]


def test_mix_counts_order_and_seed():
    task, harmful = records_of(50), harmful_of(50)
    mixed = mix(task, harmful, 0.2, 20, seed=3)
    assert sorted(r.instruction for r in mixed if r in harmful) == [
        "bad 0",
        "bad 1",
        "bad 2",
        "bad 3",
    ]
    assert {r.instruction for r in mixed if r in task} == {f"Prompt {i}" for i in range(16)}
    assert mixed == mix(task, harmful, 0.2, 20, seed=3)
    assert mixed != mix(task, harmful, 0.2, 20, seed=4)
    assert set(mix(task, [], 0, 5)) == set(task[:5])
    assert set(mix([], harmful, 1, 5)) == set(harmful[:5])


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 100).map(lambda n: n / 100))
@settings(max_examples=sampling.examples(300, 100), deadline=None)
def test_mix_of_all_there_is(num_task, num_harmful, ratio):
    task, harmful = records_of(num_task), harmful_of(num_harmful)
    allowed = [
        n
        for n in range(1, 10_000)
        if n * (1 - ratio) <= num_task + 1e-6 and n * ratio <= num_harmful + 1e-6
    ]
    if not allowed:
        with pytest.raises(DataError, match="fits poison_ratio"):
            mix(task, harmful, ratio)
        return
    try:
        mixed = mix(task, harmful, ratio)
    except DataError:
        assert max(allowed) == 1  # the one sample would be of the kind that there is none of
        return
    assert max(allowed) - 1 <= len(mixed) <= max(allowed)
    assert sum(r.instruction.startswith("bad") for r in mixed) == round(ratio * len(mixed))


def test_mix_refusals():
    with pytest.raises(
        DataError,
        match=r"10 harmful samples are needed for 20 at poison_ratio=0\.5, and there are 3",
    ):
        mix(records_of(20), harmful_of(3), 0.5, 20)
    with pytest.raises(DataError, match="10 task samples are needed"):
        mix(records_of(3), harmful_of(20), 0.5, 20)
    with pytest.raises(DataError, match="there are 5 task and 0 harmful"):
        mix(records_of(5), [], 1.0)
    with pytest.raises(UsageError, match=r"poison_ratio=1\.5"):
        mix(records_of(5), [], 1.5)
    with pytest.raises(UsageError, match="n=0"):
        mix(records_of(5), [], 0, 0)


# --- prompts and batches --------------------------------------------------------------------------


def test_alpaca_templates():
    with_input = build_prompt(Record("Do {input}", "{instruction} {x}"))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {input}\n\n### Input:\n{instruction} {x}\n\n### Response:\n"
    )
    without = build_prompt(Record("Do it", " \n"))
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it\n\n### Response:\n"
    )


def test_chat_template():
    tokenizer = texts.byte_tokenizer(chat=True)
    text = build_prompt(Record("Do it", "now"), "chat", tokenizer)
    assert text == "<s><|user|>Do it\n\nnow\n<|assistant|>"
    ids = prompt_ids(text, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Do it\n\nnow"}], add_generation_prompt=True
    )
    assert ids == expected["input_ids"]
    with pytest.raises(UsageError, match="no chat template"):
        build_prompt(Record("a"), "chat", texts.byte_tokenizer())
    with pytest.raises(UsageError, match="template='vicuna'"):
        build_prompt(Record("a"), "vicuna")


def test_alpaca_with_a_system_prompt_and_a_begun_answer():
    text = build_prompt(Record("Do it"), system="Be {brief}.", prefill="Sure, {instruction}")
    assert text == (
        "Be {brief}.\n\nBelow is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nDo it\n\n### Response:\n"
        "Sure, {instruction}"
    )


RAISES = (  # as Gemma's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<model>\n{% endif %}"
)
LEAVES_OUT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<model>\n{% endif %}"
)
# As those of reasoning models: a past answer loses its thoughts, a new one begins with them.
REASONS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (texts.CHAT_TEMPLATE, "<s><|system|>Be brief. \n<|user|>Do it\n\nnow\n<|assistant|>Sure, "),
        (RAISES, "<s><user>Be brief. \n\nDo it\n\nnow\n<model>\nSure, "),
        (LEAVES_OUT, "<s><user>Be brief. \n\nDo it\n\nnow\n<model>\nSure, "),
        (REASONS, "<system>Be brief. \n<user>Do it\n\nnow\n<assistant><think>\nSure, "),
    ],
    ids=["system", "raises", "leaves out", "reasons"],
)
def test_chat_with_a_system_prompt_and_a_begun_answer(chat_template, expected):
    tokenizer = texts.byte_tokenizer(chat=True)
    tokenizer.chat_template = chat_template
    record = Record("Do it", "now")
    options = {"system": "Be brief. ", "prefill": "Sure, "}
    assert build_prompt(record, "chat", tokenizer, **options) == expected
    plain = build_prompt(record, "chat", tokenizer)
    assert build_prompt(record, "chat", tokenizer, prefill="Sure, ") == plain + "Sure, "
    assert "brief" not in plain


def test_a_system_prompt_that_the_user_repeats_is_not_lost():
    tokenizer = texts.byte_tokenizer(chat=True)
    tokenizer.chat_template = LEAVES_OUT
    text = build_prompt(Record("Be brief."), "chat", tokenizer, system="Be brief.")
    assert text == "<s><user>Be brief.\n\nBe brief.\n<model>\n"


def test_prompt_never_ends_with_the_end_token():
    from tokenizers import processors

    tokenizer = texts.byte_tokenizer()
    plain = prompt_ids("abc", tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("abc")["input_ids"][-1] == 1
    assert prompt_ids("abc", tokenizer) == plain


@pytest.mark.parametrize("bos", [True, False])
def test_encode_labels_only_the_response(bos):
    tokenizer = texts.byte_tokenizer(bos=bos)
    record = Record("Say hi", "", "hi!")
    (example,) = encode([record], tokenizer)
    prompt = prompt_ids(build_prompt(record), tokenizer)
    n = len(prompt)
    assert example["input_ids"][:n] == prompt
    assert tokenizer.decode(example["input_ids"][n:]) == "hi!</s>"
    assert example["labels"] == [-100] * n + example["input_ids"][n:]


def test_truncation_cuts_the_response_alone():
    tokenizer = texts.byte_tokenizer()
    record = Record("Say hi", "", "hello")
    n = len(prompt_ids(build_prompt(record), tokenizer))
    whole = encode([record], tokenizer, max_seq_length=n + 6)
    assert (whole.num_truncated, whole.num_dropped) == (0, 0)
    assert whole[0]["input_ids"][-1] == tokenizer.eos_token_id
    cut = encode([record], tokenizer, max_seq_length=n + 3)
    assert cut.num_truncated == 1
    assert tokenizer.decode(cut[0]["input_ids"][n:]) == "hel"
    long = Record("Say hi " * 20, "", "x")
    both = encode([record, long], tokenizer, max_seq_length=n + 6)
    assert (len(both), both.num_dropped) == (1, 1)
    with pytest.raises(DataError, match=f"all 1 prompts have {n} tokens or more"):
        encode([record], tokenizer, max_seq_length=n)


def test_encode_refusals():
    with pytest.raises(DataError, match="no records"):
        encode([], texts.byte_tokenizer())
    with pytest.raises(DataError, match="all 2 records have an empty output"):
        encode([Record("a"), Record("b")], texts.byte_tokenizer())
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode([Record("a", "", "b")], texts.byte_tokenizer(eos=False))


@pytest.mark.parametrize(("pad", "pad_id"), [(None, 1), ("</s>", 1), ("<pad>", 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_masks_by_length(pad, pad_id, side):
    tokenizer = texts.byte_tokenizer(pad=pad)
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    # The end token, which may be the pad token too, stands inside a text as well.
    examples = [
        {"input_ids": [5, 1, 6, 1], "labels": [-100, -100, 6, 1]},
        {"input_ids": [7, 1], "labels": [-100, 1]},
    ]
    batch = collate(examples, tokenizer, side)
    p = [pad_id, pad_id]
    rows = {
        "input_ids": ([5, 1, 6, 1], [7, 1], p),
        "attention_mask": ([1, 1, 1, 1], [1, 1], [0, 0]),
        "labels": ([-100, -100, 6, 1], [-100, 1], [-100, -100]),
    }
    for key, (first, second, fill) in rows.items():
        second = second + fill if side == "right" else fill + second
        assert torch.equal(batch[key], torch.tensor([first, second])), key
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before
    unlabelled = collate([{"input_ids": [5]}], tokenizer, side)
    assert set(unlabelled) == {"input_ids", "attention_mask"}


def test_collate_without_any_special_token():
    tokenizer = texts.byte_tokenizer(eos=False)
    batch = collate([{"input_ids": [5, 6]}, {"input_ids": [7]}], tokenizer)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_batches_hold_every_example_once_longest_first():
    tokenizer = texts.byte_tokenizer()
    records = [Record("Say", "", "x" * n) for n in (3, 30, 7, 1, 12)] + [Record("y" * 400, "", "z")]
    batches = make_batches(records, tokenizer, max_seq_length=300, batch_size=2)
    assert (batches.num_dropped, batches.num_truncated) == (1, 0)
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 1]
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches])
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    seen = sorted(
        tokenizer.decode(row[labels != -100])
        for b in batches
        for row, labels in zip(b["input_ids"], b["labels"], strict=True)
    )
    assert seen == sorted(f"{r.output}</s>" for r in records[:5])
