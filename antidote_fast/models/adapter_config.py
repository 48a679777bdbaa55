"""``adapter_config.json`` of a LoRA adapter: which kinds are understood, and how much it may ask.

Whatever makes PEFT write into the base's own weights is refused by name: "adapter off" must be the
aligned model, and the next adapter of a fleet must find the base as it was.
"""

import re
from collections.abc import Iterable
from typing import Any

from antidote_fast.errors import DataError
from antidote_fast.models import patterns
from antidote_fast.models.patterns import shown

MAX_RANK = 4096
_MAX_ALPHA = 1 << 20
_MAX_ENTRIES = 2048  # of a list or a dict
_MAX_RANKS = 256  # different ones in one adapter; PEFT's cache holds some 500 compiled patterns
_MAX_SAVED = 64  # modules_to_save, layers_pattern: each is compiled for each module
_MAX_TOKENS = 1 << 16
# Options of LoraConfig that change what a factor's input is, which weights it stands for, or
# (KaSA) the base.
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
# Values of init_lora_weights that say how factors began, and nothing of the base.
_FACTORS_ONLY = ("gaussian", "eva", "orthogonal")
# Those that take out of the base's weights what they put into the factors; PEFT goes by the start.
_INTO_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_NAMES = ("target_modules", "exclude_modules")
_PER_MODULE = ("rank_pattern", "alpha_pattern")
_COLLECTIONS = (  # (field, what it is, how much it may hold)
    *((name, list, _MAX_ENTRIES) for name in _NAMES),
    *((name, list, _MAX_SAVED) for name in ("modules_to_save", "layers_pattern")),
    *((name, dict, _MAX_ENTRIES) for name in _PER_MODULE),
)


