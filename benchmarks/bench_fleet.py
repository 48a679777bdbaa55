"""A fleet of adapters against one `prune` process each, and against the bare forwards, on a CPU.

Adapters of the demo's model (SmolLM2-135M-Instruct, LoRA r = 32 on q/k/v, random B) are pruned by
`fleet` in one process, and a few of them by processes of `prune`. Before any time is printed the
outputs of both are compared bit for bit. The bare forwards are the same batches on the same model
with an adapter on it, no hooks, with the options that collecting uses (no cache, one logit); they
and parts of the fleet take turns in one process, each part with all that a job takes (checks,
hashes, selection, report, flushing to the disk). Beside wall-clock seconds stand those of the
processor, all threads together: on a machine that is busy with other work they are what can be
compared.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

from antidote_fast.config.fleet import FleetConfig
from antidote_fast.experiments.demo.model import prepare_model
from antidote_fast.files.manifest import verify_folder
from antidote_fast.fleet import fleet
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.fleet.worker import Worker
from antidote_fast.models.forwards import lean_forward

WORDS = [
    *("the", "light", "stone", "of", "a", "green", "house", "by", "water", "has", "two", "doors"),
    *("and", "some", "trees"),
]


def make_base(folder, tiny):
    """The demo's model, or a tiny one of the same kind."""
    if not tiny:
        return prepare_model(folder)
    import tokenizers
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=512,
    )
    base = folder / "tiny"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *sorted(set(WORDS))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(base)
    return base


def make_adapters(base, folder, count):
    """Adapters as PEFT saves them, and a manifest of them."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft.LoraConfig(
        r=32, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    names = [f"adapter-{i:03d}" for i in range(count)]
    for name in names:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_B." in key:
                    parameter.normal_(std=0.02, generator=generator)
        model.save_pretrained(folder / name, save_embedding_layers=False)
    lines = (json.dumps({"adapter": name}) for name in names)
    (folder / "jobs.jsonl").write_text("\n".join(lines))


def make_data(path, sequences, length):
    """Records that are all cut to ``length`` tokens."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(sequences):
            picks = torch.randint(len(WORDS), (length,), generator=generator)
            output = " ".join(WORDS[i] for i in picks)
            file.write(json.dumps({"instruction": "tell", "output": output}) + "\n")


def prune_processes(config, jobs, out):
    """Seconds of one `prune` process an adapter, for each of ``jobs``."""
    seconds = []
    for job in jobs:
        words = {
            "model_name_or_path": config.model_name_or_path,
            "adapter": job.config.adapter,
            "dataset": config.dataset,
            "max_seq_length": config.max_seq_length,
            "batch_size": config.batch_size,
            "device": "cpu",
            "output_dir": out / job.name,
        }
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "antidote_fast", "prune", "--quiet"]
            + [f"--{name}={value}" for name, value in words.items()],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        seconds.append(time.perf_counter() - start)
    return seconds


def check_same(jobs, out, other):
    """Every file of weights is that of the `prune` process, bit for bit."""
    for job in jobs:
        name = "adapter_model.safetensors"
        mine, theirs = ((folder / job.name / name).read_bytes() for folder in (out, other))
        if mine != theirs:
            raise SystemExit(f"{job.name}: fleet and prune differ")
        if problems := verify_folder(out / job.name):
            raise SystemExit(f"{job.name}: {problems[0]}")


def overhead(config, jobs, rounds):
    """[(bare, fleet) of (wall, processor) seconds a job] of rounds in turn."""
    worker = Worker(config)

    def again():
        for job in jobs:
            shutil.rmtree(job.config.output_dir, ignore_errors=True)

    again()
    list(worker.run(jobs[:2]))  # loads, and is not timed
    batches = worker.data_of(jobs[0].config)
    live = worker._slot._live

    def bare():
        with lean_forward(live) as options, torch.no_grad():
            for _ in jobs:
                for batch in batches:
                    model_inputs = {k: v for k, v in batch.items() if k != "labels"}
                    live(**model_inputs, **options)

    def parts():
        for outcome in worker.run(jobs):
            if outcome["status"] != "done":
                raise SystemExit(f"{outcome['name']}: {outcome['reason']}")

    def timed(call):
        start = time.perf_counter(), time.process_time()
        call()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        return tuple(value / len(jobs) for value in seconds)

    found = []
    for number in range(rounds):
        again()
        pair = [timed(call) for call in ((bare, parts) if number % 2 else (parts, bare))]
        found.append(pair if number % 2 else pair[::-1])
    return found


def run(args, base, folder, size):
    """Measure one size of the calibration data; returns its row."""
    sequences, length = common.shape_of(size)
    data = folder / f"{size}.jsonl"
    make_data(data, sequences, length)
    config = FleetConfig(
        model_name_or_path=str(base),
        manifest=str(folder / "jobs.jsonl"),
        dataset=str(data),
        output_dir=str(folder / f"fleet-{size}"),
        max_seq_length=length,
        batch_size=args.batch_size,
        device="cpu",
    )
    jobs = read_jobs(config)
    alone = prune_processes(config, jobs[: args.processes], folder / f"prune-{size}")
    start = time.perf_counter()
    report = fleet.run(config)
    took = time.perf_counter() - start
    out = Path(config.output_dir)
    check_same(jobs[: args.processes], out, folder / f"prune-{size}")
    pairs = overhead(config, jobs[: args.part], args.rounds)
    shutil.rmtree(out)
    wall = [parts[0] / bare[0] for bare, parts in pairs]
    processor = [parts[1] / bare[1] for bare, parts in pairs]
    hour = 3600 / statistics.median(alone)
    return {
        "sequences": sequences,
        "tokens": length,
        "batch_size": args.batch_size,
        "adapters": len(jobs),
        "fleet_s": round(took, 2),
        "fleet_an_hour": round(3600 * len(jobs) / took),
        "prune_processes": args.processes,
        "prune_process_s": round(statistics.median(alone), 2),
        "prune_an_hour": round(hour),
        "faster": round(3600 * len(jobs) / took / hour, 1),
        "bare_ms": round(1e3 * statistics.median(bare[0] for bare, _ in pairs), 1),
        "job_ms": round(1e3 * statistics.median(parts[0] for _, parts in pairs), 1),
        "over_bare": round(statistics.median(wall), 3),
        "over_bare_best": round(min(wall), 3),
        "over_bare_processor": round(statistics.median(processor), 3),
        "rounds": args.rounds,
        "peak_mb": report["peak_memory_bytes"] >> 20,
    }


def main(argv=None):
    options = common.parser(__doc__)
    options.add_argument(
        "--sizes", nargs="+", default=["16x32", "64x96"], help="sequences x tokens"
    )
    options.add_argument("--adapters", type=int, default=64)
    options.add_argument("--processes", type=int, default=4, help="runs of prune; the rest scales")
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--part", type=int, default=16, help="jobs of one turn")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tiny", action="store_true", help="a tiny model: does it run?")
    args = common.parsed(options, argv)
    args.device = torch.device("cpu")
    report = common.Report("fleet", args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = make_base(folder, args.tiny)
        make_adapters(base, folder, args.adapters)
        for size in args.sizes:
            report.add(run(args, base, folder, size))
    report.finish()


if __name__ == "__main__":
    main()
