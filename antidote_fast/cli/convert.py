"""``antidote-fast convert``: masks that other code saved with ``torch.save``, as our mask file.

The one place that opens a pickle, with ``weights_only=True`` (tensors, numbers, lists and dicts;
nothing in the file is called). What the file may hold, W being a 0/1 tensor (out, in) of any dtype:

- ``{name: W}``: the name of a parameter or of a module; ``.weight`` is added where it lacks it, and
  the adapter's name that PEFT puts in between is dropped;
- ``{layer: {name: W}}`` with integer layers, or ``[{name: W}, ...]``: names within a block, which
  become ``model.layers.<layer>.<name>.weight`` (``--prefix`` says otherwise).
"""

import argparse
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.files.commit import new_file
from antidote_fast.files.safe_open import open_file
from antidote_fast.system.progress import tell

MAX_MASKS = 100_000
MAX_NAME = 512
PREFIX = "model.layers."
_MAX_INDEX_BYTES = 64 << 20  # of what is not tensors
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.(?!weight$)[^.]+(?=\.weight$|$)")


def convert_masks(
    source: str | Path,
    destination: str | Path,
    *,
    ones: str | None = None,
    prefix: str = PREFIX,
    overwrite: bool = False,
) -> dict:
    """Read masks from a file of ``torch.save`` and write them as :func:`save_masks` does.

    Args:
        source: the old file, made by torch 1.6 or later.
        destination: the safetensors file to write; it appears whole or not at all.
        ones: ``"removed"`` or ``"kept"``: what a 1 means. None takes removed (the official Antidote
            code, Wanda), and refuses a file where that would remove more than half.
        prefix: put before the number of a layer.
        overwrite: replace a mask file of this package.

    Returns:
        ``{"masks": count, "removed": weights, "weights": weights in all}``.

    Raises:
        DataError: not such a file, anything in it that is not a mask, or a destination that may not
            be replaced.
        AntidoteError: it cannot be written.
    """
    from antidote_fast.masks import save_masks

    if ones not in (None, "removed", "kept"):
        raise UsageError(f"ones={ones!r}: must be removed or kept")
    source, destination = (Path(os.path.expanduser(path)) for path in (source, destination))
    _check_destination(destination, overwrite)
    tensors = dict(_named(source, _load(source), prefix))
    masks = {
        name: _packed(source, name, tensor, ones == "kept") for name, tensor in tensors.items()
    }
    total = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    removed = sum(mask.count() for mask in masks.values())
    if ones is None and removed * 2 > total:
        raise DataError(
            f"{source}: {removed} of {total} values are 1; say with ones (--ones kept or --ones "
            "removed) what a 1 means"
        )
    try:
        with new_file(destination) as partial:
            save_masks(partial, masks, {"converted_from": source.name})
    except Exception as error:  # safetensors has a type of its own for a full disk
        raise AntidoteError(f"{destination}: cannot be written: {error!s:.200}") from error
    return {"masks": len(masks), "removed": removed, "weights": total}


def _check_destination(path, overwrite):
    from antidote_fast.masks import load_masks

    if path.suffix != ".safetensors":
        raise UsageError(f"output={str(path)!r}: must end in .safetensors")
    if not path.parent.is_dir():
        raise DataError(f"output={str(path)!r}: {path.parent} is not a folder")
    if path.is_symlink() or path.exists():
        if path.is_symlink() or not path.is_file() or not overwrite:
            raise DataError(f"output={str(path)!r}: exists; name another, or pass overwrite")
        load_masks(path)  # only a mask file is replaced


