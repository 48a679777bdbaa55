"""Masks say which weights are removed, with one bit a weight; files hold them by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from antidote_fast.backends.reference import unpack_bits
from antidote_fast.errors import DataError, printable
from antidote_fast.files.checkpoint import read_tensor_file
from antidote_fast.files.tensor_file import TensorFile

FORMAT = "antidote_fast.masks"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A mask over a weight of shape (N, K), in which a bit of 1 marks a removed weight.

    Masks of one shape combine: ``a | b`` removes what either does, ``a & b`` what both do, and
    ``a - b`` what a does and b does not.

    Args:
        bits: uint8 (N, ceil(K/8)); column c is bit c % 8 of byte c // 8, and the bits that pad a
            row's last byte are 0.
        shape: the weight's shape, (N, K).

    Raises:
        TypeError: bits is no uint8 tensor.
        ValueError: bits and shape do not fit each other.
    """

    bits: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Tensor) or self.bits.dtype != torch.uint8:
            is_tensor = isinstance(self.bits, Tensor)
            brief = f"{self.bits.dtype} tensor" if is_tensor else repr(self.bits)
            raise TypeError(f"bits={brief}: must be a uint8 tensor")
        shape = tuple(int(s) for s in self.shape)
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"shape={self.shape!r}: must be (out_features, in_features)")
        expected = (shape[0], (shape[1] + 7) // 8)
        if tuple(self.bits.shape) != expected:
            raise ValueError(
                f"bits of shape {tuple(self.bits.shape)} with shape={shape}: must be {expected}"
            )
        object.__setattr__(self, "shape", shape)

    def to_bool(self) -> Tensor:
        """Return a bool tensor (N, K), True where a weight is removed."""
        return unpack_bits(self.bits, self.shape[1])

    def count(self) -> int:
        """Return how many weights are removed; this waits for the device."""
        if self.bits.device.type == "cpu" and hasattr(np, "bitwise_count"):  # 20 times as fast
            return int(np.bitwise_count(self.bits.numpy()).sum(dtype=np.int64))
        counts = torch.tensor([bin(i).count("1") for i in range(256)], device=self.bits.device)
        return int(sum(counts[rows.long()].sum() for rows in self.bits.split(4096)))

    def to(self, device: torch.device | str) -> "PackedMask":
        """Return the same mask on another device."""
        return PackedMask(self.bits.to(device), self.shape)

    def __or__(self, other: "PackedMask") -> "PackedMask":
        return self._combined(other, torch.bitwise_or)

    def __and__(self, other: "PackedMask") -> "PackedMask":
        return self._combined(other, torch.bitwise_and)

    def __sub__(self, other: "PackedMask") -> "PackedMask":
        return self._combined(other, lambda a, b: a & ~b)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.bits, other.bits.to(self.bits.device))

    __hash__ = None  # type: ignore[assignment]

    def _combined(
        self, other: "PackedMask", op: Callable[[Tensor, Tensor], Tensor]
    ) -> "PackedMask":
        if not isinstance(other, PackedMask):
            return NotImplemented
        if other.shape != self.shape:
            raise ValueError(f"other.shape={other.shape}: must be {self.shape}")
        if other.bits.device != self.bits.device:
            raise ValueError(
                f"other on {other.bits.device}: must be on {self.bits.device}; use .to(device)"
            )
        return PackedMask(op(self.bits, other.bits), self.shape)

    def save(self, path: str | Path) -> None:
        """Write this mask alone to a safetensors file, which :meth:`load` reads."""
        save_masks(path, {"": self})

    @classmethod
    def load(cls, path: str | Path) -> "PackedMask":
        """Read a mask that :meth:`save` wrote.

        Raises:
            DataError: as :func:`load_masks`, or the file holds masks of several weights.
        """
        masks, _ = load_masks(path)
        if list(masks) != [""]:
            raise DataError(f"{path}: holds masks of {len(masks)} weights; use load_masks")
        return masks[""]


def save_masks(
    path: str | Path, masks: Mapping[str, PackedMask], metadata: Mapping[str, str] | None = None
) -> None:
    """Write masks to one safetensors file, each as the tensor ``<name>.mask``.

    Args:
        path: the file to write.
        masks: {parameter name: PackedMask}.
        metadata: more {str: str} pairs to keep in the file's header.
    """
    file = masks_file(path, {name: mask.shape for name, mask in masks.items()}, metadata)
    for name, mask in masks.items():
        file.write(mask_key(name), mask.bits)


def masks_file(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    keep: bool = False,
) -> TensorFile:
    """Make a file as :func:`save_masks` does, for masks that come one by one.

    Args:
        path: the file.
        shapes: {parameter name: (out, in)}; a mask that is never written removes nothing.
        metadata: more {str: str} pairs to keep in the file's header.
        keep: leave a file that the same call made before as it is.

    Returns:
        A :class:`antidote_fast.files.tensor_file.TensorFile`; the caller writes ``mask.bits`` under
        :func:`mask_key`.
    """
    specs = {mask_key(name): (torch.uint8, (n, -(-k // 8))) for name, (n, k) in shapes.items()}
    listed = json.dumps({mask_key(name): shape for name, shape in shapes.items()})
    header = {**(metadata or {}), "format": FORMAT, "version": VERSION, "shapes": listed}
    return TensorFile.create(path, specs, header, keep)


def load_masks(path: str | Path) -> tuple[dict[str, PackedMask], dict[str, str]]:
    """Read a file that :func:`save_masks` wrote.

    Returns:
        ``({parameter name: PackedMask}, metadata)``.

    Raises:
        DataError: no such file, not a mask file, an unknown version, or damaged contents.
    """
    try:
        metadata, tensors = read_tensor_file(path)
    except (OSError, DataError) as error:
        what = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: cannot be read as a mask file: {printable(what):.300}") from None
    try:
        if metadata.get("format") != FORMAT:
            raise DataError(f"{path}: not a mask file of antidote_fast")
        if metadata.get("version") != VERSION:
            raise DataError(
                f"{path}: mask format version {metadata.get('version')!r}; "
                f"this release reads {VERSION}"
            )
        shapes = json.loads(metadata.pop("shapes"))
        if not isinstance(shapes, dict) or set(shapes) != set(tensors):
            raise DataError(f"{path}: the masks and their listed shapes differ")
        masks = {}
        for key, shape in shapes.items():
            if not isinstance(shape, list) or any(type(n) is not int for n in shape):
                raise ValueError(f"{key!r} has no shape")
            mask = PackedMask(tensors[key], tuple(shape))
            used = mask.shape[1] % 8
            if used and mask.bits.numel() and bool((mask.bits[:, -1] >> used).any()):
                raise DataError(f"{path}: {key} has bits set past its {mask.shape[1]} columns")
            masks[key.removesuffix("mask").removesuffix(".")] = mask
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a mask file: {printable(error):.300}") from None
    return masks, metadata


def mask_key(name: str) -> str:
    """Return the name of a weight's mask in a file of masks."""
    return f"{name}.mask" if name else "mask"
