"""Models that FSDP2 shards over ranks: forwards in step, and rows pruned where they lie.

``torch.distributed.fsdp.fully_shard`` splits each weight along its first dimension, so a row lies
on one rank as a whole and row scope needs to ask nobody. Every rank calls what is here alike.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.selection import Selection


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: spread over ranks, or a copy on each."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def reshard(model: nn.Module) -> None:
    """Give every parameter its shard back where FSDP2 left it whole after a forward.

    Raises:
        DataError: a model inside DistributedDataParallel or FSDP1, which hide its weights.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise DataError(f"model: holds a {kind}; give the model inside, or use fully_shard")
        if _is_fsdp(module):
            module.reshard()


def _is_fsdp(module):
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def local_rows(
    targets: Sequence[Any], evidence: Any, selection: Selection, scores: Sequence[str]
) -> tuple[dict[str, Tensor], World]:
    """What of the targets this rank prunes, every check made that needs more than one rank.

    Args:
        targets, evidence, selection: as :func:`antidote_fast.pruning.prune.prune_model_` has them.
        scores: names of the scores that a rank can tell of its rows alone.

    Returns:
        ({key: the rows that this rank holds, a view}, the :class:`World` of the ranks that share
        them). Where nothing is sharded: the weights themselves, and this process alone.

    Raises:
        UsageError: a scope or score that no rank can tell by itself.
        DataError: a weight that is not sharded by rows; norms that differ between ranks; NaN or
            infinity in a weight, on whichever rank (PeerFailed on the others).
    """
    weights = {target.key: target.weight.detach() for target in targets}
    if not any(is_sharded(weight) for weight in weights.values()):
        return weights, ALONE
    world = shard_world(targets)
    weights = {key: w.to_local() if is_sharded(w) else w for key, w in weights.items()}
    if world.size == 1:
        return weights, ALONE
    saved = "where weights are sharded; or prune the saved checkpoint"
    if selection.n_m is None and selection.scope != "row":
        raise UsageError(f"scope={selection.scope!r}: must be row {saved}")
    if evidence.score not in scores:
        accepted = " or ".join(scores)
        raise UsageError(f"score={evidence.score!r}: must be {accepted} where weights are sharded")
    if evidence.base_weights is not None:
        raise UsageError(f"base_weights: must be left out {saved}")
    for target in targets:
        if target.transposed and is_sharded(target.weight):
            raise DataError(
                f"{target.key}: is saved as (in, out) and sharded over its inputs; prune the saved "
                "checkpoint"
            )
    for name, norms in evidence.named_norms.items():
        world.check_same(f"{name} of the ranks (add them up first)", _digest(norms))
    with world.together():
        for key, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"{key}: holds NaN or infinity")
    return weights, world


def add_up(report: Any, targets: Sequence[Any], world: World) -> Any:
    """Make the figures of a report of :func:`local_rows` those of whole weights, on every rank.

    ``report.masks`` stay those of this rank's rows.
    """
    if world.size == 1:
        return report
    by_key = {target.key: target.weight for target in targets}
    # A weight that is not sharded lies on every rank, and counts once.
    mine = [is_sharded(by_key[layer.key]) or world.rank == 0 for layer in report.layers]
    counts = [
        [getattr(x, name) * own for x, own in zip(report.layers, mine, strict=True)]
        for name in ("zero_weights", "removed", "preserved")
    ]
    sign = -1 if report.largest else 1  # the smallest score removed, or the largest
    edges = [-math.inf if x.threshold is None else sign * x.threshold for x in report.layers]
    seconds = [*(layer.seconds or 0.0 for layer in report.layers), report.seconds]

    def reduced(lists: Sequence[Sequence[float]], op: str) -> list[list[float]]:
        tensors = [torch.tensor(values, dtype=torch.float64) for values in lists]
        return [values.tolist() for values in world.all_reduce(tensors, op)]

    zeros, removed, preserved = reduced(counts, "sum")
    edges, seconds = reduced((edges, seconds), "max")
    for i, layer in enumerate(report.layers):
        weight = by_key[layer.key]
        rows, columns = weight.shape
        report.layers[i] = dataclasses.replace(
            layer,
            shape=(rows, columns),
            removed=int(removed[i]),
            achieved=removed[i] / max(rows * columns, 1),
            threshold=sign * edges[i] if math.isfinite(edges[i]) else None,
            zero_weights=int(zeros[i]),
            num_bytes=weight.numel() * weight.element_size(),
            seconds=None if layer.seconds is None else seconds[i],
            preserved=int(preserved[i]),
        )
    report.seconds = seconds[-1]
    return report


def shard_world(targets: Sequence[Any]) -> World:
    """The ranks over which the rows of the targets are spread; this one alone if none are.

    Raises:
        DataError: a weight that is sharded otherwise than by rows, or over other ranks.
    """
    worlds = {}
    for target in targets:
        world = _row_world(target.weight, target.key) if is_sharded(target.weight) else ALONE
        if world.size > 1:
            worlds.setdefault(world.group.group_name, (world, target.key))
    if len(worlds) > 1:
        (_, first), (_, second), *_ = worlds.values()
        raise DataError(f"{first} and {second} are sharded over different ranks")
    return next((world for world, _ in worlds.values()), ALONE)


