"""Mixed-radix packing against Python's integers."""

import math
import random

import pytest
import torch

from vistok.quantizers.radix import pack_digits, unpack_digits

ORDERS = pytest.mark.parametrize("order", ["least_significant_first", "most_significant_first"])


def place_values(sizes, order):
    """The place value of every digit, as Python integers."""
    if order == "least_significant_first":
        return [math.prod(sizes[:d]) for d in range(len(sizes))]
    return [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]


@ORDERS
@pytest.mark.parametrize("sizes", [(2,), (1, 3), (8, 5, 5, 5), (7, 2, 3, 4), (2,) * 10])
def test_every_index_has_its_own_digits(sizes, order):
    indices = torch.arange(math.prod(sizes))
    digits = unpack_digits(indices, sizes, order)
    assert (digits >= 0).all() and (digits < torch.tensor(sizes)).all()
    assert len({tuple(row) for row in digits.tolist()}) == len(indices)
    assert torch.equal(pack_digits(digits, sizes, order), indices)


@ORDERS
@pytest.mark.parametrize("bits", [1, 2, 8, 18, 31, 32, 36, 53, 54, 61, 62])
def test_bits_equal_python_integers(bits, order):
    generator = random.Random(bits)
    numbers = [0, 1, (1 << bits) - 1, *(generator.getrandbits(bits) for _ in range(50))]
    sizes = (2,) * bits
    digits = unpack_digits(torch.tensor(numbers), sizes, order)
    for number, row in zip(numbers, digits.tolist(), strict=True):
        written = f"{number:0{bits}b}"
        assert row == [int(bit) for bit in (written if order == "most_significant_first" else written[::-1])]
    assert pack_digits(digits, sizes, order).tolist() == numbers


@ORDERS
@pytest.mark.parametrize("sizes", [(1000, 7, 65536, 3, 999, 11), (3,) * 39, (16,) * 15, (1 << 62,), (5, 1 << 59)])
def test_large_digits_equal_python_integers(sizes, order):
    generator = random.Random(0)
    rows = [[generator.randrange(size) for size in sizes] for _ in range(40)]
    rows += [[0] * len(sizes), [size - 1 for size in sizes]]
    expected = [
        sum(digit * place for digit, place in zip(row, place_values(sizes, order), strict=True)) for row in rows
    ]
    packed = pack_digits(torch.tensor(rows), sizes, order)
    assert packed.dtype == torch.int64 and packed.tolist() == expected
    assert unpack_digits(packed, sizes, order).tolist() == rows


def test_order_of_published_code():
    bits = torch.tensor([[1, 0, 0, 0]])
    assert pack_digits(bits, (2,) * 4, "least_significant_first").item() == 1  # Open-MAGVIT2
    assert pack_digits(bits, (2,) * 4, "most_significant_first").item() == 8  # lucidrains' LFQ, BSQ


@ORDERS
def test_dropped_tokens_stay_dropped(order):
    sizes = (3, 4, 5)
    indices = torch.tensor([[-1, 0], [59, -1]])
    digits = unpack_digits(indices, sizes, order)
    assert digits.shape == (2, 2, 3) and (digits[0, 0] == -1).all() and (digits[1, 1] == -1).all()
    assert torch.equal(pack_digits(digits, sizes, order), indices)
    assert pack_digits(torch.full((62,), -1), (2,) * 62, order).item() == -1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_integers_do_not_overflow(dtype):
    digits = torch.full((3, 40), 1, dtype=dtype)
    assert pack_digits(digits, (2,) * 40).tolist() == [(1 << 40) - 1] * 3


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="digits must be integers; got torch.float32"):
        pack_digits(torch.zeros(2, 3), (2, 2, 2))
    with pytest.raises(TypeError, match="indices must be integers; got torch.bfloat16"):
        unpack_digits(torch.zeros(2, dtype=torch.bfloat16), (2, 2))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 3\), one per size; got \(2, 2\)"):
        pack_digits(torch.zeros(2, 2, dtype=torch.int64), (2, 2, 2))
    with pytest.raises(ValueError, match="63.0 bits do not fit one index, which holds 62"):
        pack_digits(torch.zeros(1, 63, dtype=torch.int64), (2,) * 63)
    with pytest.raises(ValueError, match=r"positive integers; got \[2, 0\]"):
        unpack_digits(torch.zeros(1, dtype=torch.int64), (2, 0))
    with pytest.raises(ValueError, match="must be one of .*; got 'msb'"):
        unpack_digits(torch.zeros(1, dtype=torch.int64), (2, 2), "msb")
