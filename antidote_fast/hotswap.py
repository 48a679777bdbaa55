"""One base model in memory, on which one LoRA adapter after another is put.

An adapter like the one before it (the same config, names, shapes and dtypes) has its tensors
copied into the live ones; PEFT's own ``hotswap_adapter`` fills with zeros what a file lacks and
looks at four fields of the config. Any other adapter is loaded afresh
(:func:`antidote_fast.adapters.load_adapter`, with its strict checks) on the modules that the base
had at first.
"""

import json
import math

import torch

from antidote_fast.adapters import LORA_FACTOR, load_adapter

_NAME = "default"
# Of adapter_config.json: says where the adapter comes from, not what it computes.
_ORIGIN = ("base_model_name_or_path", "revision", "peft_version")


class AdapterSlot:
    """The place on a base model that holds one adapter at a time.

    Args:
        load: called without arguments, gives the base model as
            :func:`antidote_fast.loading.load_model` does; called again only where an adapter may
            have changed the base's own weights.

    Attributes:
        number: goes up whenever the live modules change; targets found and hooks put on before
            are void then.
        swaps, loads: how often tensors were copied, and how often an adapter was loaded afresh.
    """

    def __init__(self, load):
        self._load = load
        self.number = self.swaps = self.loads = 0
        self._take(load())

    def fits(self, adapter):
        """Whether :meth:`put` will copy tensors, and leave modules and their hooks as they are."""
        return self._places is not None and _layout(adapter) == self._layout

    def put(self, adapter, tensors):
        """The live PEFT model with this adapter on it, in eval mode.

        Args:
            adapter: its :class:`antidote_fast.files.Checkpoint`.
            tensors: all tensors of its file, as read.

        Raises:
            DataError: as :func:`load_adapter`; the slot is empty then, and fit for the next one.
        """
        if self.fits(adapter):
            with torch.no_grad():
                for key, place in self._places.items():
                    place.copy_(tensors[key])
            self.swaps += 1
            return self._live
        self.clear()
        try:
            self._live = load_adapter(self.model, adapter, adapter_name=_NAME)
        except BaseException:
            self._foreign = any(not LORA_FACTOR.fullmatch(name) for name in adapter.tensors)
            self.clear()
            raise
        self.loads += 1
        self._layout = _layout(adapter)
        self._places = self._find_places(adapter)
        return self._live

    def clear(self):
        """Take the adapter off; the base is as it was loaded."""
        self.number += 1
        self._live = self._places = self._layout = None
        if self._foreign:
            self.model = self._modules = None  # not two of them at a time
            self._take(self._load())
            return
        for parent, name, module in self._modules:
            parent._modules[name] = module
        for name in set(vars(self.model)) - self._attributes:
            delattr(self.model, name)
        self.model.eval()

    def _take(self, model):
        self.model = model
        self._live = self._places = self._layout = None
        self._foreign = False
        self._attributes = set(vars(model))
        # PEFT wraps modules in place, and unload() leaves a trained copy in a base's place
        # (modules_to_save); so the tree is put back from this list.
        self._modules = [
            (parent, name, module)
            for parent in model.modules()
            for name, module in parent._modules.items()
        ]

    def _find_places(self, adapter):
        """{name in the file: the live tensor's memory}; None where an adapter must be loaded."""
        import peft

        places = peft.get_peft_model_state_dict(
            self._live, adapter_name=_NAME, save_embedding_layers=False
        )
        # PEFT loads whatever else the file holds into the base itself, such as its embeddings.
        self._foreign = set(places) != set(adapter.tensors)
        if self._foreign:
            return None
        live = {}
        for tensor in (*self._live.parameters(), *self._live.buffers()):
            live[tensor.data_ptr()] = max(tensor.numel(), live.get(tensor.data_ptr(), 0))
        for key, place in places.items():
            size = math.prod(adapter.tensors[key].shape)
            if tuple(place.shape) != adapter.tensors[key].shape:
                return None
            if live.get(place.data_ptr()) != size:  # a copy that PEFT made for saving
                return None
        return places


def _layout(adapter):
    """What two adapters must share to follow each other by copying tensors."""
    config = {k: v for k, v in adapter.config.items() if k not in _ORIGIN}
    tensors = sorted((k, str(e.dtype), e.shape) for k, e in adapter.tensors.items())
    return json.dumps(config, sort_keys=True), tensors
