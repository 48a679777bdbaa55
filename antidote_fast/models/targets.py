"""Which weights of a model are pruned: found by walking its modules, never by a fixed path.

Embeddings and the output layer are never targets, tied or not. Of a weight that is computed from
other tensors (``torch.nn.utils.parametrize``, ``weight_norm``, ``spectral_norm``) a zero cannot be
kept by writing to one of them: it is refused by name. The exception is ``torch.nn.utils.prune``,
whose product of original and mask is zero where the original is.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from antidote_fast.distributed.fsdp import is_sharded
from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.masks import PackedMask
from antidote_fast.models.adapter_config import check_adapter_config

ALL_LINEAR = "all-linear"
_PEFT_PREFIX = "base_model.model."
# Leaf names of the query, key and value projections; the fused ones too.
_QKV = re.compile(
    r"(?:[qkv](?:_proj|_lin|)|w[qkv]|query|key|value"
    r"|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj"
    r"|c_attn|q_attn|qkv(?:_proj)?|query_key_value|Wqkv|W_pack)"
)
_OUTPUT_NAMES = ("lm_head", "embed_out")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Names of tensors that another one is computed from.
_SOURCE = re.compile(r"(^|\.)(parametrizations\..+|weight_(orig|mask|g|v|u))$")


@dataclass(frozen=True, eq=False)
class Target:
    """One weight that may be pruned.

    Args:
        key: the parameter's name as saved; PEFT: without the adapter's name.
        module: the module that owns the weight (``nn.Linear`` or transformers' ``Conv1D``).
        weight: the parameter, (out, in), or (in, out) where ``transposed``.
        transposed: True for ``Conv1D``.
        input_module: the module whose first input is the weight's input (PEFT's wrapper for a
            LoRA A, else ``module``).
        routed: True inside a routed expert, which may see no token at all.
        first_factor: for the LoRA B of a DoRA layer, its LoRA A; its input is computed then, as
            DoRA also calls its factors on an identity matrix.
        masked: True under ``torch.nn.utils.prune``: ``weight`` is the module's ``weight_orig``
            then, which its ``weight_mask`` is multiplied with; the key is that of the product.
    """

    key: str
    module: nn.Module
    weight: nn.Parameter
    transposed: bool
    input_module: nn.Module
    routed: bool = False
    first_factor: nn.Linear | None = None
    masked: bool = False

    def computed(self) -> torch.Tensor:
        """The weight that the module computes with: the parameter, or its masked copy."""
        weight = self.weight.detach()
        return weight * self.module.weight_mask if self.masked else weight

    def remove(self, mask: PackedMask) -> None:
        """Zero in the parameter what a :class:`PackedMask` (out, in) marks, if it is masked."""
        removed = mask.to_bool()
        self.weight.detach().masked_fill_(removed.t() if self.transposed else removed, 0)
        self.module.weight = self.computed()  # as the next forward will

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return self.weight.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Coverage:
    """What share of the weights inside a model's blocks the targets are.

    Args:
        targeted: elements in the targets.
        total: elements of all matrices inside blocks (PEFT: of all LoRA factors).
        not_linear: parameters of blocks with three dimensions (fused experts), which no target
            can reach.
    """

    targeted: int
    total: int
    not_linear: tuple[str, ...]


def find_targets(
    model: nn.Module, targets: str | Iterable[str] | None = None, ignore: str | Iterable[str] = ()
) -> list[Target]:
    """The weights to prune, in natural order of their names.

    Args:
        model: a transformers model, or a PEFT model with one active LoRA adapter.
        targets: None takes every LoRA A and B of the active adapter, and for a model without one
            the query, key and value projections (fused ones too), as in the paper.
            ``"all-linear"`` takes all linear layers (PEFT: all LoRA factors). Else a list of names:
            a module's full name, its last part or parts (``"q_proj"``), a class name
            (``"Linear"``), or ``re:`` and a pattern matched from the start of the full name, as in
            llm-compressor. For PEFT, names of adapted modules and of ``lora_A`` / ``lora_B`` both
            count.
        ignore: names or patterns of the same kind, left out.

    Raises:
        NothingPruned: nothing matched.
        UsageError: a pattern that is malformed or matches nothing while others match, or one that
            names a module which cannot be pruned.
        DataError: an adapter that is not understood, merged, disabled or not alone; quantised
            weights; weights that are computed from other tensors, or no plain parameters; two
            targets that share memory.
    """
    model = getattr(model, "_orig_mod", model)
    wanted = _patterns("targets", targets)
    unwanted = _patterns("ignore", ignore)
    adapter = _active_adapter(model)
    candidates = _lora_targets(model, adapter) if adapter else _linear_targets(model)
    chosen = []
    hits = dict.fromkeys(wanted or (), False)
    for target, names, problem in candidates:
        if _is_chosen(names, _classes(target.module), adapter is not None, hits, unwanted):
            if problem:
                raise DataError(problem)
            chosen.append(target)
    if wanted is not None:
        _check_hits(model, targets, hits)
    if not chosen:
        what = "a query, key or value projection" if wanted is None else f"targets={targets!r}"
        outside = f" outside of ignore={list(ignore)!r}" if unwanted else ""
        raise NothingPruned(f"nothing to prune: no linear layer is {what}{outside}")
    if not adapter:
        _check_not_packed(model, chosen)
    for target in chosen:
        weight, refused = target.weight, None
        if weight.dtype not in _FLOATS:
            refused = f"is {weight.dtype}; must be float32, bfloat16 or float16"
        elif type(weight) not in (torch.Tensor, nn.Parameter) and not is_sharded(weight):
            refused = f"is a {type(weight).__name__}; must be a plain parameter"
        elif weight.dim() != 2:
            refused = f"has shape {tuple(weight.shape)}; must be a matrix"
        if refused:
            raise DataError(f"{target.key}: {refused}")
    owners = {}
    for target in chosen:
        first = owners.setdefault(id(target.weight), target)
        if first is not target:
            both = f"{first.key} and {target.key}"
            raise DataError(f"{both} share one weight; leave one out with ignore")
    # A target may be tied to what another module computes its weight from.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        target = owners.get(id(parameter))
        if target is not None and not target.masked and _SOURCE.search(name):
            why = f"another weight is computed from it ({name}); leave it out with ignore"
            raise DataError(f"{target.key}: {why}")
    return sorted(chosen, key=lambda target: natural_key(target.key))


def coverage(model: nn.Module, targets: Sequence[Target]) -> Coverage:
    """How much of the model's blocks ``targets`` (of :func:`find_targets`) make up."""
    keys = {t.key for t in targets}
    in_lora = any(".lora_" in key for key in keys)
    total, not_linear = 0, []
    for name, parameter in model.named_parameters():
        in_block = re.search(r"\.\d+\.", name) and ".lora_" not in name and parameter.dim() > 1
        if re.search(r"\.lora_[AB]\.", name) if in_lora else in_block:
            total += parameter.numel()
            if parameter.dim() > 2 and not in_lora:
                not_linear.append(name)
    return Coverage(sum(t.weight.numel() for t in targets), total, tuple(not_linear))


