"""Activation norms block by block: each block is loaded once, for all calibration batches.

What lies between two blocks are the hidden states of all batches, in memory as far as there is room
and on disk past it; kept on disk, they are where an interrupted calibration goes on.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antidote_fast.errors import DataError
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.norms.batches import in_halves
from antidote_fast.norms.collector import NormCollector
from antidote_fast.streaming.blocks import BlockModel
from antidote_fast.streaming.spill import Room, TensorStore


class BlockCalibration:
    """The norms of a model's targets, one block after another.

    Args:
        model: a :class:`antidote_fast.streaming.blocks.BlockModel`.
        batches: as :meth:`ActivationNorms.collect` takes them.
        folder: where hidden states that find no room lie, and those that are kept.
        room: :class:`antidote_fast.streaming.spill.Room` for hidden states and arguments of blocks.
        targets, ignore, fingerprint: as :meth:`ActivationNorms.collect`.
        options: response_only, aggregation and backend, as :class:`NormCollector`.

    Attributes:
        spilled_bytes: the most of hidden states and arguments that lay on disk for want of room.

    Raises:
        NothingPruned, UsageError: as :func:`antidote_fast.models.targets.find_targets`.
        DataError: no token to count; a target outside of the blocks.
    """

    def __init__(
        self,
        model: BlockModel,
        batches: Iterable[Mapping[str, Any]],
        folder: Path,
        room: Room,
        *,
        targets: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] = (),
        fingerprint: str = "",
        **options: Any,
    ) -> None:
        self.model, self.folder, self.room = model, folder, room
        self._options, self._fingerprint = options, fingerprint
        self.targets = find_targets(model.model, targets, ignore)
        self._by_block = self._sorted_by_block()
        counter = NormCollector((), **self._options)
        # A batch of pads alone never runs.
        self._batches = [batch for batch in batches if counter.start(batch)]
        if not self._batches:
            counter.sums()  # raises, with the counts
        self._hidden = self._calls = None
        self.spilled_bytes = 0
        self._specs, self._kept = {}, None

    @property
    def last(self) -> int:
        """Index of the last block that holds a target."""
        return max(i for i, targets in enumerate(self._by_block) if targets)

    def begin(self, hidden: Mapping[str, Any] | None = None) -> None:
        """Run the model up to its first block, or go on from what :meth:`keep` returned."""
        self._calls = TensorStore(self.folder / "calls.bin", self.room)
        if hidden is None:
            self._hidden = self._store(0)
        else:
            path = self.folder / hidden["file"]
            self._kept = self._hidden = TensorStore.reopen(path, self.room, hidden["index"])
        for number, (first, calls) in enumerate(self.model.calls(self._batches)):
            if hidden is None:
                self._hidden.put(number, [first])
            self._note(number, calls)
        self.spilled_bytes = self._spilled(self._hidden)

    def steps(
        self, indices: Iterable[int], prefetch: bool = True
    ) -> Iterator[tuple[int, dict[str, Tensor], ActivationNorms | None]]:
        """Run block after block, from the one that :meth:`begin` was about to the last target.

        Yields:
            (index, {name as saved: tensor}, norms of the block's targets or None where it has
            none); the tensors are the caller's to change.
        """
        for index, tensors in self.model.loaded(indices, prefetch):
            norms = self.run(index) if index <= self.last else None
            yield index, tensors, norms

    def run(self, index: int, collect: bool = True) -> ActivationNorms | None:
        """The norms of a loaded block's targets (None without), its output put in place of its
        input; with ``collect=False`` the forward alone."""
        targets = [
            dataclasses.replace(target, weight=target.module.weight)
            for target in (self._by_block[index] if collect else ())
        ]
        # The output of the last block that matters is not needed.
        after = None if index == self.last else self._store(index + 1)
        with NormCollector(targets, **self._options) as collector:

            def forward(batch, hidden, leaves):
                # Of a half that is padding alone the output is wanted all the same.
                counts = collector.start(batch) or collector.idle()
                out = self.model.run(index, hidden, (leaves, *call))
                if counts:
                    collector.finish()
                return out

            for number, batch in enumerate(self._batches):
                leaves, *call = self._call(number, index)
                (hidden,) = self._hidden.get(number)
                hidden = _joined(in_halves(forward, batch, hidden, leaves))
                if after is None:
                    self._hidden.drop(number)
                else:
                    # In the same memory: what is freed in pieces does not go back to the system.
                    after.put(number, [hidden], self._hidden.take(number))
            if after is not None:
                self.spilled_bytes = max(self.spilled_bytes, self._spilled(after))
            norms = None
            if targets:
                norms = ActivationNorms.of(collector, fingerprint=self._fingerprint)
        if self._hidden is not self._kept:
            self._hidden.close()
        self._hidden = after
        return norms

    def keep(self) -> tuple[dict[str, Any] | None, TensorStore | None, TensorStore | None]:
        """Have the hidden states on disk that enter the next block.

        Returns:
            (JSON values for :meth:`begin`, None past the last target; the store to sync before they
            are saved; the store that they replace, to be closed after).
        """
        before, self._kept = self._kept, self._hidden
        if self._hidden is None:
            return None, None, before
        index = self._hidden.keep()
        return {"file": self._hidden.path.name, "index": index}, self._hidden, before

    @property
    def hidden_bytes(self) -> int:
        """Size of the hidden states between two blocks."""
        return 0 if self._hidden is None else self._hidden.num_bytes

    def _spilled(self, hidden):
        return hidden.num_spilled + self._calls.num_spilled

    def _store(self, index):
        return TensorStore(self.folder / f"hidden-{index:05d}.bin", self.room)

    def _note(self, number, calls):
        """Put the arguments of all blocks away; a tensor that several blocks get, once."""
        tensors, specs = {}, []
        for leaves, spec, place in calls:
            noted = []
            for leaf in leaves:
                is_tensor = isinstance(leaf, torch.Tensor)
                if is_tensor:
                    tensors.setdefault(id(leaf), (len(tensors), leaf))
                noted.append((tensors[id(leaf)][0], None) if is_tensor else (None, leaf))
            specs.append((noted, spec, place))
        self._specs[number] = specs
        self._calls.put(number, [leaf for _, leaf in tensors.values()])

    def _call(self, number, index):
        noted, spec, place = self._specs[number][index]
        tensors = self._calls.get(number)
        return [leaf if where is None else tensors[where] for where, leaf in noted], spec, place

    def _sorted_by_block(self):
        names = {module: name for name, module in self.model.model.named_modules()}
        by_block = [[] for _ in self.model.names]
        for target in self.targets:
            name = names[target.module]
            inside = [i for i, block in enumerate(self.model.names) if name.startswith(f"{block}.")]
            if not inside:
                raise DataError(
                    f"{target.key}: lies outside of the decoder blocks; leave it out with ignore, "
                    "or prune without stream"
                )
            by_block[inside[0]].append(target)
        return by_block


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)
