"""Files written tensor by tensor, and tensors put away: the bytes that went in come out."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import _read_header, open_checkpoint, read_tensor_file
from antidote_fast.files.safe_open import Folder
from antidote_fast.files.tensor_file import TensorFile, read_tensor, save_tensors
from antidote_fast.streaming.spill import Room, TensorStore

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def some(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (0, 4), (2, 3, 4)]
    return {
        f"t{i}": (torch.rand(shape, generator=generator) * 200).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, DTYPES, strict=True))
    }


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def test_a_file_written_in_any_order_reads_as_another(tmp_path):
    tensors = some()
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    file = TensorFile.create(tmp_path / "a.safetensors", specs, {"format": "pt"})
    for name in reversed(tensors):
        file.write(name, tensors[name])
    file.sync()
    same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_same_contents_are_the_same_bytes(tmp_path):
    metadata = {f"key {i}": str(i) for i in range(20)}
    for name in "ab":
        save_tensors(tmp_path / name, some(), metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_copy_tensor_by_tensor_is_the_file(tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(some(), source, metadata={"format": "pt"})
    entries = _read_header(Folder(tmp_path), source.name)
    file = TensorFile.like(tmp_path / "copy", source, entries)
    same({name: read_tensor(entry) for name, entry in entries.items()}, some())
    for name, entry in entries.items():
        if name == "t0":
            file.copy(source, entry.start, entry.end)
        else:
            file.write(name, read_tensor(entry))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_kept_files_keep_what_is_in_them(tmp_path):
    specs = {"a": (torch.float32, (4,)), "b": (torch.float32, (2,))}
    TensorFile.create(tmp_path / "f", specs).write("a", torch.arange(4.0))
    again = TensorFile.create(tmp_path / "f", specs, keep=True)
    again.write("b", torch.ones(2))
    same(load_file(tmp_path / "f"), {"a": torch.arange(4.0), "b": torch.ones(2)})


def test_another_size_is_refused(tmp_path):
    file = TensorFile.create(tmp_path / "f", {"a": (torch.float32, (4,))})
    with pytest.raises(ValueError, match=r"a: 12 bytes, its place in .* has 16"):
        file.write("a", torch.zeros(3))


def test_a_file_that_ends_early(tmp_path):
    save_file({"a": torch.zeros(8)}, tmp_path / "f.safetensors")
    entry = _read_header(Folder(tmp_path), "f.safetensors")["a"]
    (tmp_path / "f.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes()[:-4])
    with pytest.raises(DataError, match="ends at byte"):
        read_tensor(entry)


@pytest.mark.parametrize("room", [0, 100, 1 << 20])
def test_tensors_put_away(room, tmp_path):
    limit = Room(room)
    store = TensorStore(tmp_path / "s.bin", limit)
    lists = {i: [*some(i).values(), torch.tensor(True)] for i in range(4)}
    for number, tensors in lists.items():
        store.put(number, tensors)
    assert store.num_bytes == sum(t.nbytes for ts in lists.values() for t in ts)
    assert store.num_bytes - store.num_spilled == room - limit.left
    assert (store.num_spilled == 0) == (room == 1 << 20)

    def check(store):
        for number, tensors in lists.items():
            for given, found in zip(tensors, store.get(number), strict=True):
                assert torch.equal(given, found)
                assert given.dtype == found.dtype

    check(store)
    index = json.loads(json.dumps(store.keep()))
    store.sync()
    check(store)
    store.close(delete=False)
    assert limit.left == room
    for again in (0, 1 << 20):
        reopened = TensorStore.reopen(tmp_path / "s.bin", Room(again), index)
        check(reopened)
        reopened.close(delete=bool(again))
    assert not (tmp_path / "s.bin").exists()


def test_a_kept_file_that_was_cut(tmp_path):
    store = TensorStore(tmp_path / "s.bin", Room(0))
    store.put(0, [torch.zeros(100)])
    index = store.keep()
    store.close(delete=False)
    (tmp_path / "s.bin").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match=r"s\.bin: cannot be read: .* ends at byte 10"):
        TensorStore.reopen(tmp_path / "s.bin", Room(0), index)


def test_tensors_are_those_of_the_files(folders, tmp_path):
    checkpoint = open_checkpoint(folders / "sharded")
    tensors = checkpoint.read(checkpoint.tensors)
    expected = {}
    for file in checkpoint.weight_files:
        expected |= load_file(file)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    save_file(expected, tmp_path / "x.safetensors", {"a": "b"})
    metadata, again = read_tensor_file(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    assert all(torch.equal(again[name], expected[name]) for name in expected)
