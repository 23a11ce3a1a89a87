"""TiTok and VQGAN keep the tokenizer contract; free compositions do too."""

import pytest
import torch
from torch import nn

from vistok import VQGAN, AutoencoderTokenizer, TailTokenDrop, TiTok, Tokens, VectorQuantizer
from vistok.decoders.cnn import CNNDecoder
from vistok.encoders.cnn import CNNEncoder
from vistok.layers.conv import Downsample
from vistok.layers.transformer import Attention
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.regularizers.base import Regularizer


def titok(image_size=(24, 16), num_latent_tokens=5, **kwargs):
    torch.manual_seed(0)
    arguments = {"patch_size": 8, "encoder_size": (32, 2, 2), "decoder_size": (48, 1, 3)} | kwargs
    return TiTok(VectorQuantizer(16, 4), image_size, num_latent_tokens=num_latent_tokens, **arguments).eval()


def vqgan(**kwargs):
    torch.manual_seed(0)
    arguments = {"channels": 32, "channel_multipliers": (1, 2, 1), "num_blocks": 1, "latent_channels": 16} | kwargs
    return VQGAN(VectorQuantizer(16, 4, l2_normalize=True), 16, **arguments).eval()


def images(height, width, batch=2, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


CASES = [
    pytest.param(lambda: titok(), (24, 16), id="titok"),
    pytest.param(lambda: titok(16, 1), (16, 16), id="titok-one-token"),
    pytest.param(lambda: vqgan(), (16, 16), id="vqgan"),
    pytest.param(lambda: vqgan(), (8, 28), id="vqgan-another-size"),
]


@pytest.mark.parametrize("make,size", CASES)
def test_decode_of_encode_equals_forward_bit_for_bit(make, size):
    tokenizer, x = make(), images(*size)
    output, tokens = tokenizer(x), tokenizer.encode(x)
    assert torch.equal(output.tokens.indices["image"], tokens.indices["image"])
    assert output.decoded.shape == x.shape
    assert torch.equal(tokenizer.decode(tokens, clamp=False), output.decoded)
    assert torch.equal(tokenizer.decode(tokens), output.decoded.clamp(0, 1))


@pytest.mark.parametrize("make,size", CASES)
def test_layout_describes_what_encode_writes(make, size):
    tokenizer = make()
    tokens = tokenizer.encode(images(*size))
    assert tokens.layout == tokenizer.layout(size)
    assert tokens.layout[0].length == tokens.indices["image"].shape[1]
    assert tokens.bits == tokens.layout[0].length * 4.0
    if isinstance(tokenizer, VQGAN):
        assert tokens.layout[0].grid == (size[0] // 4, size[1] // 4)


def test_tokens_survive_flattening():
    tokenizer, x = vqgan(), images(8, 28)
    tokens = tokenizer.encode(x)
    again = Tokens.unflatten(tokens.flatten(), tokens.layout)
    assert torch.equal(tokenizer.decode(again), tokenizer.decode(tokens))


def test_titok_decodes_a_prefix_with_the_first_positions():
    tokenizer = titok()
    tokens = tokenizer.encode(images(24, 16)).truncate(3)
    codes = tokenizer.quantizer.decode(tokens.indices["image"])
    padded = nn.functional.pad(codes, (0, 0, 0, 2))
    assert tokenizer.decode(tokens).shape == (2, 3, 24, 16)
    assert not torch.allclose(tokenizer.decode(tokens, clamp=False), tokenizer.decode_latents(padded))


@pytest.mark.parametrize("make,size", CASES)
def test_every_parameter_gets_a_gradient(make, size):
    tokenizer = make().train()
    output = tokenizer(images(*size))
    (output.decoded.square().mean() + sum(output.losses.values())).backward()
    missing = [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert not missing


def test_gradients_reach_the_encoder_through_the_codes():
    tokenizer = titok().train()
    tokenizer(images(24, 16)).decoded.sum().backward()
    assert tokenizer.encoder.patchify.weight.grad.abs().sum() > 0
    assert tokenizer.quantizer.codebook.grad is None


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match="24x16 pixels; got 16x24"):
        titok().encode(images(16, 24))
    with pytest.raises(ValueError, match="divisible by 4; got 18x16"):
        vqgan().encode(images(18, 16))
    with pytest.raises(TypeError, match="uint8"):
        vqgan().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got \(3, 16, 16\)"):
        vqgan().encode(images(16, 16)[0])
    with pytest.raises(ValueError, match=r"got \(1, 1, 16, 16\)"):
        vqgan().encode(torch.zeros(1, 1, 16, 16))


def test_wrong_tokens_are_named():
    tokenizer = vqgan()
    tokens = tokenizer.encode(images(16, 16))
    tokens.indices["image"][1, 2, 0] = 16
    with pytest.raises(ValueError, match="index 16 of image 1, token 2"):
        tokenizer.decode(tokens)
    other = VQGAN(VectorQuantizer(17, 4), 16, channels=32, channel_multipliers=(1, 1)).eval()
    with pytest.raises(ValueError, match=r"\(16,\) codes; this VQGAN has \(17,\)"):
        other.decode(tokenizer.encode(images(16, 16)))
    with pytest.raises(ValueError, match=r"grid decoder needs .* grid=None"):
        tokenizer.decode(tokenizer.encode(images(16, 16)).truncate(5))
    with pytest.raises(ValueError, match="1 to 5 tokens; got 16"):
        titok().decode(tokenizer.encode(images(16, 16)))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="multiples of 8 pixels; got 20x16"):
        titok(image_size=(20, 16))
    with pytest.raises(ValueError, match="unknown transformer size 'huge'"):
        titok(encoder_size="huge")
    with pytest.raises(ValueError, match="width must be a multiple of heads; got 32 and 3"):
        titok(encoder_size=(32, 1, 3))
    with pytest.raises(ValueError, match="multiple of 32 channels .* got 48"):
        vqgan(channels=48)


@pytest.mark.parametrize(
    "encoder,decoder,tokens,parameters",
    [("base", "large", 64, 390_016_148), ("base", "large", 128, 390_179_988), ("small", "large", 256, 330_260_884)],
)
def test_published_titok_sizes_have_the_published_parameter_counts(encoder, decoder, tokens, parameters):
    with torch.device("meta"):
        tokenizer = TiTok(
            VectorQuantizer(8192, 64), num_latent_tokens=tokens, encoder_size=encoder, decoder_size=decoder
        )
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters


def test_llamagen_vq16_has_its_published_size():
    with torch.device("meta"):
        tokenizer = VQGAN(VectorQuantizer(16384, 8, l2_normalize=True))
    assert tokenizer.layout()[0].grid == (16, 16)
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6) == 72


