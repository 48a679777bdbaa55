"""Activation norms block by block: each block is loaded once, for all calibration batches.

What lies between two blocks are the hidden states of all batches, in memory as far as there is room
and on disk past it; kept on disk, they are where an interrupted calibration goes on.
"""

import dataclasses

import torch

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.norms.collector import NormCollector
from antidote_fast.streaming.spill import TensorStore


class BlockCalibration:
    """The norms of a model's targets, one block after another.

    Args:
        model: a :class:`antidote_fast.streaming.blocks.BlockModel`.
        batches: as :meth:`ActivationNorms.collect` takes them.
        folder: where hidden states that find no room lie, and those that are kept.
        room: :class:`antidote_fast.streaming.spill.Room` for hidden states and arguments of blocks.
        targets, ignore, response_only, aggregation, backend: as :meth:`ActivationNorms.collect`.
        fingerprint: of the base model.

    Attributes:
        spilled_bytes: the most of hidden states and arguments that lay on disk for want of room.

    Raises:
        NothingPruned, UsageError: as :func:`antidote_fast.models.targets.find_targets`.
        DataError: no token to count; a target outside of the blocks.
    """

    def __init__(
        self,
        model,
        batches,
        folder,
        room,
        *,
        targets=None,
        ignore=(),
        response_only=False,
        aggregation="rms",
        backend=None,
        fingerprint="",
    ):
        self.model, self.folder, self.room = model, folder, room
        self._options = {
            "aggregation": aggregation,
            "response_only": response_only,
            "backend": backend,
        }
        self._fingerprint = fingerprint
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

    def begin(self, hidden=None):
        """Run the model up to its first block.

        Args:
            hidden: what :meth:`keep` returned in an interrupted run, to go on from there.
        """
        self._calls = TensorStore(self.folder / "calls.bin", self.room)
        if hidden is None:
            self._hidden = self._store(0)
        else:
            self._hidden = TensorStore.reopen(
                self.folder / hidden["file"], self.room, hidden["index"]
            )
            self._kept = self._hidden
        for number, (first, calls) in enumerate(self.model.calls(self._batches)):
            if hidden is None:
                self._hidden.put(number, [first])
            self._note(number, calls)
        self.spilled_bytes = self._spilled(self._hidden)

    def steps(self, indices, prefetch=True):
        """Run block after block.

        Args:
            indices: of the blocks, in order, from the one that :meth:`begin` was about.
            prefetch: read the next block while this one runs.

        Yields:
            (index, {name as saved: tensor}, norms of the block's targets or None where it has
            none). The tensors are the caller's to change. Blocks after the last target do not run.
        """
        for index, tensors in self.model.loaded(indices, prefetch):
            norms = self.run(index) if index <= self.last else None
            yield index, tensors, norms

    def run(self, index, collect=True):
        """The norms of a loaded block's targets (None without), its output put in place of its
        input; with ``collect=False`` the forward alone."""
        targets = [
            dataclasses.replace(target, weight=target.module.weight)
            for target in self._by_block[index]
        ]
        # The output of the last block that matters is not needed.
        after = None if index == self.last else self._store(index + 1)
        with NormCollector(targets if collect else (), **self._options) as collector:
            for number, batch in enumerate(self._batches):
                (hidden,) = self._hidden.get(number)
                call = self._call(number, index)
                mine = collector if collect and targets else None
                hidden = self._forward(index, batch, hidden, call, mine)
                if after is None:
                    self._hidden.drop(number)
                else:
                    # In the same memory: what is freed in pieces does not go back to the system.
                    after.put(number, [hidden], self._hidden.take(number))
            if after is not None:
                self.spilled_bytes = max(self.spilled_bytes, self._spilled(after))
            norms = (
                ActivationNorms.of(collector, fingerprint=self._fingerprint)
                if collect and targets
                else None
            )
        if self._hidden is not self._kept:
            self._hidden.close()
        self._hidden = after
        return norms

    def _forward(self, index, batch, hidden, call, collector):
        """A block's output; where a GPU's memory is too small, of the halves of the batch."""
        size = hidden.shape[0]
        try:
            if collector is not None:
                collector.start(batch)
            out = self.model.run(index, hidden, call)
            if collector is not None:
                collector.finish()
            return out
        except torch.OutOfMemoryError as error:
            if collector is not None:
                collector.discard()
            if size < 2:
                raise AntidoteError(
                    "out of memory at one sequence a batch: shorten max_seq_length"
                ) from error

        def part(value, rows):
            whole = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size
            return value[rows] if whole else value

        halves = []
        for rows in (slice(0, size // 2), slice(size // 2, size)):
            tokens = {key: part(value, rows) for key, value in batch.items()}
            leaves = [part(leaf, rows) for leaf in call[0]]
            state = part(hidden, rows)
            halves.append(self._forward(index, tokens, state, (leaves, *call[1:]), collector))
        return torch.cat(halves)

    def keep(self):
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
        tensors, places, specs = [], {}, []
        for leaves, spec, place in calls:
            noted = []
            for leaf in leaves:
                if not isinstance(leaf, torch.Tensor):
                    noted.append((None, leaf))
                    continue
                where = places.setdefault(id(leaf), len(tensors))
                if where == len(tensors):
                    tensors.append(leaf)
                noted.append((where, None))
            specs.append((noted, spec, place))
        self._specs[number] = specs
        self._calls.put(number, tensors)

    def _call(self, number, index):
        noted, spec, place = self._specs[number][index]
        tensors = self._calls.get(number)
        return [leaf if where is None else tensors[where] for where, leaf in noted], spec, place

    def _sorted_by_block(self):
        named = {id(module): name for name, module in self.model.model.named_modules()}
        by_block = [[] for _ in self.model.names]
        for target in self.targets:
            name = named[id(target.module)]
            for index, block in enumerate(self.model.names):
                if name.startswith(block + "."):
                    by_block[index].append(target)
                    break
            else:
                raise DataError(
                    f"{target.key}: lies outside of the decoder blocks; leave it out with ignore, "
                    "or prune without stream"
                )
        return by_block
