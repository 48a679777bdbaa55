"""A grid of settings, from alignment to scores, that goes on where it stopped."""

import time
from collections.abc import Sequence
from pathlib import Path

from antidote_fast.config.experiment import ExperimentConfig
from antidote_fast.errors import AntidoteError, DataError, Interrupted, JobsSetAside, UsageError
from antidote_fast.experiments import grid, pictures, tables
from antidote_fast.experiments.chain import Maker, at_work, check_clean, check_own_folder
from antidote_fast.experiments.demo.model import CACHE
from antidote_fast.files.commit import check_parent, new_file
from antidote_fast.files.provenance import REPORT, write_report
from antidote_fast.stages.inputs import check_data
from antidote_fast.system.hardware import hardware
from antidote_fast.system.memory import reset_peak_memory
from antidote_fast.system.progress import Progress, tell, track

ROWS, TABLES, STAGES = "rows.csv", "tables.md", "stages"


def run(config: ExperimentConfig, *, progress: Progress = False) -> dict:
    """Run every cell of an experiment that is not there yet, and write rows, tables and pictures.

    Each stage writes a folder of its own in ``config.stages``, named by a hash of its settings and
    of those before it: what cells share is made once, and what is whole is taken as it is. Where a
    defense has strengths to choose from, they are tried first, on a seed and prompts of their own;
    the one of highest FA * (100 - HS) is taken, the first of equals: a model that fails at its task
    is as bad as one that does all harm.

    Returns:
        The contents of report.json: ``chosen`` (by defense), ``num_cells``, ``num_computed``,
        ``num_left``, ``failed`` (one line for each cell that could not be made, such as one whose
        loss is not finite; they are tried again by the next call), ``hardware``, ``seconds``.

    Raises:
        UsageError: an axis, flag or value that is none, before anything is computed.
        DataError: data or a model that cannot be used, a folder that holds something else.
        JobsSetAside: all other cells are done; ``report`` of the exception is what is returned
            otherwise.
    """
    start = time.perf_counter()
    out = Path(config.output_dir)
    if config.prepare == "demo":
        from antidote_fast.experiments.demo.files import prepare

        _check_flags(config)
        prepare(progress=progress)
    trials, cells = check(config)
    tried, chosen = _tried(trials), {}
    with at_work(config.output_dir, "experiment"):
        work = _Work(config, out, progress)
        for cell in track(tried, "strengths", progress):
            work.do(cell, tried)
        if all(work.is_settled(cell) for cell in tried):
            chosen = {name: _best(name, options, work.rows) for name, options in trials.items()}
            cells = grid.cells_of(config, chosen)
            for cell in track(cells, "cells", progress):
                work.do(cell, [*tried, *cells])
        results = {
            "chosen": chosen,
            "num_cells": len(cells),
            "num_tried": len(tried),
            "num_computed": work.computed,
            "num_left": sum(not work.is_settled(cell) for cell in (*tried, *cells)),
            "hardware": hardware(),
            "failed": list(work.failed.values()),
            "seconds": round(time.perf_counter() - start, 3),
        }
        write_tables(work.save([*tried, *cells]), config, out)
        report = write_report(out, "experiment", config, results, grows=True)
    if work.failed:
        first_line = next(iter(work.failed.values()))
        count = f"{len(work.failed)} of {len(tried) + len(cells)}"
        error = JobsSetAside(f"{count} cells could not be made, the first: {first_line}")
        error.report = report
        raise error
    return report


def check(config: ExperimentConfig) -> tuple[dict, list]:
    """Check every flag and data set of an experiment; nothing is made.

    Returns:
        What :func:`grid.trials_of` and :func:`grid.cells_of` give, before strengths are chosen.

    Raises:
        UsageError, DataError: as :func:`run`; DataError also where ``prepare`` has yet to make
            the files.
    """
    trials, cells = _check_flags(config)
    if config.prepare == "demo" and not Path(CACHE).is_dir():
        raise DataError(
            f"{CACHE}: is not there yet, and is made where the experiment runs: start it once "
            "without dry_run"
        )
    for folder in {Path(config.output_dir), Path(config.stages or config.output_dir)}:
        check_parent(folder)
    check_data([stage for cell in (*_tried(trials), *cells) for stage in cell.stages.values()])
    without = [cell for cell in cells if cell.axes["defense"] == grid.CLEAN]
    check_clean([cell.stages["finetune"] for cell in without])
    return trials, cells


def _tried(trials):
    """The cells of all strengths that are tried."""
    return [cell for options in trials.values() for _, cell in options]


def _check_flags(config):
    names = (ROWS, TABLES, "table-*", STAGES, REPORT)
    check_own_folder(config.output_dir, names, "experiment")
    trials, cells = grid.trials_of(config), grid.cells_of(config, {})
    axes = grid.axes_of(config)
    for spec in _specs(config):
        tables.check_spec(spec, axes)
    return trials, cells


