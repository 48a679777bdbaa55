"""What a stage takes, as numbers and as text; :mod:`antidote_fast.planning.dry_run` fills it in."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from antidote_fast.data.load import local_file
from antidote_fast.errors import AntidoteError
from antidote_fast.files.commit import check_free_space
from antidote_fast.models.footprint import check_memory, device_memory, weight_bytes
from antidote_fast.models.loading import pick_device
from antidote_fast.planning.rates import measure
from antidote_fast.selection import Selection
from antidote_fast.system.memory import format_bytes, resident_bytes

# What malloc keeps of what a pass has given back: 1.6 times the live tensors stayed resident in a
# training step of 69M weights, 8 x 144 tokens (bf16, one Xeon core), 1.3 times without gradients.
_RETAINED = 1.4


@dataclass
class Plan:
    """What a stage takes, by estimate.

    Args:
        stage: its name.
        model: the model's folder, weights, and the dtype it computes in.
        device: where it computes.
        data: counts of sequences and tokens, as the stage's report has them.
        pruned: counts of layers and weights that may be pruned, where it prunes.
        bytes_read, bytes_written: of weights, data and outputs; text around them is left out.
        disk_free: bytes on the disk of the output folder.
        flops: floating-point operations, two a multiplication with an addition.
        memory: {what: bytes} at the peak.
        memory_available: bytes; None where nothing tells.
        seconds: {step: seconds} from a second's measurement on this machine.
        notes: what a reader should know.
        parts: the plans of the stages of a run.
        refusal: why the stage would refuse to start on this machine, or None.
    """

    stage: str
    model: dict
    device: str
    data: dict = field(default_factory=dict)
    pruned: dict = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    disk_free: int = 0
    flops: int = 0
    memory: dict = field(default_factory=dict)
    memory_available: int | None = None
    seconds: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    refusal: str | None = None

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def repeat(self, times):
        """As often as this, on a model that is loaded once."""
        self.flops *= times
        for step in self.seconds:
            self.seconds[step] *= 1 if step == "read" else times

    def to_dict(self) -> dict:
        """JSON values."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        return {**vars(self), "peak_memory": self.peak_memory, "parts": parts}

    def lines(self) -> list[str]:
        """For a person."""
        rows = {
            "model": "{folder}: {num_weights:,} weights, {bytes} in {dtype}".format(
                **self.model | {"bytes": format_bytes(self.model["bytes"])}
            ),
            "data": ", ".join(f"{value:,} {name}" for name, value in self.data.items()),
            "prunes": ", ".join(f"{value:,} {name}" for name, value in self.pruned.items()),
            "device": self.device,
            "reads": format_bytes(self.bytes_read),
            "writes": f"{format_bytes(self.bytes_written)} ({format_bytes(self.disk_free)} free)",
            "computes": f"{self.flops:.3g} FLOPs",
            "memory": f"{format_bytes(self.peak_memory)} at the peak ({_sizes(self.memory)})",
            "time": _duration(sum(self.seconds.values())),
        }
        if not self.parts:
            rows["time"] += f" ({_durations(self.seconds)})"
        if self.memory_available is not None:
            rows["memory"] += f"; {format_bytes(self.memory_available)} available"
        lines = [f"plan of {self.stage}: nothing was loaded, nothing is written"]
        lines += [f"  {name:<9} {text}" for name, text in rows.items() if text]
        for name, part in self.parts.items():
            lines.append(
                f"  {name:<16} {_duration(sum(part.seconds.values()))}, {part.flops:.3g} FLOPs, "
                f"{format_bytes(part.peak_memory)} of memory, {format_bytes(part.bytes_written)} "
                "written"
            )
        return lines + [f"  note      {note}" for note in self.notes]


