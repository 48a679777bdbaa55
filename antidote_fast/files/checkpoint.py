"""Reading checkpoint folders: safetensors only, every header checked before a byte is used."""

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from antidote_fast.errors import DataError, printable, readable
from antidote_fast.files import safe_open
from antidote_fast.files.bounds import check_counts
from antidote_fast.files.fingerprint import fingerprint
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.safe_open import Folder, Watch, open_file
from antidote_fast.files.tensor_file import DTYPES, TensorEntry, bytes_of, read_into, read_tensor
from antidote_fast.system.progress import Progress, track

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 32 << 20  # some 100 bytes a tensor
_MAX_TENSORS = 200_000  # of a file; models of a trillion weights have some 100 a file
_MAX_ALL_TENSORS = 1_000_000
_MAX_NAME = 512
_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 40


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder of a model or of a PEFT adapter.

    Args:
        folder, is_adapter: where, and which of the two.
        config: ``config.json`` or ``adapter_config.json``.
        tensors: every tensor by its name as saved.
        weight_files: the safetensors files, in order.
        source: the folder, held open.
        watch: what its files were when it was opened.
    """

    folder: Path
    is_adapter: bool
    config: dict
    tensors: dict[str, TensorEntry] = field(repr=False)
    weight_files: tuple[Path, ...]
    source: Folder = field(repr=False, compare=False)
    watch: Watch = field(repr=False, compare=False)

    def find(self, key: str) -> str | None:
        """The name under which the parameter ``key`` of the live model is saved, or None.

        A file may leave out the model's prefix (``transformer.`` of GPT-2 on the hub) or have it.
        """
        names = (key, key.split(".", 1)[-1])
        saved = next((name for name in names if name in self.tensors), None)
        return saved or self._by_tail.get(key)

    def entry(self, key: str) -> TensorEntry:
        """Where the parameter ``key`` of the live model lies; a DataError where it is not saved."""
        name = self.find(key)
        if name is None:
            raise DataError(f"{self.folder}: has no tensor {key!r}")
        return self.tensors[name]

    @property
    def num_weights(self) -> int:
        """Values of all tensors."""
        return sum(entry.num_elements for entry in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Size of the files that hold the weights."""
        return sum(file.stat().st_size for file in self.weight_files)

    @functools.cached_property
    def _by_tail(self):
        """Names by what follows their first part; None where several end alike."""
        names = {}
        for name in self.tensors:
            tail = name.split(".", 1)[-1]
            names[tail] = None if tail in names else name
        return names

    def read(self, keys: Iterable[str], progress: Progress = False) -> dict[str, torch.Tensor]:
        """Tensors by live parameter name, in memory of their own.

        Raises:
            DataError: a key is not in the checkpoint, or a file cannot be read.
        """
        tensors = {}
        for key in track(keys, "read", progress):
            entry = self.entry(key)
            if entry.dtype is None:  # its size is unknown then, and its shape unchecked
                raise DataError(
                    f"{entry.file}: {self.find(key)!r} is of a dtype that this torch lacks"
                )
            try:
                tensors[key] = self._held_tensor(entry) if self.is_adapter else read_tensor(entry)
            except RuntimeError as error:
                raise DataError(f"{entry.file}: cannot be read: {printable(error):.300}") from None
        return tensors

    @functools.cached_property
    def adapter_bytes(self) -> bytes:
        """The bytes of an adapter's one weight file, read once, so that all made of them agrees.

        Raises:
            DataError: it cannot be read, or is no longer what was checked.
        """
        [path] = self.weight_files
        with readable(path), self.source.open(path.name) as file:
            data = safe_open.read_all(file, path, max(e.end for e in self.tensors.values()))
        length = _header_length(path, data, len(data))
        listed = (read_manifest(self.folder) or {"files": {}})["files"].get(path.name)
        same = listed is None or hashlib.sha256(data).hexdigest() == listed["sha256"]
        if not same or _parse_header(path, data[8 : 8 + length])[0] != self.tensors:
            raise DataError(f"{path}: changed while it was in use; nothing is made from it")
        return data

    def _held_tensor(self, entry):
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        bytes_of(tensor)[:] = memoryview(self.adapter_bytes)[entry.start : entry.end]
        return tensor

    def digests(self) -> dict[str, str]:
        """{path: SHA-256} of an adapter's weights, of the very bytes that :meth:`read` gave."""
        [path] = self.weight_files
        return {str(path): hashlib.sha256(self.adapter_bytes).hexdigest()}

    def fingerprint(self) -> str:
        """As :func:`antidote_fast.files.fingerprint.fingerprint_model`, from the files.

        Little is read, and once: a checkpoint that changes is not used (:attr:`watch`).
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self):
        try:
            with contextlib.ExitStack() as stack:
                handles = {
                    file: stack.enter_context(self.source.open(file.name))
                    for file in self.weight_files
                }
                weights = (
                    (name, e.shape, e.dtype, functools.partial(_read_rows, handles[e.file], e))
                    for name, e in self.tensors.items()
                )
                return fingerprint(weights, self.config.get("model_type"))
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder}: cannot be read: {printable(error):.300}") from None


def _read_rows(handle, entry, indices, columns):
    """Rows by seeking: a memory map fails where the file is larger than the memory."""
    size, width = entry.dtype.itemsize, entry.shape[1]
    columns = min(columns, width)
    data = bytearray()
    for index in indices:
        handle.seek(entry.start + int(index) * width * size)
        data += handle.read(columns * size)
    return torch.frombuffer(data, dtype=entry.dtype).view(len(indices), columns)


@readable()
def open_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check a model or adapter folder, its headers and its index; read no weights.

    Raises:
        DataError: the folder or a file is missing, cut short, malformed, a pickle, a link that
            leads out of the folder, or asks for remote code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    watch, source = Watch(folder), Folder(folder)
    is_adapter = source.has(ADAPTER_CONFIG)
    if not is_adapter and not source.has("config.json"):
        raise DataError(f"{folder}: has neither config.json (a model) nor {ADAPTER_CONFIG}")
    config = read_json(source, ADAPTER_CONFIG if is_adapter else "config.json")
    if config.get("auto_map") and not trust_remote_code:
        raise DataError(
            f"{folder}: its config asks to run code of its own (auto_map); pass trust_remote_code "
            "if you trust it"
        )
    if is_adapter or source.has(MODEL_FILE):
        names, index = [ADAPTER_FILE if is_adapter else MODEL_FILE], {}
    else:
        names, index = _read_index(source)
    tensors = {}
    for name in names:
        for key, entry in _read_header(source, name).items():
            if key in tensors:
                raise DataError(f"{folder}: tensor {key!r} is in two files")
            tensors[key] = entry
        if len(tensors) > _MAX_ALL_TENSORS:
            raise DataError(f"{folder}: lists more than {_MAX_ALL_TENSORS} tensors")
    for key, name in index.items():
        if key not in tensors:
            raise DataError(f"{folder / name}: tensor {key!r} of the index is missing")
        if tensors[key].file.name != name:
            raise DataError(f"{folder / name}: tensor {key!r} lies in {tensors[key].file.name}")
    if not tensors:
        raise DataError(f"{folder}: holds no tensors")
    if not is_adapter:
        check_counts(folder, config, tensors)
    files = tuple(folder / name for name in names)
    return Checkpoint(folder, is_adapter, config, tensors, files, source, watch)


def read_tensor_file(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(metadata, tensors) of one safetensors file, read through one descriptor.

    Raises:
        FileNotFoundError: no such file.
        DataError: it is malformed, cannot be read or changed meanwhile, or holds a dtype that this
            torch lacks.
    """
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        safe_open.check_stored(before, path)
        entries, metadata = _header_of(file, path)
        tensors = {}
        for name, entry in entries.items():
            if entry.dtype is None:
                raise DataError(f"{path}: {name!r} is of a dtype that this torch lacks")
            try:
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            except RuntimeError:
                what = f"{name!r} of {entry.num_bytes} bytes does not fit in memory"
                raise DataError(f"{path}: {what}") from None
            read_into(file.fileno(), bytes_of(tensors[name]), entry.start, path)
        if safe_open.identity(os.fstat(file.fileno())) != safe_open.identity(before):
            raise DataError(f"{path}: changed while it was read")
    return metadata, tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; no more than its header is read.

    A DataError as :func:`read_tensor_file`; also where there is no such file.
    """
    with readable(path), open_file(path) as file:
        return _header_of(file, path)[1]


def read_json(folder: str | Path | Folder, name: str) -> dict:
    """A JSON object from a file of a checkpoint folder, given as a path or held open."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    path = folder.path / name
    try:
        with folder.open(name) as file:
            value = json.loads(safe_open.read_all(file, path, _MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: is not valid JSON: {printable(what):.300}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return value


def check_inside(folder: str | Path, name: str) -> bool:
    """Whether a folder has a file of this name; refused where a link leads out of the folder."""
    try:
        Folder(folder).open(name).close()
    except FileNotFoundError:
        return False
    return True


def _read_index(source):
    folder = source.path
    if not source.has(INDEX_FILE):
        raise DataError(_no_safetensors(source, MODEL_FILE))
    index = read_json(source, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not 0 < len(index) <= _MAX_ALL_TENSORS:
        raise DataError(f"{folder / INDEX_FILE}: has no weight_map")
    for key, name in index.items():
        _check_name(folder / INDEX_FILE, key)
        if not safe_open.is_file_name(name):
            what = f"refers to {ascii(name)[:80]}, which is not a plain file name"
            raise DataError(f"{folder}: {what}")
    names = sorted(set(index.values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise DataError(f"{folder / INDEX_FILE}: refers to {name!r}; only safetensors are read")
    return names, index


def _no_safetensors(source, expected):
    for name in source.names():
        if Path(name).suffix in _OTHER_WEIGHTS and name not in _NOT_WEIGHTS:
            return (
                f"{source.path}: its weights are in {name}; only safetensors are read (a pickle "
                "can run code): save it again with safe_serialization"
            )
    return f"{source.path}: has no {expected}"


def _read_header(source, name):
    path = source.path / name
    try:
        with source.open(name) as file:
            return _header_of(file, path)[0]
    except FileNotFoundError:
        is_only = name in (ADAPTER_FILE, MODEL_FILE)
        why = _no_safetensors(source, name) if is_only else f"{path}: missing"
        raise DataError(why) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _header_of(file, path):
    """(entries, metadata) of an open safetensors file, whose header must describe all of it."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    text = file.read(_header_length(path, prefix, size))
    entries, metadata = _parse_header(path, text)
    end = max((entry.end for entry in entries.values()), default=8 + len(text))
    if end != size:
        what = "is truncated" if size < end else "has bytes after its last tensor"
        raise DataError(f"{path}: {what} ({size} bytes, {end} expected)")
    return entries, metadata


def _header_length(path, prefix, size):
    length = struct.unpack("<Q", prefix[:8])[0] if len(prefix) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise DataError(f"{path}: is truncated or not a safetensors file")
    return length


def _parse_header(path, text):
    """({name: TensorEntry}, metadata) of a header's text."""
    position, objects, was_enabled = 8 + len(text), itertools.count(1), gc.isenabled()

    def once(pairs):
        if next(objects) > _MAX_TENSORS + 2:  # the metadata and the header itself
            raise DataError(f"{path}: lists more than {_MAX_TENSORS} tensors")
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError
        return values

    gc.disable()  # there are no cycles, and the search takes most of a large header's time
    try:
        # As strict as the loader's own parser: UTF-8, no name twice, no NaN (which int refuses).
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=int)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
        entries = {key: _entry(path, value, position) for key, value in header.items()}
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: its header is malformed") from None
    finally:
        if was_enabled:
            gc.enable()
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        _check_name(path, key)
        if entry.start != position:
            raise DataError(f"{path}: tensor {key!r} does not follow the one before it")
        position = entry.end
    return entries, metadata


def _check_name(path, key):
    if len(key) > _MAX_NAME or not key.isprintable():
        raise DataError(f"{path}: tensor name {ascii(key)[:80]} is too long or not printable")


def _entry(path, value, data_start):
    shape = tuple(value["shape"])
    start, end = value["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)) or end < start:
        raise ValueError
    if len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > _MAX_SIZE:
        raise ValueError
    dtype = DTYPES.get(value["dtype"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError
    return TensorEntry(path, dtype, shape, data_start + start, data_start + end)
