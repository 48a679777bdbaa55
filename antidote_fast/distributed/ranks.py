"""Several processes, one calibration: torchrun's ranks, what they agree on, and sums over them.

The statistic is a sum, so ranks that hold samples of their own meet once: one all-reduce of their
float64 sums, after which each has the same norms, bit for bit. An error of one rank ends a
:meth:`World.together` block on all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from antidote_fast.errors import AntidoteError, DataError, PeerFailed, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# How long a rank waits for another, which may have that much more to calibrate. One that died is
# noticed at once: its connections close, and torchrun ends the others.
TIMEOUT = datetime.timedelta(hours=2)
_MESSAGE_BYTES = 2048
_POLL_SECONDS = 0.0001, 0.05


@dataclass(frozen=True)
class World:
    """The processes that share a piece of work; by default this one alone.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        group: a ``torch.distributed`` process group; None is the default one.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def shard(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of a sequence: every ``size``-th item, from ``rank`` on.

        The parts are disjoint and make up the whole. Where there are fewer items than ranks some
        parts are empty.
        """
        return items if self.size == 1 else items[self.rank :: self.size]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks leave alike: well, or each with an error.

        Every rank must come through it. An interrupt (Ctrl-C, SIGTERM) does not wait for others.

        Raises:
            Exception: what went wrong here, on the lowest of the ranks where something did.
            PeerFailed: on the other ranks, with its message and exit code.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            if getattr(caught, "_agreed", False):  # by a block within this one
                raise
            error = caught
        status = None
        if error is not None:
            status = [getattr(error, "exit_code", 1), " ".join(str(error).split())[:300]]
        told = self.gather(json.dumps(status))
        failed = [(rank, json.loads(text)) for rank, text in enumerate(told) if text != "null"]
        if failed:
            self._fail(*failed[0], error)

    def check_same(self, what: str, text: str) -> None:
        """Refuse a text, which the message calls ``what``, that differs between ranks.

        Raises:
            DataError: it differs (PeerFailed on all ranks but the first).
        """
        if self.size == 1:
            return
        told = self.gather(hashlib.sha256(text.encode()).hexdigest())
        odd = [rank for rank, digest in enumerate(told) if digest != told[0]]
        if odd:
            error = DataError(f"{what}: differ between rank 0 and rank {odd[0]}")
            self._fail(0, [error.exit_code, str(error)], error)

    def all_reduce(self, sums: Sequence[Tensor], op: str = "sum") -> list[Tensor]:
        """Reduce 1-D tensors, of the same lengths on every rank, in float64 and in one collective.

        Args:
            sums: the tensors.
            op: ``"sum"`` or ``"max"``.

        Returns:
            float64 tensors on the CPU, the same bits on every rank.
        """
        import torch
        from torch import distributed as dist

        flat = torch.cat([part.detach().to("cpu", torch.float64) for part in sums])
        if self.size > 1:
            device = self._device()
            sent = flat.to(device)
            how = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
            self._wait(lambda: dist.all_reduce(sent, how, group=self.group, async_op=True))
            flat = sent.cpu()
        return list(flat.split([part.numel() for part in sums]))

    def gather(self, text: str) -> list[str]:
        """The short text of every rank, in order of ranks.

        Raises:
            AntidoteError: a rank is gone, or did not come in time.
        """
        import torch
        from torch import distributed as dist

        if self.size == 1:
            return [text]
        data = text.encode("utf-8", "replace")
        if len(data) > _MESSAGE_BYTES:
            raise ValueError(f"text of {len(data)} bytes: at most {_MESSAGE_BYTES}")
        data = torch.frombuffer(bytearray(data.ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        data = data.to(self._device())
        told = [torch.empty_like(data) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(told, data, group=self.group, async_op=True))
        return [bytes(part.tolist()).decode("utf-8").rstrip() for part in told]

    def _fail(self, rank, status, error):
        """Raise ``error`` on ``rank``, and on the others that it failed there."""
        if rank != self.rank:
            error = PeerFailed(f"rank {rank}: {status[1]}", status[0])
        error._agreed = True
        raise error

    def _device(self):
        """Where tensors of this group's collectives live: the CPU where it can."""
        import torch
        from torch import distributed as dist

        if "cpu:" in str(dist.get_backend_config(self.group)):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _wait(self, start):
        """Run a collective and look at it now and then, so that signals are obeyed meanwhile."""
        try:
            work = start()
            pause, longest = _POLL_SECONDS
            while not work.is_completed():
                time.sleep(pause)
                pause = min(1.5 * pause, longest)
            work.wait()
        except RuntimeError as error:
            gone = PeerFailed if self.rank else AntidoteError  # told once, if rank 0 still lives
            raise gone("another rank is gone, or did not come in time") from error


ALONE = World()
"""This process by itself."""


def ranks_launched() -> tuple[int, int]:
    """(rank, number of ranks) that torchrun gave this process; (0, 1) without it.

    Raises:
        UsageError: RANK and WORLD_SIZE that make no sense.
    """
    rank, size = (_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size > 1 and "RANK" not in os.environ:
        return 0, 1  # a scheduler's variable, but no launch
    if not 0 <= rank < max(size, 1):
        raise UsageError(f"RANK={rank}: must be at least 0 and less than WORLD_SIZE={size}")
    return rank, max(size, 1)


def world(group: Any = None) -> World:
    """The ranks of a process group that exists; :data:`ALONE` where there is none.

    Args:
        group: a process group; None is the default one.
    """
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(group), dist.get_world_size(group), group)


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """The ranks that torchrun started, met and parted again; yields a :class:`World`.

    gloo on CPUs; on GPUs nccl as well, and this process's current GPU is that of its LOCAL_RANK. A
    process group that exists already is used and left as it is. Without torchrun: :data:`ALONE`.

    Args:
        device: as the stages take it: auto, cpu or cuda.

    Raises:
        UsageError: a device with an index, or more ranks than GPUs on a machine.
        AntidoteError: the ranks do not find each other.
    """
    import torch
    from torch import distributed as dist

    _, size = ranks_launched()
    if size == 1 or dist.is_initialized():
        yield world()
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.partition(":")[0] == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise AntidoteError(f"the ranks of torchrun do not meet: {text:.200}") from error
    try:
        met = world()
        with met.together():
            if on_gpu:
                _take_gpu(device)
        yield met
    finally:
        dist.destroy_process_group()


def _take_gpu(device):
    import torch

    if device != "cuda":
        raise UsageError(
            f"device={device!r}: must be auto, cuda or cpu with torchrun, which gives each "
            "rank a GPU of its own"
        )
    number, count = _environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if not 0 <= number < count:
        raise UsageError(
            f"LOCAL_RANK={number}: this machine has {count} GPUs; start at most one rank a GPU "
            "(--nproc_per_node)"
        )
    torch.cuda.set_device(number)


def _environment(name, default):
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UsageError(f"{name}={text!r}: must be an integer") from None
