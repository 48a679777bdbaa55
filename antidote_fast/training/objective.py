"""The loss of one optimizer step: cross-entropy on responses, and the place where defenses differ.

:class:`Objective` is plain supervised fine-tuning (SFT), and what every defense starts from.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from antidote_fast.config.train import TrainConfig
from antidote_fast.data.batches import IGNORE_INDEX, collate
from antidote_fast.models.forwards import MIN_SHARED, cache_name, plain_cache, rope_by_length
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.models.undo import hook, undoing

Example = dict[str, list[int]]
Step = list[list[int]]
Choose = Callable[[Tensor], AbstractContextManager[None]]


class Objective:
    """SFT: the cross-entropy of the response's tokens, averaged over those of one optimizer step.

    A step of two batches of b is therefore one of 2b. A defense overrides :meth:`backward`, or one
    of the methods around it.

    Args:
        model, tokenizer: a causal language model, PEFT-wrapped or not, its trainable weights
            marked, and its own tokenizer.
        examples: what :func:`~antidote_fast.data.batches.encode` made of the records.
        dtype: dtype to compute in, by autocast, where the weights are float32; None computes in
            that of the weights.

    Attributes:
        steps: every optimizer step as its batches of indices into the examples.
        parameters: the trainable ones.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        config: TrainConfig,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.dtype = model, tokenizer, config, dtype
        self.examples = examples
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.steps = plan_steps(examples, config)
        self._choose: Any = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block the model is hooked so that only responses reach the output layer."""
        with response_logits(self.model) as self._choose:
            yield

    def backward(self, number: int) -> float:
        """Add the gradient of step ``number`` to the parameters' and return the loss."""
        batches = self.batches(number)
        total = sum(num_response_tokens(batch) for batch in batches)
        return sum(self.descend(self.loss(batch) / total) for batch in batches)

    @torch.no_grad()
    def loss_now(self, number: int) -> float:
        """The cross-entropy that step ``number``'s first batch has with the weights as they are."""
        batch = self.batches(number)[0]
        return float(self.loss(batch)) / max(1, num_response_tokens(batch))

    def after(self, number: int) -> None:
        """Called when the weights have been stepped."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold beside weights, optimizer and generators."""
        return {}

    def load_state(self, state: dict[str, Tensor], number: int) -> None:
        """Take back what :meth:`state` gave when ``number`` steps were done."""

    def batches(self, number: int) -> list[dict[str, Tensor]]:
        """The batches of step ``number``."""
        return [self.batch(indices) for indices in self.steps[number]]

    def batch(
        self, indices: Sequence[int], examples: Sequence[Example] | None = None
    ) -> dict[str, Tensor]:
        """Examples by their indices as one batch on the model's device; default the first set."""
        examples = self.examples if examples is None else examples
        batch = collate([examples[i] for i in indices], self.tokenizer)
        return {key: value.to(self.device) for key, value in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the cross-entropy over a batch's response tokens, with its graph."""
        with autocast(self.device, self.dtype):
            return response_loss(self.model, batch, self._choose)

    def hidden(self, batch: dict[str, Tensor]) -> None:
        """A forward pass for the sake of what hooks see: no token reaches the output layer."""
        nothing = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        with autocast(self.device, self.dtype), self._choose(nothing):
            self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )

    @staticmethod
    def descend(loss: Tensor) -> float:
        """Go backwards through a loss, and return it."""
        loss.backward()
        return float(loss.detach())


def plan_steps(
    examples: Sequence[dict], config: TrainConfig, epochs: float | None = None
) -> list[Step]:
    """Every optimizer step as its batches of indices.

    Each epoch is shuffled, then sorted by length within stretches of eight steps, so that a step's
    records need little padding and still differ from epoch to epoch.
    """
    rng = random.Random(config.seed)
    size = config.batch_size * config.gradient_accumulation_steps
    a_epoch = math.ceil(len(examples) / size)
    epochs = config.num_train_epochs if epochs is None else epochs
    wanted = max(1, round(a_epoch * epochs))
    steps = []
    while len(steps) < wanted:
        order = list(range(len(examples)))
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), 8 * size):
            stretch = sorted(
                order[start : start + 8 * size], key=lambda i: len(examples[i]["input_ids"])
            )
            epoch += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        rng.shuffle(epoch)
        steps += epoch
    return [
        [step[i : i + config.batch_size] for i in range(0, len(step), config.batch_size)]
        for step in steps[:wanted]
    ]


def num_response_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that get a loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def response_loss(
    model: Model, batch: dict[str, Tensor], choose: Choose, *, share_prefix: bool = False
) -> Tensor:
    """Sum of the cross-entropy over a batch's response tokens.

    With ``share_prefix`` the tokens that all its prompts begin with, a template's, go through the
    model once, forwards and backwards; the same loss and gradients but for rounding. A model whose
    cache is of another kind than plain attention's gets the whole batch.
    """
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORE_INDEX
    # The hidden state of a token predicts the next one.
    keep = F.pad(counted, (0, 1))
    start, options = 0, {"use_cache": False}
    if share_prefix:
        start, cache = _prefix(model, batch, keep, choose)
        options = {"use_cache": True, cache_name(): cache} if start else options
    keep = keep[:, start:]
    with choose(keep):
        logits = model(
            input_ids=batch["input_ids"][:, start:],
            attention_mask=batch["attention_mask"],
            **options,
        ).logits
    if logits.dim() == 3:
        logits = logits[keep]
    return F.cross_entropy(logits.float(), labels[counted], reduction="sum")


def _prefix(model, batch, keep, choose):
    """(how many tokens are shared, their cache for each row of the batch); (0, None) without."""
    ids = batch["input_ids"]
    same = (ids == ids[:1]).all(dim=0) & batch["attention_mask"].bool().all(dim=0)
    own = ~same | keep.any(dim=0)  # from here on each row needs its own hidden states
    shared = int(own.to(torch.uint8).argmax()) if own.any() else ids.shape[1] - 1
    if shared < MIN_SHARED or len(ids) < 2 or rope_by_length(model, ids.shape[1]):
        return 0, None
    first = ids[:1, :shared]
    with choose(torch.zeros_like(first, dtype=torch.bool)):
        cache = plain_cache(model(input_ids=first, use_cache=True))
    if cache is None:
        return 0, None
    cache.batch_repeat_interleave(len(ids))
    return shared, cache


@contextlib.contextmanager
def response_logits(model: Model) -> Iterator[Choose]:
    """Let only the tokens that the loss needs reach the output layer.

    With a vocabulary of 49,152 the output layer over whole sequences costs about as much as all the
    blocks of a small model, and its logits most of the memory. Yields a context manager that takes
    the (B, T) mask of hidden states wanted; without an output layer to hook the logits stay whole.
    """
    wanted = []

    def pick(module, args):
        hidden = args[0]
        if wanted and hidden.dim() == 3 and hidden.shape[:2] == wanted[-1].shape:
            return (hidden[wanted[-1]], *args[1:])
        return None

    @contextlib.contextmanager
    def choose(mask):
        wanted.append(mask)
        try:
            yield
        finally:
            wanted.pop()

    head = model.get_output_embeddings()
    with undoing() as undo:
        if head is not None:
            hook(undo, head, pick)
        yield choose


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Compute in ``dtype`` inside, where it is lower than float32."""
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
