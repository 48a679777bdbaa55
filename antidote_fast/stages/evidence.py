"""What a prune goes by: norms, scores, an aligned model; and which weights that is about."""

from dataclasses import dataclass, field

import torch

from antidote_fast.errors import DataError, first_line
from antidote_fast.files.bounds import bounded
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.targets import ALL_LINEAR, find_targets, select_keys
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.pruning.evidence import Evidence, check_base
from antidote_fast.stages.inputs import load_norms


@dataclass
class Known:
    """What a prune goes by, and what its report says of that.

    Args:
        backend: as :func:`antidote_fast.stages.inputs.describe_backend`.
        norms, counts: the norms, and what the report says of them; None and empty without.
        preserve_norms, preserve_counts: the same of the data to preserve.
        aligned: checkpoint of the model that removed weights fall back to, or None.
        scores, gate_counts: of score gate, as
            :func:`antidote_fast.stages.gates.learn.learn_gates` gives them; None and empty without.
    """

    backend: dict
    norms: ActivationNorms | None = None
    counts: dict = field(default_factory=dict)
    preserve_norms: ActivationNorms | None = None
    preserve_counts: dict = field(default_factory=dict)
    aligned: Checkpoint | None = None
    scores: dict[str, torch.Tensor] | None = None
    gate_counts: dict = field(default_factory=dict)

    def take_given(self, config, norms=None, preserve_norms=None):
        """Norms that are there already: in memory, or in the files that the config names."""
        if norms is None and config.norms is not None:
            norms = load_norms(config.norms)
        if preserve_norms is None and config.preserve_norms is not None:
            preserve_norms = load_norms(config.preserve_norms, "preserve_norms")
        if norms is not None:
            self.norms, self.counts = norms, counts_of(norms)
        if preserve_norms is not None:
            self.preserve_norms, self.preserve_counts = preserve_norms, counts_of(preserve_norms)

    def check_base(self, fingerprint):
        """Refuse norms of another base model."""
        for name in ("norms", "preserve_norms"):
            given = getattr(self, name)
            if given is not None:
                check_base(given, fingerprint, name)

    def missing(self, config) -> list[str]:
        """The fields of the config that name data that a model is still to see."""
        learns = config.score == "gate" and self.scores is None
        needed = {
            "dataset": learns or (config.score == "wanda" and self.norms is None),
            "preserve_dataset": learns or (config.preserves and self.preserve_norms is None),
        }
        return [name for name, is_needed in needed.items() if is_needed]

    def take_collected(self, name, norms, counts):
        """Norms that were collected on the data of this field."""
        if name == "dataset":
            self.norms, self.counts = norms, counts
        else:
            self.preserve_norms, self.preserve_counts = norms, counts

    @property
    def named(self) -> ActivationNorms | None:
        """Norms whose names say which weights are pruned, where there are any."""
        return self.preserve_norms if self.norms is None else self.norms

    def evidence(self, score, base_weights=None, transposed=(), routed=()) -> Evidence:
        """What :func:`antidote_fast.pruning.prune.prune_state_` goes by, all of this in memory."""
        return Evidence(
            norms=self.norms,
            score=score,
            preserve_norms=self.preserve_norms,
            base_weights=base_weights,
            scores=self.scores,
            transposed=transposed,
            routed=routed,
        )

    def entries(self) -> dict:
        """What report.json says of all this."""
        found = {**self.counts, **self.backend}
        if self.preserve_norms is not None:
            found["preserve_data"] = self.preserve_counts
        if self.gate_counts:
            found["gate"] = self.gate_counts
        if self.aligned is not None:
            found["base_model_fingerprint"] = self.aligned.fingerprint()
        return found


def weights_to_prune(config, source, named):
    """(names of the weights, how those are saved), by norms that name them or by the targets."""
    if named is not None:
        keys = named.keys
        if config.targets is not None or config.ignore:
            chosen = ALL_LINEAR if config.targets is None else config.targets
            keys = select_keys(keys, chosen, config.ignore)
        return keys, {"transposed": sorted(named.transposed), "routed": sorted(named.routed)}
    if source.is_adapter:
        return select_keys(source.tensors, config.targets, config.ignore), {}
    # Which weights are saved transposed only the model's own code knows: build it without memory.
    import transformers

    trust = config.trust_remote_code
    try:
        settings = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
        with torch.device("meta"), bounded(source):
            model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except DataError:
        raise
    except Exception as error:  # whatever a foreign config makes transformers raise
        raise DataError(f"{source.folder}: cannot be loaded: {first_line(error)}") from error
    found = find_targets(model, config.targets, config.ignore)
    return [target.key for target in found], {
        "transposed": [target.key for target in found if target.transposed],
        "routed": [target.key for target in found if target.routed],
    }
