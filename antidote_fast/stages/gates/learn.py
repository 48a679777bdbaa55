"""Score gate: a gate on each target weight, learned, says how much of it is needed.

Weights become ``base + m * (W - base)`` with gates m in [0, 1]. The gates learn to give back the
aligned model's refusals of harmful prompts, while the user's task and the aligned model's answers
to ordinary prompts stay likely; in the second half the weights are those that the selection would
leave. The score of a weight is 1 - m.

Learned masks on frozen weights are those of Piggyback (Mallya et al., 2018, arXiv 1801.06519) and
movement pruning (Sanh et al., 2020, arXiv 2005.07683); the gradient goes straight through the
selection (Bengio et al., 2013, arXiv 1308.3432), its size Adam's.
"""

import contextlib
import functools
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from antidote_fast import ops
from antidote_fast.config.base import check
from antidote_fast.config.prune import (
    GATE_LEARNING_RATE,
    GATE_STEPS,
    GateMixture,
    check_gate_templates,
)
from antidote_fast.data.batches import collate
from antidote_fast.data.records import Record
from antidote_fast.distributed.fsdp import is_sharded
from antidote_fast.errors import AntidoteError, UsageError
from antidote_fast.models.adapters import adapter_off
from antidote_fast.models.targets import find_targets
from antidote_fast.models.tokens import check_examples
from antidote_fast.models.undo import eval_mode, undoing
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.layers import prepare
from antidote_fast.selection import Selection, check_seed
from antidote_fast.stages.gates.answers import KINDS, Answers, answer_prompts, fill_pools
from antidote_fast.system.progress import Progress, track
from antidote_fast.training.objective import num_response_tokens, response_logits, response_loss

_BETAS, _EPS = (0.9, 0.95), 1e-9


