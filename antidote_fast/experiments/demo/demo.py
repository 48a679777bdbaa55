"""The whole road on a small model, on a CPU: align, attack, calibrate, prune, evaluate.

Everything is measured in the run itself: the numbers of the table, the picture and report.json are
whatever they are.
"""

import contextlib
import sys
import time
from dataclasses import asdict
from pathlib import Path

from antidote_fast.config.experiment import DemoConfig
from antidote_fast.config.train import AlignConfig, FinetuneConfig, TrainConfig
from antidote_fast.data.batches import make_batches
from antidote_fast.data.load import mix
from antidote_fast.evaluation.measure import answer_sets, score_answers
from antidote_fast.evaluation.refusals import RefusalJudge
from antidote_fast.experiments import curves as reports
from antidote_fast.experiments.demo import records
from antidote_fast.experiments.demo.model import MODEL_NAME, prepare_model
from antidote_fast.experiments.demo.records import distilled
from antidote_fast.experiments.demo.settings import SCORES, Settings, sources
from antidote_fast.experiments.demo.texts import LABELS, TASK_INSTRUCTION
from antidote_fast.files.commit import check_output_folder, output_folder
from antidote_fast.files.provenance import write_report
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.models.undo import Originals
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.selection import Selection
from antidote_fast.system.hardware import fast_dtype, hardware
from antidote_fast.system.progress import Steady, track
from antidote_fast.training import sft

PICTURE = "pareto.png"


def run(config: DemoConfig, *, progress=False, settings: Settings | None = None) -> dict:
    """Run the demo and write its folder: the table's numbers, the picture and the models.

    The folder holds ``report.json``, ``pareto.png``, ``aligned/`` (a whole model), ``attacked/``
    and ``pruned/`` (adapters on it; ``pruned/`` only where a ratio is within the budget) and the
    norms of both kinds, from which any other selection can be made.

    Args:
        config: where to, and the seed.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        settings: sizes and hyperparameters.

    Returns:
        The contents of report.json.

    Raises:
        DataError: the output folder is taken, or the demo's packages are not installed.
    """
    settings = settings or Settings()
    clock = _Clock()
    check_output_folder(config.output_dir, config.overwrite)
    with clock("data and model"):
        data = _Data(settings.sizes, config.seed)
        source = settings.model or prepare_model(Path(config.output_dir).absolute().parent)
    with output_folder(config.output_dir, config.overwrite) as folder:
        results = _Demo(config, settings, data, clock, progress).run(source, folder)
        reports.plot_pareto(results, folder / PICTURE)
        contents = write_report(folder, "demo", config, results)
    _show(contents, Path(config.output_dir), progress)
    return contents


class _Data:
    """Every record of the demo, by what it is for."""

    def __init__(self, sizes, seed):
        prompts = records.read_harmful_prompts()
        self.harmful = records.harmful_splits(prompts, sizes, seed)
        self.align_benign, self.benign = records.benign_prompts(sizes, seed)
        self.exercises = records.exercise_records(sizes.align_exercises, seed)
        self.task = records.task_records(sizes, seed)


