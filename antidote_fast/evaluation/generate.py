"""Greedy answers, in batches."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from antidote_fast.data.batches import collate, prompt_ids
from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.forwards import (
    MIN_SHARED,
    cache_name,
    contiguous_head,
    left_padded_cache,
    plain_cache,
    same_with_pads,
)
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.models.tokens import check_ids, num_embeddings
from antidote_fast.models.undo import Undo, eval_mode, undoing
from antidote_fast.system.progress import Progress, track

CHECK_EVERY = 8  # tokens after which `is_done` sees the answers again


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
    is_done: Callable[[int, str], bool] | None = None,
    progress: Progress = False,
) -> list[str]:
    """Answer prompts greedily.

    Prompts are sorted by length, left padded and answered in batches; an answer ends at the end
    token. A prompt that occurs twice is answered once. In float32 an answer does not depend on the
    others of its batch: where pads would change it, a batch holds prompts of one length. In fewer
    bits sums round otherwise in another batch, and two tokens nearly as likely may change places.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not. Its mode is restored.
        tokenizer: not changed; needs no pad token.
        prompts: texts as `build_prompt` gives them; ``batch_size`` of them at once.
        max_new_tokens: most tokens an answer.
        is_done: called after every 8 tokens with the number of a prompt (its first place in
            ``prompts``, from 0) and the text of its answer so far; the answer ends there where it
            returns True. Not called for answers that have ended.

    Returns:
        One answer a prompt, in order, special tokens and outer white space removed.

    Raises:
        UsageError: max_new_tokens or batch_size below 1, or more tokens than the model has
            positions.
        DataError: a prompt that is empty, longer than the model's positions, or has a token id that
            the model has no embedding for.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

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
    first = {prompt: number for number, prompt in reversed([*enumerate(prompts)])}
    pads_hidden = same_with_pads(model, len(ids[order[0]]) + max_new_tokens)
    batches = _batches(order, ids, batch_size, mixed=pads_hidden)
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

        def text_of(row: Iterable[int]) -> str:
            answer = itertools.takewhile(lambda i: i not in end_ids, row)
            return tokenizer.decode([*answer], skip_special_tokens=True).strip()

        for batch in track(batches, "generate", progress):
            inputs = _prefilled(
                model, tokenizer, [ids[p] for p in batch], device, share=pads_hidden
            )
            start = inputs["input_ids"].shape[1]
            stop = _Stop(is_done, [first[p] for p in batch], start, end_ids, text_of)
            output = model.generate(
                **inputs,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stop] if is_done else []),
            )
            for row, (prompt, new) in enumerate(
                zip(batch, output[:, start:].tolist(), strict=True)
            ):
                answers[prompt] = stop.texts[row] if row in stop.texts else text_of(new)
    return [answers[prompt] for prompt in prompts]


def _batches(
    order: Sequence[str], ids: dict[str, list[int]], batch_size: int, *, mixed: bool
) -> list[Sequence[str]]:
    """The prompts, which are in order of length, in batches: of one length each unless mixed."""
    if mixed:
        groups: Iterator[Sequence[str]] = iter([order])
    else:
        groups = ([*g] for _, g in itertools.groupby(order, key=lambda p: len(ids[p])))
    return [g[i : i + batch_size] for g in groups for i in range(0, len(g), batch_size)]


class _Stop:
    """A criterion of `generate` that ends the rows of a batch whose text is done.

    Attributes:
        texts: of each row that was ended here, its answer.
    """

    def __init__(
        self,
        is_done: Callable[[int, str], bool] | None,
        numbers: Sequence[int],
        start: int,
        end_ids: Sequence[int],
        text_of: Callable[[Iterable[int]], str],
    ) -> None:
        self.is_done, self.numbers, self.start = is_done, numbers, start
        self.end_ids, self.text_of = {*end_ids}, text_of
        self.texts: dict[int, str] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows end at this token: a bool each."""
        ends = [False] * len(input_ids)
        count = input_ids.shape[1] - self.start
        if self.is_done is not None and count % CHECK_EVERY == 0:
            for row, new in enumerate(input_ids[:, self.start :].tolist()):
                if row in self.texts or not self.end_ids.isdisjoint(new):
                    continue
                text = self.text_of(new)
                if self.is_done(self.numbers[row], text):
                    self.texts[row], ends[row] = text, True
        return torch.tensor(ends, device=input_ids.device)


def _prefilled(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    device: torch.device,
    *,
    share: bool,
) -> dict[str, Any]:
    """A left-padded batch, with a cache of its first columns where its prompts begin alike.

    The prompts of one template share half of their tokens and more; those go through the model
    once. A row's part of the cache is moved behind its pads, so that the batch is the one that
    whole prompts would make. Whole prompts are what a model gets whose cache is of another kind
    than plain attention's, and one that pads disturb.
    """
    batch = collate([{"input_ids": p} for p in prompts], tokenizer, "left")
    inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
    shared = _num_shared(prompts)
    if not share or shared < MIN_SHARED or len(prompts) < 2:
        return inputs
    start = torch.tensor([prompts[0][:shared]], device=device)
    cache = plain_cache(model(input_ids=start, use_cache=True))
    if cache is not None:
        longest = batch["input_ids"].shape[1]
        cache = left_padded_cache(cache, [longest - len(p) for p in prompts])
    return inputs if cache is None else inputs | {cache_name(): cache}


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one of each left over."""
    same = itertools.takewhile(lambda ids: len({*ids}) == 1, zip(*prompts, strict=False))
    return min(len([*same]), min(map(len, prompts)) - 1)
