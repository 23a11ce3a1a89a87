"""Released checkpoints of GigaTok (arXiv:2504.08736), 1D and 2D, read into Vistok's own tokenizers.

The config is the authors' YAML. Sizes are read off the weights, but for the attention heads: those follow from the
name of the size. Sequences lie first in the published positions, ``(N, 1, D)``; queries, keys and values of attention
to the memory are one matrix there. Alignment with a teacher (``distill_mlp``) and a record of used codes belong to
training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layers.q_former import Q_FORMER_SIZES
from ..quantizers.vq import VectorQuantizer
from ..tokenizers.gigatok import GigaTok, GigaTok2D
from .renaming import count, pointwise_to_linear, reject_overrides, rename

_CLASSES = {"VQVitModelPlus": "1D", "VQVitModel2DPlus": "2D"}
_LAYER = r"\.transformer\.(\d+)\."
_RULES = (
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^quant_conv\.", "to_quantizer."),
    (r"^post_quant_conv\.", "from_quantizer."),
    (r"^(en|de)coder\.", r"\1coder.grid_\1coder."),
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.blocks."),
    (r"\.conv_blocks\.(\d+)\.downsample\.", r".levels.\1.resample."),
    (r"\.conv_blocks\.(\d+)\.upsample\.conv1\.", r".levels.\1.resample.conv."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.mid\.0\.", ".middle.0."),
    (r"\.mid\.1\.", ".middle.2."),
    (r"\.adaptive\.(\d+)\.gamma\.", r".adaptive.\1.scale."),
    (r"\.adaptive\.(\d+)\.beta\.", r".adaptive.\1.shift."),
    (r"\.latent_token_positional_embedding$", ".latent_position"),
    (r"\.positional_embedding$", ".position"),
    (r"\.(?:en|de)coder_embed\.", ".embed."),
    (r"\.global_proj\.", ".to_queries."),
    (r"\.ln_pre\.", ".norm_in."),
    (r"\.ln_post\.", ".norm_out."),
    (r"^(s2to1encoder|s1to2decoder|s2dencoder|s2ddecoder)\.conv_out\.", r"\1.out."),
    (_LAYER + r"linear1\.", r".blocks.\1.mlp.0."),
    (_LAYER + r"linear2\.", r".blocks.\1.mlp.2."),
    (_LAYER + r"multihead_attn\.out_proj\.", r".blocks.\1.cross_attention.out."),
    (_LAYER + r"multihead_attn\.(q|kv)\.", r".blocks.\1.cross_attention.\2."),
    (_LAYER + r"(norm[123])\.", r".blocks.\1.\2."),
)
_PARTS = {
    "1D": ((r"^s2to1encoder\.", "encoder."), (r"^s1to2decoder\.", "decoder.")),
    "2D": (
        (r"^s2dencoder\.out\.", "encoder.out."),
        (r"^s2ddecoder\.out\.", "decoder.out."),
        (r"^s2dencoder\.", "encoder.vit."),
        (r"^s2ddecoder\.", "decoder.vit."),
    ),
}
_TRAINING_ONLY = (r"quantize\.codebook_used$", r"(s1to2decoder|s2ddecoder)\.distill_mlp\.")
# Switches of the original that change the architecture, and the values that all published models have.
_FIXED = {
    "codebook_l2_norm": True,
    "adaptive_gn": True,
    "d2s_up": True,
    "use_attn": False,
    "multi_level_query_init": True,
    "last_level_2d_query_init": False,
    "multi_level_2d_query_init": False,
}
_LAYER_TYPES = ("TransformerLayer", "TransformerDecoderLayer")


def recognise(config: dict[str, Any]) -> bool:
    """Whether this is a config of the family."""
    model = config.get("model")
    return isinstance(model, dict) and model.get("model_cls") in _CLASSES


def read(
    config: dict[str, Any], architecture: Mapping[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]
) -> tuple[GigaTok | GigaTok2D, dict[str, Tensor]]:
    """Build the tokenizer and rename its weights.

    Overrides: ``encoder_size`` and ``decoder_size``, ``(width, layers, heads)``, for sizes that are not published.

    Raises:
        ValueError: for switches that no published model has, or weights of something else.
    """
    reject_overrides(overrides, "GigaTok", ("encoder_size", "decoder_size"))
    arguments, form = config["model"]["init_args"], _CLASSES[config["model"]["model_cls"]]
    _check(config["model"])
    encoder, decoder = ("s2to1encoder", "s1to2decoder") if form == "1D" else ("s2dencoder", "s2ddecoder")
    channels = _tensor(state, "encoder.conv_in.weight").shape[0]
    multipliers = list(arguments["encoder_ch_mult"])
    side = math.isqrt(len(_tensor(state, f"{encoder}.positional_embedding")))
    shape = {
        "image_size": side * 2 ** (len(multipliers) - 1),
        "encoder_size": overrides.get("encoder_size") or _size(state, encoder, "encoder", arguments, architecture),
        "decoder_size": overrides.get("decoder_size") or _size(state, decoder, "decoder", arguments, architecture),
        "channels": channels,
        "channel_multipliers": multipliers,
        "num_blocks": count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": arguments["z_channels"],
    }
    num_codes, dim = _tensor(state, "quantize.embedding.weight").shape
    entropy = {"entropy_temperature": 0.01, "entropy_eps": 1e-5} if arguments.get("entropy_loss_ratio") else {}
    estimator = "rotation" if arguments.get("rot", False) else "straight_through"
    quantizer = VectorQuantizer(num_codes, dim, l2_normalize=True, estimator=estimator, **entropy)
    plain = f"{encoder}.transformer.0.multihead_attn.in_proj_weight" not in state
    if form == "1D":
        tokens = len(_tensor(state, f"{encoder}.latent_token_positional_embedding"))
        tokenizer: GigaTok | GigaTok2D = GigaTok(quantizer, num_latent_tokens=tokens, **shape)
    else:
        tokenizer = GigaTok2D(quantizer, reads_input=not plain, **shape)
    return tokenizer, _rename(state, form, plain)


def _check(model: Mapping[str, Any]) -> None:
    """Raise for a config that describes none of the published forms."""
    arguments = model["init_args"]
    for name, value in _FIXED.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{name} must be {value} as in all published GigaTok models; got {arguments[name]!r}")
    causal = (model.get("causal_settings") or {}).get("causal_type")
    if causal is not None:
        raise ValueError(f"causal_type must be None as in all published GigaTok models; got {causal!r}")
    if arguments["encoder_ch_mult"] != arguments["decoder_ch_mult"]:
        raise ValueError(
            f"encoder_ch_mult and decoder_ch_mult must be equal as in all published GigaTok models; got "
            f"{arguments['encoder_ch_mult']} and {arguments['decoder_ch_mult']}"
        )
    layer = arguments.get("transformer_layer_type", _LAYER_TYPES[0])
    if layer not in _LAYER_TYPES:
        raise ValueError(f"transformer_layer_type must be one of {_LAYER_TYPES}; got {layer!r}")


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"these are no weights of GigaTok, or not the config's: there is no {name}")
    return state[name]


def _size(
    state: dict[str, Tensor],
    prefix: str,
    side: str,
    arguments: Mapping[str, Any],
    architecture: Mapping[str, Any],
) -> tuple[int, int, int]:
    """``(width, layers, heads)``: the weights tell the first two, the published name the third."""
    name = arguments.get(f"{side}_size") or arguments.get("model_size")
    width = _tensor(state, f"{prefix}.ln_post.weight").shape[0]
    layers = count(state, rf"{prefix}\.transformer\.(\d+)\.")
    heads = architecture.get(f"size.{name}.num_heads")
    if heads is None:
        if Q_FORMER_SIZES.get(name, ())[:2] != (width, layers):
            raise ValueError(
                f"{side}_size {name!r} of GigaTok is {Q_FORMER_SIZES.get(name, 'not known')} (width, layers, heads), "
                f"but the weights have width {width} and {layers} layers; give {side}_size=({width}, {layers}, heads)"
            )
        heads = Q_FORMER_SIZES[name][2]
    return width, layers, int(heads)


def _rename(state: dict[str, Tensor], form: str, plain: bool) -> dict[str, Tensor]:
    """Weights under our names and in our layout."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".multihead_attn.in_proj_" in name:
            stem, kind = name.split("in_proj_")
            width = tensor.shape[0] // 3
            split[f"{stem}q.{kind}"], split[f"{stem}kv.{kind}"] = tensor[:width], tensor[width:]
        elif name.endswith("positional_embedding"):
            split[name] = tensor.flatten(0, 1)  # (N, D)
        else:
            split[name] = tensor
    attention = rf".blocks.\1.{'attention' if plain else 'self_attention'}."
    rules = (
        *_RULES,
        (_LAYER + r"self_attn\.in_proj_", attention + "qkv."),
        (_LAYER + r"self_attn\.out_proj\.", attention + "out."),
        *_PARTS[form],
    )
    renamed = rename(split, rules, _TRAINING_ONLY)
    pointwise_to_linear(renamed, ("to_quantizer.weight", "from_quantizer.weight", "encoder.out.weight"))
    return renamed
