"""TiTok's first stage: the loss on proxy codes, its teacher, and what it refuses."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import vistok
from vistok.decoders.proxy_code import ProxyCodeDecoder
from vistok.encoders.latent_vit import LatentViTEncoder
from vistok.losses.feature_cache import SampleCache
from vistok.quantizers.vq import VectorQuantizer
from vistok.regularizers.tail_drop import TailTokenDrop
from vistok.tokenizers.autoencoder import AutoencoderTokenizer
from vistok.tokenizers.base import TokenizerOutput
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.training.objectives import Objective
from vistok.training.proxy_codes import ProxyCodeObjective
from vistok.training.schedules import Ramp

PARITY = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[3] / "shared" / "parity"))
SIZE, CODES = 16, 12


def make_teacher(num_codes=CODES):
    """Four tokens per image. The codes are latents that it makes itself, so that images differ in them."""
    torch.manual_seed(0)
    teacher = MaskGITVQGAN(VectorQuantizer(num_codes, 4), SIZE, 32, (1, 1, 1, 1), 1, latent_channels=4).eval()
    with torch.no_grad():
        teacher.quantizer.codebook[:CODES] = teacher.latents(pixels(CODES))[:, 0]
    return teacher


def make_student(num_codes=CODES, patch_size=8, **kwargs):
    torch.manual_seed(1)
    return AutoencoderTokenizer(
        LatentViTEncoder(SIZE, patch_size, 4, 6, (32, 1, 2)),
        VectorQuantizer(32, 6),
        ProxyCodeDecoder(SIZE, patch_size, 4, 6, (32, 1, 2), num_codes),
        **kwargs,
    )


def pixels(batch=3, seed=0):
    """Coarse structure and noise, so that the teacher sees something in every image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(batch, 3, 2, 2, generator=generator), scale_factor=SIZE // 2)
    return 0.8 * coarse + 0.2 * torch.rand(batch, 3, SIZE, SIZE, generator=generator)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(make_teacher().save_pretrained(tmp_path_factory.mktemp("teacher") / "export"))


class FixedLogits(nn.Module):
    """A tokenizer whose decoder returns given logits, and whose quantizer given losses."""

    def __init__(self, logits, losses, weights):
        super().__init__()
        self.decoder = SimpleNamespace(logits=lambda latents, mask: logits)
        self.from_quantizer = nn.Identity()
        self.losses, self.default_loss_weights = losses, weights

    def bottleneck(self, images):
        z = torch.zeros(len(images), 1, 1)
        return TokenizerOutput(z, z, None, self.losses)


