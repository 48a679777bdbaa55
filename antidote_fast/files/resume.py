"""Work that goes on where it was interrupted: its state lies in a hidden folder beside the output.

The folder ``.NAME.run`` beside ``output_dir`` (or inside: :mod:`antidote_fast.files.places`) holds
what is done so far and ``run.json``, which says for which inputs. It is gone once the output is
whole. Nothing in it can be taken for the output: the configuration that a loader looks for is
written last.
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

from antidote_fast.errors import AntidoteError, DataError, Interrupted
from antidote_fast.files import commit
from antidote_fast.files.commit import RUN_INPUTS, STATE, digest_of, first_difference
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.places import run_of, sync

STATE_VERSION = 2
KEPT = "what was done is kept, and the same command with --resume goes on"


def is_finished(path, inputs) -> bool:
    """Whether ``path`` is the whole output of a run with these very inputs.

    Raises:
        DataError: it is the output of a run with other ones.
    """
    manifest = read_manifest(path)
    recorded = (manifest or {}).get(RUN_INPUTS)
    if recorded is None:
        return False
    if recorded != digest_of(inputs):
        raise DataError(
            f"output_dir={str(path)!r}: was made from other data, another model or other settings; "
            "name another folder, or replace it with overwrite and without resume"
        )
    if run_of(path).is_dir():
        with contextlib.suppress(AntidoteError), commit.locked(path):
            pass  # which clears what a run leaves that was killed when it was done
    return True


class Run:
    """An output on its way.

    Attributes:
        folder: where the run keeps what it needs to go on.
        output: an output folder that grows in place; it takes the name of the target in
            :meth:`commit`.
        state: JSON values, as last saved; empty in a run that has just begun.
        keep: whether an error of the inputs leaves the folder too, where it holds a state.
        done: whether the output has its name.
        digests: {file name: SHA-256} of files of the output that are hashed and on the disk
            already; None without.
    """

    keep = done = False
    digests = None

    def __init__(self, place, inputs, state):
        self.folder, self.state = place.at("run"), state
        self.output = self.folder / "output"
        self._place, self._inputs = place, inputs

    def save(self, state):
        """Replace the state; it is on the disk when this returns."""
        contents = {"schema_version": STATE_VERSION, "inputs": self._inputs, "state": state}
        with commit.new_file(self.folder / STATE, alone=True) as partial:
            partial.write_text(json.dumps(contents), encoding="utf-8")
        sync(self.folder)
        self.state = state

    def commit(self, **manifest_entries):
        """Give :attr:`output` the target's name, with these further values in ``COMPLETE.json``."""
        manifest_entries[RUN_INPUTS] = digest_of(self._inputs)
        commit.commit(self.output, self._place, manifest_entries, self.digests)
        self.done = True


def interrupted_state(path, inputs, *, resume=False, overwrite=False) -> dict:
    """What :func:`run_folder` would go on from: {} where it would begin.

    Raises:
        DataError: as run_folder, of a run that was interrupted there.
    """
    path = Path(os.path.abspath(path))
    folder = run_of(path)
    if folder.exists() and resume:
        return _state_of(folder, inputs, path)
    if folder.exists() and not overwrite:
        raise DataError(
            f"output_dir={str(path)!r}: a run was interrupted there; pass resume to go on with "
            "it, or overwrite to begin again"
        )
    return {}


def discard(path) -> None:
    """Remove what an interrupted run left for the output ``path``; the caller holds its lock."""
    shutil.rmtree(run_of(path), ignore_errors=True)


@contextlib.contextmanager
def run_folder(path, inputs, *, resume=False, overwrite=False):
    """A :class:`Run` for the output ``path``; the block ends with :meth:`Run.commit`.

    An interruption (a signal, a crash, the power) or the system's refusal (a full disk, missing
    rights) leaves ``.NAME.run``, from which the same call goes on with ``resume``. An error of the
    inputs, which would come again, removes it, unless :attr:`Run.keep`.

    Args:
        path: the folder to make.
        inputs: {what: JSON value} of everything that decides the result.
        resume: go on where an interrupted run stopped, or begin where there is none.
        overwrite: replace ``path`` if this tool wrote it; without ``resume`` also begin again where
            a run was interrupted.

    Raises:
        DataError: ``path`` must not be written, another job is writing it, a run was interrupted
            there and neither ``resume`` nor ``overwrite`` is given, or its inputs were others.
    """
    path = Path(os.path.abspath(path))
    commit.check_contents(path, overwrite)
    with commit.locked(path) as place:
        commit.check_contents(path, overwrite)
        state = interrupted_state(path, inputs, resume=resume, overwrite=overwrite)
        run, keep = Run(place, inputs, state), False
        if not state:
            discard(path)
        try:
            with commit.os_errors(path, lambda: KEPT if run.state else commit.NOTHING):
                run.output.mkdir(parents=True, exist_ok=True)
                if not state:
                    run.save({})
                yield run
        except AntidoteError as error:
            refused = error.passes or _is_of_the_system(error)
            keep = isinstance(error, Interrupted) or (bool(run.state) and (run.keep or refused))
            if keep and refused and KEPT not in str(error):
                raise type(error)(f"{error}; {KEPT}") from error
            raise
        except BaseException:
            keep = True
            raise
        finally:
            if run.done or not keep:
                shutil.rmtree(run.folder, ignore_errors=True)


# No errno, or a link or a pipe where a file is read: it would come again.
_OF_THE_INPUTS = (None, 0, errno.ENOENT, errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.ENXIO)


def _is_of_the_system(error):
    """Whether a refusal of a disk or of memory is behind an exception, so that it may pass."""
    while error is not None:
        of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if of_memory or (isinstance(error, OSError) and error.errno not in _OF_THE_INPUTS):
            return True
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return False


def _state_of(folder, inputs, path):
    """The state that an interrupted run left, if its inputs were these; {} if it left none."""
    try:
        contents = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version, before, state = (contents[k] for k in ("schema_version", "inputs", "state"))
    except FileNotFoundError:
        return {}  # killed before it began
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE}: cannot be read: {error}; pass overwrite") from None
    where = f"resume: the interrupted run of {str(path)!r}"
    if version != STATE_VERSION:
        raise DataError(f"{where} is of another release; pass overwrite to begin again")
    name = first_difference(before, inputs)
    if name is not None:
        key = first_difference(before.get(name), inputs.get(name))
        other = name if key is None else f"{name} ({key})"
        then = "give the same again, or overwrite to begin anew"
        raise DataError(f"{where} had other {other}; {then}")
    return state
