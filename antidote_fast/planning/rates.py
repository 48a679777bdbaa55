"""How much a second does on this machine, by a little work like that of a stage; nothing stays."""

import contextlib
import copy
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable

import torch

from antidote_fast import ops
from antidote_fast.files.commit import nearest_folder, os_errors
from antidote_fast.planning.cost import ModelCost
from antidote_fast.selection import Selection

_SECONDS = 0.15  # of each measurement, or one turn of it
_BYTES = 32 << 20
_FLOPS = 4e9  # of one turn: half a second on a slow core
_WEIGHTS = 1 << 22
_MAX_MODEL_BYTES = 1 << 30  # of the blocks that are tried


def block_rate(
    cost: ModelCost,
    device: torch.device,
    batch: int,
    length: int,
    trains: bool = False,
    adapt: Callable | None = None,
) -> float:
    """FLOPs a second of two blocks of the model; of a matrix product where they cannot be made.

    Args:
        cost: of the stage's model.
        device: of the model.
        batch, length: sequences and tokens of the largest batch.
        trains: forwards and back, of a model that ``adapt`` puts an adapter on, or of all weights.
    """
    with contextlib.suppress(Exception):  # a foreign model's own code; the estimate is coarser then
        blocks = _two_blocks(cost, device, trains, adapt)
        if blocks is not None:
            return _model_rate(*blocks, batch, length, trains)
    return _product_rate(cost, device, batch * length)


def _two_blocks(cost, device, trains=False, adapt=None):
    """(a live model like that of ``cost``, two blocks deep, its cost); None of too large blocks."""
    inner = cost.model.get_base_model() if hasattr(cost.model, "get_base_model") else cost.model
    config = copy.deepcopy(inner.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, 64, None
    with torch.device("meta"):
        model = type(inner)(config)
    dtype = torch.float32 if trains and adapt is None else cost.dtype
    if sum(p.numel() for p in model.parameters()) * dtype.itemsize > _MAX_MODEL_BYTES:
        return None
    model = model.to(dtype)
    if trains:
        model = model if adapt is None else adapt(model).to("meta")
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
    wanted = batch * length
    flops = small.training if trains else small.forward
    tokens = min(wanted, max(8, int(_FLOPS / flops.of(1, 1, 1))))
    while True:
        count = max(1, min(batch, tokens // length))
        run, amount = _turn(model, small, count, min(tokens, length), trains)
        run()  # the first call chooses kernels
        start = time.perf_counter()
        enough = _SECONDS if tokens >= wanted else 0.0
        rate = _rate(run, amount, model.device, enough)
        if tokens >= wanted or time.perf_counter() - start > 2 * _SECONDS:
            return rate
        tokens = min(4 * tokens, wanted)


def _turn(model, small, batch, length, trains):
    """(a pass through the blocks, its FLOPs)."""
    ids = torch.zeros((batch, length), dtype=torch.int64, device=model.device)
    lower = trains and small.dtype != torch.float32

    def run():
        with torch.set_grad_enabled(trains), torch.autocast(ids.device.type, small.dtype, lower):
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        if trains:
            loss.backward()

    flops = small.training if trains else small.forward
    return run, flops.of(ids.numel(), ids.numel() * length, ids.numel())


def _product_rate(cost, device, tokens):
    rows, columns = min(cost.largest[0], 4096), min(cost.largest[1], 16384)
    tokens = max(1, min(tokens, int(_FLOPS / (2 * rows * columns))))
    weight = torch.ones((rows, columns), dtype=cost.dtype, device=device)
    x = torch.ones((tokens, columns), dtype=cost.dtype, device=device)
    torch.nn.functional.linear(x, weight)  # the first call chooses kernels
    return _rate(lambda: torch.nn.functional.linear(x, weight), 2 * weight.numel() * tokens, device)


def prune_rate(
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    selection: Selection,
    backend: str | None,
) -> float:
    """Weights a second scored, selected and removed; global scope is timed as tensor scope."""
    rows = max(1, _WEIGHTS // columns)
    if selection.scope == "global":
        selection = Selection(selection.ratio, largest=selection.largest, scope="tensor")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((rows, columns), generator=generator).to(device, dtype)
    norm = torch.rand(columns, generator=generator).to(device)

    def prune():
        ops.prune_mask(weight, norm, selection, backend=backend)

    prune()
    return _rate(prune, rows * columns, device)


def read_rate(file) -> float:
    """Bytes a second from a file, or from the page cache where it is there."""
    buffer = bytearray(min(_BYTES, os.path.getsize(file)))

    def read():
        with open(file, "rb", buffering=0) as handle:
            handle.readinto(buffer)

    return _rate(read, len(buffer))


def write_rate(output) -> float:
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


def _rate(work, amount, device=None, enough=None):
    """``amount`` a second, from turns of ``work`` until they have taken long enough."""
    on_gpu = device is not None and device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    turns, start = 0, time.perf_counter()
    while True:
        work()
        wait()
        turns += 1
        seconds = time.perf_counter() - start
        if seconds >= (_SECONDS if enough is None else enough):
            return amount * turns / max(seconds, 1e-9)
