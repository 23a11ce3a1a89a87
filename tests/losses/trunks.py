"""Small weights files of random trunks, and distorted photographs to measure with them."""

import io
import re
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FILES = {"vgg16": "vgg16-397923af.pth", "alexnet": "alexnet-owt-7be5be79.pth", "convnext_small": "convnext_small.pth"}


def write_weights(name, folder):
    """A torchvision weights file of a random network: one pool of numbers, seen by every weight, keeps it small."""
    from torchvision import models

    with torch.device("meta"):
        state = getattr(models, name)().state_dict()
    if name != "convnext_small":
        state = {key: value for key, value in state.items() if key.startswith("features")}
    size = max(value.numel() for value in state.values())
    noise = 0.05 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    pools = {False: noise, True: 1 + noise}  # scales of norms and layers lie around 1, weights and biases around 0
    scales = {k for k, v in state.items() if k.endswith("layer_scale") or (v.ndim == 1 and k.endswith("weight"))}
    weights = {key: pools[key in scales][: value.numel()].view(value.shape) for key, value in state.items()}
    path = folder / FILES[name]
    torch.save(weights, path)
    return path


def package_lpips(net, file):
    """The lpips package's own module with the trunk of a file."""
    with torch.device("meta"), warnings.catch_warnings():  # its random trunk takes seconds
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", "cpu", weights_only=True)
    network.load_state_dict(heads, strict=False, assign=True)
    trunk = torch.load(file, weights_only=True)
    trunk = {name: trunk[re.sub(r"slice\d", "features", name)] for name in network.net.state_dict()}
    network.net.load_state_dict(trunk, assign=True)
    network.scaling_layer = lpips.ScalingLayer()
    return network.eval()


def photograph(size):
    """``(1, 3, size, size)`` in [0, 1]."""
    from skimage.data import astronaut

    image = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, size=(size, size), mode="bilinear", antialias=True)


def distorted(image):
    """Sixteen versions of a photograph: blurred, noisy, compressed, shifted, each at four strengths."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    size = image.shape[-1]
    versions = []
    for strength in range(1, 5):
        small = F.interpolate(image, scale_factor=1 / (1 + 0.4 * strength), mode="bilinear", antialias=True)
        versions.append(F.interpolate(small, size=(size, size), mode="bilinear"))
        versions.append((image + 0.02 * strength * noise).clamp(0, 1))
        versions.append(_compressed(image, quality=70 - 13 * strength))
        versions.append(image.roll(strength, dims=-1))
    return versions


def spearman(a, b):
    """Rank correlation of two lists without ties."""
    a, b = (torch.tensor(x).argsort().argsort().double() for x in (a, b))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def saved_bytes(function):
    """What ``function`` keeps for the backward pass, parameters aside: bytes of distinct storages."""
    storages, result = {}, None

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(storages.values())


def _compressed(image, quality):
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
