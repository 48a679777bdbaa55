"""Row prune in place against what users run today, on the CPU.

Peers, in the same run: ``copy_`` of the matrix (the floor), the sort chain of Wanda and the
official Antidote code (fp32 score, stable sort, scatter, multiply), topk + scatter, and kthvalue +
compare (which removes all ties). Every result is compared with the sort chain's first; no time is
printed for one that differs.

Matrices are rotated so that none is in a cache when its turn comes: 1 GB or more of them
(``--resident`` times one matrix instead). A pruned matrix is restored outside the timing: by the
timed copy itself.
"""

import common
import torch

from antidote_fast import Selection, num_pruned, prune_

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
RATIOS = [0.01, 0.05, 0.1, 0.2, 0.5]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def sort_chain(weight, norm, k):
    """As the official codes do it; removed weights become zero."""
    score = weight.abs().float() * norm.reshape(1, -1)
    order = torch.sort(score, dim=-1, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(1, order[:, weight.shape[1] - k :], True)
    weight[mask] = 0


def topk_scatter(weight, norm, k):
    """The k largest of each row without a full sort; ties fall as topk likes."""
    score = weight.abs().float() * norm.reshape(1, -1)
    weight.scatter_(1, torch.topk(score, k, dim=-1, sorted=False).indices, 0)


def kthvalue_compare(weight, norm, k):
    """All that is at least the k-th largest score of the row; all ties go."""
    score = weight.abs().float() * norm.reshape(1, -1)
    kth = torch.kthvalue(score, weight.shape[1] - k + 1, dim=-1, keepdim=True).values
    weight.masked_fill_(score >= kth, 0)


PEERS = {
    "sort chain": (sort_chain, 3),
    "topk + scatter": (topk_scatter, 5),
    "kthvalue + compare": (kthvalue_compare, 5),
}


def ours(weight, norm, k, selection=None, backend=None):
    """The fused call."""
    prune_(weight, norm, selection, backend=backend)


def check(source, norm, ratio, backend):
    """Ours equals the sort chain bit for bit; the peers remove as many."""
    k = num_pruned(source.shape[1], Selection(ratio))
    expected, pruned = source.clone(), source.clone()
    sort_chain(expected, norm, k)
    prune_(pruned, norm, Selection(ratio), backend=backend)
    bits = torch.int32 if source.dtype == torch.float32 else torch.int16
    assert torch.equal(pruned.view(bits), expected.view(bits)), "differs from the sort chain"
    for peer in (topk_scatter, kthvalue_compare):
        other = source.clone()
        peer(other, norm, k)
        same = (other == expected).float().mean()
        assert same > 0.999, f"{peer.__name__} agrees on {same:.2%} only"


def bench(shape, dtype, ratios, backend, resident, rounds):
    """Rows of one shape: copies and prunes alternate over the same rotated matrices."""
    generator = torch.Generator().manual_seed(0)
    size = shape[0] * shape[1] * dtype.itemsize
    count = 1 if resident else -(-(1 << 30) // size)
    sources = [torch.randn(shape, generator=generator).to(dtype)]
    sources += [sources[0].roll(i, 0) for i in range(1, count)]
    targets = [torch.empty_like(s).zero_() for s in sources]
    norm = torch.rand(shape[1], generator=generator) + 0.5
    rows = []
    for ratio in ratios:
        check(sources[0], norm, ratio, backend)
        k = num_pruned(shape[1], Selection(ratio))
        selection = Selection(ratio)
        times = {name: [] for name in ("copy_", "antidote_fast", *PEERS)}
        for _ in range(rounds if not resident else rounds * 10):
            for target, source in zip(targets, sources, strict=True):
                times["copy_"].append(common.timed(target.copy_, source))
            for target in targets:
                times["antidote_fast"].append(
                    common.timed(ours, target, norm, k, selection, backend)
                )
        for name, (peer, runs) in PEERS.items():
            for i in range(runs):
                target = targets[i % count].copy_(sources[i % count])
                times[name].append(common.timed(peer, target, norm, k))
        rows += _rows(shape, dtype, ratio, count, times)
    return rows


def _rows(shape, dtype, ratio, count, times):
    """One row an implementation; ratios are of medians in this run."""
    medians = {name: common.percentile(seconds, 0.5) for name, seconds in times.items()}
    moved = shape[0] * shape[1] * dtype.itemsize * 2  # floor: read and written once
    rows = []
    for name, seconds in times.items():
        row = {
            "shape": f"{shape[0]}x{shape[1]}",
            "dtype": str(dtype).removeprefix("torch."),
            "ratio": ratio,
            "rotated": count,
            "name": name,
            **common.summary(seconds),
            "GB/s": round(moved / medians[name] / 1e9, 1),
            "x copy_": round(medians[name] / medians["copy_"], 2),
        }
        if name != "antidote_fast":
            row["ours is faster x"] = round(medians[name] / medians["antidote_fast"], 1)
        common.show(row)
        rows.append(row)
    return rows


def main():
    options = common.parser(__doc__)
    options.add_argument("--backend", default=None)
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument("--ratio", type=float, nargs="+", default=RATIOS)
    options.add_argument("--shape", nargs="+", help="such as 4096x11008")
    options.add_argument("--resident", action="store_true", help="time one matrix over and over")
    options.add_argument("--rounds", type=int, default=2, help="turns of the rotation")
    args = options.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else SHAPES
    rows = []
    for shape in shapes:
        dtype = DTYPES[args.dtype]
        rows += bench(shape, dtype, args.ratio, args.backend, args.resident, args.rounds)
    common.finish("prune_resident" if args.resident else "prune", rows, args.save)


if __name__ == "__main__":
    main()
