"""Backends with a fault, for tests of what finds it out."""

import torch

from antidote_fast import backends, ops
from antidote_fast.backends import reference

WRONG = "the broken backend does not select what the reference does"


class Broken:
    """The reference, with what ``damage`` does to its result."""

    NAME = "broken"
    DEVICE_TYPES = None
    __name__ = "antidote_fast.backends.broken"

    def __init__(self, damage, smallest=0):
        self.damage, self.smallest = damage, smallest

    def prune(self, operands, selection, *, write):
        before = [o.weight.clone() for o in operands]
        reference.prune(operands, selection, write=write)
        for o, original in zip(operands, before, strict=True):
            if o.weight.numel() > self.smallest:
                written = o.weight if write else o.weight.clone()
                self.damage(written, original, o.bits, o.thresholds)

    def apply_mask_(self, weight, bits, base_weight):
        before = weight.clone()
        reference.apply_mask_(weight, bits, base_weight)
        if weight.numel() > self.smallest:
            self.damage(weight, before, bits.clone(), torch.zeros(1))


def install(monkeypatch, damage, **options):
    """Let every prune run the reference with ``damage`` done to its result; returns the backend."""
    module = Broken(damage, **options)
    for place in (backends, ops):
        monkeypatch.setattr(place, "select", lambda name, device: module)
    return module


def swap(weight, before, bits, thresholds):
    """One removed weight too many in the last row, another too few: the count stays."""
    row = reference.unpack_bits(bits[-1:], weight.shape[1])[0]
    off, on = int(row.nonzero()[0]), int((~row).nonzero()[0])
    bits[-1, off // 8] ^= 1 << off % 8
    bits[-1, on // 8] ^= 1 << on % 8
    weight[-1, off], weight[-1, on] = before[-1, off], 0


def one_too_many(weight, before, bits, thresholds):
    row = reference.unpack_bits(bits[:1], weight.shape[1])[0]
    on = int((~row).nonzero()[0])
    bits[0, on // 8] ^= 1 << on % 8
    weight[0, on] = 0


def not_written(weight, before, bits, thresholds):
    weight.copy_(before)


def also_written(weight, before, bits, thresholds):
    weight[0] = 1.0


def nothing(weight, before, bits, thresholds):
    bits.zero_()
    weight.copy_(before)
    thresholds.fill_(float("nan"))


DAMAGES = [swap, one_too_many, not_written, also_written, nothing]
