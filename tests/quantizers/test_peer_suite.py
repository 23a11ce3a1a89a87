"""The scenarios that vector-quantize-pytorch tests itself with, on both libraries, then numbers side by side.

A scenario bears the name of the peer's test, is written anew from what that test checks, smaller, and runs on ``peer``
and ``ours`` through ``peer.py``. Where the peer fails its own scenario, its case is marked with the reason. Not here:
what ours does not offer (beam search, DiVeQ, FVQ, QINCo's neural codebooks, learned latent values, accumulated or
weighted averages, random projections, orthogonal rotation, FSP's noise, LFQ's entropy of a random share of the tokens).
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.radix import pack_digits, unpack_digits

_spec = importlib.util.spec_from_file_location("vistok_test_peer", Path(__file__).with_name("peer.py"))
peers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peers)

BOTH = pytest.mark.parametrize("side", peers.SIDES)
COSINE = pytest.mark.parametrize("use_cosine_sim", [True, False])
TRAIN = pytest.mark.parametrize("train", [True, False])


def latents(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(family, side, seed=0, **settings):
    torch.manual_seed(seed)
    return family(side, **settings)


def random_codes(*adapted, scale=0.5, seed=100):
    """Codes as far apart as latents, the same for all that are given: the peer's initial ones are all about zero."""
    for quantizer in adapted:
        peers.set_tables(quantizer, lambda number, shape: latents(*shape, seed=seed + number, scale=scale))
    return adapted[0]


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


# ---- vector quantization


@BOTH
@COSINE
@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_vq(side, use_cosine_sim, rotation_trick, input_requires_grad):
    quantizer = make(
        peers.vector_quantize,
        side,
        dim=16,
        codebook_size=32,
        use_cosine_sim=use_cosine_sim,
        rotation_trick=rotation_trick,
    )
    x = latents(1, 64, 16).requires_grad_(input_requires_grad)
    quantized, indices, loss = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 64, 1) and loss.ndim == 0
    assert indices.min() >= 0 and indices.max() < 32
    if input_requires_grad:
        (quantized.square().sum() + loss).backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@BOTH
def test_vq_eval(side):
    quantizer = make(peers.vector_quantize, side, dim=16, codebook_size=32).eval()
    quantized, indices, _ = quantizer(latents(1, 64, 16))
    assert torch.equal(quantized, quantizer.decode(indices))


@BOTH
@pytest.mark.parametrize("train", [True, False])
def test_vq_mask(side, train):
    quantizer = make(peers.vector_quantize, side, dim=16, codebook_size=32, hold=True).train(train)
    x, mask = latents(1, 64, 16), torch.arange(64).unsqueeze(0) < 32
    short, short_indices, short_loss = quantizer(x[:, :32])
    quantized, indices, loss = quantizer(x, mask)
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(quantized[:, :32], short)
    assert torch.equal(indices[:, :32], short_indices)
    assert (quantized[:, 32:] == 0).all() and (indices[:, 32:] == -1).all()


@BOTH
@COSINE
def test_vq_mask_keeps_padding_out_of_the_averages(side, use_cosine_sim):
    masked, short = (
        make(peers.vector_quantize, side, dim=8, codebook_size=16, use_cosine_sim=use_cosine_sim) for _ in range(2)
    )
    x = latents(2, 24, 8)
    masked(x.index_fill(1, torch.arange(12, 24), 1e3), torch.arange(24).expand(2, -1) < 12)
    short(x[:, :12])
    masked.commit()
    short.commit()
    assert_close(peers.tables(masked)[0], peers.tables(short)[0], 1e-6)


MASKED_COMMITMENT = "the masked commitment compares codes with the unprojected, unnormalised, unsplit input (defect 3)"


def masked_commitment_cases():
    for side in peers.SIDES:
        for heads, codebook_dim, separate in [(1, 6, False), (1, 3, False), (2, 3, False), (2, 3, True), (2, 2, True)]:
            for cosine in (False, True):
                case = (side, heads, codebook_dim, separate, cosine)
                wrong = side == "peer" and (cosine or heads > 1 or codebook_dim != 6)
                yield peers.peer_fails(*case, reason=MASKED_COMMITMENT) if wrong else case


@pytest.mark.parametrize(
    "side,heads,codebook_dim,separate_codebook_per_head,use_cosine_sim", list(masked_commitment_cases())
)
@pytest.mark.parametrize("channel_last,with_padding", [(True, True), (True, False), (False, True)])
def test_masked_commitment_in_codebook_space(
    side, heads, codebook_dim, separate_codebook_per_head, use_cosine_sim, channel_last, with_padding
):
    quantizer = make(
        peers.vector_quantize,
        side,
        dim=6,
        codebook_size=8,
        heads=heads,
        codebook_dim=codebook_dim,
        separate_codebook_per_head=separate_codebook_per_head,
        use_cosine_sim=use_cosine_sim,
        commitment_weight=0.7,
        channels_first=None if channel_last else 1,
    )
    x = latents(2, 4, 6, scale=3).requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    if with_padding:
        mask[0, 3] = mask[1, 2] = mask[1, 3] = False

    # By hand, over the kept tokens only: project, split into heads, search by squared distance.
    named = dict(quantizer.module.named_parameters())
    rows = x[mask]
    if heads * codebook_dim != 6:
        weight, bias = (next(v for k, v in named.items() if k.endswith(f"project_in.{p}")) for p in ("weight", "bias"))
        rows = F.linear(rows, weight, bias)
    rows = rows.view(len(rows), heads, codebook_dim)
    rows = F.normalize(rows, dim=-1) if use_cosine_sim else rows
    books = [table.clone() for table in peers.tables(quantizer)]
    expected_indices, codes = [], []
    for head in range(heads):
        book = books[head if separate_codebook_per_head else 0]
        nearest = (rows[:, head, None] - book).square().sum(-1).argmin(1)
        expected_indices.append(nearest)
        codes.append(book[nearest])
    commitment = 0.7 * F.mse_loss(rows, torch.stack(codes, 1))

    quantized, indices, loss = quantizer(x if channel_last else x.movedim(-1, 1), mask)
    quantized = quantized if channel_last else quantized.movedim(1, -1)
    assert torch.equal(indices[mask], torch.stack(expected_indices, 1)) and (indices[~mask] == -1).all()
    assert (quantized[~mask] == 0).all()
    torch.testing.assert_close(loss, commitment)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(commitment, x, retain_graph=True)[0])
    assert (gradient[~mask] == 0).all()


