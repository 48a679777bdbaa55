"""What a fleet keeps in its output folder: done jobs, jobs set aside, locks and the summary."""

import contextlib
import errno
import json
import os
import re
import tempfile
import time
from pathlib import Path

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files.commit import check_output_folder, check_parent, new_file
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.provenance import difference, read_report

FAILED = "failed"
SCHEMA_VERSION = 1


def finished(job, hashes, base_fingerprint):
    """The report of a job whose folder is whole and was made as it would be now; else None.

    Sizes are compared, not the hashes of what was written: ``antidote-fast inspect`` does that.

    Args:
        job: a :class:`Job`.
        hashes: of the adapter's and the data's files, as ``hash_inputs`` gives them.
        base_fingerprint: of the base model.

    Raises:
        DataError: the folder holds something else, or was made otherwise and the job is not to
            overwrite it; the message names what differs.
    """
    folder, overwrite = Path(job.config.output_dir), job.config.overwrite
    if read_manifest(folder) is None:
        check_output_folder(folder, overwrite)
        return None
    differs = difference(folder, job.config, hashes, base_fingerprint)
    if differs is None:
        return read_report(folder)
    if not overwrite:
        raise DataError(
            f"output_dir={str(folder)!r}: {differs}; pass overwrite to replace it, or give the job "
            "another name"
        )
    check_output_folder(folder, True)
    return None


def set_aside(out, outcome):
    """Record why a job failed in ``failed/NAME.json``; a later success takes it away."""
    record = {"schema_version": SCHEMA_VERSION, **outcome, "created": now()}
    folder = Path(out) / FAILED
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{outcome['name']}.json", record)


def forget(out, name):
    """Remove the record of a failure, and its folder where that was the last one."""
    folder = Path(out) / FAILED
    with contextlib.suppress(FileNotFoundError):
        (folder / f"{name}.json").unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_json(path, value):
    """Write a JSON file that appears whole or not at all.

    Raises:
        AntidoteError: the disk is full.
    """
    try:
        with new_file(path) as partial:
            text = json.dumps(value, indent=2, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise AntidoteError(f"{path}: {error.strerror or error}") from error


def summary_path(out, shard):
    """``summary.json``, or with several shards each its own."""
    index, count = shard
    return Path(out) / ("summary.json" if count == 1 else f"summary-{index}-of-{count}.json")


@contextlib.contextmanager
def locked(out, shard):
    """Hold this shard of ``out``; shards of one division may be held at once.

    Raises:
        DataError: it is held by another fleet, or shards of another division are; or ``out``
            cannot be made.
    """
    import filelock

    out, (index, count) = Path(out), shard
    named = f"output_dir={str(out)!r}"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{named}: exists and is not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{named}: {error.strerror}") from None
    check_parent(out)

    def hold(name, others=""):
        try:
            return filelock.FileLock(str(out / name)).acquire(timeout=0)
        except filelock.Timeout:
            raise DataError(f"{named}: another fleet is at work there{others}") from None

    with filelock.FileLock(str(out / ".fleet.lock"), timeout=30):
        for path in out.glob(".fleet-*-of-*.lock"):
            match = re.fullmatch(r"\.fleet-(\d+)-of-(\d+)\.lock", path.name)
            if match and int(match[2]) != count:
                with hold(path.name, f", with shards of {match[2]}"):
                    pass
        ours = hold(f".fleet-{index}-of-{count}.lock")
    with ours:
        yield


def is_disk_full(error) -> bool:
    """Whether a full disk is behind an exception, so that no other job would fare better."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_room(out, size) -> bool:
    """Whether ``size`` more bytes fit below ``out``: they are taken, and given back at once."""
    try:
        with tempfile.TemporaryFile(dir=out) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        return False
    return True


def now() -> str:
    """The time, as reports have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