class _Work:
    """The rows there are, and the making of those that are not.

    Attributes:
        rows: by their cell's key.
        failed: one line for each cell that cannot be made, by key.
        computed: how many rows were made here.
    """

    def __init__(self, config, out, progress):
        self._config, self._out, self._progress = config, out, progress
        self.rows, self.failed, self.computed = {}, {}, 0
        for path in (config.rows, out / ROWS if (out / ROWS).exists() else None):
            if path is not None:
                self.rows |= {row["cell"]: row for row in tables.read_csv(path)}
        self._maker = Maker(progress)

    def is_settled(self, cell) -> bool:
        """Whether there is a row, or there cannot be one.

        A row does not count where a stage's folder is there and its files or data have changed.
        """
        if cell.key not in self.rows:
            return cell.key in self.failed
        return all(
            self._maker.is_done(stage)
            for stage in cell.stages.values()
            if Path(stage.output_dir).exists()
        )

    def do(self, cell, order):
        """Make a cell's row unless it is there or enough were made; save all, in this order."""
        if self.is_settled(cell) or self.computed == self._config.max_cells:
            return
        try:
            self.rows[cell.key] = self._compute(cell)
        except (DataError, UsageError, Interrupted):
            raise
        except AntidoteError as error:  # such as a loss that is not finite
            self.failed[cell.key] = f"{_name(cell)}: {error}"
            return
        self.computed += 1
        self.save(order)

    def save(self, order) -> list[dict]:
        """Write rows.csv: the cells' rows in their order, then others that it held before."""
        rows = [{**self.rows[c.key], "role": c.role} for c in order if c.key in self.rows]
        ours = {row["cell"] for row in rows}
        if not all(self.is_settled(cell) for cell in order):
            # Perhaps of cells whose strengths are yet to be chosen.
            rows += [row for key, row in self.rows.items() if key not in ours]
        self._out.mkdir(parents=True, exist_ok=True)
        tables.write_csv(rows, self._out / ROWS)
        return rows

    def _compute(self, cell):
        reports = {}
        for kind, stage in cell.stages.items():
            if not self._maker.is_done(stage):
                if self._progress:
                    tell(f"{_name(cell)}: {kind}")
                reset_peak_memory()
            reports[kind] = self._maker.make(kind, stage)
        return _row(cell, reports)


def _row(cell, reports):
    metrics = tables.metrics_of(reports["evaluate"])
    row = {
        "role": cell.role,
        "cell": cell.key,
        **cell.axes,
        "strength": cell.strength,
        **tables.headline(metrics),
        "embedding_drift_per_token": metrics.get("drift", {}).get("embedding_drift_per_token"),
    }
    for kind in grid.KINDS:
        report = reports.get(kind, {})
        seconds = report.get("seconds")
        if isinstance(seconds, dict):
            seconds = round(sum(seconds.values()), 3)
        peak = report.get("peak_device_memory_bytes") or report.get("peak_memory_bytes")
        row |= {f"{kind}_seconds": seconds, f"{kind}_memory_bytes": peak}
    return row


def _best(defense, options, rows):
    """The flags of the strength with the highest FA * (100 - HS), the first of equals."""
    scored = [
        (row["finetune_accuracy"] * (100 - row["harmful_score"]), -i)
        for i, (_, cell) in enumerate(options)
        if (row := rows.get(cell.key)) is not None
    ]
    if not scored:
        raise AntidoteError(f"tune.strengths.{defense}: none of them could be computed")
    return options[-max(scored)[1]][0]


def _name(cell):
    parts = [f"{name}={value}" for name, value in cell.axes.items() if name != "defense"]
    return ", ".join([f"{cell.axes['defense']} ({cell.role})", *parts, cell.strength]).rstrip(", ")


def _specs(config):
    if config.tables:
        return config.tables
    lists = [pair for each in grid.grids_of(config) for pair in each.items()]
    across = [n for n, values in lists if len(values) > 1 and n not in ("seed", "defense")]
    return [{"title": f"By {name}", "across": name} for name in dict.fromkeys(across)]


def write_tables(rows: Sequence[dict], config: ExperimentConfig, folder: Path) -> None:
    """Write tables.md and a picture for each table that the config asks for."""
    texts = []
    for number, spec in enumerate(_specs(config), 1):
        text = tables.markdown(rows, spec)
        picture = folder / f"table-{number}.png"
        if tables.table(rows, spec)["rows"]:
            with new_file(picture) as partial:
                pictures.plot(rows, spec, partial)
            text += f"\n![{spec['title']}]({picture.name})\n"
        texts.append(text)
    if texts:
        with new_file(folder / TABLES) as partial:
            partial.write_text("\n".join(texts), encoding="utf-8")
