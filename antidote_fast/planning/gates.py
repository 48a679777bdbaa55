"""What learning gates adds to the plan of a prune: the answers, and steps forwards and back."""

from antidote_fast.config.prune import GateMixture
from antidote_fast.data.batches import build_prompt, encode, prompt_ids
from antidote_fast.errors import DataError
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.cost import cost_of
from antidote_fast.stages.gates.answers import ordinary_of


def learning(made, config, base, adapter, sets, adapt=None, aligned=None):
    """Add the learning of gates, as of :func:`antidote_fast.stages.gates.stage.learn_folder`.

    As if the aligned model refused every harmful prompt and answered every ordinary one.

    Args:
        made: the :class:`~antidote_fast.planning.plan.Builder`.
        config: a :class:`PruneConfig` of score gate.
        base, adapter, aligned: checkpoints, or None; ``adapt`` puts on an adapter that is not there
            yet.
        sets: {"dataset": harmful prompts, "preserve_dataset": records}.

    Returns:
        (:class:`~antidote_fast.planning.cost.ModelCost`, the targets).

    Raises:
        DataError: as the stage, of what needs no model.
    """
    mixture, trust = GateMixture(), config.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)
    harmful, preserve = sets["dataset"], sets["preserve_dataset"]
    lengths = {
        "harmful": _prompts(harmful, tokenizer, config),
        "ordinary": _prompts(ordinary_of(preserve), tokenizer, config),
    }
    if len(lengths["harmful"]) < 2:
        raise DataError(
            f"dataset: {len(lengths['harmful'])} of {len(harmful)} harmful prompts have fewer "
            "tokens than max_seq_length; at least 2 refusals are needed to learn from"
        )
    if adapter is not None:
        adapt = adapt or (lambda model: load_adapter(model, adapter))
    cost = cost_of(config, base, adapt)
    found = find_targets(cost.model, config.targets, config.ignore)
    new = mixture.answer_tokens
    asked = sorted((*lengths["harmful"], *lengths["ordinary"]), reverse=True)
    chunks = [asked[i : i + config.batch_size] for i in range(0, len(asked), config.batch_size)]
    tokens = sum(len(chunk) * chunk[0] for chunk in chunks)
    squares = sum(len(chunk) * chunk[0] ** 2 for chunk in chunks)
    made.compute("read prompts", cost.forward_flops(tokens, squares, len(asked)))
    seen = sum(len(chunk) * (chunk[0] * new + new**2 // 2) for chunk in chunks)
    made.decode("answer", cost.forward_flops(new * len(asked), seen, new * len(asked)))

    sizes = {kind: [(n + new, new) for n in found_] for kind, found_ in lengths.items()}
    sizes["task"] = _task(preserve, tokenizer, config)
    tokens = squares = answers = 0
    widest = (1, 1, 1)
    for kind, pairs in sizes.items():
        count = getattr(mixture, kind) if pairs else 0
        if not count:
            continue
        tokens += count * sum(n for n, _ in pairs) / len(pairs)
        squares += count * sum(n * n for n, _ in pairs) / len(pairs)
        answers += count * sum(n for _, n in pairs) / len(pairs)
        rows, longest = min(count, config.batch_size), max(pairs)
        widest = max(widest, (rows, longest[0], rows * longest[1]), key=lambda b: b[0] * b[1])
    steps, gates = config.gate_steps, sum(target.weight.numel() for target in found)
    once = cost.training_flops(tokens, squares, answers, frozen=True)
    once += 2 * (gates - cost.lora) * tokens  # the gradients of the targets alone
    made.compute("learn gates", int(steps * once))
    made.shape = widest[:2]
    made.plan.data = {
        "harmful prompts": len(lengths["harmful"]),
        "task records": len(sizes["task"]),
        "ordinary prompts": len(lengths["ordinary"]),
        "steps": steps,
    }
    _hold(made, cost, found, widest, aligned)
    made.read(base, adapter, aligned, config.dataset, config.preserve_dataset)
    made.plan.notes.append("as if the aligned model refused every harmful prompt, and no other")
    return cost, found


def _hold(made, cost, found, widest, aligned):
    """Memory: three fp32 matrices a target, their gradients, and the weights as they were."""
    for parameter in cost.model.parameters():
        parameter.requires_grad_(False)
    for target in found:
        target.weight.requires_grad_(True)
    size = sum(target.weight.nbytes for target in found)
    attention = "eager" if made.device.type == "cpu" else "sdpa"
    made.hold("weights", cost.weight_bytes)
    made.hold("activations and gradients", cost.training_bytes(*widest, attention=attention))
    made.hold("gates", 4 * 4 * sum(target.weight.numel() for target in found))
    made.hold("copy of the targets", size)
    if aligned is not None:
        made.hold("base of the targets", size)
        made.plan.bytes_read += size


def _prompts(records, tokenizer, config):
    """Tokens of each prompt that is not too long."""
    texts = [(build_prompt(r, config.template, tokenizer), r.where or "a prompt") for r in records]
    limit = config.max_seq_length
    lengths = (len(prompt_ids(text, tokenizer, limit, where)) for text, where in texts)
    return [length for length in lengths if length < config.max_seq_length]


def _task(preserve, tokenizer, config):
    """(tokens, response tokens) of each record with an output whose prompt is not too long."""
    records = [record for record in preserve if record.output.strip()]
    short = [record for record in records if _prompts([record], tokenizer, config)]
    if not short:
        return []
    examples = encode(short, tokenizer, config.template, config.max_seq_length)
    return [(len(e["labels"]), sum(label != -100 for label in e["labels"])) for e in examples]
