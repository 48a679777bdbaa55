"""PEFT LoRA adapters: what is understood, what fits which base, and loading one strictly."""

import contextlib
import os
import re
import warnings
from pathlib import Path

import torch

from antidote_fast import patterns
from antidote_fast.commit import read_manifest
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files import Checkpoint, open_checkpoint
from antidote_fast.fingerprint import block_name
from antidote_fast.loading import first_line, resolve_folder
from antidote_fast.verify import check_input

LORA_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Options of LoraConfig that change what a factor's input is, or which weights it stands for.
_NOT_UNDERSTOOD = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "megatron_config",
)
_PREFIX = "base_model.model."
MAX_RANK = 4096
_MAX_ADAPTED = 16_384  # modules of one adapter; a model of 400B parameters has some 1000
_MAX_ENTRIES = 2048  # of a list or a dict in its config
# Fields of the config that PEFT takes as patterns, with the repeats that one may have: those of
# the first line are matched once with each module, the others with a prefix and a suffix of PEFT's.
_PATTERN_FIELDS = {"target_modules": 6, "exclude_modules": 6}
_PATTERN_LISTS = {"modules_to_save": 2, "layers_pattern": 2, "rank_pattern": 2, "alpha_pattern": 2}


def check_adapter_config(config, where):
    """Refuse, by name, a kind of adapter whose factors this package does not understand.

    Args:
        config: ``adapter_config.json`` as a dict, or a peft config object.
        where: what the message calls the adapter.

    Raises:
        DataError: not LoRA, or a LoRA variant that is not understood. Plain LoRA, rsLoRA, DoRA,
            rank and alpha patterns and ``modules_to_save`` are. In a dict, also a rank above 4096
            and patterns whose matching could take for ever.
    """
    values = config if isinstance(config, dict) else vars(config)
    kind = values.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        kind = ascii(kind)[1:41].rstrip("'") if isinstance(kind, str) else type(kind).__name__
        raise DataError(f"{where}: is an adapter of type {kind}; only LORA is understood")
    for name in _NOT_UNDERSTOOD:
        if values.get(name):
            raise DataError(f"{where}: LoRA with {name} is not understood")
    if values.get("init_lora_weights") == "mica":
        raise DataError(f"{where}: LoRA with init_lora_weights='mica' is not understood")
    if isinstance(config, dict):
        _check_values(config, where)


def _check_values(config, where):
    """Types, sizes and patterns of a config that came from a file, before they are used."""
    for name, max_repeats in _PATTERN_FIELDS.items():
        value = config.get(name)
        _check_list(value if not isinstance(value, str) else [], name, list, where)
        if isinstance(value, str) and (problem := patterns.problem_of(value, max_repeats)):
            raise DataError(f"{where}: {name} {problem}")
    for name, max_repeats in _PATTERN_LISTS.items():
        value = config.get(name)
        value = [value] if isinstance(value, str) and name == "layers_pattern" else value
        _check_list(value, name, dict if name in ("rank_pattern", "alpha_pattern") else list, where)
        for pattern in value or ():
            if problem := patterns.problem_of(pattern, max_repeats):
                raise DataError(f"{where}: {name}: {_shown(pattern)} {problem}")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise DataError(
                f"{where}: rank {_shown(rank)}: must be an integer from 1 to {MAX_RANK}"
            )


def _check_list(value, name, kind, where):
    if value is None:
        return
    if not isinstance(value, kind):
        raise DataError(f"{where}: {name} must be a {kind.__name__}, not {type(value).__name__}")
    if len(value) > _MAX_ENTRIES or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: {name} must hold at most {_MAX_ENTRIES} names")


def _shown(value):
    return ascii(value)[:80]


def check_adapter(adapter: Checkpoint, base: Checkpoint):
    """Refuse an adapter that was not made for this base, or is not what was written.

    Of the weights a few rows are read; the files of a folder that this tool wrote are hashed.
    Compared are the adapter's own consistency (both factors, ranks), the base's layers and shapes,
    and the base's fingerprint where the adapter recorded one or names a base folder that exists.

    Raises:
        DataError: naming the tensor or what differs.
    """
    where = str(adapter.folder)
    check_adapter_config(adapter.config, where)
    check_input(adapter.folder)
    shapes = _factor_shapes(adapter)
    base_shapes = {}
    for name, entry in base.tensors.items():
        if name.endswith(".weight") and entry.dtype is not None and len(entry.shape) == 2:
            packed = not entry.dtype.is_floating_point
            base_shapes.setdefault(_tail(name), []).append(None if packed else entry.shape)
    for module, (rows, columns) in shapes.items():
        tail = _tail(module.removeprefix(_PREFIX) + ".weight")
        candidates = base_shapes.get(tail)
        if candidates is None:
            if "quantization_config" in base.config:
                continue
            raise DataError(f"{where}: adapts {module!r}, which the base {base.folder} lacks")
        if not any(c is None or c in ((rows, columns), (columns, rows)) for c in candidates):
            raise DataError(
                f"{where}: adapts {module!r} as {(rows, columns)}, which in the base "
                f"{base.folder} is {candidates[0]}"
            )
    _check_all_layers(adapter, base, shapes, base_shapes)
    _check_fingerprint(adapter, base)


