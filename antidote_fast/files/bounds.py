"""What a config may ask for: no more layers or weights than its files could fill.

A config is a few bytes, and a model is built from it before any weight is looked at.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from antidote_fast.errors import DataError
from antidote_fast.files.tensor_file import TensorEntry

_COUNT = re.compile(r"(?:\w*_)?(?:layers?|blocks?|experts|heads?|labels|classes|stages|depths?)")
_HARMLESS = 1024  # layers, heads or labels; max_window_layers may be more than there are layers
# Files may hold fused what a model has apart, and once what it has tied; and a model has buffers,
# of masks as large as its positions squared.
_TIMES_BUILT, _MORE_TENSORS, _MORE_VALUES = 8, 250, 64 << 20
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "linspace")


def check_counts(
    where: str | Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry] | None = None
) -> None:
    """Refuse counts that no model of these files has, before transformers reads the config.

    transformers makes lists of as many entries as there are layers, labels or heads.

    Args:
        where: the folder, for the message.
        config: ``config.json`` as a dict.
        tensors: {name: TensorEntry} of the files; None where they have not been looked at.

    Raises:
        DataError: naming the entry, its value and the number of tensors.
    """
    most = 1 << 16
    if tensors is not None:
        # Many experts may be one tensor, and labels are the rows of one.
        sizes = (min(max(e.shape, default=0), 8 * (e.end - e.start)) for e in tensors.values())
        most = max(_HARMLESS, len(tensors), max(sizes, default=0))
    left = [("", config)]
    while left:
        prefix, values = left.pop()
        for name, value in values.items():
            items = value if isinstance(value, list) else [value]
            left += [(f"{prefix}{name}.", item) for item in items if isinstance(item, dict)]
            if _COUNT.fullmatch(name):
                number = max((n for n in items if type(n) is int), default=0)
                if number > most:
                    holds = "" if tensors is None else f", and it holds {len(tensors)} tensors"
                    name = ascii(prefix + name)[1:-1]
                    raise DataError(
                        f"{where}: its config says {name:.80}={str(number)[:20]}{holds}"
                    )


@contextlib.contextmanager
def bounded(checkpoint: Any) -> Iterator[None]:
    """Inside the block this thread makes no model on meta that is far larger than a checkpoint.

    Raises:
        DataError: from within the block, as soon as there are too many tensors or values.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    tensors = checkpoint.tensors.values()
    packed = "quantization_config" in checkpoint.config  # down to a bit a weight
    values = (8 * (e.end - e.start) if packed else math.prod(e.shape) for e in tensors)
    most_values = _MORE_VALUES + _TIMES_BUILT * sum(values)
    most_tensors = _MORE_TENSORS + _TIMES_BUILT * len(tensors)
    new = {getattr(torch, name) for name in _FACTORIES}

    class Counter(TorchFunctionMode):
        num_tensors = values = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_meta:
                size = result.numel()
                if function in new:
                    self.num_tensors += 1
                    self.values += size
                if self.num_tensors > most_tensors or max(self.values, size) > most_values:
                    raise DataError(
                        f"{checkpoint.folder}: its config makes a model far larger than the "
                        f"{len(tensors)} tensors that it holds"
                    )
            return result

    with Counter():
        yield
