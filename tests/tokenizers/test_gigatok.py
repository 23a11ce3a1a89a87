"""GigaTok: query pooling, where positions act, depth-to-space, adaptive norms, the published sizes, a gradient step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok import GigaTok, GigaTok2D, Tokens, VectorQuantizer
from vistok.decoders.adaptive_cnn import (
    AdaptiveCNNDecoder,
    AdaptiveGroupNorm,
    DepthToSpace,
    depth_to_space,
    latent_statistics,
)
from vistok.decoders.q_former import QFormerDecoder
from vistok.encoders.cnn import CNNEncoder
from vistok.encoders.latent_vit import LatentViTEncoder
from vistok.encoders.q_former import QFormerEncoder, pool_groups, query_grids
from vistok.layers.grid_vit import GridViT
from vistok.layers.layout import device_layout
from vistok.layers.q_former import (
    Q_FORMER_SIZES,
    PositionedCrossAttention,
    PositionedSelfAttention,
    QFormerBlock,
    init_q_former,
    q_former_size,
)
from vistok.losses.semantic import SemanticAlignment
from vistok.losses.teachers import Teacher


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(form=GigaTok, **options):
    torch.manual_seed(0)
    sizes = {"encoder_size": (32, 2, 2), "decoder_size": (48, 4, 3)} | options
    if form is GigaTok:
        sizes = {"num_latent_tokens": 16} | sizes
    quantizer = VectorQuantizer(32, 4, l2_normalize=True, estimator="rotation")
    return form(
        quantizer, 16, channels=32, channel_multipliers=(1, 1), num_blocks=1, latent_channels=24, **sizes
    ).eval()


def draws(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ---- sizes


@pytest.mark.parametrize(
    ("encoder", "decoder", "vit_encoder", "vit_decoder", "head", "total"),
    [
        ("small", "small", 26_013_440, 26_799_360, 6_820_608, 136_073_227),
        ("small", "base", 26_013_440, 115_783_680, 14_162_688, 232_399_627),
        ("base", "large", 114_801_408, 406_269_696, 24_126_208, 621_637_131),
        ("xl", "xxl", 947_548_928, 1_818_064_128, 51_917_568, 2_893_970_443),
    ],
)
def test_published_parameter_counts(encoder, decoder, vit_encoder, vit_decoder, head, total):
    """The published totals hold the head that is aligned with DINOv2, here a part of the loss."""

    class DINOWidth(Teacher):
        dim, grid = 768, (16, 16)

        def forward(self, images):
            raise NotImplementedError

        def fingerprint(self):
            return {}

    with torch.device("meta"):
        model = GigaTok(VectorQuantizer(16384, 8, True), encoder_size=encoder, decoder_size=decoder)
        alignment = SemanticAlignment(DINOWidth())
        alignment.attach(model)
    cnn_encoder, cnn_decoder = model.encoder.grid_encoder, model.decoder.grid_decoder
    assert (numel(cnn_encoder), numel(cnn_decoder)) == (26_143_232, 50_161_155)
    assert numel(model.encoder) - numel(cnn_encoder) == vit_encoder
    assert numel(model.decoder) - numel(cnn_decoder) == vit_decoder
    assert numel(model.quantizer) == 131_072 and numel(model.to_quantizer) + numel(model.from_quantizer) == 4_360
    assert numel(alignment.projector) == head and numel(model) + head == total


@pytest.mark.parametrize(
    ("encoder", "decoder", "reads_input", "vit_encoder", "vit_decoder", "total"),
    [
        ("small", "small", True, 25_619_712, 26_668_288, 128_727_819),
        ("small", "base", False, 19_309_824, 87_220_224, 182_969_867),
        ("base", "large", False, 85_647_360, 305_196_800, 467_283_979),
    ],
)
def test_parameter_counts_of_the_2d_form(encoder, decoder, reads_input, vit_encoder, vit_decoder, total):
    with torch.device("meta"):
        quantizer = VectorQuantizer(16384, 8, True)
        model = GigaTok2D(quantizer, encoder_size=encoder, decoder_size=decoder, reads_input=reads_input)
    assert numel(model.encoder) - numel(model.encoder.grid_encoder) == vit_encoder
    assert numel(model.decoder) - numel(model.decoder.grid_decoder) == vit_decoder
    assert numel(model) == total


def test_sizes_are_named_or_given():
    assert q_former_size("small") == (512, 6, 8) and q_former_size([32, 1, 2]) == (32, 1, 2)
    assert Q_FORMER_SIZES["xxl"] == (1536, 48, 24)
    with pytest.raises(ValueError, match="unknown Q-Former size 'huge'; accepted: tiny, small"):
        q_former_size("huge")
    with pytest.raises(ValueError, match="multiple of heads; got 32 and 3"):
        QFormerBlock(32, 3)


# ---- queries of the encoder


def test_queries_lie_on_grids_that_double():
    grids = query_grids(256)
    assert grids == ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16))
    assert [h * w for h, w in grids] == [1, 1, 2, 4, 8, 16, 32, 64, 128] and query_grids(1) == ((1, 1),)
    with pytest.raises(ValueError, match="power of two, to halve regions; got 96"):
        query_grids(96)


def test_pooling_is_average_pooling_of_every_group():
    (features,) = draws((2, 16 * 16, 5))
    pooled = pool_groups(features, (16, 16), query_grids(256))
    maps = features.transpose(1, 2).unflatten(2, (16, 16))
    expected = [F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2) for grid in query_grids(256)]
    torch.testing.assert_close(pooled, torch.cat(expected, 1))
    for group in pooled.split([1, 1, 2, 4, 8, 16, 32, 64, 128], 1):
        torch.testing.assert_close(group.mean(1), features.mean(1))


def test_pooling_of_a_wide_grid_keeps_rows_and_columns_apart():
    features = torch.arange(4 * 8, dtype=torch.float32).view(1, 32, 1)
    halves = features.view(4, 2, 4).mean((0, 2))  # left and right
    assert torch.equal(pool_groups(features, (4, 8), ((1, 2),)).flatten(), halves)


@torch.no_grad()
def test_a_constant_image_makes_all_queries_equal():
    encoder = small().encoder
    memory = torch.ones(1, 64, 1) * draws((2, 1, 32))[0]
    queries = encoder.queries(memory)
    assert queries.shape == (2, 16, 32)
    torch.testing.assert_close(queries, queries[:, :1].expand_as(queries))
    torch.testing.assert_close(queries[:, 0], encoder.to_queries(memory[:, 0]))


def test_an_encoder_that_cannot_pool_is_refused():
    grid_encoder = CNNEncoder(32, (1, 1), 1, 24)
    with pytest.raises(ValueError, match="queries on grids up to 8x16, which must divide the 8x8 features"):
        QFormerEncoder(grid_encoder, 16, 256)
    with pytest.raises(ValueError, match="LatentViTEncoder gives none"):
        QFormerEncoder(LatentViTEncoder(16, 8, 4, 8, (32, 1, 2)), 16, 16)


# ---- where positions act


class Reference(nn.Module):
    """The layer with torch's own attention, positions added before it."""

    def __init__(self, block, width, heads):
        super().__init__()
        self.block = block
        self.itself = nn.MultiheadAttention(width, heads, batch_first=True)
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        own, other = block.self_attention, block.cross_attention
        pairs = (
            (self.itself, own.qkv.weight, own.qkv.bias, own.out),
            (
                self.across,
                torch.cat([other.q.weight, other.kv.weight]),
                torch.cat([other.q.bias, other.kv.bias]),
                other.out,
            ),
        )
        with torch.no_grad():
            for attention, weight, bias, out in pairs:
                attention.in_proj_weight.copy_(weight), attention.in_proj_bias.copy_(bias)
                attention.out_proj.load_state_dict(out.state_dict())

    def forward(self, x, memory, position, memory_position, mask=None):
        y = self.block.norm1(x)
        x = x + self.itself(y + position, y + position, y)[0]
        query, ignored = self.block.norm2(x) + position, None if mask is None else ~mask
        x = x + self.across(query, memory + memory_position, memory, key_padding_mask=ignored)[0]
        return x + self.block.mlp(self.block.norm3(x))


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_equals_detr_with_torchs_attention(masked):
    torch.manual_seed(0)
    block = QFormerBlock(24, 3).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    reference = Reference(block, 24, 3)
    x, memory, position, memory_position = draws((2, 5, 24), (2, 7, 24), (5, 24), (7, 24))
    mask = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [True]]) if masked else None
    x.requires_grad_(), memory.requires_grad_(), position.requires_grad_(), memory_position.requires_grad_()
    arguments = (x, memory, position, memory_position)
    own, expected = block(*arguments, mask), reference(*arguments, mask)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(own)
    for got, wanted in zip(
        torch.autograd.grad((own * weights).sum(), arguments),
        torch.autograd.grad((expected * weights).sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_positions_never_reach_values():
    """With one place to look at, attention returns its value whatever the positions are."""
    x, memory, position, other = draws((2, 1, 24), (2, 1, 24), (1, 24), (1, 24))
    itself, across = PositionedSelfAttention(24, 3), PositionedCrossAttention(24, 3)
    torch.testing.assert_close(itself(x, position), itself(x, other))
    torch.testing.assert_close(across(x, memory, position, other), across(x, memory, other, position))
    assert not torch.allclose(itself(x, position), itself(x + position, other))


@torch.no_grad()
def test_decoder_queries_start_alike_and_only_positions_tell_them_apart():
    decoder = small().decoder
    (latents,) = draws((2, 16, 24))
    seen = []
    decoder.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    decoder.blocks[-1].register_forward_hook(lambda m, args, output: seen.append(output))
    decoder(latents)
    start, end = seen
    embedded = decoder.embed(decoder.norm_in(latents))
    assert start.shape == (2, 64, 48) and torch.equal(start, embedded[:, :1].expand(-1, 64, -1))
    assert (end - end[:, :1]).abs().max() > 1e-2
    decoder.position.copy_(decoder.position[:1].expand(64, -1))
    decoder(latents)
    torch.testing.assert_close(seen[3], seen[3][:, :1].expand(-1, 64, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads_input", [False, True])
@torch.no_grad()
def test_the_2d_layers_read_positions_once_or_in_every_layer(reads_input):
    torch.manual_seed(0)
    vit = GridViT(24, 5, (24, 2, 3), reads_input)
    (features,) = draws((2, 5, 24))
    x = vit.embed(vit.norm_in(features))
    for block in vit.blocks:
        if reads_input:
            x = Reference(block, 24, 3)(x, x, vit.position, vit.position)
        else:
            x = block(x + vit.position if block is vit.blocks[0] else x)
    torch.testing.assert_close(vit(features), vit.norm_out(x), rtol=1e-4, atol=1e-5)


# ---- the convolutional decoder


def test_depth_to_space_puts_channels_last_blocks_side_by_side():
    x = torch.arange(2 * 12 * 3 * 5, dtype=torch.float32).view(2, 12, 3, 5)
    y = depth_to_space(x)
    assert y.shape == (2, 3, 6, 10) and y.is_contiguous(memory_format=device_layout(y.device))
    for dy in (0, 1):
        for dx in (0, 1):
            assert torch.equal(y[:, :, dy::2, dx::2], x[:, (2 * dy + dx) * 3 :][:, :3])
    assert not torch.equal(y, F.pixel_shuffle(x, 2))
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(depth_to_space(channels_last), y)
    layer = DepthToSpace(8)
    assert layer.conv.out_channels == 32 and layer(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 8, 8)


@torch.no_grad()
def test_adaptive_norm_scales_by_std_and_shifts_by_mean():
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(6, 64)
    x, latents = draws((2, 64, 5, 5), (2, 9, 6))
    std = ((latents - latents.mean(1, keepdim=True)).square().sum(1) / 8 + 1e-6).sqrt()
    groups = x.view(2, 32, 2 * 25)
    centred = groups - groups.mean(2, keepdim=True)
    plain = (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()).view_as(x)
    expected = plain * norm.scale(std)[..., None, None] + norm.shift(latents.mean(1))[..., None, None]
    torch.testing.assert_close(norm(x, *latent_statistics(latents)), expected, rtol=1e-4, atol=1e-5)
    assert norm(x.bfloat16(), std, latents.mean(1)).dtype == torch.bfloat16, "the residual stream stays narrow"
    constant = torch.full((2, 9, 6), 0.7)
    std, mean = latent_statistics(constant)
    torch.testing.assert_close(std, torch.full((2, 6), 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, torch.full((2, 6), 0.7))
    assert {name for name, _ in norm.named_parameters()} == {
        f"{part}.{kind}" for part in ("scale", "shift") for kind in ("weight", "bias")
    }


def test_statistics_are_precise_in_low_precision():
    (latents,) = draws((1, 256, 4))
    latents = latents + 30
    std, mean = latent_statistics(latents.bfloat16())
    assert std.dtype == mean.dtype == torch.bfloat16
    torch.testing.assert_close(std.float(), latents.bfloat16().float().std(1), rtol=1e-2, atol=0)
    assert latent_statistics(latents.double())[0].dtype == torch.float64
    with pytest.raises(ValueError, match="at least two latents"):
        latent_statistics(latents[:, :1])


@torch.no_grad()
def test_every_level_begins_with_its_norm():
    torch.manual_seed(0)
    decoder = AdaptiveCNNDecoder(32, (1, 2), 1, 6)
    (latents,) = draws((1, 16, 6))
    assert [norm.scale.out_features for norm in decoder.adaptive] == [64, 64]
    order = []
    for name, part in (*decoder.adaptive.named_children(), *decoder.levels.named_children()):
        part.register_forward_hook(lambda m, args, output, name=name: order.append(type(m).__name__ + name))
    assert decoder(latents, (4, 4)).shape == (1, 3, 8, 8)
    assert order == ["AdaptiveGroupNorm0", "Level0", "AdaptiveGroupNorm1", "Level1"]
    assert decoder.last_layer is decoder.conv_out.weight
    with pytest.raises(ValueError, match="multiple of 32 channels"):
        AdaptiveCNNDecoder(16, (1,), 1, 6)


# ---- the whole


@pytest.mark.parametrize("form", [GigaTok, GigaTok2D])
@torch.no_grad()
def test_tokens_go_there_and_back(form):
    model, images = small(form), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = model.encode(images)
    assert tokens.indices["image"].shape == (2, 16 if form is GigaTok else 64, 1)
    assert tokens.layout[0].grid == (None if form is GigaTok else (8, 8))
    decoded = model.decode(tokens, clamp=False)
    assert decoded.shape == images.shape and torch.equal(decoded, model(images).decoded)
    assert model.decoder.last_layer is model.decoder.grid_decoder.conv_out.weight
    with pytest.raises(ValueError, match="32x32|32, 32"):
        model.encode(torch.rand(1, 3, 32, 32))


def test_the_pixel_range_inside_is_minus_one_to_one():
    model, seen = small(), []
    model.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.encode(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    assert seen[0][0].unique().tolist() == [-1] and seen[0][1].unique().tolist() == [1]


@pytest.mark.parametrize("form", [GigaTok, GigaTok2D])
def test_every_parameter_gets_a_gradient(form):
    model = small(form).train()
    output = model(torch.rand(2, 3, 16, 16))
    (output.decoded.square().mean() + sum(output.losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_alignment_reaches_the_encoder_through_the_first_decoder_layers_only():
    class Patches(Teacher):
        dim, grid = 12, (8, 8)

        def forward(self, images):
            return F.unfold(images, 2, stride=2).transpose(1, 2)

        def fingerprint(self):
            return {}

    model = small().train()
    alignment = SemanticAlignment(Patches(), "decoder.blocks.2", precision="float32")
    alignment.attach(model)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model(images)
    loss = alignment(images)
    assert -1 <= loss <= 1
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("encoder.grid_encoder.conv_in.weight", "encoder.to_queries.weight", "decoder.blocks.2.mlp.2.weight"):
        assert part in reached
    deeper = ("decoder.blocks.3.", "decoder.norm_out.", "decoder.out.", "decoder.grid_decoder.")
    assert not [name for name in reached if name.startswith(deeper)]
    assert alignment.projector[0].in_features == 48


@torch.no_grad()
def test_a_prefix_is_decoded_and_a_mask_of_it_means_the_same():
    model, images = small(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = model.encode(images)
    prefix = model.decode(tokens.truncate(5), clamp=False)
    keep = (torch.arange(16) < 5).expand(2, -1)
    masked = model.decode(Tokens(tokens.indices, tokens.layout, {"image": keep}), clamp=False)
    torch.testing.assert_close(masked, prefix, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prefix, model.decode(tokens, clamp=False), atol=1e-4)


@torch.no_grad()
def test_nothing_of_a_dropped_token_is_seen():
    decoder = small().decoder
    latents, other = draws((2, 16, 24), (2, 16, 24))
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0] = False
    changed = torch.where(mask[..., None], latents, other)
    assert torch.equal(decoder(latents, mask=mask), decoder(changed, mask=mask))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(B, N\) = \(2, 16\)"):
        decoder(latents, mask=mask[:, :3])
    with pytest.raises(ValueError, match="takes 1 to 16 tokens; got 17"):
        decoder(torch.zeros(1, 17, 24))


def test_the_2d_decoder_refuses_another_grid():
    with pytest.raises(ValueError, match=r"on a grid of \(8, 8\); got grid=\(4, 16\)"):
        small(GigaTok2D).decoder(torch.zeros(1, 64, 24), (4, 16))


def test_weights_start_as_published():
    torch.manual_seed(0)
    decoder = QFormerDecoder(AdaptiveCNNDecoder(32, (1, 1), 1, 24), (4, 4), 16, 24, (512, 1, 8))
    block = decoder.blocks[0]
    bound = (6 / (4 * 512)) ** 0.5
    for weight in (block.self_attention.qkv.weight, block.cross_attention.q.weight, block.cross_attention.kv.weight):
        assert weight.abs().max() <= bound and abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.02
    others = [block.mlp[0].weight, block.cross_attention.out.weight, decoder.out.weight]
    others += [decoder.grid_decoder.conv_in.weight, decoder.grid_decoder.levels[0].resample.conv.weight]
    assert all(abs(weight.std().item() / 0.02 - 1) < 0.1 for weight in others)
    assert abs(decoder.position.std().item() * 512**0.5 - 1) < 0.05
    assert not any(layer.bias.any() for layer in decoder.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    narrow = QFormerBlock(64, 2)
    init_q_former(narrow, 64)
    assert abs(narrow.cross_attention.q.weight.std().item() * 8 / 1.6 - 1) < 0.05
    assert narrow.cross_attention.kv.weight[64:].abs().max() <= (6 / (4 * 64)) ** 0.5


def test_bfloat16_stays_close_to_float32():
    model, images = small(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = model.from_quantizer(model.quantizer.decode(model.encode(images).indices["image"]))
        expected = model.decoder(latents)
        with torch.autocast("cpu", torch.bfloat16):
            got = model.decoder(latents)
        low = small().to(torch.bfloat16)(images).decoded
    assert got.dtype == torch.bfloat16 and low.dtype == torch.bfloat16 and torch.isfinite(low).all()
    assert (got.float() - expected).std() < 0.1 * expected.std()
