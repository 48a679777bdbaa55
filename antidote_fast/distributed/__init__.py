"""Ranks: torchrun's processes, and FSDP2's."""

from antidote_fast.distributed.ranks import ALONE, World, session, world

__all__ = ["ALONE", "World", "session", "world"]
