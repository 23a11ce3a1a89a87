"""Ways to a reconstruction: what a tokenizer, a prefix, a file make of uint8 images, and what that costs."""

import pytest
import torch

from vistok import ContinuousTiTok, TailTokenDrop, TiTok, VectorQuantizer
from vistok.eval.metric import Originals
from vistok.eval.variants import (
    Codes,
    GivenVariant,
    OriginalsVariant,
    TokenizerVariant,
    quantize_pixels,
    token_bits,
)
from vistok.tokenizers.base import Stream, Tokens

SIZES = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}


def tokenizer_of_prefixes():
    torch.manual_seed(0)
    return TiTok(VectorQuantizer(16, 4), 16, 8, 4, regularizers=[TailTokenDrop()], **SIZES).eval()


def originals(number=3, targets=None):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, 16, 16), generator=draws, dtype=torch.uint8)
    return Originals(torch.arange(number), [str(i) for i in range(number)], torch.zeros(number), images, targets)


def test_all_tokens_give_what_encoding_and_decoding_by_hand_give():
    tokenizer, batch = tokenizer_of_prefixes(), originals()
    pairs = TokenizerVariant(Codes(tokenizer)).reconstruct(batch)
    tokens = tokenizer.encode(batch.images / 255)
    assert torch.equal(pairs.reconstructions, (tokenizer.decode(tokens) * 255).round().byte())
    assert torch.equal(pairs.tokens.indices["image"], tokens.indices["image"])
    assert pairs.bits.tolist() == [16.0] * 3 and pairs.bits.dtype == torch.float64


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_prefix_costs_and_gives_what_its_tokens_do(length):
    tokenizer, batch = tokenizer_of_prefixes(), originals()
    variant = TokenizerVariant(Codes(tokenizer), length)
    assert (variant.name, variant.kind, variant.settings) == (f"length={length}", "length", {"num_tokens": length})
    pairs = variant.reconstruct(batch)
    decoded = tokenizer.decode(tokenizer.encode(batch.images / 255).truncate(length))
    assert torch.equal(pairs.reconstructions, (decoded * 255).round().byte())
    assert pairs.bits.tolist() == [4.0 * length] * 3 and pairs.tokens.layout[0].length == length


def test_all_variants_of_a_batch_share_one_encoding(monkeypatch):
    tokenizer, calls = tokenizer_of_prefixes(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: calls.append(len(images)) or encode(images))
    codes, batch = Codes(tokenizer), originals()
    for length in (None, 1, 2):
        TokenizerVariant(codes, length).reconstruct(batch)
    assert calls == [3]
    TokenizerVariant(codes).reconstruct(originals(2))
    assert calls == [3, 2]


def test_a_tokenizer_without_tokens_is_run_forward():
    torch.manual_seed(0)
    tokenizer, batch = ContinuousTiTok(4, 16, 8, 6, (32, 1, 2), (32, 1, 2)).eval(), originals()
    codes = Codes(tokenizer)
    pairs = TokenizerVariant(codes).reconstruct(batch)
    expected = (tokenizer(batch.images / 255).decoded.clamp(0, 1) * 255).round().byte()
    assert torch.equal(pairs.reconstructions, expected) and torch.equal(codes.reconstruct(batch.images), expected)
    assert pairs.tokens is None and pairs.bits is None


def test_images_go_through_the_tokens_where_there_are_any():
    tokenizer, batch = tokenizer_of_prefixes(), originals()
    pairs = TokenizerVariant(Codes(tokenizer)).reconstruct(batch)
    assert torch.equal(Codes(tokenizer).reconstruct(batch.images), pairs.reconstructions)


def test_nothing_of_a_reconstruction_has_a_gradient():
    tokenizer = tokenizer_of_prefixes()
    seen = []
    tokenizer.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert Codes(tokenizer).run(lambda pixels: tokenizer(pixels).decoded, originals().images).requires_grad is False
    assert seen == [False]


def test_mixed_precision_is_for_the_tokenizer_alone():
    tokenizer, seen = tokenizer_of_prefixes(), []
    layer = next(module for module in tokenizer.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for autocast, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        pairs = TokenizerVariant(Codes(tokenizer, autocast=autocast)).reconstruct(originals())
        assert set(seen) == {dtype} and pairs.reconstructions.dtype == torch.uint8
        del seen[:]
    assert torch.get_autocast_dtype("cpu") and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("rounding", "levels"),
    [("nearest", [0, 0, 1, 128, 254, 255, 255]), ("half_up", [0, 1, 1, 128, 254, 255, 255]),
     ("truncate", [0, 0, 1, 127, 253, 255, 255])],
)  # fmt: skip
def test_floats_become_uint8_as_the_protocol_says(rounding, levels):
    floats = torch.tensor([-3.0, 0.5 / 255, 1.2 / 255, 0.5001, 253.7 / 255, 1.0, 1.7])
    assert quantize_pixels(floats.view(1, 1, 1, -1), rounding).flatten().tolist() == levels
    if rounding == "half_up":  # ADM: 127.5 x + 128 of pixels in [-1, 1], clamped and cut off
        pixels = torch.linspace(0, 1, 1001, dtype=torch.float64)
        adm = (127.5 * (2 * pixels - 1) + 128).clamp(0, 255).to(torch.uint8)
        ours = quantize_pixels(pixels.view(1, 1, 1, -1), "half_up").flatten()
        assert (ours.int() - adm.int()).abs().sum() <= 1  # one may lie on an edge


def test_the_rounding_of_a_protocol_reaches_the_pixels():
    decoded = [TokenizerVariant(Codes(tokenizer_of_prefixes(), rounding)).reconstruct(originals()).reconstructions.int()
               for rounding in ("truncate", "half_up")]  # fmt: skip
    difference = decoded[1] - decoded[0]
    assert set(difference.unique().tolist()) == {0, 1}
    with pytest.raises(ValueError, match="rounding must be 'nearest', 'half_up' or 'truncate'; got 'given'"):
        Codes(tokenizer_of_prefixes(), "given")


def test_dropped_tokens_cost_nothing():
    layout = (Stream("a", 3, (16, 4)), Stream("b", 2, (1024,)))
    keep = {"a": torch.tensor([[True, True, True], [True, False, False]]), "b": torch.tensor([[True, False]] * 2)}
    indices = {"a": torch.ones(2, 3, 2, dtype=torch.int64), "b": torch.ones(2, 2, 1, dtype=torch.int64)}
    assert token_bits(Tokens(indices, layout, keep)).tolist() == [3 * 6 + 10, 6 + 10]
    assert token_bits(Tokens(indices, layout)).tolist() == [3 * 6 + 20] * 2


def test_originals_and_given_reconstructions_come_as_they_are():
    given = originals(targets=torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert OriginalsVariant().reconstruct(given).reconstructions is given.images
    assert GivenVariant().reconstruct(given).reconstructions is given.targets
    assert (OriginalsVariant().kind, GivenVariant().kind) == ("originals", "reconstruction")
    with pytest.raises(ValueError, match="came without reconstructions"):
        GivenVariant().reconstruct(originals())
