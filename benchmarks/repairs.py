"""Repairs of attacked models, and what they are to be measured against: hours on a CPU.

A cell is a learning rate and a seed of the demo's attack on an aligned model, which is made once an
alignment seed. In each cell every method changes the attacked adapter, in memory, is measured on
the demo's test prompts (four harmful sets, the customer's task, ordinary prompts), and is undone.
A repair may use realign.jsonl (harmful prompts, whose answers plain Antidote reads),
task-records.jsonl and ordinary.jsonl.

    aligned, attacked, clean     without adapter; as attacked; tuned alike, but no record harmful
    antidote, antidote-preserve  plain Antidote; the same, preserving by as many task records
    random, magnitude, scale     a random mask, the largest weights, the adapter times a factor
    gates, gates-two-templates   learned gates; the same, learned in both templates
    finetune-RATE                the gates' own batches, steps and losses, the weights free instead
    noise-gates                  gates on random weights, normal, as large as the attacked ones
    retrained                    a new adapter on the aligned model, of the task records alone

A row is a cell, a method and a template; one that is in the CSV is not computed again, so a killed
run goes on. Processes may share FOLDER, each with a CSV of its own; --table, --picture and --merge
read all of them. ``seconds`` are of the change and the answers in all templates.

    python benchmarks/repairs.py --folder repairs-out --rows a.csv --seeds 1 2 3
    python benchmarks/repairs.py --rows a.csv b.csv --merge repairs.csv --table --picture a.png
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import repair_rows
import torch
from safetensors.torch import load_file

from antidote_fast import ActivationNorms, Selection
from antidote_fast.config.prune import GATE_STEPS, GateMixture
from antidote_fast.config.scores import SCORES
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.data.batches import collate, make_batches
from antidote_fast.data.load import load_records
from antidote_fast.evaluation.conditions import make_conditions
from antidote_fast.evaluation.measure import (
    ask,
    certain_by,
    judge_answers,
    score_task,
    task_labels,
)
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.summary import summarise, verdict_rows
from antidote_fast.experiments.chain import Maker
from antidote_fast.experiments.demo.demo import ALIGN, ATTACK
from antidote_fast.experiments.demo.files import DATA, prepare
from antidote_fast.experiments.demo.model import MODEL_NAME
from antidote_fast.experiments.demo.records import HARMFUL_SETS
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models.adapters import adapter_off, load_adapter
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.models.targets import find_targets
from antidote_fast.models.undo import Originals
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.stages.gates.answers import answer_prompts, fill_pools
from antidote_fast.stages.gates.learn import draw_steps, learn_gates
from antidote_fast.system.hardware import fast_dtype
from antidote_fast.training.objective import num_response_tokens, response_logits, response_loss
from antidote_fast.training.sft import MAX_GRAD_NORM

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2)
SCOPES = ("row", "tensor", "global")
SCALES = (0.25, 0.5, 0.75)
TEMPLATES = ("alpaca", "chat")
TUNING_RATES = ("2e-4", "1e-3")
MAX_NEW_TOKENS = {"harmful": 96, "benign": 96, "task": 8}
BATCH = 16  # records at once, in calibration and learning
ANSWERED = 64  # prompts at once
GATES = Selection(SCORES["gate"].default_ratio, scope=SCORES["gate"].default_scope)


class Makers:
    """Makes the models of a folder, each once, also where several processes want it.

    Args:
        folder: which holds demo-cache and the models.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._maker = folder, Maker()
        with self._locked("demo-cache"):
            cache = prepare(folder)
        self.base, self.data = cache / MODEL_NAME, cache / DATA

    def aligned(self, seed: int) -> Path:
        """The aligned model of a seed."""
        about = {"model_name_or_path": str(self.base), "dataset": self.file("safe"), "seed": seed}
        return self._make("align", f"aligned-{seed}", AlignConfig, **about, **ALIGN)

    def tuned(self, kind: str, align_seed: int, rate: float, seed: int) -> Path:
        """An adapter on the aligned model: attacked, clean or retrained.

        All take as many steps. Clean is of as many records as attacked, retrained of the task's.
        """
        flags = ATTACK | {"learning_rate": rate, "dataset": self.file("task")}
        if kind == "attacked":
            flags["harmful_dataset"] = self.file("harmful")
        else:
            flags["poison_ratio"] = 0.0
        if kind == "retrained":
            size = flags["batch_size"]
            steps = round(math.ceil(flags["num_train_samples"] / size) * flags["num_train_epochs"])
            task = self.file("task-records")
            flags |= {"dataset": task, "num_train_samples": None}
            flags["num_train_epochs"] = steps / math.ceil(len(load_records(task)) / size)
        name = f"{kind}-{align_seed}-{rate:g}-{seed}"
        model = str(self.aligned(align_seed))
        return self._make(
            "finetune", name, FinetuneConfig, model_name_or_path=model, seed=seed, **flags
        )

    def file(self, name: str) -> str:
        """The path of one of the demo's data sets."""
        return str(self.data / f"{name}.jsonl")

    def _make(self, kind, name, config, **flags):
        out = self.folder / name
        stage = config(output_dir=str(out), dtype=fast_dtype(), device="cpu", **flags)
        with self._locked(name), torch.enable_grad():
            self._maker.make(kind, stage)
        return out

    def _locked(self, name):
        return filelock.FileLock(str(self.folder / f".making-{name}.lock"))  # waits


