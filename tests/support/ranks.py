"""What each of two processes does in the tests of several ranks; no test by itself.

``python ranks.py CASE FOLDER`` is one rank (RANK and WORLD_SIZE in the environment say which). It
leaves what it saw in ``FOLDER/CASE.RANK.json``. The ranks meet in a file in FOLDER, or, started by
torchrun, where torchrun says.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import tiny
import torch
from torch import distributed as dist

from antidote_fast import ActivationNorms, DataError, Selection, oneshot, prune_model_
from antidote_fast.cli import entry
from antidote_fast.cli.commands import STAGES
from antidote_fast.distributed.ranks import (
    ranks_launched,
    session,
)

HERE = Path(__file__).parent
RECORDS = [
    {"instruction": f"how to make w{20 + i} " + "the user asks " * (i % 4), "output": "the cake"}
    for i in range(9)
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment():
    """The environment of a process that a test starts: this checkout, one thread, no hub."""
    paths = os.pathsep.join((str(HERE.parents[1]), str(HERE)))
    extra = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    extra |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | extra


def start_ranks(case, folder, size=2):
    """Run a case on two ranks, or more; what each of them saw."""
    ranks = [
        forked.Process(
            HERE / "ranks.py",
            *(case, folder),
            environment=environment() | {"RANK": str(rank), "WORLD_SIZE": str(size)},
        )
        for rank in range(size)
    ]
    said = ["".join(rank.communicate()) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(said)
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(size)]


def torchrun(*words, **options):
    """A finished torchrun of two ranks on this machine, on a free port."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def refused(call):
    """[exception's name, its line, exit code] of what a call raises, or None."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "exit_code", None)]
    return None


def digest(model):
    """Hash of the weights that would be saved."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- replicas -------------------------------------------------------------------------------------


def replicas(world, folder):
    """Calibration of replicas: sums, masks, and how errors end."""
    results = {}
    batches = tiny.batches(count=5)
    for name, options in {
        "rms": {},
        "mean": {"aggregation": "mean"},
        "response": {"response_only": True},
    }.items():
        model = tiny.add_lora(tiny.build()) if name == "mean" else tiny.build()
        norms = ActivationNorms.collect(model, world.shard(batches), world=world, **options)
        norms.save(folder / f"{name}.{world.rank}.safetensors")
    # One batch for two ranks.
    model = tiny.build()
    norms = ActivationNorms.collect(model, world.shard(batches[:1]), world=world)
    norms.save(folder / f"one.{world.rank}.safetensors")
    apart = ActivationNorms.collect(model, world.shard(batches))
    results["apart"] = [apart.num_sequences, apart.num_tokens]

    norms = ActivationNorms.collect(model, world.shard(batches), world=world)
    prune_model_(model, norms, Selection(0.3))
    results["weights"] = digest(model)

    live = tiny.build()
    out = folder / "live"
    report = oneshot(live, None, RECORDS, tiny.tokenizer(), output_dir=out, world=world, ratio=0.3)
    results["live"] = [digest(live), report.num_pruned]

    # Each of these goes wrong on one rank or differs between them; both must end, and soon.
    def collect(model, batches=batches, **options):
        return lambda: ActivationNorms.collect(model, batches, world=world, **options)

    ill = tiny.build()
    if world.rank == 1:
        ill.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
        ill.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    results["nan"] = refused(collect(ill))
    results["base"] = refused(collect(tiny.build(seed=world.rank)))
    results["targets"] = refused(collect(tiny.build(), targets=["q_proj", "k_proj"][world.rank :]))
    results["response"] = refused(collect(tiny.build(), response_only=world.rank == 1))
    results["no tokens"] = refused(collect(tiny.build(), batches=[]))

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    full = tiny.build()
    if world.rank == 0:
        full.forward = out_of_memory
    results["memory"] = refused(collect(full))
    results["missing"] = refused(collect(tiny.build(), targets=["no_such"]))
    return results


def agreement(world, folder):
    """The world alone: texts, sums, and blocks that end alike."""
    results = {"gather": world.gather("äß" * (world.rank + 1))}
    thirds = torch.tensor([1 / 3, world.rank, -0.0], dtype=torch.float64)
    results["sum"] = [part.tolist() for part in world.all_reduce([thirds, thirds[:0], thirds[:1]])]
    results["max"] = [part.tolist() for part in world.all_reduce([thirds], op="max")]
    results["shard"] = [world.shard(list(range(n))) for n in (0, 1, 2, 5)]
    generator = torch.Generator().manual_seed(world.rank)
    many = torch.rand(100_003, dtype=torch.float64, generator=generator)
    [many] = world.all_reduce([many])
    results["many"] = hashlib.sha256(many.numpy().tobytes()).hexdigest()
    results["same"] = refused(lambda: world.check_same("things", "alike"))
    results["differ"] = refused(lambda: world.check_same("things", f"rank {world.rank}"))

    def block(failing, kind=ValueError, inner=False):
        def run():
            within = world.together() if inner else contextlib.nullcontext()
            with world.together(), within:
                if world.rank in failing:
                    raise kind(f"broken on {world.rank}\nand more")

        return refused(run)

    results["well"] = block([])
    results["first"] = block([0])
    results["second"] = block([1], kind=DataError)
    results["both"] = block([0, 1])
    results["inner"] = block([1], inner=True)
    results["long"] = refused(lambda: world.gather("x" * 5000))
    return results