@BOTH
def test_vq_lower_codebook(side):
    quantizer = make(peers.vector_quantize, side, dim=24, codebook_size=32, codebook_dim=4)
    x = latents(1, 64, 24).requires_grad_()
    quantized, indices, loss = quantizer(x)
    assert quantized.shape == x.shape
    (quantized.sum() + loss).backward()
    assert x.grad.abs().sum() > 0
    quantized, indices, _ = quantizer.eval()(x)
    torch.testing.assert_close(quantized, quantizer.decode(indices))


@BOTH
def test_vq_cosine_sim(side):
    quantizer = make(peers.vector_quantize, side, dim=16, codebook_size=32, use_cosine_sim=True).eval()
    x = latents(1, 64, 16)
    quantized, indices, _ = quantizer(x)
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(1, 64))
    cosine = F.normalize(x, dim=-1) @ peers.tables(quantizer)[0].T
    assert torch.equal(indices[..., 0], cosine.argmax(-1))
    assert torch.equal(quantizer(7 * x)[1], indices)


@BOTH
def test_vq_expire_code(side):
    quantizer = make(peers.vector_quantize, side, dim=8, codebook_size=32, expire=True)
    random_codes(quantizer, scale=0.1)
    # Far from all codes, and all in one direction: a handful of codes is used, the rest is dead.
    x = latents(1, 40, 8) + 10
    _, indices, _ = quantizer(x)
    quantizer.commit()
    unused = torch.ones(32, dtype=torch.bool).index_fill(0, indices.unique(), False)
    moved = (peers.tables(quantizer)[0].unsqueeze(1) - x[0]).abs().amax(-1).amin(1) < 1e-5
    assert unused.sum() > 20 and moved[unused].all()
    # A moved code is a token's own: the next step gives it something to do.
    assert len(quantizer(x)[1].unique()) > len(indices.unique())


@BOTH
@pytest.mark.parametrize("separate_codebook_per_head", [True, False])
def test_vq_multiheaded(side, separate_codebook_per_head):
    quantizer = make(
        peers.vector_quantize,
        side,
        dim=16,
        codebook_dim=4,
        heads=4,
        codebook_size=21,
        separate_codebook_per_head=separate_codebook_per_head,
        channels_first=2,
    )
    x = latents(2, 16, 4, 6)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (2, 4, 6, 4)
    assert len(peers.tables(quantizer)) == (4 if separate_codebook_per_head else 1)


@pytest.mark.parametrize(
    "side,separate_codebook_per_head",
    [
        peers.peer_fails("peer", False, reason="decode leaves the heads of a shared codebook unjoined"),
        ("peer", True),
        ("ours", True),
        ("ours", False),
    ],
)
def test_vq_multiheaded_decode(side, separate_codebook_per_head):
    quantizer = make(
        peers.vector_quantize,
        side,
        dim=16,
        codebook_dim=4,
        heads=4,
        codebook_size=21,
        separate_codebook_per_head=separate_codebook_per_head,
    ).eval()
    quantized, indices, _ = quantizer(latents(2, 24, 16))
    torch.testing.assert_close(quantizer.decode(indices), quantized)


@BOTH
def test_vq_3d(side):
    quantizer = make(peers.vector_quantize, side, dim=8, codebook_size=16, channels_first=3).eval()
    x = latents(2, 8, 3, 4, 5)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (2, 3, 4, 5, 1)
    torch.testing.assert_close(quantizer.decode(indices), quantized)
    # The axes keep their order: the same as token by token.
    flat, _, _ = make(peers.vector_quantize, side, dim=8, codebook_size=16).eval()(x.movedim(1, -1).flatten(1, -2))
    torch.testing.assert_close(quantized.movedim(1, -1).flatten(1, -2), flat)


# ---- residual vector quantization


@BOTH
@COSINE
@TRAIN
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_residual_vq(side, use_cosine_sim, train, shared_codebook):
    quantizer = make(
        peers.residual_vq,
        side,
        dim=8,
        num_quantizers=4,
        codebook_size=32,
        use_cosine_sim=use_cosine_sim,
        shared_codebook=shared_codebook,
        hold=True,
    ).train(train)
    quantized, indices, loss = quantizer(latents(1, 64, 8))
    assert indices.shape == (1, 64, 4) and loss >= 0
    torch.testing.assert_close(quantized, quantizer.decode(indices), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_residual_vq_levels_reduce_the_error(side, shared_codebook):
    settings = {"dim": 8, "num_quantizers": 4, "codebook_size": 32, "shared_codebook": shared_codebook}
    quantizer = random_codes(make(peers.residual_vq, side, quantize_dropout=True, **settings)).eval()
    for table in peers.tables(quantizer):
        table[0] = 0  # with a code at zero no level can make it worse
    x = latents(1, 64, 8)
    _, indices, _ = quantizer(x)
    errors = [(x - quantizer.decode(indices[..., :level])).square().sum(-1) for level in range(1, 5)]
    assert all((later <= earlier + 1e-5).all() for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1].mean() < errors[0].mean()


@BOTH
def test_residual_vq2(side):
    # Codes are drawn in training, and are the same ones every time in evaluation.
    quantizer = make(
        peers.residual_vq, side, dim=8, num_quantizers=3, codebook_size=32, stochastic=True, shared_codebook=True
    )
    if side == "peer":
        random_codes(quantizer, scale=0.05)
    x = latents(1, 64, 8)
    quantized, indices, loss = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 64, 3) and loss.isfinite()
    assert not torch.equal(quantizer(x)[1], indices)
    quantized, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer(x)[1], indices)
    torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


