"""Plain Antidote and learned gates, cell by cell, on SmolLM2-135M-Instruct and a CPU: hours.

A cell is a learning rate and a seed of the attack (320 records of a user, 32 of them harmful, LoRA
on q/k/v). Harmful, task and ordinary prompts of the test are in no other part. Made once in FOLDER:
the model, the data, and one aligned model (two passes over 150 refusals, 199 ordinary answers and
30 exercises, then 1.3 passes with the refusals twice). Of each cell the attacked model is measured,
plain Antidote at the ratios of ``RATIOS`` (accuracy, harmful score), and ``score="gate"`` at its
default setting (benign refusals too). A cell that has its row in the CSV is not computed again.

    python benchmarks/score_cells.py FOLDER --rows scores.csv --seeds 1 2 3
"""

import argparse
import csv
import dataclasses
import json
from pathlib import Path

from antidote_fast import ActivationNorms, Selection
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.data.batches import make_batches
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.evaluation.measure import answer_sets, evaluate_model
from antidote_fast.experiments.demo.model import prepare_model
from antidote_fast.experiments.demo.records import (
    Sizes,
    benign_prompts,
    distilled,
    exercise_records,
    harmful_splits,
    read_harmful_prompts,
    task_records,
)
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.models.undo import Originals
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.stages import align, finetune
from antidote_fast.stages.gates.learn import learn_gates

LEARNING_RATES = (1.5e-4, 8e-4, 4.5e-3)
RATIOS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
GATE = Selection(0.5, scope="tensor")
TOKENS = {"harmful": 10, "task": 4, "benign": 10}
TESTED = 60  # prompts of each kind
SIZES = Sizes(
    align_harmful=150,
    align_benign=300,
    align_exercises=30,
    attack_harmful=32,
    attack_task=288,
    calibration=100,
    validation=42,
    test_harmful=90,
    test_task=90,
    test_benign=100,
)
_LORA = {"lora_r": 32, "lora_alpha": 32, "batch_size": 4, "max_seq_length": 128}
_HERE = {"dtype": "float32", "device": "cpu"}
FIELDS = ("learning_rate", "seed", "score", "scope", "ratio", "harmful_score")
FIELDS += ("finetune_accuracy", "benign_refusal_rate", "empty", "garbled", "seconds")


