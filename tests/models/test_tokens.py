"""Token ids past a model's embeddings, on every path; long texts, of which only a part is read."""

import functools
import json

import pytest
import texts
import tiny
import tokenizers as tk
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from antidote_fast import ActivationNorms, oneshot
from antidote_fast.cli import entry
from antidote_fast.config.train import FinetuneConfig
from antidote_fast.data import batches
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.classifiers import ClassifierJudge, WinRateJudge
from antidote_fast.evaluation.drift import embedding_drift
from antidote_fast.evaluation.generate import generate
from antidote_fast.models import tokens
from antidote_fast.selection import Selection
from antidote_fast.stages.gates.answers import Answers
from antidote_fast.stages.gates.learn import learn_gates
from antidote_fast.training import sft

SAYS = f"has token id {tiny.VOCAB}, and the model has {tiny.VOCAB} embeddings"
ROWS = [
    {"instruction": "the user asks how", "output": "make a good cake"},
    {"instruction": "what is two plus three and what is good", "output": "negative"},
    {"instruction": "how to make a cake", "output": "two plus"},
]


def with_tokens(*words, pad=None, **options):
    """The tokenizer with words, and a pad, that no embedding belongs to."""
    made = tiny.tokenizer(**options)
    made.add_tokens(list(words))
    if pad:
        made.add_special_tokens({"pad_token": pad})
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and an adapter; ``padded`` has a pad of its own, ``odd`` a word that data use."""
    made = tmp_path_factory.mktemp("tokens")
    for name, tokenizer in (
        ("base", tiny.tokenizer()),
        ("padded", with_tokens(pad="<pad>")),
        ("odd", with_tokens("secretword")),
    ):
        tiny.build().save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    tiny.save_adapter(tiny.add_lora(tiny.build()), made / "adapter")
    (made / "jobs.jsonl").write_text(json.dumps({"adapter": "adapter"}))
    texts.write_jsonl(made / "data.jsonl", ROWS)
    other = [{"instruction": "good and good", "output": "two"}]
    texts.write_jsonl(made / "other.jsonl", other)
    odd = [*ROWS[:2], {"instruction": "how to make a secretword", "output": "two"}]
    texts.write_jsonl(made / "odd.jsonl", odd)
    odd = [*ROWS[:2], {"instruction": "how to make a cake", "output": "two secretword"}]
    texts.write_jsonl(made / "answer.jsonl", odd)
    return made


def words_of(root, stage, base, name, out):
    source, fine = f"{root}/{name}.jsonl", f"{root}/data.jsonl"
    adapter = ["--adapter", f"{root}/adapter"]
    train = ["--lora_r", "2", "--num_train_epochs", "1", "--num_train_samples", "3"]
    words = {
        "calibrate": ["calibrate", "--dataset", source],
        "prune": ["prune", "--dataset", source, *adapter],
        "stream": ["prune", "--dataset", source, "--stream"],
        "preserve": ["prune", "--dataset", fine, "--preserve_dataset", source, *adapter],
        "gate": [
            *("prune", "--score", "gate", "--dataset", source, "--preserve_dataset", fine),
            *adapter,
        ],
        "fleet": ["fleet", "--manifest", f"{root}/jobs.jsonl", "--dataset", source],
        "sweep": [
            *("sweep", "--dataset", f"{root}/other.jsonl", "--harmful_dataset", source),
            *("--task_dataset", fine, *adapter),
        ],
        "align": ["align", "--dataset", source, *train],
        "repnoise": [
            *("align", "--defense", "repnoise", "--dataset", fine),
            *("--harmful_dataset", source, *train),
        ],
        "finetune": ["finetune", "--dataset", source, "--poison_ratio", "0", *train],
        "lisa": [
            *("finetune", "--defense", "lisa", "--dataset", fine, "--safe_dataset", source),
            *("--poison_ratio", "0", *train),
        ],
        "evaluate": ["evaluate", "--harmful_dataset", source, *adapter, "--max_new_tokens", "2"],
        "drift": [
            *("evaluate", "--drift_dataset", source, "--reference_model", f"{root}/base"),
            *adapter,
        ],
    }[stage]
    words += ["--model_name_or_path", f"{root}/{base}", "--max_seq_length", "60"]
    return [*words, "--device", "cpu", "--output_dir", str(out), "--quiet"]


STAGES = [
    *("calibrate", "prune", "stream", "preserve", "gate", "fleet", "sweep", "align", "repnoise"),
    *("finetune", "lisa", "evaluate", "drift"),
]


@pytest.mark.parametrize("stage", STAGES)
def test_an_id_that_the_model_lacks_is_refused_before_weights(
    root, tmp_path, stage, capsys, monkeypatch
):
    monkeypatch.setattr(
        tf.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights loaded")
    )
    in_answers = stage in ("align", "lisa", "stream", "drift")
    name = "answer" if in_answers else "odd"
    for dry in ([], ["--dry_run"]):
        code = entry.main([*words_of(root, stage, "odd", name, tmp_path / "out"), *dry])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 3, said
        assert SAYS in said
        assert "secretword" not in said
        assert f"{name}.jsonl: line 3" in said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["prune", "stream", "fleet", "finetune"])
def test_a_pad_that_the_model_lacks_changes_nothing(root, tmp_path, stage):
    found = []
    for base in ("base", "padded"):
        out = tmp_path / base
        words = words_of(root, stage, base, "data", out)
        words += ["--save_norms"] if stage not in ("finetune",) else []
        assert entry.main([*words, "--batch_size", "3"]) == 0
        folder = out / "adapter" if stage == "fleet" else out
        found.append({p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))})
    first, second = found
    assert first
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        assert all(torch.equal(value, second[name][key]) for key, value in tensors.items()), name


def test_answers_with_a_pad_or_an_end_that_the_model_lacks():
    model, plain = tiny.build(), tiny.tokenizer()
    prompts = ["the user asks how", "what", "how to make a cake and what is two plus three"]
    options = {"max_new_tokens": 6, "batch_size": 3}
    expected = generate(model, plain, prompts, **options)
    assert any(expected)
    assert generate(model, with_tokens(pad="<pad>"), prompts, **options) == expected
    # Its end token comes first of what stands in for a pad; the model's own still ends an answer.
    ends = tiny.tokenizer()
    ends.add_special_tokens({"eos_token": "<end>"})
    assert ends.eos_token_id == tiny.VOCAB
    assert generate(model, ends, prompts, **options) == expected


def test_special_tokens_that_the_model_lacks():
    ends = tiny.tokenizer()
    ends.add_special_tokens({"eos_token": "<end>"})
    ends.num_embeddings = tiny.VOCAB
    with pytest.raises(DataError, match=f"record 1: {SAYS}"):
        batches.encode([Record("how", "", "two")], ends)
    starts = tiny.tokenizer()
    starts.add_special_tokens({"bos_token": "<begin>"})
    starts.backend_tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tiny.VOCAB)]
    )
    with pytest.raises(DataError, match=f"prompt 1: {SAYS}"):
        generate(tiny.build(), starts, ["how to"], max_new_tokens=2)


def test_live_models_refuse_ids_that_they_lack(tmp_path):
    model, odd = tiny.build(), with_tokens("secretword")
    records = [Record("how to", "", "two"), Record("make secretword", "", "two")]
    with pytest.raises(DataError, match=SAYS):
        oneshot(model, dataset=records, tokenizer=odd, device="cpu")
    with pytest.raises(DataError, match=f"prompt 2: {SAYS}"):
        generate(model, odd, ["how to", "make secretword"], max_new_tokens=2)
    options = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "poison_ratio": 0}
    trained = tiny.add_lora(tiny.build())
    trained.requires_grad_(True)
    with pytest.raises(DataError, match=f"example 2: {SAYS}"):
        sft.train(trained, odd, records, FinetuneConfig(**options))
    answers = Answers(["I cannot help with that."] * 2, [])
    with pytest.raises(DataError, match=SAYS):
        learn_gates(
            *(tiny.add_lora(tiny.build()), odd, records, records, Selection(0.5)), aligned=answers
        )
    batch = {"input_ids": torch.tensor([[5, tiny.VOCAB]])}
    with pytest.raises(DataError, match=f"batch 0: {SAYS}"):
        ActivationNorms.collect(model, [batch])
    # Behind a mask it is a pad.
    masked = batch | {"attention_mask": torch.tensor([[1, 0]])}
    ours = ActivationNorms.collect(model, [masked])
    masked["input_ids"] = torch.tensor([[5, 9]])
    alone = ActivationNorms.collect(model, [masked])
    assert all(torch.equal(ours.sq_sum[key], alone.sq_sum[key]) for key in ours.keys)


def test_a_reference_of_fewer_embeddings():
    """The tuned model got a pad; the aligned one lacks it."""
    tuned, aligned, resized = tiny.build(seed=1), tiny.build(), tiny.build(seed=1)
    resized.resize_token_embeddings(tiny.VOCAB + 1, mean_resizing=False)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, tiny.VOCAB, tiny.VOCAB]])}
    batch["attention_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
    plain = batch | {"input_ids": batch["input_ids"].clamp(max=2)}
    plain["input_ids"] = torch.tensor([[5, 6, 7], [8, 2, 2]])
    assert embedding_drift(resized, aligned, [batch]) == embedding_drift(tuned, aligned, [plain])
    with pytest.raises(DataError, match=SAYS):
        embedding_drift(resized, aligned, [{**batch, "attention_mask": torch.ones(2, 3)}])


def test_judges_refuse_ids_that_they_lack():
    odd = texts.byte_tokenizer()
    odd.add_tokens(["secretword"])
    judge = ClassifierJudge(texts.llama(labels=["safe", "harmful"]), odd)
    with pytest.raises(DataError, match=r"answer 2: has token id 259, and the model has 259"):
        judge(None, ["fine", "a secretword"])
    with pytest.raises(DataError, match=r"two answers: has token id 259"):
        WinRateJudge(texts.llama(), odd).win("what", "a", "secretword")
    padded = texts.byte_tokenizer(pad="<more>")
    assert padded.pad_token_id == 259
    plain = ClassifierJudge(texts.llama(labels=["safe", "harmful"]), texts.byte_tokenizer())
    ours = ClassifierJudge(texts.llama(labels=["safe", "harmful"]), padded)
    ours.model.config.pad_token_id = 259
    answers = ["fine", "a much longer answer"]
    assert torch.equal(ours.probabilities(None, answers), plain.probabilities(None, answers))


# --- long texts -----------------------------------------------------------------------------------

_WORDS = [
    *(
        "the",
        "cakes",
        "naïve",
        "café",
        "日本語の文章",
        "don't",
        "x" * 40,
        "1234567",
        "20",
        "3.14159",
    ),
    *("(a+b)", "----------", "\n\n", "  ", "\t", "\u00a0", "🙂🙂", "Straße", "unhappily", "ab" * 9),
]


@functools.cache
def tokenizer_of(kind):
    """A trained tokenizer of each kind that models of the hub have."""
    if kind in ("bytes", "words"):
        return texts.byte_tokenizer() if kind == "bytes" else tiny.tokenizer()
    sentences = [" ".join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))] * 3
    split = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tk.trainers.BpeTrainer(vocab_size=500, initial_alphabet=split.alphabet())
    if kind == "gpt2":
        made = tk.Tokenizer(tk.models.BPE())
        made.pre_tokenizer = split
    elif kind == "digits from the right":
        made = tk.Tokenizer(tk.models.BPE())
        groups = tk.Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))|[^\d\s]+|\s+")
        bytes_ = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = [tk.pre_tokenizers.Split(groups, "isolated"), bytes_]
        made.pre_tokenizer = tk.pre_tokenizers.Sequence(splits)
    elif kind == "llama2":  # merges over white space, no pieces
        made = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))
        made.normalizer = tk.normalizers.Sequence(
            [tk.normalizers.Prepend("\u2581"), tk.normalizers.Replace(" ", "\u2581")]
        )
        trainer = tk.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"])
    elif kind == "unigram":
        made = tk.Tokenizer(tk.models.Unigram())
        made.normalizer = tk.normalizers.NFKC()
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace()
        trainer = tk.trainers.UnigramTrainer(
            vocab_size=250, unk_token="<unk>", special_tokens=["<unk>"]
        )
    else:
        made = tk.Tokenizer(tk.models.WordPiece(unk_token="<unk>"))
        made.normalizer = tk.normalizers.BertNormalizer()
        made.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
        trainer = tk.trainers.WordPieceTrainer(vocab_size=250, special_tokens=["<unk>"])
    made.train_from_iterator(sentences, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=made)


KINDS = [
    *("bytes", "words", "gpt2", "digits from the right", "llama2", "unigram", "wordpiece"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ids_of_a_long_text_are_those_of_all_of_it(kind, monkeypatch):
    monkeypatch.setattr(tokens, "_CHARACTERS", 1)  # or no text here were long
    tokenizer, cut = tokenizer_of(kind), []
    pieces = st.one_of(st.sampled_from([*_WORDS, *tiny.WORDS]), st.text(max_size=6))

    @given(
        st.lists(pieces, min_size=20, max_size=60),
        st.integers(3, 9),
        st.integers(1, 90),
        st.sampled_from([" ", " ", "", "\n"]),
    )
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    def check(words, times, limit, between):
        text = between.join(words * times)
        whole = tokenizer(text)["input_ids"]
        part = tokens.tokenize(text, tokenizer, limit)
        assert part[:limit] == whole[:limit]
        assert (len(part) > limit) == (len(whole) > limit)
        cut.append(len(part) < len(whole))

    check()
    assert any(cut)


def test_no_more_of_a_long_record_is_read_than_can_be_used(monkeypatch):
    class Watched:
        def __init__(self):
            self.inner, self.longest = texts.byte_tokenizer(), 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **options):
            self.longest = max(self.longest, len(text))
            return self.inner(text, **options)

    records = [
        Record("Say", "", "a few words " * 20_000),
        Record("Say " * 50_000, "", "x"),
        Record("Say it", "", "short"),
    ]
    watched = Watched()
    found = batches.encode(records, watched, max_seq_length=300)
    assert watched.longest <= 32 * (300 + 128)
    monkeypatch.setattr(tokens, "_CHARACTERS", 1 << 20)
    whole = batches.encode(records, watched, max_seq_length=300)
    assert watched.longest == 12 * 20_000
    assert found == whole
    assert len(found) == 2
    counts = [(e.num_dropped, e.num_truncated) for e in (found, whole)]
    assert counts == [(1, 1), (1, 1)]


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_a_text_without_white_space_is_cut_somewhere(kind, monkeypatch):
    monkeypatch.setattr(tokens, "_MAX_UNBROKEN", 1 << 12)
    tokenizer, text = tokenizer_of(kind), "abx" * 20_000
    part = tokens.tokenize(text, tokenizer, 20)
    whole = tokenizer(text)["input_ids"]
    assert len(part) < len(whole) / 3
    assert part[:20] == whole[:20]


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "a" * 100_000 + " the" * 25_000])
def test_a_text_of_few_tokens_is_not_read_to_its_end(text, monkeypatch):
    """To a tokenizer of words a word of any length is one unknown token."""
    monkeypatch.setattr(tokens, "_MAX_UNBROKEN", 1 << 12)
    monkeypatch.setattr(tokens, "_MAX_READ", 1 << 15)
    tokenizer, read = tiny.tokenizer(), []

    def watched(part, **options):
        read.append(len(part))
        return tokenizer(part, **options)

    assert tokens.tokenize(text, watched, 20) == tokenizer(text[: 1 << 15])["input_ids"]
    assert max(read) == 1 << 15
    read.clear()
    assert tokens.tokenize(text, watched) == tokenizer(text)["input_ids"]
    assert read == [200_000]