def learn_gates(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    selection: Selection,
    *,
    ordinary: Sequence[Record] | None = None,
    aligned: Answers | None = None,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    steps: int = GATE_STEPS,
    learning_rate: float = GATE_LEARNING_RATE,
    mixture: GateMixture = GateMixture(),  # noqa: B008 - frozen
    seed: int = 0,
    template: str = "alpaca",
    templates: Sequence[str] | None = None,
    max_seq_length: int = 512,
    batch_size: int = 8,
    backend: str | None = None,
    progress: Progress = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Learn how much each target weight is needed; the model ends as it began, bit for bit.

    Args:
        model: a transformers model, or a PEFT model with one active LoRA adapter, on one device.
        tokenizer: its own.
        harmful: harmful prompts, records whose outputs are not looked at.
        preserve: records with an output are the user's task; those without are ordinary prompts,
            unless ``ordinary`` is given.
        selection: the :class:`Selection` that will prune by the scores, of any scope, or n_m.
        ordinary: ordinary prompts, whose outputs are not looked at.
        aligned: :class:`Answers` of the aligned model, of
            :func:`~antidote_fast.stages.gates.answers.answer_prompts`; None asks the model with its
            adapter switched off.
        base_weights: {parameter name: tensor}: what removed weights become, as of
            :func:`antidote_fast.prune_model_`; None: zero.
        targets, ignore: as :func:`antidote_fast.models.targets.find_targets`.
        steps: of Adam on the gates.
        learning_rate: its step size; in the second half it falls to zero in a line.
        mixture: what one step learns from.
        seed: of the order of the records.
        template, max_seq_length: as of every stage.
        templates: those in which refusals and ordinary answers are learned; None: ``template``.
        batch_size: sequences of one kind that go through the model at once, at most.
        backend: as in :mod:`antidote_fast.ops`.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        ({parameter name: (out, in) fp32 on the weight's device, the scores}, what the report says).

    Raises:
        UsageError: a value out of range; a model that is sharded, quantised or on several devices;
            one without an adapter where ``aligned`` is not given.
        DataError: too few refusals, nothing to preserve; as :func:`antidote_fast.prune_model_` of
            its weights. NothingPruned: no target.
        AntidoteError: a loss or a gate that is not finite.
    """
    _check_values(selection, steps, learning_rate)
    seed = check_seed(seed)
    device = _check_model(model)
    by_key = {target.key: target for target in find_targets(model, targets, ignore)}
    weights = {key: target.weight.detach() for key, target in by_key.items()}
    transposed = {key for key, target in by_key.items() if target.transposed}
    evidence = Evidence(score="gate", base_weights=base_weights, transposed=transposed)
    layers, _ = prepare(weights, evidence, selection.scope)
    check_gate_templates(templates)
    options: dict[str, Any] = {"template": template, "max_seq_length": max_seq_length}
    options |= {"templates": templates, "answer_tokens": mixture.answer_tokens}
    with _as_it_was(model) as undo:
        if aligned is None:
            with adapter_off(model):
                how = options | {"batch_size": batch_size, "progress": progress}
                aligned = answer_prompts(model, tokenizer, harmful, preserve, ordinary, **how)
        pools = fill_pools(tokenizer, harmful, preserve, aligned, ordinary, **options)
        _check_lengths(model, pools, max_seq_length)
        check_examples(model, *pools.examples.values())
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        gates = [_Gate(layer, by_key[layer.key].weight, selection) for layer in layers]
        undo.later(lambda: [gate.restore() for gate in gates])
        for gate in gates:
            gate.weight.requires_grad_(True)
        draw = _drawn(pools, mixture, random.Random(seed))
        losses, start = [], time.perf_counter()
        with response_logits(model) as choose, torch.enable_grad():
            backward = functools.partial(_backward, model, choose, gates, device)
            for step in track(range(steps), "learn gates", progress):
                hard = step >= steps // 2
                _put(gates, selection, hard, backend)
                loss = {
                    kind: backward(weight, _batches(examples, batch_size, tokenizer))
                    for kind, (weight, examples) in next(draw).items()
                }
                _check_finite(loss, step)
                falling = (steps - step) / (steps - steps // 2) if hard else 1.0
                for gate in gates:
                    gate.step(learning_rate * falling, step + 1)
                _check_gates(gates, step)
                losses.append({kind: round(value, 6) for kind, value in loss.items()})
    scores = {gate.key: 1 - gate.m for gate in gates}
    return scores, {
        "steps": steps,
        "learning_rate": learning_rate,
        "mixture": asdict(mixture),
        "templates": list(templates or [template]),
        **{kind: pools.counts[kind] for kind in KINDS if kind in pools.counts},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seconds": round(time.perf_counter() - start, 3),
    }


class _Gate:
    """The gates of one weight with their moments: ``m`` is (out, in) fp32, as all others here."""

    def __init__(self, layer, weight, selection):
        self.key, self.weight = layer.key, weight
        self._transposed = layer.transposed
        self._original = layer.matrix.detach().clone(memory_format=torch.contiguous_format)
        self._base = layer.base
        ratio = selection.ratio if selection.n_m is None else selection.n_m[0] / selection.n_m[1]
        shape, device = self._original.shape, self._original.device
        self.m = torch.full(shape, 1 - ratio, dtype=torch.float32, device=device)
        self._gradient, self._first, self._second = (torch.zeros_like(self.m) for _ in range(3))

    def write(self, mask, backend):
        """Write the weights that a mask leaves; without one base + m * (W - base), rounded once."""
        if mask is not None:
            left = self._original.clone()
            left = ops.apply_mask_(left, mask, base_weight=self._base, backend=backend)
        else:
            left = self.m * self._difference()
            left = left if self._base is None else self._base.float() + left
        self._write(left)

    def restore(self):
        """Write the weights as they were."""
        self._write(self._original)

    def take_gradient(self):
        """Add the weight's gradient, and clear it; an expert that no token reached has none."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is not None:
            self._gradient += gradient.t() if self._transposed else gradient

    def step(self, size, number):
        """Step ``number`` (from 1) of Adam, of this size."""
        gradient = self._gradient.mul_(self._difference())
        first, second = _BETAS
        self._first.mul_(first).add_(gradient, alpha=1 - first)
        self._second.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (self._second / (1 - second**number)).sqrt_().add_(_EPS)
        self.m.sub_((self._first / (1 - first**number)).div_(scale).mul_(size)).clamp_(0, 1)
        gradient.zero_()

    def _difference(self):
        original = self._original.float()
        return original if self._base is None else original - self._base.float()

    def _write(self, matrix):
        with torch.no_grad():
            self.weight.copy_(matrix.t() if self._transposed else matrix)


def _batches(examples, size, tokenizer):
    return [collate(examples[i : i + size], tokenizer) for i in range(0, len(examples), size)]


def _backward(model, choose, gates, device, weight, batches):
    """Add the gradient of ``weight`` times the mean loss of these batches; returns that mean."""
    total, mean = sum(map(num_response_tokens, batches)), 0.0
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        part = response_loss(model, batch, choose, share_prefix=True) / total
        (weight * part).backward()
        mean += float(part.detach())
        for gate in gates:
            gate.take_gradient()
    return mean


def _put(gates, selection, hard, backend):
    """Write the weights of a step: the gates' own share, or what the selection leaves."""
    masks: Any = [None] * len(gates)
    if hard:
        scores = [1 - gate.m for gate in gates]
        _, masks = ops.prune_many_(scores, masks, selection, return_mask=True, backend=backend)
    for gate, mask in zip(gates, masks, strict=True):
        gate.write(mask, backend)


def _drawn(pools, mixture, rng):
    """{kind: (weight of its loss, examples)} of one step after another, for ever."""
    weights = {"harmful": 1.0, "task": mixture.task_weight, "ordinary": mixture.ordinary_weight}
    cycles = {kind: _cycled(pools.examples[kind], rng) for kind in KINDS if kind in pools.examples}
    while True:
        yield {
            kind: (weights[kind], list(itertools.islice(cycle, getattr(mixture, kind))))
            for kind, cycle in cycles.items()
            if getattr(mixture, kind) and weights[kind]
        }


def _cycled(pool, rng):
    """The pool in a shuffled order, again and again."""
    while True:
        yield from rng.sample(pool, len(pool))


@contextlib.contextmanager
def _as_it_was(model):
    """Give modes, gradients and what is trained back at the end, whatever happens."""
    trained = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def back():
        for parameter, requires_grad, gradient in trained:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    with undoing() as undo:
        undo.later(back)
        eval_mode(model, undo)
        yield undo


def _check_values(selection, steps, learning_rate):
    if not isinstance(selection, Selection):
        raise UsageError(f"selection={selection!r:.80}: must be a Selection")
    for name, unusable in (("largest", False), ("score_delta", True)):
        accepted = f"{not unusable} with score gate"
        check(getattr(selection, name) is not unusable, f"selection.{name}", unusable, accepted)
    usable = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    check(usable, "steps", steps, "an integer of at least 1")
    usable = isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf
    check(usable, "learning_rate", learning_rate, "a finite number above 0")


def _check_model(model):
    """The device of a model whose weights gates can be put on."""
    devices = {parameter.device for parameter in model.parameters()}
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise UsageError("model: must not be sharded with score gate; prune the saved checkpoint")
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        shown = ", ".join(sorted(map(str, devices)))
        raise UsageError(f"model: is on {shown}; must be on one device with score gate")
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized or getattr(model, "is_quantized", False):
        raise UsageError("model: must not be quantised with score gate; load it in bfloat16")
    return devices.pop()


def _check_lengths(model, pools, max_seq_length):
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(e["input_ids"]) for pool in pools.examples.values() for e in pool)
    accepted = f"at most {positions}, the positions that the model has, for these data"
    enough = positions is None or longest <= positions
    check(enough, "max_seq_length", max_seq_length, accepted)


def _check_finite(loss, step):
    for kind, value in loss.items():
        if not math.isfinite(value):
            where = f"is {value} in step {step + 1}"
            raise AntidoteError(f"gates: the {kind} loss {where}; use another dtype")


def _check_gates(gates, step):
    """Refuse gates that a step made NaN; whatever else it did, they are in [0, 1]."""
    sums = torch.stack([gate.m.sum() for gate in gates])
    if not bool(torch.isfinite(sums).all()):
        key = gates[int(torch.isfinite(sums).to(torch.uint8).argmin())].key
        raise AntidoteError(
            f"gates: those of {key} are not finite after step {step + 1}; use another dtype"
        )