class Builder:
    """A :class:`Plan` on its way: work and memory are added, rates measured at the end.

    Args:
        stage: its name.
        config: its dataclass.
        checkpoints: those that are read (None among them is left out), the base model first.
    """

    def __init__(self, stage, config, checkpoints):
        self.config = config
        self.checkpoints = [found for found in checkpoints if found is not None]
        self.device = pick_device(config.device)
        base = self.checkpoints[0]
        weights = sum(_count(entry.shape) for entry in base.tensors.values())
        model = {
            "folder": str(base.folder),
            "num_weights": weights,
            "bytes": weight_bytes(base, config.dtype),
            "dtype": config.dtype,
        }
        self.plan = Plan(stage, model, str(self.device))
        self.plan.memory_available = device_memory(self.device)
        self.plan.disk_free = _free(config.output_dir)
        self.shape, self.prunes, self.training = (1, 1), 0, None
        self._phases = [{}]
        self._work = []

    def hold(self, what, size):
        """Bytes that are held together with the others since the last :meth:`phase`."""
        if size is None:
            self.plan.notes.append(f"{what}: not known for this model, and not counted")
        elif size:
            if self.device.type == "cpu" and what.startswith("activations"):
                size = int(size * _RETAINED)
            self._phases[-1][what] = size

    def phase(self, held):
        """What is held when all before has been given back."""
        self._phases.append({what: size for what, size in held.items() if size})

    def compute(self, step, flops):
        """Work on whole batches."""
        self._add(step, flops, decoding=False)

    def decode(self, step, flops):
        """Work token by token."""
        self._add(step, flops, decoding=True)

    def read(self, *sources):
        """Checkpoints, names of data sets, and None."""
        for source in sources:
            if source is None:
                continue
            path = local_file(source) if isinstance(source, str) else None
            if path is not None:
                self.plan.bytes_read += os.path.getsize(path)
            elif not isinstance(source, str):
                self.plan.bytes_read += sum(f.stat().st_size for f in source.weight_files)

    def finish(self, cost=None, matrices=()) -> Plan:
        """The plan, with seconds by what a short measurement gives.

        Args:
            cost: the :class:`~antidote_fast.planning.cost.ModelCost`, where a model is loaded.
            matrices: the weights that are pruned.
        """
        plan = self.plan
        base = self.checkpoints[0]
        entry = max(base.tensors.values(), key=lambda e: len(e.shape) == 2 and e.end - e.start)
        dtype = cost.dtype if cost else entry.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            dtype = torch.float32
        plan.model["dtype"] = str(dtype).removeprefix("torch.")
        process = resident_bytes()  # before the measurement leaves something in malloc's hands
        rates = measure(
            cost,
            shape=self.shape,
            training=self.training,
            device=self.device,
            dtype=dtype,
            columns=max((m.shape for m in matrices), key=_count)[1] if matrices else 1024,
            file=max(base.weight_files, key=os.path.getsize),
            folder=self.config.output_dir,
            selection=self._selection(),
            backend=getattr(self.config, "backend", None),
        )
        plan.seconds["read"] = plan.bytes_read / rates.read
        for step, flops, decoding in self._work:
            plan.seconds[step] = flops / (rates.flops_decoding if decoding else rates.flops)
        if self.prunes:
            plan.seconds["prune"] = self.prunes / rates.prune
        plan.seconds["write"] = plan.bytes_written * (1 / rates.write + 1 / rates.digest)
        plan.memory = max(self._phases, key=lambda held: sum(held.values()))
        if self.device.type == "cpu":
            plan.memory = {"process": process, **plan.memory}
        self._check()
        return plan

    def _selection(self):
        ratio = getattr(self.config, "ratio", 0.1)
        return Selection(ratio, scope=getattr(self.config, "scope", "row"))

    def _add(self, step, flops, decoding):
        self.plan.flops += flops
        self._work.append((step, flops, decoding))

    def _check(self):
        """The refusals that the stage itself makes, and a word on what may not fit."""
        plan = self.plan
        try:
            if any("weights" in held for held in self._phases):  # a model is loaded
                check_memory(self.config, self.checkpoints)
            check_free_space(self.config.output_dir, plan.bytes_written)
        except AntidoteError as error:
            plan.refusal = str(error)
        available = plan.memory_available
        beside = plan.peak_memory - plan.memory.get("process", 0)
        if plan.refusal is None and available is not None and beside > available:
            plan.notes.append("more than is available: lower batch_size or max_seq_length")


def _count(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def _free(folder):
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _sizes(parts):
    return ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items())


def _durations(parts):
    return ", ".join(f"{step} {_duration(seconds)}" for step, seconds in parts.items())


def _duration(seconds):
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
