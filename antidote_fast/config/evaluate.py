"""What ``evaluate`` takes: judges, prompts, a task."""

from dataclasses import dataclass
from typing import Literal

from antidote_fast.config.base import (
    StageConfig,
    Template,
    check,
    contents,
    number,
    path,
    set_field,
)

Task = Literal["sst2", "agnews", "gsm8k", "alpaca", "label"]
# The paper's evaluation: held-out harmful prompts, their judge, and the test data of each task.
PAPER_EVALUATION = {
    "harmful_dataset": "PKU-Alignment/BeaverTails:eval",
    "judge": "beaver-dam",
    "num_samples": 1000,
}
PAPER_DRIFT_DATASET = "PKU-Alignment/BeaverTails:safe"
PAPER_TASKS = {
    "sst2": "stanfordnlp/sst2",
    "agnews": "fancyzhang/ag_news",
    "gsm8k": "openai/gsm8k",
    "alpaca": "tatsu-lab/alpaca_eval",
}
PAPER_WIN_RATE_JUDGE = "Qwen/Qwen2.5-7B-Instruct"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Measure harmful score, finetune accuracy, benign refusal rate and embedding drift.

    Args:
        adapter: PEFT adapter folder on top of the model.
        harmful_dataset: held-out harmful prompts, for the harmful score.
        task_dataset: held-out records of the user's task, for the finetune accuracy.
        task: how an answer is scored: sst2, agnews, gsm8k, alpaca (win rate), or
            label (exact match with the record's output).
        benign_dataset: ordinary prompts, for the benign refusal rate.
        judge: refusal (the default: phrases, no download), beaver-dam (PKU-Alignment/beaver-dam-7b,
            or beaver-dam:FOLDER for a local copy), or the path or hub name of a
            text-classification model.
        harmful_labels: labels of that classifier which mean harm; needed where their names do not
            tell.
        win_rate_judge: for task alpaca, the path or hub name of a chat model that says which of two
            answers is better.
        reference_model: the aligned model, for the embedding drift against drift_dataset.
        drift_dataset: alignment records on which the drift is measured.
        num_samples: prompts used of each data set; all if null.
        templates: prompt templates that are asked; default the training's alone.
        max_new_tokens: tokens generated an answer; default 128, and 16 of a label.
        save_outputs: also write every prompt and answer, as outputs.jsonl (harmful text!).
        paper: the paper's protocol in flags not given: 1000 unsafe prompts of BeaverTails, judged
            by beaver-dam; the hub's test data of task; for alpaca a win_rate_judge; with
            reference_model the drift on BeaverTails' safe answers.
    """

    adapter: str | None = contents(None)
    harmful_dataset: str | None = contents(None)
    task_dataset: str | None = contents(None)
    task: Task = "label"
    benign_dataset: str | None = contents(None)
    judge: str | None = path(None)
    harmful_labels: list[str] | None = None
    win_rate_judge: str | None = path(None)
    reference_model: str | None = contents(None)
    drift_dataset: str | None = contents(None)
    num_samples: int | None = number(None)
    templates: list[Template] | None = None
    max_new_tokens: int | None = number(None)
    save_outputs: bool = False
    paper: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.paper:
            self._fill_in(**PAPER_EVALUATION, task_dataset=PAPER_TASKS.get(self.task))
            if self.task == "alpaca":
                self._fill_in(win_rate_judge=PAPER_WIN_RATE_JUDGE)
            if self.reference_model is not None:
                self._fill_in(drift_dataset=PAPER_DRIFT_DATASET)
        self._fill_in(judge="refusal")
        together = (self.reference_model is None) == (self.drift_dataset is None)
        accepted = "given together with drift_dataset"
        check(together, "reference_model", self.reference_model, accepted)
        together = (self.task == "alpaca") == (self.win_rate_judge is not None)
        accepted = "given with task alpaca, and only with it"
        check(together or not self.task_dataset, "win_rate_judge", self.win_rate_judge, accepted)
        kinds = ("harmful", "task", "benign", "drift")
        some = any(getattr(self, f"{kind}_dataset") for kind in kinds)
        accepted = "a data set, unless task_dataset, benign_dataset or drift_dataset is given"
        check(some, "harmful_dataset", self.harmful_dataset, accepted)

    def _fill_in(self, **values):
        for name, value in values.items():
            if getattr(self, name) is None:
                set_field(self, name, value)