@BOTH
@TRAIN
def test_grouped_residual_vq(side, train):
    quantizer = make(peers.residual_vq, side, dim=16, num_quantizers=3, groups=2, codebook_size=32, hold=True).train(
        train
    )
    x = latents(1, 64, 16)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 64, 6)
    torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


@BOTH
def test_residual_vq3(side):
    # k-means: the first level's codes are centroids of the latents, so they are far better than before.
    quantizer = make(peers.residual_vq, side, dim=4, codebook_size=16, num_quantizers=2, kmeans_init=True)
    x = latents(1, 256, 4)
    quantizer(x)
    quantizer.commit()
    quantized, indices, _ = quantizer.eval()(x)
    assert indices[..., 0].unique().numel() == 16
    assert (x - quantized).square().mean() < 0.4 * x.square().mean()


@BOTH
def test_tiger(side):
    quantizer = make(peers.residual_vq, side, dim=2, codebook_size=(5, 64, 128)).eval()
    quantized, indices, _ = quantizer(latents(2, 7, 2))
    assert [table.shape[0] for table in peers.tables(quantizer)] == [5, 64, 128]
    assert indices[..., 0].max() < 5
    torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("codebook_dim", [8, 4])
def test_residual_vq_dropout(side, codebook_dim):
    quantizer = make(
        peers.residual_vq,
        side,
        dim=8,
        codebook_dim=codebook_dim,
        num_quantizers=4,
        codebook_size=32,
        quantize_dropout=True,
        hold=True,
    )
    random_codes(quantizer)
    seen = set()
    for _ in range(24):
        quantized, indices, _ = quantizer(latents(2, 5, 8))
        kept = int((indices[0, 0] >= 0).sum())
        seen.add(kept)
        assert (indices[..., :kept] >= 0).all() and (indices[..., kept:] == -1).all()
        torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(quantizer.decode(indices[..., :kept]), quantized, atol=1e-4, rtol=1e-4)
    assert seen == {1, 2, 3, 4}


@BOTH
@TRAIN
def test_hq(side, train):
    quantizer = make(peers.hierarchical_vq, side, dim=4, codebook_size=32, scales=(1, 2, 4)).train(train)
    random_codes(quantizer)
    x = latents(2, 4, 4, 4).requires_grad_()
    quantized, indices, loss = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (2, 1 + 4 + 16, 1) and loss.isfinite()
    if train:
        (quantized.square().sum() + loss).backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    else:
        torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


# ---- SimVQ


@BOTH
def test_sim_vq(side):
    quantizer = make(peers.sim_vq, side, dim=16, codebook_size=64)
    x = latents(1, 64, 16)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape
    torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("transform", ["linear", "mlp"])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2)])
def test_decode_matches_full_transformed_codebook_and_gradients(side, transform, channels_first, shape):
    quantizer = make(
        peers.sim_vq,
        side,
        dim=3,
        codebook_size=4,
        transform=transform,
        rotation_trick=False,
        channels_first=channels_first,
    ).eval()
    indices = torch.randint(4, (*shape, 1), generator=torch.Generator().manual_seed(1))
    ours = side == "ours"
    table = quantizer.module.train().all_codes() if ours else quantizer.module.codebook
    expected = table[indices[..., 0]]
    expected = expected.movedim(-1, 1) if channels_first else expected
    weight = next(quantizer.module.parameters())
    decoded = quantizer.decode(indices)
    torch.testing.assert_close(decoded, expected)
    (gradient,) = torch.autograd.grad(decoded.square().sum(), weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), weight)[0])

    x = expected.detach().requires_grad_()
    quantized, encoded, loss = quantizer.eval()(x)
    assert torch.equal(encoded, indices)
    torch.testing.assert_close(quantized, expected.detach())
    (quantized.square().mean() + loss).backward()
    assert x.grad.isfinite().all()


@BOTH
def test_residual_sim_vq(side):
    quantizer = make(peers.sim_vq, side, dim=16, num_quantizers=4, codebook_size=64, channels_first=True)
    x = latents(1, 16, 8, 8)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 8, 8, 4)
    torch.testing.assert_close(quantizer.decode(indices), quantized, atol=1e-5, rtol=1e-5)


def dropout_shape_cases():
    for side in peers.SIDES:
        for shape, channels_first in [((4,), False), ((2, 3), True), ((2, 3), False), ((2, 2, 3), True), ((), False)]:
            case = (side, shape, channels_first)
            if side == "peer" and (len(shape) != 1 and not channels_first):
                yield peers.peer_fails(*case, reason="dropped levels get indices for one token axis")
            elif side == "ours" and not shape:
                continue  # latents without a token axis: ours always has one
            else:
                yield case


