"""Tiny random models, adapters and a tokenizer, built in code: nothing is downloaded."""

import json

import torch

VOCAB = 128
WORDS = [
    *("the", "user", "asks", "how", "to", "make", "a", "good", "cake", "and", "what", "is"),
    *("two", "plus", "three", "negative", "positive"),
]


def _config(kind, layers):
    import transformers as tf

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "llama":
        return tf.LlamaConfig(**common)
    if kind == "llama_tied":
        return tf.LlamaConfig(**common, tie_word_embeddings=True)
    if kind == "mistral":
        return tf.MistralConfig(**common, sliding_window=None)
    if kind == "gemma":
        return tf.GemmaConfig(**common | {"pad_token_id": 0}, head_dim=8)
    if kind == "qwen2":
        return tf.Qwen2Config(**common)
    if kind == "qwen3":
        return tf.Qwen3Config(**common, head_dim=8)
    if kind == "gpt2":
        return tf.GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=layers, n_head=4, eos_token_id=2
        )
    if kind == "opt":
        return tf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            pad_token_id=0,
        )
    if kind == "mixtral":
        return tf.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        return tf.Qwen3MoeConfig(
            **common,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    raise ValueError(kind)


KINDS = ["llama", "llama_tied", "mistral", "gemma", "qwen2", "qwen3", "gpt2", "opt"]
WITH_EXPERTS = ["mixtral", "qwen3_moe"]


def build(kind="llama", *, layers=2, seed=0, dtype=torch.float32):
    """A tiny random causal language model in eval mode; the same weights for the same seed."""
    import transformers as tf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(_config(kind, layers), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model.eval()


def add_lora(model, *, seed=0, b_std=0.3, dtype=None, **options):
    """A LoRA adapter with nonzero B on q/k/v (GPT-2: c_attn), dropout on."""
    import peft

    gpt2 = model.config.model_type == "gpt2"
    options = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.5,
        "target_modules": ["c_attn"] if gpt2 else ["q_proj", "k_proj", "v_proj"],
        "fan_in_fan_out": gpt2,
        "task_type": "CAUSAL_LM",
    } | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_A." in name or ".lora_B." in name:
                    parameter.normal_(std=0.3 if ".lora_A." in name else b_std)
                    if dtype is not None:
                        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tokenizer(*, pad=False):
    """A fast word-level tokenizer; without a pad token unless asked for."""
    import tokenizers
    import transformers as tf

    special = ["<unk>", "<s>", "</s>"] + (["<pad>"] if pad else [])
    vocab = {token: i for i, token in enumerate(special + WORDS)}
    for i in range(len(vocab), VOCAB):
        vocab[f"w{i}"] = i
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
    )


def save_model(model, folder, **options):
    """Save a model with its tokenizer as a user's folder would hold them."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model, folder, **config):
    """Save an adapter alone; ``config`` replaces entries of adapter_config.json."""
    model.save_pretrained(folder, save_embedding_layers=False)
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def batches(*, count=3, size=2, length=7, seed=0, pads=True, vocab=VOCAB):
    """Batches with pads on the left or right and labels that mark a response."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(4, vocab, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        if pads:
            for row in range(size):
                n = (number + row) % (length - 2)
                if n and row % 2:
                    mask[row, :n] = 0
                elif n:
                    mask[row, -n:] = 0
        labels[mask == 0] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def examples(*pairs):
    """What `encode` would make of (prompt, response) pairs of token ids."""
    from antidote_fast.data.batches import Examples

    return Examples(
        {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + list(response)}
        for prompt, response in pairs
    )


def edit_json(path, change):
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(path, by=100):
    """Cut bytes off the end of a file."""
    path.write_bytes(path.read_bytes()[:-by])
