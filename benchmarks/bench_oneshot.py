"""Calibrate and prune a whole model, end to end, on the CPU or a GPU; random weights and tokens.

The model is built on the device, nothing is downloaded. Timed apart, on the wall clock and with the
device idle before and after: bare forwards, the same under ``ActivationNorms.collect`` (with and
without fused kernels where there are any), finding the base's fingerprint (once a run), and
``prune_model_``, whose first call also compiles kernels on a GPU. Then ``oneshot`` as a user calls
it: on the live model, and on a saved folder of the tiny one. Norms are compared with float64 sums
first; no time is printed for a model whose norms differ.

``official layer replay`` (``official.py``) is timed on ``--official_sequences`` of the sequences,
its calibration scaled to all of them: it is linear in them. Its norms must agree with ours within
1e-3 and its masks be ours given the same norms.
"""

import contextlib
import functools
import random
import statistics
import tempfile
import time
from pathlib import Path

import common
import official
import torch

from antidote_fast import (
    ActivationNorms,
    Selection,
    find_targets,
    oneshot,
    prune_mask,
    prune_model_,
)
from antidote_fast.errors import BackendUnavailable
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.models.forwards import lean_forward
from antidote_fast.norms import fusion

MODELS = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "tiny": (32, 48, 2, 4, 2, 128),
    "small": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
}
WORDS = ["how", "to", "make", "a", "good", "cake", "and", "what", "is", "the", "user", "asking"]


def llama_config(name):
    """The transformers config of a named shape."""
    import transformers

    hidden, intermediate, layers, heads, kv_heads, vocabulary = MODELS[name]
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )


