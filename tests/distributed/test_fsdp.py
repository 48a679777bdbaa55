"""Models that FSDP2 shards over two gloo processes: norms, rows pruned in place, refusals."""

import pytest
import ranks
import tiny
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from antidote_fast import ActivationNorms, Selection, prune_model_
from antidote_fast.distributed.ranks import session, world

CASES = ["llama", "root alone", "bf16", "mean", "smallest", "n:m", "odd", "lora", "dora"]
CASES += ["replicas of shards", "replicas", "preserve"]


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    meeting = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_a_group_of_one_shards_nothing(scope, one_rank):
    """DTensors that are whole: norms, scopes and figures are those of plain tensors."""
    plain, live = tiny.build(), tiny.build()
    for layer in live.model.layers:
        fully_shard(layer)
    fully_shard(live)
    assert isinstance(live.model.layers[0].mlp.up_proj.weight, DTensor)
    choice = Selection(0.3, scope=scope)
    norms = ActivationNorms.collect(live, tiny.batches(), world=one_rank)
    expected = ActivationNorms.collect(plain, tiny.batches())
    assert norms.fingerprint == expected.fingerprint != ""
    assert all(torch.equal(norms.sq_sum[key], value) for key, value in expected.sq_sum.items())
    report = prune_model_(live, norms, choice, return_masks=True)
    wanted = prune_model_(plain, norms, choice, return_masks=True)
    assert (report.num_pruned, report.masks) == (wanted.num_pruned, wanted.masks)
    state = live.state_dict()
    assert all(torch.equal(state[k].full_tensor(), v) for k, v in plain.state_dict().items())
    with session() as world:
        assert world == one_rank


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, ranks.start_ranks("fsdp", folder)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_prune_is_that_of_the_whole_model(case, fsdp):
    """Each rank compared its masks with the whole model's; weights were gathered."""
    first, second = (seen[case] for seen in fsdp[1])
    for seen in (first, second):
        assert seen["same weights"]
        assert seen["same logits"]  # a forward after the prune sees what was written
        assert seen["same report"]
        assert seen["removed"] > 0
        assert (seen["preserved"] > 0) == (case == "preserve")
        assert seen["worst"] <= 1e-6
        assert seen["counts"] == seen["alone"]
        assert seen["fingerprints"][0] == seen["fingerprints"][1] != ""
        assert seen["after"][0] == seen["after"][1]
    if case != "replicas":  # each with a report of its own
        assert first["report"] == second["report"]  # seconds too


def test_one_call_prunes_a_sharded_model(fsdp):
    for rank, seen in enumerate(fsdp[1]):
        removed_alike, same_weights, refusal = seen["oneshot"]
        assert removed_alike
        assert same_weights
        assert refusal[0] == ("PeerFailed" if rank else "UsageError")
        assert "must be left out where the model is sharded" in refusal[1]


def test_rows_are_held_by_one_rank_each(fsdp):
    """Three rows and one row on two ranks: one of them holds nothing of the latter."""
    first, second = fsdp[1]
    assert (first["odd"]["rows"], second["odd"]["rows"]) == ([1, 2, 16], [0, 1, 16])
    assert (first["lora"]["rows"], second["lora"]["rows"]) == ([2, 8, 16], [1, 8, 16])


@pytest.mark.parametrize(("name", "batches"), [("one", range(5)), ("uneven", [0, 0, 1, 2])])
def test_ranks_with_other_numbers_of_batches_end_together(name, batches, fsdp):
    folder, _ = fsdp
    both = [ActivationNorms.load(folder / f"fsdp-{name}.{rank}.safetensors") for rank in (0, 1)]
    all_batches = tiny.batches(count=5)
    alone = ActivationNorms.collect(tiny.build(), [all_batches[i] for i in batches])
    for norms in both:
        assert (norms.num_sequences, norms.num_tokens) == (alone.num_sequences, alone.num_tokens)
        for key, value in alone.sq_sum.items():
            torch.testing.assert_close(norms.sq_sum[key], value, rtol=1e-6, atol=0)
            assert torch.equal(both[0].sq_sum[key], both[1].sq_sum[key])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("tensor", "UsageError", "scope='tensor': must be row where weights are sharded"),
        ("global", "UsageError", "scope='global': must be row where weights are sharded"),
        ("random", "UsageError", "score='random': must be wanda or magnitude where weights are"),
        ("not added up", "DataError", "norms of the ranks (add them up first): differ between"),
        ("not added up either", "DataError", "preserve_norms of the ranks (add them up first)"),
        ("base", "UsageError", "base_weights: must be left out where weights are sharded"),
        ("no selection", "UsageError", "selection=0.3: must be a Selection"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_a_write(name, kind, words, fsdp):
    for rank, seen in enumerate(fsdp[1]):
        (found, line, _), unchanged = seen[name]
        assert found == ("PeerFailed" if rank and name.startswith("not added up") else kind)
        assert words in line
        assert unchanged


def test_scores_without_data_need_no_norms(fsdp):
    assert [seen["magnitude"] for seen in fsdp[1]] == [None, None]


def test_a_bad_value_on_one_rank_stops_both_before_a_write(fsdp):
    first, second = fsdp[1]
    line = "model.layers.1.self_attn.q_proj.weight: holds NaN or infinity"
    assert second["nan weight"] == [["DataError", line, 3], 0]
    assert first["nan weight"] == [["PeerFailed", f"rank 1: {line}", 3], 0]
    kind, line, code = first["nan input"]
    assert (kind, code) == ("DataError", 3)
    assert line.startswith("model.layers.0.self_attn.k_proj.weight: its input holds NaN")
    assert second["nan input"] == ["PeerFailed", f"rank 0: {line}", 3]


def test_a_weight_that_is_not_sharded_by_rows_is_named(fsdp):
    for seen in fsdp[1]:
        prune, collect, fingerprint = seen["columns"]
        words = "model.layers.0.self_attn.k_proj.weight: is placed as (Shard(dim=1),); must be"
        assert words in prune[1]
        assert words in collect[1]
        assert fingerprint == ""  # unknown
        assert (
            "c_attn.weight: is saved as (in, out) and sharded over its inputs" in seen["conv1d"][1]
        )


def test_ranks_that_share_their_batches_are_refused(fsdp):
    for seen in fsdp[1]:
        assert "its weights are sharded, but not by fully_shard" in seen["tensor parallel"][1]


def test_a_sharded_model_needs_its_ranks(fsdp):
    for seen in fsdp[1]:
        kind, line, _ = seen["no world"]
        assert (kind, line.split(":")[0]) == ("UsageError", "world")


def test_other_wrappers_are_refused_by_name(fsdp):
    for seen in fsdp[1]:
        for kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            assert seen[kind][:2] == [
                "DataError",
                f"model: holds a {kind}; give the model inside, or use fully_shard",
            ]