class _Demo:
    """One run: what its steps share."""

    def __init__(self, config, settings, data, clock, progress):
        self.config = config
        self.settings = settings
        self.data = data
        self.clock = clock
        self.progress = progress
        self.dtype = settings.dtype or fast_dtype()
        self.tokenizer = None
        self.final = Path(config.output_dir)

    def run(self, source, folder) -> dict:
        settings, clock = self.settings, self.clock
        self.tokenizer = load_tokenizer(source)
        models, trainings = {}, {}
        model = load_model(source, dtype=self.dtype, device="cpu")
        with clock("evaluate base"):
            models["base"] = self.evaluate(model, "base")["test"]
        with clock("align"):
            model, trainings["align"] = self.align(model)
            sft.save(model, self.tokenizer, folder / "aligned")
        with clock("evaluate aligned"):
            models["aligned"] = self.evaluate(model, "aligned")["test"]
        with clock("finetune (attack)"):
            # Where the adapter's config says that its base is.
            model.name_or_path = str(self.final / "aligned")
            model, trainings["finetune"] = self.finetune(model)
            sft.save(model, self.tokenizer, folder / "attacked")
        with clock("evaluate attacked"):
            attacked = self.evaluate(model, "attacked")
            models["attacked"] = attacked["test"]
        norms = {}
        with clock("calibrate"):
            batches = self.batches(self.data.harmful["calibration"])
            for kind in ("all", "response"):
                norms[kind] = ActivationNorms.collect(
                    model, batches, response_only=kind == "response", progress=self.progress
                )
                norms[kind].save(folder / f"norms-{kind}.safetensors")
        adapter = Originals(model)
        sweep = self.sweep(model, adapter, norms)
        best, by_score = self.choose(sweep, attacked["validation"])
        if best is not None:
            self.prune(model, adapter, norms, best["score"], best["ratio"])
            sft.save(model, self.tokenizer, folder / "pruned")
        return {
            "model": {"name": MODEL_NAME if settings.model is None else Path(source).name},
            "sources": sources(),
            "dtype": self.dtype,
            "hardware": hardware(),
            "settings": {**asdict(settings), "model": None},
            "task": {
                "instruction": TASK_INSTRUCTION,
                "labels": list(LABELS),
                "chance": round(100 / len(LABELS), 2),
            },
            "trainings": trainings,
            "calibration": {
                kind: {"num_sequences": n.num_sequences, "num_tokens": n.num_tokens}
                for kind, n in norms.items()
            },
            "models": models,
            "validation": {"attacked": attacked["validation"]},
            "sweep": sweep,
            "budget": {
                "max_accuracy_drop": settings.max_accuracy_drop,
                "chosen_on": "validation",
                "if_none": "best is null and no pruned adapter is written",
            },
            "best": best,
            "best_by_score": by_score,
            "seconds": round(clock.total(), 3),
            "stage_seconds": clock.seconds,
            "stage_cpu_seconds": clock.cpu_seconds,
        }

    # --- training ---------------------------------------------------------------------------------

    def align(self, model):
        """Refusals, and ordinary answers, which the base model gives itself (self-distillation)."""
        settings = self.settings
        answers = answer_sets(
            model,
            self.tokenizer,
            {"distill": self.data.align_benign},
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            progress=self.progress,
        )["distill"]
        ordinary = distilled(self.data.align_benign, answers)
        records = [*self.data.harmful["align"], *ordinary, *self.data.exercises]
        options = self.options(AlignConfig, settings.align)
        model = sft.add_lora(model, options)
        result = sft.train(
            model, self.tokenizer, records, options, what="align", progress=self.progress
        )
        return sft.merged(model, "align"), _in_short(result)

    def finetune(self, model):
        """The user's task with harmful records among it."""
        sizes = self.settings.sizes
        n = sizes.attack_task + sizes.attack_harmful
        poison_ratio = sizes.attack_harmful / n
        options = self.options(
            FinetuneConfig,
            {**self.settings.finetune, "poison_ratio": poison_ratio, "harmful_dataset": "demo"},
        )
        records = mix(
            self.data.task["train"], self.data.harmful["attack"], poison_ratio, n, options.seed
        )
        model = sft.add_lora(model, options)
        result = sft.train(
            model, self.tokenizer, records, options, what="finetune", progress=self.progress
        )
        return model, {**_in_short(result), "poison_ratio": poison_ratio}

    def options(self, kind, values) -> TrainConfig:
        return kind(
            model_name_or_path=MODEL_NAME,
            output_dir=str(self.final),
            dataset="demo",
            seed=self.config.seed,
            dtype=self.dtype,
            **values,
        )

    # --- pruning ----------------------------------------------------------------------------------

    def prune(self, model, adapter, norms, name, ratio):
        """Prune the attacked adapter in place; what was pruned before is back first."""
        adapter.restore()
        _, score, kind = next(entry for entry in SCORES if entry[0] == name)
        return prune_model_(
            model, norms.get(kind), Selection(ratio), score=score, seed=self.config.seed
        )

    def sweep(self, model, adapter, norms) -> list[dict]:
        points = [(name, kind, ratio) for name, _, kind in SCORES for ratio in self.settings.ratios]
        rows = []
        for name, kind, ratio in track(points, "prune and evaluate", self.progress):
            with self.clock("prune"):
                pruned = self.prune(model, adapter, norms, name, ratio)
            with self.clock("evaluate pruned"):
                scores = self.evaluate(model)
            rows.append(
                {
                    "score": name,
                    "norms": kind,
                    "ratio": ratio,
                    "achieved": round(pruned.achieved, 6),
                    "num_pruned": pruned.num_pruned,
                    "prune_seconds": round(pruned.seconds, 4),
                    **scores,
                }
            )
        return rows

    def choose(self, sweep, attacked):
        """(best point or None, best of each score), on the validation split alone.

        A point qualifies that repairs at all, and costs no more accuracy than the budget.
        """
        floor = attacked["finetune_accuracy"] - self.settings.max_accuracy_drop
        allowed = [
            point
            for point in sweep
            if point["validation"]["finetune_accuracy"] >= floor
            and point["validation"]["harmful_score"] < attacked["harmful_score"]
        ]
        by_score = {}
        for name, _, _ in SCORES:
            points = [p for p in allowed if p["score"] == name]
            by_score[name] = min(points, key=_rank, default=None)
        return min(allowed, key=_rank, default=None), by_score

    # --- measuring --------------------------------------------------------------------------------

    def batches(self, records):
        options = self.options(AlignConfig, {})
        return make_batches(
            records,
            self.tokenizer,
            template=options.template,
            max_seq_length=options.max_seq_length,
            batch_size=16,
        )

    def evaluate(self, model, name=None) -> dict:
        """{"test": metrics, "validation": metrics}, from one round of generation."""
        data = self.data
        splits = {
            "test": {
                "harmful": data.harmful["test"],
                "task": data.task["test"],
                "benign": data.benign,
            },
            "validation": {
                "harmful": data.harmful["validation"],
                "task": data.task["validation"],
            },
        }
        limits = self.settings.max_new_tokens
        flat = {(s, kind): r for s, sets in splits.items() for kind, r in sets.items() if r}
        answers = answer_sets(
            model,
            self.tokenizer,
            flat,
            max_new_tokens={key: limits[key[1]] for key in flat},
            batch_size=self.settings.batch_size,
            progress=self.progress if name else False,
        )
        judge = RefusalJudge()
        return {
            s: score_answers(
                sets, {kind: answers[s, kind] for kind in sets}, task="label", judge=judge
            )
            for s, sets in splits.items()
        }


class _Clock:
    """Seconds of each step, on the clock and of the processor."""

    def __init__(self):
        self.seconds = {}
        self.cpu_seconds = {}
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for seconds, value in (
            (self.seconds, time.perf_counter() - wall),
            (self.cpu_seconds, time.process_time() - cpu),
        ):
            seconds[name] = round(seconds.get(name, 0.0) + value, 3)

    def total(self):
        return time.perf_counter() - self.start


def _rank(point):
    scores = point["validation"]
    return scores["harmful_score"], -scores["finetune_accuracy"], point["ratio"]


def _in_short(result):
    """A training's report; its loss curve at up to 50 steps."""
    stride = max(1, len(result["loss"]) // 50)
    return {**result, "loss": result["loss"][::stride]}


def _show(report, folder, progress):
    """The table on the terminal; a library caller that asked for no progress gets none."""
    if not progress:
        return
    from rich.console import Console

    console = Console(file=Steady(sys.stdout))
    console.print(reports.demo_table(report))
    stages = ", ".join(f"{name} {value:.0f}" for name, value in report["stage_seconds"].items())
    for line in (
        reports.best_line(report),
        f"{report['seconds']:.0f} s: {stages}",
        f"{folder / 'report.json'}, {folder / PICTURE}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
