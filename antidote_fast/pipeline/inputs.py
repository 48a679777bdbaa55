"""Everything that decides a stage's result, for ``resume``: other inputs are another run."""

import dataclasses
import hashlib
import json
from pathlib import Path

from antidote_fast.pipeline.stage import versions

# Where the output goes, how much memory it may take and where inputs lie decides no result.
_NOT_SETTINGS = (
    "output_dir",
    "overwrite",
    "resume",
    "max_memory",
    "model_name_or_path",
    "adapter",
    "dataset",
    "harmful_dataset",
    "safe_dataset",
    "norms",
    "preserve_dataset",
    "preserve_norms",
    "base_model",
    "save_steps",
)
_LIBRARIES = ("antidote-fast", "torch", "transformers", "peft")


def run_inputs(
    config,
    base,
    adapter,
    *,
    records=None,
    norms=None,
    preserve_records=None,
    preserve_norms=None,
    aligned=None,
) -> dict:
    """What must be the same for an interrupted run to go on.

    Args:
        config: a stage's frozen dataclass.
        base: checkpoint of the model: its fingerprint and the size and date of its files; hashing
            all of it would cost more than the pruning.
        adapter: checkpoint of the adapter, or None; hashed.
        records: the calibration or training data, where there are any; hashed.
        norms: :class:`antidote_fast.ActivationNorms` given instead.
        preserve_records, preserve_norms: the same of what is to be preserved.
        aligned: checkpoint of the model that removed weights fall back to, told as ``base`` is.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_SETTINGS}
    inputs = {
        "settings": settings,
        "model": _model(base),
        "versions": {name: versions()[name] for name in _LIBRARIES},
    }
    if adapter is not None:
        weights = {Path(path).name: digest for path, digest in adapter.digests().items()}
        inputs["adapter"] = {"config": adapter.config, **weights}
    for name, held in (("data", records), ("preserve data", preserve_records)):
        if held is not None:
            inputs[name] = _hash([dataclasses.astuple(record) for record in held])
    for name, given in (("norms", norms), ("preserve norms", preserve_norms)):
        if given is not None:
            inputs[name] = _sums(given)
    if aligned is not None:
        inputs["base model"] = _model(aligned)
    # As JSON gives it back: lists for tuples, strings for what it does not know.
    return json.loads(json.dumps(inputs, default=str))


def _model(checkpoint):
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in checkpoint.weight_files}
    return {"fingerprint": checkpoint.fingerprint(), "config": checkpoint.config, **files}


def _sums(norms):
    sums = hashlib.sha256()
    for key in norms.keys:
        for kind in (norms.sq_sum, norms.norm_sum or {}):
            if key in kind:
                sums.update(key.encode() + kind[key].numpy().tobytes())
    return [norms.num_tokens, norms.num_sequences, sums.hexdigest()]


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
