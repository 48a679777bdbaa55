"""RMSNorm and SwiGLU that sum squares as they write, against the two things done one by one.

In the same run and in turn: ``copy_`` of the output, the module as transformers computes it,
torch's own ``rms_norm``, either followed by ``accumulate_sq_norm_``, and ours. Outputs and sums are
compared first; no time is printed for what differs. Needs a GPU (or TRITON_INTERPRET=1 and tiny
shapes).
"""

import common
import torch
from torch.nn import functional

from antidote_fast import accumulate_sq_norm_
from antidote_fast.errors import BackendUnavailable
from antidote_fast.norms import fusion

EPS = 1e-5
SHAPES = {
    "rms_norm": ["5000x4096", "1600x4096", "5000x8192"],
    "swiglu": ["5000x11008", "1600x11008", "5000x14336"],
}


def llama_rms_norm(x, weight):
    """As ``LlamaRMSNorm``: fp32 inside, rounded before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def torch_rms_norm(x, weight):
    """Torch's fused one, which rounds once."""
    return functional.rms_norm(x, weight.shape, weight, EPS)


def llama_swiglu(gate, up):
    """As ``LlamaMLP``: two kernels."""
    return functional.silu(gate) * up


def kinds(name):
    """({label: what users run}, ours, tensors read) of an operation."""
    from antidote_fast.backends.triton_kernels import fused

    if name == "swiglu":
        return {"transformers": llama_swiglu}, lambda g, u: fused.swiglu(g, u, None), 2
    separate = {"transformers": llama_rms_norm, "torch": torch_rms_norm}
    return separate, lambda x, w: fused.rms_norm(x, w, EPS, None), 1


def check(separate, ours, x, second):
    """The output within 2 units in the last place, the sums those of the output."""
    expected = separate["transformers"](x, second)
    output, sums = ours(x, second)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(output, expected, rtol=2 * eps, atol=eps * 1e-3)
    torch.testing.assert_close(sums.double(), output.double().square().sum(0), rtol=1e-5, atol=0)


def bench(name, shape, args, report):
    """Rows of one operation and shape."""
    separate, ours, tensors = kinds(name)
    generator = torch.Generator(args.device).manual_seed(0)
    options = {"generator": generator, "device": args.device, "dtype": common.DTYPES[args.dtype]}
    x = torch.randn(shape, **options)
    second = torch.randn(shape if name == "swiglu" else shape[1:], **options)
    check(separate, ours, x, second)
    count = args.rotated or common.rotation(tensors * x.nbytes, args.device, 2)
    inputs = [x.roll(i, 0) for i in range(count)]
    seconds = [second.roll(i, 0) if name == "swiglu" else second for i in range(count)]
    outputs = [torch.empty_like(x) for _ in range(count)]
    sums = torch.zeros(shape[1], device=args.device)

    def then_sum(call):
        return lambda i: accumulate_sq_norm_(
            sums, call(inputs[i], seconds[i]), backend=args.backend
        )

    turns = {"copy_": lambda i: outputs[i].copy_(inputs[i])}
    for label, call in separate.items():
        turns[f"{label} alone"] = lambda i, call=call: call(inputs[i], seconds[i])
        turns[f"{label} + accumulate_sq_norm_"] = then_sum(call)
    turns["antidote_fast"] = lambda i: ours(inputs[i], seconds[i])
    watch = common.Stopwatch(args.device)
    common.take_turns(watch, turns, count, args.runs)
    moved = {"copy_": 2 * x.nbytes}
    for label in watch:
        median = watch.median(label)
        speed = moved.get(label, (tensors + 1) * x.nbytes) / median
        row = {
            "operation": name,
            "shape": f"{shape[0]}x{shape[1]}",
            "dtype": args.dtype,
            "rotated": count,
            "name": label,
            **watch.row(label),
            "GB/s": round(speed / 1e9, 1),
            "% of copy_": round(100 * speed / (moved["copy_"] / watch.median("copy_")), 1),
        }
        if label != "antidote_fast":
            row["ours is faster x"] = round(median / watch.median("antidote_fast"), 2)
        report.add(row)


def main(argv=None):
    options = common.parser(__doc__)
    options.add_argument("--operation", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--shape", nargs="+", help="tokens x channels, such as 5000x4096")
    options.add_argument("--dtype", choices=common.DTYPES, default="bf16")
    options.add_argument("--rotated", type=int, help="how many inputs take turns")
    options.add_argument("--runs", type=int, default=50)
    args = common.parsed(options, argv)
    report = common.Report("fusion", args)
    try:
        fusion.check_fuse(args.device.type, "rms")
    except BackendUnavailable as error:
        report.note(why=str(error))
        return
    for name in args.operation:
        for shape in map(common.shape_of, args.shape or SHAPES[name]):
            bench(name, shape, args, report)
    report.finish()


if __name__ == "__main__":
    main()
