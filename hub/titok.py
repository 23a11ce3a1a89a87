"""Released single-stage TiTok checkpoints (bytedance/1d-tokenizer, arXiv:2406.07550).

``config.json`` is the training config (``model.vq_model`` ...). The published names follow open_clip's transformer;
encoder output and pixel head are 1x1 convolutions there, linear layers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..quantizers.vq import VectorQuantizer
from ..tokenizers.titok import TiTok
from .renaming import count, pointwise_to_linear, reject_overrides, rename

_RULES = (
    (r"^latent_tokens$", "encoder.latent_tokens"),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^encoder\.conv_out\.", "encoder.out."),
    (r"\.class_embedding$", ".class_token"),
    (r"\.latent_token_positional_embedding$", ".latent_position"),
    (r"\.positional_embedding$", ".position"),
    (r"\.patch_embed\.", ".patchify."),
    (r"\.ln_pre\.", ".norm_in."),
    (r"\.ln_post\.", ".norm_out."),
    (r"\.transformer\.(\d+)\.ln_([12])\.", r".blocks.\1.norm\2."),
    (r"\.transformer\.(\d+)\.attn\.in_proj_", r".blocks.\1.attention.qkv."),
    (r"\.transformer\.(\d+)\.attn\.out_proj\.", r".blocks.\1.attention.out."),
    (r"\.transformer\.(\d+)\.mlp\.c_fc\.", r".blocks.\1.mlp.0."),
    (r"\.transformer\.(\d+)\.mlp\.c_proj\.", r".blocks.\1.mlp.2."),
    (r"\.decoder_embed\.", ".embed."),
    (r"^decoder\.ffn\.0\.", "decoder.to_pixels."),
)
_HEAD_WIDTH = 64


def recognise(config: dict[str, Any]) -> bool:
    """Whether this is a TiTok config."""
    model = config.get("model")
    return isinstance(model, dict) and "num_latent_tokens" in model.get("vq_model", {})


def read(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[TiTok, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights.

    Raises:
        ValueError: for the two-stage models and the continuous ones, which this version does not read.
    """
    reject_overrides(overrides, "TiTok", ("encoder_size", "decoder_size"))
    model = config["model"]["vq_model"]
    if model.get("is_legacy", True):
        raise ValueError("two-stage TiTok checkpoints (is_legacy: true) are not supported by this version")
    if model.get("quantize_mode", "vq") != "vq":
        raise ValueError(f"quantize_mode {model['quantize_mode']!r} is not discrete; only 'vq' is supported")
    for side in ("encoder", "decoder"):
        if f"{side}_size" not in overrides:
            name = model[f"vit_{side[:3]}_model_size"]
            overrides[f"{side}_size"] = _size(state, side, name, architecture)
    tokenizer = TiTok(
        VectorQuantizer(model["codebook_size"], model["token_size"], bool(model.get("use_l2_norm", False))),
        image_size=config["dataset"]["preprocessing"]["crop_size"],
        patch_size=model["vit_enc_patch_size"],
        num_latent_tokens=model["num_latent_tokens"],
        **overrides,
    )
    state = rename(state, _RULES, training_only=(r"quantize\.embed_prob$",))
    pointwise_to_linear(state, ("encoder.out.weight", "decoder.to_pixels.weight"))
    return tokenizer, state


def _size(state: dict[str, Tensor], side: str, name: str, architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """``(width, layers, heads)``: the weights tell the first two, published models have heads of 64."""
    width = state[f"{side}.class_embedding"].shape[1]
    layers = count(state, rf"{side}\.transformer\.(\d+)\.")
    heads = architecture.get(f"size.{name}.num_heads")
    if heads is None:
        if width % _HEAD_WIDTH:
            raise ValueError(
                f"the {side} has width {width}, which heads of {_HEAD_WIDTH} do not divide; give "
                f"{side}_size=({width}, {layers}, heads)"
            )
        heads = width // _HEAD_WIDTH
    return width, layers, int(heads)
