"""One-D-Piece decodes every prefix of its sequence, and is trained to."""

import pytest
import torch

import vistok
from vistok import OneDPiece, TailTokenDrop, TiTok, TwoStageTiTok, VectorQuantizer
from vistok.decoders.cnn import CNNDecoder
from vistok.decoders.maskgit import MaskGITDecoder

N = 8


def model(**kwargs):
    torch.manual_seed(0)
    pixel_decoder = MaskGITDecoder(32, (1, 1, 1, 1), 1, 16)
    sizes = {"encoder_size": (32, 1, 2), "decoder_size": (32, 2, 2)}
    quantizer = VectorQuantizer(16, 4, l2_normalize=True)
    arguments = {"num_latent_tokens": N, "num_proxy_codes": 9, "pixel_decoder": pixel_decoder, **sizes} | kwargs
    return OneDPiece(quantizer, 16, 8, **arguments).eval()


def lengths_of(tokenizer, images, count):
    """Sequence lengths that the decoder's blocks see in training."""
    lengths = []
    hook = tokenizer.decoder.blocks[0].register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    tokenizer.train()
    for _ in range(count):
        tokenizer(images)
    hook.remove()
    tokenizer.eval()
    return lengths


def test_training_cuts_the_sequence_of_the_decoder():
    tokenizer, patches = model(), 4
    torch.manual_seed(0)
    lengths = lengths_of(tokenizer, torch.rand(2, 3, 16, 16), 60)
    assert set(lengths) == {1 + patches + k for k in range(1, N + 1)}


def test_the_encoder_and_the_tokens_are_never_cut():
    tokenizer, images = model(), torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    outputs = [tokenizer.train()(images) for _ in range(4)]
    assert len({output.quantized.shape[1] for output in outputs}) > 1
    for output in outputs:
        assert output.latents.shape[1] == N and output.tokens.indices["image"].shape[1] == N
        assert torch.equal(output.losses["commitment"], outputs[0].losses["commitment"])


@pytest.mark.parametrize("length", range(1, N + 1))
def test_every_prefix_decodes_with_the_first_positions(length):
    tokenizer, images = model(), torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens.truncate(length), clamp=False)
    codes = tokenizer.quantizer.decode(tokens.indices["image"])
    assert torch.equal(decoded, tokenizer.decode_latents(codes[:, :length]))
    with torch.no_grad():
        tokenizer.decoder.latent_position[length:] = float("nan")  # rows that a shorter sequence does not use
    assert torch.equal(tokenizer.decode(tokens.truncate(length), clamp=False), decoded)


def test_evaluation_decodes_everything():
    tokenizer, images = model(), torch.rand(2, 3, 16, 16)
    assert torch.equal(tokenizer(images).decoded, tokenizer.decode(tokenizer.encode(images), clamp=False))
    assert tokenizer(images).quantized.shape[1] == N


def test_the_regularizer_is_the_published_one_or_another():
    (drop,) = model().regularizers
    assert (drop.per, drop.min_tokens, drop.multiple_of) == ("batch", 1, 1)
    (drop,) = model(regularizers=[TailTokenDrop("sample", multiple_of=4)]).regularizers
    assert drop.per == "sample"
    assert len(model(regularizers=[]).regularizers) == 0


def test_who_is_of_variable_length_says_so():
    def titok(form, drops):
        with torch.device("meta"):
            return form(VectorQuantizer(16, 4), 16, 8, 4, (32, 1, 2), (32, 1, 2), drops)

    assert model().variable_length and model(regularizers=[]).variable_length
    assert titok(TiTok, [TailTokenDrop()]).variable_length and titok(TwoStageTiTok, [TailTokenDrop()]).variable_length
    assert not titok(TiTok, []).variable_length and not titok(TwoStageTiTok, ()).variable_length


def test_it_survives_saving_and_loading(tmp_path):
    tokenizer, images = model(), torch.rand(1, 3, 16, 16)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert isinstance(again, OneDPiece) and again.config == tokenizer.config and again.variable_length
    tokens = tokenizer.encode(images).truncate(3)
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


def test_decoders_of_whole_grids_refuse_what_was_left_out():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4)
    arguments = {"channels": 32, "channel_multipliers": (1, 1), "num_blocks": 1, "latent_channels": 16}
    tokenizer = vistok.VQGAN(quantizer, 16, regularizers=[TailTokenDrop("sample")], **arguments).train()
    assert isinstance(tokenizer.decoder, CNNDecoder)
    with pytest.raises(ValueError, match="CNNDecoder cannot leave tokens out"):
        tokenizer(torch.rand(2, 3, 16, 16))
    tokens = tokenizer.eval().encode(torch.rand(1, 3, 16, 16))
    tokens.indices["image"][0, 5] = -1
    with pytest.raises(ValueError, match="CNNDecoder cannot leave tokens out"):
        tokenizer.decode(tokens)