def first_computed(model: nn.Module) -> str | None:
    """The first tensor of a live model from which another one is computed; None without any.

    What ``save_pretrained`` writes of such a model no model of its class can load.
    """
    adapter = bool(getattr(model, "peft_config", None))  # then its factors alone are saved
    names = (name for name, _ in model.named_parameters() if not adapter or ".lora_" in name)
    return next((name for name in names if _SOURCE.search(name)), None)


def check_names(keys: Iterable[str]) -> None:
    """Refuse names of tensors from which a weight is computed: a DataError of the first one."""
    for key in keys:
        if _SOURCE.search(key):
            raise DataError(
                f"{key}: is what a weight is computed from, not the weight; make the weight "
                "permanent first (remove_parametrizations, or torch.nn.utils.prune.remove)"
            )


def select_keys(
    keys: Collection[str],
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
) -> list[str]:
    """What of saved parameter names ``targets`` and ``ignore`` mean, in natural order.

    As :func:`find_targets` where there are names alone; class names match nothing. With
    ``targets=None`` every LoRA A and B, and where there is none the query, key and value weights.

    Raises:
        NothingPruned, UsageError: as :func:`find_targets`.
    """
    wanted = _patterns("targets", targets)
    unwanted = _patterns("ignore", ignore)
    lora = [k for k in keys if re.search(r"\.lora_[AB]\.weight$", k)]
    candidates = lora or [
        k
        for k in keys
        if k.endswith(".weight") and re.search(r"(^|\.)\d+\.", k) and "norm" not in k.split(".")[-2]
    ]
    hits = dict.fromkeys(wanted or (), False)
    chosen = [
        key for key in candidates if _is_chosen(_names_of_key(key), (), bool(lora), hits, unwanted)
    ]
    missed = [pattern for pattern, hit in hits.items() if not hit]
    if 0 < len(missed) < len(hits):
        raise UsageError(f"targets: {missed[0]!r} matches no weight here")
    if not chosen:
        raise NothingPruned(f"nothing to prune: no weight here is targets={targets!r}")
    return sorted(chosen, key=natural_key)


