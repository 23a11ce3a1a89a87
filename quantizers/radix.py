"""Several digits of different sizes as one integer: mixed-radix packing.

Finite scalar quantization, binary codes and token factorisation all write a token as a row of small digits and need one
number for it (a language model's vocabulary, published index files), or the other way round. Packing works on integers
only: a float sum of powers loses bits beyond 2^24 in float32 and 2^8 in bfloat16. Published code disagrees on the order
(lucidrains' FSQ, FlexTok, Cosmos, Open-MAGVIT2: first digit least significant; lucidrains' LFQ and BSQ: first digit
most significant), so callers have to say it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bits import check_bit_order

PACKED_BITS = 62  # the sum of all place values must fit a signed 64-bit integer too


def check_packable(sizes: Sequence[int], order: str = "least_significant_first") -> None:
    """Raise ``ValueError`` unless the digits fit one index: positive sizes, product at most 2^62, a known order."""
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"sizes must be one or more positive integers; got {list(sizes)}")
    if math.prod(sizes) > 1 << PACKED_BITS:
        raise ValueError(
            f"sizes with {math.log2(math.prod(sizes)):.1f} bits do not fit one index, which holds {PACKED_BITS}: "
            f"split the digits into groups"
        )
    check_bit_order(order)


def pack_digits(digits: Tensor, sizes: Sequence[int], order: str = "least_significant_first") -> Tensor:
    """One index per row of digits.

    Args:
        digits: integers ``(..., D)``, digit d in ``[0, sizes[d])``; all ``-1`` where a token is dropped.
        sizes: number of values of each of the D digits; their product is at most 2^62.
        order: whether the first digit is the least or the most significant one, one of :data:`~.bits.BIT_ORDERS`.

    Returns:
        ``(...)`` int64 in ``[0, prod(sizes))``, ``-1`` for dropped tokens.

    Raises:
        TypeError: for digits that are not integers.
        ValueError: for a number of digits that does not match ``sizes``, or sizes that do not fit an index.
    """
    _check_integers(digits, "digits")
    check_packable(sizes, order)
    if digits.ndim < 1 or digits.shape[-1] != len(sizes):
        raise ValueError(f"digits must have shape (..., {len(sizes)}), one per size; got {tuple(digits.shape)}")
    columns = list(zip(digits.to(torch.int64).unbind(-1), sizes, strict=True))
    if order == "least_significant_first":
        columns.reverse()
    # From the most significant digit down, with Python numbers as place values: no table has to reach the device.
    index = columns[0][0]
    for column, size in columns[1:]:
        index = torch.add(column, index, alpha=size)
    return index.clamp(min=-1)


def unpack_digits(indices: Tensor, sizes: Sequence[int], order: str = "least_significant_first") -> Tensor:
    """The digits of indices: the inverse of :func:`pack_digits`.

    Args:
        indices: integers ``(...)`` in ``[0, prod(sizes))``, or ``-1``.
        sizes: number of values of each of the D digits.
        order: as for :func:`pack_digits`.

    Returns:
        ``(..., D)`` int64; all ``-1`` for the index ``-1``.

    Raises:
        TypeError: for indices that are not integers.
        ValueError: for sizes that do not fit an index.
    """
    _check_integers(indices, "indices")
    check_packable(sizes, order)
    rest = indices.to(torch.int64)
    dropped = rest < 0
    digits = []
    for size in sizes if order == "least_significant_first" else reversed(sizes):
        digits.append(rest.remainder(size).masked_fill(dropped, -1))
        rest = rest.div(size, rounding_mode="floor")
    return torch.stack(digits if order == "least_significant_first" else digits[::-1], -1)


def _check_integers(values: Tensor, name: str) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {values.dtype}")