def load_adapter(model, adapter, *, adapter_name="default"):
    """Put a LoRA adapter on a live model, strictly, its tensors in the dtype of the file.

    Args:
        model: the base model, as :func:`load_model` gives it.
        adapter: folder or hub name of the adapter, or its :class:`Checkpoint`.
        adapter_name: name of the adapter in the live model.

    Returns:
        The ``peft.PeftModel``, in eval mode.

    Raises:
        DataError: no such adapter, a pickle, a kind not understood, or tensors that are missing,
            left over or of other shapes than the model needs.
    """
    if not isinstance(adapter, Checkpoint):
        adapter = open_checkpoint(resolve_folder(adapter, "adapter"))
    where = str(adapter.folder)
    if not adapter.is_adapter:
        raise DataError(f"adapter={where!r}: is a whole model, not a PEFT adapter")
    check_adapter_config(adapter.config, where)
    check_input(adapter.folder)
    _factor_shapes(adapter)
    offloaded = {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values())
    offloaded = offloaded and any(p.is_meta for p in model.parameters())
    if adapter.config.get("use_dora") and offloaded:
        raise DataError(f"{where}: DoRA needs the base's weights, and some of them are offloaded")
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are checked below, as an error
            with _placed_already(model):
                live = peft.PeftModel.from_pretrained(
                    model, where, adapter_name=adapter_name, autocast_adapter_dtype=False
                )
        needed = peft.get_peft_model_state_dict(
            live, adapter_name=adapter_name, save_embedding_layers=False
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise AntidoteError(f"{where}: not enough memory to load it") from error
    except Exception as error:  # whatever a foreign config makes peft raise
        raise DataError(f"{where}: cannot be put on this model: {first_line(error)}") from error
    missing = sorted(set(needed) - set(adapter.tensors))
    if missing:
        raise DataError(
            f"{where}: lacks {len(missing)} tensors that this model needs, {missing[0]!r} first; "
            "it was made for another base"
        )
    extra = sorted(k for k in adapter.tensors if ".lora_" in k and k not in needed)
    if extra:
        raise DataError(
            f"{where}: has {len(extra)} tensors that this model has no place for, {extra[0]!r} "
            "first; it was made for another base"
        )
    _keep_file_dtype(live, adapter, adapter_name, offloaded)
    return live.eval()


@contextlib.contextmanager
def _placed_already(model):
    """Keep PEFT from placing a model anew that accelerate has placed: it reads offloaded weights as
    if they were there."""
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def _keep_file_dtype(live, adapter, adapter_name, offloaded):
    """PEFT makes the factors in the base's dtype; give them back the file's, bit for bit."""
    factors = {}
    for name, parameter in live.named_parameters():
        key = name.replace(f".{adapter_name}.weight", ".weight")
        if key != name and LORA_FACTOR.fullmatch(key):
            factors[key if key in adapter.tensors else _PREFIX + key] = name, parameter
    with torch.no_grad():
        for key, tensor in adapter.read(factors).items():
            name, parameter = factors[key]
            if not (parameter.is_meta and offloaded):
                parameter.data = tensor.to(parameter.device)
                continue
            # Beside an offloaded weight: on the device where accelerate brings that one to run.
            wrapper, linear = (live.get_submodule(name.rsplit(".", n)[0]) for n in (3, 1))
            device = wrapper.get_base_layer()._hf_hook.execution_device
            linear.weight = torch.nn.Parameter(tensor.to(device), requires_grad=False)
    left = [n for n, p in live.named_parameters() if p.is_meta and f".{adapter_name}." in n]
    if left and offloaded:
        raise DataError(f"{adapter.folder}: {left[0]!r} belongs to a part that is offloaded")


def _factor_shapes(adapter):
    """{module: (out_features, in_features)} that the factors stand for."""
    where = str(adapter.folder)
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
    expected_rank = _ranks(adapter.config)
    shapes = {}
    for module, pair in factors.items():
        if len(pair) != 2:
            raise DataError(f"{where}: {module!r} lacks lora_{'B' if 'A' in pair else 'A'}")
        rank, columns = pair["A"]
        rows, inner = pair["B"]
        expected = expected_rank(module.removeprefix(_PREFIX))
        if rank != inner or rank != expected:
            raise DataError(
                f"{where}: {module!r} has ranks {rank} (A) and {inner} (B); its config says "
                f"{expected}"
            )
        shapes[module] = (rows, columns)
    return shapes


def _ranks(config):
    """The rank that a checked config gives a module, by its name; as PEFT reads rank_pattern."""
    pairs = [
        (re.compile(rf"(?:{pattern})$").match, rank)
        for pattern, rank in (config.get("rank_pattern") or {}).items()
    ]

    def rank_of(name):
        # PEFT's own "(.*\.)?(pattern)$", without its search for the prefix.
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        return next((r for match, r in pairs if any(match(name[i:]) for i in starts)), config["r"])

    return rank_of


def _check_all_layers(adapter, base, shapes, base_shapes):
    """Plain names in target_modules mean every layer; fewer means a base with fewer layers."""
    config = adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(re.search(r"\d", str(t)) for t in targets):
        return
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    adapted = {_tail(module.removeprefix(_PREFIX) + ".weight") for module in shapes}
    for tail in sorted(base_shapes):
        module = tail.removesuffix(".weight")
        if any(module.endswith("." + t) for t in targets) and tail not in adapted:
            raise DataError(
                f"{adapter.folder}: does not adapt {module!r} of the base {base.folder}, which its "
                "target_modules name; it was made for another base"
            )


def _check_fingerprint(adapter, base):
    actual = base.fingerprint()
    recorded = (read_manifest(adapter.folder) or {}).get("base_fingerprint")
    if not recorded:
        named = adapter.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            return
        if not os.path.isfile(os.path.join(named, "config.json")):  # False for any odd text
            return
        folder = Path(named)
        if folder.resolve() == base.folder.resolve():
            return
        recorded = open_checkpoint(folder, trust_remote_code=True).fingerprint()
    if recorded and actual and recorded != actual:
        raise DataError(
            f"{adapter.folder}: was made for another base model than {base.folder} (fingerprint "
            f"{recorded}, not {actual})"
        )


def _tail(name):
    return block_name(name) or name