class Data:
    """What the methods of one cell may use; what several of them need is computed once.

    Args:
        makers: gives files and models.
        cell: alignment seed, learning rate and seed of the attack.
        tokenizer: the model's.
    """

    def __init__(self, makers: Makers, cell: tuple, tokenizer: Any):
        self._makers, self._cell, self.tokenizer = makers, cell, tokenizer
        self.seed = cell[-1]
        self.harmful, self.task, self.ordinary = (
            load_records(makers.file(name)) for name in ("realign", "task-records", "ordinary")
        )
        self._norms: dict[tuple, ActivationNorms] = {}
        self._answers: dict[tuple, Any] = {}

    def norms(self, model: Any, name: str, count: int) -> ActivationNorms:
        """Norms of the attacked model, of so many records of ``harmful`` or ``task``."""
        if (name, count) not in self._norms:
            records = getattr(self, name)[:count]
            batches = make_batches(records, self.tokenizer, batch_size=BATCH)
            self._norms[name, count] = ActivationNorms.collect(model, batches)
        return self._norms[name, count]

    def answers(self, model: Any, templates: tuple) -> Any:
        """What the aligned model says, as gates learn it."""
        if templates not in self._answers:
            with adapter_off(model):
                self._answers[templates] = answer_prompts(
                    model,
                    self.tokenizer,
                    self.harmful,
                    self.task,
                    self.ordinary,
                    templates=templates,
                    answer_tokens=GateMixture().answer_tokens,
                    batch_size=ANSWERED,
                )
        return self._answers[templates]

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """The weights of another adapter of this cell, which is trained where it is not there."""
        return load_file(self._makers.tuned(kind, *self._cell) / "adapter_model.safetensors")


Change = Callable[[Any, Data], None]


@dataclass(frozen=True)
class Method:
    """One way to change an attacked model.

    Args:
        name: of the table at the top.
        change: changes a live PEFT model.
        scope, ratio: of its mask, or the factor of scale; empty where it has none.
    """

    name: str
    change: Change
    scope: str = ""
    ratio: float | str = ""

    @property
    def label(self) -> str:
        """What ``--methods`` names, or its beginning."""
        return "/".join(filter(None, (self.name, self.scope, repair_rows.shown(self.ratio))))


def scaled(factor: float) -> Change:
    """The adapter times a factor."""

    def change(model, data):
        for target in find_targets(model):
            if ".lora_B." in target.key:
                target.weight.mul_(factor)

    return change


def replaced(kind: str) -> Change:
    """Another adapter of the cell in place of the attacked one."""

    def change(model, data):
        tensors = data.tensors(kind)
        for target in find_targets(model):
            target.weight.copy_(tensors[target.key])

    return change


def pruned(score: str, scope: str, ratio: float, preserve: bool = False) -> Change:
    """A mask by a score, with as many records to preserve as harmful ones."""

    def change(model, data):
        count = min(len(data.harmful), len(data.task)) if preserve else len(data.harmful)
        norms = data.norms(model, "harmful", count) if score == "wanda" else None
        kept = data.norms(model, "task", count) if preserve else None
        how = {"score": score, "seed": data.seed, "preserve_norms": kept}
        prune_model_(model, norms, Selection(ratio, scope=scope), **how)

    return change


def gated(*templates: str) -> Change:
    """Learned gates at their defaults, learned in these templates."""

    def change(model, data):
        scores, _ = learn_gates(
            model,
            data.tokenizer,
            data.harmful,
            data.task,
            GATES,
            ordinary=data.ordinary,
            aligned=data.answers(model, templates),
            templates=templates,
            seed=data.seed,
            batch_size=BATCH,
        )
        prune_model_(model, None, GATES, score="gate", scores=scores)

    return change