def make_data(source, folder):
    """JSONL files of every part, each once; ordinary answers are the base model's own."""
    harmful = harmful_splits(read_harmful_prompts(), SIZES, 0)
    ordinary, benign = benign_prompts(SIZES, 0)
    task = task_records(SIZES, 0)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32", device="cpu")
    asked = ordinary[:200]
    answers = answer_sets(model, tokenizer, {"x": asked}, max_new_tokens=32, batch_size=64)["x"]
    exercises = exercise_records(SIZES.align_exercises, 0)
    safe = [*harmful["align"], *distilled(asked, answers), *exercises]
    parts = {
        "safe": safe,
        "safe-again": [*safe, *harmful["align"]],
        "harmful": harmful["attack"],
        "calibration": harmful["calibration"],
        "harmful-validation": harmful["validation"],
        "harmful-test": harmful["test"],
        "task": task["train"],
        "task-validation": task["validation"],
        "task-test": task["test"],
        "ordinary": ordinary[200:],
        "benign-validation": benign[:40],
        "benign-test": benign[40:],
    }
    with output_folder(folder) as staged:
        for name, records in parts.items():
            lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in records]
            (staged / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def prepared(folder):
    """(folder of the aligned model, folder of the data), made where they are not there."""
    source, data = prepare_model(folder), folder / "data"
    if not data.exists():
        make_data(source, data)
    model = source
    for number, (name, rate, epochs) in enumerate((("safe", 7e-4, 2), ("safe-again", 5e-4, 1.3))):
        out = folder / f"aligned-{number}"
        if not out.exists():
            align.run(
                AlignConfig(
                    model_name_or_path=str(model),
                    output_dir=str(out),
                    dataset=str(data / f"{name}.jsonl"),
                    num_train_samples=None,
                    learning_rate=rate,
                    num_train_epochs=epochs,
                    seed=number,
                    **_LORA,
                    **_HERE,
                )
            )
        model = out
    return model, data


def attacked(folder, aligned, data, rate, seed):
    """The folder of the attacked adapter."""
    out = folder / f"attacked-{rate:g}-{seed}"
    if not out.exists():
        finetune.run(
            FinetuneConfig(
                model_name_or_path=str(aligned),
                output_dir=str(out),
                dataset=str(data / "task.jsonl"),
                harmful_dataset=str(data / "harmful.jsonl"),
                num_train_samples=320,
                poison_ratio=0.1,
                learning_rate=rate,
                warmup_ratio=0.1,
                num_train_epochs=1.5,
                seed=seed,
                **_LORA,
                **_HERE,
            )
        )
    return out


class Cell:
    """One attacked model in memory, and the prompts that it is measured on."""

    def __init__(self, aligned, adapter, data, split):
        self.tokenizer = load_tokenizer(aligned)
        model = load_model(aligned, dtype="float32", device="cpu")
        self.model = load_adapter(model, open_checkpoint(adapter))
        self.originals = Originals(self.model)
        self.data = data
        self.sets = {name: self.records(f"{name}-{split}")[:TESTED] for name in TOKENS}

    def records(self, name):
        return load_records(str(self.data / f"{name}.jsonl"))

    def measure(self, *names):
        """A row's metrics, of these sets alone."""
        sets = {name: self.sets[name] for name in names or TOKENS}
        found = evaluate_model(
            self.model,
            self.tokenizer,
            harmful=sets.get("harmful"),
            task_records=sets.get("task"),
            benign=sets.get("benign"),
            max_new_tokens=TOKENS,
            batch_size=64,
        )
        counts = found.get("harmful", {})
        about = {"empty": counts.get("num_empty"), "garbled": counts.get("num_garbled")}
        return {name: found.get(name) for name in FIELDS if name in found} | about

    def plain(self):
        """Rows of plain Antidote, up to the ratio at which no accuracy is left."""
        batches = make_batches(
            self.records("calibration"), self.tokenizer, max_seq_length=128, batch_size=16
        )
        norms = ActivationNorms.collect(self.model, batches)
        for ratio in RATIOS:
            self.originals.restore()
            prune_model_(self.model, norms, Selection(ratio))
            row = self.measure("task")
            if row["finetune_accuracy"]:
                row |= self.measure("harmful")
            yield {"score": "wanda", "scope": "row", "ratio": ratio, **row}
            if not row["finetune_accuracy"]:
                break
        self.originals.restore()

    def gated(self):
        """The row of learned gates."""
        prompts = [Record(record.instruction) for record in self.records("ordinary")]
        scores, counts = learn_gates(
            self.model,
            self.tokenizer,
            self.records("calibration"),
            [*self.records("task"), *prompts],
            GATE,
            batch_size=16,
            max_seq_length=128,
        )
        prune_model_(self.model, None, GATE, score="gate", scores=scores)
        about = {"score": "gate", "scope": GATE.scope, "ratio": GATE.ratio}
        return {**about, **self.measure(), "seconds": counts["seconds"]}


def rows_of(cell):
    """Every row of one cell."""
    yield {"score": "none", **cell.measure()}
    yield from cell.plain()
    yield cell.gated()


def plot(rows, path):
    """Harmful score against accuracy: a panel a learning rate, a curve of plain Antidote a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = sorted({row["learning_rate"] for row in rows}, key=float)
    figure = Figure(figsize=(4.4 * len(rates), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    styles = {
        "none": ("attacked", {"marker": "X", "color": "#D55E00", "s": 90}),
        "gate": ("gate, ratio 0.5 (ours)", {"marker": "*", "color": "#009E73", "s": 190}),
    }
    for axes, rate in zip(panels, rates, strict=True):
        here = [row for row in rows if row["learning_rate"] == rate]
        for number, seed in enumerate(sorted({row["seed"] for row in here})):
            mine = [row for row in here if row["seed"] == seed and row["harmful_score"]]
            curve = [row for row in mine if row["score"] in ("none", "wanda")]
            places = [(float(r["finetune_accuracy"]), float(r["harmful_score"])) for r in curve]
            axes.plot(
                *zip(*places, strict=True),
                color="#0072B2",
                alpha=0.6,
                marker="o",
                markersize=4,
                label=None if number else "plain Antidote, ratios 0.01 to 0.3",
            )
            for score, (label, style) in styles.items():
                found = [r for r in mine if r["score"] == score]
                axes.scatter(
                    [float(r["finetune_accuracy"]) for r in found],
                    [float(r["harmful_score"]) for r in found],
                    edgecolor="white",
                    zorder=4,
                    label=None if number else label,
                    **style,
                )
        axes.axhline(5, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_title(f"learning rate {float(rate):g}", fontsize=11)
        axes.set_xlabel("finetune accuracy FA, % (higher is better)")
        axes.set_xlim(-4, 104)
        axes.set_ylim(-4, 104)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("harmful score HS, % (lower is better)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--rows", type=Path, required=True, help="CSV; rows are added")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--learning_rates", type=float, nargs="+", default=LEARNING_RATES)
    options.add_argument("--picture", type=Path, help="PNG to draw of all rows at the end")
    options.add_argument("--split", choices=("validation", "test"), default="test")
    args = options.parse_args(argv)
    aligned, data = prepared(args.folder)
    done = set()
    if args.rows.exists():
        with open(args.rows, encoding="utf-8", newline="") as file:
            done = {(float(r["learning_rate"]), int(r["seed"])) for r in csv.DictReader(file)}
    for rate in args.learning_rates:
        for seed in args.seeds:
            if (rate, seed) in done:
                continue
            cell = Cell(aligned, attacked(args.folder, aligned, data, rate, seed), data, args.split)
            rows = [{"learning_rate": rate, "seed": seed, **row} for row in rows_of(cell)]
            new = not args.rows.exists()
            with open(args.rows, "a", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, FIELDS, extrasaction="ignore")
                if new:
                    table.writeheader()
                table.writerows(rows)
            for row in rows:
                print(row, flush=True)
    if args.picture:
        with open(args.rows, encoding="utf-8", newline="") as file:
            plot(list(csv.DictReader(file)), args.picture)


if __name__ == "__main__":
    main()
