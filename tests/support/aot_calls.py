"""What the backend is asked for in production: the calls that ``aot`` records.

Tensors are empty CPU ones of real models' shapes: only their shapes, dtypes and alignment count.
"""

import torch

from antidote_fast import Selection
from antidote_fast.backends.operand import Operand

# in_features of Llama-2/3, Mistral, Gemma-2, Qwen2.5; LoRA ranks; odd and synthetic ones.
COLUMNS = (8, 16, 64, 128, 256, 257, 1000, 1024, 3584, 4096, 4608, 8192, 11008, 14336, 16384)
COLUMNS += (18944, 28672, 29568, 36864, 65536)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (8, 16, 64, 256)
LINEARS = {"qkv": [(4096, 4096)] * 3, "all": [(4096, 4096)] * 4 + [(11008, 4096)] * 2}
LINEARS["all"].append((4096, 11008))
ROWS = 4096


def calls(every=False):
    """(label, call) pairs; those that a test has time for, or ``every`` shape and option."""
    yield from _rows(every)
    yield from _groups(every)
    yield from _lists(every)
    yield from _whole(every)
    yield from _elementwise(every)
    yield from _norms(every)
    yield from _fused(every)


def _rows(every):
    """Row scope by K, dtype and what takes part."""
    some = {
        (64, "bf16"),
        (257, "bf16"),
        (1024, "bf16"),
        (4096, "bf16"),
        (4096, "fp16"),
        (4096, "fp32"),
        (11008, "bf16"),
        (14336, "bf16"),
        (28672, "bf16"),
    }
    for columns in COLUMNS:
        for dtype in DTYPES:
            if every or (columns, dtype) in some:
                yield f"row {dtype} {columns}", prune(columns, dtype)
            for name, options in OPTIONS.items():
                if every or (columns, dtype) == (4096, "bf16"):
                    yield f"row {dtype} {columns} {name}", prune(columns, dtype, **options)
    yield "row bf16 4096 unaligned", prune(4096, "bf16", padding=1)
    yield "row bf16 28672 preserve", prune(28672, "bf16", preserve=True)


OPTIONS = {
    "everything": {"bits": True, "thresholds": True, "base": True},
    "mask only": {"bits": True, "write": False},
    "delta": {"selection": Selection(0.05, score_delta=True), "base": True},
    "preserve": {"preserve": True},
    "smallest": {"selection": Selection(0.5, largest=False)},
    "no norm": {"norm": False},
}


def _groups(every):
    pairs = ((2, 4), (1, 4), (4, 8), (3, 16), (7, 32), (2, 3)) if every else ((2, 4), (3, 16))
    for removed, group in pairs:
        for dtype in DTYPES if every else ("bf16",):
            selection = Selection(n_m=(removed, group))
            label = f"{removed}:{group} {dtype} 4096"
            yield label, prune(4096, dtype, selection=selection, bits=True)


def _lists(every):
    """Adapters: every A and B of a layer in one call."""
    for name, shapes in LINEARS.items():
        for rank in RANKS if every else (16, 256):
            for dtype in DTYPES if every else ("bf16",):
                if every or name == "all":
                    factors = [s for n, k in shapes for s in ((rank, k), (n, rank))]
                    label = f"lora r={rank} {name} {dtype}"
                    yield label, prune_list(factors, dtype, Selection(0.05))
    yield (
        "lora r=16 qkv preserve",
        prune_list([(16, 4096), (4096, 16)], "bf16", Selection(0.05), preserve=True),
    )


def _whole(every):
    """Tensor and global scope."""
    pair = [(4096, 4096)] * 2
    for scope in ("tensor", "global"):
        selection = Selection(0.05, scope=scope)
        delta = Selection(0.05, scope=scope, score_delta=True)
        for dtype in DTYPES if every else ("bf16",):
            for shape in ((4096, 4096), (4096, 11008), (28672, 8192), (4096, 257), (4096, 16)):
                if every or shape == (4096, 4096) or (scope, shape[1]) == ("tensor", 257):
                    label = f"{scope} {dtype} {shape[1]}"
                    yield label, prune_list([shape] * 2, dtype, selection)
            yield (
                f"{scope} {dtype} preserve",
                prune_list(pair, dtype, selection, preserve=True),
            )
            if every or scope == "global":
                yield f"{scope} {dtype} delta", prune_list(pair, dtype, delta)


