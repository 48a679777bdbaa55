"""Many weights in one call against one by one, on the CPU or a GPU.

Shapes of Llama-2-7B, random values: a whole LoRA adapter of rank 16 on q/k/v (192 factors) or on
all linears (448), or with ``--model`` the weights of all linears themselves (224, 13 GB; every
layer then starts from the values of one). In the same run and in turn: a copy of all
(``torch._foreach_copy_``, the floor), one ``prune_many_`` with each backend asked for (``--graph``:
inside a CUDA graph as well), one ``prune_`` a weight, and the sort chain and topk + scatter a
weight. Every result, a replay's too, is compared with the stable sort's; no time is printed for one
that differs.
``us`` is the device's time on a GPU, ``host_us`` what the call kept Python.
"""

import common
import peers
import torch

from antidote_fast import Selection, prune_, prune_many_

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32
LINEARS = {
    "qkv": [(HIDDEN, HIDDEN)] * 3,
    "all-linear": [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)],
}
SORTS = ("sort chain", "topk + scatter")
SLOW_RUNS = 3  # of a whole model's sorts, and of any on a CPU


def make(name, args):
    """(weights, norms): A (r, in) and B (out, r) of every linear; or the linears of one layer."""
    device, dtype = args.device, common.DTYPES[args.dtype]
    generator = torch.Generator(device).manual_seed(0)
    weights, norms = [], []
    for rows, columns in LINEARS[name] * (1 if args.model else args.layers):
        rows, columns = rows // args.shrink, columns // args.shrink
        factors = ((args.rank, columns), (rows, args.rank))
        for shape in ((rows, columns),) if args.model else factors:
            weights.append(torch.randn(shape, generator=generator, device=device, dtype=dtype))
            norms.append(torch.rand(shape[1], generator=generator, device=device) + 0.5)
    return weights, norms


def one_by_one(weights, norms, selection, backend):
    """``prune_`` on each weight."""
    for weight, norm in zip(weights, norms, strict=True):
        prune_(weight, norm, selection, backend=backend)


def with_peer(peer, weights, norms, selection):
    """A peer on each weight."""
    for weight, norm in zip(weights, norms, strict=True):
        peer(weight, peers.Operands(selection, weight.shape[1], norm))


def check(found, expected, what):
    """Equal bit for bit; ``found`` may hold the expected ones many times over."""
    assert len(found) % len(expected) == 0
    for i, weight in enumerate(found):
        wanted = expected[i % len(expected)]
        same = torch.equal(common.as_words(weight), common.as_words(wanted))
        assert same, f"{what}: weight {i} differs from the stable sort"


def repeats(args, num_bytes):
    """How many layers take part: fewer where a model's do not fit in a GPU's free memory."""
    if not args.model or args.device.type != "cuda":
        return args.layers
    free, _ = torch.cuda.mem_get_info(args.device)
    return max(1, min(args.layers, int(0.7 * free / num_bytes)))


def bench(name, ratio, args, report):
    """Rows of one list of weights and one ratio."""
    selection = Selection(ratio)
    weights, norms = make(name, args)
    expected = [weight.clone() for weight in weights]
    with_peer(peers.sort_chain, expected, norms, selection)
    if args.model:
        layers = repeats(args, sum(weight.nbytes for weight in weights))
        weights, norms = weights * layers, norms * layers
    num_bytes = sum(weight.nbytes for weight in weights)
    count = args.rotated or common.rotation(num_bytes, args.device)
    lists = [[torch.empty_like(weight) for weight in weights] for _ in range(count)]
    what = f"r={args.rank} {name}"
    if args.model:
        what = f"{name}, {len(weights) // len(LINEARS[name])} layers"
    about = {
        "list": f"Llama-2-7B {what}" + f" / {args.shrink}" * (args.shrink > 1),
        "weights": len(weights),
        "MB": round(num_bytes / 1e6, 1),
        "dtype": args.dtype,
        "ratio": ratio,
        "rotated": count,
    }

    def restore(i):
        torch._foreach_copy_(lists[i], weights)

    turns = {"copy_": restore}
    for label, backend in args.ours.items():
        turns[label] = lambda i, backend=backend: prune_many_(
            lists[i], norms, selection, backend=backend
        )
        turns[f"{label}, prune_ one by one"] = lambda i, backend=backend: one_by_one(
            lists[i], norms, selection, backend
        )
    for label in list(turns)[1:]:
        restore(0)
        turns[label](0)
        check(lists[0], expected, label)
    if args.graph:

        def check_replay(label, replay):
            restore(0)
            replay()
            check(lists[0], expected, label)

        turns |= common.in_graphs(turns, count, args, report, about, check_replay, tables=True)
    turns["sort chain"] = lambda i: with_peer(peers.sort_chain, lists[i], norms, selection)
    turns["topk + scatter"] = lambda i: with_peer(peers.topk_scatter, lists[i], norms, selection)
    few = args.model or args.device.type == "cpu"
    limits = dict.fromkeys(SORTS, SLOW_RUNS) if few else None
    watch = common.Stopwatch(args.device)
    common.take_turns(watch, turns, count, args.runs, restore, limits)
    for label in watch:
        median = watch.median(label)
        row = {
            **about,
            "name": label,
            **watch.row(label),
            "ms": round(median * 1e3, 3),
            "GB/s": round(2 * num_bytes / median / 1e9, 1),
            "x copy_": round(median / watch.median("copy_"), 2),
        }
        for mine in args.ours:
            ours = mine.replace("antidote_fast", "ours", 1)
            row[f"{ours} is faster x"] = round(median / watch.median(mine), 2)
        report.add(row)


def main(argv=None):
    options = common.parser(__doc__, several=True)
    options.add_argument("--adapter", nargs="+", choices=LINEARS, default=list(LINEARS))
    options.add_argument("--model", action="store_true", help="all linears, instead of adapters")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--layers", type=int, default=LAYERS)
    options.add_argument("--shrink", type=int, default=1, help="divide the model's widths by this")
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--ratio", type=float, nargs="+", default=[0.05, 0.2])
    options.add_argument("--rotated", type=int, help="how many lists take turns")
    options.add_argument("--graph", action="store_true", help="ours inside CUDA graphs, too")
    options.add_argument("--runs", type=int, default=20)
    args = common.parsed(options, argv)
    report = common.Report("prune_model" if args.model else "prune_many", args)
    args.ours = common.ours(args, report)
    for name in ["all-linear"] if args.model else args.adapter:
        for ratio in args.ratio:
            bench(name, ratio, args, report)
    report.finish()


if __name__ == "__main__":
    main()
