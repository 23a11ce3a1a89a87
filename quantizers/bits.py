"""Bits as integers, and back: in integers all the way, with the order of the bits spelled out.

A packed code of 36 bits has no exact float32, and published code disagrees about which channel is the lowest bit, so
neither is left to chance here. Open-MAGVIT2, WeTok and ImageFolder read channel 0 as the least significant bit; BSQ,
Cosmos and lucidrains' quantizers as the most significant one.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIT_ORDERS = ("least_significant_first", "most_significant_first")
MAX_BITS = 62  # a packed code stays a non-negative int64, and so does the size of its codebook


def pack_bits(bits: Tensor, order: str) -> Tensor:
    """Integers whose binary digits are the last axis of ``bits``.

    Args:
        bits: bool ``(..., D)``, D between 1 and 62.
        order: which digit channel 0 is, one of :data:`BIT_ORDERS`.

    Returns:
        int64 ``(...)`` between 0 and 2^D - 1.

    Raises:
        TypeError: if ``bits`` is not bool.
        ValueError: for a wrong order or number of bits.
    """
    if bits.dtype != torch.bool:
        raise TypeError(f"bits must be bool; got {bits.dtype}")
    return (bits.to(torch.int64) << _places(bits.shape[-1], order, bits.device)).sum(-1)


def unpack_bits(indices: Tensor, num_bits: int, order: str) -> Tensor:
    """Binary digits of integers, the inverse of :func:`pack_bits`.

    Args:
        indices: int64 ``(...)`` between 0 and 2^num_bits - 1.
        num_bits: D, between 1 and 62.
        order: which digit channel 0 is, one of :data:`BIT_ORDERS`.

    Returns:
        bool ``(..., D)``.

    Raises:
        TypeError: if ``indices`` is not int64.
        ValueError: for a wrong order or number of bits.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64; got {indices.dtype}")
    return ((indices.unsqueeze(-1) >> _places(num_bits, order, indices.device)) & 1).to(torch.bool)


def check_bit_order(order: str) -> None:
    """Raise ``ValueError`` unless ``order`` is one of :data:`BIT_ORDERS`."""
    if order not in BIT_ORDERS:
        raise ValueError(f"bit order must be one of {BIT_ORDERS}; got {order!r}")


def _places(num_bits: int, order: str, device: torch.device) -> Tensor:
    """``(D,)`` the binary place of every channel."""
    check_bit_order(order)
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"between 1 and {MAX_BITS} bits fit one index; got {num_bits}")
    places = torch.arange(num_bits, device=device)
    return places if order == "least_significant_first" else num_bits - 1 - places
