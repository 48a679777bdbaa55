"""How fast this machine is, from a little work like that of a stage; nothing is left behind."""

import copy
import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from antidote_fast import ops
from antidote_fast.files.commit import os_errors
from antidote_fast.selection import Selection

_SECONDS = 0.15  # of each measurement, or one turn of it
_BYTES = 32 << 20
_FLOPS = 4e9  # of one turn: half a second on a slow core
_WEIGHTS = 1 << 22
_MAX_MODEL_BYTES = 1 << 30  # of the blocks that are tried


@dataclass(frozen=True)
class Rates:
    """What one second does.

    Args:
        flops: of whole batches through the model's own blocks (training: and back).
        flops_decoding: of one token a sequence through them.
        read, write, digest: bytes; from the weights' file (or the page cache, where it is there),
            to the output's disk and flushed, through SHA-256.
        prune: weights scored, selected and removed.
    """

    flops: float
    flops_decoding: float
    read: float
    write: float
    digest: float
    prune: float


def measure(cost, *, shape, training, device, dtype, columns, file, folder, selection, backend):
    """The :class:`Rates` of this machine, in a second or a few.

    Args:
        cost: the :class:`~antidote_fast.planning.cost.ModelCost` of the stage's model, or None
            where no model is loaded.
        shape: (sequences, tokens) of the largest batch.
        training: None, or {"frozen": ..., "adapt": ...} of a training: whether the base model is
            frozen, and what puts the adapter on a model.
        device, dtype: of the model and the pruning.
        columns: of the weights that are pruned.
        file: a file to read from.
        folder: the output folder, or where it will be.
        selection: a :class:`Selection`; global scope is timed as tensor scope.
        backend: as in :mod:`antidote_fast.ops`.
    """
    batch, length = shape
    return Rates(
        flops=_block_rate(cost, device, batch, length, training) if cost else 1.0,
        flops_decoding=_block_rate(cost, device, batch, 1, None) if cost else 1.0,
        read=_read_rate(file),
        write=_write_rate(folder),
        digest=_rate(lambda data=bytes(_BYTES // 4): hashlib.sha256(data), _BYTES // 4),
        prune=_prune_rate(device, dtype, columns, selection, backend),
    )


def _block_rate(cost, device, batch, length, training):
    """FLOPs a second of two blocks of the model; of a matrix product where they cannot be made."""
    try:
        small = _two_blocks(cost, device, training)
        if small is None:
            return _product_rate(cost, device, batch * length)
        return _model_rate(small, device, batch, length, training)
    except Exception:  # a foreign model's own code; the estimate is coarser then, no more
        return _product_rate(cost, device, batch * length)


def _two_blocks(cost, device, training):
    """The :class:`ModelCost` of a live model like that of ``cost``, two blocks deep."""
    inner = cost.model.get_base_model() if hasattr(cost.model, "get_base_model") else cost.model
    config = copy.deepcopy(inner.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, 64, None
    with torch.device("meta"):
        model = type(inner)(config)
    itemsize = 4 if training and not training["frozen"] else cost.dtype.itemsize
    if sum(p.numel() for p in model.parameters()) * itemsize > _MAX_MODEL_BYTES:
        return None
    model = model.to(cost.dtype if itemsize == cost.dtype.itemsize else torch.float32)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    if training:
        model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
        model = training["adapt"](model) if training["frozen"] else model
        model.train()
    return type(cost)(model, cost.dtype)


def _model_rate(small, device, batch, length, training):
    """From one sequence or less to the whole batch, as far as a turn stays short."""
    wanted = batch * length
    tokens = min(wanted, max(8, int(_FLOPS / small.forward_flops(1, 1, 1))))
    while True:
        count = max(1, min(batch, tokens // length))
        run, flops = _turn(small, device, count, min(tokens, length), training)
        run()  # the first call chooses kernels
        start = time.perf_counter()
        rate = _rate(run, flops, _waiter(device), enough=_SECONDS if tokens >= wanted else 0.0)
        if tokens >= wanted or time.perf_counter() - start > 2 * _SECONDS:
            return rate
        tokens = min(4 * tokens, wanted)


def _turn(small, device, batch, length, training):
    """(a pass through the blocks, its FLOPs)."""
    tokens, squares = batch * length, batch * length**2
    ids = torch.zeros((batch, length), dtype=torch.int64, device=device)

    def forward():
        with torch.no_grad():
            small.model(input_ids=ids, use_cache=False)

    def step():
        with torch.autocast(device.type, small.dtype, enabled=small.dtype != torch.float32):
            loss = small.model(input_ids=ids, use_cache=False).logits.float().square().mean()
        loss.backward()

    if training:
        frozen = training["frozen"]
        return step, small.training_flops(tokens, squares, tokens, frozen=frozen)
    return forward, small.forward_flops(tokens, squares, tokens)


def _rate(work, amount, wait=lambda: None, enough=None):
    """``amount`` a second, from turns of ``work`` until they have taken long enough."""
    wait()
    turns, start = 0, time.perf_counter()
    while True:
        work()
        wait()
        turns += 1
        seconds = time.perf_counter() - start
        if seconds >= (_SECONDS if enough is None else enough):
            return amount * turns / max(seconds, 1e-9)


def _product_rate(cost, device, tokens):
    rows, columns = min(cost.largest[0], 4096), min(cost.largest[1], 16384)
    tokens = max(1, min(tokens, int(_FLOPS / (2 * rows * columns))))
    weight = torch.ones((rows, columns), dtype=cost.dtype, device=device)
    x = torch.ones((tokens, columns), dtype=cost.dtype, device=device)
    torch.nn.functional.linear(x, weight)  # the first call chooses kernels
    return _rate(
        lambda: torch.nn.functional.linear(x, weight), 2 * weight.numel() * tokens, _waiter(device)
    )


def _prune_rate(device, dtype, columns, selection, backend):
    rows = max(1, _WEIGHTS // columns)
    if selection.scope == "global":
        selection = Selection(selection.ratio, largest=selection.largest, scope="tensor")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((rows, columns), generator=generator).to(device, dtype)
    norm = torch.rand(columns, generator=generator).to(device)

    def prune():
        ops.prune_mask(weight, norm, selection, backend=backend)

    prune()
    return _rate(prune, rows * columns, _waiter(device))


def _read_rate(file):
    size = min(_BYTES, os.path.getsize(file))
    buffer = bytearray(size)

    def read():
        with open(file, "rb", buffering=0) as handle:
            handle.readinto(buffer)

    return _rate(read, size)


def _write_rate(output):
    folder = Path(output).absolute()
    folder = next(p for p in (folder, *folder.parents) if p.is_dir())
    # A part of what is free: the disk may be small, and others write to it too.
    data = bytes(max(4096, min(_BYTES, shutil.disk_usage(folder).free // 8)))
    # Without a name, gone when closed.
    with os_errors(output, any_number=True), tempfile.TemporaryFile(dir=folder) as handle:

        def write():
            handle.seek(0)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())

        return _rate(write, len(data))


def _waiter(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
