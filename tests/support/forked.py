"""Python processes for tests, forked from one that has imported everything.

Importing torch, transformers and this package takes seconds, a fork some milliseconds. What is
forked is the fork server of ``multiprocessing``: it does nothing but import, so it has one thread
and nothing of any test in it. A promise about a process's first moments (an import, a stream that
is closed, a variable that a library reads when it is imported) needs ``subprocess`` instead.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing import forkserver
from pathlib import Path

COMMAND = "from antidote_fast.cli import entry_point; entry_point()"
SERVER = multiprocessing.get_context("forkserver")
_HERE = Path(__file__).parent


@functools.cache
def _start_server():
    """Once; it takes what it imports from PYTHONPATH, and says nothing of what it cannot."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(_HERE.parents[1]), str(_HERE)))
    SERVER.set_forkserver_preload(["preloaded"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Process:
    """What tests use of ``subprocess.Popen``; the streams are text.

    ``code`` is what ``python -c`` would run, or the path of a script; ``words`` are its arguments.
    """

    def __init__(self, code, *words, cwd=None, environment=None):
        _start_server()
        child_in, write_end = SERVER.Pipe(duplex=False)
        read_end, child_out = SERVER.Pipe(duplex=False)
        self._errors = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - closed by communicate
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        arguments = (str(code), [*map(str, words)], str(cwd or os.getcwd()), dict(environment))
        streams = (child_in, child_out, self._errors.name)
        self._process = SERVER.Process(target=_run, args=(*arguments, *streams))
        self._process.start()
        child_in.close()
        child_out.close()
        self.pid = self._process.pid
        self.stdin = os.fdopen(os.dup(write_end.fileno()), "w")
        self.stdout = os.fdopen(os.dup(read_end.fileno()))
        write_end.close()
        read_end.close()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    @property
    def stderr(self):
        return self._errors

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=120):
        """(all of stdout, all of stderr) once it has ended; it is killed after ``timeout`` s."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(input or "")
            self.stdin.close()
        said = self.stdout.read()
        self._process.join()
        late.cancel()
        with self._errors as errors:
            return said, errors.read()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()
        self.communicate()


def run(code, *words, timeout=120, **options):
    """A process that has ended, as ``subprocess.run`` returns it."""
    process = Process(code, *words, **options)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess([code, *words], process.returncode, out, err)


def _run(code, words, folder, environment, child_in, child_out, errors):
    """In the child: become what ``python -c CODE WORDS`` would be."""
    for number, stream in enumerate((child_in.fileno(), child_out.fileno())):
        os.dup2(stream, number)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    child_in.close()
    child_out.close()
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False)
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "preloaded" not in sys.modules:
        sys.exit("tests/support/preloaded.py could not be imported")
    is_script = code.endswith(".py")
    sys.argv = [code if is_script else "-c", *words]
    try:
        if is_script:
            runpy.run_path(code, run_name="__main__")
        else:
            exec(compile(code, "<a test's code>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
