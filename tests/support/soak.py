"""A fleet of many adapters, some of them hostile, killed again and again until it is finished.

``python soak.py ADAPTERS KILLS SEED FOLDER [--only NAME,...] [--without NAME,...]`` prints one
JSON line. What must hold at the end: every good output has the bytes and masks of ``prune`` alone;
every hostile adapter is set aside in one line, or pruned as it is alone; the exit code is 5; no
input has changed, nothing is left behind, and no output holds another customer's text. After each
kill every folder that is there is whole. Processes are forked from this one, which has imported
everything (``preloaded.py``) and has one thread (``kill_sweep.ENVIRONMENT``, of the caller).
"""

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import preloaded  # noqa: F401
import torch
import transformers
from kill_sweep import ROWS
from safetensors.torch import load_file
from soak_kinds import (
    HOSTILE,
    KINDS,
    WEIGHTS,
    fingerprint,
    holds_secret,
    make,
    make_base,
    make_hostile,
)

from antidote_fast import PruneConfig
from antidote_fast.cli import entry
from antidote_fast.errors import AntidoteError
from antidote_fast.files.manifest import read_manifest, verify_folder
from antidote_fast.stages import prune

MASKS = "masks.safetensors"
SET_ASIDE, GOES_ON = 5, 75
_LARGEST_FILE = 64 << 20
_OPTIONS = {"ratio": 0.3, "batch_size": 2, "save_masks": True}


