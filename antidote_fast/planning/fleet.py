"""The plan of a fleet."""

import math

from antidote_fast.config.fleet import FleetConfig, parse_shard
from antidote_fast.errors import AntidoteError
from antidote_fast.files.commit import check_parent
from antidote_fast.files.manifest import read_manifest
from antidote_fast.fleet.manifest import read_manifest_file
from antidote_fast.fleet.worker import AHEAD, Worker, sets_of
from antidote_fast.models.adapters import check_adapter
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.plan import Builder, Plan


def plan_fleet(config: FleetConfig) -> Plan:
    """As :func:`antidote_fast.fleet.fleet.run` would go, as if nothing were done yet."""
    index, count = parse_shard(config.shard)
    jobs = read_manifest_file(config)[index::count]
    check_parent(config.output_dir)
    worker = Worker(config)
    worker.check_data(jobs)
    made = Builder("fleet", config, worker.base)
    made.read(worker.base, config.dataset, config.preserve_dataset)
    sizes, refused, done, flops, matrices = [], [], 0, {}, []
    for job in jobs:
        try:
            adapter = worker.open_adapter(job.config)
            check_adapter(adapter, worker.base)
            names = sets_of(job.config)
            batches = [batch for name in names for batch in worker.data_of(job.config, name)[0]]
        except AntidoteError as error:
            refused.append(f"{job.name}: {error}")
            continue
        sizes.append(sum(entry.end - entry.start for entry in adapter.tensors.values()))
        done += read_manifest(job.config.output_dir) is not None
        matrices = matrices or [
            entry.shape
            for key, entry in adapter.tensors.items()
            if ".lora_" in key and len(entry.shape) == 2
        ]
        if not names:
            continue
        if made.cost is None:
            made.load(adapter)
        chosen = str((job.config.targets, job.config.ignore))
        if chosen not in flops:
            targets = find_targets(made.cost.model, job.config.targets, job.config.ignore)
            flops[chosen] = made.cost.forward_until([target.input_module for target in targets])
        made.forward("calibrate", [batch["input_ids"].shape for batch in batches], flops[chosen])
    made.plan.data = {"jobs": len(jobs), "refused": len(refused), "with a folder already": done}
    made.plan.notes += [f"would be set aside: {line}" for line in refused[:3]]
    made.plan.bytes_read += 2 * sum(sizes)  # read, and copied before it is written into
    made.plan.bytes_written = sum(sizes)
    made.prunes = len(sizes) * sum(map(math.prod, matrices))
    if matrices:
        made.columns = max(matrices, key=math.prod)[1]
    if made.cost is not None:
        made.hold("weights", made.cost.weight_bytes)
        made.hold("activations", made.cost.activation_bytes(*made.shape))
    made.hold("adapters on their way", 2 * (1 + AHEAD) * max(sizes, default=0))
    return made.finish()