@pytest.mark.parametrize("side,shape,channels_first", list(dropout_shape_cases()))
def test_dropout_preserves_all_token_axes_and_active_codebook_values(side, shape, channels_first):
    quantizer = make(
        peers.sim_vq,
        side,
        dim=3,
        codebook_size=7,
        num_quantizers=3,
        channels_first=channels_first,
        rotation_trick=False,
        quantize_dropout=True,
    )
    layers = quantizer.module.quantizers if side == "ours" else quantizer.module.layers
    tables = [(layer.all_codes() if side == "ours" else layer.codebook).detach() for layer in layers]
    z = latents(2, *shape, 3)
    seen = set()
    for _ in range(12):
        x = (z.movedim(-1, 1) if channels_first else z).clone().requires_grad_()
        quantized, indices, loss = quantizer(x)
        assert indices.shape == (2, *shape, 3)
        active = int((indices.reshape(-1, 3)[0] >= 0).sum())
        seen.add(active)
        assert (indices[..., active:] == -1).all()
        rest, total = z, torch.zeros_like(z)
        for level in range(active):
            nearest = (rest.unsqueeze(-2) - tables[level]).square().sum(-1).argmin(-1)
            assert torch.equal(indices[..., level], nearest)
            rest, total = rest - tables[level][nearest], total + tables[level][nearest]
        total = total.movedim(-1, 1) if channels_first else total
        torch.testing.assert_close(quantized, total)
        torch.testing.assert_close(quantizer.decode(indices), total)
        # One identity per active level in the peer, one in all in ours (defect 4).
        (gradient,) = torch.autograd.grad(quantized.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.full_like(x, active if side == "peer" else 1))
        (quantized.square().mean() + loss).backward()
        assert x.grad.isfinite().all()
    assert seen == {1, 2, 3}


# ---- lookup-free quantization


@BOTH
@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("codebook_scale", [1.0, 0.5])
@TRAIN
def test_lfq(side, spherical, codebook_scale, train):
    quantizer = make(peers.lfq, side, dim=8, bits=8, spherical=spherical, codebook_scale=codebook_scale).train(train)
    x = latents(1, 6, 6, 8)
    x = x.flatten(1, 2)
    quantized, indices, loss = quantizer(x)
    # In training the peer adds and takes away the latents, so its output is its code up to rounding.
    decoded = quantizer.decode(indices)
    assert torch.equal(quantized, decoded) if side == "ours" or not train else torch.allclose(quantized, decoded)
    assert loss.isfinite()


@BOTH
def test_lfq_video(side):
    quantizer = make(peers.lfq, side, dim=8, bits=8)
    assert quantizer(latents(1, 32, 8))[0].shape == (1, 32, 8)
    quantizer = make(peers.lfq, side, dim=8, bits=8, channels_first=True).eval()
    x = latents(1, 8, 3, 4, 5)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 3, 4, 5, 1)
    assert torch.equal(quantizer.decode(indices), quantized)


@BOTH
def test_lfq2(side):
    quantizer = make(peers.lfq, side, dim=16, bits=6, num_codebooks=4, channels_first=True).eval()
    x = latents(1, 16, 4, 5)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 4, 5, 4)
    torch.testing.assert_close(quantizer.decode(indices), quantized)


MIXED_TOKENS = "with a mask over tokens the probabilities are averaged over nothing: batch entropy = sample entropy"


@pytest.mark.parametrize(
    "side,whole_samples",
    [("peer", True), peers.peer_fails("peer", False, reason=MIXED_TOKENS), ("ours", True), ("ours", False)],
)
def test_masked_lfq(side, whole_samples):
    quantizer = make(peers.lfq, side, dim=6, bits=6, inv_temperature=1.0, commitment_loss_weight=0.25)
    x = latents(3, 8, 6)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    if whole_samples:
        mask = torch.tensor([True, False, True]).unsqueeze(1).expand(3, 8)
    given = mask[:, 0] if side == "peer" and whole_samples else mask
    loss = quantizer(x, given)[2]
    expected = quantizer(x[mask].unsqueeze(0))[2]
    torch.testing.assert_close(loss, expected)
    # Nothing that stands at a dropped position changes the loss.
    torch.testing.assert_close(quantizer(x.masked_fill(~mask.unsqueeze(-1), 50.0), given)[2], expected)


@BOTH
def test_single_token_retains_its_entropy(side):
    quantizer = make(peers.lfq, side, dim=2, bits=2, inv_temperature=1.0, diversity_gamma=0.7)
    x = torch.tensor([[[0.1, -0.2]]])
    on = torch.sigmoid(4 * x.double())
    entropy = -(on * on.log() + (1 - on) * (1 - on).log()).sum()
    # Entropy of one token is that of the batch, so 1 - 0.7 of it remains, times the weight 0.1.
    torch.testing.assert_close(quantizer(x)[2].double(), 0.1 * 0.3 * entropy, atol=1e-6, rtol=0)


@BOTH
def test_small_nonempty_batch_has_finite_loss_and_gradients(side):
    quantizer = make(peers.lfq, side, dim=2, bits=2, inv_temperature=1.0, diversity_gamma=0.7)
    x = torch.tensor([[[0.1, -0.2], [0.2, -0.1]]], requires_grad=True)
    quantizer(x)[2].backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@BOTH
def test_rflq(side):
    quantizer = make(peers.lfq, side, dim=16, bits=6, num_quantizers=4).eval()
    quantized, indices, _ = quantizer(latents(1, 32, 16))
    assert indices.shape == (1, 32, 4)
    torch.testing.assert_close(quantizer.decode(indices), quantized)


def physical_codeword_cases():
    for side in peers.SIDES:
        for projected in (False, True):
            for spherical in (False, True):
                case = (side, projected, spherical)
                if side == "peer" and spherical:
                    yield peers.peer_fails(*case, reason="decoding of residual levels forgets the spherical norm")
                else:
                    yield case


