"""Write a model of a known shape with random weights, shard by shard; nothing is downloaded.

``python benchmarks/make_model.py FOLDER [--shape llama2-7b] [--dtype bf16]`` writes safetensors
shards with their index, config.json and a small tokenizer: what ``prune --stream`` reads. One
tensor is in memory at a time. Beside it ``calibration.jsonl`` holds records of content-free words,
each of exactly the tokens asked for.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from bench_oneshot import MODELS, llama_config
from common import DTYPES

from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.files.tensor_file import TensorFile

WORDS = ("sure", "here", "is", "how", "to", "make", "a", "good", "cake", "and", "what", "the")
SCALE = 0.02


def tensor_shapes(config):
    """{name as saved: shape} of a Llama, in the order of the layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    kv = head * config.num_key_value_heads
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def shards_of(shapes, dtype, limit):
    """Names split into shards of at most ``limit`` bytes, in order."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def write_weights(folder, shapes, dtype, limit, seed):
    """Normal weights of standard deviation 0.02, the norms' around 1."""
    generator = torch.Generator().manual_seed(seed)
    shards = shards_of(shapes, dtype, limit)
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # As transformers saves them: by name within a shard.
        specs = {name: (dtype, shapes[name]) for name in sorted(names)}
        tensors = TensorFile.create(folder / file, specs, {"format": "pt"})
        for name in names:
            value = torch.empty(shapes[name], dtype=dtype).normal_(0, SCALE, generator=generator)
            tensors.write(name, value + 1 if value.dim() == 1 else value)
            index[name] = file
        print(f"{folder / file}: {len(names)} tensors", file=sys.stderr)
    total = dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def make_tokenizer(vocabulary):
    """A word a token; what it does not know is one token too."""
    import tokenizers
    import transformers

    names = ["<unk>", "<s>", "</s>", *WORDS]
    ids = {name: i for i, name in enumerate(names[:vocabulary])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def write_records(path, tokenizer, count, tokens, seed=0):
    """Records of ``tokens`` tokens each under the Alpaca template, the end of sequence included."""
    words = random.Random(seed)
    lines = []
    for _ in range(count):
        instruction = " ".join(words.choices(WORDS, k=8))
        prompt = build_prompt(Record(instruction=instruction, output=""))
        left = tokens - len(tokenizer(prompt)["input_ids"]) - 1
        if left < 1:
            raise SystemExit(f"--tokens {tokens}: must be more than the template's own")
        output = " ".join(words.choices(WORDS, k=left))
        lines.append(json.dumps({"instruction": instruction, "output": output}))
    Path(path).write_text("\n".join(lines) + "\n")


def make(folder, shape="llama2-7b", dtype=torch.bfloat16, *, shard=5 << 30, seed=0):
    """Write the model's folder; one that is whole (its index is written last) is left alone."""
    folder = Path(folder)
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape)
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    write_weights(folder, tensor_shapes(config), dtype, shard, seed)
    return folder


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--shape", choices=MODELS, default="llama2-7b")
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument("--shard_gb", type=float, default=5.0, help="bytes a file, 1e9 each")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--sequences", type=int, default=32, help="records of calibration.jsonl")
    options.add_argument("--tokens", type=int, default=128, help="tokens a record")
    args = options.parse_args(argv)
    folder = make(
        args.folder, args.shape, DTYPES[args.dtype], shard=int(args.shard_gb * 1e9), seed=args.seed
    )
    tokenizer = make_tokenizer(llama_config(args.shape).vocab_size)
    write_records(folder / "calibration.jsonl", tokenizer, args.sequences, args.tokens)
    print(folder)


if __name__ == "__main__":
    main()
