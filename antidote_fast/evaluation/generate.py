"""Greedy answers, in batches."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from antidote_fast.data.batches import collate, prompt_ids
from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.forwards import MIN_SHARED, contiguous_head, plain_cache
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.models.tokens import check_ids, num_embeddings
from antidote_fast.models.undo import Undo, eval_mode, undoing
from antidote_fast.system.progress import Progress, track


def _plain_generation_config(model: Model, undo: Undo) -> Any:
    """Put away the checkpoint's own generation settings, its end tokens apart, and return them.

    `generate` fills whatever is not asked for from them: a repetition penalty shipped with a model
    would change "greedy".
    """
    from transformers import GenerationConfig

    owners = [model]
    if hasattr(model, "get_base_model"):  # PEFT keeps a second reference on its wrapper
        owners.append(model.get_base_model())
    own = model.generation_config
    for owner in owners:
        undo.later(functools.partial(setattr, owner, "generation_config", owner.generation_config))
        owner.generation_config = GenerationConfig()
    return own


def _end_ids(tokenizer: Tokenizer, generation_config: Any) -> list[int]:
    """Every id that ends an answer: the tokenizer's, and those the checkpoint names."""
    ids = getattr(generation_config, "eos_token_id", None)
    ids = [ids] if ids is None or isinstance(ids, int) else ids
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def check_length(positions: int | None, longest: int, max_new_tokens: int) -> None:
    """Refuse answers that would pass the positions a model has (None: without a limit).

    Raises:
        DataError: the longest prompt alone has as many tokens.
        UsageError: it and max_new_tokens together have more.
    """
    if positions is None or longest + max_new_tokens <= positions:
        return
    if longest >= positions:
        raise DataError(f"a prompt of {longest} tokens fills the model's {positions} positions")
    raise UsageError(
        f"max_new_tokens={max_new_tokens}: must be at most {positions - longest} with a prompt of "
        f"{longest} tokens and a model of {positions} positions"
    )


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    progress: Progress = False,
) -> list[str]:
    """Answer prompts greedily.

    Prompts are sorted by length, left padded and answered in batches; an answer ends at the end
    token. A prompt that occurs twice is answered once.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not. Its mode is restored.
        tokenizer: not changed; needs no pad token.
        prompts: texts as `build_prompt` gives them; ``batch_size`` of them at once.
        max_new_tokens: most tokens an answer.

    Returns:
        One answer a prompt, in order, special tokens and outer white space removed.

    Raises:
        UsageError: max_new_tokens or batch_size below 1, or more tokens than the model has
            positions.
        DataError: a prompt that is empty, longer than the model's positions, or has a token id that
            the model has no embedding for.
    """
    from transformers import GenerationConfig

    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name}={value!r}: must be at least 1")
    if not prompts:
        return []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = {prompt: prompt_ids(prompt, tokenizer, positions) for prompt in dict.fromkeys(prompts)}
    if not all(ids.values()):
        raise DataError(f"prompt {[bool(i) for i in ids.values()].index(False)} has no tokens")
    order = sorted(ids, key=lambda prompt: -len(ids[prompt]))
    check_length(positions, len(ids[order[0]]), max_new_tokens)
    known = num_embeddings(model)
    for number, each in enumerate(ids.values(), 1):
        check_ids(each, known, f"prompt {number}")

    device = next(model.parameters()).device
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[str, str] = {}
    with undoing() as undo:
        eval_mode(model, undo)
        own = _plain_generation_config(model, undo)
        contiguous_head(model, undo)
        end_ids = _end_ids(tokenizer, own)
        pads = [tokenizer.pad_token_id, *end_ids]  # what an answer that has ended goes on with
        pads = [i for i in pads if i is not None and (known is None or 0 <= i < known)]
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=end_ids or None,
            pad_token_id=pads[0] if pads else 0,
        )
        for chunk in track(chunks, "generate", progress):
            batch = _prefilled(model, tokenizer, [ids[p] for p in chunk], device)
            output = model.generate(**batch, generation_config=config)
            new = output[:, batch["input_ids"].shape[1] :].tolist()
            for prompt, row in zip(chunk, new, strict=True):
                ids_of_answer = itertools.takewhile(lambda i: i not in end_ids, row)
                text = tokenizer.decode([*ids_of_answer], skip_special_tokens=True)
                answers[prompt] = text.strip()
    return [answers[prompt] for prompt in prompts]


def _prefilled(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], device: torch.device
) -> dict:
    """A left-padded batch, with a cache of the tokens that all its prompts begin with.

    The prompts of one template share half of their tokens and more; those go through the model
    once. Pads then stand behind the shared tokens, where the mask hides them as in front. A model
    whose cache is of another kind than plain attention's gets the whole prompts.
    """
    shared = _num_shared(prompts)
    rest = collate([{"input_ids": p[shared:]} for p in prompts], tokenizer, "left")
    start = torch.tensor([prompts[0][:shared]] * len(prompts), dtype=torch.int64)
    cache = None
    if shared >= MIN_SHARED and len(prompts) > 1:
        cache = plain_cache(model(input_ids=start[:1].to(device), use_cache=True))
    if cache is None:
        batch = collate([{"input_ids": p} for p in prompts], tokenizer, "left")
        return {key: value.to(device) for key, value in batch.items()}
    cache.batch_repeat_interleave(len(prompts))
    mask = torch.cat([torch.ones_like(start), rest["attention_mask"]], dim=1)
    return {
        "input_ids": torch.cat([start, rest["input_ids"]], dim=1).to(device),
        "attention_mask": mask.to(device),
        "past_key_values": cache,
    }


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one of each left over."""
    same = itertools.takewhile(lambda ids: len({*ids}) == 1, zip(*prompts, strict=False))
    return min(len([*same]), min(map(len, prompts)) - 1)
