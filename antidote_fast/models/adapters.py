"""PEFT LoRA adapters: what is understood, what fits which base, and loading one strictly."""

import contextlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import Checkpoint, open_checkpoint
from antidote_fast.files.fingerprint import block_name
from antidote_fast.files.manifest import check_input, read_manifest
from antidote_fast.models.adapter_config import (
    MAX_RANK,
    check_adapter_config,
    match_modules,
    values_of,
    without_patterns,
)
from antidote_fast.models.base_state import ModuleTree
from antidote_fast.models.kinds import Model
from antidote_fast.models.loading import foreign, resolve_folder

LORA_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PREFIX = "base_model.model."
_MAX_ADAPTED = 16_384  # modules of one adapter; a model of 400B parameters has some 1000
# What PEFT saves of an adapted module beside the two factors.
_OF_A_MODULE = re.compile(
    r"(?P<module>.+)\.(?:lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?"
    r"|lora_embedding_[AB])"
)
_OF_TOKENS = ".token_adapter.trainable_tokens_delta"
_WRAPPERS = ("base_layer", "token_adapter")  # what PEFT puts around a module of the base
_HEAD = "lm_head.weight"
_INPUTS = ("model.embed_tokens.weight", "transformer.wte.weight")  # what a head is tied to
_TIED = ("lm_head", "embed_tokens", "wte")


def check_adapter(adapter: Checkpoint, base: Checkpoint) -> None:
    """Refuse an adapter that was not made for this base, or is not what was written.

    Of the weights a few rows are read; the files of a folder that this tool wrote are hashed.
    Compared are the adapter's own consistency (both factors, ranks), the base's layers and shapes,
    and the base's fingerprint where the adapter recorded one or names a base folder that exists.
    Its patterns are matched with the base's modules, in bounded time.

    Raises:
        DataError: naming the tensor, the field or what differs.
    """
    where = str(adapter.folder)
    shapes = _checked_factors(adapter, {name: e.shape for name, e in base.tensors.items()})
    paths = [name.split(".") for name in base.tensors]
    modules = dict.fromkeys(".".join(path[:i]) for path in paths for i in range(1, len(path)))
    match_modules(adapter.config, modules, where)
    base_shapes = {}
    for name, entry in base.tensors.items():
        if name.endswith(".weight") and entry.dtype is not None and len(entry.shape) == 2:
            packed = not entry.dtype.is_floating_point
            base_shapes.setdefault(_tail(name), []).append(None if packed else entry.shape)
    # A head that is tied is saved once, as the embedding.
    tied = None if base.find(_HEAD) is not None else next(filter(base.find, _INPUTS), None)
    if tied is not None:
        base_shapes[_HEAD] = [base.tensors[base.find(tied)].shape]
    for module, shape in shapes.items():
        candidates = base_shapes.get(_tail(module.removeprefix(_PREFIX) + ".weight"))
        if candidates is None:
            if "quantization_config" in base.config:
                continue
            raise DataError(f"{where}: adapts {module!r}, which the base {base.folder} lacks")
        if not {None, shape, shape[::-1]} & set(candidates):
            is_in_base = f"which in the base {base.folder} is {candidates[0]}"
            raise DataError(f"{where}: adapts {module!r} as {shape}, {is_in_base}")
    _check_all_layers(adapter, base, base_shapes)

    def saved_tensor(name):
        name = tied if name == _HEAD and tied is not None else name
        return None if base.find(name) is None else base.read([name])[name]

    _check_copies(adapter, saved_tensor, tied is not None)
    _check_fingerprint(adapter, base)