def runs_in_step(model: nn.Module, targets: Sequence[Any], world: World) -> bool:
    """Whether forwards of a model are collectives, as FSDP2 makes them.

    Raises:
        UsageError: they are, and ``world`` is one process alone.
        DataError: as :func:`shard_world`; weights that another way of sharding spread.
    """
    if shard_world(targets).size == 1:
        return False
    if not any(_is_fsdp(module) for module in model.modules()):
        raise DataError(
            "model: its weights are sharded, but not by fully_shard; ranks of tensor parallelism "
            "share their batches, which calibration does not understand"
        )
    if world.size == 1:
        raise UsageError(
            "world: must be given where the model is sharded (antidote_fast.distributed.world())"
        )
    return True


def run_in_step(
    batches: Iterable[Mapping[str, Any]],
    collector: Any,
    run: Callable[[Mapping[str, Any]], object],
    world: World,
    device: torch.device,
) -> None:
    """Forwards of a sharded model: as many on every rank, for each of them is a collective.

    A rank that has no more batches goes along with one token that is not counted.

    Args:
        batches: this rank's own.
        collector: the :class:`NormCollector` on the model.
        run: runs one forward of a batch.
        world: all ranks that hold a shard.
        device: where the model takes its inputs.
    """
    rest, counts = iter(batches), False
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    idle = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    while True:
        with world.together():
            if counts:
                collector.finish()
            batch = next(rest, None)
            counts = batch is not None and collector.start(batch)
        if "more" not in world.gather("done" if batch is None else "more"):
            return
        try:
            if counts:
                run(batch)
            else:
                collector.idle()
                run(idle)
        except Exception as error:
            # The others are inside the model's collectives and cannot be told; the end of this
            # process ends them.
            error._agreed = True
            if isinstance(error, torch.OutOfMemoryError):
                oom = AntidoteError("out of memory: use a smaller batch_size or max_seq_length")
                oom._agreed = True
                raise oom from error
            raise


def sampled_rows(
    parameters: Sequence[tuple[str, Tensor]],
    pick: Callable[[tuple[int, ...]], list[int]],
    columns: int,
) -> dict[str, Tensor] | None:
    """A few rows of sharded matrices, the same on every rank, in one collective.

    Returns:
        {name: (rows that ``pick`` gives of a shape, first ``columns``) fp32}, without what is no
        sharded matrix; None where one is sharded otherwise than by rows.
    """
    whole, parts, world = {}, {}, ALONE
    for name, parameter in parameters:
        if not is_sharded(parameter) or parameter.dim() != 2:
            continue
        try:
            its = _row_world(parameter, name)
        except DataError:
            return None
        rows, local = pick(parameter.shape), parameter.detach().to_local()
        if its.size == 1:
            whole[name] = local[rows, :columns].float()
            continue
        if world.size > 1 and world.group.group_name != its.group.group_name:
            return None
        world = its
        start = _first_row(parameter, world)
        part = torch.zeros(len(rows), min(columns, parameter.shape[1]))
        for i, row in enumerate(rows):
            if start <= row < start + len(local):
                part[i] = local[row - start, :columns].float()
        parts[name] = part
    sums = world.all_reduce([part.flatten() for part in parts.values()]) if parts else []
    added = zip(parts.items(), sums, strict=True)
    return whole | {name: values.float().view_as(part) for (name, part), values in added}


def _first_row(weight, world):
    """Number of the first row that a rank holds: ranks hold rows as ``torch.chunk`` deals them."""
    return min(weight.shape[0], world.rank * math.ceil(weight.shape[0] / world.size))


def _row_world(weight, key):
    """The ranks over which a DTensor's rows are spread; this one alone where each has all."""
    from torch.distributed.tensor import Shard

    group = None
    for dim, placement in enumerate(weight.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim != 0 or group is not None:
            raise DataError(
                f"{key}: is placed as {tuple(weight.placements)}; must be sharded by rows (dim 0, "
                "as fully_shard does by itself) or whole on every rank"
            )
        group = weight.device_mesh.get_group(dim)
    if group is None or group.size() == 1:
        return ALONE
    world = World(group.rank(), group.size(), group)
    num_rows = weight.to_local().shape[0]
    rows = min(math.ceil(weight.shape[0] / world.size), weight.shape[0] - _first_row(weight, world))
    if num_rows != rows:
        raise DataError(f"{key}: rank {world.rank} holds {num_rows} rows, not {rows}")
    return world


def _digest(norms):
    digest = hashlib.sha256(f"{norms.num_sequences} {norms.num_tokens}".encode())
    for sums in (norms.sq_sum, norms.norm_sum or {}):
        for key, value in sums.items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