def natural_key(text: str) -> list:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    # Not int(): it refuses thousands of digits, and names come from files.
    parts = re.split(r"([0-9]+)", text)
    return [(len(p.lstrip("0")), p.lstrip("0")) if i % 2 else p for i, p in enumerate(parts)]


def _patterns(argument, value):
    """None (the default, or everything), or a list of checked patterns."""
    if value is None:
        return None if argument == "targets" else []
    values = [value] if isinstance(value, str) else list(value)
    if argument == "targets" and not values:
        raise UsageError("targets=[]: must name at least one module, or be left out")
    for pattern in values:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(f"{argument}: {pattern!r} must be a name or a re: pattern")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"{argument}: {pattern!r} is not a pattern: {error}") from None
    return values


def _is_chosen(names, classes, is_lora, hits, unwanted):
    """Whether patterns mean a weight; ``hits`` notes which, and is empty for the default."""
    matched = [pattern for pattern in hits if _matches(pattern, names, classes)]
    hits.update(dict.fromkeys(matched, True))
    default = is_lora or _QKV.fullmatch(names[0].rsplit(".", 1)[-1]) is not None
    take = bool(matched) if hits else default
    return take and not any(_matches(pattern, names, classes) for pattern in unwanted)


def _matches(pattern, names, classes=()):
    if pattern == ALL_LINEAR or pattern in classes:
        return True
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return any(name == pattern or name.endswith("." + pattern) for name in names)


def _is_routed(name):
    return re.search(r"(^|\.)experts\.\d+(\.|$)", name) is not None


def _names_of_key(key):
    """The names a saved weight answers to: its module's; for a LoRA factor the adapted one's."""
    full = key.removesuffix(".weight")
    lora = re.fullmatch(r"(.+)\.(lora_[AB])", full)
    if lora is None:
        return [full]
    plain = lora[1].removeprefix(_PEFT_PREFIX)
    return [plain, lora[1], full, f"{plain}.{lora[2]}"]