@pytest.mark.parametrize("side,projected,spherical", list(physical_codeword_cases()))
@pytest.mark.parametrize("dropout", [False, True])
@TRAIN
def test_residual_lfq_decodes_physical_codewords_and_dropout_sentinels(side, projected, spherical, dropout, train):
    quantizer = make(
        peers.lfq,
        side,
        dim=3 if projected else 2,
        bits=2,
        num_quantizers=3,
        spherical=spherical,
        quantize_dropout=dropout,
    ).train(train)
    x = latents(2, 4, 3 if projected else 2).requires_grad_()
    quantized, indices, loss = quantizer(x)
    active = int((indices[0, 0] >= 0).sum())
    assert (active == 3 or (dropout and train)) and (indices[..., active:] == -1).all()
    named = dict(quantizer.module.named_parameters())
    rest = x.detach()
    if projected:
        rest = F.linear(rest, named["project_in.weight"], named["project_in.bias"]).detach()
    total = torch.zeros_like(rest)
    for level in range(active):
        bits = rest > 0
        assert torch.equal(indices[..., level], bits[..., 0] * 2 + bits[..., 1] * 1)  # first channel most significant
        code = (2.0 * bits - 1) * 2.0**-level
        code = code / 2**0.5 if spherical else code
        rest, total = rest - code, total + code
    if projected:
        total = F.linear(total, named["project_out.weight"], named["project_out.bias"])
    torch.testing.assert_close(quantized, total)
    torch.testing.assert_close(quantizer.decode(indices), total)
    if train:
        (quantized.square().mean() + loss).backward()
        assert x.grad.isfinite().all()


# ---- scalar quantization


@BOTH
@pytest.mark.parametrize("preserve_symmetry", [True, False])
@TRAIN
def test_fsq(side, preserve_symmetry, train):
    quantizer = make(peers.fsq, side, levels=[8, 5, 5, 5], preserve_symmetry=preserve_symmetry).train(train)
    x = latents(1, 256, 4)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.max() < 1000
    assert torch.equal(quantized, quantizer.decode(indices))


@BOTH
@pytest.mark.parametrize("shape", [(64,), (6, 7)])
def test_fsq_with_dim_and_channel_first(side, shape):
    quantizer = make(peers.fsq, side, levels=[8, 5, 5, 5], dim=16, channels_first=True).eval()
    x = latents(1, 16, *shape)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, *shape, 1)
    torch.testing.assert_close(quantized, quantizer.decode(indices))


@BOTH
@pytest.mark.parametrize("preserve_symmetry", [True, False])
def test_fsq_code_index_roundtrip(side, preserve_symmetry):
    # Every code is its own nearest: undo the bound, quantize, and find the index again.
    quantizer = make(peers.fsq, side, levels=[5, 4, 3], preserve_symmetry=preserve_symmetry).eval()
    indices = torch.arange(60).view(1, 60, 1)
    codes = quantizer.decode(indices)
    assert len(codes[0].unique(dim=0)) == 60
    reach = torch.tensor([2.0, 1.5, 1.0]) * 1.001
    offset = torch.tensor([0.0, 0.5, 0.0])
    if preserve_symmetry:
        x = torch.atanh(codes.clamp(-0.999, 0.999))
    else:
        inside = (codes * torch.tensor([2.0, 2.0, 1.0]) + offset) / reach
        x = torch.atanh(inside) - torch.atanh(offset / reach)
    quantized, found, _ = quantizer(x)
    assert torch.equal(found, indices.to(found.dtype))
    torch.testing.assert_close(quantized, codes)


@BOTH
def test_rfsq(side):
    quantizer = make(peers.residual_fsq, side, levels=[8, 5, 5, 3], num_quantizers=4, dim=16).eval()
    quantized, indices, _ = quantizer(latents(1, 64, 16))
    assert indices.shape == (1, 64, 4)
    torch.testing.assert_close(quantized, quantizer.decode(indices))


def channel_first_cases(*shapes):
    for side in peers.SIDES:
        for shape in shapes:
            if side == "peer":
                yield peers.peer_fails(side, shape, reason="channel-first indices are not the ones it decodes")
            else:
                yield side, shape


@pytest.mark.parametrize("side,shape", list(channel_first_cases((3,), (4, 3), (2, 4, 5))))
@pytest.mark.parametrize("dim", [2, 4])
def test_channel_first_decode(side, shape, dim):
    quantizer = make(peers.residual_fsq, side, levels=[3, 5], num_quantizers=3, dim=dim, channels_first=True).eval()
    x = latents(2, dim, *shape)
    quantized, indices, _ = quantizer(x)
    assert indices.shape == (2, *shape, 3)
    torch.testing.assert_close(quantizer.decode(indices), quantized)


@BOTH
@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_channel_first_codes_match_channel_last_reference(side, dim, shape):
    settings = {"levels": [3, 5], "num_quantizers": 3, "dim": dim}
    first = make(peers.residual_fsq, side, channels_first=True, **settings).eval()
    last = make(peers.residual_fsq, side, **settings).eval()
    x = latents(2, dim, *shape)
    quantized, indices, _ = first(x)
    expected, expected_indices, _ = last(x.movedim(1, -1).flatten(1, -2))
    torch.testing.assert_close(quantized.movedim(1, -1).flatten(1, -2), expected)
    assert torch.equal(indices.flatten(1, -2), expected_indices)


@BOTH
@pytest.mark.parametrize("dim", [2, 4])
def test_channel_first_dropout_and_coarse_indices(side, dim):
    # Channel-last here: the peer's channel-first decoding is another test's subject.
    quantizer = make(peers.residual_fsq, side, levels=[3, 5], num_quantizers=3, dim=dim, quantize_dropout=True)
    seen = set()
    for _ in range(12):
        x = latents(2, 5, dim).requires_grad_()
        quantized, indices, _ = quantizer(x)
        kept = int((indices[0, 0] >= 0).sum())
        seen.add(kept)
        assert (indices[..., :kept] >= 0).all() and (indices[..., kept:] == -1).all()
        torch.testing.assert_close(quantizer.decode(indices), quantized)
        torch.testing.assert_close(quantizer.decode(indices[..., :kept]), quantized)
        quantized.square().mean().backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert seen == {1, 2, 3}


