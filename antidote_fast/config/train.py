"""One frozen dataclass a stage: at once the Python config, the YAML file and the flags.

Values are checked when a config is made, so a wrong one is refused before anything is loaded.
Defaults are the paper's settings (arXiv 2408.09600) where it has one.
"""

from dataclasses import dataclass, field
from typing import Literal

from antidote_fast.config.base import (
    StageConfig,
    Template,
    aside,
    check,
    check_data_set,
    check_left_out,
    contents,
    number,
)

# The flags of each defense; given with another one they are refused.
DEFENSE_FLAGS = {
    "vaccine": ("vaccine_rho",),
    "repnoise": ("harmful_dataset", "repnoise_alpha", "repnoise_beta"),
    "lisa": (
        "safe_dataset",
        "num_safe_samples",
        "lisa_rho",
        "lisa_alignment_steps",
        "lisa_finetune_steps",
    ),
    "ldifs": ("ldifs_lambda",),
}
# The data set that a defense needs.
_DEFENSE_DATA = {"repnoise": "harmful_dataset", "lisa": "safe_dataset"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """What align and finetune share.

    Args:
        tuning: lora trains an adapter, full trains every weight.
        templates: prompt templates in each of which every record is trained on; default template
            alone. A model that is trained in one template may behave otherwise in another.
        learning_rate: AdamW step size.
        lr_scheduler_type: a schedule name of transformers.
        warmup_ratio: share of the steps that warm up.
        weight_decay: AdamW weight decay.
        num_train_epochs: passes over the data.
        gradient_accumulation_steps: batches an optimizer step.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter.
        lora_dropout: dropout before the adapter.
        lora_targets: modules that get an adapter.
        save_steps: optimizer steps between checkpoints, from which resume goes on; none if null.
        resume: go on where an interrupted run of the same command stopped, or leave it at that
            where output_dir is whole already.
    """

    tuning: Literal["lora", "full"] = "lora"
    templates: list[Template] | None = None
    learning_rate: float = number(1e-4)
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = number(0.0, "in [0, 1)")
    weight_decay: float = number(0.1, "at least 0")
    num_train_epochs: float = number(20)
    batch_size: int = number(5)
    gradient_accumulation_steps: int = number(1)
    lora_r: int = number(256)
    lora_alpha: int = number(4)
    lora_dropout: float = number(0.0, "in [0, 1)")
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    save_steps: int | None = aside(None, "greater than 0")
    resume: bool = aside(False)

    @property
    def used_templates(self) -> list[str]:
        """The templates of training."""
        return [self.template] if self.templates is None else self.templates

    def __post_init__(self):
        super().__post_init__()
        different = len(set(self.used_templates)) == len(self.used_templates) > 0
        check(different, "templates", self.templates, "different ones, and at least one")
        chosen = getattr(self, "defense", "sft")  # which align and finetune declare
        for defense, flags in DEFENSE_FLAGS.items():
            if isinstance(self, FinetuneConfig):  # there harmful data are the attack's
                flags = [name for name in flags if name != "harmful_dataset"]
            if defense != chosen:
                check_left_out(self, flags, f"without defense {defense}")
        if chosen in _DEFENSE_DATA:
            check_data_set(self, _DEFENSE_DATA[chosen], f"with defense {chosen}")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TrainConfig):
    """Tune a base model on safe data; the adapter is merged and a whole model written.

    Args:
        dataset: safe records: a local JSON or JSONL file, or a hub name.
        num_train_samples: records used, from the start of the data.
        defense: sft is none; vaccine trains under the worst shift of what attention puts out;
            repnoise turns what the model makes of harmful text into noise.
        vaccine_rho: size of vaccine's shift, in all layers together.
        harmful_dataset: harmful records, for repnoise: those of a safe record's own prompt are
            paired with it, the others in turn.
        repnoise_alpha: weight of the loss on harmful answers, which is raised.
        repnoise_beta: weight of the distance from noise.
    """

    dataset: str = contents()
    num_train_samples: int | None = number(5000)
    learning_rate: float = number(1e-3)
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = number(0.1, "in [0, 1)")
    defense: Literal["sft", "vaccine", "repnoise"] = "sft"
    vaccine_rho: float = number(2.0, "at least 0")
    harmful_dataset: str | None = contents(None)
    repnoise_alpha: float = number(0.1, "at least 0")
    repnoise_beta: float = number(0.001, "at least 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Tune an aligned model on a user's data, a share of it harmful (the attack).

    Args:
        dataset: the user's records: a local JSON or JSONL file, or a hub name.
        harmful_dataset: harmful records mixed in; needed where poison_ratio > 0.
        poison_ratio: share of the training samples that is harmful, in [0, 1].
        num_train_samples: training samples in all, harmful ones included; all there are if null.
        defense: sft is none; lisa alternates between the user's and safe data, held near where
            the other one left off; ldifs holds what the MLPs put out near the aligned model's.
        safe_dataset: safe records, for lisa.
        num_safe_samples: safe records used, from the start of the data.
        lisa_rho: weight of the distance from the other data's weights.
        lisa_alignment_steps: steps on safe data in a row; in a short run both are scaled down.
        lisa_finetune_steps: steps on the user's data in a row.
        ldifs_lambda: weight of the mean squared distance of the MLPs' outputs.
    """

    dataset: str = contents()
    harmful_dataset: str | None = contents(None)
    poison_ratio: float = number(0.2, "in [0, 1]")
    num_train_samples: int | None = number(5000)
    defense: Literal["sft", "lisa", "ldifs"] = "sft"
    safe_dataset: str | None = contents(None)
    num_safe_samples: int | None = number(10000)
    lisa_rho: float = number(1.0, "at least 0")
    lisa_alignment_steps: int = number(100)
    lisa_finetune_steps: int = number(900)
    ldifs_lambda: float = number(1.0, "at least 0")

    def __post_init__(self):
        super().__post_init__()
        if self.poison_ratio > 0:
            check_data_set(self, "harmful_dataset", f"where poison_ratio={self.poison_ratio} > 0")
