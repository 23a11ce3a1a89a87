"""SimVQ: a codebook that is a learned transformation of frozen random vectors (arXiv:2411.02038).

In plain vector quantization a code learns only when it is chosen, so most codes of a large codebook never do. Here
code k is ``A c_k`` with ``c_k`` drawn once from N(0, 1 / d) and never changed, and ``A`` learned: whichever codes are
chosen, all of them move. ``transform="mlp"`` replaces the matrix by two layers with four times the width and a GELU
between them, as GigaTok (arXiv:2504.08736) offers.

The table is computed for the search in every training step, without gradient; the gradient runs through the chosen rows
only, which gives the same as a backward pass through the whole table. In evaluation the table is kept until a parameter
changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .codebook import CodebookQuantizer
from .estimators import rotation, straight_through
from .search import search_dtype
from .softmax import finite_rows

TRANSFORMS = ("linear", "mlp")
ESTIMATORS = ("straight_through", "rotation", "none")
MLP_RATIO = 4


class SimVQ(CodebookQuantizer):
    """Nearest-code quantizer whose codes are a learned transformation of frozen vectors.

    Losses are ``commitment`` and ``codebook``, means over all elements of the kept positions, with the published
    weights 0.25 and 1. A latent that is not finite gives the transformation no gradient.

    Args:
        codebook_size: K, the number of codes.
        dim: D, the size of a latent.
        code_dim: size of the frozen vectors; D if ``None``.
        transform: ``"linear"`` (no bias) or ``"mlp"``.
        estimator: gradient of the output: ``"rotation"``, ``"straight_through"`` or ``"none"``.
        l2_normalize: compare, return and train unit vectors.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, 1)``. Computes in float32 (float64 latents: float64).

    Raises:
        ValueError: for a setting that does not exist or is out of range.
    """

    default_loss_weights = {"commitment": 0.25, "codebook": 1.0}
    float32_buffers = ("frozen",)

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        code_dim: int | None = None,
        transform: str = "linear",
        estimator: str = "rotation",
        l2_normalize: bool = False,
    ) -> None:
        super().__init__()
        code_dim = dim if code_dim is None else code_dim
        if codebook_size < 1 or dim < 1 or code_dim < 1:
            raise ValueError(
                f"codebook_size, dim and code_dim must be positive; got {codebook_size}, {dim} and {code_dim}"
            )
        if transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {TRANSFORMS}; got {transform!r}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}; got {estimator!r}")
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.estimator, self.l2_normalize = estimator, l2_normalize
        self.register_buffer("frozen", torch.randn(codebook_size, code_dim) * code_dim**-0.5)
        if transform == "linear":
            layers = [nn.Linear(code_dim, dim, bias=False)]
        else:
            layers = [nn.Linear(code_dim, MLP_RATIO * code_dim), nn.Linear(MLP_RATIO * code_dim, dim)]
        self.transform = nn.ModuleList(layers)
        self._table: tuple[list[tuple], Tensor] | None = None  # what it was made from, and the codes

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = self.latents_of(z)  # (n, D)
        keep = None if mask is None else mask.reshape(-1)
        found = self.find(latents)  # (n,)
        codes = self._transformed(F.embedding(found, self.frozen))  # (n, D)
        finite = finite_rows(token_rows(z))
        learn = finite if keep is None else finite & keep
        targets = latents.detach().masked_fill(~learn.unsqueeze(1), 0)
        losses = {
            "commitment": mean_over_kept((latents - codes.detach()).square(), keep),
            "codebook": mean_over_kept((targets - codes).square(), learn),
        }
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        # In evaluation the table itself, as decode: the same product with other rows around it may round otherwise.
        quantized = codes.detach() if self.training else self.codes_of(found).detach()
        return Quantized(
            drop(quantized.view(z.shape), mask),
            indices,
            losses,
            count_codes(indices, self.codebook_sizes, finite),
            drop(latents.view(z.shape), mask),
        )

    def estimate(self, assigned: Quantized) -> Tensor:
        """``assigned.quantized`` with the gradient of the chosen estimator."""
        if self.estimator == "none":
            return assigned.quantized
        through = rotation if self.estimator == "rotation" else straight_through
        return through(assigned.latents, assigned.quantized)

    def latents_of(self, z: Tensor) -> Tensor:
        return F.normalize(token_rows(z), dim=1) if self.l2_normalize else token_rows(z)

    def all_codes(self) -> Tensor:
        """The table ``(K, D)`` of the transformation as it is now; in evaluation kept, without a gradient."""
        if self.training or torch.compiler.is_compiling():
            return self._transformed(self.frozen)
        sources = [self.frozen, *self.transform.parameters()]
        # The version of a tensor counts the changes in place, so neither an optimizer nor a swap of weights is missed.
        made_from = [(id(source), source.data_ptr(), source._version, source.dtype) for source in sources]
        if self._table is None or self._table[0] != made_from:
            with torch.no_grad():
                self._table = made_from, self._transformed(self.frozen)
        return self._table[1]

    def codes_of(self, flat: Tensor) -> Tensor:
        if self.training:
            return self._transformed(F.embedding(flat, self.frozen))
        return F.embedding(flat, self.all_codes())

    def train(self, mode: bool = True) -> SimVQ:
        self._table = None  # training needs the memory
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SimVQ:
        self._table = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_table": None}  # can be made again

    def _transformed(self, rows: Tensor) -> Tensor:
        """Frozen vectors ``(n, d)`` -> codes ``(n, D)`` in the dtype of the search."""
        dtype = search_dtype(rows)
        first, *rest = self.transform
        codes = _linear(rows.to(dtype), first)
        for layer in rest:
            codes = _linear(F.gelu(codes), layer)
        return F.normalize(codes, dim=1) if self.l2_normalize else codes


def _linear(rows: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the dtype of the rows, whatever its own."""
    return F.linear(rows, layer.weight.to(rows.dtype), None if layer.bias is None else layer.bias.to(rows.dtype))
