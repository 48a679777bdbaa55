"""One linear layer pruned from a batch of its input, on the CPU or a GPU.

In the same run and in turn: reading the input once and copying the weight (the floor),
``prune_linear_`` with each backend asked for (``--graph``: inside a CUDA graph as well),
``accumulate_sq_norm_`` and ``prune_`` of the same backend one after the other, and what users run
today: the official transposed norm and the sort chain, ``vector_norm`` and topk + scatter. Norms
are compared with float64 and weights with the stable sort by that norm first; no time is printed
for what differs.
"""

import functools
import itertools

import common
import peers
import torch
from bench_norms import official, read_only, vector_norm

from antidote_fast import Selection, accumulate_sq_norm_, prune_, prune_linear_

SHAPES = ["4096x4096", "11008x4096", "4096x11008"]
TOKENS = [2048, 8192]
FLOOR = "read x, copy_ weight"


def at_once(weight, x, selection, backend):
    """Ours, in one call."""
    return prune_linear_(weight, x, selection, return_norm=True, backend=backend)[1]


def apart(weight, x, selection, backend):
    """Ours, norms first."""
    norm = torch.zeros(weight.shape[1], device=x.device)
    accumulate_sq_norm_(norm, x, backend=backend).sqrt_()
    prune_(weight, norm, selection, backend=backend)
    return norm


def with_peers(sum_squares, select, weight, x, selection):
    """Peers of both benchmarks, one after the other."""
    norm = torch.zeros(weight.shape[1], device=x.device)
    sum_squares(x, norm)
    norm.sqrt_()
    select(weight, peers.Operands(selection, weight.shape[1], norm))
    return norm


PEERS = {
    "official norm + sort chain": functools.partial(with_peers, official, peers.sort_chain),
    "vector_norm + topk + scatter": functools.partial(with_peers, vector_norm, peers.topk_scatter),
}


def check(source, x, selection, calls):
    """Every norm within 1e-6 of float64, every weight as the stable sort by that norm has it.

    Returns:
        {name: the weight as it must be}.
    """
    weights = {}
    wanted = x.double().square().sum(0).sqrt()
    for name, call in calls.items():
        found, expected = source.clone(), source.clone()
        norm = call(found, x, selection)
        torch.testing.assert_close(norm.double(), wanted, rtol=1e-6, atol=0)
        peers.sort_chain(expected, peers.Operands(selection, source.shape[1], norm))
        same = torch.equal(common.as_words(found), common.as_words(expected))
        assert same, f"{name}: differs from the stable sort"
        weights[name] = expected
    return weights


def bench(shape, tokens, ratio, args, report):
    """Rows of one weight, number of tokens and ratio."""
    device, selection = args.device, Selection(ratio)
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": common.DTYPES[args.dtype]}
    weight, x = torch.randn(shape, **options), torch.randn(tokens, shape[1], **options)
    calls = {}
    for name, backend in args.ours.items():
        calls[name] = functools.partial(at_once, backend=backend)
        calls[f"{name}, norms then prune_"] = functools.partial(apart, backend=backend)
    expected = check(weight, x, selection, calls)
    num_bytes = 2 * weight.nbytes + x.nbytes
    count = args.rotated or common.rotation(weight.nbytes + x.nbytes, device, 2)
    about = {
        "shape": f"{shape[0]}x{shape[1]}",
        "tokens": tokens,
        "dtype": args.dtype,
        "ratio": ratio,
        "rotated": count,
    }
    sources = [weight.roll(i, 0) for i in range(count)]
    targets = [source.clone() for source in sources]
    inputs = [x.roll(i, 0) for i in range(count)]

    def floor(i):
        read_only(inputs[i], None)
        targets[i].copy_(sources[i])

    turns = {FLOOR: floor}
    for name, call in (calls | PEERS).items():
        turns[name] = lambda i, call=call: call(targets[i], inputs[i], selection)
    if args.graph:

        def check_replay(label, replay):
            targets[0].copy_(sources[0])
            replay()
            wanted = expected[label.removesuffix(", graph")]
            same = torch.equal(common.as_words(targets[0]), common.as_words(wanted))
            assert same, f"{label}: differs from the stable sort"

        turns |= common.in_graphs(turns, count, args, report, about, check_replay)
    limits = dict.fromkeys(PEERS, 3) if device.type == "cpu" else None
    watch = common.Stopwatch(device)
    common.take_turns(
        watch, turns, count, args.runs, lambda i: targets[i].copy_(sources[i]), limits
    )
    for name in watch:
        median = watch.median(name)
        row = {
            **about,
            "name": name,
            **watch.row(name),
            "GB/s": round(num_bytes / median / 1e9, 1),
            "% of floor": round(100 * watch.median(FLOOR) / median, 1),
        }
        for mine in args.ours:
            if name != mine:
                label = mine.replace("antidote_fast", "ours", 1)
                row[f"{label} is faster x"] = round(median / watch.median(mine), 2)
        report.add(row)


def main(argv=None):
    options = common.parser(__doc__, several=True)
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--ratio", type=float, nargs="+", default=[0.05])
    options.add_argument("--shape", nargs="+", default=SHAPES, help="such as 4096x11008")
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--graph", action="store_true", help="ours inside CUDA graphs, too")
    options.add_argument("--rotated", type=int, help="how many layers take turns")
    options.add_argument("--runs", type=int, help="timed calls of each; default 24, CPU 10")
    args = common.parsed(options, argv)
    args.runs = args.runs or (10 if args.device.type == "cpu" else 24)
    report = common.Report("linear", args)
    args.ours = common.ours(args, report)
    shapes = map(common.shape_of, args.shape)
    for shape, tokens, ratio in itertools.product(shapes, args.tokens, args.ratio):
        bench(shape, tokens, ratio, args, report)
    report.finish()


if __name__ == "__main__":
    main()
