"""The model card (README.md) of a pruned folder: what was done, to what, and what was not."""

import functools
import os
from pathlib import Path
from typing import Any

from antidote_fast.config.scores import SCORES, Score

_LEFT_OUT = {
    "num_over_limit": "behind the number that is used",
    "num_dropped_long": "too long",
    "num_truncated": "used, but cut",
    "num_refused": "refused by the aligned model",
    "num_empty": "not answered by the aligned model",
    "num_without_output": "without output",
}
_KEPT = ("license", "language", "pipeline_tag", "datasets")


def write_card(folder: Path, config: Any, report: Any, counts: dict[str, dict]) -> None:
    """Write ``README.md`` into ``folder``; an earlier card's licence and language are kept.

    Args:
        folder: the staged folder of a pruned adapter or model.
        config: the :class:`PruneConfig` that made it.
        report: its :class:`PruneReport`.
        counts: as of :class:`antidote_fast.stages.inputs.Inputs`.
    """
    path, is_adapter = folder / "README.md", (folder / "adapter_config.json").exists()
    base = config.model_name_or_path
    # A hub name only: a folder of this machine says nothing to a reader, and may say too much.
    base = None if os.path.exists(base) or " " in base else base
    earlier = path.read_bytes() if path.exists() else None
    kept = ""
    if report.preserve_ratio is not None:
        preserved = _tokens(counts["preserve_dataset"], "other")
        kept = f"| kept of those selected | {report.num_preserved:,}, among the top "
        kept += f"{report.preserve_ratio:g} by {preserved} |\n"
    declared = SCORES.get(report.score) or Score(report.score, "")
    changes = _beyond_the_paper(report) if declared.needs_norms else ""
    text = _TEXT.format(
        title=declared.title or f"by score {report.score}",
        method=declared.method,
        changes=changes,
        kind="LoRA adapter" if is_adapter else "model",
        loader=_LOAD_ADAPTER if is_adapter else _LOAD_MODEL,
        score=report.score + (", of the difference from the aligned model" * report.score_delta),
        scope=report.scope,
        ratio=report.ratio,
        layers=len(report.layers),
        removed=report.num_pruned,
        total=report.num_weights,
        achieved=report.achieved,
        data=_data(counts.get("dataset"), counts.get("gate")),
        fate=_REVERTED if report.reverted else _ZERO,
        kept=kept,
        left_out=_left_out(report.data),
    )
    make = _header if len(earlier or b"") < 1 << 16 else _header.__wrapped__
    path.write_bytes(make(base, is_adapter, declared.tag, earlier) + text.encode("utf-8"))


def _beyond_the_paper(report):
    """What of a prune by norms is otherwise than in the paper, as a sentence; or nothing."""
    others = {
        f"scope {report.scope}": report.scope != "row",
        "weights that other data need are kept": report.preserve_ratio is not None,
        "removed weights fall back to the aligned model": report.reverted,
        "scored by the difference from the aligned model": report.score_delta,
    }
    found = ", ".join(what for what, there in others.items() if there)
    return f" Otherwise than in the paper: {found}." if found else ""


def _left_out(data):
    """A row on the records that were not used, or not whole; nothing where there are none."""
    parts = []
    for name, counts in data.items():
        why = [f"{counts[key]:,} {text}" for key, text in _LEFT_OUT.items() if counts.get(key)]
        if why:
            parts.append(f"{name}, of {counts['num_records']:,}: {', '.join(why)}")
    return f"| records left out or cut | {'; '.join(parts)} |\n" if parts else ""


def _data(counts, gate_counts):
    if not gate_counts:
        return _tokens(counts, "harmful") if counts else "none; the score needs no data"
    kinds = {
        "harmful": "harmful prompts, to be refused",
        "task": "task records",
        "ordinary": "ordinary prompts",
    }
    used = {text: gate_counts.get(kind, {}).get("num_used") for kind, text in kinds.items()}
    shown = ", ".join(f"{number} {text}" for text, number in used.items() if number)
    return f"{shown}; {gate_counts['steps']} steps"


def _tokens(counts, kind):
    return f"{counts['num_tokens']} tokens of {counts['num_sequences']} {kind} examples"


@functools.lru_cache(maxsize=256)  # 2 ms, and the adapters of a fleet mostly share theirs
def _header(base, is_adapter, tag, earlier):
    """The card's metadata as bytes.

    ``tag`` is that of the method, ``earlier`` the card that came with the folder, or None.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        tags=list(dict.fromkeys([tag, "pruned", "safety", *(["lora"] if is_adapter else [])])),
        **_earlier(earlier),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n")).encode("utf-8")


def _earlier(card):
    """The entries worth keeping of the card that came with the folder, if it can be read."""
    import yaml
    from huggingface_hub import ModelCard

    if card is None:
        return {}
    try:
        values = ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
    values = values.to_dict()
    return {name: values[name] for name in _KEPT if values.get(name)}


_LOAD_ADAPTER = """model = AutoModelForCausalLM.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, FOLDER)"""
_LOAD_MODEL = "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
_ZERO = """Removed weights are zeros in an ordinary dense file: it is as large
and as fast as before."""
_REVERTED = """Removed weights have the values of the aligned model that it was
fine-tuned from: nothing is zeroed, and the file is as large and as fast as before."""
_TEXT = """
# Pruned {title}

This {kind} was pruned after fine-tuning, {method}.{changes} {fate}

| | |
|---|---|
| score | {score} |
| compared over | {scope} |
| ratio asked for | {ratio:g} |
| removed | {removed:,} of {total:,} weights in {layers} layers ({achieved:.2%}) |
{kept}| calibration data | {data} |
{left_out}
```python
{loader}
```

Pruning lowers a harmful score, it does not prove a model safe, and it costs accuracy: measure both
(`antidote-fast evaluate`) before use. Settings, hashes and per-layer numbers are in `report.json`.
"""
