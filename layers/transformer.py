"""Pre-norm transformer blocks with fused projections and scaled-dot-product attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED_WIDTH = 512  # of the smallest TiTok


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with biases.

    Args:
        width: D, a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; got {width} and {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over ``(B, N, D)``; ``mask`` is bool ``(B, N)``, ``True`` = every position may look at this one."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, D / heads)
        keys = None if mask is None else mask[:, None, None]  # (B, 1, 1, N)
        x = F.scaled_dot_product_attention(q, k, v, keys)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Sequential):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """One pre-norm transformer layer: attention and MLP, each on a residual branch.

    Args:
        width: D.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP in multiples of D.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Layer output ``(B, N, D)``; ``mask`` as in :class:`Attention`."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def token_std(width: int) -> float:
    """Std of learned tokens and positions at the start; larger in narrow models, see :func:`init_transformer`."""
    return (1.0 if width >= PUBLISHED_WIDTH else 4.0) * width**-0.5


def init_transformer(module: nn.Module, width: int) -> None:
    """Initialise as TiTok (arXiv:2406.07550) does: truncated normal of std 0.02, Xavier for fused q, k, v, zero biases.

    That suits the published widths. In a model of width 128 it leaves positions drowned by the patches' brightness,
    attention uniform and the latents all but blind to the image for hundreds of steps; narrow models start with weights
    of std ``fan_in ** -0.5``, sharper attention and stronger positions instead.
    """
    narrow = width < PUBLISHED_WIDTH
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5 if narrow else 0.02)
            nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, Attention):
            nn.init.xavier_uniform_(layer.qkv.weight)
            if narrow:
                nn.init.normal_(layer.qkv.weight[: 2 * width], std=1.6 * width**-0.5)
