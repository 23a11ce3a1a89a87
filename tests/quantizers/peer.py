"""One interface around two libraries' quantizers: vector-quantize-pytorch (``peer``) and this one (``ours``).

A quantizer of either side is called as ``quantizer(x, mask)`` and returns ``(quantized, indices, loss)``: ``quantized``
in the layout of ``x``, ``indices`` always ``(B, *S, G)``, ``loss`` one scalar with the weights that the peer's defaults
mean, its per-level losses averaged. ``quantizer.decode(indices)`` is the way back. A scenario written against that runs
on both, so it is known to be one that the peer itself passes.

What each function sets is what both sides can mean; the peer's names are kept where there is a choice of name.
"""

import importlib.metadata

import pytest
import torch
from torch import nn

from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.gumbel import GumbelQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.residual import Residual
from vistok.quantizers.sim_vq import SimVQ
from vistok.quantizers.vq import VectorQuantizer

lucidrains = pytest.importorskip("vector_quantize_pytorch", reason="the peer library is a test dependency")
Codebook = lucidrains.vector_quantize_pytorch.Codebook

SIDES = ("peer", "ours")
DECAY = 0.8  # of the moving averages, the peer's default
KNOWN_VERSION = importlib.metadata.version("vector-quantize-pytorch").startswith("1.32.")


def peer_fails(*values, reason):
    """A case that the peer's known version fails; another version may have repaired it."""
    return pytest.param(*values, marks=pytest.mark.xfail(reason=reason, strict=KNOWN_VERSION))


class Adapted:
    """A quantizer of either side behind the common interface.

    Args:
        module: the quantizer itself.
        forward: ``(x, mask) -> (quantized, indices, loss)`` in the common layout.
        lookup: ``indices -> quantized``.
    """

    def __init__(self, module, forward, lookup):
        self.module, self.forward, self.lookup = module, forward, lookup

    def __call__(self, x, mask=None):
        return self.forward(x, mask)

    def decode(self, indices):
        return self.lookup(indices)

    def train(self, mode=True):
        self.module.train(mode)
        return self

    def eval(self):
        return self.train(False)

    def commit(self):
        """End of an optimizer step: ours applies its state changes here, the peer has done so in forward."""
        if hasattr(self.module, "commit_update"):
            self.module.commit_update()


def adapt_ours(quantizer, weights, channels_first=False):
    """Ours is channel-last; a channel-first caller permutes outside."""

    def forward(x, mask):
        z = x.movedim(1, -1) if channels_first else x
        result = quantizer(z, mask)
        quantized = result.quantized.movedim(-1, 1) if channels_first else result.quantized
        loss = sum((weights[name] * value for name, value in result.losses.items()), torch.zeros(()))
        return quantized, result.indices, loss

    def lookup(indices):
        return quantizer.decode(indices).movedim(-1, 1) if channels_first else quantizer.decode(indices)

    return Adapted(quantizer, forward, lookup)


def _masked(module):
    return lambda x, mask: module(x) if mask is None else module(x, mask=mask)


# ---- vector quantization


def vector_quantize(
    side,
    dim,
    codebook_size,
    codebook_dim=None,
    heads=1,
    separate_codebook_per_head=False,
    use_cosine_sim=False,
    learnable_codebook=False,
    rotation_trick=False,
    commitment_weight=1.0,
    kmeans_init=False,
    expire=False,
    hold=False,
    channels_first=None,
):
    """Codebook with moving averages, or ``learnable_codebook``; ``channels_first`` is the number of token axes.

    The peer's ``eps`` is in tokens, ours a share of uniform usage; they are one where a batch has as many tokens as
    there are codes, and so are the peer's counts, which start at one per code. ``expire``: the peer's threshold of 2
    tokens, ours of 0.9 of uniform usage: both move every code that the step has not used. ``hold``: the codebook stays
    from one forward pass to the next; the peer needs decay 1 for that, ours waits for the end of the step anyway.
    """
    if side == "peer":
        layout = {None: {}, 1: {"channel_last": False}, 2: {"accept_image_fmap": True}, 3: {"accept_3d_fmap": True}}
        module = lucidrains.VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            heads=heads,
            separate_codebook_per_head=separate_codebook_per_head,
            use_cosine_sim=use_cosine_sim,
            learnable_codebook=learnable_codebook,
            ema_update=not learnable_codebook,
            rotation_trick=rotation_trick,
            decay=1.0 if hold else DECAY,
            commitment_weight=commitment_weight,
            kmeans_init=kmeans_init,
            threshold_ema_dead_code=2 if expire else 0,
            **layout[channels_first],
        )
        return _adapt_peer_vq(module, heads)
    codebook_dim = dim if codebook_dim is None else codebook_dim
    quantizer = VectorQuantizer(
        codebook_size,
        codebook_dim,
        l2_normalize=use_cosine_sim,
        codebook_update="gradient" if learnable_codebook else "ema",
        ema_decay=DECAY,
        kmeans_steps=int(kmeans_init),
        restart_below=0.9 if expire else None,
        estimator="rotation" if rotation_trick else "straight_through",
    )
    if heads > 1:
        quantizer = Grouped(quantizer, heads, shared=not separate_codebook_per_head)
    if heads * codebook_dim != dim:
        quantizer = Factorized(quantizer, dim)
    weights = {"commitment": commitment_weight, "codebook": commitment_weight}
    return adapt_ours(quantizer, weights, channels_first is not None)


