"""Sums of squares of an activation against what users run today, on the CPU or a GPU.

Peers, in the same run: ``x.float().square().sum(0)``, the official codes' transposed fp32 norm,
``torch.linalg.vector_norm``, and a read-only pass (the largest of x as int32) as the floor. Sums
are compared with float64 first. ``extra_mb`` is the memory that a call takes beyond its result; on
the CPU ours must stay under 1 MB.
"""

import functools
import resource

import common
import torch

from antidote_fast import accumulate_sq_norm_

SHAPES = ["2048x4096", "2048x11008", "512x576", "100x4096"]
SHAPES_ON_GPU = ["2048x4096", "16384x4096", "2048x11008", "1600x4096"]


def float_square(x, sums):
    """One fp32 copy, one fp32 square, one sum."""
    sums += x.float().square().sum(0)


def official(x, sums):
    """As Wanda and the official Antidote code: transpose, fp32, norm over tokens, square."""
    sums += torch.norm(x.t().float(), p=2, dim=1) ** 2


def vector_norm(x, sums):
    """One reduction that reads x as it is."""
    sums += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()


def read_only(x, sums):
    """Reads every element once."""
    common.as_words(x).max()


def add(backend, x, sums):
    """Ours, with one backend."""
    accumulate_sq_norm_(sums, x, backend=backend)


PEERS = {
    "x.float().square().sum(0)": float_square,
    "official transposed norm": official,
    "linalg.vector_norm": vector_norm,
    "read only (int32 max)": read_only,
}


def check(x, backend):
    """Within 1e-6 of float64; on the CPU in under 1 MB beyond what the process has already held."""
    sums = torch.zeros(x.shape[1], device=x.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accumulate_sq_norm_(sums, x, backend=backend)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if x.device.type == "cpu" and backend in (None, "cpu"):
        assert grown <= 1024, f"the peak grew by {grown} KB"
    torch.testing.assert_close(sums.double(), x.double().square().sum(0), rtol=1e-6, atol=0)
    again = accumulate_sq_norm_(torch.zeros_like(sums), x, backend=backend)
    assert torch.equal(sums, again), "two runs differ"


def extra_mb(call, x, sums):
    """Peak device memory that one call takes, in MB; None on a CPU."""
    if x.device.type == "cpu":
        return None
    module = torch.get_device_module(x.device)
    module.synchronize(x.device)
    module.reset_peak_memory_stats(x.device)
    before = module.memory_allocated(x.device)
    call(x, sums)
    return round((module.max_memory_allocated(x.device) - before) / 1e6, 3)


def bench(shape, args, report):
    """Rows of one shape, all implementations in turn."""
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = common.DTYPES[args.dtype]
    x = torch.randn(shape, generator=generator, device=args.device).to(dtype)
    sums = torch.zeros(shape[1], device=args.device)
    for backend in args.ours.values():
        check(x, backend)
    on_cpu = args.device.type == "cpu"
    count = args.rotated or (5 if on_cpu else common.rotation(x.nbytes, args.device, 2))
    # On a CPU activations come straight from a layer: they are in a cache. On a GPU they are not.
    inputs = [x] * count if on_cpu else [x.roll(i, 0) for i in range(count)]
    calls = {name: functools.partial(add, backend) for name, backend in args.ours.items()}
    calls |= PEERS
    memory = {name: extra_mb(call, x, sums) for name, call in calls.items()}
    turns = {name: (lambda i, call=call: call(inputs[i], sums)) for name, call in calls.items()}
    watch = common.Stopwatch(args.device)
    limits = dict.fromkeys(PEERS, 20) if on_cpu else None
    common.take_turns(watch, turns, count, args.runs, limits=limits)
    ours = {name: watch.median(name) for name in args.ours}
    floor = watch.median("read only (int32 max)")
    for name in watch:
        median = watch.median(name)
        row = {
            "shape": f"{shape[0]}x{shape[1]}",
            "dtype": str(dtype).removeprefix("torch."),
            "rotated": len(set(map(id, inputs))),
            "name": name,
            **watch.row(name),
            "GB/s": round(x.nbytes / median / 1e9, 1),
            "% of read only": round(100 * floor / median, 1),
        }
        if memory[name] is not None:
            row["extra_mb"] = memory[name]
        for mine, seconds in ours.items():
            if name not in ours:
                label = mine.replace("antidote_fast", "ours", 1)
                row[f"{label} is faster x"] = round(median / seconds, 2)
        report.add(row)


def main(argv=None):
    options = common.parser(__doc__, several=True)
    options.add_argument("--shape", nargs="+", help="tokens x channels, such as 2048x4096")
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--rotated", type=int, help="how many inputs take turns")
    options.add_argument("--runs", type=int, help="timed calls of each; default 100")
    args = common.parsed(options, argv)
    args.runs = args.runs or 100
    report = common.Report("norms", args)
    args.ours = common.ours(args, report)
    shapes = args.shape or (SHAPES if args.device.type == "cpu" else SHAPES_ON_GPU)
    for shape in map(common.shape_of, shapes):
        bench(shape, args, report)
    report.finish()


if __name__ == "__main__":
    main()
