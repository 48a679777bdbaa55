"""Every score, declared once: what ``--score`` accepts, and what each of them needs.

A score says in which order weights are removed. To add one: write a module in
:mod:`antidote_fast.pruning.scores`, whose docstring says what a module holds, and add one line to
``SCORES``. The flags, their help, the checks, the sweep and the dry run read this table, which
loads no torch. A repair of another kind than removing weights would be a table like it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What is to be known of a score before anything is computed.

    Args:
        name: what ``--score`` is given.
        formula: what it is, in words for ``--help``.
        needs_norms: it goes by activation norms, of ``dataset`` or saved ones.
        own_matrix: it is a matrix beside the weight, not the weight's size times a norm; so nothing
            is preserved or reverted by it, and sharded weights have none.
        learner: the module that learns it before the prune, from a model and the data sets in
            ``needs``; as :mod:`antidote_fast.stages.gates.stage`. None: it is computed.
        needs: fields of :class:`antidote_fast.config.prune.PruneConfig` that must be given; of
            several in one entry, one of them.
        settings: fields that are for this score alone.
        refuses: fields that have no meaning with it.
        default_ratio, default_scope: the fraction removed, and what it is of, where none is given.
        module: what computes it; default that of its name in :mod:`antidote_fast.pruning.scores`.
        title: how the title of a model card goes on behind "Pruned"; default by its name.
        method: what was done, and whose method it is, as the card's first sentence ends.
        tag: what the card is found by.
    """

    name: str
    formula: str
    needs_norms: bool = False
    own_matrix: bool = False
    learner: str | None = None
    needs: tuple[tuple[str, ...], ...] = ()
    settings: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    default_ratio: float = 0.1
    default_scope: str = "row"
    module: str | None = None
    title: str | None = None
    method: str = "to remove the weights of the highest score"
    tag: str = "pruned"

    @property
    def refused(self) -> tuple[str, ...]:
        """All fields that must be left out with this score."""
        preserving = ("preserve_dataset", "preserve_norms", "score_delta")
        names = (*self.refuses, *(preserving if self.own_matrix else ()))
        needed = {name for names in self.needs for name in names}
        return tuple(name for name in dict.fromkeys(names) if name not in needed)


SCORES = {
    score.name: score
    for score in (
        Score(
            "wanda",
            "|W| * activation norm",
            title="with Antidote",
            method="to remove weights that matter most on harmful data (Antidote, arXiv "
            "2408.09600)",
            tag="antidote",
            needs_norms=True,
        ),
        Score(
            "magnitude",
            "|W|",
            title="by magnitude",
            method="to remove its largest weights, whatever they serve (a baseline in arXiv "
            "2408.09600, not its method Antidote)",
            tag="magnitude-pruning",
        ),
        Score(
            "random",
            "uniform noise",
            title="at random",
            method="to remove weights at random (a baseline in arXiv 2408.09600, not its method "
            "Antidote)",
            tag="random-pruning",
            own_matrix=True,
        ),
        Score(
            "gate",
            "gates on the weights, learned to give back the aligned model's refusals and to keep "
            "what preserve_dataset shows",
            title="by learned gates",
            method="to remove weights that learned gates found to serve harm: without them the "
            "aligned model's refusals of harmful prompts come back (a method of antidote-fast, not "
            "that of the paper Antidote, arXiv 2408.09600; learned masks on frozen weights are of "
            "Piggyback, arXiv 1801.06519)",
            tag="learned-gates",
            own_matrix=True,
            learner="antidote_fast.stages.gates.stage",
            needs=(("dataset",), ("preserve_dataset", "ordinary_dataset")),
            settings=(
                *("gate_steps", "gate_learning_rate", "gate_answer_tokens", "gate_templates"),
                *("ordinary_dataset", "num_ordinary_samples"),
            ),
            refuses=(
                *("norms", "preserve_norms", "preserve_ratio", "score_delta", "stream"),
                *("device_map", "response_only", "aggregation"),
            ),
            default_ratio=0.5,
            default_scope="tensor",
        ),
    )
}


def computed_scores() -> dict[str, Score]:
    """The scores that are not learned, which a weight at a time or an adapter of many can have."""
    return {name: score for name, score in SCORES.items() if score.learner is None}