def load_adapter(
    model: Model,
    adapter: str | Path | Checkpoint,
    *,
    adapter_name: str = "default",
    tensors: Mapping[str, Tensor] | None = None,
) -> Model:
    """Put a LoRA adapter on a live model, strictly, its tensors in the dtype of the file.

    PEFT gets the config that was checked and the tensors that were read here, and opens nothing.

    Args:
        model: the base model, as :func:`load_model` gives it. Its own weights stay as they are, and
            after an error its modules and their attributes as well.
        adapter: a folder, a name on the hub, or a checkpoint.
        adapter_name: what the live model calls it.
        tensors: {name in the file: tensor} where they are read already; they stay the caller's.

    Returns:
        The ``peft.PeftModel``, in eval mode.

    Raises:
        DataError: no such adapter, a pickle, a kind not understood, or tensors that are missing,
            left over or of other shapes than the model needs.
        AntidoteError: not enough memory.
    """
    if not isinstance(adapter, Checkpoint):
        adapter = open_checkpoint(resolve_folder(adapter, "adapter"))
    where = str(adapter.folder)
    if not adapter.is_adapter:
        raise DataError(f"adapter={where!r}: is a whole model, not a PEFT adapter")
    state = model.state_dict()
    _checked_factors(adapter, {name: tuple(tensor.shape) for name, tensor in state.items()})
    offloaded = {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values())
    offloaded = offloaded and any(p.is_meta for p in model.parameters())
    if adapter.config.get("use_dora") and offloaded:
        raise DataError(f"{where}: DoRA needs the base's weights, and some of them are offloaded")
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    _check_copies(adapter, state.get, tied, offloaded)
    tree = ModuleTree(model)
    try:
        live, needed = _put_on(model, adapter, adapter_name, tensors)
        _keep_file_dtype(live, adapter, adapter_name, offloaded, needed)
    except BaseException:
        tree.restore()
        raise
    return live.eval()


def _put_on(model, adapter, adapter_name, tensors):
    """(the PEFT model with every tensor that it needs, {name in the file: tensor} of those)."""
    where = str(adapter.folder)
    names = [name for name, _ in model.named_modules() if name]
    adapted = [_OF_A_MODULE.fullmatch(name) for name in adapter.tensors]
    modules = sorted({match["module"].removeprefix(_PREFIX) for match in adapted if match})
    fields = without_patterns(adapter.config, modules, names, where)
    saved = tuple(adapter.config.get("modules_to_save") or ())
    if saved:  # before PEFT copies what they name, which may be the whole base
        whole = ((n, m) for n, m in model.named_modules() if n.endswith(saved))
        keys = [f"{_PREFIX}{n}.{key}" for n, m in whole for key, _ in m.named_parameters()]
        _check_needed(adapter, keys, every=False)
    config = {**adapter.config, **fields, "inference_mode": True}
    config.pop("runtime_config", None)
    import peft

    with warnings.catch_warnings(), foreign(where, "cannot be put on this model", memory=""):
        warnings.simplefilter("ignore")  # missing keys are checked below, as an error
        config = peft.PeftConfig.from_peft_type(**config)
        kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
        # PEFT places a model anew that accelerate has placed, and reads offloaded weights as if
        # they were there. After an error the module tree has the map back.
        device_map = vars(model).pop("hf_device_map", None)
        live = kind(model, config, adapter_name, autocast_adapter_dtype=False)
        if device_map is not None:
            model.hf_device_map = device_map
        needed = peft.get_peft_model_state_dict(
            live, adapter_name=adapter_name, save_embedding_layers=False
        )
        _check_needed(adapter, needed)
        if tensors is None:
            tensors = adapter.read(needed)
        needed = {key: tensors[key] for key in needed}
        peft.set_peft_model_state_dict(live, needed, adapter_name=adapter_name)
    for name in fields:  # as it is saved again
        said = adapter.config.get(name, True if name == "init_lora_weights" else None)
        as_set = isinstance(said, list) and name in ("target_modules", "exclude_modules")
        setattr(config, name, set(said) if as_set else said)
    return live, needed


def _check_needed(adapter, needed, every=True):
    """Refuse a file that lacks what is needed, or where that is every tensor has others too."""
    missing = sorted(set(needed) - set(adapter.tensors))
    extra = sorted(k for k in adapter.tensors if ".lora_" in k and k not in needed) if every else []
    for names, has, why in (
        (missing, "lacks", "that this model needs"),
        (extra, "has", "that this model has no place for"),
    ):
        if names:
            what = f"{has} {len(names)} tensors {why}, {names[0]!r} first"
            raise DataError(f"{adapter.folder}: {what}; it was made for another base")


