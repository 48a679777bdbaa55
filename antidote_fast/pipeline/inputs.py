"""Everything that decides a stage's result, for ``resume``: other inputs are another run."""

import dataclasses
import hashlib
import json

from antidote_fast.commit import sha256_file
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
    "save_steps",
)
_LIBRARIES = ("antidote-fast", "torch", "transformers", "peft")


def run_inputs(config, base, adapter, *, records=None, norms=None) -> dict:
    """What must be the same for an interrupted run to go on.

    Args:
        config: a stage's frozen dataclass.
        base: checkpoint of the model: its fingerprint and the size and date of its files; hashing
            all of it would cost more than the pruning.
        adapter: checkpoint of the adapter, or None; hashed.
        records: the calibration or training data, where there are any; hashed.
        norms: :class:`antidote_fast.ActivationNorms` given instead.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_SETTINGS}
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in base.weight_files}
    inputs = {
        "settings": settings,
        "model": {"fingerprint": base.fingerprint(), "config": base.config, **files},
        "versions": {name: versions()[name] for name in _LIBRARIES},
    }
    if adapter is not None:
        weights = {file.name: sha256_file(file) for file in adapter.weight_files}
        inputs["adapter"] = {"config": adapter.config, **weights}
    if records is not None:
        inputs["data"] = _hash([dataclasses.astuple(record) for record in records])
    if norms is not None:
        sums = hashlib.sha256()
        for key in norms.keys:
            for kind in (norms.sq_sum, norms.norm_sum or {}):
                if key in kind:
                    sums.update(key.encode() + kind[key].numpy().tobytes())
        inputs["norms"] = [norms.num_tokens, norms.num_sequences, sums.hexdigest()]
    # As JSON gives it back: lists for tuples, strings for what it does not know.
    return json.loads(json.dumps(inputs, default=str))


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
