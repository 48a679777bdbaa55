"""An answer does not depend on the others of its batch, for every family of models."""

import random

import pytest
import tiny
import torch

from antidote_fast.evaluation.generate import generate
from antidote_fast.models.forwards import same_with_pads

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
USUAL = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
OLD = {"vocab_size": tiny.VOCAB, "bos_token_id": 1, "eos_token_id": 2}  # names of their own
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
WINDOW = 6  # shorter than most prompts
LAYERS = ["sliding_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}

FAMILIES = {
    "llama": ("Llama", USUAL),
    "mistral, window": ("Mistral", USUAL | {"sliding_window": WINDOW}),
    "gemma": ("Gemma", USUAL | {"head_dim": 8}),
    "gemma2": ("Gemma2", USUAL | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYERS}),
    "gemma3": (
        "Gemma3Text",
        USUAL | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYERS},
    ),
    "qwen2": ("Qwen2", USUAL),
    "qwen2, window": (
        "Qwen2",
        USUAL | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
    ),
    "qwen3": ("Qwen3", USUAL | {"head_dim": 8}),
    "phi": ("Phi", USUAL),
    "phi3": ("Phi3", USUAL),
    "phi3, longrope": (
        "Phi3",
        USUAL | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "gpt2": ("GPT2", OLD | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_bigcode": (
        "GPTBigCode",
        OLD | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt_neo": (
        "GPTNeo",
        OLD
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "gptj": (
        "GPTJ",
        OLD | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "codegen": (
        "CodeGen",
        OLD | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "gpt_neox": ("GPTNeoX", SMALL | {"intermediate_size": 48}),
    "opt": ("OPT", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", OLD | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", OLD | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("Falcon", SMALL | {"alibi": False}),
    "falcon, alibi": ("Falcon", SMALL | {"alibi": True, "new_decoder_architecture": False}),
    "stablelm": ("StableLm", USUAL),
    "olmo2": ("Olmo2", USUAL),
    "cohere": ("Cohere", USUAL),
    "cohere2": ("Cohere2", USUAL | {"sliding_window": WINDOW, "layer_types": LAYERS}),
    "granite": ("Granite", USUAL),
    "gpt_oss": (
        "GptOss",
        USUAL
        | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYERS}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4Text",
        USUAL
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
        | {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0]},
    ),
    "mixtral": ("Mixtral", USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", USUAL | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", USUAL | EXPERTS | {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        SMALL
        | {"intermediate_size": 48, "num_key_value_heads": 4, "moe_intermediate_size": 16}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "mamba": ("Mamba", OLD | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "recurrent_gemma": (
        "RecurrentGemma",
        USUAL
        | {"head_dim": 8, "attention_window_size": WINDOW, "lru_width": 32}
        | {"block_types": ["recurrent", "attention"]},
    ),
    "lfm2": ("Lfm2", USUAL | {"layer_types": ["conv", "full_attention"]}),
}

ALONE = {"phi3, longrope", "mamba", "recurrent_gemma", "lfm2"}  # batches of one length


def build(family):
    """A random model of the family whose logits are far apart."""
    import transformers

    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model.eval()


def prompts_of(head, seed):
    """Eight prompts of 2 to 24 words behind the same head."""
    draw = random.Random(seed)
    lengths = [2, 2, 3, 5, 9, 9, 17, 24]
    words = [[f"w{draw.randrange(20, tiny.VOCAB)}" for _ in range(count)] for count in lengths]
    return [" ".join([*head, *each]) for each in words]


HEAD = [f"w{number}" for number in range(30, 42)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_8_gives_the_answers_of_each_prompt_alone(family):
    model, tokenizer = build(family), tiny.tokenizer()
    assert same_with_pads(model, 42) == (family not in ALONE)
    for head in (HEAD, []):
        prompts = prompts_of(head, seed=1)
        one, eight = (
            generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=size)
            for size in (1, 8)
        )
        assert eight == one
        assert len({*one}) > 4  # an answer depends on its prompt


def test_longrope_pads_batches_that_stay_short():
    model = build("phi3, longrope")
    assert same_with_pads(model, 16)
    assert not same_with_pads(model, 17)


def test_batches_of_one_length(monkeypatch):
    model, tokenizer = build("mamba"), tiny.tokenizer()
    shapes, real = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kw: shapes.append(tuple(kw["input_ids"].shape)) or real(**kw)
    )
    generate(model, tokenizer, prompts_of([], seed=1), max_new_tokens=1, batch_size=2)
    assert shapes == [(1, 24), (1, 17), (2, 9), (1, 5), (1, 3), (2, 2)]


def test_the_shared_tokens_are_computed_once(monkeypatch):
    """And the batch is that of whole prompts: the cache has its pads in front."""
    model, tokenizer = build("mpt"), tiny.tokenizer()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    generate(model, tokenizer, prompts_of(HEAD, seed=1), max_new_tokens=2, batch_size=8)
    assert shapes == [(1, 12), (8, 24), (8, 1)]
