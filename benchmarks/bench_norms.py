"""Sums of squares of an activation against what users run today, on the CPU.

Peers, in the same run: ``x.float().square().sum(0)``, the official codes' transposed fp32 norm, and
a read-only pass (``x.max()``) as the floor. Sums are compared with float64 first, and the memory
that a call allocates with the limit of 1 MB.
"""

import resource

import common
import torch

from antidote_fast import accumulate_sq_norm_

SHAPES = [(2048, 4096), (2048, 11008), (512, 576), (100, 4096)]


def float_square(x, sums):
    """One fp32 copy, one fp32 square, one sum."""
    sums += x.float().square().sum(0)


def official(x, sums):
    """As Wanda and the official Antidote code: transpose, fp32, norm over tokens, square."""
    sums += torch.norm(x.t().float(), p=2, dim=1) ** 2


def read_only(x, sums):
    """Reads every element once."""
    x.max()


PEERS = {
    "x.float().square().sum(0)": float_square,
    "official transposed norm": official,
    "read only (max)": read_only,
}


def check(x, backend):
    """Within 1e-6 of float64, in under 1 MB beyond what the process has already held."""
    sums = torch.zeros(x.shape[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accumulate_sq_norm_(sums, x, backend=backend)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown <= 1024, f"the peak grew by {grown} KB"
    torch.testing.assert_close(sums.double(), x.double().square().sum(0), rtol=1e-6, atol=0)


def bench(shape, backend, rounds):
    """Rows of one shape, all implementations in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16()
    sums = torch.zeros(shape[1])
    check(x, backend)
    times = {name: [] for name in ("antidote_fast", *PEERS)}
    for _ in range(rounds):
        for _ in range(5):
            seconds = common.timed(lambda: accumulate_sq_norm_(sums, x, backend=backend))
            times["antidote_fast"].append(seconds)
        for name, peer in PEERS.items():
            times[name].append(common.timed(peer, x, sums))
    ours = common.percentile(times["antidote_fast"], 0.5)
    rows = []
    for name, seconds in times.items():
        median = common.percentile(seconds, 0.5)
        row = {
            "shape": f"{shape[0]}x{shape[1]}",
            "dtype": "bfloat16",
            "name": name,
            **common.summary(seconds),
            "GB/s": round(x.numel() * x.element_size() / median / 1e9, 1),
        }
        if name != "antidote_fast":
            row["ours is faster x"] = round(median / ours, 1)
        common.show(row)
        rows.append(row)
    return rows


def main():
    options = common.parser(__doc__)
    options.add_argument("--backend", default=None)
    options.add_argument("--rounds", type=int, default=20)
    args = options.parse_args()
    rows = [row for shape in SHAPES for row in bench(shape, args.backend, args.rounds)]
    common.finish("norms", rows, args.save)


if __name__ == "__main__":
    main()