def soak(
    num_adapters,
    num_kills,
    seed,
    folder,
    *,
    hostile=tuple(HOSTILE),
    one_in=10,
    seconds_a_job=1.0,
):
    """Run it, and print the summary as one line.

    Args:
        num_adapters: how many in all.
        num_kills: SIGKILL and SIGTERM in turn, at random times; the last run is left alone.
        seed: of the values, the order, and the times.
        folder: an empty one, for all that is written.
        hostile: names of :data:`soak_kinds.HOSTILE`, taken in turn.
        one_in: how many adapters to one that is hostile.
        seconds_a_job: after this much for each job, and a minute, a run counts as one that hangs.

    Returns:
        The summary: ``problems`` is a list of texts, empty where all is as promised.
    """
    root, rng, start = Path(folder).absolute(), random.Random(seed), time.monotonic()
    limit = 60 + seconds_a_job * num_adapters
    (root / "tmp").mkdir(parents=True)
    names = _names(num_adapters, num_adapters // one_in, hostile, rng)
    _forked(lambda: _prepare(root, names, seed), limit, largest_file=None)
    before = fingerprint(root)
    good = [name for name, kind in names if kind in KINDS]
    bad = [name for name, kind in names if kind not in KINDS]
    problems, kills = [], {"SIGKILL": 0, "SIGTERM": 0}
    if _forked(lambda: sum(not _alone(root, name) for name in good), limit) != 0:
        problems.append("an adapter of a usual kind cannot be pruned alone")
    for name in bad:  # each in a process of its own: who knows what it does to this one
        _forked(lambda name=name: _alone(root, name), 30)
    alone = {name: (root / "alone" / name).exists() for name in bad}
    codes, longest = [], 0.1 * num_adapters * 2 / max(1, num_kills)
    for number in range(num_kills):
        wanted = signal.SIGTERM if number % 2 else signal.SIGKILL
        code = _forked(lambda: _fleet(root), rng.uniform(0.05, longest), wanted)
        codes.append(code)
        if code in (0, SET_ASIDE):  # it was finished before; the next ones are met earlier
            longest /= 2
        else:
            kills[wanted.name] += 1
        if code not in (-wanted, -signal.SIGTERM, GOES_ON, SET_ASIDE, 0):
            problems.append(f"kill {number}: ended with {code}")
        problems += [f"kill {number}: {text}" for text in _not_whole(root)]
    code = _forked(lambda: _fleet(root), limit)
    wanted = SET_ASIDE if any((root / "out" / "failed").glob("*.json")) else 0
    if code != wanted or code < 0:
        problems.append(f"the last run: exit code {code}, not {wanted}")
    problems += _wrong(root, names, alone)
    if fingerprint(root) != before:
        problems.append("an input has changed")
    kinds = dict(names)
    aside = sorted({kinds[p.stem] for p in (root / "out" / "failed").glob("*.json")})
    summary = {
        "adapters": num_adapters,
        "hostile": len(bad),
        "kills": kills,
        "runs": len(codes) + 1,
        "exit_code": code,
        "set_aside": aside,
        "pruned_though_hostile": sorted(set(kinds[name] for name in bad) - set(aside)),
        "seconds": round(time.monotonic() - start, 1),
        "problems": problems,
    }
    print(json.dumps(summary), flush=True)
    return summary


def _names(count, num_hostile, hostile, rng):
    """[(name, kind)] in the order of the manifest."""
    kinds = [hostile[i % len(hostile)] for i in range(num_hostile)] if hostile else []
    usual = list(KINDS)
    kinds += [usual[i % len(usual)] for i in range(count - len(kinds))]
    rng.shuffle(kinds)
    return [(f"job{i:05d}", kind) for i, kind in enumerate(kinds)]


def _prepare(root, names, seed):
    make_base(root)
    for number, (name, kind) in enumerate(names):
        made = make if kind in KINDS else make_hostile
        made(root, kind, seed * len(names) + number, root / "adapters" / name)
    jobs = [json.dumps({"adapter": f"adapters/{name}"}) for name, _ in names]
    (root / "jobs.jsonl").write_text("\n".join(jobs))
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def _alone(root, name):
    config = PruneConfig(
        model_name_or_path=str(root / "base"),
        adapter=str(root / "adapters" / name),
        dataset=str(root / "harmful.jsonl"),
        output_dir=str(root / "alone" / name),
        **_OPTIONS,
    )
    try:
        prune.run(config)
    except AntidoteError:
        return False
    return True


def _fleet(root):
    words = ["fleet", "--base", root / "base", "--manifest", root / "jobs.jsonl", "--save_masks"]
    words += ["--dataset", root / "harmful.jsonl", "--output_dir", root / "out"]
    words += ["--ratio", _OPTIONS["ratio"], "--batch_size", _OPTIONS["batch_size"], "--quiet"]
    return entry.main(list(map(str, words)))


def _forked(call, limit, number=signal.SIGKILL, largest_file=_LARGEST_FILE):
    """The exit code of a call in a forked process, sent a signal after ``limit`` seconds."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            if largest_file is not None:  # a giant that is copied after all must not fill the disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            sys.stdout = sys.stderr = io.StringIO()
            torch.set_num_threads(1)
            code = call() or 0
            code = code if isinstance(code, int) else 0
        except BaseException:
            if os.environ.get("SOAK_DEBUG"):
                sys.__stderr__.write(traceback.format_exc())
        finally:
            os._exit(code)
    code = _waited(pid, limit)
    if code is None:
        os.kill(pid, number)
        code = _waited(pid, 60)
    if code is None:  # it does not obey
        os.kill(pid, signal.SIGKILL)
        code = _waited(pid, 60)
    return code


def _waited(pid, limit):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _outputs(root):
    """The folders of jobs that are there."""
    found = (root / "out").iterdir() if (root / "out").exists() else ()
    return [p for p in found if p.is_dir() and p.name != "failed" and not p.name.startswith(".")]


def _not_whole(root):
    return [
        f"{path.name} is not whole"
        for path in _outputs(root)
        if read_manifest(path) is None or verify_folder(path)
    ]


def _wrong(root, names, alone):
    """What is not as promised, now that the fleet is finished."""
    problems, out = _not_whole(root), root / "out"
    kinds, there = dict(names), {path.name for path in _outputs(root)}
    aside = {path.stem for path in (out / "failed").glob("*.json")}
    for name, kind in names:
        if kind in KINDS and name not in there:
            problems.append(f"{name} ({kind}) is not pruned: {_reason(out, name)}")
        elif name in there and name in aside:
            problems.append(f"{name} ({kind}) is pruned and set aside")
        elif name not in there and name not in aside:
            problems.append(f"{name} ({kind}) is neither pruned nor set aside")
        elif name in there:
            if kind not in KINDS and not alone[name]:
                problems.append(f"{name} ({kind}) is pruned, and alone it is not")
            elif not _same(out / name, root / "alone" / name):
                problems.append(f"{name} ({kind}) differs from the one made alone")
        else:
            reason = _reason(out, name)
            if "\n" in reason or not reason or "unexpected failure" in reason:
                problems.append(f"{name} ({kind}): {reason!r:.200}")
    usual = {".fleet.lock", ".fleet-0-of-1.lock", "failed", "summary.json"}
    left = {path.name for path in out.iterdir()} - usual - set(kinds)
    left |= {f"tmp/{path.name}" for path in (root / "tmp").iterdir()}
    known = {"tmp", "base", "templates", "others", "adapters", "alone", "out"}
    left |= {p.name for p in root.iterdir()} - known - {"jobs.jsonl", "harmful.jsonl"}
    if left:
        problems.append(f"left behind: {sorted(left)[:5]}")
    if found := holds_secret(out):
        problems.append(f"another customer's text is in {found[:3]}")
    return problems


def _reason(out, name):
    try:
        return json.loads((out / "failed" / f"{name}.json").read_text())["reason"]
    except OSError:
        return ""


def _same(mine, its):
    if not its.exists() or (mine / WEIGHTS).read_bytes() != (its / WEIGHTS).read_bytes():
        return False
    masks, others = load_file(mine / MASKS), load_file(its / MASKS)
    return list(masks) == list(others) and all(torch.equal(masks[k], others[k]) for k in masks)


def main():
    parser = argparse.ArgumentParser()
    for name in ("adapters", "kills", "seed"):
        parser.add_argument(name, type=int)
    parser.add_argument("folder")
    parser.add_argument("--only", default="")
    parser.add_argument("--without", default="")
    parser.add_argument("--one_in", type=int, default=10)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(HOSTILE)
    hostile = tuple(name for name in names if name not in args.without.split(","))
    os.environ["TMPDIR"] = str(Path(args.folder).absolute() / "tmp")
    transformers.utils.logging.disable_progress_bar()
    summary = soak(
        args.adapters, args.kills, args.seed, args.folder, hostile=hostile, one_in=args.one_in
    )
    sys.exit(1 if summary["problems"] else 0)


if __name__ == "__main__":
    main()
