"""The published sizes of the TiTok family, the layout of its latents, and tokens that are left out."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vistok import ContinuousTiTok, OneDPiece, TailTokenDrop, TATiTok, TiTok, Tokens, TwoStageTiTok, VectorQuantizer
from vistok.decoders.latent_vit import LatentViTDecoder
from vistok.decoders.maskgit import MaskGITDecoder
from vistok.encoders.latent_vit import LatentViTEncoder
from vistok.layers.transformer import Attention, Block

SIZES = {"S": "small", "B": "base", "L": "large"}


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(form, name, *args, **kwargs):
    """``BL-64``: encoder, decoder (the same if one letter), tokens."""
    letters, tokens = name.split("-")
    sizes = {"encoder_size": SIZES[letters[0]], "decoder_size": SIZES[letters[-1]]}
    with torch.device("meta"):
        return form(*(make() for make in args), num_latent_tokens=int(tokens), **sizes, **kwargs)


def codes():
    return VectorQuantizer(4096, 12, l2_normalize=True)


def many_codes():
    return VectorQuantizer(8192, 64)


@pytest.mark.parametrize(
    "form,name,encoder,decoder,total,trained,tensors",
    [
        (TwoStageTiTok, "S-128", 25_818_636, 27_000_832, 83_674_639, 57_741_315, 308),
        (TwoStageTiTok, "B-64", 85_904_652, 88_070_656, 204_814_095, 118_811_139, 404),
        (TwoStageTiTok, "L-32", 303_410_188, 306_822_144, 641_054_735, 337_562_627, 692),
        (OneDPiece, "S-256", 25_884_172, 27_066_368, 83_871_247, 57_806_851, 308),
        (OneDPiece, "B-256", 86_052_108, 88_218_112, 205_256_463, 118_958_595, 404),
        (OneDPiece, "L-256", 303_639_564, 307_051_520, 641_742_863, 337_792_003, 692),
    ],
)
def test_two_stage_models_have_the_published_parameter_counts(form, name, encoder, decoder, total, trained, tensors):
    with torch.device("meta"):
        pixel_decoder = MaskGITDecoder()
    model = on_meta(form, name, codes, pixel_decoder=pixel_decoder)
    # The published table counts the latent tokens with the model, not with its encoder.
    assert numel(model.encoder) - model.encoder.latent_tokens.numel() == encoder
    assert numel(model.decoder) == trained and numel(model) == total and len(model.state_dict()) == tensors
    assert numel(model.decoder) - numel(pixel_decoder) - model.decoder.codebook.numel() == decoder
    first = on_meta(form, name, codes)
    assert numel(first) == total - 30_478_339 - 262_144
    fresh = {key for key in model.state_dict() if key not in first.state_dict()}
    assert set(first.state_dict()) < set(model.state_dict())
    assert {key.split(".")[1] for key in fresh} == {"codebook", "pixel_decoder"}


@pytest.mark.parametrize(
    "name,total,tensors", [("BL-64", 390_016_148, 459), ("BL-128", 390_179_988, 459), ("SL-256", 330_260_884, 411)]
)
def test_single_stage_models_have_the_published_parameter_counts(name, total, tensors):
    model = on_meta(TiTok, name, many_codes)
    assert numel(model) == total and len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    "name,text_dim,total,tensors",
    [
        ("LL-32", None, 606_879_604, 602),
        ("BL-64", None, 389_418_100, 458),
        ("BL-128", None, 389_581_940, 458),
        ("BL-32", 768, 390_202_484, 461),
        ("BL-64", 768, 390_284_404, 461),
        ("SL-128", 768, 330_275_188, 413),
    ],
)
def test_continuous_models_have_the_published_parameter_counts(name, text_dim, total, tensors):
    model = on_meta(ContinuousTiTok, name, text_dim=text_dim)
    assert numel(model) == total and len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    "name,total,tensors", [("BL-32", 390_800_532, 462), ("BL-64", 390_882_452, 462), ("BL-128", 391_046_292, 462)]
)
def test_text_aware_models_have_the_published_parameter_counts(name, total, tensors):
    model = on_meta(TATiTok, name, many_codes)
    assert numel(model) == total and len(model.state_dict()) == tensors


def encoder(legacy_layout, tokens=4, width=12):
    torch.manual_seed(0)
    return LatentViTEncoder(8, 4, tokens, 5, (width, 1, 2), legacy_layout).eval()


def test_a_legacy_code_is_made_of_a_channel_group_of_all_tokens():
    model, images = encoder(True), torch.rand(2, 3, 8, 8)
    seen = []
    model.norm_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    latents = model(images)
    tokens = seen[0]  # (B, N, width)
    batch, number, width = tokens.shape
    groups = torch.empty(batch, number, width)
    for t in range(number):
        for d in range(width):
            groups[:, d % number, t * (width // number) + d // number] = tokens[:, t, d]
    assert torch.allclose(latents, model.out(groups), atol=1e-6)
    assert torch.allclose(encoder(False)(images), model.out(tokens), atol=1e-6)
    assert not torch.allclose(latents, model.out(tokens), atol=1e-2)


def test_the_legacy_layout_needs_a_width_that_the_tokens_share():
    with pytest.raises(ValueError, match="num_latent_tokens must divide 12; got 5"):
        encoder(True, tokens=5)
    assert encoder(False, tokens=5)(torch.rand(1, 3, 8, 8)).shape == (1, 5, 5)


def titok(**kwargs):
    torch.manual_seed(0)
    return TiTok(VectorQuantizer(16, 4), 16, 8, 6, (32, 2, 2), (48, 2, 3), **kwargs).eval()


def two_stage(**kwargs):
    torch.manual_seed(0)
    pixels = MaskGITDecoder(32, (1, 1, 1, 1), 1, 32)
    sizes = ((32, 2, 2), (48, 2, 3))
    return TwoStageTiTok(VectorQuantizer(16, 4), 16, 8, 8, *sizes, num_proxy_codes=9, pixel_decoder=pixels)


@pytest.mark.parametrize("make", [titok, two_stage])
def test_a_mask_decodes_as_each_prefix_alone(make):
    tokenizer = make().eval()
    length = tokenizer.layout()[0].length
    lengths = torch.tensor([1, length // 2, length])
    latents = torch.randn(3, length, 4)
    mask = torch.arange(length) < lengths[:, None]
    together = tokenizer.decode_latents(latents, mask=mask)
    for i, n in enumerate(lengths.tolist()):
        alone = tokenizer.decode_latents(latents[i : i + 1, :n])
        assert (together[i] - alone[0]).abs().max() < 1e-5 * max(1, alone.abs().max())
    assert (together[0] - tokenizer.decode_latents(latents)[0]).abs().max() > 1e-3


def test_what_a_masked_token_holds_does_not_matter():
    tokenizer, latents = titok(), torch.randn(2, 6, 4)
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, True, True]])
    other = torch.where(mask[..., None], latents, 100 * torch.randn(2, 6, 4))
    assert torch.equal(tokenizer.decode_latents(latents, mask=mask), tokenizer.decode_latents(other, mask=mask))
    assert not torch.equal(tokenizer.decode_latents(latents), tokenizer.decode_latents(other))


def test_tokens_of_different_lengths_decode_in_one_batch():
    tokenizer, images = titok(), torch.rand(3, 3, 16, 16)
    tokens = tokenizer.encode(images)
    keep = torch.arange(6) < torch.tensor([[2], [6], [3]])
    mixed = Tokens(tokens.indices, tokens.layout, {"image": keep})
    unmarked = Tokens({"image": mixed.indices["image"]}, tokens.layout)  # -1 says the same without a mask
    for form in (mixed, unmarked):
        decoded = tokenizer.decode(form, clamp=False)
        for i, n in enumerate([2, 6, 3]):
            alone = tokenizer.decode(tokens[i : i + 1].truncate(n), clamp=False)
            assert (decoded[i] - alone[0]).abs().max() < 1e-5
    everything = Tokens(tokens.indices, tokens.layout, {"image": torch.ones(3, 6, dtype=torch.bool)})
    assert torch.equal(tokenizer.decode(everything), tokenizer.decode(tokens))


def test_a_wrong_mask_is_named():
    decoder = LatentViTDecoder(16, 8, 6, 4, (32, 1, 2))
    with pytest.raises(ValueError, match=r"bool of shape \(B, N\) = \(2, 5\); got torch.bool of \(2, 6\)"):
        decoder(torch.zeros(2, 5, 4), mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="got torch.float32"):
        decoder(torch.zeros(2, 5, 4), mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"without text; got context of shape \(2, 1, 4\)"):
        decoder(torch.zeros(2, 5, 4), context=torch.zeros(2, 1, 4))


def test_masked_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, x = Attention(24, 3).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    mask = torch.rand(2, 7) > 0.4
    assert torch.allclose(ours(x, mask), theirs(x, x, x, key_padding_mask=~mask)[0], atol=1e-12)


@pytest.mark.parametrize("make", [titok, two_stage])
def test_patch_tokens_are_the_patches_of_a_layer_in_raster_order(make):
    tokenizer, images = make().eval(), torch.rand(1, 3, 16, 16)
    changed = images.clone()
    changed[..., 8:, :8] += 0.5  # the patch in the second row, first column
    for part, layer in ((tokenizer.encoder, tokenizer.encoder.patchify), (tokenizer.decoder, None)):
        assert part.patch_grid == (2, 2)
        hidden = torch.arange(40.0).view(1, 40, 1)
        assert part.patch_tokens(hidden).flatten().tolist() == [1, 2, 3, 4]
        if layer is not None:
            differs = (layer(changed) - layer(images)).abs().sum(1).flatten() > 0
            assert differs.tolist() == [False, False, True, False]


def test_patch_tokens_of_the_decoder_make_the_patches_of_the_image():
    """A change of one patch output of the last block changes that patch alone, up to the 3x3 convolution's reach."""
    tokenizer = titok()
    decoder, latents = tokenizer.decoder, torch.randn(1, 6, 4)
    plain = decoder(latents)

    def nudge(module, args, output):
        decoder.patch_tokens(output)[:, 2].add_(torch.randn(48))  # second row, first column
        return output

    assert isinstance(decoder.blocks[-1], Block)
    decoder.blocks[-1].register_forward_hook(nudge)
    with torch.no_grad():
        changed = (decoder(latents) - plain).abs().sum((0, 1)) > 1e-6
    assert changed[8:, :8].all() and not changed[:7].any() and not changed[:, 9:].any()


