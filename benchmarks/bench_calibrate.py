"""What collecting norms costs over the bare forward on a CPU; a model of SmolLM2-135M's shape.

Each batch runs on one copy of the model bare and on another under ``ActivationNorms.collect``, in
turn, with the same options (eval mode, no gradients, no cache, logits of one position); what
collecting does once a run (finding targets, hooks, fingerprint) is given apart. Norms are checked
against a float64 oracle first; no time is printed otherwise. Random weights: the cost does not
depend on them.
"""

import statistics
import time

import common
import torch

from antidote_fast import ActivationNorms, find_targets
from antidote_fast.models.forwards import lean_forward

CASES = (
    ("lora q/k/v", True, None),
    ("full q/k/v", False, None),
    ("full all-linear", False, "all-linear"),
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build(dtype, lora, layers):
    """SmolLM2-135M's configuration with random weights; with LoRA r = 32 on q/k/v where asked."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if lora:
        adapter = peft.LoraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj"])
        model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
    return model.eval()


def make_batches(count, size, length):
    """Left-padded batches: a quarter of the sequences is a quarter shorter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (count, size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, : size // 4, : length // 4] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def bare(model, batches):
    """The forwards alone, with the options that collecting uses."""
    with lean_forward(model) as options, torch.no_grad():
        for batch in batches:
            model(**batch, **options)


def check(model, batches, targets):
    """The collected norms equal float64 sums of each module's own input, within 1e-6."""
    norms = ActivationNorms.collect(model, batches, targets=targets)
    sums = {}
    mask = None

    def hook(key):
        def add(module, args):
            x = torch.where(mask[..., None], args[0].double(), 0.0)
            sums[key] = sums.get(key, 0) + x.square().sum(dim=(0, 1))

        return add

    handles = [
        t.module.register_forward_pre_hook(hook(t.key)) for t in find_targets(model, targets)
    ]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        bare(model, [batch])
    for handle in handles:
        handle.remove()
    for key, value in norms.sq_sum.items():
        torch.testing.assert_close(value.double(), sums[key], rtol=1e-6, atol=0)
    return len(sums)


def run(case, arguments):
    """Measure one case; returns its row."""
    name, lora, targets, dtype = case
    model, twin = (build(DTYPES[dtype], lora, arguments.layers) for _ in range(2))
    batches = make_batches(arguments.batches, arguments.batch_size, arguments.length)
    weights = check(model, batches[:1], targets)
    first, once = in_turn(model, twin, batches, targets)
    # Where a copy's weights lie in memory matters by up to a tenth; so the two change places.
    second, _ = in_turn(twin, model, batches, targets)
    ratios = [sorted(after / before for before, after in pairs) for pairs in (first, second)]
    pairs = first + second
    return {
        "case": name,
        "dtype": dtype,
        "weights": weights,
        "layers": arguments.layers,
        "batches": arguments.batches,
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "bare_s": round(statistics.median(before for before, _ in pairs), 4),
        "collected_s": round(statistics.median(after for _, after in pairs), 4),
        "ratio": round(statistics.geometric_mean(statistics.median(r) for r in ratios), 3),
        "ratio_p20": round(statistics.geometric_mean(r[len(r) // 5] for r in ratios), 3),
        "ratio_p80": round(statistics.geometric_mean(r[-1 - len(r) // 5] for r in ratios), 3),
        "once_s": round(once, 3),
    }


def in_turn(model, twin, batches, targets):
    """([(bare, collected) seconds a batch], seconds that collecting takes once)."""
    pairs = []

    def run_and_yield():
        for batch in batches:
            start = time.perf_counter()
            bare(twin, [batch])
            between = time.perf_counter()
            yield batch  # collect runs the model on it and comes back for the next
            pairs.append((between - start, time.perf_counter() - between))

    bare(twin, batches[:1])
    start = time.perf_counter()
    ActivationNorms.collect(model, run_and_yield(), targets=targets)
    total = time.perf_counter() - start
    return pairs, total - sum(map(sum, pairs))


def main(argv=None):
    options = common.parser(__doc__)
    options.add_argument("--batches", type=int, default=20)
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    arguments = common.parsed(options, argv)
    arguments.device = torch.device("cpu")
    report = common.Report("calibrate", arguments)
    for dtype in arguments.dtypes:
        for case in CASES:
            report.add(run((*case, dtype), arguments))
    report.finish()


if __name__ == "__main__":
    main()