def build(name, dtype, device):
    """A Llama of a named shape in eval mode; norm weights are not all one."""
    import transformers

    config = llama_config(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def make_batches(args, vocabulary):
    """Batches of random tokens, nothing padded."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.num_sequences, args.max_seq_length)
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    ids = ids.pin_memory() if args.device.type == "cuda" else ids
    return [{"input_ids": part} for part in ids.split(args.batch_size)]


def bare(model, batches):
    """The forwards alone, with the options that collecting uses."""
    device = next(model.parameters()).device
    with lean_forward(model) as options, torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"].to(device, non_blocking=True), **options)


def check(model, batch, targets, modes):
    """Norms of every mode equal float64 sums of each module's own input, within 1e-6."""
    sums, handles = {}, []

    def hook(key):
        def add(module, args):
            sums[key] = args[0].detach().double().square().sum(dim=(0, 1))

        return add

    for target in find_targets(model, targets):
        handles.append(target.module.register_forward_pre_hook(hook(target.key)))
    bare(model, [batch])
    for handle in handles:
        handle.remove()
    for name, options in modes.items():
        norms = ActivationNorms.collect(model, [batch], targets=targets, **options)
        assert norms.sq_sum.keys() == sums.keys()
        for key, value in norms.sq_sum.items():
            torch.testing.assert_close(
                value.double().to(sums[key].device),
                sums[key],
                rtol=tolerance(name),
                atol=0,
                msg=lambda text, key=key, name=name: f"{name}: {key}: {text}",
            )


def tolerance(mode):
    """How far a mode's norms may be from float64 sums of what the separate modules compute.

    A fused module may round an activation otherwise, by one unit in the last place, and so all that
    comes after it.
    """
    return 1e-6 if mode == "collect" else 2e-2


def modes_here(args):
    """{name: options of collect}: "collect", and "collect fused" where Triton kernels can run."""
    modes = {"collect": {"backend": args.backend, "fuse": False}}
    try:
        fusion.check_fuse(args.device.type, "rms")
    except BackendUnavailable:
        return modes
    return modes | {"collect fused": {"backend": args.backend, "fuse": True}}


def measure(model, batches, targets, modes, rounds, device):
    """({name: seconds of each round}, norms): bare and every mode take turns."""
    fingerprint, once = common.stopped(device, fingerprint_model, model)
    times = {"bare": [], **{name: [] for name in modes}, "fingerprint": [once]}
    norms = None
    for number in range(rounds):
        order = ["bare", *modes] if number % 2 == 0 else [*reversed(modes), "bare"]
        for name in order:
            if name == "bare":
                times[name].append(common.stopped(device, bare, model, batches)[1])
                continue
            options = {"targets": targets, "fingerprint": fingerprint, **modes[name]}
            norms, seconds = common.stopped(
                device, ActivationNorms.collect, model, batches, **options
            )
            times[name].append(seconds)
    return times, norms


@contextlib.contextmanager
def restoring(model, targets):
    """Gives a call that puts the targets' weights back; at the end of the block it is called."""
    weights = [target.weight for target in find_targets(model, targets)]
    kept = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def restore():
        torch._foreach_copy_(weights, kept)

    try:
        yield restore
    finally:
        restore()


def measure_prune(model, norms, targets, args, restore):
    """(seconds of the first ``prune_model_``, median of later ones, report)."""
    seconds = []
    for _ in range(args.rounds + 1):
        restore()
        report, took = common.stopped(
            args.device,
            prune_model_,
            model,
            norms,
            Selection(args.ratio),
            targets=targets,
            backend=args.backend,
        )
        seconds.append(took)
    return seconds[0], statistics.median(seconds[1:]), report


def measure_official(model, batches, targets, args):
    """(sequences, seconds to calibrate on them, to select and prune) of the official method."""
    count = min(args.official_sequences, args.num_sequences)
    sequences = torch.cat([batch["input_ids"] for batch in batches])[:count].split(1)
    options = {"targets": targets, "fingerprint": "", "backend": args.backend}
    ours = ActivationNorms.collect(model, [{"input_ids": ids} for ids in sequences], **options)
    means, calibrating = common.stopped(args.device, official.collect, model, sequences, targets)
    assert means.keys() == ours.sq_sum.keys()
    for target in find_targets(model, targets):
        norm = means[target.key].sqrt()
        expected = ours.act_norm(target.key).to(norm.device) / count**0.5
        torch.testing.assert_close(norm, expected, rtol=1e-3, atol=0)
        mask = official.select(target.weight, means[target.key], args.ratio)
        same = prune_mask(target.weight, norm, Selection(args.ratio), backend=args.backend)
        assert torch.equal(mask, same.to_bool()), f"{target.key}: differs from the official mask"
    del mask, same
    pruning = common.stopped(
        args.device, official.prune_by, model, means, args.ratio, targets=targets
    )[1]
    return count, calibrating, pruning


def tokenizer():
    """A word-level tokenizer that fits every model here."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def records(count, length):
    """Records of random words that fill ``length`` tokens."""
    generator = random.Random(0)

    def text(number):
        return " ".join(generator.choices(WORDS, k=number))

    return [{"instruction": text(12), "output": text(length)} for _ in range(count)]


def whole_call(model, args, targets, **options):
    """(report, seconds) of ``oneshot``."""
    data = records(args.num_sequences, args.max_seq_length)
    options |= {
        "tokenizer": tokenizer(),
        "ratio": args.ratio,
        "targets": None if targets is None else [targets],
        "num_calibration_samples": args.num_sequences,
        "max_seq_length": args.max_seq_length,
        "batch_size": args.batch_size,
        "backend": args.backend,
        "device": args.device.type,
    }
    call = functools.partial(oneshot, model, dataset=data, **options)
    return common.stopped(args.device, call)


def whole_call_on_a_folder(args):
    """Seconds of ``oneshot`` on a saved folder of the tiny model; what it wrote is read back."""
    import safetensors.torch

    with tempfile.TemporaryDirectory() as folder:
        source, pruned = Path(folder) / "model", Path(folder) / "pruned"
        build("tiny", torch.float32, "cpu").save_pretrained(source)
        tokenizer().save_pretrained(source)
        report, seconds = whole_call(source, args, None, output_dir=pruned, overwrite=True)
        weights = safetensors.torch.load_file(pruned / "model.safetensors")
        for layer in report.layers:
            assert int((weights[layer.key] == 0).sum()) >= layer.removed > 0, layer.key
    return seconds


def bench(args, report):
    """Rows of one model and one choice of targets."""
    targets = None if args.targets == "qkv" else args.targets
    dtype, device = common.DTYPES[args.dtype], args.device
    model, built = common.stopped(device, build, args.model, dtype, device)
    batches = make_batches(args, MODELS[args.model][-1])
    modes = modes_here(args)
    check(model, batches[0], targets, modes)
    about = {
        "model": args.model,
        "targets": args.targets,
        "dtype": args.dtype,
        "sequences": args.num_sequences,
        "length": args.max_seq_length,
        "batch_size": args.batch_size,
    }
    bare(model, batches[:2])
    times, norms = measure(model, batches, targets, modes, args.rounds, device)
    whole = statistics.median(times["bare"])
    tokens = args.num_sequences * args.max_seq_length
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row = {**about, "name": name, "s": round(median, 4), "rounds": len(seconds)}
        row["s_each"] = [round(value, 4) for value in seconds]
        if name != "fingerprint":
            row["tokens/s"] = round(tokens / median)
        row["x bare"] = round(median / whole, 4)
        report.add(row)
    with restoring(model, targets) as restore:
        first, later, pruned = measure_prune(model, norms, targets, args, restore)
        restore()
        if args.official_sequences:
            count, calibrating, pruning = measure_official(model, batches, targets, args)
    size = sum(layer.num_bytes for layer in pruned.layers)
    report.add(
        {
            **about,
            "name": "prune_model_",
            "s": round(later, 4),
            "first_s": round(first, 4),
            "weights": len(pruned.layers),
            "GB/s": round(2 * size / later / 1e9, 1),
            "x bare": round(later / whole, 4),
        }
    )
    for name in modes:
        together = statistics.median(times[name]) + later
        row = {**about, "name": f"{name} + prune_model_", "s": round(together, 4)}
        report.add({**row, "x bare": round(together / whole, 4)})
    if args.official_sequences:
        ours = statistics.median(times["collect"]) + later
        seconds = calibrating * args.num_sequences / count + pruning
        report.add(
            {
                **about,
                "name": "official layer replay",
                "s": round(seconds, 4),
                "timed_sequences": count,
                "calibrate_s": round(calibrating, 4),
                "prune_s": round(pruning, 4),
                "x bare": round(seconds / whole, 4),
                "ours is faster x": round(seconds / ours, 2),
            }
        )
    _, seconds = whole_call(model, args, targets)
    row = {**about, "name": "oneshot, live model", "s": round(seconds, 4)}
    report.add({**row, "x bare": round(seconds / whole, 4), "built_s": round(built, 2)})
    seconds = whole_call_on_a_folder(args)
    report.add({**about, "model": "tiny", "name": "oneshot, folder", "s": round(seconds, 4)})


def main(argv=None):
    options = common.parser(__doc__)
    options.add_argument("--model", choices=MODELS, help="default llama2-7b on a GPU, else small")
    options.add_argument("--targets", choices=["qkv", "all-linear"], default="all-linear")
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--num_sequences", type=int, help="default 2000 on a GPU, else 16")
    options.add_argument("--max_seq_length", type=int, default=100)
    options.add_argument("--batch_size", type=int, help="default 50 on a GPU, else 4")
    options.add_argument("--ratio", type=float, default=0.2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--official_sequences",
        type=int,
        help="how many the official method is timed on; default 100 on a GPU, else 16; 0: none",
    )
    args = common.parsed(options, argv)
    on_cpu = args.device.type == "cpu"
    args.model = args.model or ("small" if on_cpu else "llama2-7b")
    args.num_sequences = args.num_sequences or (16 if on_cpu else 2000)
    args.batch_size = args.batch_size or (4 if on_cpu else 50)
    if args.official_sequences is None:
        args.official_sequences = 16 if on_cpu else 100
    report = common.Report("oneshot", args)
    begin = time.perf_counter()
    bench(args, report)
    print(f"{time.perf_counter() - begin:.0f} s in all", flush=True)
    report.finish()


if __name__ == "__main__":
    main()
