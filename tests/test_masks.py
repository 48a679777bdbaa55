"""PackedMask: the bit layout, combination, files."""

import pytest
import torch
from safetensors.torch import save_file

from antidote_fast import DataError, PackedMask, load_masks, save_masks
from antidote_fast.backends.reference import pack_bits


def packed(removed):
    return PackedMask(pack_bits(removed), removed.shape)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(5, 19, generator=generator) > 0.5 for _ in range(2)]


def test_bits_are_little_endian_and_pads_are_zero():
    removed = torch.zeros(1, 10, dtype=torch.bool)
    removed[0, [0, 3, 9]] = True
    assert packed(removed).bits.tolist() == [[0b00001001, 0b00000010]]


def test_round_trip_and_count(pair):
    for removed in pair:
        mask = packed(removed)
        assert torch.equal(mask.to_bool(), removed)
        assert mask.count() == int(removed.sum())
        assert mask.to("cpu") == mask


def test_combination(pair):
    a, b = pair
    assert packed(a) | packed(b) == packed(a | b)
    assert packed(a) & packed(b) == packed(a & b)
    assert packed(a) - packed(b) == packed(a & ~b)
    assert packed(a) != packed(b)
    assert packed(a) != "a mask"


def test_combination_refuses_other_shapes(pair):
    with pytest.raises(ValueError, match=r"other\.shape"):
        packed(pair[0]) | packed(pair[1][:4])
    with pytest.raises(ValueError, match="on meta"):
        packed(pair[0]) & packed(pair[1]).to("meta")
    with pytest.raises(TypeError):
        packed(pair[0]) - pair[1]


@pytest.mark.parametrize(
    ("bits", "shape", "error"),
    [
        (torch.zeros(2, 2), (2, 9), TypeError),
        ([[0]], (1, 1), TypeError),
        (torch.zeros(2, 2, dtype=torch.uint8), (2, 17), ValueError),
        (torch.zeros(2, 2, dtype=torch.uint8), (2,), ValueError),
    ],
)
def test_refuses_bits_that_do_not_fit(bits, shape, error):
    with pytest.raises(error):
        PackedMask(bits, shape)


def test_one_mask_a_file(pair, tmp_path):
    mask = packed(pair[0])
    mask.save(tmp_path / "mask.safetensors")
    assert PackedMask.load(tmp_path / "mask.safetensors") == mask


def test_many_masks_a_file(pair, tmp_path):
    masks = {"a.weight": packed(pair[0]), "b.weight": packed(pair[1][:, :8])}
    save_masks(tmp_path / "masks.safetensors", masks, {"ratio": "0.1"})
    loaded, metadata = load_masks(tmp_path / "masks.safetensors")
    assert loaded == masks
    assert metadata["ratio"] == "0.1"
    assert (tmp_path / "masks.safetensors").stat().st_size < 1000  # a bit a weight
    with pytest.raises(DataError, match="masks of 2 weights"):
        PackedMask.load(tmp_path / "masks.safetensors")


def write(path, metadata, bits=None):
    bits = torch.zeros(2, 2, dtype=torch.uint8) if bits is None else bits
    save_file({"w.mask": bits}, str(path), metadata=metadata)


GOOD = {"format": "antidote_fast.masks", "version": "1", "shapes": '{"w.mask": [2, 10]}'}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "not a mask file"),
        ({**GOOD, "version": "2"}, "version '2'"),
        ({**GOOD, "shapes": "{"}, "cannot be read"),
        ({**GOOD, "shapes": "{}"}, "differ"),
        ({**GOOD, "shapes": '{"w.mask": [2, 30]}'}, "must be"),
        ({**GOOD, "shapes": '{"w.mask": null}'}, "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, metadata, message):
    path = tmp_path / "masks.safetensors"
    write(path, metadata)
    with pytest.raises(DataError, match=message):
        load_masks(path)


def test_bits_past_the_columns_are_refused(tmp_path):
    write(tmp_path / "m.safetensors", GOOD, torch.full((2, 2), 255, dtype=torch.uint8))
    with pytest.raises(DataError, match="past its 10 columns"):
        load_masks(tmp_path / "m.safetensors")


def test_no_file_and_no_safetensors_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_masks(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(DataError, match="cannot be read"):
        load_masks(tmp_path / "text.safetensors")