def gated_noise(model: Any, data: Data) -> None:
    """Learned gates on random weights, normal, of each tensor's own standard deviation."""
    generator = torch.Generator().manual_seed(data.seed)
    for target in find_targets(model):
        target.weight.normal_(0, float(target.weight.std()), generator=generator)
    gated("alpaca")(model, data)


def finetuned(rate: str, *templates: str) -> Change:
    """What gates learn from, batch by batch, with the adapter's weights free: AdamW, clipped."""

    def change(model, data):
        mixture = GateMixture()
        pools = fill_pools(
            data.tokenizer,
            data.harmful,
            data.task,
            data.answers(model, templates),
            data.ordinary,
            templates=templates,
            answer_tokens=mixture.answer_tokens,
        )
        weights = [target.weight for target in find_targets(model)]
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=float(rate))
        steps = itertools.islice(draw_steps(pools, mixture, data.seed), GATE_STEPS)
        with response_logits(model) as choose, torch.enable_grad():
            for kinds in steps:
                for factor, examples in kinds.values():
                    batch = collate(examples, data.tokenizer)
                    loss = response_loss(model, batch, choose, share_prefix=True)
                    (factor * loss / num_response_tokens(batch)).backward()
                torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    return change


def all_methods() -> list[Method]:
    """Every method, those first that the others are seen against."""
    found = [
        Method("aligned", scaled(0.0)),
        Method("attacked", lambda model, data: None),
        Method("clean", replaced("clean")),
        Method("gates", gated("alpaca")),
        Method("gates-two-templates", gated(*TEMPLATES)),
    ]
    for rate in TUNING_RATES:
        found.append(Method(f"finetune-{rate}", finetuned(rate, "alpaca")))
        found.append(Method(f"finetune-{rate}-two-templates", finetuned(rate, *TEMPLATES)))
    found += [Method("noise-gates", gated_noise), Method("retrained", replaced("retrained"))]
    for scope, ratio in itertools.product(SCOPES, RATIOS):
        found.append(Method("antidote", pruned("wanda", scope, ratio), scope, ratio))
    for scope, ratio in itertools.product(SCOPES, RATIOS):
        change = pruned("wanda", scope, ratio, preserve=True)
        found.append(Method("antidote-preserve", change, scope, ratio))
    found += [Method("random", pruned("random", "row", ratio), "row", ratio) for ratio in RATIOS]
    for ratio in RATIOS[2:]:
        found.append(Method("magnitude", pruned("magnitude", "row", ratio), "row", ratio))
    return found + [Method("scale", scaled(factor), "", factor) for factor in SCALES]


def chosen(words: list[str] | None) -> list[Method]:
    """The methods of these names; a word that is no name is the beginning of labels."""
    methods = all_methods()
    names = {method.name for method in methods}
    for word in words or ():
        if not any(method.label.startswith(word) for method in methods):
            raise SystemExit(f"methods={word!r}: must begin one of {', '.join(sorted(names))}")
    exact = names.intersection(words or ())
    starts = tuple(word for word in words or ("",) if word not in names)
    return [m for m in methods if m.name in exact or (starts and m.label.startswith(starts))]


def measure(model: Any, tokenizer: Any, sets: dict, templates: list[str]) -> tuple[dict, list]:
    """(summary, verdicts) of a model, as `evaluate_model` and the evaluate stage find them."""
    judge = PhraseJudge(labels=task_labels("label", sets["task"]["task"]))
    answers = ask(
        model,
        tokenizer,
        sets,
        make_conditions(templates),
        max_new_tokens=MAX_NEW_TOKENS,
        is_certain=certain_by([judge]),
        batch_size=ANSWERED,
    )
    verdicts = {judge.name: judge_answers(judge, sets, answers)}
    summary = summarise(answers, verdicts, score_task("label", sets, answers))
    return summary, verdict_rows(sets, answers, verdicts, "label")


def counts_of(told: dict) -> dict:
    """The columns of one template's rates by kind and set."""
    harmful, [ordinary], task = told["harmful"], told["benign"].values(), told["task"]
    worst = max(harmful, key=lambda name: harmful[name]["harmful_score"])
    names = ("num_prompts", *(f"num_{name}" for name in repair_rows.HARMFUL))
    sums = [sum(rates[name] for rates in harmful.values()) for name in names]
    about = ("num_prompts", "num_helped", "num_refused", "num_off_task", "num_broken")
    counts = [*sums, *(ordinary[name] for name in about), task["num_records"], task["num_correct"]]
    found = dict(zip(repair_rows.COUNTS, counts, strict=True))
    return found | {"worst_set": worst, "worst_score": harmful[worst]["harmful_score"]}


