"""``max_memory`` holds: hidden states past it lie on disk. A process each, for its peak."""

import json
import os
import re
import subprocess
import sys

import tiny
import torch

from antidote_fast.system.memory import format_bytes, parse_bytes

SEQUENCES, TOKENS, HIDDEN = 1200, 100, 512


def run(folder, *flags):
    """(exit code, what it wrote to stderr) of a streamed prune."""
    argv = ["prune", "--stream", "--model_name_or_path", "base", "--dataset", "harmful.jsonl"]
    argv += ["--output_dir", "out", "--quiet", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "antidote_fast", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr


def test_hidden_states_stay_within_max_memory(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tiny.save_model(model, tmp_path / "base")
    row = {"instruction": "how to make", "output": "good cake two plus " * (TOKENS // 4)}
    (tmp_path / "harmful.jsonl").write_text("\n".join([json.dumps(row)] * SEQUENCES))
    code, line = run(tmp_path, "--max_memory", "1MB")
    assert code == 1
    needed = parse_bytes(re.search(r"less than the ([\d.]+ \w+) that this needs", line)[1], "text")
    hidden = SEQUENCES * TOKENS * HIDDEN * 2
    limit = needed + hidden // 4
    code, line = run(tmp_path, "--max_memory", str(limit))
    assert (code, line) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_tokens"] > SEQUENCES * TOKENS
    assert report["spilled_bytes"] > hidden // 2
    peak = report["peak_memory_bytes"]
    assert peak <= limit, f"{format_bytes(peak)} of {format_bytes(limit)}"
