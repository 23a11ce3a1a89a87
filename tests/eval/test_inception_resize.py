"""Every way to 299 x 299 against the program that it is named after."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vistok.eval.inception.resize import InceptionResize

SIZES = [(256, 256), (64, 40), (512, 300), (17, 299)]


def images(height, width):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(height)).byte()


def pil_bicubic(channel):
    return torch.from_numpy(np.array(Image.fromarray(channel.numpy()).resize((299, 299), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-7), (torch.float64, 1e-15)])
def test_tf1_equals_torch_fidelity_also_in_float64(size, dtype, tolerance):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    theirs = interpolate_bilinear_2d_like_tensorflow1x(images(*size).to(dtype), (299, 299), align_corners=False)
    ours = InceptionResize("tf1", dtype)(images(*size))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, (theirs - 128) / 128, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_torch_equals_pytorch_fid(size):
    theirs = F.interpolate(images(*size).double() / 255, (299, 299), mode="bilinear", align_corners=False)
    ours = InceptionResize("torch", torch.float64)(images(*size))
    torch.testing.assert_close(ours, 2 * theirs - 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_antialias_equals_torch_with_antialias(size):
    theirs = F.interpolate(images(*size).double(), (299, 299), mode="bilinear", align_corners=False, antialias=True)
    ours = InceptionResize("antialias", torch.float64)(images(*size))
    torch.testing.assert_close(ours, (theirs - 128) / 128, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_clean_equals_pil_on_float_channels(size):
    batch = images(*size).float()
    theirs = torch.stack([torch.stack([pil_bicubic(channel) for channel in image]) for image in batch])
    assert theirs.max() > 255 or size[1] == 300  # there is overshoot to cut off
    ours = InceptionResize("clean")(images(*size))
    torch.testing.assert_close(ours, (theirs.clamp(0, 255) - 128) / 128, rtol=0, atol=1e-6)


def test_the_four_ways_differ():
    batch = images(256, 256)
    results = [InceptionResize(mode)(batch) for mode in ("tf1", "torch", "antialias", "clean")]
    results.append(InceptionResize("antialias")(images(400, 400)))
    results.append(InceptionResize("torch")(images(400, 400)))
    for number, first in enumerate(results):
        for second in results[number + 1 :]:
            assert (first - second).abs().max() > 1e-3


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="resize must be one of tf1, torch, antialias, clean; got 'nearest'"):
        InceptionResize("nearest")
