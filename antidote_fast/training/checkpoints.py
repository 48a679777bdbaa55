"""A training's output folder, and the checkpoints from which an interrupted training goes on."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from antidote_fast.config.train import TrainConfig
from antidote_fast.errors import DataError, Interrupted, first_line
from antidote_fast.files.commit import RUN_INPUTS, digest_of, new_file, output_folder
from antidote_fast.files.resume import Run, discard, interrupted_state, run_folder
from antidote_fast.system.interrupts import Request
from antidote_fast.training.objective import Objective

_GENERATORS = "generator."
_OBJECTIVE = "objective."
_OPTIMIZER = "optimizer."
_WEIGHT = "weight."


@contextlib.contextmanager
def training_folder(
    config: TrainConfig, inputs: Mapping[str, Any], **entries: Any
) -> Iterator[tuple[Path, Run | None]]:
    """The folder to write a trained model into, and the run that keeps its checkpoints.

    Args:
        config: where to, and whether with checkpoints.
        inputs: everything that decides the result, as :func:`run_inputs` gives it.
        entries: further JSON values for ``COMPLETE.json``.

    Yields:
        ``(folder, run)``; run is None where the config asks for no checkpoints.

    Raises:
        DataError: as :func:`antidote_fast.files.resume.run_folder`.
    """
    if config.save_steps is None and not config.resume:
        entries[RUN_INPUTS] = digest_of(inputs)
        interrupted_state(config.output_dir, inputs, overwrite=config.overwrite)
        with output_folder(config.output_dir, config.overwrite, **entries) as folder:
            discard(config.output_dir)
            yield folder, None
        return
    options = {"resume": config.resume, "overwrite": config.overwrite}
    with run_folder(config.output_dir, inputs, **options) as run:
        shutil.rmtree(run.output)  # a killed run may have begun to write its model
        run.output.mkdir()
        run.keep = True  # memory or a disk that is full today is not tomorrow
        yield run.output, run
        run.commit(**entries)


@dataclass
class Checkpoints:
    """Saves the state of a training and takes it back; without a run it does neither.

    Weights, Adam's moments, what the objective keeps and the generators go into one safetensors
    file, numbers into the run's JSON state.

    ``every`` counts steps between checkpoints; None saves only where the training is interrupted.
    """

    run: Run | None
    objective: Objective
    optimizer: Optimizer
    scheduler: LRScheduler
    every: int | None = None

    def load(self) -> list[float]:
        """Go on from the last checkpoint; returns the losses of the steps that it stands for."""
        if self.run is None or not self.run.state:
            return []
        state = self.run.state
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.run.folder / "training.safetensors"
        try:
            path = self.run.folder / Path(state["file"]).name
            self._take(state, load_file(path))
        except torch.OutOfMemoryError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{path}: cannot be gone on from: {first_line(error)}; pass overwrite to begin anew"
            ) from error
        return list(state["losses"])

    def _take(self, state, tensors):
        with torch.no_grad():
            for i, p in enumerate(self.objective.parameters):
                p.copy_(tensors[f"{_WEIGHT}{i}"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _under(tensors, _OPTIMIZER).items():
            i, _, name = key.partition(".")
            moments.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        # Its functions are not saved, and LambdaLR asks for them.
        self.scheduler.load_state_dict(self.scheduler.state_dict() | state["scheduler"])
        self.objective.load_state(_under(tensors, _OBJECTIVE), len(state["losses"]))
        torch.set_rng_state(tensors[f"{_GENERATORS}cpu"])
        if f"{_GENERATORS}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{_GENERATORS}cuda"], self.objective.device)

    def is_due(self, losses: Sequence[float], request: Request | None) -> bool:
        """Whether the state after these steps is to be kept, unless they are all."""
        if self.run is None:
            return False
        return bool(request.made or (self.every and len(losses) % self.every == 0))

    def after(self, losses: Sequence[float], wanted: int, request: Request | None) -> None:
        """Save after a step where it is time to, or where somebody asked to stop.

        Args:
            losses: of the steps that are done.
            wanted: steps in all.

        Raises:
            Interrupted: somebody asked to stop; the state is saved.
        """
        done = len(losses)
        if self.run is None or done == wanted:
            return
        if self.is_due(losses, request):
            self._save(losses)
        if request.made:
            raise Interrupted(
                f"interrupted after step {done} of {wanted}; the same command with --resume goes on"
            )

    def _save(self, losses):
        from safetensors.torch import save_file

        tensors = {f"{_GENERATORS}cpu": torch.get_rng_state()}
        if self.objective.device.type == "cuda":
            tensors[f"{_GENERATORS}cuda"] = torch.cuda.get_rng_state(self.objective.device)
        whole = self.optimizer.state_dict()
        for i, p in enumerate(self.objective.parameters):
            tensors[f"{_WEIGHT}{i}"] = p.detach()
        for i, moments in whole["state"].items():
            tensors |= {f"{_OPTIMIZER}{i}.{name}": value for name, value in moments.items()}
        tensors |= {f"{_OBJECTIVE}{name}": v for name, v in self.objective.state().items()}
        before = self.run.state.get("file")
        name = f"training-{len(losses)}.safetensors"
        with new_file(self.run.folder / name, alone=True) as partial:
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
        scheduler = {
            key: value
            for key, value in self.scheduler.state_dict().items()
            if isinstance(value, (int, float, list)) and key != "lr_lambdas"
        }
        numbers = {"losses": losses, "param_groups": whole["param_groups"], "scheduler": scheduler}
        self.run.save({"file": name, **numbers})
        if before not in (None, name):
            (self.run.folder / before).unlink(missing_ok=True)


def _under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
