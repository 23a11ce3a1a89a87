"""Decoding of everything that calls itself an image, and writing of PNG files."""

from __future__ import annotations

import errno
import io
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vistok.data.images import ImageError, decode_image, read_image, save_png, to_uint8


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_colour_images_equal_what_pil_decodes(picture, format):
    data = picture(1, (20, 30), format)
    image = decode_image(data)
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert (image.float() - rgb(data).float()).abs().mean() <= (1 if format == "JPEG" else 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_greyscale_becomes_three_equal_channels(format):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = decode_image(encode(Image.fromarray(levels), format, **({"quality": 100} if format == "JPEG" else {})))
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert (image[0].int() - torch.from_numpy(levels).int()).abs().max() <= 2


def test_cmyk_jpeg_is_converted_as_pil_does():
    inks = np.random.default_rng(2).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    data = encode(Image.fromarray(inks, "CMYK").resize((32, 24), Image.Resampling.BICUBIC), "JPEG")
    assert torch.equal(decode_image(data), rgb(data))


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]
    image = decode_image(encode(Image.fromarray(rgba), "PNG"))
    assert image[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_grey_with_alpha_is_laid_on_white():
    image = decode_image(encode(Image.fromarray(np.array([[[50, 255], [50, 0]]], dtype=np.uint8), "LA"), "PNG"))
    assert image[0].tolist() == [[50, 255]]


def test_transparent_palette_colour_becomes_white():
    indexed = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    image = decode_image(encode(indexed, "PNG", transparency=1))
    assert image[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 128 * 257, 200 * 257, 65535]], dtype=np.uint16)
    assert decode_image(encode(Image.fromarray(levels), "PNG"))[0].tolist() == [[0, 1, 128, 200, 255]]


def test_floating_point_pixels_are_refused():
    with pytest.raises(ImageError, match="x.tif.*floating"):
        decode_image(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "x.tif")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_honoured_and_can_be_ignored(picture, orientation, format):
    original = Image.open(io.BytesIO(picture(3, (24, 40))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(original, format, exif=exif, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    assert (decode_image(data).int() - torch.from_numpy(upright).int()).abs().float().mean() <= 1
    assert decode_image(data, exif=False).shape == (3, 24, 40)


def test_unreadable_bytes_raise_an_error_with_name_and_reason(picture):
    jpeg, png = picture(4, (120, 160)), picture(4, format="PNG")
    body = png.index(b"IDAT") + 4
    wrong_body = png[:body] + zlib.compress(b"not pixels") + png[body + 18 :]
    cases = {
        b"": "empty",
        b"some text": "not an image",
        jpeg[:-30]: "truncated",
        jpeg[: len(jpeg) // 2]: "truncated",
        jpeg[:30]: "truncated|not an image",
        png[: len(png) // 2]: "truncated|broken",
        wrong_body: "broken|truncated",
    }
    for data, reason in cases.items():
        with pytest.raises(ImageError, match=f"(?i)^train/17: .*({reason})"):
            decode_image(data, "train/17")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_decompression_bomb_is_refused(picture, format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 // 2 - 1)
    with pytest.raises(ImageError, match="bomb.*pixels"):
        decode_image(picture(5, (24, 32), format), "bomb")


def test_read_image_names_a_file_that_is_missing(tmp_path):
    with pytest.raises(ImageError, match="gone.jpg: No such file"):
        read_image(tmp_path / "gone.jpg")


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    levels = torch.arange(256)
    for offset in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8((levels + offset) / 255).long(), levels)
    assert to_uint8(torch.tensor([-3.0, 7.0])).tolist() == [0, 255]
    assert torch.equal(
        to_uint8((levels / 255).bfloat16()).long() - levels,
        (levels / 255).bfloat16().float().mul(255).round().long() - levels,
    )
    with pytest.raises(TypeError, match="uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


def test_save_png_writes_the_same_pixels_back(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    for value in (image, image / 255):
        save_png(value, tmp_path / "a.png")
        assert torch.equal(read_image(tmp_path / "a.png"), image)
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match=r"\(3, H, W\).*\(1, 5, 7\)"):
        save_png(image[:1], tmp_path / "b.png")


def test_save_png_leaves_nothing_behind_when_it_cannot_write(tmp_path, monkeypatch):
    image = torch.zeros(3, 4, 4)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        save_png(image, tmp_path / "file" / "no-folder.png")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        save_png(image, tmp_path / "taken")
    save_png(image, tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(torch.ones(3, 4, 4), tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["file", "old.png", "taken"]


def test_what_is_written_is_as_readable_as_any_new_file(tmp_path):
    """safetensors makes files that only their owner may read; on a shared disk an export must not be one."""
    from safetensors.torch import save_file

    from vistok.data.files import atomic_file, atomic_folder

    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "one.safetensors") as partial:
        save_file({"x": torch.zeros(1)}, partial)
    with atomic_folder(tmp_path / "folder") as partial:
        save_file({"x": torch.zeros(1)}, partial / "two.safetensors")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "one.safetensors").stat().st_mode == expected
    assert (tmp_path / "folder" / "two.safetensors").stat().st_mode == expected
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two.safetensors"]
