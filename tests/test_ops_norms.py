"""Saved norms: what is used of them, merged, written, read and refused."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.norms.activation_norms import ActivationNorms


def simple(**options):
    values = {"num_sequences": 2, "num_tokens": 8} | options
    sums = values.pop("sq_sum", {"a.weight": torch.tensor([4.0, 16.0])})
    return ActivationNorms(sums, **values)


def test_act_norm():
    norms = simple()
    assert norms.act_norm("a.weight").tolist() == [2.0, 4.0]
    assert norms.act_norm("a.weight", "tensor").tolist() == [2.0, 4.0]
    expected = torch.tensor([0.5, 2.0]).sqrt()
    assert torch.equal(norms.act_norm("a.weight", "global"), expected)
    mean = simple(norm_sum={"a.weight": torch.tensor([3.0, 5.0])})
    for scope in ("row", "tensor", "global"):
        assert mean.act_norm("a.weight", scope).tolist() == [1.5, 2.5]
    with pytest.raises(DataError, match=r"no weight 'b\.weight'"):
        norms.act_norm("b.weight")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"response_only": True}, "response_only is False and True"),
        ({"fingerprint": "x"}, "fingerprint is '' and 'x'"),
        ({"norm_sum": {"a.weight": torch.ones(2)}}, "aggregation is 'rms' and 'mean'"),
        ({"sq_sum": {"b.weight": torch.ones(2)}}, "only one of them has 'a.weight'"),
        ({"sq_sum": {"a.weight": torch.ones(3)}}, "a.weight.*length"),
    ],
)
def test_merge_refuses(other, match):
    with pytest.raises(DataError, match=match):
        simple().merge(simple(**other))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sq_sum": {}}, "hold no weights"),
        ({"sq_sum": {"a": torch.tensor([torch.nan])}}, "a.sq_sum holds NaN"),
        ({"sq_sum": {"a": torch.tensor([-1.0])}}, "negative"),
        ({"sq_sum": {"a": torch.ones(2, 2)}}, "must be float32"),
        ({"sq_sum": {"a": torch.ones(2, dtype=torch.float64)}}, "must be float32"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"norm_sum": {"b": torch.ones(2)}}, "different weights"),
        ({"norm_sum": {"a.weight": torch.ones(3)}}, "differ in length"),
    ],
)
def test_norms_are_checked(options, match):
    with pytest.raises(DataError, match=match):
        simple(**options)


@pytest.mark.parametrize("aggregation", ["rms", "mean"])
def test_save_and_load(tmp_path, aggregation):
    model = tiny.build("gpt2")
    path = tmp_path / "norms.safetensors"
    norms = ActivationNorms.collect(
        model, tiny.batches(), aggregation=aggregation, response_only=True
    )
    norms.save(path)
    loaded = ActivationNorms.load(path)
    for name in ("num_sequences", "num_tokens", "response_only", "aggregation", "fingerprint"):
        assert getattr(loaded, name) == getattr(norms, name)
    assert loaded.transposed == norms.transposed == frozenset(norms.keys)
    assert loaded.routed == frozenset()
    assert all(torch.equal(loaded.sq_sum[k], norms.sq_sum[k]) for k in norms.keys)
    if aggregation == "mean":
        assert all(torch.equal(loaded.norm_sum[k], norms.norm_sum[k]) for k in norms.keys)
    assert [p.name for p in tmp_path.iterdir()] == ["norms.safetensors"]
    key = "transformer.h.0.attn.c_attn.weight.sq_sum"
    assert load_file(path)[key].dtype == torch.float32
    assert "1 weights" in repr(simple())


def test_load_refuses(tmp_path):
    path = tmp_path / "n.safetensors"
    with pytest.raises(DataError, match="no such file"):
        ActivationNorms.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        ActivationNorms.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(DataError, match="not a norms file"):
        ActivationNorms.load(path)
    simple().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        good = file.metadata()
    tensors = load_file(path)
    for change, match in (
        ({"version": "99"}, "version '99'"),
        ({"num_tokens": "many"}, "cannot be read"),
        ({"response_only": "maybe"}, "cannot be read"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"transposed": "["}, "cannot be read"),
    ):
        save_file(tensors, path, metadata=good | change)
        with pytest.raises(DataError, match=match):
            ActivationNorms.load(path)
    save_file({"a.other": torch.ones(1)}, path, metadata=good)
    with pytest.raises(DataError, match="cannot be read"):
        ActivationNorms.load(path)
    assert json.loads(good["transposed"]) == []


def test_save_to_nowhere(tmp_path):
    with pytest.raises(AntidoteError, match="cannot be written"):
        simple().save(tmp_path / "no" / "n.safetensors")
    assert not list(tmp_path.iterdir())
