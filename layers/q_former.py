"""Q-Former layers: queries that attend to themselves and to a memory (DETR, arXiv:2005.12872).

GigaTok (arXiv:2504.08736) is made of them. Positions are no part of the sequence: every layer adds them anew to what
makes queries and keys, and never to values. A query therefore looks by place and content, and takes content alone. The
memory is the same in all layers.

Adding a position before a linear map is adding its image after it, so the projections of a sequence stay one matrix
product, and no copy of the sequence with positions is kept for the backward pass.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import transformer_size
from .transformer import MLP, PUBLISHED_WIDTH, init_transformer

Q_FORMER_SIZES = {  # width, layers, heads: GigaTok, whose small has 6 layers where TiTok's has 8
    "tiny": (256, 4, 4),
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "xxxl": (2560, 48, 40),
}


def q_former_size(size: str | tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    """``(width, layers, heads)`` of a size that GigaTok names, or of three numbers.

    Raises:
        ValueError: for an unknown name or anything but three positive numbers.
    """
    if not isinstance(size, str):
        return transformer_size(size)
    if size not in Q_FORMER_SIZES:
        raise ValueError(f"unknown Q-Former size {size!r}; accepted: {', '.join(Q_FORMER_SIZES)}")
    return Q_FORMER_SIZES[size]


class PositionedSelfAttention(nn.Module):
    """Multi-head self-attention whose queries and keys know their positions, with biases.

    Args:
        width: D, a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Attend over ``(B, N, D)`` with positions ``(N, D)``."""
        width = x.shape[-1]
        qk, v = self.qkv(x).split((2 * width, width), -1)  # (B, N, 2 D), (B, N, D)
        q, k = (qk + F.linear(position, self.qkv.weight[: 2 * width])).chunk(2, -1)
        return self.out(_attend(q, k, v, self.heads))


class PositionedCrossAttention(nn.Module):
    """Multi-head attention of queries to a memory, both of which know their positions, with biases.

    Args:
        width: D of queries and memory, a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: Tensor, position: Tensor, memory_position: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from ``(B, N, D)`` at ``(N, D)`` to ``(B, M, D)`` at ``(M, D)``.

        ``mask`` is bool ``(B, M)``, ``True`` = every query may look at this one.
        """
        q = self.q(x) + F.linear(position, self.q.weight)  # (B, N, D)
        k, v = self.kv(memory).chunk(2, -1)  # (B, M, D)
        k = k + F.linear(memory_position, self.kv.weight[: x.shape[-1]])
        return self.out(_attend(q, k, v, self.heads, mask))


class QFormerBlock(nn.Module):
    """One pre-norm layer: self-attention, attention to the memory, MLP, each on a residual branch.

    The memory is taken as it is, without a norm.

    Args:
        width: D.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP in multiples of D.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = PositionedSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = PositionedCrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)

    def forward(
        self, x: Tensor, memory: Tensor, position: Tensor, memory_position: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Layer output ``(B, N, D)``; arguments as in :class:`PositionedCrossAttention`."""
        x = x + self.self_attention(self.norm1(x), position)
        x = x + self.cross_attention(self.norm2(x), memory, position, memory_position, mask)
        return x + self.mlp(self.norm3(x))


def init_q_former(module: nn.Module, width: int) -> None:
    """Initialise as GigaTok does, which is as TiTok does, see :func:`~vistok.layers.transformer.init_transformer`.

    Convolutions around the layers start so too. Queries, keys and values of an attention are drawn as one matrix.
    """
    init_transformer(module, width)
    bound = (6 / (4 * width)) ** 0.5  # Xavier of a matrix (3 D, D)
    for layer in module.modules():
        if isinstance(layer, PositionedSelfAttention):
            looking, taking = (layer.qkv.weight[: 2 * width],), layer.qkv.weight[2 * width :]
        elif isinstance(layer, PositionedCrossAttention):
            looking, taking = (layer.q.weight, layer.kv.weight[:width]), layer.kv.weight[width:]
        else:
            continue
        nn.init.uniform_(taking, -bound, bound)
        for weight in looking:
            if width < PUBLISHED_WIDTH:
                nn.init.normal_(weight, std=1.6 * width**-0.5)
            else:
                nn.init.uniform_(weight, -bound, bound)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width must be a multiple of heads; got {width} and {heads}")


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """``(B, N, D)``, ``(B, M, D)`` twice -> ``(B, N, D)``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, D / heads)
    x = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return x.transpose(1, 2).flatten(2)
