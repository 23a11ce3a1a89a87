"""TiTok through proxy codes: what the first stage predicts, and how the second one makes pixels of it."""

import pytest
import torch

import vistok
from vistok import TwoStageTiTok, VectorQuantizer
from vistok.decoders.maskgit import MaskGITDecoder
from vistok.decoders.proxy_code import ProxyCodeDecoder

CODES = 9


def stage(pixels):
    torch.manual_seed(0)
    pixel_decoder = MaskGITDecoder(32, (1, 1, 1, 1), 1, 16) if pixels else None
    sizes = ((32, 1, 2), (48, 1, 3))
    return TwoStageTiTok(
        VectorQuantizer(16, 4, l2_normalize=True),
        (24, 16),
        8,
        8,
        *sizes,
        num_proxy_codes=CODES,
        pixel_decoder=pixel_decoder,
    ).eval()


def test_decode_of_encode_equals_forward_bit_for_bit():
    tokenizer, images = stage(True), torch.rand(2, 3, 24, 16)
    output, tokens = tokenizer(images), tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(tokens, clamp=False), output.decoded)
    assert output.decoded.shape == images.shape
    assert (output.quantized.norm(dim=-1) - 1).abs().max() < 1e-6


def test_certain_predictions_decode_as_the_codes_do():
    decoder = stage(True).decoder
    with torch.no_grad():
        decoder.codebook.normal_()
    codes = torch.randint(CODES, (2, 6))
    certain = torch.nn.functional.one_hot(codes, CODES) * 1000.0
    assert torch.equal(decoder.mixture(certain), decoder.codebook[codes])
    even = decoder.mixture(torch.zeros(2, 6, CODES))
    assert torch.allclose(even, decoder.codebook.mean(0).expand(2, 6, -1), atol=1e-6)


def test_the_image_is_the_pixel_decoders_of_the_mixture():
    decoder, latents = stage(True).decoder, torch.randn(2, 8, 4)
    logits = decoder.logits(latents)
    assert logits.shape == (2, 6, CODES)
    codes = logits.softmax(-1) @ decoder.codebook
    assert torch.equal(decoder(latents), decoder.pixel_decoder(codes, (3, 2)))
    assert decoder.last_layer is decoder.pixel_decoder.conv_out.weight


def test_masked_tokens_do_not_count_for_the_logits():
    decoder, latents = stage(False).decoder, torch.randn(2, 8, 4)
    masked = decoder.logits(latents, mask=(torch.arange(8) < 3).expand(2, -1))
    assert (masked - decoder.logits(latents[:, :3])).abs().max() < 1e-5
    assert (masked - decoder.logits(latents)).abs().max() > 1e-3


def test_the_mixture_is_made_in_float32_under_autocast():
    decoder, logits = stage(True).decoder, 3 * torch.randn(2, 6, CODES)
    with torch.no_grad():
        decoder.codebook.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decoder.mixture(logits)
        assert decoder.logits(torch.randn(1, 8, 4)).dtype == torch.bfloat16
    assert mixed.dtype == torch.float32 and torch.equal(mixed, decoder.mixture(logits))


def test_every_parameter_of_the_second_stage_gets_a_gradient():
    tokenizer = stage(True).train()
    output = tokenizer(torch.rand(2, 3, 24, 16))
    (output.decoded.square().mean() + sum(output.losses.values())).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_first_stage_predicts_codes_and_decodes_nothing():
    tokenizer, images = stage(False), torch.rand(2, 3, 24, 16)
    output = tokenizer.bottleneck(images)
    assert tokenizer.decoder.logits(output.quantized).shape == (2, 6, CODES)
    assert tokenizer.decoder.last_layer is None and tokenizer.decoder.codebook is None
    for call in (lambda: tokenizer(images), lambda: tokenizer.decode(tokenizer.encode(images))):
        with pytest.raises(ValueError, match=r"first stage\): use logits"):
            call()


def test_the_first_stage_learns_to_predict_codes():
    tokenizer = stage(False).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)
    images, codes = torch.rand(4, 3, 24, 16), torch.randint(CODES, (4, 6))
    losses = []
    for _ in range(60):
        output = tokenizer.bottleneck(images)
        loss = torch.nn.functional.cross_entropy(
            tokenizer.decoder.logits(output.quantized).flatten(0, 1), codes.flatten()
        )
        optimizer.zero_grad()
        (loss + 0.25 * output.losses["commitment"] + output.losses["codebook"]).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_weights_of_the_first_stage_fit_into_the_second():
    first, second = stage(False), stage(True)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    missing, unexpected = second.load_state_dict(first.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("decoder.codebook", "decoder.pixel_decoder.")) for name in missing)
    latents = torch.randn(2, 8, 4)
    assert torch.equal(first.decoder.logits(latents), second.decoder.logits(latents))


@pytest.mark.parametrize("pixels", [False, True])
def test_both_stages_survive_saving_and_loading(pixels, tmp_path):
    tokenizer = stage(pixels)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert again.config == tokenizer.config
    images = torch.rand(2, 3, 24, 16)
    tokens = tokenizer.encode(images)
    assert torch.equal(again.encode(images).indices["image"], tokens.indices["image"])
    if pixels:
        assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


def test_a_codebook_without_codes_is_refused():
    with pytest.raises(ValueError, match="num_codes must be positive; got 0"):
        ProxyCodeDecoder(16, 8, 4, 4, (32, 1, 2), num_codes=0)