def test_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, x = Attention(24, 3).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data.normal_()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-12)


def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 2, 2] = 1
        down.conv.bias.zero_()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).flatten().tolist() == [10.0, 0.0, 0.0, 0.0]


class Scale(Regularizer):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, quantized, indices, mask):
        assert indices.shape[:2] == quantized.shape[:2]
        return self.factor * quantized, mask


def test_regularizers_act_in_training_only_and_in_order():
    tokenizer = vqgan(regularizers=[Scale(2.0), Scale(3.0)])
    x = images(16, 16)
    plain, trained = tokenizer(x), tokenizer.train()(x)
    assert torch.equal(trained.quantized, 6 * plain.quantized)
    assert torch.equal(trained.tokens.indices["image"], plain.tokens.indices["image"])
    assert tokenizer.config["init_args"]["regularizers"][1]["init_args"] == {"factor": 3.0}


def test_a_regularizer_sees_what_the_one_before_it_left():
    torch.manual_seed(0)
    x = images(24, 16, batch=64)
    once = titok(regularizers=[TailTokenDrop("sample")]).train()(x).mask.sum(1)
    twice = titok(regularizers=[TailTokenDrop("sample"), TailTokenDrop("sample")]).train()(x).mask.sum(1)
    assert twice.float().mean() < once.float().mean() - 0.3  # the smaller of two draws
    tokenizer = titok(regularizers=[TailTokenDrop("batch"), Scale(1.0), TailTokenDrop("sample")]).train()
    cuts = [tokenizer(x) for _ in range(5)]
    assert min(output.quantized.shape[1] for output in cuts) < 5
    assert all(output.mask.shape == output.quantized.shape[:2] for output in cuts)


