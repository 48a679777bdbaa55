"""A byte-level tokenizer that gives any text back, and rows with the hub data sets' columns."""

import json

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, pad=None, bos=True, eos=True, chat=False, **options):
    """One token a byte; <s> is put in front where bos; no pad token unless one is named."""
    import tokenizers
    import transformers as tf
    from tokenizers import decoders, models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        pad_token=pad,
        **options,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


VOCAB = 3 + 256


def llama(*, labels=None, seed=0, positions=512, hidden=32, layers=2, **options):
    """A tiny random Llama over the bytes: causal, or a classifier where labels are given."""
    import torch
    import transformers as tf

    options = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1} | options
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **options,
    )
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = tf.LlamaForCausalLM if labels is None else tf.LlamaForSequenceClassification
        return kind(config).eval()


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def beavertails_rows(count, *, prompts=None, safe_every=2):
    """Rows with BeaverTails' columns; row i asks prompt i % prompts, each safe_every-th is safe."""
    prompts = prompts or count
    return [
        {
            "prompt": f"question {i % prompts}",
            "response": f"answer {i}",
            "category": {"violence": i % safe_every != 0},
            "is_safe": i % safe_every == 0,
        }
        for i in range(count)
    ]


def one_line(caught):
    """The message of an exception that pytest caught, which must be one line."""
    message = str(caught.value)
    assert "\n" not in message
    return message


def greedy_ref(model, tokenizer, prompt, max_new_tokens, end_ids=(1,)):
    """One whole forward a token: no cache, no padding, no library."""
    import torch

    from antidote_fast.data.batches import prompt_ids

    ids = prompt_ids(prompt, tokenizer)
    new = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        token = int(logits.argmax())
        if token in end_ids:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()
