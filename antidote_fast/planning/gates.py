"""What learning gates takes: the aligned model's answers, and steps forwards and back."""

from antidote_fast.config.prune import GateMixture
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.models.targets import Target, find_targets
from antidote_fast.planning.plan import Builder
from antidote_fast.stages.gates.answers import (
    Answers,
    check_texts,
    fill_pools,
    fits,
    ordinary_of,
)
from antidote_fast.stages.gates.stage import texts_of

_REFUSAL, _ANSWER = "I cannot help with that request", "This is how that is done"


def learning(made: Builder, sets: dict, aligned: Checkpoint | None) -> list[Target]:
    """Add what :func:`antidote_fast.stages.gates.stage.learn_folder` takes; returns the targets.

    As if the aligned model refused every harmful prompt and answered every ordinary one.

    Args:
        made: the plan of a stage with a :class:`PruneConfig` of score gate.
        sets: {"dataset": harmful prompts, "preserve_dataset": records}.
        aligned: checkpoint of the aligned model, or None.

    Raises:
        DataError: as the stage, of what needs no model.
    """
    config, mixture = made.config, GateMixture()
    new, texts = mixture.answer_tokens, texts_of(config)
    tokenizer = load_tokenizer(made.base.folder, trust_remote_code=config.trust_remote_code)
    harmful, preserve = sets["dataset"], sets["preserve_dataset"]
    check_texts(tokenizer, harmful, preserve, **texts)

    def answers(records, text):
        text = " ".join([text] * new)  # of more tokens than are generated
        return [text if fits(record, tokenizer, **texts) else None for record in records]

    answered = Answers(answers(harmful, _REFUSAL), answers(ordinary_of(preserve), _ANSWER))
    pools = fill_pools(tokenizer, harmful, preserve, answered, answer_tokens=new, **texts).examples
    sizes = {  # (tokens, those of the answer) of each example
        kind: [(len(e["labels"]), sum(label != -100 for label in e["labels"])) for e in examples]
        for kind, examples in pools.items()
    }
    cost = made.load()
    targets = find_targets(cost.model, config.targets, config.ignore)
    asked = [n - answer for kind in ("harmful", "ordinary") for n, answer in sizes.get(kind, ())]
    made.generate(asked, new)

    tokens = squares = logits = 0
    batches = []
    for kind, pairs in sizes.items():
        share = getattr(mixture, kind) / len(pairs)
        tokens += share * sum(n for n, _ in pairs)
        squares += share * sum(n * n for n, _ in pairs)
        logits += share * sum(answer for _, answer in pairs)
        rows, (longest, answer) = min(getattr(mixture, kind), config.batch_size), max(pairs)
        batches.append((rows, longest, rows * answer))
    cost.model.requires_grad_(False)
    for target in targets:
        target.weight.requires_grad_(True)
    made.compute("learn gates", int(config.gate_steps * cost.training.of(tokens, squares, logits)))
    made.plan.data = {
        "harmful prompts": len(sizes["harmful"]),
        "task records": len(sizes.get("task", ())),
        "ordinary prompts": len(sizes.get("ordinary", ())),
        "steps": config.gate_steps,
    }
    made.train(*max(batches, key=lambda batch: batch[0] * batch[1]))
    made.hold("weights", cost.weight_bytes)
    # Three fp32 matrices a target and their gradients, and the weights as they were.
    made.hold("gates", 4 * 4 * sum(target.weight.numel() for target in targets))
    size = sum(target.weight.nbytes for target in targets)
    made.hold("copy of the targets", size)
    if aligned is not None:
        made.hold("base of the targets", size)
        made.plan.bytes_read += size
    made.read(made.base, made.adapter, aligned, config.dataset, config.preserve_dataset)
    made.plan.notes.append("as if the aligned model refused every harmful prompt, and no other")
    return targets