def test_parts_of_other_dimensions_are_joined_by_projections():
    encoder, decoder = (
        CNNEncoder(32, (1, 1), 1, out_dim=8),
        CNNDecoder(32, (1, 1), 1, in_dim=6),
    )
    tokenizer = AutoencoderTokenizer(encoder, VectorQuantizer(16, 4), decoder, image_size=16).eval()
    assert tokenizer.to_quantizer.weight.shape == (4, 8) and tokenizer.from_quantizer.weight.shape == (6, 4)
    assert tokenizer(images(16, 16)).decoded.shape == (2, 3, 16, 16)
    tokenizer.bfloat16()
    assert tokenizer.decode(tokenizer.encode(images(16, 16))).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="image_size is needed"):
        AutoencoderTokenizer(encoder, VectorQuantizer(16, 4), decoder)


def test_images_are_mapped_to_the_range_of_the_parts_and_back():
    seen = {}
    tokenizer = vqgan()
    tokenizer.encoder.register_forward_pre_hook(lambda m, args: seen.update(low=args[0].min(), high=args[0].max()))
    tokenizer.decoder.register_forward_hook(lambda m, args, output: torch.full_like(output, -0.5))
    x = torch.cat([torch.zeros(1, 3, 16, 8), torch.ones(1, 3, 16, 8)], 3)
    decoded = tokenizer(x).decoded
    assert (seen["low"], seen["high"]) == (-1, 1) and torch.equal(decoded, torch.full_like(decoded, 0.25))


def pyramid():
    torch.manual_seed(0)
    return VQGAN(
        MultiScaleResidual(VectorQuantizer(16, 4), (1, 2, 4)),
        16,
        channels=32,
        channel_multipliers=(1, 2, 1),
        num_blocks=1,
        latent_channels=16,
    ).eval()


def test_every_scale_is_a_stream_and_the_first_ones_decode():
    tokenizer, x = pyramid(), images(16, 16)
    output, tokens = tokenizer(x), tokenizer.encode(x)
    assert [(stream.name, stream.grid) for stream in tokens.layout] == [
        ("scale_0", (1, 1)),
        ("scale_1", (2, 2)),
        ("scale_2", (4, 4)),
    ]
    assert tokens.layout == tokenizer.layout() and tokens.bits == 21 * 4
    assert torch.equal(tokenizer.decode(tokens, clamp=False), output.decoded)
    assert torch.equal(Tokens.unflatten(tokens.flatten(), tokens.layout).indices["scale_1"], tokens.indices["scale_1"])
    coarse = Tokens({name: tokens.indices[name] for name in ("scale_0", "scale_1")}, tokens.layout[:2])
    indices = torch.cat([coarse.indices["scale_0"], coarse.indices["scale_1"]], 1)
    expected = tokenizer.decode_latents(tokenizer.quantizer.decode(indices).flatten(1, 2), (4, 4))
    assert torch.equal(tokenizer.decode(coarse, clamp=False), expected)
    with pytest.raises(ValueError, match="'scale_0', 'scale_1', 'scale_2'; got one stream named 'scale_1'"):
        tokenizer.decode(Tokens({"scale_1": tokens.indices["scale_1"]}, tokens.layout[1:2]))


def test_an_image_that_does_not_fit_the_scales_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        pyramid().encode(images(16, 24))
