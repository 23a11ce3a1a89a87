"""Released checkpoints of the TiTok family, read into Vistok's own tokenizers.

TiTok (arXiv:2406.07550) with one stage and with two, TA-TiTok (arXiv:2501.07730), each with codes or continuous
(bytedance/1d-tokenizer), and One-D-Piece (arXiv:2501.10064). ``config.json`` is the training config
(``model.vq_model`` ...), whose switches say which of them it is. The published names follow open_clip's transformer;
encoder output and heads are 1x1 convolutions there, linear layers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..decoders.maskgit import MaskGITDecoder
from ..quantizers.vq import VectorQuantizer
from ..tokenizers.base import Tokenizer
from ..tokenizers.continuous import ContinuousTiTok
from ..tokenizers.one_d_piece import OneDPiece
from ..tokenizers.ta_titok import TATiTok
from ..tokenizers.titok import TiTok, TwoStageTiTok
from .maskgit import decoder_arguments, decoder_rules
from .renaming import Rules, count, pointwise_to_linear, reject_overrides, rename

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
    (r"^decoder\.text_guidance_proj\.", "decoder.embed_text."),
    (r"^decoder\.text_guidance_positional_embedding$", "decoder.text_position"),
)
_PIXEL_RULES = ((r"^decoder\.ffn\.0\.", "decoder.to_pixels."),)
_PROXY_RULES = (
    (r"^decoder\.ffn\.([02])\.", r"decoder.to_logits.\1."),
    (r"^pixel_quantize\.embedding\.weight$", "decoder.codebook"),
)
_POINTWISE = (
    "encoder.out.weight",
    "decoder.to_pixels.weight",
    "decoder.to_logits.0.weight",
    "decoder.to_logits.2.weight",
)
_TRAINING_ONLY = (r"quantize\.embed_prob$",)  # usage of the codes, averaged for the anchors of CVQ
_KEYS = (
    "token_size",
    "num_latent_tokens",
    "vit_enc_model_size",
    "vit_dec_model_size",
    "vit_enc_patch_size",
    "vit_dec_patch_size",
)
_PIXEL_DECODER = "pixel_decoder."
_HEAD_WIDTH = 64


def recognise(config: dict[str, Any]) -> bool:
    """Whether this is a config of the family."""
    model = config.get("model")
    return isinstance(model, dict) and "num_latent_tokens" in model.get("vq_model", {})


def read(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights.

    Overrides: ``encoder_size`` and ``decoder_size``, for models whose attention heads are not 64 wide.

    Raises:
        ValueError: for switches that no published model combines, or weights of something else.
    """
    reject_overrides(overrides, "TiTok", ("encoder_size", "decoder_size"))
    model = config["model"]["vq_model"]
    _check(model)
    for side in ("encoder", "decoder"):
        if f"{side}_size" not in overrides:
            name = model[f"vit_{side[:3]}_model_size"]
            overrides[f"{side}_size"] = _size(state, side, name, architecture)
    shape = {
        "image_size": config["dataset"]["preprocessing"]["crop_size"],
        "patch_size": model["vit_enc_patch_size"],
        "num_latent_tokens": model["num_latent_tokens"],
        **overrides,
    }
    two_stage = model.get("is_legacy", True)
    if model.get("quantize_mode", "vq") == "vae":
        tokenizer = ContinuousTiTok(model["token_size"], **shape, **_text(state))
    else:
        quantizer = VectorQuantizer(model["codebook_size"], model["token_size"], bool(model.get("use_l2_norm", False)))
        if two_stage:
            variable = config["model"].get("type") == "one_d_piece" or not model.get("strict_length_assertion", True)
            form = OneDPiece if variable else TwoStageTiTok
            tokenizer = form(quantizer, **shape, **_proxy(state, bool(model.get("finetune_decoder", False))))
        else:
            text = _text(state)
            tokenizer = TATiTok(quantizer, **shape, **text) if text else TiTok(quantizer, **shape)
    state = rename(state, (*_RULES, *(_proxy_rules(state) if two_stage else _PIXEL_RULES)), _TRAINING_ONLY)
    pointwise_to_linear(state, _POINTWISE)
    return tokenizer, state


def _check(model: Mapping[str, Any]) -> None:
    """Raise for a config that describes none of the published forms."""
    missing = [key for key in _KEYS if key not in model]
    if missing:
        raise ValueError(f"model.vq_model of a TiTok config must name {', '.join(_KEYS)}; {', '.join(missing)} missing")
    mode, two_stage = model.get("quantize_mode", "vq"), model.get("is_legacy", True)
    if mode not in ("vq", "vae"):
        raise ValueError(f"quantize_mode must be 'vq' or 'vae'; got {mode!r}")
    if two_stage and mode == "vae":
        raise ValueError("quantize_mode 'vae' goes with is_legacy: false; the two-stage models are discrete")
    if model.get("finetune_decoder", False) and not two_stage:
        raise ValueError("finetune_decoder: true goes with is_legacy: true; the single-stage models decode to pixels")
    if model["vit_enc_patch_size"] != model["vit_dec_patch_size"]:
        raise ValueError(
            f"encoder and decoder must have one patch size; got {model['vit_enc_patch_size']} and "
            f"{model['vit_dec_patch_size']}"
        )


def _text(state: Mapping[str, Tensor]) -> dict[str, int]:
    """``text_dim`` and ``text_length`` of a decoder that takes text, else nothing."""
    if "decoder.text_guidance_proj.weight" not in state:
        return {}
    positions = _tensor(state, "decoder.text_guidance_positional_embedding")
    return {"text_dim": state["decoder.text_guidance_proj.weight"].shape[1], "text_length": len(positions)}


def _proxy(state: Mapping[str, Tensor], pixels: bool) -> dict[str, Any]:
    """What only the two-stage models have; the pixel decoder is that of the second stage."""
    decoder = MaskGITDecoder(**decoder_arguments(state, _PIXEL_DECODER)) if pixels else None
    return {"num_proxy_codes": len(_tensor(state, "decoder.ffn.2.weight")), "pixel_decoder": decoder}


def _proxy_rules(state: Mapping[str, Tensor]) -> Rules:
    num_levels = count(state, r"pixel_decoder\.up\.(\d+)\.")
    return (*_PROXY_RULES, *decoder_rules(_PIXEL_DECODER, "decoder.pixel_decoder.", num_levels))


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"these are no weights of the TiTok family, or not the config's: there is no {name}")
    return state[name]


def _size(state: dict[str, Tensor], side: str, name: str, architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """``(width, layers, heads)``: the weights tell the first two, published models have heads of 64."""
    width = _tensor(state, f"{side}.class_embedding").shape[1]
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
