"""Features for a probe: what they are, that they are computed once, and that a killed run loses nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from vistok import TiTok, VectorQuantizer
from vistok.data.images import ImageError
from vistok.data.source import ImageSource, Sample
from vistok.decoders.cnn import CNNDecoder
from vistok.decoders.latent_vit import LatentViTDecoder
from vistok.encoders.cnn import CNNEncoder
from vistok.encoders.latent_vit import LatentViTEncoder
from vistok.eval.metric import MetricUnavailable
from vistok.eval.probes.features import KINDS, extract_features
from vistok.eval.probes.linear import linear_probe
from vistok.eval.processes import Processes
from vistok.tokenizers.autoencoder import AutoencoderTokenizer
from vistok.tokenizers.continuous import ContinuousTiTok
from vistok.tokenizers.titok import TwoStageTiTok

TINY = (32, 2, 2)


class Noise(ImageSource):
    """Images of 16x16 random pixels, a function of their number; counts how often each is read."""

    def __init__(self, length=11, damaged=(), labelled=True, dies_at=None):
        self.length, self.damaged, self.labelled, self.dies_at = length, damaged, labelled, dies_at
        self.reads = []

    def __len__(self):
        return self.length

    def read(self, index):
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.reads.append(index)
        if index in self.damaged:
            raise ImageError(f"image {index}: damaged")
        draws = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (3, 16, 16), generator=draws, dtype=torch.uint8)
        return Sample(pixels, index % 3 if self.labelled else -1, f"image {index}")


def titok():
    torch.manual_seed(0)
    return TiTok(VectorQuantizer(16, 4), 16, 8, 3, encoder_size=TINY, decoder_size=TINY).eval()


def extract(folder, source=None, tokenizer=None, kinds=KINDS, **options):
    source, tokenizer = source or Noise(), tokenizer or titok()
    return extract_features(tokenizer, source, lambda image: image, folder, kinds, 4, **options)


def images(count=11):
    return torch.stack([Noise().read(index).image for index in range(count)]).float() / 255


def test_every_kind_is_the_mean_over_tokens_of_what_it_names(tmp_path):
    tokenizer = titok()
    found = extract(tmp_path, tokenizer=tokenizer)
    with torch.no_grad():
        output = tokenizer(images())
        expected = {
            "encoder": tokenizer.run_encoder(images()),
            "latents": output.latents,
            "quantized": output.quantized,
            "decoder": tokenizer.decoder.patch_features(output.quantized),
        }
    assert list(found) == list(KINDS)
    for kind, features in found.items():
        torch.testing.assert_close(features.read(torch.arange(11)), expected[kind].mean(1))
        assert features.dim == expected[kind].shape[2] and features.kind == kind
        assert features.labels.tolist() == [index % 3 for index in range(11)]
    assert found["decoder"].layer == "decoder.norm_out"


def test_encoder_features_come_before_the_projection_and_latents_after(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoencoderTokenizer(
        CNNEncoder(32, (1, 1), 1, 32), VectorQuantizer(16, 4), CNNDecoder(32, (1, 1), 1, 32), image_size=16
    ).eval()
    found = extract(tmp_path, tokenizer=tokenizer)
    assert {kind: features.dim for kind, features in found.items()} == {
        "encoder": 32,
        "latents": 4,
        "quantized": 4,
        "decoder": 32,
    }
    assert found["decoder"].layer == "decoder.middle"
    heard = []
    tokenizer.decoder.middle.register_forward_hook(lambda module, inputs, output: heard.append(output))
    with torch.no_grad():
        tokenizer(images())
    torch.testing.assert_close(found["decoder"].read(torch.arange(11)), heard[0].mean((2, 3)))


def test_another_layer_of_the_decoder_may_be_named(tmp_path):
    tokenizer = titok()
    found = extract(tmp_path, tokenizer=tokenizer, kinds=("decoder",), decoder_layer="decoder.blocks.0")
    heard = []
    tokenizer.decoder.blocks[0].register_forward_hook(lambda module, inputs, output: heard.append(output))
    with torch.no_grad():
        tokenizer(images())
    torch.testing.assert_close(found["decoder"].read(torch.arange(11)), heard[0].mean(1))
    with pytest.raises(ValueError, match="decoder.blocks.9"):
        extract(tmp_path / "other", kinds=("decoder",), decoder_layer="decoder.blocks.9")


def test_nothing_listens_afterwards(tmp_path):
    tokenizer = titok()
    extract(tmp_path, tokenizer=tokenizer)
    assert not any(module._forward_hooks for module in tokenizer.modules())


def test_an_image_is_read_and_encoded_once(tmp_path):
    source, seen = Noise(), []
    first = extract(tmp_path, source, kinds=("encoder",), advance=seen.append)
    again = extract(tmp_path, source, kinds=("encoder",), advance=seen.append)
    assert source.reads == list(range(11)) and sum(seen) == 22 and seen[-1] == 11
    assert torch.equal(first["encoder"].read(torch.arange(11)), again["encoder"].read(torch.arange(11)))


def test_more_images_and_more_kinds_add_to_what_is_there(tmp_path):
    source = Noise()
    some = extract(tmp_path, source, kinds=("encoder",), chosen=[9, 2, 2, 5])
    assert source.reads == [2, 5, 9] and some["encoder"].labels.tolist() == [2, 2, 0] and len(some["encoder"]) == 3
    extract(tmp_path, source, kinds=("encoder",))
    assert sorted(source.reads) == list(range(11))
    both = extract(tmp_path, source, kinds=("encoder", "quantized"))
    whole = extract(tmp_path / "whole", kinds=("encoder", "quantized"))
    for kind in both:
        torch.testing.assert_close(both[kind].read(torch.arange(11)), whole[kind].read(torch.arange(11)))


def test_unreadable_images_are_left_out(tmp_path):
    seen = []
    found = extract(tmp_path, Noise(damaged=(0, 4, 5, 6, 7)), kinds=("encoder",), advance=seen.append)["encoder"]
    whole = extract(tmp_path / "whole", kinds=("encoder",))["encoder"]
    kept = [1, 2, 3, 8, 9, 10]
    assert found.index.tolist() == kept and found.labels.tolist() == [index % 3 for index in kept]
    torch.testing.assert_close(found.read(torch.arange(6)), whole.read(torch.tensor(kept)))
    with pytest.raises(ValueError, match="none of the 3 images"):
        extract(tmp_path / "none", Noise(3, damaged=(0, 1, 2)))


def run_and_die(folder):
    extract(folder, Noise(dies_at=6))


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(tmp_path / "killed",))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    source = Noise()
    resumed = extract(tmp_path / "killed", source)
    whole = extract(tmp_path / "whole")
    assert source.reads == list(range(4, 11))  # the first batch of four was done
    for kind in KINDS:
        torch.testing.assert_close(resumed[kind].read(torch.arange(11)), whole[kind].read(torch.arange(11)))
        assert torch.equal(resumed[kind].labels, whole[kind].labels)


def test_processes_share_the_images_of_one_folder(tmp_path):
    sources = [Noise(), Noise()]
    plans = [Processes(rank, 2) for rank in range(2)]
    extract(tmp_path, sources[0], processes=plans[0])
    assert sources[0].reads == [0, 2, 4, 6, 8, 10]
    extract(tmp_path, sources[1])
    assert sources[1].reads == [1, 3, 5, 7, 9]


def test_a_folder_of_another_tokenizer_or_dataset_is_refused(tmp_path):
    extract(tmp_path, kinds=("encoder",), plan={"dataset": "a"})
    other = titok()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="made by something else"):
        extract(tmp_path, kinds=("encoder",), plan={"dataset": "a"}, tokenizer=other)
    with pytest.raises(ValueError, match="dataset is 'a' there, 'b' here"):
        extract(tmp_path, kinds=("encoder",), plan={"dataset": "b"})


def test_images_without_a_label_are_refused_before_all_are_encoded(tmp_path):
    source = Noise(labelled=False)
    with pytest.raises(MetricUnavailable, match="image 0 has none"):
        extract(tmp_path, source)
    assert len(source.reads) == 4


def test_features_that_a_tokenizer_does_not_have_say_so(tmp_path):
    torch.manual_seed(0)
    first_stage = TwoStageTiTok(VectorQuantizer(16, 4), 16, 8, 4, TINY, TINY).eval()
    assert extract(tmp_path / "a", tokenizer=first_stage, kinds=("encoder", "quantized"))["encoder"].dim == 4
    with pytest.raises(MetricUnavailable, match="makes no images"):
        extract(tmp_path / "b", tokenizer=first_stage, kinds=("decoder",))
    with_text = AutoencoderTokenizer(
        LatentViTEncoder(16, 8, 3, 4, TINY), VectorQuantizer(16, 4), LatentViTDecoder(16, 8, 3, 4, TINY, 6, 2)
    ).eval()
    assert extract(tmp_path / "c", tokenizer=with_text, kinds=("latents",))["latents"].dim == 4
    with pytest.raises(MetricUnavailable, match="reads text"):
        extract(tmp_path / "d", tokenizer=with_text, kinds=("decoder",))
    with pytest.raises(ValueError, match="kinds must be some of"):
        extract(tmp_path / "e", kinds=("pixels",))


def test_continuous_tokenizers_have_features_too(tmp_path):
    torch.manual_seed(0)
    tokenizer = ContinuousTiTok(5, 16, 8, 3, TINY, TINY).eval()
    found = extract(tmp_path, tokenizer=tokenizer)
    with torch.no_grad():
        means = tokenizer.encode_latents(images()).mean(1)
    torch.testing.assert_close(found["latents"].read(torch.arange(11)), means)
    assert found["encoder"].dim == 10


def test_a_probe_on_extracted_features_equals_one_on_the_same_rows_in_memory(tmp_path):
    found = extract(tmp_path, Noise(60), kinds=("encoder",))["encoder"]
    assert isinstance(found.rows, np.memmap)
    held = dataclasses.replace(found, rows=np.array(found.rows))
    settings = {"epochs": 3, "warmup_epochs": 1, "batch_size": 16}
    assert linear_probe(found, found, **settings) == linear_probe(held, held, **settings)