def _adapt_peer_vq(module, heads):
    call = _masked(module)

    def forward(x, mask):
        quantized, indices, loss = call(x, mask)
        return quantized, indices if heads > 1 else indices.unsqueeze(-1), loss

    def lookup(indices):
        return module.get_output_from_indices(indices if heads > 1 else indices.squeeze(-1))

    return Adapted(module, forward, lookup)


def residual_vq(
    side,
    dim,
    codebook_size,
    num_quantizers=None,
    codebook_dim=None,
    shared_codebook=False,
    use_cosine_sim=False,
    quantize_dropout=False,
    kmeans_init=False,
    stochastic=False,
    groups=1,
    hold=False,
):
    """A stack of vector quantizers; ``codebook_size`` may be a tuple, one per level; ``hold`` as above.

    ``stochastic``: codes are drawn in training, at temperature 0.1. The peer adds Gumbel noise to the distances; the
    quantizer of ours that draws is the Gumbel one, whose logits are learned.
    """
    if side == "peer":
        settings = {
            "dim": dim,
            "codebook_size": codebook_size,
            "num_quantizers": num_quantizers,
            "shared_codebook": shared_codebook,
            "use_cosine_sim": use_cosine_sim,
            "quantize_dropout": quantize_dropout,
            "kmeans_init": kmeans_init,
            "stochastic_sample_codes": stochastic,
            "sample_codebook_temp": 0.1,
            "rotation_trick": False,
            "decay": 1.0 if hold else DECAY,
        }
        if groups > 1:
            return _adapt_peer_grouped(lucidrains.GroupedResidualVQ(groups=groups, **settings))
        return _adapt_peer_residual(lucidrains.ResidualVQ(codebook_dim=codebook_dim, **settings))

    inner = (codebook_dim or dim) // groups

    def level(size):
        if stochastic:
            return GumbelQuantizer(size, inner, temperature=0.1)
        return VectorQuantizer(
            size, inner, use_cosine_sim, codebook_update="ema", ema_decay=DECAY, kmeans_steps=int(kmeans_init)
        )

    sizes = codebook_size if isinstance(codebook_size, tuple) else None
    dropout = 1.0 if quantize_dropout else 0.0
    quantizer = Residual(
        [level(size) for size in sizes] if sizes else level(codebook_size),
        None if sizes else num_quantizers,
        shared=shared_codebook,
        dropout=dropout,
        dropout_per_sample=False,
    )
    if groups > 1:
        quantizer = Grouped(quantizer, groups)
    if inner * groups != dim:
        quantizer = Factorized(quantizer, dim)
    weights = {"commitment": 1.0, "codebook": 1.0, "kl": 0.0}
    return adapt_ours(quantizer, weights)


def _adapt_peer_residual(module):
    call = _masked(module)

    def forward(x, mask):
        quantized, indices, losses = call(x, mask)
        return quantized, indices, losses.mean()

    return Adapted(module, forward, module.get_output_from_indices)


def _adapt_peer_grouped(module):
    def forward(x, mask):
        quantized, indices, losses = _masked(module)(x, mask)
        return quantized, indices.movedim(0, -2).flatten(-2), losses.mean()  # (groups, B, N, Q) -> (B, N, groups * Q)

    def lookup(indices):
        return module.get_output_from_indices(indices.unflatten(-1, (module.groups, -1)).movedim(-2, 0))

    return Adapted(module, forward, lookup)


