"""Codecs cost the bytes of their files and return what Pillow decodes from them, whatever the batch."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image, features
from skimage import data

from vistok.eval import codecs
from vistok.eval.codecs import QUALITIES, CodecVariant, codec_variants
from vistok.eval.metric import MetricUnavailable, Originals

CODECS = [
    name if features.check(name if name != "jpeg" else "jpg") else pytest.param(name, marks=pytest.mark.skip)
    for name in QUALITIES
]
BY_HAND = {
    "jpeg": {"format": "JPEG", "subsampling": 2, "optimize": True},
    "webp": {"format": "WEBP", "lossless": False, "method": 6},
    "avif": {"format": "AVIF", "subsampling": "4:2:0"},
}


def originals(first=0, count=3, height=48, width=64):
    """Pieces of a photograph, with their number."""
    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1)
    images = torch.stack(
        [photograph[:, 30 * i : 30 * i + height, 150 : 150 + width] for i in range(first, first + count)]
    )
    return Originals(torch.arange(first, first + count), [str(i) for i in range(count)], -torch.ones(count), images)


def by_hand(image, codec, quality, size=None):
    """Bytes and pixels of one image, straight through Pillow."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if size is not None:
        picture = picture.resize(size, Image.LANCZOS)
    file = io.BytesIO()
    picture.save(file, quality=quality, **BY_HAND[codec])
    decoded = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    if size is not None:
        decoded = decoded.resize(image.shape[:0:-1], Image.BICUBIC)
    return len(file.getvalue()), torch.from_numpy(np.array(decoded)).permute(2, 0, 1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("quality", [3, 60])
def test_files_and_pixels_are_those_of_pillow(codec, quality):
    batch = originals()
    pairs = CodecVariant(codec, quality).reconstruct(batch)
    assert pairs.originals is batch and pairs.tokens is None
    assert pairs.reconstructions.dtype == torch.uint8 and pairs.reconstructions.is_contiguous()
    assert pairs.bits.dtype == torch.float64 and pairs.bits.shape == (3,)
    for image, decoded, bits in zip(batch.images, pairs.reconstructions, pairs.bits.tolist(), strict=True):
        size, expected = by_hand(image, codec, quality)
        assert bits == 8 * size
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_a_scale_encodes_a_smaller_image_and_restores_the_size(codec):
    batch = originals()
    pairs = CodecVariant(codec, 50, 0.25).reconstruct(batch)
    assert pairs.reconstructions.shape == batch.images.shape
    for image, decoded, bits in zip(batch.images, pairs.reconstructions, pairs.bits.tolist(), strict=True):
        size, expected = by_hand(image, codec, 50, (16, 12))
        assert bits == 8 * size
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_more_quality_costs_more_bytes_and_less_error(codec):
    batch = originals(height=96, width=96)
    sizes, errors = [], []
    for quality in QUALITIES[codec]:
        pairs = CodecVariant(codec, quality).reconstruct(batch)
        sizes.append(float(pairs.bits.mean()))
        errors.append(float((pairs.reconstructions.float() - batch.images).square().mean()))
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_image_does_not_depend_on_its_batch(codec, scale):
    variant = CodecVariant(codec, 20, scale)
    whole = variant.reconstruct(originals(0, 5))
    parts = [variant.reconstruct(originals(0, 2)), variant.reconstruct(originals(2, 3))]
    assert torch.equal(whole.reconstructions, torch.cat([part.reconstructions for part in parts]))
    assert torch.equal(whole.bits, torch.cat([part.bits for part in parts]))


def test_codecs_leave_the_originals_alone_and_share_their_downscaled_copies(monkeypatch):
    batch, calls = originals(), []
    downscale, before = codecs._downscale, originals().images
    monkeypatch.setattr(codecs, "_downscale", lambda image, size: calls.append(size) or downscale(image, size))
    for variant in codec_variants(["jpeg", "webp"], scales=(1, 0.5))[0]:
        variant.reconstruct(batch)
    assert calls == [(32, 24)] * 3
    assert torch.equal(batch.images, before)


def test_threads_are_shared_and_bounded(monkeypatch):
    names = set()
    encode = CodecVariant.encode
    monkeypatch.setattr(
        CodecVariant, "encode", lambda *args: names.add(threading.current_thread().name) or encode(*args)
    )
    variants = [CodecVariant("jpeg", quality) for quality in (10, 20, 30)]
    names.clear()  # the trial of the constructor
    for variant in variants:
        variant.reconstruct(originals(0, 8))
    assert all(name.startswith("codec") for name in names)
    assert len(names) <= codecs._MAX_THREADS and codecs._pool() is codecs._pool()


@pytest.mark.parametrize(("cores", "local", "threads"), [(6, None, 6), (64, None, 16), (64, "8", 8), (4, "8", 1)])
def test_threads_divide_the_cores_among_the_processes_of_a_machine(monkeypatch, cores, local, threads):
    monkeypatch.setattr(codecs.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert codecs._pool.__wrapped__()._max_workers == threads


def test_names_and_settings_tell_variants_apart():
    variants, skipped = codec_variants(CODECS[:2], {"jpeg": [10, 10, 50]}, scales=(1, 0.5))
    names = [variant.name for variant in variants]
    assert not skipped and len(set(names)) == len(names) == 4 + 2 * len(QUALITIES["webp"])
    assert names[:4] == ["jpeg/q=10", "jpeg/q=50", "jpeg/q=10/scale=0.5", "jpeg/q=50/scale=0.5"]
    settings = dict(variants[2].settings)
    assert 100 < settings.pop("overhead_bytes") < 1000
    assert settings == {"codec": "jpeg", "quality": 10, "scale": 0.5} and variants[2].kind == "codec"


@pytest.mark.parametrize("error", [KeyError("AVIF"), OSError("encoder avif not available")])
def test_a_codec_that_pillow_lacks_is_skipped_with_a_reason(monkeypatch, error):
    save = Image.Image.save

    def refuse(image, file, format, **options):
        if format == "AVIF":
            raise error
        save(image, file, format, **options)

    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(MetricUnavailable, match="Pillow .* knows no AVIF: pip install") as raised:
        CodecVariant("avif", 50)
    variants, skipped = codec_variants(["jpeg", "avif"])
    assert [variant.codec for variant in variants] == ["jpeg"] * len(QUALITIES["jpeg"])
    assert skipped == {"avif": str(raised.value)} and "\n" not in skipped["avif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gif", 50), "codec must be one of jpeg, webp, avif; got 'gif'"),
        (("jpeg", 0), "quality of jpeg must lie between 1 and 100; got 0"),
        (("webp", 101), "quality of webp must lie between 0 and 100; got 101"),
        (("jpeg", 50, 0), "scale must lie above 0 and not above 1; got 0"),
        (("jpeg", 50, 2), "scale .* got 2"),
    ],
)
def test_what_no_codec_takes_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CodecVariant(*arguments)


@pytest.mark.parametrize(("names", "qualities"), [(["jpg"], None), (["jpeg"], {"jpg": [1]})])
def test_unknown_codecs_are_named(names, qualities):
    with pytest.raises(ValueError, match="codec must be one of jpeg, webp, avif; got 'jpg'"):
        codec_variants(names, qualities)
