"""Safetensors files read and written tensor by tensor, so that none of them is in memory whole."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antidote_fast.errors import DataError, Unreadable
from antidote_fast.files.places import sync
from antidote_fast.files.safe_open import open_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 16 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape, and bytes [start, end) within the file."""

    file: Path
    dtype: torch.dtype | None  # None: one that this torch does not have
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size as saved."""
        return self.end - self.start


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor of a checkpoint, in memory of its own.

    Not by a memory map: its pages would count as resident until the whole file is closed.

    Raises:
        DataError: the file is not there or a link, cannot be read, or ends before the tensor does.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    try:
        with open_file(entry.file) as file:
            read_into(file.fileno(), bytes_of(tensor), entry.start, entry.file)
    except OSError as error:
        if error.errno is None:
            raise DataError(str(error)) from None  # it ends early
        raise Unreadable(f"{entry.file}: cannot be read: {error.strerror}") from None
    return tensor


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose bytes depend on its contents alone.

    ``safetensors.torch.save_file`` puts the metadata in another order each time.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = TensorFile.create(path, specs, metadata)
    for name, tensor in tensors.items():
        file.write(name, tensor)


class TensorFile:
    """A safetensors file of known names and shapes, filled in any order.

    The header is there from the start and the file has its full length, so that what was written
    before a crash need not be written again. ``entries`` are {name: (first byte, byte after the
    last)} within the file.
    """

    def __init__(self, path: str | Path, entries: Mapping[str, tuple[int, int]]) -> None:
        self.path = Path(path)
        self._entries = entries

    @classmethod
    def create(
        cls,
        path: str | Path,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> TensorFile:
        """A new file for tensors ``{name: (dtype, shape)}``, all bytes zero.

        With ``keep`` an existing file, made by the same call before, is left as it is.
        """
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        places, end = {}, 0
        for name, (dtype, shape) in specs.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            places[name] = start, end
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        if not (keep and os.path.exists(path)):
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(data + end)
        return cls(path, {name: (data + a, data + b) for name, (a, b) in places.items()})

    @classmethod
    def like(
        cls,
        path: str | Path,
        source: str | Path,
        entries: Mapping[str, TensorEntry],
        keep: bool = False,
    ) -> TensorFile:
        """A new file with the header and length of ``source``, whose ``entries`` these are.

        With ``keep`` an existing file is left as it is, as after an interruption.
        """
        if not (keep and os.path.exists(path)):
            with open_file(source) as there, open(path, "wb") as here:
                size = os.fstat(there.fileno()).st_size
                prefix = there.read(8)
                here.write(prefix + there.read(struct.unpack("<Q", prefix)[0]))
                here.truncate(size)
        return cls(path, {name: (entry.start, entry.end) for name, entry in entries.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in one tensor; its bytes, in C order, must fill its place exactly."""
        start, end = self._entries[name]
        data = bytes_of(tensor.detach().cpu().contiguous())
        if len(data) != end - start:
            raise ValueError(
                f"{name}: {len(data)} bytes, its place in {self.path} has {end - start}"
            )
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(data)

    def copy(self, source: str | Path, start: int, end: int) -> None:
        """Copy a range of bytes from the same place of another file."""
        with open_file(source) as there, open(self.path, "r+b") as here:
            there.seek(start)
            here.seek(start)
            while start < end:
                piece = there.read(min(_PIECE, end - start))
                if not piece:
                    raise OSError(f"{source}: ends at byte {start}, {end} expected")
                start += here.write(piece)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        sync(self.path)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read or to fill."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def read_into(fd: int, view: memoryview, position: int, where: str | Path) -> None:
    """Fill ``view`` from byte ``position`` of an open file; ``where`` names it in an error."""
    while len(view):
        count = os.preadv(fd, [view[: 1 << 30]], position)
        if not count:
            raise OSError(f"{where}: ends at byte {position}")
        view, position = view[count:], position + count