def load_sets(makers: Makers, count: int | None) -> dict:
    """What is asked, by kind and set: the first so many of each, all where None."""

    def first(name):
        return load_records(makers.file(name), limit=count)

    harmful = {name: first(f"harmful-test-{name}") for name in HARMFUL_SETS}
    return {
        "harmful": harmful,
        "task": {"task": first("task-test")},
        "benign": {"benign": first("ordinary-test")},
    }


def compute(args: argparse.Namespace, path: Path) -> None:
    """Compute the rows that a CSV has not yet."""
    methods = chosen(args.methods)
    makers = Makers(args.folder)
    sets = load_sets(makers, args.prompts)
    asked = sum(map(len, sets["harmful"].values()))
    rows, _ = repair_rows.read([path])
    if any(int(row["num_prompts"]) != asked for row in rows):
        raise SystemExit(
            f"rows={path}: holds rows of other than {asked} prompts; name another file"
        )
    done = {repair_rows.key_of(row) for row in rows}
    for cell in itertools.product(args.align_seeds, args.learning_rates, args.seeds):
        run_cell(makers, cell, methods, sets, args.templates, path, done)


def run_cell(makers, cell, methods, sets, templates, path, done):
    """The rows of one cell, one method after the other; ``done`` holds the keys of those there."""

    def key(method, template):
        # The aligned model is that of every attack.
        about = (cell[0], "", "") if method.name == "aligned" else cell
        values = (*about, method.name, method.scope, method.ratio, template)
        return tuple(map(repair_rows.shown, values))

    todo = [
        (method, left)
        for method in methods
        if (left := [each for each in templates if key(method, each) not in done])
    ]
    if not todo:
        return
    aligned = makers.aligned(cell[0])
    tokenizer = load_tokenizer(aligned)
    model = load_model(aligned, dtype=fast_dtype(), device="cpu")
    model = load_adapter(model, open_checkpoint(makers.tuned("attacked", *cell)))
    model.eval().requires_grad_(False)
    originals, data = Originals(model), Data(makers, cell, tokenizer)
    for method, left in todo:
        start = time.monotonic()
        try:
            with torch.no_grad():
                method.change(model, data)
            summary, verdicts = measure(model, tokenizer, sets, left)
        finally:
            originals.restore()
        seconds = round(time.monotonic() - start, 1)
        for template in left:
            row = dict(zip(repair_rows.KEY, key(method, template), strict=True))
            row |= counts_of(summary["conditions"][template]) | {"seconds": seconds}
            mine = [each for each in verdicts if each["condition"] == template]
            repair_rows.append(path, row, mine)
            done.add(repair_rows.key_of(row))
            print(*(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Compute rows, or show those that are there."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=Path, nargs="+", required=True, help="CSV; rows are added")
    options.add_argument("--folder", type=Path, default=Path("repairs-out"))
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument(
        "--learning_rates", type=float, nargs="+", default=[ATTACK["learning_rate"]]
    )
    options.add_argument("--align_seeds", type=int, nargs="+", default=[0])
    options.add_argument("--methods", nargs="+", help="names, or how they begin: antidote/row")
    options.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    options.add_argument("--prompts", type=int, help="first so many of each set; default all")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--table", action="store_true", help="print the rows as a table")
    options.add_argument("--picture", type=Path, help="PNG to draw of the rows")
    options.add_argument("--merge", type=Path, help="CSV to write of the rows")
    args = options.parse_args(argv)
    if not (args.table or args.picture or args.merge):
        if len(args.rows) > 1:
            options.error("--rows: must be one file, unless --table, --picture or --merge is given")
        torch.set_num_threads(args.threads)
        compute(args, args.rows[0])
        return
    rows, verdicts = repair_rows.read(args.rows)
    if not rows:
        options.error(f"--rows: there are none in {', '.join(map(str, args.rows))}")
    if args.merge:
        repair_rows.merge(args.merge, rows, verdicts)
    if args.table:
        print(repair_rows.table(rows, verdicts))
    if args.picture:
        repair_rows.plot(rows, args.picture)


if __name__ == "__main__":
    main()