def check_adapter_config(config: Any, where: str) -> None:
    """Refuse, by name, a kind of adapter whose factors this package does not understand.

    Args:
        config: ``adapter_config.json`` as a dict, or a peft config object.
        where: what the message calls the adapter.

    Raises:
        DataError: not LoRA, a LoRA variant that is not understood, or one that changes the base
            (PiSSA, CorDA, OLoRA, LoftQ, LoRA-GA, biases). Plain LoRA, rsLoRA, DoRA, rank and alpha
            patterns and ``modules_to_save`` are understood. In a dict, also numbers out of range:
            nothing in it is matched yet (:func:`match_modules`).
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
    _check_init(values.get("init_lora_weights"), where)
    bias = values.get("bias")
    if bias not in (None, "none"):
        raise DataError(
            f"{where}: LoRA with bias={shown(bias)} replaces biases of the base; must be 'none': "
            "merge it into its base (peft: merge_and_unload), and give that as the model"
        )
    if isinstance(config, dict):
        _check_values(config, where)


def _check_init(value, where):
    kind = value.lower() if isinstance(value, str) else value
    if kind is None or isinstance(kind, bool) or kind in _FACTORS_ONLY:
        return
    if kind == "mica":
        raise DataError(f"{where}: LoRA with init_lora_weights='mica' is not understood")
    if isinstance(kind, str) and kind.startswith(_INTO_THE_BASE):
        raise DataError(
            f"{where}: LoRA with init_lora_weights={shown(value)} changes the base's own weights; "
            "save it as plain LoRA (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion), and give that"
        )
    must = "true, false, gaussian, eva or orthogonal"
    raise DataError(f"{where}: init_lora_weights={shown(value)}: must be {must}")


def _check_values(config, where):
    """Types and sizes of a config that came from a file, before anything is made of them."""
    for name, kind, most in _COLLECTIONS:
        value = config.get(name)
        as_text = isinstance(value, str) and name in (*_NAMES, "layers_pattern")
        value = [value] if as_text else value
        if value is None:
            continue
        if not isinstance(value, kind):
            what = f"{kind.__name__}, not {type(value).__name__}"
            raise DataError(f"{where}: {name} must be a {what}")
        if len(value) > most or not all(isinstance(item, str) for item in value):
            raise DataError(f"{where}: {name} must hold at most {most} names")
        for pattern in value if as_text or name not in _NAMES else ():
            patterns.check_pattern(pattern, name, where)
            if name == "modules_to_save" and not patterns.is_plain(pattern):
                raise DataError(f"{where}: {name}: {shown(pattern)} is not a module's name")
        if kind is dict and len(set(map(repr, value.values()))) > _MAX_RANKS:
            raise DataError(f"{where}: {name}: must hold at most {_MAX_RANKS} different values")
    if isinstance(config.get("target_modules"), str):  # as PEFT says
        for name in ("layers_to_transform", "layers_pattern"):
            if config.get(name) is not None:
                raise DataError(f"{where}: {name}: must be left out where target_modules is text")
    ranks, alphas = ((config.get(name) or {}).values() for name in _PER_MODULE)
    for rank in (config.get("r"), *ranks):
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise DataError(f"{where}: rank {shown(rank)}: must be an integer from 1 to {MAX_RANK}")
    for alpha in (config.get("lora_alpha", 8), *alphas):
        if type(alpha) not in (int, float) or not abs(alpha) <= _MAX_ALPHA:
            must = f"must be a number of at most {_MAX_ALPHA}"
            raise DataError(f"{where}: alpha {shown(alpha)}: {must}")
    rate = config.get("lora_dropout", 0)
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise DataError(f"{where}: lora_dropout={shown(rate)}: must be at least 0 and less than 1")
    for name in _FLAGS:
        if config.get(name) not in (None, True, False):
            raise DataError(f"{where}: {name}={shown(config[name])}: must be true or false")
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict) and len(tokens) > _MAX_SAVED:
        raise DataError(f"{where}: trainable_token_indices must name at most {_MAX_SAVED} modules")
    indices = [("layers_to_transform", config.get("layers_to_transform"), _MAX_ENTRIES)]
    for some in tokens.values() if isinstance(tokens, dict) else [tokens]:
        indices.append(("trainable_token_indices", some, _MAX_TOKENS))
    for name, value, most in indices:
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > most:
            raise DataError(f"{where}: {name} must hold at most {most} numbers")
        for number in numbers if value is not None else ():
            if type(number) is not int or not 0 <= number < 1 << 31:
                raise DataError(f"{where}: {name}: {shown(number)} is not a number from 0 to 2**31")


def match_modules(config: dict, names: Iterable[str], where: str) -> dict:
    """Match the patterns of a config (a checked dict) with ``names`` of modules, in bounded time.

    Returns:
        ``target_modules`` and ``exclude_modules`` where the config has them as a pattern: the names
        that they mean. ``layers_pattern`` is only tried.

    Raises:
        DataError: naming the field and the pattern.
    """
    matched = {}
    for name in _NAMES:
        value = config.get(name)
        if isinstance(value, str) and value.lower() != "all-linear":
            matched[name] = list(patterns.first_matches([value], names, "whole", name, where))
    layers = config.get("layers_pattern") or []
    layers = [layers] if isinstance(layers, str) else layers
    patterns.first_matches(layers, names, "layers", "layers_pattern", where)
    for name in _PER_MODULE:
        values_of(config, name, names, where)
    return matched


def values_of(config: dict, name: str, modules: Iterable[str], where: str) -> dict:
    """{module: value} of ``rank_pattern`` or ``alpha_pattern``, for modules that a pattern matches.

    Raises:
        DataError: as :func:`match_modules`.
    """
    by_pattern = config.get(name) or {}
    patterns_of = patterns.first_matches(by_pattern, modules, "end", name, where)
    return {module: by_pattern[pattern] for module, pattern in patterns_of.items()}


def without_patterns(
    config: dict, modules: Iterable[str], names: Iterable[str], where: str
) -> dict:
    """The fields of a config that PEFT may be given, so that it runs no pattern of the file's.

    Args:
        config: the dict, after :func:`check_adapter_config`.
        modules: that the adapter's file adapts.
        names: of all modules of the live model.

    Returns:
        Fields that stand in for the config's own; a module that the model lacks is in none. Factors
        begin as they are made, since the file's take their place.

    Raises:
        DataError: as :func:`match_modules`.
    """
    fields = {"init_lora_weights": False, **match_modules(config, names, where)}
    if fields.get("target_modules") == []:
        raise DataError(
            f"{where}: target_modules: {shown(config['target_modules'])} matches no module of "
            "this model; it was made for another base"
        )
    known = set(names)
    for name in _PER_MODULE:
        groups = {}
        for module, value in values_of(config, name, modules, where).items():
            if module in known:
                groups.setdefault(value, []).append(re.escape(module))
        fields[name] = {f"^(?:{'|'.join(group)})": value for value, group in groups.items()}
    return fields
