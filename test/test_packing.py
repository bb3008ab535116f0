"""Bit layouts: round trips, and an independent bit-by-bit reading of the words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.formats.packing import (
    AUTO_AWQ,
    AUTO_GPTQ,
    PACKINGS,
    decode_codes,
    decode_zeros,
    encode,
    normalize_packing,
    pack_awq,
    pack_bits,
    packed_shapes,
    unpack_awq,
    unpack_bits,
)

WIDTHS = list(range(2, 9))


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def read_stream(words: list[int], index: int, bits: int) -> int:
    """Code `index` of a little-endian stream of 32-bit words, bit by bit."""
    value = 0
    for bit in range(bits):
        position = index * bits + bit
        value |= ((words[position // 32] >> (position % 32)) & 1) << bit
    return value


@pytest.mark.parametrize("bits", WIDTHS)
def test_stream_matches_a_bit_by_bit_reader(bits: int) -> None:
    codes = random_codes((3, 96), bits)
    words = pack_bits(codes, bits)
    assert words.shape == (3, 96 * bits // 32)
    for row in range(3):
        unsigned = [word & 0xFFFFFFFF for word in words[row].tolist()]
        assert [read_stream(unsigned, i, bits) for i in range(96)] == codes[row].tolist()


def test_awq_order() -> None:
    codes = random_codes((16, 32), 4)
    words = pack_awq(codes)
    assert words.shape == (32, 2)
    for column in range(32):
        for output in range(16):
            slot = (0, 4, 1, 5, 2, 6, 3, 7)[output % 8]
            assert (int(words[column, output // 8]) >> (4 * slot)) & 15 == int(codes[output, column])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    other=st.integers(1, 9),
    groups=st.integers(1, 5),
    dim=st.integers(-2, 1),
    offset=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_round_trip(bits: int, other: int, groups: int, dim: int, offset: int, seed: int) -> None:
    shape = (other, 32 * groups) if dim % 2 else (32 * groups, other)
    # An offset makes a view that does not start at an aligned address.
    codes = random_codes((shape[0] * shape[1] + offset,), bits, seed)[offset:].view(shape)
    words = pack_bits(codes, bits, dim)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert torch.equal(unpack_bits(words, bits, dim), codes)


@settings(max_examples=30, deadline=None)
@given(eighths=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_awq_round_trip(eighths: int, columns: int, seed: int) -> None:
    codes = random_codes((eighths * 8, columns), 4, seed)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_more_codes_than_a_chunk(bits: int) -> None:
    codes = random_codes((600, 1024), bits)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits), codes)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_encode_has_the_stated_shapes(packing: str, bits: int) -> None:
    if packing == AUTO_AWQ and bits != 4:
        pytest.skip("AWQ has 4 bits")
    codes = random_codes((64, 96), bits)
    zeros = random_codes((64, 3), bits).clamp(min=1)
    tensors = encode(packing, codes, zeros, bits)
    shapes = packed_shapes(packing, 64, 96, 3, bits)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {k: shapes[k] for k in tensors}
    assert torch.equal(decode_codes(packing, tensors["qweight"], bits), codes)
    assert torch.equal(decode_zeros(packing, tensors["qzeros"], bits), zeros.to(torch.int16))


def test_first_gptq_layout_stores_zeros_one_too_low() -> None:
    zeros = torch.full((32, 1), 8, dtype=torch.uint8)
    words = encode(AUTO_GPTQ, torch.zeros(32, 32, dtype=torch.uint8), zeros, 4)["qzeros"]
    assert words.flatten().tolist() == [0x77777777] * 4


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_bits(random_codes((2, 40), 4), 4)
    with pytest.raises(ValueError, match="2 to 8"):
        pack_bits(random_codes((2, 32), 4), 9)
    with pytest.raises(ValueError, match="int32"):
        unpack_bits(random_codes((2, 32), 4), 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_awq(random_codes((12, 32), 4))
    with pytest.raises(ValueError, match="known: auto_round:auto_gptq"):
        normalize_packing("auto_round:none")