def check_sizes(adapter: Checkpoint, base: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what no part of the base, {name: shape}, is as large as; by the headers.

    A sparse file is short on the disk, and this is looked at before any of it is read or hashed.

    Raises:
        DataError: naming the tensor.
    """
    count = Counter(map(_tail, base))
    # Four-bit weights lie two in a byte, and an adapter's tensors may have eight bytes each.
    largest = 16 * max(map(math.prod, base.values()))
    longest = 8 * 2 * MAX_RANK * max(max(shape, default=1) for shape in base.values())
    left = 4 * largest
    seen: Counter[tuple[str, str]] = Counter()
    for key, entry in adapter.tensors.items():
        size, name = entry.num_bytes, key.removeprefix(_PREFIX)
        factor = LORA_FACTOR.fullmatch(name)
        most = 16 * math.prod(base[name]) if name in base else longest if factor else largest
        if size > most:
            what = f"{key!r} of {size} bytes, more than anything in the base"
            raise DataError(f"{adapter.folder}: holds {what}")
        if factor:
            # Names that differ only in front of the layers mean one module.
            same = factor["factor"], _tail(factor["module"] + ".weight")
            seen[same] += 1
            if seen[same] > max(1, count[same[1]]):
                what = f"{same[1]!r} more often than the base has it"
                raise DataError(f"{adapter.folder}: adapts {what}")
        elif name not in base:
            left -= size
            if left < 0:
                what = f"more than {4 * largest} bytes that the base has no place for"
                raise DataError(f"{adapter.folder}: with {key!r} it holds {what}")


def _check_copies(adapter, base_tensor, tied, offloaded=False):
    """Refuse tensors that are neither the adapter's nor of its modules_to_save, but for copies.

    PEFT would load them into the base itself. It saves the embeddings with an adapter that has them
    in target_modules, as they are in the base; such a copy is left out, and any other refused.

    Args:
        base_tensor: gives the base's tensor of a name, or None.
        tied: the base's output layer is its embedding.
        offloaded: weights on meta are elsewhere. Else a model without weights is a plan, or run
            block by block, and was compared by its files.
    """
    where, config = str(adapter.folder), adapter.config
    saved = tuple(config.get("modules_to_save") or ())
    if tied and config.get("ensure_weight_tying") and set(saved) & set(_TIED):
        saved += _TIED  # PEFT trains and saves the two together
    for key, entry in adapter.tensors.items():
        of_tokens = key.endswith(_OF_TOKENS) and config.get("trainable_token_indices")
        if of_tokens or _OF_A_MODULE.fullmatch(key):
            continue
        parts = key.removeprefix(_PREFIX).split(".")
        if saved and any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts))):
            continue
        name = ".".join(part for part in parts if part not in _WRAPPERS)
        base = base_tensor(name)
        if base is None:
            what = "which is neither the adapter's nor one of its modules_to_save"
            raise DataError(f"{where}: holds {key!r}, {what}")
        if entry.shape != tuple(base.shape):
            what = f"{entry.shape}, which in the base is {tuple(base.shape)}"
            raise DataError(f"{where}: holds {key!r} as {what}")
        there = not base.is_meta and base.untyped_storage().nbytes() >= base.nbytes
        if not there and not offloaded:
            continue
        own = adapter.read([key])[key].to(base.device, base.dtype) if there else None
        if own is None or not base.dtype.is_floating_point or not torch.equal(own, base):
            what = "a module that is trained whole must be in its modules_to_save"
            raise DataError(f"{where}: holds {key!r} with other values than the base has; {what}")


def _keep_file_dtype(live, adapter, adapter_name, offloaded, tensors):
    """PEFT makes the factors in the base's dtype; give them back the file's, bit for bit."""
    factors = {}
    for name, parameter in live.named_parameters():
        key = name.replace(f".{adapter_name}.weight", ".weight")
        if key != name and LORA_FACTOR.fullmatch(key):
            factors[key if key in adapter.tensors else _PREFIX + key] = name, parameter
    with torch.no_grad():
        for key, (name, parameter) in factors.items():
            # Never the caller's own: the next adapter is copied into what is live.
            if not (parameter.is_meta and offloaded):
                parameter.data = tensors[key].to(parameter.device, copy=True)
                continue
            # Beside an offloaded weight: on the device where accelerate brings that one to run.
            wrapper, linear = (live.get_submodule(name.rsplit(".", n)[0]) for n in (3, 1))
            device = wrapper.get_base_layer()._hf_hook.execution_device
            value = tensors[key].to(device, copy=True)
            linear.weight = torch.nn.Parameter(value, requires_grad=False)
    left = [n for n, p in live.named_parameters() if p.is_meta and f".{adapter_name}." in n]
    if left and offloaded:
        raise DataError(f"{adapter.folder}: {left[0]!r} belongs to a part that is offloaded")


def _checked_factors(adapter, base):
    """{module: (out_features, in_features)} that an adapter's factors stand for, once it is known
    to be sound; ``base`` as in :func:`check_sizes`."""
    where = str(adapter.folder)
    check_adapter_config(adapter.config, where)
    check_sizes(adapter, base)
    check_input(adapter.folder)
    factors = {}
    for name, entry in adapter.tensors.items():
        match = LORA_FACTOR.fullmatch(name)
        if match is None:
            continue
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise DataError(f"{where}: {name!r} has shape {entry.shape}, not (out, in)")
        factors.setdefault(match["module"], {})[match["factor"]] = entry.shape
    if not 0 < len(factors) <= _MAX_ADAPTED:
        count = f"factors for {len(factors)} modules" if factors else "no LoRA factors"
        raise DataError(f"{where}: holds {count}")
    names = [module.removeprefix(_PREFIX) for module in factors]
    ranks = values_of(adapter.config, "rank_pattern", names, where)
    shapes = {}
    for module, pair in factors.items():
        if len(pair) != 2:
            raise DataError(f"{where}: {module!r} lacks lora_{'B' if 'A' in pair else 'A'}")
        rank, columns = pair["A"]
        rows, inner = pair["B"]
        expected = ranks.get(module.removeprefix(_PREFIX), adapter.config["r"])
        if not rank == inner == expected:
            what = f"ranks {rank} (A) and {inner} (B); its config says {expected}"
            raise DataError(f"{where}: {module!r} has {what}")
        shapes[module] = (rows, columns)
    return shapes


def _check_all_layers(adapter, base, base_shapes):
    """Plain names in target_modules mean every layer; fewer means a base with fewer layers."""
    config = adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(re.search(r"\d", str(t)) for t in targets):
        return
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    modules = (_OF_A_MODULE.fullmatch(name) for name in adapter.tensors)
    adapted = {_tail(m["module"].removeprefix(_PREFIX) + ".weight") for m in modules if m}
    for tail in sorted(base_shapes.keys() - adapted):
        module = tail.removesuffix(".weight")
        if any(module.endswith("." + t) for t in targets):
            raise DataError(
                f"{adapter.folder}: does not adapt {module!r} of the base {base.folder}, which its "
                "target_modules name; it was made for another base"
            )


def _check_fingerprint(adapter, base):
    actual = base.fingerprint()
    other = (read_manifest(adapter.folder) or {}).get("base_fingerprint")
    why = f" (fingerprint {other}, not {actual})"
    if not other:
        named = adapter.config.get("base_model_name_or_path")
        # isfile is False for any odd text
        if not named or not isinstance(named, str) or not os.path.isfile(f"{named}/config.json"):
            return
        if Path(named).resolve() == base.folder.resolve():
            return
        try:
            other = open_checkpoint(named, trust_remote_code=True).fingerprint()
        except DataError:  # what is wrong with it is not the adapter's to learn
            return
        why = (
            ": its base_model_name_or_path is a folder here that holds another (fingerprint "
            "differs)"
        )
    if other and actual and other != actual:
        raise DataError(
            f"{adapter.folder}: was made for another base model than {base.folder}{why}"
        )


def _tail(name):
    return block_name(name) or name


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is what it was without its adapter: for LoRA, the aligned one.

    Raises:
        UsageError: a model without an adapter.
    """
    if not getattr(model, "peft_config", None):
        raise UsageError(
            "aligned=None: must be the aligned model's Answers where the model has no adapter"
        )
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()  # an adapter that transformers itself put on
    try:
        yield
    finally:
        model.enable_adapters()