@BOTH
@pytest.mark.parametrize("levels", [[5, 5, 8], [5, 5, 5]])
@pytest.mark.parametrize("shape", [(64,), (6, 5), (3, 4, 5)])
def test_latent_q(side, levels, shape):
    quantizer = make(peers.latent_quantize, side, levels=levels, dim=16)
    x = latents(1, 16, *shape, scale=0.3)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, *shape, 1)
    torch.testing.assert_close(quantizer.decode(indices), quantized)


@BOTH
def test_latent_quantizer_multi_codebook(side):
    quantizer = make(peers.latent_quantize, side, levels=[5, 5, 8], dim=16, num_codebooks=4)
    x = latents(1, 16, 64, scale=0.3).requires_grad_()
    quantized, indices, loss = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 64, 4)
    torch.testing.assert_close(quantizer.decode(indices), quantized)
    (quantized.sum() + loss).backward()
    assert x.grad.isfinite().all()


# ---- finite scalar perturbation, where it rounds


@BOTH
def test_fsp_eval_roundtrip(side):
    quantizer = make(peers.fsp, side, levels=[8, 5, 5, 5]).eval()
    quantized, indices, _ = quantizer(latents(1, 256, 4))
    torch.testing.assert_close(quantized, quantizer.decode(indices), atol=1e-5, rtol=1e-5)


@BOTH
def test_fsp_index_encoding(side):
    fsp = peers.lucidrains.FSP(levels=[8, 5, 5, 5])
    pack = fsp.level_indices_to_indices if side == "peer" else lambda digits: pack_digits(digits, [8, 5, 5, 5])
    unpack = fsp.indices_to_level_indices if side == "peer" else lambda index: unpack_digits(index, [8, 5, 5, 5])
    for digits, index in ([7, 4, 4, 4], 999), ([0, 0, 0, 0], 0), ([1, 0, 0, 0], 1), ([3, 2, 1, 4], 859):
        packed = pack(torch.tensor([[digits]]))
        assert packed.item() == index and unpack(packed).tolist() == [[digits]]


@BOTH
def test_fsp_image_input(side):
    quantizer = make(peers.fsp, side, levels=[8, 5, 5, 5], dim=4, channels_first=True).eval()
    x = latents(2, 4, 8, 8)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == x.shape and indices.shape == (2, 8, 8, 1)
    torch.testing.assert_close(quantized, quantizer.decode(indices), atol=1e-5, rtol=1e-5)


@BOTH
def test_fsp_with_dim_projection(side):
    quantizer = make(peers.fsp, side, levels=[8, 5, 5, 5], dim=32).eval()
    quantized, indices, _ = quantizer(latents(1, 64, 32))
    torch.testing.assert_close(quantized, quantizer.decode(indices), atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_fsp_training(side, dtype):
    torch.manual_seed(0)
    quantizer = peers.fsp(side, levels=[8, 5, 5, 5], dim=16)
    before, after = torch.nn.Linear(16, 16).to(dtype), torch.nn.Linear(16, 16).to(dtype)
    quantizer.module.to(dtype)
    x = latents(2, 32, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        quantized, indices, loss = quantizer(before(x))
        out = after(quantized.to(dtype))
    assert indices.dtype in (torch.int32, torch.int64) and indices.min() >= 0 and indices.max() < 1000
    (out.float().sum() + loss.float()).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for parameter in quantizer.module.parameters():
        assert parameter.grad.isfinite().all()


# ---- side by side: the same weights and latents, the same numbers


def compare(peer, ours, x, *, mask=None, task=None, tolerance=1e-5):
    """Indices, outputs, losses and the gradients of loss and task of both sides; the peer has no loss in evaluation."""
    results = []
    for quantizer in (peer, ours):
        z = x.clone().requires_grad_()
        quantized, indices, loss = quantizer(z, mask)
        grads = []
        if quantizer.module.training and loss.requires_grad:
            grads.append(torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)[0])
        if task is not None:
            grads.append(torch.autograd.grad((quantized * task).sum(), z, retain_graph=True)[0])
        results.append((quantized.detach(), indices, loss.detach(), grads))
    (quantized, indices, loss, grads), (our_quantized, our_indices, our_loss, our_grads) = results
    assert torch.equal(our_indices, indices.to(torch.int64))
    assert_close(our_quantized, quantized, tolerance)
    if peer.module.training:
        assert_close(our_loss, loss, tolerance)
    for mine, theirs in zip(our_grads, grads, strict=True):
        if theirs is not None:
            assert_close(mine, theirs, tolerance)


VQ_SETTINGS = {
    "euclid": {},
    "cosine": {"use_cosine_sim": True},
    "rotation": {"rotation_trick": True},
    "cosine-rotation": {"use_cosine_sim": True, "rotation_trick": True},
    "heads-shared": {"heads": 2, "codebook_dim": 3},
    "heads-separate": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    "heads-cosine": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "projected": {"codebook_dim": 2},
}


@pytest.mark.parametrize("settings", VQ_SETTINGS.values(), ids=VQ_SETTINGS)
def test_vector_quantizers_agree_in_every_step_of_training(settings):
    torch.manual_seed(0)
    size = 48 if settings.get("heads") == 2 and not settings.get("separate_codebook_per_head") else 24
    peer, ours = peers.twins(peers.vector_quantize, dim=6, codebook_size=size, **settings)
    random_codes(peer, ours)
    for step in range(4):  # as many tokens as codes in a step: counts and shares are the same thing then
        compare(peer, ours, latents(2, 12, 6, seed=step), task=latents(2, 12, 6, seed=50 + step))
        ours.commit()
        for mine, theirs in zip(peers.tables(ours), peers.tables(peer), strict=True):
            assert_close(mine, theirs)
    compare(peer.eval(), ours.eval(), latents(2, 12, 6, seed=9))


@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_masked_averages_agree(use_cosine_sim):
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.vector_quantize, dim=6, codebook_size=24, use_cosine_sim=use_cosine_sim)
    random_codes(peer, ours)
    mask = (torch.arange(36) % 3 > 0).view(2, 18)  # 24 kept
    for step in range(3):
        x = latents(2, 18, 6, seed=step)
        (quantized, indices, _), (our_quantized, our_indices, _) = peer(x, mask), ours(x, mask)
        assert torch.equal(our_indices, indices)
        assert_close(our_quantized, quantized)
        ours.commit()
        assert_close(peers.tables(ours)[0], peers.tables(peer)[0])


