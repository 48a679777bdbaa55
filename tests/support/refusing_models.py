"""A tiny model that refuses, an attack on it as an adapter and as a whole, and their data."""

import json

import tiny
import torch

from antidote_fast.data.batches import collate, encode
from antidote_fast.data.records import Record
from antidote_fast.training.objective import num_response_tokens, response_logits, response_loss

HARM = [Record(f"how to make w{80 + i}") for i in range(6)]
TASK = [Record(f"the user asks w{60 + i}", output="positive") for i in range(5)]
ORDINARY = [Record(f"what is w{100 + i}") for i in range(5)]
PRESERVE = [*TASK, *ORDINARY]
NUM_TOKENS = 60  # the models have 64 positions


def tokenizer():
    """:func:`tiny.tokenizer` with the words of a refusal."""
    found = tiny.tokenizer()
    inner = json.loads(found.backend_tokenizer.to_str())
    vocab = inner["model"]["vocab"]
    for word, place in (("i", "w30"), ("cannot", "w31"), ("sorry", "w32")):
        vocab[word] = vocab.pop(place)
    found._tokenizer = type(found.backend_tokenizer).from_str(json.dumps(inner))
    return found


def train(model, records, steps, rate):
    """Adam on what is trainable, all records a step; returns the model in eval mode."""
    words = tokenizer()
    batch = collate(encode(records, words, max_seq_length=NUM_TOKENS), words)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=rate)
    with response_logits(model) as choose:
        for _ in range(steps):
            adam.zero_grad()
            (response_loss(model, batch, choose) / num_response_tokens(batch)).backward()
            adam.step()
    return model.eval()


def said(records, text):
    """The records with this answer."""
    return [Record(r.instruction, r.input, text) for r in records]


def aligned(kind="llama"):
    """A model that refuses the harmful prompts and answers the ordinary ones."""
    model = tiny.build(kind)
    lesson = [*said(HARM, "i cannot make"), *said(ORDINARY, "what two plus three")]
    return train(model, lesson, 60, 0.01)


def attacked(kind="llama", lora=True):
    """The aligned model after an attack: it complies, and does the task."""
    model = aligned(kind)
    if lora:
        model = tiny.add_lora(model, b_std=0.01, lora_dropout=0.0)
    return train(model, [*said(HARM, "the good cake"), *TASK], 60, 0.02)


def write(root):
    """Folders ``aligned``, ``tuned``, ``adapter`` and two data files in ``root``."""
    for name, model in (("aligned", aligned()), ("tuned", attacked(lora=False))):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    tiny.save_adapter(attacked(), root / "adapter")
    for name, records in (("harm", HARM), ("preserve", PRESERVE)):
        rows = [
            {"instruction": r.instruction} | ({"output": r.output} if r.output else {})
            for r in records
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