# --- the command line ----------------------------------------------------------------------------


def commands(world, folder):
    """Commands on both ranks, one after the other: [exit code, lines on stderr] of each."""
    from antidote_fast.stages import calibrate, inputs

    common = ["--model_name_or_path", "base", "--dataset", "harmful.jsonl", "--batch_size", "2"]
    os.chdir(folder)
    results = {}

    def command(name, *words, also=()):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = entry.main([name, *also, *(() if also else common), *words])
        lines = said.getvalue().splitlines()
        return [code, [line for line in lines if not line.startswith('{"step"')], len(lines)]

    adapter = ("--adapter", "adapter")
    results["prune"] = command("prune", *adapter, "--output_dir", "pruned", "--save_norms", "true")
    kept = ("--preserve_dataset", "task.jsonl", "--ratio", "0.3", "--save_norms", "true")
    results["preserve"] = command("prune", *adapter, *kept, "--output_dir", "preserved")
    results["calibrate"] = command("calibrate", "--output_dir", "norms")
    results["one sample"] = command(
        "calibrate", *adapter, "--num_calibration_samples", "1", "--output_dir", "one"
    )
    norms = ("--norms", "norms", "--output_dir", "from-norms")
    results["norms"] = command("prune", *norms)
    files = {"adapter": "adapter", "dataset": "harmful.jsonl", "batch_size": 2}
    report = oneshot("base", **files, output_dir="called", world=world)
    results["called"] = report and report.num_pruned
    again = ("--output_dir", "pruned", "--save_norms", "true", "--resume", "true")
    results["finished"] = command("prune", *adapter, *again)
    results["finished norms"] = command("calibrate", "--output_dir", "norms", "--resume", "true")
    results["stream"] = command("prune", *adapter, "--stream", "true", "--output_dir", "x")
    words = ["--model_name_or_path", "base", "--manifest", "jobs.jsonl", "--output_dir", "x"]
    results["fleet"] = command("fleet", also=words)
    results["taken"] = command("prune", *adapter, "--output_dir", "pruned")
    results["align"] = command("align", "--output_dir", "x")
    results["map"] = command("prune", "--device_map", "auto", "--output_dir", "x")
    results["nonsense"] = command("prune", "--nonsense", "1")
    results["help"] = command("--help", also=("--quiet",))
    results["version"] = command("--version", also=("--quiet",))

    load, load_adapter = inputs.load_data, inputs.load_adapter

    def fail(*args):
        raise DataError("the disk of this machine is broken")

    if world.rank == 1:
        inputs.load_data = fail
    results["rank 1"] = command("prune", *adapter, "--output_dir", "x")
    inputs.load_data = load
    if world.rank == 1:

        def ill(*args):
            model = load_adapter(*args)
            next(p for n, p in model.named_parameters() if "1.self_attn.v_proj.lora_A" in n)[:] = (
                nan
            )
            return model

        nan = torch.nan
        inputs.load_adapter = ill
    results["nan"] = command("calibrate", *adapter, "--output_dir", "x")
    inputs.load_adapter = load_adapter
    if world.rank == 0:
        calibrate.write_report = lambda *args, **kwargs: 1 / 0
    results["writing"] = command("calibrate", "--output_dir", "x")
    return results


def stalled(config, *, progress, world):
    """A stage in which rank 1 does not come to the meeting."""
    with world.together():
        if world.rank == 1:
            Path(config.dataset).touch()
            if config.template == "chat":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
    return {}


def stall():
    """A command whose second rank sleeps, or is killed."""
    STAGES["calibrate"] = dataclasses.replace(STAGES["calibrate"], run="ranks:stalled")
    sys.argv[1:] = sys.argv[2:]
    entry.entry_point()


def main():
    """One rank of one case."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "stall":
        stall()
    rank, size = ranks_launched()
    if "MASTER_PORT" not in os.environ:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    with session() as world:
        home = importlib.import_module("ranks_fsdp" if case == "fsdp" else "ranks")
        seen = getattr(home, case)(world, folder)
        (folder / f"{case}.{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
