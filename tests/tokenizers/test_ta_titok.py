"""TA-TiTok's decoder reads text features behind the latents; its encoder reads the image alone."""

import pytest
import torch

import vistok
from vistok import ContinuousTiTok, TATiTok, TiTok, VectorQuantizer
from vistok.decoders.latent_vit import LatentViTDecoder

SIZES = ((32, 1, 2), (32, 2, 2))


def model():
    torch.manual_seed(0)
    return TATiTok(VectorQuantizer(16, 4), 16, 8, 6, *SIZES, text_dim=5, text_length=3).eval()


def test_decode_of_encode_equals_forward_bit_for_bit():
    tokenizer, images, text = model(), torch.rand(2, 3, 16, 16), torch.randn(2, 3, 5)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(tokens, clamp=False, context=text), tokenizer(images, context=text).decoded)


def test_text_changes_the_image_and_not_the_tokens():
    tokenizer, images, text = model(), torch.rand(2, 3, 16, 16), torch.randn(2, 3, 5)
    other = text.clone()
    other[1] = torch.randn(3, 5)
    a, b = tokenizer(images, context=text), tokenizer(images, context=other)
    assert torch.equal(a.tokens.indices["image"], b.tokens.indices["image"])
    changed = (a.decoded - b.decoded).abs().amax((1, 2, 3))
    assert changed[0] == 0 and changed[1] > 1e-3


def test_text_stands_behind_the_latents_with_positions_of_its_own():
    decoder, seen = model().decoder, []
    decoder.norm_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents, text = torch.randn(2, 4, 4), torch.randn(2, 3, 5)
    decoder(latents, context=text)
    assert seen[0].shape == (2, 1 + 4 + 4 + 3, 32)
    assert torch.equal(seen[0][:, -3:], decoder.embed_text(text) + decoder.text_position)
    assert torch.equal(seen[0][:, 5:9], decoder.embed(latents) + decoder.latent_position[:4])


def test_a_mask_leaves_latents_out_and_never_text():
    tokenizer, latents, text = model(), torch.randn(2, 6, 4), torch.randn(2, 3, 5)
    mask = (torch.arange(6) < 2).expand(2, -1)
    masked = tokenizer.decode_latents(latents, mask=mask, context=text)
    assert (masked - tokenizer.decode_latents(latents[:, :2], context=text)).abs().max() < 1e-5
    assert (masked - tokenizer.decode_latents(latents, mask=mask, context=-text)).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient():
    tokenizer = model().train()
    output = tokenizer(torch.rand(2, 3, 16, 16), context=torch.randn(2, 3, 5))
    (output.decoded.square().mean() + sum(output.losses.values())).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None]


def test_missing_superfluous_and_misshapen_text_is_named():
    tokenizer, images = model(), torch.rand(2, 3, 16, 16)
    assert tokenizer.takes_context
    for call in (lambda: tokenizer(images), lambda: tokenizer.decode(tokenizer.encode(images))):
        with pytest.raises(ValueError, match="LatentViTDecoder needs context"):
            call()
    with pytest.raises(ValueError, match=r"\(B, T, C\) = \(2, 3, 5\); got \(2, 4, 5\)"):
        tokenizer(images, context=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"\(2, 3, 5\); got None"):
        tokenizer.decoder(torch.zeros(2, 6, 4))
    plain = TiTok(VectorQuantizer(16, 4), 16, 8, 6, *SIZES)
    assert not plain.takes_context
    with pytest.raises(ValueError, match=r"takes no context; got features of shape \(2, 3, 5\)"):
        plain(images, context=torch.zeros(2, 3, 5))


def test_the_decoder_starts_as_the_one_without_text():
    torch.manual_seed(3)
    decoder = LatentViTDecoder(16, 8, 6, 4, (512, 1, 8), text_dim=768)
    assert abs(decoder.embed_text.weight.std() - 0.02) < 1e-3 and not decoder.embed_text.bias.any()
    assert abs(decoder.text_position.std() - 512**-0.5) < 2e-3
    assert decoder.text_position.shape == (77, 512)


@pytest.mark.parametrize("make", [model, lambda: ContinuousTiTok(4, 16, 8, 6, *SIZES, text_dim=5, text_length=3)])
def test_it_survives_saving_and_loading(make, tmp_path):
    tokenizer, images, text = make().eval(), torch.rand(1, 3, 16, 16), torch.randn(1, 3, 5)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert again.config == tokenizer.config and again.takes_context
    assert torch.equal(again(images, context=text).decoded, tokenizer(images, context=text).decoded)
