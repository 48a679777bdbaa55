"""Pruning one weight in place against what users run today, on the CPU or a GPU.

In the same run and in turn: ``copy_`` of the matrix (the floor), a read-only kernel (the largest of
the matrix as int32), the peers of ``peers.py``, and ours with each backend asked for. Every result
is compared with the stable sort's first; no time is printed for one that differs.

Matrices are rotated so that none is in a cache when its turn comes (``--resident`` times one matrix
instead), and restored outside the timing. GB/s counts the bytes that cannot be avoided (``CASES``).
With ``--graph`` ours are timed inside CUDA graphs, too, and a replay's result is compared as well.
"""

import itertools
from dataclasses import dataclass

import common
import peers
import torch

from antidote_fast import Selection, prune_, prune_mask
from antidote_fast.masks import PackedMask

SHAPES_ON_CPU = ["4096x4096", "11008x4096", "4096x11008"]
QUICK = [*SHAPES_ON_CPU, "14336x4096", "4096x14336", "28672x8192"]
SHAPES = {
    "Llama-2-7B": SHAPES_ON_CPU,
    "Llama-3-8B, Mistral-7B": ["4096x4096", "1024x4096", "14336x4096", "4096x14336"],
    "Llama-3-70B": ["8192x8192", "1024x8192", "28672x8192", "8192x28672"],
    "Gemma-2-9B": ["4096x3584", "2048x3584", "3584x4096", "14336x3584", "3584x14336"],
    "Gemma-2-27B": ["36864x4608", "4608x36864"],
    "Qwen2.5-7B": ["3584x3584", "512x3584", "18944x3584", "3584x18944"],
    "Qwen2.5-72B": ["29568x8192", "8192x29568"],
    "synthetic": ["65536x64", "65536x128", "16384x257", "16384x1000", "16384x1024", "1024x65536"],
}
ALL_SHAPES = list(dict.fromkeys(shape for shapes in SHAPES.values() for shape in shapes))
RATIOS = [0.01, 0.05, 0.1, 0.2, 0.5]
READ_ONLY = "read only (int32 max)"
RUNS_ON_CPU = {"sort chain": 3, "sort chain, compiled": 3}  # they take up to a second each


@dataclass(frozen=True)
class Case:
    """One way of pruning; ``floor(itemsize)`` is the bytes a weight that cannot be avoided."""

    floor: object
    options: tuple = ()
    preserve: bool = False
    base: bool = False
    write: bool = True

    def selection(self, ratio):
        return Selection(ratio, **dict(self.options))


CASES = {
    "row": Case(lambda size: 2 * size),
    "tensor": Case(lambda size: 3 * size, (("scope", "tensor"),)),
    "preserve": Case(lambda size: 2 * size, preserve=True),
    "base": Case(lambda size: 3 * size, base=True),
    "revert": Case(lambda size: 3 * size, (("score_delta", True),), base=True),
    "preserve+revert": Case(
        lambda size: 3 * size, (("score_delta", True),), preserve=True, base=True
    ),
    "2:4": Case(lambda size: 2 * size, (("n_m", (2, 4)),)),
    "mask": Case(lambda size: size + 1 / 8, write=False),
}


def make(shape, dtype, case, ratio, device):
    """(weight, operands) of Gaussian values."""
    generator = torch.Generator(device).manual_seed(0)

    def norm():
        return torch.rand(shape[1], generator=generator, device=device) + 0.5

    def matrix():
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    weight, selection = matrix(), case.selection(ratio)
    compared = shape[0] * shape[1] if selection.scope == "tensor" else shape[1]
    operands = peers.Operands(
        selection,
        selection.n_m[1] if selection.n_m else compared,
        norm(),
        norm() if case.preserve else None,
        matrix() if case.base else None,
        case.write,
    )
    return weight, operands


def ours(weight, operands, backend):
    """The fused call."""
    options = {"preserve_norm": operands.preserve_norm, "base_weight": operands.base}
    if not operands.write:
        return prune_mask(weight, operands.norm, operands.selection, backend=backend, **options)
    return prune_(weight, operands.norm, operands.selection, backend=backend, **options)


def check(source, operands, backends, made):
    """Ours equal the stable sort bit for bit; the peers agree up to ties.

    Returns:
        The weight as it must be, bits as integers.
    """
    bits = torch.int32 if source.dtype == torch.float32 else torch.int16
    expected = source.clone()
    mask = peers.sort_chain(expected, operands)
    for backend in backends:
        pruned = source.clone()
        found = ours(pruned, operands, backend)
        if isinstance(found, PackedMask):
            assert torch.equal(found.to_bool(), mask), f"{backend}: differs from the stable sort"
        else:
            same = torch.equal(pruned.view(bits), expected.view(bits))
            assert same, f"{backend}: differs from the stable sort"
    for name, peer in made.items():
        other = source.clone()
        found = peer(other, operands)
        if operands.write:
            same = (other == expected).float().mean()
        else:
            same = (found.view(mask.shape) == mask).float().mean()
        assert same > 0.999, f"{name} agrees on {same:.2%} only"
    return expected.view(bits)


