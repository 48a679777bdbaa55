"""One base model in memory, on which one LoRA adapter after another is put.

An adapter like the one before it (the same config, names, shapes and dtypes) has its tensors
copied into the live ones; PEFT's own ``hotswap_adapter`` fills with zeros what a file lacks and
looks at four fields of the config. Any other adapter is loaded afresh, with the strict checks of
:func:`antidote_fast.models.adapters.load_adapter`, on the modules that the base had at first.
Whether the base's weights are still those that were loaded is compared, not assumed.
"""

import json

import torch

from antidote_fast.errors import AntidoteError
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.base_state import Marks, ModuleTree

_NAME = "default"
# Of adapter_config.json: says where the adapter comes from, not what it computes.
_ORIGIN = ("base_model_name_or_path", "revision", "peft_version")


class BaseLost(AntidoteError):
    """The base cannot be loaded again as it was: no other adapter can be put on it."""


class AdapterSlot:
    """The place on a base model that holds one adapter at a time.

    Args:
        load: called without arguments, gives the base model as
            :func:`antidote_fast.models.loading.load_model` does; called again only where the
            base's own weights have changed.

    Attributes:
        swaps, loads, reloads: how often tensors were copied, an adapter was loaded afresh, and the
            base was loaded again.
    """

    def __init__(self, load):
        self._load, self._marks = load, None
        self.swaps = self.loads = self.reloads = 0
        self._take(load())

    def fits(self, adapter):
        """Whether :meth:`put` will copy tensors, and leave modules and their hooks as they are."""
        return self._places is not None and _layout(adapter) == self._layout

    def put(self, adapter, tensors):
        """The live PEFT model with this adapter on it, in eval mode.

        Args:
            adapter: its :class:`antidote_fast.files.checkpoint.Checkpoint`.
            tensors: all tensors of its file, as read; they stay the caller's.

        Raises:
            DataError: as :func:`load_adapter`; the slot is empty then, and fit for the next one.
            BaseLost: as :meth:`clear`.
        """
        if self.fits(adapter):
            self._compared = False
            with torch.no_grad():
                for key, place in self._places.items():
                    place.copy_(tensors[key])
            self.swaps += 1
            return self._live
        self.clear()
        self._compared = False
        try:
            self._live = load_adapter(self.model, adapter, adapter_name=_NAME, tensors=tensors)
        except Exception:
            self.clear()
            raise
        self.loads += 1
        self._layout = _layout(adapter)
        self._places = self._find_places(adapter)
        return self._live

    def changed(self) -> str | None:
        """Name of the first of the base's weights that is no longer what was loaded, or None.

        Every weight is compared, by a keyed digest of all its bits
        (:class:`antidote_fast.models.base_state.Marks`). For the 538 MB of SmolLM2-135M in float32
        that is 0.35 s an adapter, where one forward of 16 x 32 tokens takes 2.6 s (one busy EPYC
        core).
        """
        name = self._marks.changed()
        self._compared = name is None
        return name

    def clear(self):
        """Take the adapter off; the base is as it was loaded, and loaded again if it is not.

        Raises:
            BaseLost: it was to be loaded again, and cannot be, or its files have changed since.
        """
        self._live = self._places = self._layout = None
        self._tree.restore()
        self.model.eval()
        if self._compared or self.changed() is None:
            return
        self.model = self._tree = None  # not two of them at a time
        self._marks.release()
        try:
            model = self._load()
        except AntidoteError as error:
            raise BaseLost(str(error)) from error
        self.reloads += 1
        self._take(model)

    def _take(self, model):
        self.model, self._compared = model, True  # and nothing has run on it since
        self._live = self._places = self._layout = None
        self._tree = ModuleTree(model)
        if self._marks is None:
            self._marks = Marks(model)
        elif (name := self._marks.move_to(model)) is not None:
            raise BaseLost(f"the base model's {name!r} is another one now: its files have changed")

    def _find_places(self, adapter):
        """{name in the file: the live tensor's memory}; None where an adapter must be loaded."""
        import peft

        places = peft.get_peft_model_state_dict(
            self._live, adapter_name=_NAME, save_embedding_layers=False
        )
        live = {}
        for tensor in (*self._live.parameters(), *self._live.buffers()):
            live[tensor.data_ptr()] = max(tensor.numel(), live.get(tensor.data_ptr(), 0))
        for key, place in places.items():
            # Of another size where it is a copy that PEFT made for saving.
            same_shape = tuple(place.shape) == adapter.tensors[key].shape
            if not same_shape or live.get(place.data_ptr()) != place.numel():
                return None
        return places


def _layout(adapter):
    """What two adapters must share to follow each other by copying tensors."""
    config = {k: v for k, v in adapter.config.items() if k not in _ORIGIN}
    tensors = sorted((k, str(e.dtype), e.shape) for k, e in adapter.tensors.items())
    return json.dumps(config, sort_keys=True), tensors
