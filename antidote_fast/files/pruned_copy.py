"""Checkpoints: safetensors in, safetensors out, each folder written whole or not at all."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_free_space
from antidote_fast.files.manifest import MANIFEST
from antidote_fast.files.safe_open import is_file_name
from antidote_fast.files.tensor_file import bytes_of
from antidote_fast.system.progress import Progress, track

_MAX_COPIED = 256  # files beside the weights
_MAX_COPIED_BYTES = 1 << 30  # of them together, by their lengths: a sparse file is copied whole
_PIECE = 16 << 20
_COPIED = re.compile(
    r".*\.(json|txt|model|jinja|tiktoken)|(LICENSE|NOTICE|COPYING)(\..*)?|README\.md"
)
_SECRET = re.compile(
    r"\..*|(.*[._-])?(token|auth|secrets?|credentials?|passwords?|api[_-]?keys?)([._-].*)?",
    re.IGNORECASE,
)
_NOT_COPIED = (MANIFEST, "report.json", "trainer_state.json", "all_results.json")


def write_pruned(
    checkpoint: Checkpoint,
    destination: str | Path,
    tensors: Mapping[str, Tensor],
    progress: Progress = False,
) -> None:
    """Copy a checkpoint with some of its tensors replaced; every other byte stays as it was.

    Args:
        checkpoint: of a model or an adapter.
        destination: an existing empty folder.
        tensors: {parameter name: tensor} of the shapes and dtypes that are saved.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Raises:
        DataError: a name that the checkpoint lacks, or another shape or dtype; nothing is written.
        AntidoteError: not enough room on the disk.
    """
    destination = Path(destination)
    by_file = {}
    for key, tensor in tensors.items():
        entry = checkpoint.entry(key)
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise DataError(
                f"{checkpoint.folder}: {key!r} is {entry.dtype} {entry.shape} on disk, not "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        by_file.setdefault(entry.file, []).append((entry, tensor))
    check_free_space(destination, sum(f.stat().st_size for f in checkpoint.weight_files))
    for file in track(checkpoint.weight_files, "write", progress):
        with open(destination / file.name, "wb") as target:
            if checkpoint.is_adapter:
                target.write(checkpoint.adapter_bytes)
            else:
                with checkpoint.source.open(file.name) as whole:
                    shutil.copyfileobj(whole, target, _PIECE)
            for entry, tensor in by_file.get(file, ()):
                target.seek(entry.start)
                target.write(bytes_of(tensor.detach().cpu().contiguous()))
    # Last, as a loader looks for config.json: no folder that is half-written loads.
    copy_checkpoint_files(checkpoint, destination)


def copy_checkpoint_files(checkpoint: Checkpoint, destination: str | Path) -> None:
    """Copy what surrounds the weights: configs, index, tokenizer, licence and model card.

    Left out are hidden files and those whose names tell of a token or a password.

    Raises:
        DataError: as :func:`check_copied`, or a file has changed since the checkpoint was opened.
    """
    for name in _copied(checkpoint):
        with _listed(checkpoint, name) as source, open(Path(destination) / name, "wb") as target:
            shutil.copyfileobj(source, target, _PIECE)
    checkpoint.watch.check()


def check_copied(checkpoint: Checkpoint) -> None:
    """Refuse, before any work, what :func:`copy_checkpoint_files` will not copy.

    Raises:
        DataError: a link out of the folder, a pipe; more than 256 files or 1 GiB.
    """
    left = _MAX_COPIED_BYTES
    names = _copied(checkpoint)
    if len(names) > _MAX_COPIED:
        raise DataError(
            f"{checkpoint.folder}: has {len(names)} files beside the weights; at most "
            f"{_MAX_COPIED} are copied"
        )
    for name in names:
        with _listed(checkpoint, name) as file:
            left -= os.fstat(file.fileno()).st_size
        if left < 0:
            raise DataError(
                f"{checkpoint.folder / name}: with it more than {_MAX_COPIED_BYTES >> 30} GiB lie "
                "beside the weights, and would be copied"
            )


def _listed(checkpoint, name):
    try:
        return checkpoint.source.open(name)
    except FileNotFoundError:
        path = checkpoint.folder / name
        raise DataError(f"{path}: changed while it was in use; nothing is made from it") from None


def _copied(checkpoint):
    """The names of the files that are copied as they are."""
    source = checkpoint.source
    names = [n for n in source.names() if _COPIED.fullmatch(n) and not _SECRET.fullmatch(n)]
    names = [n for n in names if is_file_name(n) and n not in _NOT_COPIED]
    return [n for n in names if not source.is_folder(n)]
