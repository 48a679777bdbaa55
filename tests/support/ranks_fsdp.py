"""What each of two processes does in test_fsdp.py; no test by itself (:mod:`ranks` starts it)."""

import json

import tiny
import torch
from ranks import RECORDS, refused
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from antidote_fast import ActivationNorms, Selection, oneshot, prune_model_
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.models.targets import find_targets


def fsdp(world, folder):
    """FSDP2: norms, rows and reports of sharded models against whole ones."""

    def shard(model, layers, **options):
        for layer in layers if layers is not None else ():
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    def gathered(model):
        return {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }

    def compare(
        name,
        build,
        layers_of,
        collect_options=None,
        targets=None,
        mesh=None,
        preserve=False,
        **selection,
    ):
        """Norms of one process and its prune of a whole model, beside those of the shards."""
        whole, sharded = build(), build()
        shard(sharded, layers_of(sharded), mesh=mesh)
        mine = world.shard(batches)
        norms = ActivationNorms.collect(
            sharded, mine, world=world, targets=targets, **collect_options or {}
        )
        alone = ActivationNorms.collect(whole, batches, targets=targets, **collect_options or {})
        worst = max(
            float(((norms.sq_sum[k] - v).abs() / v.clamp_min(1e-30)).max())
            for k, v in alone.sq_sum.items()
        )
        choice = Selection(**({"ratio": 0.3} | selection))
        options = {"targets": targets, "return_masks": True}
        if preserve:
            others = tiny.batches(count=5, seed=1)
            options["preserve_norms"] = ActivationNorms.collect(whole, others, targets=targets)
        report = prune_model_(sharded, norms, choice, **options)
        expected = prune_model_(whole, norms, choice, **options)
        state, wanted = gathered(sharded), whole.state_dict()
        rows = {}
        for target in find_targets(sharded, targets):
            held = target.weight.to_local().shape[0]
            rows[target.key] = held
            mask, full = (r.masks[target.key].to_bool() for r in (report, expected))
            start = min(-(-len(full) // world.size) * world.rank, len(full))
            start = 0 if held == len(full) else start
            assert torch.equal(mask, full[start : start + held]), (name, target.key)
        # A forward after the prune; it also leaves the root's weights whole, to be sharded again.
        after = [fingerprint_model(sharded), fingerprint_model(whole)]
        with torch.no_grad():
            ids = batches[0]["input_ids"]
            outputs = [model(input_ids=ids).logits for model in (sharded, whole)]
        drop = ("seconds", "masks", "layers")
        plain = [{k: v for k, v in vars(r).items() if k not in drop} for r in (report, expected)]
        layers = [
            [{k: v for k, v in vars(layer).items() if k != "seconds"} for layer in r.layers]
            for r in (report, expected)
        ]
        results[name] = {
            "worst": worst,
            "counts": [norms.num_sequences, norms.num_tokens],
            "alone": [alone.num_sequences, alone.num_tokens],
            "fingerprints": [norms.fingerprint, alone.fingerprint],
            "after": after,
            "same weights": set(state) == set(wanted)
            and all(torch.equal(state[k], wanted[k]) for k in wanted),
            "same logits": torch.equal(*outputs),
            "removed": report.num_pruned,
            "preserved": report.num_preserved,
            "same report": plain[0] == plain[1] and layers[0] == layers[1],
            "report": json.loads(json.dumps(report.to_dict())),
            "rows": sorted(set(rows.values())),
        }

    results = {}
    batches = tiny.batches(count=5)
    blocks = lambda model: model.model.layers  # noqa: E731
    compare("llama", tiny.build, blocks)
    compare("root alone", tiny.build, lambda model: None)
    compare("bf16", lambda: tiny.build(dtype=torch.bfloat16), blocks)
    compare("mean", tiny.build, blocks, {"aggregation": "mean", "response_only": True})
    compare("smallest", tiny.build, blocks, largest=False, targets=["all-linear"])

    compare("preserve", tiny.build, blocks, preserve=True, preserve_ratio=0.2)
    compare("n:m", tiny.build, blocks, ratio=None, n_m=(2, 4))

    for name, shape in {"replicas of shards": (1, 2), "replicas": (2, 1)}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        compare(name, tiny.build, blocks, mesh=mesh)

    def odd():
        """Three rows for two ranks, and one row, which one rank does not hold at all."""
        model = tiny.build()
        model.model.layers[0].mlp.extra = nn.Linear(32, 3, bias=False)
        model.model.layers[1].mlp.extra = nn.Linear(32, 1, bias=False)
        for i in (0, 1):
            mlp = model.model.layers[i].mlp
            with torch.no_grad():
                mlp.extra.weight.copy_(torch.arange(mlp.extra.weight.numel()).view(-1, 32) % 7 - 3)
            mlp.register_forward_pre_hook(see)
        return model

    def see(module, args):
        module.extra(args[0])

    compare("odd", odd, blocks, targets=["extra", "q_proj"])
    compare(
        "lora",
        lambda: tiny.add_lora(tiny.build(), r=3),
        lambda model: model.base_model.model.model.layers,
    )
    compare(
        "dora",
        lambda: tiny.add_lora(tiny.build(), use_dora=True),
        lambda model: model.base_model.model.model.layers,
    )

    # More batches on one rank than on the other, one that counts nothing, and none at all.
    model = tiny.build()
    shard(model, blocks(model))
    norms = ActivationNorms.collect(model, batches if world.rank else [], world=world)
    norms.save(folder / f"fsdp-one.{world.rank}.safetensors")
    norms = ActivationNorms.collect(model, batches[: 1 + 2 * world.rank], world=world)
    norms.save(folder / f"fsdp-uneven.{world.rank}.safetensors")

    live, whole = shard(tiny.build(), None), tiny.build()
    options = {"dataset": RECORDS, "tokenizer": tiny.tokenizer(), "ratio": 0.3}
    report = oneshot(live, **options, world=world)
    expected = oneshot(whole, **options)
    state, wanted = gathered(live), whole.state_dict()
    results["oneshot"] = [
        report.num_pruned == expected.num_pruned > 0,
        all(torch.equal(state[k], wanted[k]) for k in wanted),
        refused(lambda: oneshot(live, **options, world=world, output_dir=folder / "x")),
    ]

    def prune(selection=None, norms=norms, **options):
        """[what is raised, whether the weights are as before] of a prune of a sharded model."""
        live = shard(tiny.build(), None)
        before = gathered(live)
        choice = Selection(0.3) if selection is None else selection
        found = refused(lambda: prune_model_(live, norms, choice, **options))
        after = gathered(live)
        return [found, all(torch.equal(before[k], after[k]) for k in before)]

    results["tensor"] = prune(Selection(0.3, scope="tensor"))
    results["global"] = prune(Selection(0.3, scope="global"))
    results["no selection"] = prune(0.3)
    results["random"] = prune(score="random")
    base = {target.key: target.weight for target in find_targets(tiny.build(seed=1))}
    results["base"] = prune(base_weights=base)
    results["magnitude"] = prune(score="magnitude", norms=None)[0]
    apart = ActivationNorms.collect(tiny.build(), batches[world.rank : world.rank + 1])
    results["not added up"] = prune(norms=apart)
    results["not added up either"] = prune(preserve_norms=apart)
    results["no world"] = refused(lambda: ActivationNorms.collect(model, batches))
    ill = tiny.build()
    ill.model.layers[1].self_attn.q_proj.weight.data[-2, 0] = torch.nan  # of the last rank
    shard(ill, None)
    found = refused(lambda: prune_model_(ill, norms, Selection(0.3)))
    local = ill.model.layers[0].self_attn.q_proj.weight.to_local()
    results["nan weight"] = [found, int((local == 0).sum())]
    ill = tiny.build()
    if world.rank == 0:
        batches[0]["input_ids"][0, 0] = 9
    ill.model.embed_tokens.weight.data[9] = torch.nan
    shard(ill, blocks(ill))
    results["nan input"] = refused(
        lambda: ActivationNorms.collect(ill, world.shard(batches[:2]), world=world)
    )
    parallel, mesh = tiny.build(), init_device_mesh("cpu", (2,))
    for layer in blocks(parallel):
        weight = distribute_tensor(layer.self_attn.q_proj.weight.data, mesh, [Shard(0)])
        layer.self_attn.q_proj.weight = nn.Parameter(weight)
    results["tensor parallel"] = refused(
        lambda: ActivationNorms.collect(parallel, batches, targets=["q_proj"], world=world)
    )
    model = shard(tiny.build(), None, shard_placement_fn=lambda p: Shard(min(1, p.dim() - 1)))
    results["columns"] = [
        refused(lambda: prune_model_(model, None, Selection(0.3), score="magnitude")),
        refused(lambda: ActivationNorms.collect(model, batches, world=world)),
        fingerprint_model(model),
    ]
    gpt2 = shard(tiny.build("gpt2"), None)
    norms = ActivationNorms.collect(gpt2, world.shard(batches), world=world)
    results["conv1d"] = refused(lambda: prune_model_(gpt2, norms, Selection(0.3)))

    class DistributedDataParallel(nn.Module):
        """By its name: torch's own would want a backward."""

    class FullyShardedDataParallel(nn.Module):
        """As above: torch's is gone in some releases."""

    for kind in (DistributedDataParallel, FullyShardedDataParallel):
        wrapper = kind()
        wrapper.module = tiny.build()
        results[kind.__name__] = refused(
            lambda wrapper=wrapper: ActivationNorms.collect(wrapper, batches, world=world)
        )
        if world.rank:  # which rank tells is another test
            results[kind.__name__][:2] = ["DataError", results[kind.__name__][1][len("rank 0: ") :]]
    return results
