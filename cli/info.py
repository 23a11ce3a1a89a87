"""``vistok info``: what a tokenizer is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.load import Loaded


# The option is called --json, so the parameter is.
def info(tokenizer: str, *, json: bool = False) -> int:
    """Print class, parameters, image size, tokens, codebooks and bits of a tokenizer.

    Args:
        tokenizer: Folder, training checkpoint, run folder, repository or published name.
        json: Print JSON.

    Returns:
        0.

    Raises:
        CommandError: if the tokenizer cannot be loaded.
    """
    import torch

    from .batches import open_tokenizer

    facts = tokenizer_facts(open_tokenizer(tokenizer, torch.device("cpu")))
    print(_to_json(facts) if json else _to_text(facts))
    return 0


def tokenizer_facts(loaded: Loaded) -> dict[str, Any]:
    """What there is to say about a tokenizer, as JSON-able data."""
    from ..hub.format import describe_streams, latent_shape

    tokenizer = loaded.tokenizer
    layout, (height, width) = tokenizer.layout(), tokenizer.image_size
    bits = sum(stream.length * stream.bits for stream in layout)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    total = sum(parameter.numel() for parameter in tokenizer.parameters())
    return {
        "class": tokenizer.config["class_path"],
        "source": loaded.source,
        "fingerprint": loaded.fingerprint,
        "parameters": {"total": total, **{name: count for name, count in parts.items() if count}},
        "image": {
            "size": [height, width],
            "stride": tokenizer.stride,
            "any_image_size": tokenizer.any_image_size,
            "crop": loaded.crop,
        },
        "streams": describe_streams(layout),
        "latents": latent_shape(tokenizer),
        "tokens": sum(stream.length for stream in layout),
        "variable_length": tokenizer.variable_length,
        "takes_text": tokenizer.takes_context,
        "bits_per_image": bits,
        "bits_per_pixel": bits / (height * width),
        "metadata": loaded.metadata,
    }


def _to_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2)


def _to_text(facts: dict[str, Any]) -> str:
    from ..hub.format import codebook_text

    image = facts["image"]
    height, width = image["size"]
    sizes = f"any size divisible by {image['stride']}" if image["any_image_size"] else "this size only"
    lines = [
        ("class", facts["class"]),
        ("from", facts["source"]),
        ("fingerprint", facts["fingerprint"]),
        ("parameters", f"{facts['parameters']['total']:,}"),
    ]
    lines += [(f"  {name}", f"{count:,}") for name, count in facts["parameters"].items() if name != "total"]
    lines.append(("image", f"{height}x{width}, {sizes}, crop {image['crop']}"))
    for stream in facts["streams"]:
        grid = f" ({stream['grid'][0]}x{stream['grid'][1]} grid)" if stream["grid"] else ""
        codebooks = codebook_text(stream["codebook_sizes"])
        length = f"1 to {stream['length']}" if facts["variable_length"] else stream["length"]
        lines.append((f"stream {stream['name']}", f"{length} tokens{grid}, codebook {codebooks}"))
    if facts["latents"]:
        lines.append(("latents", f"{facts['latents'][0]} of {facts['latents'][1]} channels, continuous: no tokens"))
    else:
        lines.append(("bits", f"{facts['bits_per_image']:g} per image, {facts['bits_per_pixel']:.4g} per pixel"))
    if facts["takes_text"]:
        lines.append(("text", "the decoder needs text features"))
    lines += [(key, json.dumps(value)) for key, value in facts["metadata"].items()]
    return "\n".join(f"{name:<16}{text}" for name, text in lines)