def test_manual_ema_update():
    # The peer can be told to leave the update for later; ours always does, and the end is the same.
    torch.manual_seed(0)
    settings = {"dim": 8, "codebook_size": 20}
    at_once, ours = peers.twins(peers.vector_quantize, **settings)
    later = peers.vector_quantize("peer", **settings)
    later.module.load_state_dict(at_once.module.state_dict())
    x, mask = latents(1, 40, 8), torch.arange(40).unsqueeze(0) % 2 == 0
    before = peers.tables(ours)[0].clone()
    quantized, indices, _ = at_once(x, mask)
    later_quantized, later_indices, _ = later.module(x, mask=mask, ema_update=False)
    our_quantized, our_indices, _ = ours(x, mask)
    assert torch.equal(indices, our_indices) and torch.equal(indices[..., 0], later_indices)
    assert_close(our_quantized, quantized)
    assert torch.equal(peers.tables(ours)[0], before) and torch.equal(peers.tables(later)[0], before)
    later.module.update_ema_indices(x, later_indices, mask=mask)
    ours.commit()
    assert not torch.equal(peers.tables(ours)[0], before)
    assert_close(peers.tables(ours)[0], peers.tables(at_once)[0])
    assert_close(peers.tables(ours)[0], peers.tables(later)[0])


def test_learnable_codebooks_agree_but_for_the_value_of_the_loss():
    # The peer has one squared error without a stop-gradient: once its value, but the gradients of both our losses.
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.vector_quantize, dim=6, codebook_size=24, learnable_codebook=True)
    random_codes(peer, ours)
    found = []
    for quantizer in (peer, ours):
        x = latents(2, 12, 6).requires_grad_()
        _, indices, loss = quantizer(x)
        book = quantizer.module._codebook.embed if quantizer is peer else quantizer.module.codebook
        found.append((indices, loss, *torch.autograd.grad(loss, [x, book])))
    (indices, loss, to_x, to_book), (our_indices, our_loss, our_to_x, our_to_book) = found
    assert torch.equal(our_indices, indices)
    assert_close(our_loss, 2 * loss)
    assert_close(our_to_x, to_x, 1e-6)
    assert_close(our_to_book, to_book[0], 1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_cosine_sim": True}, {"groups": 2}], ids=["euclid", "cosine", "groups"])
def test_residual_quantizers_agree_but_for_the_task_gradient(settings):
    # The peer hands the task gradient on once per level (defect 4); ours once. Everything else is the same.
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.residual_vq, dim=6, codebook_size=24, num_quantizers=3, **settings)
    random_codes(peer, ours)
    task = latents(2, 12, 6, seed=50)
    for step in range(3):
        x = latents(2, 12, 6, seed=step)
        gradients = []
        for quantizer in (peer, ours):
            z = x.clone().requires_grad_()
            quantized, indices, loss = quantizer(z)
            of_loss, of_task = (
                torch.autograd.grad(v, z, retain_graph=True)[0] for v in (loss, (quantized * task).sum())
            )
            gradients.append((indices, quantized.detach(), loss.detach(), of_loss, of_task))
        theirs, mine = gradients
        assert torch.equal(mine[0], theirs[0])
        for own, other in zip(mine[1:4], theirs[1:4], strict=True):
            assert_close(own, other)
        assert_close(mine[4], task)
        if "use_cosine_sim" not in settings:  # there it also passes the normalisation of every residual
            assert_close(theirs[4], 3 * task)
        ours.commit()
        for own, other in zip(peers.tables(ours), peers.tables(peer), strict=True):
            assert_close(own, other)


def test_kmeans_of_as_many_tokens_as_codes_are_those_tokens():
    torch.manual_seed(0)
    x = latents(1, 16, 4)
    books = []
    for side in peers.SIDES:
        quantizer = peers.vector_quantize(side, dim=4, codebook_size=16, kmeans_init=True)
        quantizer(x)
        quantizer.commit()
        book = peers.tables(quantizer)[0]
        books.append(book[book[:, 0].argsort()])
    expected = x[0][x[0][:, 0].argsort()]
    assert_close(books[0], expected)
    assert_close(books[1], expected)


LFQ_SETTINGS = {
    "plain": {},
    "scaled": {"codebook_scale": 0.5},
    "spherical": {"spherical": True},
    "spherical-scaled": {"spherical": True, "codebook_scale": 2.0},
    "gamma": {"diversity_gamma": 2.5},
    "commitment": {"commitment_loss_weight": 0.25},
    "groups": {"num_codebooks": 2},
}