def prepare(source, operands, args, report, about):
    """The peers that run here; a note says why one does not."""
    made = {}
    for name, maker in peers.names(args.compile).items():
        if args.peer is not None and name not in args.peer:
            continue
        try:
            peer = maker()
            peer(source.clone(), operands)
        except ImportError:
            continue
        except Exception as error:  # a peer's failure is not ours: say so, and go on
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            report.note(**about, name=name, why=why[:300])
            continue
        made[name] = peer
    return made


def bench(name, shape, ratio, args, report):
    """Rows of one case, shape and ratio: all take turns over the same rotated matrices."""
    dtype, case, device = common.DTYPES[args.dtype], CASES[name], args.device
    source, operands = make(shape, dtype, case, ratio, device)
    about = {
        "case": name,
        "shape": f"{shape[0]}x{shape[1]}",
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": ratio,
    }
    made = prepare(source, operands, args, report, about)
    expected = check(source, operands, args.ours.values(), made)
    count = 1 if args.resident else args.rotated or common.rotation(source.nbytes, device, 2)
    sources = [source, *(source.roll(i, 0) for i in range(1, count))]
    targets = [original.clone() for original in sources]
    turns = {
        "copy_": lambda i: targets[i].copy_(sources[i]),
        READ_ONLY: lambda i: common.as_words(targets[i]).max(),
    }
    for name, backend in args.ours.items():
        turns[name] = lambda i, backend=backend: ours(targets[i], operands, backend)
    if args.graph and operands.write:

        def check_replay(label, replay):
            targets[0].copy_(sources[0])
            replay()
            same = torch.equal(targets[0].view(expected.dtype), expected)
            assert same, f"{label}: differs from the stable sort"

        tables = operands.selection.scope != "row"
        turns |= common.in_graphs(turns, count, args, report, about, check_replay, tables)
    for name, peer in made.items():
        turns[name] = lambda i, peer=peer: peer(targets[i], operands)
    limits = {name: RUNS_ON_CPU.get(name, 5) for name in made} if device.type == "cpu" else None
    watch = common.Stopwatch(device)
    restore = (lambda i: targets[i].copy_(sources[i])) if operands.write else None
    common.take_turns(watch, turns, count, args.runs, restore, limits)
    best = {name: watch.median(name) for name in args.ours}
    _report(about, count, watch, case.floor(dtype.itemsize) * source.numel(), source, best, report)


def _report(about, count, watch, floor, source, best, report):
    """One row an implementation; ratios are of medians in this run. ``best``: ours, and times."""
    copy = watch.median("copy_")
    moved = {"copy_": 2 * source.nbytes, READ_ONLY: source.nbytes}
    for name in watch:
        median = watch.median(name)
        speed = moved.get(name, floor) / median
        row = {
            **about,
            "rotated": count,
            "name": name,
            **watch.row(name),
            "GB/s": round(speed / 1e9, 1),
            "% of copy_": round(100 * speed / (2 * source.nbytes / copy), 1),
            "x copy_": round(median / copy, 2),
        }
        for mine, seconds in best.items():
            if not name.startswith("antidote_fast"):
                label = mine.replace("antidote_fast", "ours", 1)
                row[f"{label} is faster x"] = round(median / seconds, 2)
        report.add(row)


def main(argv=None):
    options = common.parser(__doc__, several=True)
    options.add_argument("--case", nargs="+", choices=CASES, default=["row"])
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--ratio", type=float, nargs="+", default=RATIOS)
    options.add_argument("--shape", nargs="+", help="such as 4096x11008")
    options.add_argument("--quick", action="store_true", help=f"on a GPU: {' '.join(QUICK)}")
    options.add_argument("--peer", nargs="*", help="only these peers")
    options.add_argument("--compile", action="store_true", help="the sort chain compiled, too")
    options.add_argument("--graph", action="store_true", help="ours inside CUDA graphs, too")
    options.add_argument("--resident", action="store_true", help="time one matrix over and over")
    options.add_argument("--rotated", type=int, help="how many matrices take turns")
    options.add_argument("--runs", type=int, help="timed calls of each; default 24, CPU 64")
    args = common.parsed(options, argv)
    on_cpu = args.device.type == "cpu"
    args.runs = args.runs or (64 if on_cpu else 24)
    shapes = args.shape or (SHAPES_ON_CPU if on_cpu else QUICK if args.quick else ALL_SHAPES)
    report = common.Report("_".join(["prune"] + ["resident"] * args.resident), args)
    args.ours = common.ours(args, report)
    for name, shape in itertools.product(args.case, map(common.shape_of, shapes)):
        for ratio in [0.5] if name == "2:4" else args.ratio:
            bench(name, shape, ratio, args, report)
    report.finish()


if __name__ == "__main__":
    main()
