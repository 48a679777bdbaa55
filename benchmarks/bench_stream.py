"""Prune a model that does not fit in memory, block by block, against what cannot be avoided.

The model is one of ``make_model.py``, written first where it is not there (``--shape llama2-7b``:
13.5 GB, and twice that while it runs). In one run, with files dropped from the page cache before
each part: the bare streamed forward; the same with norms collected; a safetensors-to-safetensors
copy that is hashed and flushed; and ``antidote-fast prune --stream`` as a process of its own, with
its peak memory. The first block's masks are compared with a stable sort's, bit for bit, before any
time is printed, and that sort is timed as well.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench_oneshot
import common
import make_model
import peers
import torch

from antidote_fast import Selection, num_pruned, prune_mask
from antidote_fast.data.batches import make_batches
from antidote_fast.data.load import load_records
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models.loading import load_tokenizer
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.streaming.blocks import BlockModel
from antidote_fast.streaming.norms import BlockCalibration
from antidote_fast.streaming.spill import Room

RATIO = 0.1
TARGETS = {"qkv": None, "all-linear": "all-linear"}
_PIECE = 16 << 20


def forget(folder):
    """Drop a folder's files from the page cache, as far as the system obeys."""
    os.sync()
    for path in Path(folder).rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def forward(base, batches, targets, collect, folder):
    """Seconds of the blocks' forwards, each block read once; with or without norms."""
    forget(base.folder)
    begin = time.perf_counter()
    model = BlockModel(base)
    calibration = BlockCalibration(model, batches, folder, Room(1 << 30), targets=targets)
    calibration.begin()
    for index, _ in model.loaded(range(len(model))):
        calibration.run(index, collect)
    return time.perf_counter() - begin


def hashed_copy(base, folder):
    """Seconds to copy the weights, read, hashed and written at once, and on the disk at the end."""
    forget(base.folder)
    begin = time.perf_counter()
    for file in base.weight_files:
        digest = hashlib.sha256()
        with open(file, "rb") as there, open(folder / file.name, "wb") as here:
            while piece := there.read(_PIECE):
                hashing = threading.Thread(target=digest.update, args=(piece,))
                hashing.start()
                here.write(piece)
                hashing.join()
            here.flush()
            os.fsync(here.fileno())
    return time.perf_counter() - begin


def whole(args, targets, out):
    """(seconds, peak resident bytes, report) of the command as a process of its own."""
    forget(args.model)
    argv = ["prune", "--model_name_or_path", args.model, "--output_dir", out, "--stream"]
    argv += ["--dataset", Path(args.model) / "calibration.jsonl", "--ratio", RATIO, "--quiet"]
    argv += ["--batch_size", args.batch_size, "--save_norms"]
    argv += ["--num_calibration_samples", args.sequences]
    if targets is not None:
        argv += ["--targets", targets]
    if args.max_memory:
        argv += ["--max_memory", args.max_memory]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "antidote_fast", *map(str, argv)], check=True)
    seconds = time.perf_counter() - begin
    report = json.loads((out / "report.json").read_text())
    return seconds, report["peak_memory_bytes"], report


def check_first_block(base, out, selection):
    """The first block's masks are a stable sort's; returns how long both took on its weights."""
    norms = ActivationNorms.load(out / "norms.safetensors")
    pruned = open_checkpoint(out)
    first = [key for key in norms.keys if ".layers.0." in key]
    seconds = {"sort chain": 0.0, "antidote_fast": 0.0}
    for key in first:
        weight = base.read([key])[key]
        norm = norms.act_norm(key)
        prune_mask(weight, norm, selection)
        begin = time.perf_counter()
        mask = prune_mask(weight, norm, selection)
        between = time.perf_counter()
        score = weight.abs().float() * norm
        wanted = peers.by_sort(score, num_pruned(weight.shape[1], selection))
        seconds["antidote_fast"] += between - begin
        seconds["sort chain"] += time.perf_counter() - between
        if not torch.equal(mask.to_bool(), wanted):
            raise SystemExit(f"{key}: the mask is not the sort's")
        written = pruned.read([key])[key]
        if not torch.equal(written, weight.masked_fill(wanted, 0)):
            raise SystemExit(f"{key}: the file is not the pruned weight")
    return seconds, len(first)


def main(argv=None):
    options = common.parser(__doc__)
    options.set_defaults(device="cpu")
    options.add_argument("--model", type=Path, help="its folder; default build/SHAPE")
    options.add_argument("--shape", choices=bench_oneshot.MODELS, default="small")
    options.add_argument("--sequences", type=int, default=32)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--max_memory", help="as of prune, such as 4GB")
    options.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = common.parsed(options, argv)
    if args.device.type != "cpu":
        raise SystemExit("bench_stream measures a CPU and its disk; leave --device out")
    args.model = args.model or Path("build") / args.shape
    report = common.Report("stream", args)
    make_model.make(args.model, args.shape)
    tokenizer = load_tokenizer(args.model)
    records = args.model / "calibration.jsonl"
    make_model.write_records(records, tokenizer, args.sequences, args.tokens)
    batches = make_batches(load_records(str(records)), tokenizer, batch_size=args.batch_size)
    base = open_checkpoint(args.model)
    selection = Selection(RATIO)
    about = {
        "shape": args.shape,
        "gb": round(sum(f.stat().st_size for f in base.weight_files) / 1e9, 2),
        "sequences": args.sequences,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
    }
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        scratch = Path(scratch)
        for name in args.targets:
            targets = TARGETS[name]
            out, copy = scratch / f"out-{name}", scratch / "copy"
            copy.mkdir()
            bare = forward(base, batches, targets, False, scratch)
            collected = forward(base, batches, targets, True, scratch)
            copied = hashed_copy(base, copy)
            for file in copy.iterdir():
                file.unlink()
            copy.rmdir()
            seconds, peak, found = whole(args, targets, out)
            collected = [collected, forward(base, batches, targets, True, scratch)]
            again = forward(base, batches, targets, False, scratch)
            chain, count = check_first_block(base, out, selection)
            blocks = base.config["num_hidden_layers"]
            lean = (bare + again) / 2
            report.add(
                {
                    **about,
                    "targets": name,
                    "bare_forward_s": [round(bare, 1), round(again, 1)],
                    "calibrate_s": [round(x, 1) for x in collected],
                    "hashed_copy_s": round(copied, 1),
                    "whole_s": round(seconds, 1),
                    "calibrate_of_bare": round(sum(collected) / 2 / lean, 3),
                    "whole_of_bare_and_copy": round(seconds / (lean + copied), 3),
                    "peak_gb": round(peak / 1e9, 2),
                    "prune_s": round(found["stage_seconds"]["prune"], 2),
                    "masks_first_block_s": round(chain["antidote_fast"], 3),
                    "sort_chain_first_block_s": round(chain["sort chain"], 2),
                    "sort_chain_slower": round(chain["sort chain"] / chain["antidote_fast"], 1),
                    "sort_chain_all_blocks_s": round(chain["sort chain"] * blocks, 1),
                    "matrices": f"{count} of a block, times {blocks}",
                }
            )
            for file in out.iterdir():
                file.unlink()
    report.finish()


if __name__ == "__main__":
    main()