def hierarchical_vq(side, dim, codebook_size, scales):
    """Image pyramid, channels first. The peer enlarges bilinearly and by estimators per level, ours as VAR does."""
    if side == "peer":
        module = lucidrains.HierarchicalVQ(
            dim=dim, codebook_size=codebook_size, scales=scales, accept_image_fmap=True, kmeans_init=False
        )

        def forward(x, mask):
            quantized, indices, loss = module(x)
            return quantized, torch.cat([part.flatten(1) for part in indices], 1).unsqueeze(-1), loss

        def lookup(indices):
            parts = indices.squeeze(-1).split([scale**2 for scale in scales], 1)
            maps = [part.unflatten(1, (scale, scale)) for part, scale in zip(parts, scales, strict=True)]
            return module.get_output_from_indices(maps)

        return Adapted(module, forward, lookup)
    stage = VectorQuantizer(codebook_size, dim, codebook_update="ema")
    quantizer = MultiScaleResidual(stage, scales, phi_sharing=1)
    return adapt_ours(quantizer, {"commitment": 1.0, "codebook": 1.0}, channels_first=True)


# ---- SimVQ


def sim_vq(side, dim, codebook_size, num_quantizers=None, transform="linear", rotation_trick=True, **settings):
    """SimVQ, or with ``num_quantizers`` its residual form.

    Further settings: ``quantize_dropout`` and ``channels_first``.
    """
    dropout, channels_first = settings.pop("quantize_dropout", False), settings.pop("channels_first", False)
    if settings:
        raise TypeError(f"unknown settings {settings}")
    if side == "peer":
        shared = {"channel_first": channels_first, "rotation_trick": rotation_trick}
        if num_quantizers:
            module = lucidrains.ResidualSimVQ(
                dim=dim,
                codebook_size=codebook_size,
                num_quantizers=num_quantizers,
                quantize_dropout=dropout,
                **shared,
            )
            return _adapt_peer_residual(module)
        mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        module = lucidrains.SimVQ(
            dim=dim, codebook_size=codebook_size, codebook_transform=mlp if transform == "mlp" else None, **shared
        )

        def forward(x, mask):
            quantized, indices, loss = module(x)
            return quantized, indices.unsqueeze(-1), loss

        return Adapted(module, forward, lambda indices: module.indices_to_codes(indices.squeeze(-1)))
    estimator = "rotation" if rotation_trick else "straight_through"
    quantizer = SimVQ(codebook_size, dim, transform=transform, estimator=estimator)
    if num_quantizers:
        quantizer = Residual(
            quantizer, num_quantizers, dropout=float(dropout), dropout_per_sample=False, estimator=estimator
        )
    return adapt_ours(quantizer, {"commitment": 0.25, "codebook": 1.0}, channels_first)


# ---- codes without a codebook


def lfq(
    side,
    dim,
    bits,
    num_codebooks=1,
    num_quantizers=None,
    spherical=False,
    codebook_scale=1.0,
    inv_temperature=100.0,
    commitment_loss_weight=0.0,
    diversity_gamma=1.0,
    quantize_dropout=False,
    channels_first=False,
):
    """Lookup-free quantization of ``bits`` bits per codebook, with projections if ``dim`` asks for them.

    With ``num_quantizers`` its residual form, whose scale halves from level to level.
    """
    if side == "peer":
        settings = {
            "dim": dim,
            "codebook_size": 2**bits,
            "spherical": spherical,
            "commitment_loss_weight": commitment_loss_weight,
            "diversity_gamma": diversity_gamma,
        }
        if num_quantizers:
            return _adapt_peer_residual(
                lucidrains.ResidualLFQ(num_quantizers=num_quantizers, quantize_dropout=quantize_dropout, **settings)
            )
        module = lucidrains.LFQ(
            num_codebooks=num_codebooks,
            codebook_scale=codebook_scale,
            channel_first=channels_first,
            **settings,
        )
        return _adapt_peer_lfq(module, inv_temperature)

    def level(scale):
        return LookupFreeQuantizer(
            bits,
            scale=scale,
            l2_normalize=spherical,
            temperature=1 / inv_temperature,
            batch_entropy_weight=diversity_gamma,
            bit_order="most_significant_first",
        )

    if num_quantizers:
        levels = [level(2.0**-i) for i in range(num_quantizers)]
        quantizer = Residual(levels, dropout=float(quantize_dropout), dropout_per_sample=False)
    else:
        quantizer = level(codebook_scale)
        quantizer = quantizer if num_codebooks == 1 else Grouped(quantizer, num_codebooks)
    if quantizer.dim != dim:
        quantizer = Factorized(quantizer, dim)
    return adapt_ours(quantizer, {"entropy": 0.1, "commitment": commitment_loss_weight}, channels_first)


