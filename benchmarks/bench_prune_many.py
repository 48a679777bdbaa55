"""A whole LoRA adapter in one call against tensor by tensor, on the CPU or a GPU.

Adapters of Llama-2-7B, random values: rank 16 on q/k/v (192 factors) and on all linears (448). In
the same run and in turn: a copy of all factors (``torch._foreach_copy_``, the floor), one
``prune_many_``, one ``prune_`` a factor, and the sort chain and topk + scatter a factor. Every
result is compared with the stable sort's first; no time is printed for one that differs.
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


def make(linears, args):
    """(factors, norms): A (r, in) and B (out, r) of every linear of every layer."""
    device, dtype = args.device, common.DTYPES[args.dtype]
    generator = torch.Generator(device).manual_seed(0)
    factors, norms = [], []
    for rows, columns in linears * args.layers:
        rows, columns = rows // args.shrink, columns // args.shrink
        for shape in ((args.rank, columns), (rows, args.rank)):
            factors.append(torch.randn(shape, generator=generator, device=device, dtype=dtype))
            norms.append(torch.rand(shape[1], generator=generator, device=device) + 0.5)
    return factors, norms


def one_by_one(factors, norms, selection, backend):
    """``prune_`` on each factor."""
    for factor, norm in zip(factors, norms, strict=True):
        prune_(factor, norm, selection, backend=backend)


def with_peer(peer, factors, norms, selection):
    """A peer on each factor."""
    for factor, norm in zip(factors, norms, strict=True):
        peer(factor, peers.Operands(selection, factor.shape[1], norm))


def check(factors, norms, selection, backend):
    """All of ours equal the stable sort bit for bit."""
    expected = [f.clone() for f in factors]
    with_peer(peers.sort_chain, expected, norms, selection)
    together, apart = [f.clone() for f in factors], [f.clone() for f in factors]
    prune_many_(together, norms, selection, backend=backend)
    one_by_one(apart, norms, selection, backend)
    for found in (together, apart):
        same = all(
            torch.equal(common.as_words(f), common.as_words(e))
            for f, e in zip(found, expected, strict=True)
        )
        assert same, "differs from the stable sort"


def bench(name, ratio, args, report):
    """Rows of one adapter and ratio."""
    selection = Selection(ratio)
    factors, norms = make(LINEARS[name], args)
    check(factors, norms, selection, args.backend)
    num_bytes = sum(f.nbytes for f in factors)
    count = args.rotated or common.rotation(num_bytes, args.device)
    adapters = [[torch.empty_like(f) for f in factors] for _ in range(count)]
    watch = common.Stopwatch(args.device)
    turns = {
        "copy_": lambda i: torch._foreach_copy_(adapters[i], factors),
        "antidote_fast": lambda i: prune_many_(adapters[i], norms, selection, backend=args.backend),
        "prune_ one by one": lambda i: one_by_one(adapters[i], norms, selection, args.backend),
        "sort chain": lambda i: with_peer(peers.sort_chain, adapters[i], norms, selection),
        "topk + scatter": lambda i: with_peer(peers.topk_scatter, adapters[i], norms, selection),
    }
    limits = dict.fromkeys(("sort chain", "topk + scatter"), 3)
    common.take_turns(
        watch,
        turns,
        count,
        args.runs,
        lambda i: torch._foreach_copy_(adapters[i], factors),
        limits if args.device.type == "cpu" else None,
    )
    ours = watch.median("antidote_fast")
    for label in watch:
        median = watch.median(label)
        report.add(
            {
                "adapter": f"Llama-2-7B r={args.rank} {name}"
                + f" / {args.shrink}" * (args.shrink > 1),
                "factors": len(factors),
                "MB": round(num_bytes / 1e6, 1),
                "dtype": args.dtype,
                "ratio": ratio,
                "rotated": count,
                "name": label,
                **watch.row(label),
                "GB/s": round(2 * num_bytes / median / 1e9, 1),
                "x copy_": round(median / watch.median("copy_"), 2),
                "ours is faster x": round(median / ours, 2),
            }
        )


def main(argv=None):
    options = common.parser(__doc__)
    options.add_argument("--adapter", nargs="+", choices=LINEARS, default=list(LINEARS))
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--layers", type=int, default=LAYERS)
    options.add_argument("--shrink", type=int, default=1, help="divide the model's widths by this")
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--ratio", type=float, nargs="+", default=[0.05, 0.2])
    options.add_argument("--rotated", type=int, help="how many adapters take turns")
    options.add_argument("--runs", type=int, default=20)
    args = common.parsed(options, argv)
    report = common.Report("prune_many", args)
    for name in args.adapter:
        for ratio in args.ratio:
            bench(name, ratio, args, report)
    report.finish()


if __name__ == "__main__":
    main()
