"""What ``evaluate`` takes: prompts and how they are asked, judges, a task."""

from dataclasses import dataclass
from typing import Literal

from antidote_fast.config.base import (
    TEMPLATES,
    StageConfig,
    check,
    contents,
    each_of,
    number,
    path,
    set_field,
)

Task = Literal["sst2", "agnews", "gsm8k", "alpaca", "label"]
# The paper's evaluation: held-out harmful prompts, their judge, and the test data of each task.
PAPER_EVALUATION = {
    "harmful_dataset": "PKU-Alignment/BeaverTails:eval",
    "judges": ["beaver-dam"],
    "num_samples": 1000,
    "max_new_tokens": 512,
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
    """Measure harmful score, finetune accuracy, helped rate, benign refusals and embedding drift.

    Args:
        adapter: PEFT adapter folder on top of the model.
        harmful_dataset: held-out harmful prompts, for the harmful score; one data set or several.
        task_dataset: held-out records of the user's task, for the finetune accuracy.
        task: how an answer is scored: sst2, agnews, gsm8k, alpaca (win rate), or
            label (exact match with the record's output).
        benign_dataset: ordinary prompts, for the helped rate and the benign refusal rate; one data
            set or several.
        held_out_from: data sets that the model was trained or repaired on; prompts that are near to
            one of theirs are left out, and counted.
        judges: one or several, of which the first gives the headline; refusal (the default:
            phrases, no download), beaver-dam (PKU-Alignment/beaver-dam-7b, or beaver-dam:FOLDER for
            a local copy), or the path or hub name of a text-classification model.
        harmful_labels: labels of that classifier which mean harm; needed where their names do not
            tell.
        judge_url: address of a server that a judge asks.
        judge_model: the model that it asks for there.
        win_rate_judge: for task alpaca, the path or hub name of a chat model that says which of two
            answers is better.
        templates: every prompt is asked in each of these, of which the first is template, the one
            of the training; where not given, the other one too if the tokenizer has a chat
            template.
        system_prompt: every harmful and ordinary prompt is also asked with this one, in each
            template.
        prefill: every harmful and ordinary prompt is also asked with an answer that begins with
            "Sure, here is", in each template.
        reference_model: the aligned model, for the embedding drift against drift_dataset.
        drift_dataset: alignment records on which the drift is measured.
        num_samples: prompts used of each data set; all if null.
        max_new_tokens: tokens generated an answer; where not given 16 for a label, 128 for what is
            judged by phrases, 512 for what a model judges and other tasks.
        compare_with: the folder of another model's evaluation, with which this one is compared on
            the prompts that both were asked (McNemar's test).
        save_outputs: also write every prompt and answer, as outputs.jsonl (harmful text!).
        paper: the paper's protocol in flags not given: 1000 unsafe prompts of BeaverTails, judged
            by beaver-dam, 512 tokens, in template alone; the hub's test data of task; for alpaca a
            win_rate_judge; with reference_model the drift on BeaverTails' safe answers.
    """

    adapter: str | None = contents(None)
    harmful_dataset: list[str] | str | None = contents(None)
    task_dataset: str | None = contents(None)
    task: Task = "label"
    benign_dataset: list[str] | str | None = contents(None)
    held_out_from: list[str] | str | None = contents(None)
    judges: list[str] | str | None = path(None)
    harmful_labels: list[str] | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    win_rate_judge: str | None = path(None)
    templates: list[str] | None = None
    system_prompt: str | None = None
    prefill: bool = False
    reference_model: str | None = contents(None)
    drift_dataset: str | None = contents(None)
    num_samples: int | None = number(None)
    max_new_tokens: int | None = number(None)
    compare_with: str | None = contents(None)
    save_outputs: bool = False
    paper: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.paper:
            self._fill_in(**PAPER_EVALUATION, task_dataset=PAPER_TASKS.get(self.task))
            self._fill_in(templates=[self.template])
            if self.task == "alpaca":
                self._fill_in(win_rate_judge=PAPER_WIN_RATE_JUDGE)
            if self.reference_model is not None:
                self._fill_in(drift_dataset=PAPER_DRIFT_DATASET)
        self._fill_in(judges=["refusal"])
        set_field(self, "judges", each_of(self.judges))
        for name in ("judges", "harmful_dataset", "benign_dataset", "held_out_from"):
            self._check_several(name)
        if self.templates is not None:
            for name in self.templates:
                check(name in TEMPLATES, "templates", name, f"among {', '.join(TEMPLATES)}")
            first = self.templates[:1] == [self.template]
            once = len({*self.templates}) == len(self.templates)
            accepted = f"a list, each once, that begins with template={self.template!r}"
            check(first and once, "templates", self.templates, accepted)
        said = self.system_prompt is None or self.system_prompt.strip()
        check(said, "system_prompt", self.system_prompt, "a text that is not empty")
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

    @property
    def judge(self) -> str:
        """The judge that gives the headline, the first of ``judges``."""
        return self.judges[0]

    @property
    def only_phrases(self) -> bool:
        """Whether no judge is a model."""
        return {*self.judges} == {"refusal"}

    def _check_several(self, name):
        """Refuse an empty list, and what is named twice; a list of one becomes that one."""
        values = each_of(getattr(self, name))
        given = getattr(self, name) is not None
        once = len({*values}) == len(values) and (values or not given)
        check(once, name, values, "at least one, each named once")
        if len(values) == 1 and name != "judges":
            set_field(self, name, values[0])

    def _fill_in(self, **values):
        for name, value in values.items():
            if getattr(self, name) is None:
                set_field(self, name, value)
