"""Codebooks of a quantizer one by one, and the codes at a rank among the nearest."""

import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokens import code_neighbours
from vistok.eval.tokens.code_neighbours import code_digits, codebooks
from vistok.quantizers.bernoulli import BernoulliQuantizer
from vistok.quantizers.bsq import BinarySphericalQuantizer
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.perturbation import LatentPerturbation
from vistok.quantizers.product import Product
from vistok.quantizers.residual import Residual
from vistok.quantizers.scalar import ScalarQuantizer
from vistok.quantizers.vq import VectorQuantizer


def vq(codes=16, dim=4):
    torch.manual_seed(codes)
    quantizer = VectorQuantizer(codes, dim)
    with torch.no_grad():
        quantizer.codebook.normal_()
    return quantizer


BOOKS = {
    "vq": (vq, [[16]]),
    "fsq": (lambda: FiniteScalarQuantizer([5, 4]), [[20]]),
    "lfq": (lambda: LookupFreeQuantizer(12, subcode_bits=4), [[16, 16, 16]]),
    "bernoulli": (lambda: BernoulliQuantizer(3), [[2, 2, 2]]),
    "scalar": (lambda: ScalarQuantizer(2, 5), [[32, 32]]),
    "levels": (lambda: Residual([vq(8), vq(16)]), [[8, 16]]),
    "shared levels": (lambda: Residual(vq(8), 3, shared=True), [[8, 8, 8]]),
    "groups": (lambda: Grouped(Residual(vq(8), 2), 2), [[8, 8, 8, 8]]),
    "shared groups": (lambda: Grouped(vq(8), 2, shared=True), [[8, 8]]),
    "channels": (lambda: Product([vq(8), Factorized(vq(16), 6)]), [[8, 16]]),
    "ranges": (lambda: Product([vq(8), Residual(vq(16), 2)], lengths=[3, (2, 2)]), [[8], [16, 16]]),
    "scales": (lambda: MultiScaleResidual(vq(8), scales=(1, 2, 3)), [[8], [8], [8]]),
    "quantizer per scale": (
        lambda: MultiScaleResidual([LookupFreeQuantizer(4), LookupFreeQuantizer(4)], scales=(1, 2)),
        [[16], [16]],
    ),
    "perturbation": (lambda: LatentPerturbation(Residual(vq(8), 2), num_neighbours=3), [[8, 8]]),
    "split index": (lambda: Factorized(FiniteScalarQuantizer([4, 4]), subcode_sizes=[2, 8]), [[16]]),
}


@pytest.mark.parametrize("case", BOOKS)
def test_codebooks_stand_in_the_order_of_the_subcodes(case):
    make, sizes = BOOKS[case]
    quantizer = make()
    blocks = codebooks(quantizer)
    assert [[book.size for book in block] for block in blocks] == sizes
    shape = {"ranges": (7,), "scales": (3, 3), "quantizer per scale": (2, 2)}.get(case, (4,))
    for block, index_block in zip(blocks, quantizer.index_blocks(shape), strict=True):
        first, last = index_block.columns
        assert sum(book.width for book in block) == last - first
        if case != "split index":
            assert tuple(book.size for book in block) == quantizer.codebook_sizes[first:last]


def test_a_codebook_that_serves_twice_is_one_object():
    for quantizer in (Residual(vq(8), 3, shared=True), MultiScaleResidual(vq(8), scales=(1, 2, 3)), ScalarQuantizer(3)):
        assert len({id(book) for block in codebooks(quantizer) for book in block}) == 1
    assert len({id(book) for book in codebooks(Residual(vq(8), 3))[0]}) == 3


@pytest.mark.parametrize("limit", [0, 1 << 26])
@pytest.mark.parametrize("make", [vq, lambda: FiniteScalarQuantizer([5, 4]), lambda: LookupFreeQuantizer(4)])
def test_codes_at_ranks_are_the_quantizers_neighbours(make, limit, monkeypatch):
    monkeypatch.setattr(code_neighbours, "TABLE_LIMIT", limit)
    monkeypatch.setattr(code_neighbours, "_BLOCK", 20)
    quantizer = make()
    ((book,),) = codebooks(quantizer)
    codes = torch.tensor([[3], [-1], [0], [15], [3]])
    for k in (4, 9, 16):  # a table that is too narrow is made anew
        ranks = torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5) % k, torch.full((5,), k - 1)], 1)
        near = quantizer.neighbours(codes, k)  # (5, k, 1)
        found = book.at(codes, ranks, k)
        assert torch.equal(found, near.gather(1, ranks.unsqueeze(2)))
        assert (found[1] == -1).all() and torch.equal(found[:, 0], codes)


def test_neighbours_of_a_subcode_are_those_of_its_part_of_the_latent():
    for quantizer in (LookupFreeQuantizer(8, subcode_bits=4), ScalarQuantizer(2, 4, low=[-1, 0], high=[1, 5])):
        books = codebooks(quantizer)[0]
        rows = torch.zeros(16, 2, dtype=torch.int64)
        for column, book in enumerate(books):
            rows.zero_()[:, column] = torch.arange(16)
            latents = quantizer.decode(rows).double()  # all values of this sub-code, the other one fixed
            for code in (0, 7, 15):
                far = (latents - latents[code]).square().sum(1)
                found = book.at(torch.tensor([[code], [-1]]), torch.arange(16).expand(2, 16), 16)
                assert (far[found[0, :, 0]].diff() > -1e-6).all() and found[0, 0, 0] == code
                assert sorted(found[0, :, 0].tolist()) == list(range(16)) and (found[1] == -1).all()


def test_unknown_quantizers_with_several_indices_say_so():
    class Unknown(FiniteScalarQuantizer):
        codebook_sizes = (4, 4)

    quantizer = Unknown([4, 4])
    quantizer.codebook_sizes = (4, 4)
    with pytest.raises(MetricUnavailable, match="Unknown writes 2 indices per token"):
        codebooks(quantizer)


def test_digits_of_tokenizers():
    class Tokenizer:
        def __init__(self, quantizer):
            self.quantizer = quantizer

    assert code_digits(Tokenizer(BinarySphericalQuantizer(12, subcode_bits=4))) == (2,) * 4
    assert code_digits(Tokenizer(FiniteScalarQuantizer([5, 4, 3]))) == (5, 4, 3)
    assert code_digits(Tokenizer(Residual(FiniteScalarQuantizer([5, 5]), 3, shared=True))) == (5, 5)
    assert code_digits(Tokenizer(Product([FiniteScalarQuantizer([5, 5]), vq()]))) == ()
    assert code_digits(Tokenizer(vq())) == () and code_digits(object()) == ()