@pytest.mark.parametrize("settings", LFQ_SETTINGS.values(), ids=LFQ_SETTINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_lookup_free_quantizers_agree(settings, masked):
    # At temperature 1 no probability is below 1e-5, where the peer clamps its logarithm.
    dim = 6 * settings.get("num_codebooks", 1)
    peer, ours = peers.twins(peers.lfq, dim=dim, bits=6, inv_temperature=1.0, **settings)
    x = latents(3, 7, dim, scale=0.3)
    mask = (torch.arange(21) % 4 > 0).view(3, 7) if masked else None
    if not masked:
        compare(peer, ours, x, task=latents(3, 7, dim, seed=5))
        return
    # The peer sees the kept tokens alone: its own mask does not keep them apart (test_masked_lfq).
    z = x.clone().requires_grad_()
    _, indices, loss = peer(z[mask].unsqueeze(0))
    gradient = torch.autograd.grad(loss, z)[0]
    z = x.clone().requires_grad_()
    _, our_indices, our_loss = ours(z, mask)
    assert torch.equal(our_indices[mask], indices[0].to(torch.int64))
    assert_close(our_loss, loss)
    assert_close(torch.autograd.grad(our_loss, z)[0], gradient)


def test_lookup_free_entropies_agree_at_the_published_temperature():
    # Inverse temperature 100: the peer's clamp inside the logarithm makes the last digits.
    peer, ours = peers.twins(peers.lfq, dim=8, bits=8, inv_temperature=100.0)
    x = latents(2, 50, 8, scale=0.02)
    _, breakdown = peer.module(x, inv_temperature=100.0, return_loss_breakdown=True)
    statistics = ours.module(x).statistics
    assert_close(statistics["sample_entropy"], breakdown.per_sample_entropy.detach(), 2e-4)
    assert_close(statistics["batch_entropy"], breakdown.batch_entropy.detach(), 2e-4)


@pytest.mark.parametrize("settings", [{}, {"spherical": True}, {"commitment_loss_weight": 0.25}])
def test_residual_lookup_free_quantizers_agree_but_for_the_task_gradient(settings):
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.lfq, dim=4, bits=4, num_quantizers=3, **settings)
    x = latents(2, 6, 4, scale=0.5)
    quantized, indices, loss = peer(x)
    our_quantized, our_indices, our_loss = ours(x)
    assert torch.equal(our_indices, indices.to(torch.int64))
    assert_close(our_quantized, quantized)
    assert_close(our_loss, loss)


FSQ_LEVELS = [[8, 5, 5, 5], [8, 8, 8, 6, 5], [7, 5, 5, 5, 5], [3], [16, 15, 4]]


@pytest.mark.parametrize("levels", FSQ_LEVELS, ids=str)
@pytest.mark.parametrize("preserve_symmetry", [False, True])
def test_scalar_quantizers_agree(levels, preserve_symmetry):
    peer, ours = peers.twins(peers.fsq, levels=levels, preserve_symmetry=preserve_symmetry)
    x = latents(2, 500, len(levels), scale=2)
    compare(peer, ours, x, task=latents(2, 500, len(levels), seed=5), tolerance=1e-6)
    every = torch.arange(ours.module.codebook_sizes[0]).view(1, -1, 1)
    assert_close(ours.decode(every), peer.decode(every), 1e-6)


def test_scalar_quantizers_agree_in_groups_and_behind_projections():
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.fsq, levels=[8, 5, 5], num_codebooks=2)
    compare(peer, ours, latents(2, 40, 6), task=latents(2, 40, 6, seed=5), tolerance=1e-6)
    peer, ours = peers.twins(peers.fsq, levels=[8, 5, 5], dim=7)
    compare(peer, ours, latents(2, 40, 7), task=latents(2, 40, 7, seed=5), tolerance=1e-6)


@pytest.mark.parametrize("dim", [3, 5])
def test_residual_scalar_quantizers_agree(dim):
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.residual_fsq, levels=[5, 4, 3], num_quantizers=3, dim=dim)
    x = latents(2, 60, dim)
    quantized, indices, _ = peer(x)
    our_quantized, our_indices, _ = ours(x)
    assert torch.equal(our_indices, indices.to(torch.int64))
    assert_close(our_quantized, quantized)


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_fixed_latent_values_agree(num_codebooks):
    # The peer takes the nearest of evenly spaced values; so does symmetric, clamped FSQ of that size.
    peer, ours = peers.twins(
        peers.latent_quantize, levels=[5, 3], dim=2 * num_codebooks, num_codebooks=num_codebooks, optimize_values=False
    )
    x = latents(2, 2 * num_codebooks, 6, 5, scale=0.2).clamp(-0.49, 0.49)
    task = latents(2, 2 * num_codebooks, 6, 5, seed=5)
    found = []
    for quantizer in (peer, ours):
        z = x.clone().requires_grad_()
        quantized, indices, _ = quantizer(z)
        found.append((quantized, indices, torch.autograd.grad((quantized * task).sum(), z)[0]))
    assert torch.equal(found[1][1], found[0][1].to(torch.int64))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][2], found[0][2])


@pytest.mark.parametrize("transform", ["linear", "mlp"])
@pytest.mark.parametrize("rotation_trick", [False, True])
def test_transformed_codebooks_agree(transform, rotation_trick):
    torch.manual_seed(0)
    settings = {"dim": 6, "codebook_size": 40, "transform": transform, "rotation_trick": rotation_trick}
    peer, ours = peers.twins(peers.sim_vq, **settings)
    x = latents(2, 30, 6, scale=0.5)
    compare(peer, ours, x, task=latents(2, 30, 6, seed=5))
    weights = []
    for quantizer in (peer, ours):
        quantizer(x)[2].backward()
        weights.append([parameter.grad for parameter in quantizer.module.parameters()])
    for mine, theirs in zip(weights[1], weights[0], strict=True):
        assert_close(mine, theirs)
    torch.optim.SGD(peer.module.parameters(), 0.5).step()
    torch.optim.SGD(ours.module.parameters(), 0.5).step()
    compare(peer.eval(), ours.eval(), x)


def test_residual_transformed_codebooks_agree_but_for_the_task_gradient():
    torch.manual_seed(0)
    peer, ours = peers.twins(peers.sim_vq, dim=6, codebook_size=40, num_quantizers=3, rotation_trick=False)
    compare(peer, ours, latents(2, 30, 6))
