"""How much a second does on this machine, by a little work like that of a stage; nothing stays."""

import contextlib
import copy
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from antidote_fast import ops
from antidote_fast.files.commit import nearest_folder, os_errors
from antidote_fast.planning.cost import ModelCost
from antidote_fast.selection import Selection

_SECONDS = 0.15  # of each measurement, or one turn of it
_BYTES = 32 << 20
_FLOPS = 4_000_000_000  # of one turn: half a second on a slow core
_WEIGHTS = 1 << 22
_MAX_MODEL_BYTES = 1 << 30  # of the blocks that are tried


def block_rate(
    cost: ModelCost,
    device: torch.device,
    shape: tuple[int, int],
    trains: bool = False,
    adapt: Callable | None = None,
) -> float:
    """FLOPs a second of two blocks of the model; of a matrix product where they cannot be made.

    Args:
        cost: of the stage's model.
        device: of the model.
        shape: sequences and tokens of the largest batch.
        trains: forwards and back, of a model that ``adapt`` puts an adapter on, or of all weights.
    """
    with contextlib.suppress(Exception):  # a foreign model's own code; the estimate is coarser then
        return _model_rate(*_two_blocks(cost, device, trains, adapt), *shape, trains)
    weight = torch.ones((1024, 1024), dtype=cost.dtype, device=device)
    x = weight[: math.prod(shape)]
    return _rate(lambda: x @ weight, 2 * len(weight) * x.numel())


def _two_blocks(cost, device, trains=False, adapt=None):
    """(a live model like that of ``cost``, two blocks deep, its cost)."""
    config = copy.deepcopy(cost.inner.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, 64, None
    with torch.device("meta"):
        model = type(cost.inner)(config)
    model = model.to(torch.float32 if trains and adapt is None else cost.dtype)
    if sum(p.nbytes for p in model.parameters()) > _MAX_MODEL_BYTES:
        raise MemoryError("the blocks are too large to be tried")
    if trains and adapt is not None:
        model = adapt(model).to("meta")
    small = ModelCost(copy.deepcopy(model), cost.dtype)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    if trains:
        model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    return model.train(trains), small


def _model_rate(model, small, batch, length, trains):
    """From one sequence or less to the whole batch, as far as a turn stays short."""
    wanted, flops = batch * length, small.training if trains else small.forward
    tokens = min(wanted, max(8, _FLOPS // flops.of(1, 1, 1)))
    while True:
        shape = max(1, min(batch, tokens // length)), min(tokens, length)
        ids = torch.zeros(shape, dtype=torch.int64, device=model.device)
        amount = flops.of(ids.numel(), ids.numel() * shape[1], ids.numel())
        rate = _rate(lambda ids=ids: _turn(model, small.dtype, ids, trains), amount)
        if tokens >= wanted or amount / rate > 2 * _SECONDS:
            return rate
        tokens = min(4 * tokens, wanted)


def _turn(model, dtype, ids, trains):
    lower = trains and dtype != torch.float32
    with torch.set_grad_enabled(trains), torch.autocast(ids.device.type, dtype, lower):
        loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
    if trains:
        loss.backward()


def prune_rate(
    device: torch.device, dtype: torch.dtype, columns: int, selection: Selection, backend: str
) -> float:
    """Weights a second scored, selected and removed of one matrix."""
    rows = max(1, _WEIGHTS // columns)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((rows, columns), generator=generator).to(device, dtype)
    norm = torch.rand(columns, generator=generator).to(device)
    prune = ops.prune_mask
    return _rate(lambda: prune(weight, norm, selection, backend=backend), rows * columns)


def read_rate(file: Path) -> float:
    """Bytes a second from a file, or from the page cache where it is there."""
    buffer = bytearray(min(_BYTES, os.path.getsize(file)))

    def read():
        with open(file, "rb", buffering=0) as handle:
            handle.readinto(buffer)

    return _rate(read, len(buffer))


def write_rate(output: str) -> float:
    """Bytes a second through SHA-256 and to the disk of a folder to be, flushed."""
    folder = nearest_folder(output)
    # A part of what is free: the disk may be small, and others write to it too.
    data = bytes(max(4096, min(_BYTES, shutil.disk_usage(folder).free // 8)))
    # Without a name, gone when closed.
    with os_errors(output, any_number=True), tempfile.TemporaryFile(dir=folder) as handle:

        def write():
            hashlib.sha256(data)
            handle.seek(0)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())

        return _rate(write, len(data))


def _rate(work, amount):
    """``amount`` a second, from turns of ``work`` until they have taken long enough."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    work()  # the first call chooses kernels
    wait()
    turns, start = 0, time.perf_counter()
    while turns == 0 or time.perf_counter() - start < _SECONDS:
        work()
        wait()
        turns += 1
    return amount * turns / max(time.perf_counter() - start, 1e-9)
