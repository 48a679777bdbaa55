"""A model's folder that is written block by block, and hashed as its files are filled."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from antidote_fast.files.commit import check_free_space
from antidote_fast.files.manifest import sha256_file
from antidote_fast.files.pruned_copy import copy_checkpoint_files
from antidote_fast.files.tensor_file import TensorFile

_PARTIAL = ".partial"


class ModelSink:
    """The weight files of a checkpoint, to be filled with tensors of the same shapes.

    A file bears its name only when the model is whole, and config.json comes last: until then no
    loader takes the folder for a model.

    Args:
        checkpoint: the :class:`antidote_fast.files.checkpoint.Checkpoint`; each of its tensors is
            to be written or copied once, into an existing ``folder``.
        done, digests: names of tensors that an interrupted run has written there, and {file name:
            SHA-256} of the files that it has hashed.

    Raises:
        AntidoteError: not enough room on the disk.
    """

    def __init__(self, checkpoint, folder, done=(), digests=None):
        self.checkpoint, self.folder = checkpoint, Path(folder)
        self.digests = dict(digests or {})
        self._left = {}
        for name, entry in checkpoint.tensors.items():
            self._left.setdefault(entry.file, {})[name] = entry
        keep = bool(done)
        if not keep:
            check_free_space(self.folder, checkpoint.file_bytes)
        self._files = {}
        for file, entries in self._left.items():
            named = self.folder / file.name
            if keep and named.exists():  # killed while files got their names
                os.replace(named, self._partial(file))
            self._files[file] = TensorFile.like(self._partial(file), file, entries, keep)
        self._touched = set()
        for name in done:
            self._left[checkpoint.tensors[name].file].pop(name)

    def write(self, tensors):
        """Fill in tensors, {name as saved: tensor}."""
        for name, tensor in tensors.items():
            file = self.checkpoint.tensors[name].file
            self._files[file].write(name, tensor)
            self._touched.add(file)
            self._left[file].pop(name)

    def copy(self, names):
        """Copy tensors from the checkpoint as they are."""
        for name in names:
            entry = self.checkpoint.tensors[name]
            self._files[entry.file].copy(entry.file, entry.start, entry.end)
            self._touched.add(entry.file)
            self._left[entry.file].pop(name)

    def sync(self):
        """Wait until all that was written is on the disk; hash the files that are full now."""
        for file in self._touched:
            self._files[file].sync()
        self._touched.clear()
        for file, left in self._left.items():
            if not left and file.name not in self.digests:
                self.digests[file.name] = sha256_file(self._partial(file))

    def finish(self):
        """Name the weight files, all full by now, and copy what surrounds them."""
        self.sync()
        for file in self._files:
            os.replace(self._partial(file), self.folder / file.name)
        copy_checkpoint_files(self.checkpoint, self.folder)

    def _partial(self, file):
        return self.folder / (file.name + _PARTIAL)


class Background:
    """One call at a time beside the caller's own work, in the order given; a context manager."""

    def __enter__(self):
        self._pool, self._last = ThreadPoolExecutor(1), None
        return self

    def __exit__(self, kind, error, trace):
        self._pool.shutdown()
        if error is None:
            self.wait()

    def submit(self, call, *args):
        """Begin ``call(*args)`` once the one before is done, whose error is raised here."""
        self.wait()
        self._last = self._pool.submit(call, *args)

    def wait(self):
        """Wait for the last call; its error is raised here."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
