"""The released VQGAN of MaskGIT (arXiv:2202.04200), ported to torch, and its decoder inside other checkpoints.

``maskgit-vqgan-imagenet-f16-256.bin`` is the teacher of TiTok's first stage (arXiv:2406.07550); two-stage TiTok
checkpoints hold its decoder, fine-tuned, as ``pixel_decoder.*``. The architecture is read off the weights: a shortcut
with as many input as output channels is one of the block's output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..quantizers.vq import VectorQuantizer
from ..tokenizers.maskgit_vqgan import MaskGITVQGAN
from .renaming import Rules, count, reject_overrides, rename

_TOKENIZER_RULES = (
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.levels.\1.blocks."),
    (r"^encoder\.mid\.", "encoder.middle.blocks."),
    (r"^(encoder\..*)\.nin_shortcut\.", r"\1.shortcut."),
)


def recognise(config: dict[str, Any]) -> bool:
    """Whether this is the config of a MaskGIT VQGAN."""
    return {"hidden_channels", "num_res_blocks", "num_embeddings", "z_channels"} <= set(config)


def read(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[MaskGITVQGAN, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights. Override: ``image_size``, by default the config's, or 256.

    Raises:
        ValueError: for weights of something else.
    """
    reject_overrides(overrides, "MaskGIT VQGAN", ("image_size",))
    arguments = decoder_arguments(state)
    if "quantize.embedding.weight" not in state:
        raise ValueError("this is no MaskGIT VQGAN: there is no quantize.embedding.weight")
    num_codes, dim = state["quantize.embedding.weight"].shape
    tokenizer = MaskGITVQGAN(
        VectorQuantizer(num_codes, dim),
        image_size=overrides.get("image_size", config.get("resolution", 256)),
        latent_channels=arguments.pop("in_dim"),
        **arguments,
    )
    num_levels = len(arguments["channel_multipliers"])
    return tokenizer, rename(state, (*_TOKENIZER_RULES, *decoder_rules(num_levels=num_levels)))


def decoder_rules(prefix: str = "decoder.", target: str = "decoder.", num_levels: int = 5) -> Rules:
    """Rules that turn the published names of a decoder into those of :class:`~vistok.decoders.maskgit.MaskGITDecoder`.

    They touch nothing but names under ``prefix``.

    Args:
        prefix: of the published names, with its dot: ``decoder.``, ``pixel_decoder.``.
        target: of our names, with its dot.
        num_levels: levels of the decoder; published ones are counted from full resolution, ours from the lowest.
    """
    under = "^" + re.escape(prefix)
    rules = [(under + r"mid\.(\d+)\.", target + r"middle.blocks.\1.")]
    for level in range(num_levels):
        ours = f"{target}levels.{num_levels - 1 - level}."
        rules += [
            (under + rf"up\.{level}\.block\.(\d+)\.nin_shortcut\.", ours + r"blocks.\1.shortcut."),
            (under + rf"up\.{level}\.block\.(\d+)\.", ours + r"blocks.\1."),
            (under + rf"up\.{level}\.upsample_conv\.", ours + "resample.conv."),
        ]
    return (*rules, (under + r"(conv_in|conv_out|norm_out)\.", target + r"\1."))


def decoder_arguments(state: Mapping[str, Tensor], prefix: str = "decoder.") -> dict[str, Any]:
    """Constructor arguments of :class:`~vistok.decoders.maskgit.MaskGITDecoder` for published names under ``prefix``.

    Raises:
        ValueError: if there is no such decoder.
    """
    under = re.escape(prefix)
    num_levels = count(state, under + r"up\.(\d+)\.")
    names = [f"{prefix}conv_in.weight", f"{prefix}conv_out.weight"]
    names += [f"{prefix}up.{level}.block.0.conv2.weight" for level in range(num_levels)]
    missing = [name for name in names if name not in state]
    if missing or not num_levels:
        raise ValueError(
            f"this is no MaskGIT decoder under {prefix!r}: there is no {(missing or [prefix + 'up.0'])[0]}"
        )
    channels = state[f"{prefix}conv_out.weight"].shape[1]
    return {
        "channels": channels,
        "channel_multipliers": [state[name].shape[0] // channels for name in names[2:]],
        "num_blocks": count(state, under + r"up\.0\.block\.(\d+)\."),
        "in_dim": state[f"{prefix}conv_in.weight"].shape[1],
        "shortcut_of": _shortcut_of(state, under + r"up\.\d+\.block\.\d+\."),
    }


def _shortcut_of(state: Mapping[str, Tensor], block: str) -> str:
    """``output`` if the shortcuts have as many input as output channels, and where there is none to tell."""
    shapes = [tensor.shape for name, tensor in state.items() if re.match(block + r"nin_shortcut\.weight$", name)]
    return "output" if all(shape[0] == shape[1] for shape in shapes) else "input"