def with_text():
    return TATiTok(VectorQuantizer(16, 4), 16, 8, 6, (32, 1, 2), (32, 1, 2), [TailTokenDrop()], 5, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: titok(regularizers=[TailTokenDrop("sample", multiple_of=2)]),
        two_stage,
        with_text,
        lambda: ContinuousTiTok(4, 16, 8, 6, (32, 1, 2), (32, 1, 2)),
    ],
)
def test_a_training_step_never_reads_a_value_from_the_device(make):
    """Tensors without values: whatever reads one, or has a shape that depends on one, raises."""
    tokenizer = make().train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        text = torch.randn(2, 3, 5) if tokenizer.takes_context else None
        output = tokenizer(torch.rand(2, 3, 16, 16), context=text)
        loss = output.decoded.square().mean() + sum(output.losses.values())
        torch.autograd.grad(loss, list(tokenizer.parameters()))
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [titok, two_stage])
def test_a_tokenizer_cast_to_another_precision_works_on_any_images(make, dtype):
    tokenizer, images = make().eval().to(dtype), torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    assert tokenizer.decode(tokens).dtype == dtype
    assert torch.equal(tokenizer.decode(tokens, clamp=False), tokenizer(images).decoded)


def test_the_last_layer_is_the_weight_that_makes_the_pixels():
    tokenizer = titok()
    assert tokenizer.decoder.last_layer is tokenizer.decoder.conv_out.weight
    with torch.no_grad():
        tokenizer.decoder.last_layer.zero_()
        tokenizer.decoder.conv_out.bias.fill_(0.25)
    assert torch.equal(tokenizer(torch.rand(1, 3, 16, 16)).decoded, torch.full((1, 3, 16, 16), 0.25))