def _is_conv1d(module):
    # By name: transformers need not be imported for a model that does not use it.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linear_targets(model):
    """(Target, names, why it cannot be pruned or None) of linear layers but the output layer."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is output]
    outside = {id(p) for m in embeddings for p in m.parameters() if p.dim() > 1}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        weight, masked, problem = _weight_of(name, module)
        if name.rsplit(".", 1)[-1] in _OUTPUT_NAMES or id(weight) in outside:
            continue
        fields = f"{name}.weight", module, weight, _is_conv1d(module), module, _is_routed(name)
        yield Target(*fields, masked=masked), [name], problem


def _weight_of(name, module):
    """(the tensor to write to, whether a mask is multiplied with it, why there is none or None).

    The module's ``weight`` is not asked for: spectral_norm changes its state with every look.
    """
    for tensors in (module._parameters, module._buffers):
        if tensors.get("weight") is not None:
            return tensors["weight"], False, None
    if parametrize.is_parametrized(module, "weight"):
        kinds = ", ".join(type(part).__name__ for part in module.parametrizations.weight)
        original = next(module.parametrizations.weight.parameters(), None)
        return original, False, _not_kept(name, f"{kinds} (torch.nn.utils.parametrize)")
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return module.weight_orig, True, None
        if getattr(hook, "name", None) == "weight":
            return None, False, _not_kept(name, f"{type(hook).__name__} (torch.nn.utils)")
    return None, False, f"{name}: its weight is no parameter, and would not be saved as one"


def _not_kept(name, by):
    return (
        f"{name}: its weight is computed by {by}, so that zeros in its originals are not zeros in "
        "it; make it permanent first, or leave it out with ignore"
    )


def _classes(module):
    return [c.__name__ for c in type(module).__mro__ if c is not object]


def _lora_targets(model, adapter):
    """(Target, names, why it cannot be pruned or None) of every LoRA A and B of the adapter."""
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict) or adapter not in factors:
            continue
        problem = _lora_problem(name, module, adapter)
        saved = name if name.startswith(_PEFT_PREFIX) else _PEFT_PREFIX + name
        first, second = factors[adapter], module.lora_B[adapter]
        routed = _is_routed(name)
        plain = adapter not in getattr(module, "lora_variant", {})
        for factor, linear, source, before in (
            ("lora_A", first, module, None),
            ("lora_B", second, second if plain else module, None if plain else first),
        ):
            key = f"{saved}.{factor}.weight"
            parts = None, False, problem
            weight, masked, unfit = parts if problem else _weight_of(f"{name}.{factor}", linear)
            target = Target(key, linear, weight, False, source, routed, before, masked)
            yield target, _names_of_key(key), unfit


def _lora_problem(name, module, adapter):
    """Why a LoRA layer cannot be pruned; None where it can."""
    if getattr(module, "merged", False):
        return f"{name}: the adapter is merged into the base; unmerge it first"
    if getattr(module, "disable_adapters", False):
        return f"{name}: the adapter is disabled; enable it first"
    linears = (module.lora_A[adapter], module.lora_B[adapter])
    # PEFT adapts a bare parameter (fused experts) by changing it: no input flows into its factors.
    parameter = getattr(module, "parameter_name", None)
    if parameter is not None or not all(isinstance(linear, nn.Linear) for linear in linears):
        what = type(module.get_base_layer()).__name__ + (f".{parameter}" if parameter else "")
        return f"{name}: LoRA on {what} is not understood; leave it out with ignore"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return f"{name}: LoRA variant {type(variant).__name__} is not understood"
    return None


def _active_adapter(model):
    """Name of the one active LoRA adapter, or None for a model without adapters."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    active = [active] if isinstance(active, str) else list(active or [])
    if len(active) != 1:
        raise DataError(
            f"adapters {sorted(configs)}: {len(active)} are active ({active}); activate one"
        )
    check_adapter_config(configs[active[0]], f"adapter {active[0]!r}")
    return active[0]


def _check_hits(model, targets, hits):
    missed = [pattern for pattern, hit in hits.items() if not hit]
    for pattern in missed:
        for name, module in model.named_modules():
            if name and _matches(pattern, [name], _classes(module)):
                what = f"{name} ({type(module).__name__})"
                not_linear = "which is not a linear layer that can be pruned"
                raise UsageError(f"targets: {pattern!r} matches {what}, {not_linear}")
    nowhere = "matches no module of this model"
    if 0 < len(missed) < len(hits):
        raise UsageError(f"targets: {missed[0]!r} {nowhere}")
    if missed:
        raise NothingPruned(f"nothing to prune: targets={targets!r} {nowhere}")


def _check_not_packed(model, targets):
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    dtypes = [target.weight.dtype for target in targets]
    packed = [d for d in dtypes if not d.is_floating_point or d.itemsize == 1]
    if quantization is None and not getattr(model, "is_quantized", False) and not packed:
        return
    method = getattr(quantization, "quant_method", None)
    method = getattr(method, "value", method) or (packed[0] if packed else "unknown")
    raise DataError(
        f"the model is quantised ({method}); its packed weights cannot be pruned one by one: prune "
        "an adapter on it, or the model before quantisation"
    )
