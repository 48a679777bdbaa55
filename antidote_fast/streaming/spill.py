"""Tensors that are put away and taken back, in memory up to a limit and on disk past it."""

import os
from pathlib import Path

import torch

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files.tensor_file import bytes_of, read_into
from antidote_fast.system.memory import available_memory, format_bytes, parse_bytes, resident_bytes

_FIRST_FORWARD = 64 << 20  # of libraries and their buffers; 36 to 50 MB were seen
_SHARE = 0.8  # of the free memory, where max_memory says nothing


class Room:
    """Bytes that several stores may hold in memory together."""

    def __init__(self, limit):
        self.left = max(0, int(limit))

    def take(self, size) -> bool:
        """Reserve ``size`` bytes, where there are so many left."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give(self, size):
        """Hand back bytes that were taken."""
        self.left += size


class TensorStore:
    """Lists of tensors by number; those that find no room lie in one file, made when needed."""

    def __init__(self, path, room):
        self.path, self.room = Path(path), room
        self.num_bytes = self.num_spilled = 0
        self._held, self._places = {}, {}
        self._end = 0
        self._fd = None

    def put(self, number, tensors, memory=None):
        """Put away a list of tensors; copied where they do not stay in memory.

        ``memory``, which :meth:`take` of another store of the same room gave for such a list, is
        filled where it is given, so that nothing is allocated anew.
        """
        tensors = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
        size = _num_bytes(tensors)
        self.num_bytes += size
        if memory is not None:
            for there, tensor in zip(memory, tensors, strict=True):
                there.copy_(tensor)
            self._held[number] = memory
        elif self.room.take(size):
            self._held[number] = tensors
        else:
            self.num_spilled += size
            self._write(number, tensors)

    def take(self, number):
        """The memory of one list, forgotten here, its room still taken; None if it is on disk."""
        return self._held.pop(number, None)

    def get(self, number) -> list:
        """The list that was put under ``number``, on the CPU."""
        if number in self._held:
            return self._held[number]
        return [self._read(*place) for place in self._places[number]]

    def drop(self, number):
        """Forget what is in memory of one list."""
        held = self._held.pop(number, None)
        if held is not None:
            self.room.give(_num_bytes(held))

    def close(self, delete=True):
        """Give back the memory, and the file as well unless ``delete`` is False."""
        for number in list(self._held):
            self.drop(number)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if delete:
            self.path.unlink(missing_ok=True)

    def keep(self) -> list:
        """Have all in the file, what is in memory too; gives what :meth:`reopen` needs, for JSON.

        :meth:`sync` then waits for the disk.
        """
        for number, tensors in self._held.items():
            if number not in self._places:
                self._write(number, tensors)
        return sorted(self._places.items())

    def sync(self):
        """Wait until what is in the file is on the disk."""
        if self._fd is not None:
            os.fsync(self._fd)

    @classmethod
    def reopen(cls, path, room, index) -> "TensorStore":
        """What :meth:`keep` left on disk; read into memory as far as there is room.

        Raises:
            DataError: the file is missing or shorter than it was.
        """
        store = cls(path, room)
        try:
            store._fd = os.open(store.path, os.O_RDWR)
            store._places = dict(index)
            for number in store._places:
                tensors = store.get(number)
                size = _num_bytes(tensors)
                store.num_bytes += size
                if room.take(size):
                    store._held[number] = tensors
                else:
                    store.num_spilled += size
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            store.close(delete=False)
            raise DataError(f"{path}: cannot be read: {error}") from None
        store._end = os.fstat(store._fd).st_size
        return store

    def _write(self, number, tensors):
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        places = []
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            places.append((self._end, list(tensor.shape), dtype))
            data = bytes_of(tensor)
            while len(data):
                count = os.pwrite(self._fd, data[: 1 << 30], self._end)
                data, self._end = data[count:], self._end + count
        self._places[number] = places

    def _read(self, position, shape, dtype):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        read_into(self._fd, bytes_of(tensor), position, self.path)
        return tensor


def _num_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def room_for_hidden(config, model, batches):
    """(bytes for hidden states and arguments of blocks, whether the next block is read ahead).

    Raises:
        AntidoteError: max_memory, or what is free, is too little for the blocks alone.
    """
    now = resident_bytes()
    limit = now + int(_SHARE * available_memory())
    if config.max_memory is not None:
        limit = parse_bytes(config.max_memory, "max_memory")
    block = max(model.num_bytes(i) for i in range(len(model)))
    tokens = max(batch["input_ids"].numel() for batch in batches)
    values = tokens * _widths(model) + _FIRST_FORWARD
    # A block in use, one on its way to the disk, one read ahead.
    for prefetch in (True, False):
        fixed = max(now + model.outside_bytes, now + (2 + prefetch) * block + values)
        if fixed < limit:
            return limit - fixed, prefetch
    where = "the free memory" if config.max_memory is None else f"max_memory={config.max_memory!r}"
    raise AntidoteError(
        f"{where}: {format_bytes(limit)} is less than the {format_bytes(fixed)} that this needs: "
        f"{format_bytes(now)} in use, {format_bytes(block)} a block; a smaller batch_size needs "
        f"{format_bytes(values)} less at most"
    )


def _widths(model):
    """Bytes a token that a block holds on its way, about: fp32, the widest layers."""
    config = model.model.config
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return 4 * (6 * hidden + 3 * (inner if isinstance(inner, int) else max(inner)))