def test_loss_and_gradient_equal_the_original(tmp_path):
    path = PARITY / "losses-titok-stage1"
    if not path.is_dir():
        pytest.skip(f"parity fixtures are not here: {path} (set VISTOK_PARITY)")
    io = load_file(path / "io.safetensors")
    objective = ProxyCodeObjective(str(make_teacher(1024).save_pretrained(tmp_path / "teacher")))
    objective.codes = lambda images: io["target_codes"]
    given = io["logits"].clone().requires_grad_()
    logits = given.flatten(2).transpose(1, 2)  # (B, P, K)
    tokenizer = FixedLogits(logits, {"quantizer": io["quantizer_loss"]}, {"quantizer": 1.0}).train()
    result = objective(tokenizer, torch.zeros(2, 3, 24, 16), step=0)
    result.loss.backward()
    torch.testing.assert_close(result.loss, io["total_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.terms["cross_entropy"], io["reconstruction_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(given.grad, io["grad_logits"], rtol=0, atol=1e-6)
    hits = io["logits"].argmax(1).flatten(1) == io["target_codes"]
    assert float(result.terms["accuracy"]) == pytest.approx(float(hits.float().mean()))
    assert result.reconstruction is None


def test_uniform_logits_cost_the_logarithm_of_the_number_of_codes(tmp_path):
    objective = ProxyCodeObjective(str(make_teacher(1024).save_pretrained(tmp_path / "teacher")))
    result = objective(FixedLogits(torch.zeros(3, 4, 1024), {}, {}), pixels(), step=0)
    assert float(result.loss) == pytest.approx(math.log(1024), abs=1e-5)


def test_targets_are_the_nearest_codes_of_the_same_images(teacher):
    objective, x = ProxyCodeObjective(teacher, precision="float32"), pixels(8)
    network = vistok.load(teacher)
    with torch.no_grad():
        expected = torch.cdist(network.latents(x).double(), network.quantizer.codebook.double()).argmin(-1)
    assert torch.equal(objective.codes(x), expected)
    assert torch.equal(objective.codes(x.flip(3)), network.encode(x.flip(3)).indices["image"][..., 0])
    assert len(expected.unique()) > CODES // 2
    with torch.autocast("cpu", torch.bfloat16):  # the training step's precision is not the teacher's
        assert torch.equal(objective.codes(x), expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_teacher_runs_in_its_precision_and_searches_in_float32(teacher, precision, monkeypatch):
    objective, seen = ProxyCodeObjective(teacher, precision=precision), []
    network = objective.teacher.network
    network.encoder.levels[0].blocks[0].conv1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    find = type(network.quantizer).find
    monkeypatch.setattr(type(network.quantizer), "find", lambda q, z: seen.append(z.dtype) or find(q, z))
    objective.codes(pixels())
    assert seen == [getattr(torch, precision), torch.float32]


def test_the_teacher_is_trained_by_nobody_and_stored_nowhere(teacher):
    objective, student = ProxyCodeObjective(teacher).train(), make_student().train()
    objective(student, pixels(), step=0).loss.backward()
    assert not list(objective.parameters()) and not objective.state_dict()
    network = objective.teacher.network
    assert not network.training and not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert not [name for name, p in student.named_parameters() if p.grad is None]


def test_quantizer_losses_are_weighted(teacher):
    student, x = make_student().train(), pixels()
    plain = ProxyCodeObjective(teacher)(student, x, step=0)
    assert set(plain.terms) == {"cross_entropy", "accuracy", "commitment", "codebook"}
    expected = plain.terms["cross_entropy"] + 0.25 * plain.terms["commitment"] + plain.terms["codebook"]
    torch.testing.assert_close(plain.loss.detach(), expected)
    ramp = Ramp(start=3.0, end=1.0, steps=4)
    weighted = ProxyCodeObjective(teacher, quantizer_weights={"codebook": 0.0, "commitment": ramp})(student, x, step=2)
    expected = weighted.terms["cross_entropy"] + 2.0 * weighted.terms["commitment"]
    torch.testing.assert_close(weighted.loss.detach(), expected)
    with pytest.raises(ValueError, match=r"\['entropy'\]; .*\['codebook', 'commitment'\]"):
        ProxyCodeObjective(teacher, quantizer_weights={"entropy": 1.0})(student, x, step=0)


def test_a_student_that_is_certain_reconstructs_as_the_teacher(teacher):
    objective, x = ProxyCodeObjective(teacher, precision="float32"), pixels()
    network = vistok.load(teacher)
    certain = 200.0 * F.one_hot(objective.codes(x), CODES).float()
    result = objective(FixedLogits(certain, {}, {}).eval(), x, step=0)
    expected = network.decode(network.encode(x), clamp=False)
    torch.testing.assert_close(result.reconstruction, expected)
    assert float(result.terms["accuracy"]) == 1 and float(result.terms["cross_entropy"]) < 1e-6
    uncertain = objective.reconstruct(torch.zeros(3, 4, CODES), x)
    mean = network.quantizer.codebook.detach().mean(0).expand(3, 4, -1)
    torch.testing.assert_close(uncertain, network.decode_latents(mean, (2, 2)).detach())
    assert not result.reconstruction.requires_grad


def test_reconstructions_come_in_eval_only(teacher):
    objective, student = ProxyCodeObjective(teacher), make_student()
    assert objective(student.train(), pixels(), step=0).reconstruction is None
    result = objective(student.eval(), pixels(), step=0)
    assert result.reconstruction.shape == (3, 3, SIZE, SIZE) and result.reconstruction.dtype == torch.float32


def test_a_student_learns_the_codes(teacher):
    objective, student, x = ProxyCodeObjective(teacher), make_student().train(), pixels(6)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    values = []
    for step in range(40):
        result = objective(student, x, step)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        values.append(float(result.terms["cross_entropy"]))
    assert abs(values[0] - math.log(CODES)) < 0.7
    assert values[-1] < 0.7 * math.log(CODES)


class CountingCache(SampleCache):
    computed = ()

    def get_or_compute(self, indices, compute, device="cpu"):
        def counting(missing):
            self.computed += (indices[missing].tolist(),)
            return compute(missing)

        return super().get_or_compute(indices, counting, device)


def test_codes_of_training_images_are_computed_once(teacher, tmp_path):
    cache = CountingCache(str(tmp_path / "codes"), num_samples=9, dtype="int16")
    objective, plain = ProxyCodeObjective(teacher, cache=cache), ProxyCodeObjective(teacher)
    assert objective.needs_fixed_images and not plain.needs_fixed_images
    student, x = make_student().train(), pixels(5)
    objective.attach(student)
    for rows in ([0, 1, 2], [2, 3, 0, 4], [4, 3]):
        result = objective(student, x[rows], 0, {"index": torch.tensor(rows) + 4})
        torch.testing.assert_close(result.loss, plain(student, x[rows], 0).loss)
    assert cache.computed == ([4, 5, 6], [7, 8])
    other = pixels(3, seed=1)  # validation images have the same numbers and are others
    result = objective(student.eval(), other, 0, {"index": torch.tensor([4, 5, 6])})
    torch.testing.assert_close(result.loss, plain(student, other, 0).loss)
    with pytest.raises(ValueError, match="batch without 'index'"):
        objective(student.train(), x, 0)
    exact = ProxyCodeObjective(teacher, precision="float32", cache=SampleCache(str(tmp_path / "codes"), 9, "int16"))
    with pytest.raises(ValueError, match="precision is 'bfloat16' there, 'float32' here"):
        exact.attach(student)


def test_the_student_sees_what_a_regularizer_left(teacher):
    objective, x = ProxyCodeObjective(teacher), pixels()
    for per in ("sample", "batch"):
        student = make_student(regularizers=[TailTokenDrop(per=per)]).train()
        torch.manual_seed(1)
        result = objective(student, x, step=0)
        quantized, mask = result.output.quantized, result.output.mask
        kept = [quantized.shape[1]] * 3 if mask is None else mask.sum(1).tolist()
        assert min(kept) < 4
        logits = [student.decoder.logits(student.from_quantizer(quantized[i : i + 1, :k])) for i, k in enumerate(kept)]
        alone = F.cross_entropy(torch.cat(logits).flatten(0, 1), objective.codes(x).flatten())
        torch.testing.assert_close(result.terms["cross_entropy"], alone.detach())


def test_tokenizers_that_do_not_predict_the_codes_are_refused(teacher, tmp_path):
    objective = ProxyCodeObjective(teacher)
    objective.attach(make_student())
    with pytest.raises(ValueError, match="decoder with logits .* got MaskGITVQGAN with MaskGITDecoder"):
        objective.attach(make_teacher())
    with pytest.raises(ValueError, match=r"predicts 4x4 codes; the teacher makes 2x2 of images of 16x16 .* stride, 8"):
        objective.attach(make_student(patch_size=4))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\); the teacher has 4 codes .* num_codes=12"):
        objective(make_student(num_codes=5), pixels(), step=0)


def test_unfit_teachers_are_refused(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="teacher='nowhere/at-all'|teacher="):
        ProxyCodeObjective(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"anything": 1}')
    with pytest.raises(ValueError, match="teacher=.* cannot be loaded: .*known family"):
        ProxyCodeObjective(str(tmp_path))
    flat = vistok.TiTok(VectorQuantizer(8, 4), SIZE, 8, 4, (32, 1, 2), (32, 1, 2))
    with pytest.raises(ValueError, match="one plain codebook on a grid .* is a TiTok .* grid None"):
        ProxyCodeObjective(str(flat.save_pretrained(tmp_path / "flat")))
    pairs = vistok.Grouped(VectorQuantizer(8, 2), 2)
    several = MaskGITVQGAN(pairs, SIZE, 32, (1, 1), 1, latent_channels=4)
    with pytest.raises(ValueError, match=r"one plain codebook on a grid .* \(8, 8\) codes"):
        ProxyCodeObjective(str(several.save_pretrained(tmp_path / "several")))
    with pytest.raises(ValueError, match="precision must be .* got 'float16'"):
        ProxyCodeObjective(teacher, precision="float16")


def test_it_is_built_from_a_configuration(teacher):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Objective, "objective")
    arguments = {"teacher": teacher, "quantizer_weights": {"codebook": 0.5}}
    config = {"class_path": "vistok.training.proxy_codes.ProxyCodeObjective", "init_args": arguments}
    objective = parser.instantiate(parser.parse_object({"objective": config})).objective
    assert isinstance(objective, ProxyCodeObjective) and objective.num_codes == CODES
    assert objective.precision == "bfloat16" and objective.quantizer_weights == {"codebook": 0.5}