def _adapt_peer_lfq(module, inv_temperature):
    grouped = module.keep_num_codebooks_dim

    def forward(x, mask):
        quantized, indices, loss = module(x, inv_temperature=inv_temperature, mask=mask)
        return quantized, indices if grouped else indices.unsqueeze(-1), loss

    def lookup(indices):
        return module.indices_to_codes(indices if grouped else indices.squeeze(-1))

    return Adapted(module, forward, lookup)


def fsq(side, levels, dim=None, num_codebooks=1, preserve_symmetry=False, channels_first=False):
    """Finite scalar quantization; neither side has a loss."""
    if side == "peer":
        module = lucidrains.FSQ(
            levels,
            dim=dim,
            num_codebooks=num_codebooks,
            preserve_symmetry=preserve_symmetry,
            channel_first=channels_first,
        )
        grouped = module.keep_num_codebooks_dim

        def forward(x, mask):
            quantized, indices = module(x)
            return quantized, indices if grouped else indices.unsqueeze(-1), torch.zeros(())

        return Adapted(
            module, forward, lambda indices: module.indices_to_codes(indices if grouped else indices.squeeze(-1))
        )
    quantizer = FiniteScalarQuantizer(levels, symmetric=preserve_symmetry)
    quantizer = quantizer if num_codebooks == 1 else Grouped(quantizer, num_codebooks)
    quantizer = quantizer if dim in (None, quantizer.dim) else Factorized(quantizer, dim)
    return adapt_ours(quantizer, {}, channels_first)


class _SoftClamp(nn.Module):
    """The peer's bound of what enters the first level of residual FSQ; part of no quantizer of ours."""

    def __init__(self, levels):
        super().__init__()
        self.register_buffer("reach", 1 + 1 / (torch.tensor(levels) - 1))

    def forward(self, x):
        return (x / self.reach).tanh() * self.reach


def residual_fsq(side, levels, num_quantizers, dim=None, quantize_dropout=False, channels_first=False):
    """Residual FSQ: symmetric levels, clamped, whose step shrinks by the number of levels from level to level.

    The peer bounds the projected latents softly before the first level; around ours that is done outside, between
    projections of the test's own.
    """
    if side == "peer":
        module = lucidrains.ResidualFSQ(
            levels=levels,
            num_quantizers=num_quantizers,
            dim=dim,
            quantize_dropout=quantize_dropout,
            is_channel_first=channels_first,
        )

        def forward(x, mask):
            quantized, indices = module(x)
            return quantized, indices.movedim(1, -1) if channels_first else indices, torch.zeros(())

        def lookup(indices):
            # Channel-first indices have their levels at axis 1, but only on the way out in this version.
            return module.get_output_from_indices(indices.movedim(-1, 1) if channels_first else indices)

        return Adapted(module, forward, lookup)
    units = [[number**-level for number in levels] for level in range(num_quantizers)]
    quantizer = Residual(
        [FiniteScalarQuantizer(levels, symmetric=True, bound="clamp", scale=unit) for unit in units],
        dropout=float(quantize_dropout),
        dropout_per_sample=False,
    )
    projected = dim is not None and dim != len(levels)
    module = nn.ModuleDict(
        {
            "project_in": nn.Linear(dim, len(levels)) if projected else nn.Identity(),
            "bound": _SoftClamp(levels),
            "quantizer": quantizer,
            "project_out": nn.Linear(len(levels), dim) if projected else nn.Identity(),
        }
    )

    def bounded(x, mask):
        z = module["bound"](module["project_in"](x.movedim(1, -1) if channels_first else x))
        result = quantizer(z, mask)
        quantized = module["project_out"](result.quantized)
        return quantized.movedim(-1, 1) if channels_first else quantized, result.indices, torch.zeros(())

    def decoded(indices):
        quantized = module["project_out"](quantizer.decode(indices))
        return quantized.movedim(-1, 1) if channels_first else quantized

    return Adapted(module, bounded, decoded)