def _load(path):
    """The object in a file of torch.save: tensors mapped from the file, nothing else run."""
    import torch

    if not path.is_file():
        raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    open_file(path).close()  # refuses a link out of its folder
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            # Compressed, a small file could stand for terabytes; torch.save does not compress.
            if len(pickles) != 1 or any(entry.compress_type for entry in entries):
                raise DataError(f"{path}: is not a file of torch.save")
            if pickles[0].file_size > _MAX_INDEX_BYTES or len(entries) > 2 * MAX_MASKS:
                raise DataError(f"{path}: holds too many objects")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise DataError(f"{path}: is not a file of torch.save (of torch 1.6 or later)") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a hostile pickle makes torch raise
        kind = type(error).__name__
        raise DataError(
            f"{path}: cannot be read as tensors alone ({kind}); nothing in it was run"
        ) from None


def _named(path, contents, prefix):
    """(parameter name, tensor) of each mask in a dict, or in a list or dict of layers."""
    if isinstance(contents, list):
        contents = dict(enumerate(contents))
    if not isinstance(contents, dict):
        raise DataError(f"{path}: holds a {type(contents).__name__}, not masks by name")
    groups = {"": contents}
    if contents and all(type(key) is int for key in contents):
        for number, layer in contents.items():
            if not isinstance(layer, dict) or number < 0:
                raise DataError(f"{path}: layer {number} is not a dict of masks by name")
        groups = {f"{prefix}{number}.": layer for number, layer in contents.items()}
    seen = set()
    for start, masks in groups.items():
        for name, tensor in masks.items():
            if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
                raise DataError(f"{path}: {ascii(name)[:80]} is not the name of a weight")
            full = _ADAPTER_NAME.sub(r".\1", start + name)
            full = full if full.endswith(".weight") else full + ".weight"
            if full in seen:
                raise DataError(f"{path}: {full!r} is there twice")
            seen.add(full)
            yield full, tensor
    if not 0 < len(seen) <= MAX_MASKS:
        raise DataError(f"{path}: holds {len(seen)} masks; must be 1 to {MAX_MASKS}")


def _packed(path, name, tensor, ones_kept):
    import torch

    from antidote_fast.backends.reference import pack_bits
    from antidote_fast.masks import PackedMask

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_nested
    if not plain or tensor.layout != torch.strided:
        raise DataError(f"{path}: {name!r} is not a dense tensor")
    if tensor.is_meta:
        raise DataError(f"{path}: {name!r} is on the meta device, and holds no values")
    tensor = tensor.detach()
    if tensor.dim() != 2 or tensor.is_complex() or tensor.is_quantized:
        raise DataError(f"{path}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not a matrix")
    # An expanded view of one byte would be packed at its full size.
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise DataError(f"{path}: {name!r} stands for more values than are stored")
    bits = []
    for rows in tensor.split(1024):
        try:
            chosen, ones = rows != 0, rows == 1
        except (NotImplementedError, RuntimeError, TypeError):
            raise DataError(f"{path}: {name!r} is {tensor.dtype}, which no mask is of") from None
        if not bool((ones | ~chosen).all()):
            raise DataError(f"{path}: {name!r} holds values other than 0 and 1")
        bits.append(pack_bits(~chosen if ones_kept else chosen))
    return PackedMask(torch.cat(bits), tuple(tensor.shape))


def convert_command(argv: Sequence[str]) -> None:
    """``antidote-fast convert OLD.pt --output NEW.safetensors``."""
    parser = _Parser(prog="antidote-fast convert", description=__doc__.split("\n", 1)[0])
    parser.add_argument("old", help="a file of masks that torch.save wrote")
    parser.add_argument("--output", required=True, help="the .safetensors file to write")
    parser.add_argument("--ones", help="removed or kept: what a 1 in the old file means")
    parser.add_argument("--prefix", default=PREFIX, help="before a layer's number [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace a mask file")
    if "-h" in argv or "--help" in argv:
        tell(parser.format_help(), end="")
        return
    flags = parser.parse_args(argv)
    options = {"ones": flags.ones, "prefix": flags.prefix, "overwrite": flags.overwrite}
    counts = convert_masks(flags.old, flags.output, **options)
    tell(
        f"{counts['masks']} masks, {counts['removed']:,} of {counts['weights']:,} weights removed: "
        f"{flags.output}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"convert: {message}")
