"""What a stage takes, as numbers and as text, and how a plan comes to them."""

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from antidote_fast.data.load import local_file
from antidote_fast.errors import AntidoteError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_free_space, nearest_folder
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.footprint import check_memory, device_memory, weight_bytes
from antidote_fast.models.loading import pick_device
from antidote_fast.planning import rates
from antidote_fast.planning.cost import Flops, ModelCost, cost_of
from antidote_fast.selection import Selection
from antidote_fast.system.memory import format_bytes, resident_bytes

# What malloc keeps of what a pass has given back: 1.6 times the live tensors stayed resident in a
# training step of 69M weights, 8 x 144 tokens (bf16, one Xeon core), 1.3 times without gradients.
_RETAINED = 1.4
_FIGURES = (
    *("stage", "model", "device", "data", "pruned", "bytes_read", "bytes_written", "disk_free"),
    *("flops", "memory", "memory_available", "seconds", "notes", "parts", "refusal"),
    "peak_memory",
)


class Plan:
    """What a stage takes, by estimate: work and memory are added, seconds measured at the end.

    Args:
        stage: its name.
        config: its dataclass.
        base: checkpoint of the model that is read.
        adapter: checkpoint of the adapter that is put on it, or None.
        adapt: called with the model, puts an adapter on it that is not there yet.

    Attributes:
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
        cost: the :class:`ModelCost` of the model, once it is :meth:`load`\\ ed.
        shape: (sequences, tokens) of the largest batch.
        trains: whether batches go through forwards and back.
        prunes, columns: weights that are scored and removed, and the width of the largest matrix.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        base: Checkpoint,
        adapter: Checkpoint | None = None,
        adapt: Callable | None = None,
    ):
        self.stage, self.config, self.base, self.adapter = stage, config, base, adapter
        self.adapt = adapt if adapter is None else functools.partial(load_adapter, adapter=adapter)
        self.model = {
            "folder": str(base.folder),
            "num_weights": base.num_weights,
            "bytes": weight_bytes(base, config.dtype),
            "dtype": config.dtype,
        }
        self.device = pick_device(config.device)
        self.data, self.pruned, self.memory, self.seconds, self.parts = {}, {}, {}, {}, {}
        self.bytes_read = self.bytes_written = self.flops = 0
        self.disk_free = shutil.disk_usage(nearest_folder(config.output_dir)).free
        self.memory_available = device_memory(self.device)
        self.notes, self.refusal, self.cost = [], None, None
        self.shape, self.trains, self.prunes, self.columns = (1, 1), False, 0, 1024
        self._phases, self._work = [{}], []

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def load(self) -> ModelCost:
        """The model as the stage loads it, on meta."""
        self.cost = cost_of(self.config, self.base, self.adapt)
        return self.cost

    def hold(self, what: str, size: int | None) -> None:
        """Bytes that are held together with the others since the last :meth:`phase`."""
        if size is None:
            self.notes.append(f"{what}: not known for this model, and not counted")
        elif size:
            if self.device.type == "cpu" and what.startswith("activations"):
                size = int(size * _RETAINED)
            self._phases[-1][what] = size

    def phase(self, memory: dict[str, int]) -> None:
        """What is held when all before has been given back."""
        self._phases.append({what: size for what, size in memory.items() if size})

    def compute(self, step: str, flops: int, decoding: bool = False) -> None:
        """Work on whole batches; ``decoding``: token by token."""
        self.flops += flops
        self._work.append((step, flops, decoding))

    def forward(self, step: str, shapes: Sequence, flops: Flops | None = None) -> None:
        """Forward passes of batches of these shapes, (sequences, tokens) each."""
        batches = [(count, length, count) for count, length in shapes]
        self.compute(step, (flops or self.cost.forward).of_batches(batches))
        self.shape = max(self.shape, *shapes, key=math.prod)

    def train(self, batches: list[tuple[int, int, int]], more: int = 0) -> None:
        """A step forwards and back on the largest batch; ``more`` bytes are held in it.

        A batch is (sequences, tokens of each, response tokens of all).
        """
        largest = max(batches, key=lambda batch: batch[0] * batch[1])
        self.shape = largest[:2]
        attention = "eager" if self.device.type == "cpu" else "sdpa"
        size = self.cost.peak_bytes(*largest, attention)
        self.hold("activations and gradients", size and size + more)

    def generate(self, lengths: Iterable[int], new: int) -> None:
        """Answers of ``new`` tokens to prompts of these lengths, in batches of like lengths."""
        lengths, size = sorted(lengths, reverse=True), self.config.batch_size
        chunks = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        shapes = [(len(chunk), chunk[0]) for chunk in chunks]
        self.forward("read prompts", shapes)
        # An answer's token looks at the prompt and at the tokens before it.
        seen = sum(count * (length * new + new**2 // 2) for count, length in shapes)
        count = new * len(lengths)
        self.compute("answer", self.cost.forward.of(count, seen, count), decoding=True)

    def read(self, *sources: Checkpoint | str | None) -> None:
        """Checkpoints, names of data sets, and None."""
        for source in sources:
            if isinstance(source, Checkpoint):
                self.bytes_read += source.file_bytes
            elif source is not None and (path := local_file(source)) is not None:
                self.bytes_read += os.path.getsize(path)

    def finish(self) -> "Plan":
        """Itself, with seconds by a short measurement, and the refusals that the stage makes."""
        config, base = self.config, self.base
        matrix = max(base.tensors.values(), key=lambda e: len(e.shape) == 2 and e.num_bytes)
        dtype = self.cost.dtype if self.cost else matrix.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            dtype = torch.float32
        self.model["dtype"] = str(dtype).removeprefix("torch.")
        process = resident_bytes()  # before the measurement leaves something in malloc's hands

        @functools.cache
        def speed(decoding):
            shape = (self.shape[0], 1) if decoding else self.shape
            return rates.block_rate(self.cost, self.device, shape, self.trains, self.adapt)

        file = max(base.weight_files, key=os.path.getsize)
        self.seconds["read"] = self.bytes_read / rates.read_rate(file)
        for step, flops, decoding in self._work:
            self.seconds[step] = self.seconds.get(step, 0.0) + flops / speed(decoding)
        if self.prunes:
            scope = "row" if config.scope == "row" else "tensor"  # global is timed as tensor
            prune = (Selection(getattr(config, "ratio", 0.1), scope=scope), config.backend)
            rate = rates.prune_rate(self.device, dtype, self.columns, *prune)
            self.seconds["prune"] = self.prunes / rate
        self.seconds["write"] = self.bytes_written / rates.write_rate(config.output_dir)
        self.memory = max(self._phases, key=lambda memory: sum(memory.values()))
        beside = self.peak_memory
        if self.device.type == "cpu":
            self.memory = {"process": process, **self.memory}
        try:
            if any("weights" in memory for memory in self._phases):  # a model is loaded
                check_memory(config, [base, self.adapter])
            check_free_space(config.output_dir, self.bytes_written)
        except AntidoteError as error:
            self.refusal = str(error)
        available = self.memory_available
        if self.refusal is None and available is not None and beside > available:
            self.notes.append("more than is available: lower batch_size or max_seq_length")
        return self

    def repeat(self, times: int) -> None:
        """As often as this, on a model that is loaded once."""
        self.flops *= times
        for step in self.seconds.keys() - {"read"}:
            self.seconds[step] *= times

    def sum_up(self, parts: dict[str, "Plan"]) -> None:
        """Take as parts what is done one after another."""
        self.parts = parts
        for name, part in parts.items():
            self.bytes_read += part.bytes_read
            self.bytes_written += part.bytes_written
            self.flops += part.flops
            self.seconds[name] = sum(part.seconds.values())
            self.refusal = self.refusal or part.refusal
        largest = max(parts.values(), key=lambda part: part.peak_memory, default=self)
        self.memory, self.model = dict(largest.memory), dict(largest.model)

    def to_dict(self) -> dict:
        """JSON values."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        figures = {name: getattr(self, name) for name in _FIGURES}
        return figures | {"device": str(self.device), "parts": parts}

    def lines(self) -> list[str]:
        """For a person."""
        size = format_bytes
        model = self.model | {"bytes": size(self.model["bytes"])}
        memory = f"{size(self.peak_memory)} at the peak ({_list(self.memory, size)})"
        if self.memory_available is not None:
            memory += f"; {size(self.memory_available)} available"
        steps = "" if self.parts else f" ({_list(self.seconds, _duration)})"
        rows = {
            "model": "{folder}: {num_weights:,} weights, {bytes} in {dtype}".format(**model),
            "data": ", ".join(f"{value:,} {name}" for name, value in self.data.items()),
            "prunes": ", ".join(f"{value:,} {name}" for name, value in self.pruned.items()),
            "device": str(self.device),
            "reads": size(self.bytes_read),
            "writes": f"{size(self.bytes_written)} ({size(self.disk_free)} free)",
            "computes": f"{self.flops:.3g} FLOPs",
            "memory": memory,
            "time": _duration(sum(self.seconds.values())) + steps,
        }
        lines = [f"plan of {self.stage}: nothing was loaded, nothing is written"]
        lines += [f"  {name:<9} {text}" for name, text in rows.items() if text]
        lines += [
            f"  {name:<16} {_duration(sum(part.seconds.values()))}, {part.flops:.3g} FLOPs, "
            f"{size(part.peak_memory)} of memory, {size(part.bytes_written)} written"
            for name, part in self.parts.items()
        ]
        return lines + [f"  note      {note}" for note in self.notes]


def _list(parts, show):
    return ", ".join(f"{name} {show(value)}" for name, value in parts.items())


def _duration(seconds):
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
