"""Packing of bits against Python's integers."""

import random

import pytest
import torch

from vistok.quantizers.bits import pack_bits, unpack_bits

ORDERS = ("least_significant_first", "most_significant_first")


def python_integer(bits, order):
    digits = [int(bit) for bit in bits]
    return int("".join(map(str, digits[::-1] if order == "least_significant_first" else digits)), 2)


@pytest.mark.parametrize("order", ORDERS)
def test_packing_equals_python_integers_and_unpacking_inverts_it(order):
    chooser = random.Random(0)
    for size in range(1, 63):
        rows = [[chooser.random() < 0.5 for _ in range(size)] for _ in range(4)] + [[True] * size, [False] * size]
        bits = torch.tensor(rows).view(2, 3, size)
        packed = pack_bits(bits, order)
        assert packed.dtype == torch.int64 and packed.shape == (2, 3)
        assert packed.flatten().tolist() == [python_integer(row, order) for row in rows]
        assert torch.equal(unpack_bits(packed, size, order), bits)


def test_published_conventions_differ_by_the_order_only():
    bits = torch.tensor([True, False, False, False])
    assert pack_bits(bits, "most_significant_first") == 8  # BSQ, lucidrains
    assert pack_bits(bits, "least_significant_first") == 1  # Open-MAGVIT2


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="bits must be bool; got torch.int64"):
        pack_bits(torch.ones(3, dtype=torch.int64), ORDERS[0])
    with pytest.raises(TypeError, match="indices must be int64; got torch.int32"):
        unpack_bits(torch.ones(3, dtype=torch.int32), 2, ORDERS[0])
    with pytest.raises(ValueError, match="bit order must be one of .* got 'big'"):
        pack_bits(torch.ones(3, dtype=torch.bool), "big")
    for size in (0, 63):
        with pytest.raises(ValueError, match=f"between 1 and 62 bits fit one index; got {size}"):
            pack_bits(torch.ones(2, size, dtype=torch.bool), ORDERS[0])