def _elementwise(every):
    from antidote_fast.backends import triton as backend

    for columns in (4096, 257) if every else (4096,):
        for dtype in DTYPES if every else ("bf16",):
            weight = matrix(ROWS, columns, dtype)
            norm, base = torch.empty(columns), torch.empty_like(weight)
            bits = bits_of(weight)
            yield f"score {dtype} {columns}", _bound(backend.score, weight, norm, None)
            yield f"score {dtype} {columns} base", _bound(backend.score, weight, norm, base)
            yield f"apply {dtype} {columns}", _bound(backend.apply_mask_, weight, bits, None)
            yield f"apply {dtype} {columns} base", _bound(backend.apply_mask_, weight, bits, base)
        scores = matrix(ROWS, columns, "fp32")
        for scope in ("row", "tensor"):
            arguments = (scores, Selection(0.05, scope=scope), bits_of(scores))
            yield f"select_mask {scope} {columns}", _bound(backend.select_mask, *arguments)
    for columns in (28672, 65536) if every else ():
        scores = matrix(64, columns, "fp32")
        arguments = (scores, Selection(0.05), bits_of(scores))
        yield f"select_mask row {columns}", _bound(backend.select_mask, *arguments)


def _norms(every):
    from antidote_fast.backends import triton as backend

    shapes = ((2048, 4096), (16384, 4096), (2048, 11008), (100, 4096), (1, 4096), (2048, 257))
    for tokens, columns in shapes if every else shapes[:1] + shapes[-1:]:
        for dtype in DTYPES if every else ("bf16",):
            sums, x = torch.empty(columns), matrix(tokens, columns, dtype)
            label = f"norms {dtype} {tokens}x{columns}"
            yield label, _bound(backend.accumulate_sq_norm_, sums, x, None)
            counted = torch.empty(tokens, dtype=torch.bool)
            yield f"{label} masked", _bound(backend.accumulate_sq_norm_, sums, x, counted)


def _fused(every):
    from antidote_fast.backends.triton_kernels import fused

    for dtype in DTYPES if every else ("bf16",):
        for tokens, columns in ((5000, 4096), (1600, 8192)) if every else ((5000, 4096),):
            x, weight = matrix(tokens, columns, dtype), matrix(1, columns, dtype)[0]
            counted = torch.empty(tokens, dtype=torch.bool)
            label = f"rms_norm {dtype} {tokens}x{columns}"
            yield label, _bound(fused.rms_norm, x, weight, 1e-5, None)
            yield f"{label} masked", _bound(fused.rms_norm, x, weight, 1e-5, counted)
        for tokens, columns in ((5000, 11008), (1600, 28672)) if every else ((5000, 11008),):
            gate = matrix(tokens, columns, dtype)
            counted = torch.empty(tokens, dtype=torch.bool)
            label = f"swiglu {dtype} {tokens}x{columns}"
            yield label, _bound(fused.swiglu, gate, gate, None)
            yield f"{label} masked", _bound(fused.swiglu, gate, gate, counted)


def matrix(rows, columns, dtype, padding=0):
    """An empty matrix; ``padding`` elements lie between its rows, and unalign them."""
    return torch.empty(rows, columns + padding, dtype=DTYPES[dtype])[:, :columns]


def bits_of(weight):
    """An empty mask for a weight."""
    rows, columns = weight.shape
    return torch.empty((rows, (columns + 7) // 8), dtype=torch.uint8)


def prune(
    columns,
    dtype,
    *,
    selection=None,
    rows=ROWS,
    norm=True,
    preserve=False,
    base=False,
    write=True,
    bits=False,
    thresholds=False,
    padding=0,
):
    """A call of ``backend.prune`` on one weight."""
    weight = matrix(rows, columns, dtype, padding)

    def call():
        from antidote_fast.backends import triton as backend

        operand = Operand(
            weight,
            torch.empty(columns) if norm else None,
            torch.empty(columns) if preserve else None,
            torch.empty_like(weight) if base else None,
            bits_of(weight) if bits else None,
            torch.empty(rows) if thresholds else None,
        )
        backend.prune([operand], selection or Selection(0.05), write=write)

    return call


def prune_list(shapes, dtype, selection, preserve=False):
    """A call of ``backend.prune`` on a list."""
    weights = [matrix(*shape, dtype) for shape in shapes]

    def call():
        from antidote_fast.backends import triton as backend

        operands = []
        for weight in weights:
            norm = torch.empty(weight.shape[1])
            base = torch.empty_like(weight) if selection.score_delta else None
            operands.append(
                Operand(weight, norm, norm if preserve else None, base, bits_of(weight))
            )
        backend.prune(operands, selection, write=True)

    return call


def _bound(function, *args):
    return lambda: function(*args)
