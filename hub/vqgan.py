"""Released 2D VQGAN checkpoints: LlamaGen (arXiv:2406.06525) and taming-transformers (arXiv:2012.09841).

The two differ in names, in the order in which decoder levels are stored, and in the codebook (LlamaGen's is
l2-normalised); the architecture is one. Its sizes are read off the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..quantizers.vq import VectorQuantizer
from ..tokenizers.vqgan import VQGAN
from .renaming import count, pointwise_to_linear, reject_overrides, rename

_COMMON = (
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^quant_conv\.", "to_quantizer."),
    (r"^post_quant_conv\.", "from_quantizer."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
)
_LLAMAGEN = (
    *_COMMON,
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.blocks."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attention."),
    (r"\.conv_blocks\.(\d+)\.(?:up|down)sample\.", r".levels.\1.resample."),
    (r"\.mid\.", ".middle."),
)
_TAMING = (
    *_COMMON,
    (r"\.(?:down|up)\.(\d+)\.block\.", r".levels.\1.blocks."),
    (r"\.(?:down|up)\.(\d+)\.attn\.", r".levels.\1.attention."),
    (r"\.(?:down|up)\.(\d+)\.(?:up|down)sample\.", r".levels.\1.resample."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
)


def recognise_llamagen(config: dict[str, Any]) -> bool:
    """Whether this is a LlamaGen VQ config."""
    return "codebook_embed_dim" in config.get("model_args", {})


def recognise_taming(config: dict[str, Any]) -> bool:
    """Whether this is a taming-transformers VQModel config."""
    model = config.get("model")
    return isinstance(model, dict) and "ddconfig" in model.get("params", {})


def read_llamagen(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[VQGAN, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights. Override: ``image_size``, 256 by default."""
    reject_overrides(overrides, "LlamaGen", ("image_size",))
    state = rename(state, _LLAMAGEN, training_only=(r"quantize\.codebook_used$",))
    image_size = overrides.get("image_size", architecture.get("image_size", 256))
    return _build(state, image_size, l2_normalize=bool(config["model_args"].get("codebook_l2_norm", True)))


def read_taming(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[VQGAN, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights; the decoder's levels are stored full resolution first there."""
    reject_overrides(overrides, "taming VQGAN", ("image_size",))
    state = rename(state, _TAMING, training_only=(r"loss\.",))
    last = count(state, r"decoder\.levels\.(\d+)\.") - 1
    state = {
        re.sub(r"^decoder\.levels\.(\d+)\.", lambda m: f"decoder.levels.{last - int(m[1])}.", name): tensor
        for name, tensor in state.items()
    }
    image_size = overrides.get("image_size", config["model"]["params"]["ddconfig"]["resolution"])
    return _build(state, image_size, l2_normalize=False)


def _build(state: dict[str, Tensor], image_size: int, l2_normalize: bool) -> tuple[VQGAN, dict[str, Tensor]]:
    needed = ("quantizer.codebook", "to_quantizer.weight", "encoder.conv_in.weight", "encoder.conv_out.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"this is no VQGAN with a plain codebook (quantize.embedding.weight; Gumbel codebooks and continuous "
            f"autoencoders share its config): there is nothing for {missing[0]}"
        )
    pointwise_to_linear(state, ("to_quantizer.weight", "from_quantizer.weight"))
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = range(count(state, r"encoder\.levels\.(\d+)\."))
    num_codes, dim = state["quantizer.codebook"].shape
    tokenizer = VQGAN(
        VectorQuantizer(num_codes, dim, l2_normalize),
        image_size=image_size,
        channels=channels,
        channel_multipliers=[
            state[f"encoder.levels.{level}.blocks.0.conv2.weight"].shape[0] // channels for level in levels
        ],
        num_blocks=count(state, r"encoder\.levels\.0\.blocks\.(\d+)\."),
        latent_channels=state["encoder.conv_out.weight"].shape[0],
        attention_levels=[level for level in levels if f"encoder.levels.{level}.attention.0.q.weight" in state],
    )
    return tokenizer, state