def latent_quantize(side, levels, dim, num_codebooks=1, optimize_values=True):
    """Learned or fixed values per dimension, channels first always.

    Ours has no learned values and no losses: the fixed ones are the levels of FSQ, from -1/2 to 1/2.
    """
    if side == "peer":
        module = lucidrains.LatentQuantize(
            levels=levels,
            dim=dim,
            num_codebooks=num_codebooks,
            commitment_loss_weight=0.1,
            quantization_loss_weight=0.1,
            optimize_values=optimize_values,
        )

        def forward(x, mask):
            quantized, indices, loss = module(x)
            return quantized, indices if num_codebooks > 1 else indices.unsqueeze(-1), loss

        def lookup(indices):
            return module.indices_to_codes(indices if num_codebooks > 1 else indices.squeeze(-1))

        return Adapted(module, forward, lookup)
    quantizer = FiniteScalarQuantizer(levels, symmetric=True, bound="clamp", scale=0.5)
    quantizer = quantizer if num_codebooks == 1 else Grouped(quantizer, num_codebooks)
    quantizer = quantizer if dim == quantizer.dim else Factorized(quantizer, dim)
    return adapt_ours(quantizer, {}, channels_first=True)


def fsp(side, levels, dim=None, channels_first=False):
    """Finite scalar perturbation in evaluation, where it rounds; ours is FSQ, with other values."""
    if side == "ours":
        return fsq("ours", levels, dim, channels_first=channels_first)
    module = lucidrains.FSP(levels=levels, dim=dim, channel_first=channels_first)

    def forward(x, mask):
        quantized, indices, loss, _ = module(x)
        return quantized, indices.unsqueeze(-1), loss

    return Adapted(module, forward, lambda indices: module.indices_to_codes(indices.squeeze(-1)))


# ---- the same weights on both sides


def twins(family, **settings):
    """``(peer, ours)`` of one family, with the peer's weights and state in both."""
    peer, ours = family("peer", **settings), family("ours", **settings)
    copy_weights(ours.module, peer.module)
    return peer, ours


@torch.no_grad()
def copy_weights(ours, theirs):
    """Give our quantizer the weights of the peer's module that means the same."""
    if isinstance(ours, Factorized):
        ours.project_in.load_state_dict(theirs.project_in.state_dict())
        ours.project_out.load_state_dict(theirs.project_out.state_dict())
        copy_weights(ours.quantizer, theirs)
    elif isinstance(ours, nn.ModuleDict):
        ours["project_in"].load_state_dict(theirs.project_in.state_dict())
        ours["project_out"].load_state_dict(theirs.project_out.state_dict())
    elif isinstance(ours, Residual):
        for stage, layer in zip(ours.quantizers, theirs.layers, strict=False):  # a shared level is the first layer's
            copy_weights(stage, layer)
    elif isinstance(ours, Grouped) and hasattr(theirs, "rvqs"):
        for quantizer, rvq in zip(ours.quantizers, theirs.rvqs, strict=True):
            copy_weights(quantizer, rvq)
    elif isinstance(ours, Grouped) and hasattr(theirs, "_codebook"):
        for quantizer, table in zip(ours.quantizers, theirs._codebook.embed, strict=True):
            _fill(quantizer, table)
    elif isinstance(ours, VectorQuantizer):
        _fill(ours, theirs._codebook.embed[0])
    elif isinstance(ours, SimVQ):
        ours.frozen.copy_(theirs.frozen_codebook)
        for mine, parameter in zip(ours.transform.parameters(), theirs.code_transform.parameters(), strict=True):
            mine.copy_(parameter)


def _fill(quantizer, table):
    quantizer.codebook.copy_(table)
    if quantizer.ema:
        quantizer.sums.copy_(table / len(table))


def tables(adapted):
    """The codebooks ``[(K, D), ...]`` of either side's vector quantizers, level after level, group after group."""
    found = []
    for part in adapted.module.modules():
        if isinstance(part, VectorQuantizer):
            found.append(part.codebook.detach())
        elif isinstance(part, Codebook):
            found.extend(part.embed.detach().unbind(0))
    return found


@torch.no_grad()
def set_tables(adapted, make_table):
    """Give every codebook the values ``make_table(number, shape)``, and the state that goes with them."""
    number = 0
    for part in adapted.module.modules():
        if isinstance(part, VectorQuantizer):
            table = make_table(number, part.codebook.shape)
            _fill(part, nn.functional.normalize(table, dim=-1) if part.l2_normalize else table)
            number += 1
        elif isinstance(part, Codebook):
            new = torch.stack([make_table(number + head, table.shape) for head, table in enumerate(part.embed)])
            new = nn.functional.normalize(new, dim=-1) if part.use_cosine_sim else new
            part.embed.copy_(new)
            part.embed_avg.copy_(new)
            number += len(new)
