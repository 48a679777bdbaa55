"""Work that goes on where it was interrupted: its state lies in a hidden folder beside the output.

The folder ``.NAME.run`` beside ``output_dir`` holds what is done so far and ``run.json``, which
says for which inputs. It is gone once the output is whole. Nothing in it can be taken for the
output: the configuration that a loader looks for is written last.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from antidote_fast.commit import (
    check_output_folder,
    commit,
    locked,
    new_file,
    os_errors,
    read_manifest,
    sync,
)
from antidote_fast.errors import AntidoteError, DataError, Interrupted

STATE = "run.json"
STATE_VERSION = 1
MANIFEST_ENTRY = "run_inputs"


def digest_of(inputs) -> str:
    """One SHA-256 for everything that decides a result, as ``COMPLETE.json`` records it."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def is_finished(path, inputs) -> bool:
    """Whether ``path`` is the whole output of a run with these very inputs.

    Raises:
        DataError: it is the output of a run with other ones.
    """
    manifest = read_manifest(path)
    recorded = (manifest or {}).get(MANIFEST_ENTRY)
    if recorded is None:
        return False
    if recorded != digest_of(inputs):
        raise DataError(
            f"output_dir={str(path)!r}: was made from other data, another model or other settings; "
            "name another folder, or replace it with overwrite and without resume"
        )
    return True


class Run:
    """An output on its way.

    Attributes:
        folder: where the run keeps what it needs to go on.
        output: an output folder that grows in place; it takes the name of the target in
            :meth:`commit`.
        state: JSON values, as last saved; empty in a run that has just begun.
        keep: whether an error leaves the folder too, where it holds a state.
    """

    keep = False

    def __init__(self, path, folder, inputs, state):
        self.path, self.folder, self.state = path, folder, state
        self.output = folder / "output"
        self._inputs = inputs

    def save(self, state):
        """Replace the state; it is on the disk when this returns."""
        contents = {"schema_version": STATE_VERSION, "inputs": self._inputs, "state": state}
        with new_file(self.folder / STATE) as partial:
            partial.write_text(json.dumps(contents), encoding="utf-8")
        sync(self.folder)
        self.state = state

    def commit(self, digests=None, **manifest_entries):
        """Give :attr:`output` the target's name, with ``COMPLETE.json``.

        Args:
            digests: {file name: SHA-256} of files that are hashed and on the disk already.
            manifest_entries: further JSON values for ``COMPLETE.json``.
        """
        manifest_entries[MANIFEST_ENTRY] = digest_of(self._inputs)
        commit(self.output, self.path, manifest_entries, digests)


def interrupted_state(path, inputs, *, resume=False, overwrite=False) -> dict:
    """What :func:`run_folder` would go on from: {} where it would begin.

    Raises:
        DataError: as run_folder, of a run that was interrupted there.
    """
    path = Path(os.path.abspath(path))
    folder = _run_folder(path)
    if folder.exists() and resume:
        return _state_of(folder, inputs, path)
    if folder.exists() and not overwrite:
        raise DataError(
            f"output_dir={str(path)!r}: a run was interrupted there; pass resume to go on with "
            "it, or overwrite to begin again"
        )
    return {}


def discard(path) -> None:
    """Remove what an interrupted run left for the output ``path``, which was made otherwise."""
    shutil.rmtree(_run_folder(Path(os.path.abspath(path))), ignore_errors=True)


def _run_folder(path):
    return path.parent / f".{path.name}.run"


@contextlib.contextmanager
def run_folder(path, inputs, *, resume=False, overwrite=False):
    """A :class:`Run` for the output ``path``; the block ends with :meth:`Run.commit`.

    An interruption (a signal, a crash, the power) leaves ``.NAME.run``, from which the same call
    goes on with ``resume``. An error that would come again removes it, unless :attr:`Run.keep`.

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
    folder = _run_folder(path)
    check_output_folder(path, overwrite)
    with locked(path):
        check_output_folder(path, overwrite)
        state = interrupted_state(path, inputs, resume=resume, overwrite=overwrite)
        if not state:
            shutil.rmtree(folder, ignore_errors=True)
        run = Run(path, folder, inputs, state)
        keep = False
        try:
            with os_errors(path):
                run.output.mkdir(parents=True, exist_ok=True)
                if not state:
                    run.save({})
                yield run
        except (Interrupted, KeyboardInterrupt):
            keep = True
            raise
        except AntidoteError:
            keep = run.keep and bool(run.state)
            raise
        except Exception:
            keep = True
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


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
    for name in sorted({*before, *inputs}):
        if before.get(name) != inputs.get(name):
            changed = _first_difference(before.get(name), inputs.get(name))
            raise DataError(
                f"{where} had other {name}{changed}; give the same again, or overwrite to begin "
                "anew"
            )
    return state


def _first_difference(before, now):
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return ""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return f" ({key})"
    return ""
