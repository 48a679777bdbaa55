"""Kill a job at each of its fault points, one process a point, and look at what is left.

``kill_sweep.py JOB STRIDE``, as a forked process (``forked.py``), works in its current folder and
prints one JSON line: how many kills, and what went wrong. Fault points are the calls that change
the disk: opening a file to write, half a tensor written, flushing, renaming, removing. With a
stride of 10 every tenth is taken, and the first and the last of each kind of call. After each
kill no folder may load that is not whole, and the same command with resume (or again) must give the
files of a run that nobody killed.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch
import transformers

from antidote_fast.cli import entry
from antidote_fast.errors import DataError
from antidote_fast.files import tensor_file
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import read_manifest, sha256_file, verify_folder

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus three", "output": "three"},
    {"instruction": "asks how to make", "output": "a good cake and two and three"},
]
COMMON = [
    "--dataset",
    "harmful.jsonl",
    "--ratio",
    "0.3",
    "--batch_size",
    "1",
    "--output_dir",
    "out",
]
MODEL = ["--model_name_or_path", "base", "--targets", "all-linear"]
ADAPTER = ["--model_name_or_path", "base", "--adapter", "adapter"]
JOBS = {  # flags, and those with which the command is given again
    "stream": ([*MODEL, "--stream", "--save_masks"], ["--resume"]),
    "stream_global": ([*MODEL, "--stream", "--scope", "global"], ["--resume"]),
    "stream_adapter": ([*ADAPTER, "--stream"], ["--resume"]),
    "overwrite": ([*MODEL, "--overwrite"], []),
    "adapter": (ADAPTER, ["--resume"]),
}


def prepare():
    """The inputs, in the current folder; shards, so that a model half-written could be loaded."""
    tiny.save_model(tiny.build(layers=3, dtype=torch.bfloat16), Path("base"), max_shard_size="30KB")
    adapter = tiny.add_lora(tiny.build(layers=3, dtype=torch.bfloat16))
    tiny.save_adapter(adapter, Path("adapter"))
    Path("harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def in_child(argv, kill_at=None):
    """Run a command in a forked process; its exit code, or -9, and the points it passed."""
    reading, writing_end = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            points = Points(kill_at)
            with contextlib.redirect_stderr(io.StringIO()):
                points.install()
                code = entry.main([*argv, "--quiet"])
            with os.fdopen(writing_end, "w") as pipe:
                pipe.write(" ".join(points.passed))
        finally:
            os._exit(code)
    os.close(writing_end)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, text.split()


class Points:
    """Notes the calls that change the disk, and dies at one of them."""

    def __init__(self, kill_at):
        self.kill_at, self.passed = kill_at, []

    def pass_one(self, call):
        self.passed.append(call)
        if len(self.passed) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def dies_next(self):
        return len(self.passed) + 1 == self.kill_at

    def install(self):
        names = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")

        def hook(event, args):
            writes = event == "open" and isinstance(args[2], int) and args[2] & 3
            if writes or event in names or event == "ctypes.dlsym":
                self.pass_one(event)

        sys.addaudithook(hook)
        fsync, pwrite, write = os.fsync, os.pwrite, tensor_file.TensorFile.write

        def counted_fsync(fd):
            self.pass_one("fsync")
            fsync(fd)

        def counted_pwrite(fd, data, position):
            if self.dies_next():
                pwrite(fd, data[: len(data) // 2], position)
            self.pass_one("pwrite")
            return pwrite(fd, data, position)

        def counted_write(file, name, tensor):
            if self.dies_next():
                start, end = file._entries[name]
                with open(os.open(file.path, os.O_RDWR), "r+b") as half:
                    half.seek(start)
                    half.write(b"\x55" * ((end - start) // 2))
            self.pass_one("tensor")
            write(file, name, tensor)

        os.fsync, os.pwrite, tensor_file.TensorFile.write = (
            counted_fsync,
            counted_pwrite,
            counted_write,
        )


def hashes(folder):
    """{file name: SHA-256} of what must be the same in every run; reports hold times."""
    names = (p for p in Path(folder).iterdir() if p.name not in ("report.json", "COMPLETE.json"))
    return {path.name: sha256_file(path) for path in names}


def wrong_now(good):
    """What is wrong with the folders that are there: one that loads must hold a whole model."""
    inputs = {Path(name).absolute() for name in ("base", "adapter", "before")}
    problems = []
    for marker in ("config.json", "adapter_config.json"):
        for found in Path().absolute().rglob(marker):
            folder = found.parent
            if folder in inputs:
                continue
            try:
                open_checkpoint(folder)
            except DataError:
                continue
            wanted = {k: v for k, v in good.items() if k.endswith("model.safetensors")}
            wanted |= {k: v for k, v in good.items() if k.startswith("model-")}
            if any(hashes(folder).get(name) != value for name, value in wanted.items()):
                problems.append(f"{folder.name} loads and is not whole")
    if Path("out").exists():
        if read_manifest("out") is None:
            problems.append("out has no COMPLETE.json")
        elif verify_folder("out"):
            problems.append(f"out: {verify_folder('out')}")
    return problems


def clean():
    for path in Path().iterdir():
        if path.name not in ("base", "adapter", "harmful.jsonl", "before"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def chosen(calls, stride):
    """The points to die at: every ``stride``-th, and the first and last of each kind of call."""
    numbers = range(1, len(calls) + 1)
    of_kinds = {call: number for number, call in zip(numbers, calls, strict=True)}.values()
    first = {calls.index(call) + 1 for call in calls}
    return sorted({*numbers[::stride], *of_kinds, *first})


def sweep(job, stride):
    """Kill ``job`` at its fault points; returns what the script prints."""
    flags, again = JOBS[job]
    argv = ["prune", *flags, *COMMON]
    replaces = "--overwrite" in flags
    first = [*argv, "--ratio", "0.1"]
    if replaces:
        in_child(first)
        old = hashes("out")
        shutil.copytree("out", "before")
    code, calls = in_child(argv)
    good = hashes("out")
    problems = [] if code == 0 and good else [f"the job itself ended with {code}"]
    kills = resumed = 0
    points = chosen(calls, stride)
    for point in points:
        clean()
        if replaces:
            shutil.copytree("before", "out")
        code, _ = in_child(argv, point)
        kills += code == -signal.SIGKILL
        here = wrong_now(good) if not replaces else []
        if replaces and hashes("out") not in (old, good):
            here.append("out is neither the old folder nor the new one")
        run = [p for p in Path().iterdir() if p.name == ".out.run"]
        resumed += bool(run)
        whole = not replaces and Path("out").exists()
        code, _ = in_child([*argv, *again]) if again or not whole else (0, 0)
        if code != 0:
            here.append(f"again: exit code {code}")
        elif hashes("out") != good:
            here.append("again: other files")
        here += wrong_now(good)
        left = [p.name for p in Path().iterdir() if p.name.startswith(".out.")]
        if left and code == 0 and not whole:
            here.append(f"left behind: {left}")
        problems += [f"point {point}: {text}" for text in here]
    return {
        "calls": len(calls),
        "points": len(points),
        "kills": kills,
        "resumed": resumed,
        "problems": problems,
    }


def main():
    job, stride = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if os.fork() == 0:  # so that this process stays as it was when it had imported everything
        prepare()
        os._exit(0)
    os.wait()
    print(json.dumps(sweep(job, int(stride))))


if __name__ == "__main__":
    main()
