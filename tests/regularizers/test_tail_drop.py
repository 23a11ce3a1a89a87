"""Tail token drop keeps prefixes of uniform length, and touches nothing else."""

import pytest
import torch

from vistok import TailTokenDrop, TiTok, VectorQuantizer

N = 8


def draws(drop, count, length=N):
    """Numbers of tokens kept in so many calls of a batch of 5."""
    quantized, indices = torch.randn(5, length, 3), torch.zeros(5, length, 1, dtype=torch.int64)
    kept = []
    for _ in range(count):
        values, mask = drop(quantized, indices, None)
        if drop.per == "batch":
            assert mask is None and torch.equal(values, quantized[:, : values.shape[1]])
            kept.append(values.shape[1])
        else:
            assert values is quantized and mask.shape == (5, length) and mask.dtype == torch.bool
            assert torch.equal(mask, mask.sort(1, descending=True).values)  # a prefix
            kept += mask.sum(1).tolist()
    return torch.tensor(kept)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_every_length_from_one_is_equally_likely(per):
    torch.manual_seed(0)
    kept = draws(TailTokenDrop(per), 8000 if per == "batch" else 1600)
    shares = torch.bincount(kept, minlength=N + 1) / len(kept)
    assert shares[0] == 0
    assert (shares[1:] - 1 / N).abs().max() < 5 * (1 / N / len(kept)) ** 0.5  # five standard deviations
    assert abs(kept.float().mean() - (N + 1) / 2) < 5 * (N**2 / 12 / len(kept)) ** 0.5


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_lengths_keep_the_minimum_and_the_multiple(per):
    torch.manual_seed(0)
    assert set(draws(TailTokenDrop(per, min_tokens=6), 200).tolist()) == {6, 7, 8}
    assert set(draws(TailTokenDrop(per, multiple_of=4), 200).tolist()) == {4, 8}
    assert set(draws(TailTokenDrop(per, multiple_of=3), 200).tolist()) == {3, 6, 8}
    assert set(draws(TailTokenDrop(per, multiple_of=100), 20).tolist()) == {8}
    assert set(draws(TailTokenDrop(per, min_tokens=8), 20).tolist()) == {8}


def test_samples_have_lengths_of_their_own():
    torch.manual_seed(0)
    _, mask = TailTokenDrop("sample")(torch.zeros(64, N, 3), torch.zeros(64, N, 1, dtype=torch.int64), None)
    assert len(set(mask.sum(1).tolist())) == N


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_what_was_dropped_before_stays_dropped(per):
    torch.manual_seed(0)
    before = torch.ones(3, N, dtype=torch.bool)
    before[:, 0] = False
    values, mask = TailTokenDrop(per)(torch.zeros(3, N, 2), torch.zeros(3, N, 1, dtype=torch.int64), before)
    assert mask.shape == values.shape[:2] and not mask[:, 0].any()


def test_a_length_for_the_batch_is_drawn_on_the_host():
    values, _ = TailTokenDrop("batch")(torch.empty(2, N, 3, device="meta"), torch.empty(2, N, 1, device="meta"), None)
    assert 1 <= values.shape[1] <= N  # a meta tensor has no values that could have been read


def small(per):
    torch.manual_seed(0)
    drop = [TailTokenDrop(per)] if per else []
    return TiTok(VectorQuantizer(32, 4), 16, 8, N, (32, 1, 2), (32, 1, 2), drop).train()


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_codes_and_quantizer_losses_are_those_of_all_tokens(per):
    images = torch.rand(4, 3, 16, 16)
    whole, cut = small(None)(images), small(per)(images)
    kept = cut.quantized.shape[1] * 4 if cut.mask is None else int(cut.mask.sum())
    assert kept < 4 * N
    assert torch.equal(cut.tokens.indices["image"], whole.tokens.indices["image"])
    assert all(torch.equal(cut.losses[name], loss) for name, loss in whole.losses.items())
    assert torch.equal(cut.statistics["counts"], whole.statistics["counts"])


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_evaluation_drops_nothing(per):
    model, images = small(per).eval(), torch.rand(2, 3, 16, 16)
    output = model(images)
    assert output.mask is None and output.quantized.shape[1] == N
    assert torch.equal(output.decoded, small(None).eval()(images).decoded)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_dropped_tokens_get_no_gradient_from_the_image(per):
    model, images = small(per), torch.rand(4, 3, 16, 16)
    output = model(images)
    (gradient,) = torch.autograd.grad(output.decoded.square().sum(), output.latents)
    seen = torch.arange(N).expand(4, -1) < output.quantized.shape[1] if output.mask is None else output.mask
    assert torch.equal(gradient.abs().sum(2) > 0, seen) and not seen.all()


def test_a_cut_sequence_decodes_as_its_mask_does():
    """Both forms of the regularizer give the decoder the same problem."""
    model, images = small("batch"), torch.rand(3, 3, 16, 16)
    cut = model(images)
    mask = (torch.arange(N) < cut.quantized.shape[1]).expand(3, -1)
    codes = model.quantizer.decode(cut.tokens.indices["image"])
    assert not mask.all()
    assert (model.decode_latents(codes, mask=mask) - cut.decoded).abs().max() < 1e-5


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="per must be 'sample' or 'batch'; got 'token'"):
        TailTokenDrop("token")
    with pytest.raises(ValueError, match="at least 1; got 0 and 1"):
        TailTokenDrop(min_tokens=0)
    with pytest.raises(ValueError, match="at least 1; got 1 and 0"):
        TailTokenDrop(multiple_of=0)
    with pytest.raises(ValueError, match="min_tokens is 9, but the sequence has only 8"):
        draws(TailTokenDrop(min_tokens=9), 1)
