"""The model card: ``README.md`` of an export, with the YAML header that model hubs index."""

from __future__ import annotations

import json
from typing import Any

from .format import codebook_text

HEADER_KEYS = ("license", "datasets", "base_model", "language")


def model_card(config: dict[str, Any], name: str) -> str:
    """Markdown of the card.

    Args:
        config: the content of ``config.json``. Of its ``metadata``, ``license``, ``datasets``, ``base_model``,
            ``language`` and ``tags`` go into the header, and ``metrics`` (name to value) becomes a table.
        name: what a reader passes to ``vistok.load``: a repository id or a folder.
    """
    metadata = config["metadata"]
    metrics = metadata.get("metrics", {})
    header = {
        "library_name": "vistok",
        "pipeline_tag": "image-to-image",
        "tags": ["vistok", "image-tokenizer", *metadata.get("tags", [])],
        **{key: metadata[key] for key in HEADER_KEYS if key in metadata},
    }
    if metrics:
        header["metrics"] = list(metrics)
    lines = ["---"]
    # JSON values are YAML values, quoted where they need it.
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    lines += ["---", "", f"# {name.rsplit('/', 1)[-1]}", "", _summary(config), ""]
    lines += ["```python", "import vistok", f"tokenizer = vistok.load({json.dumps(name)})"]
    kind = "tokens" if config["tokens"]["streams"] else "latents"
    suffix = "" if kind == "tokens" else "_latents"
    lines += [f"{kind} = tokenizer.encode{suffix}(images)  # images: (B, 3, H, W) float in [0, 1]"]
    context = ", context=features)  # (B, T, C), of the text" if config["takes_context"] else ")"
    lines += [f"images = tokenizer.decode{suffix}({kind}{context}", "```", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *[f"| {key} | {value} |" for key, value in metrics.items()], ""]
    return "\n".join(lines)


def _summary(config: dict[str, Any]) -> str:
    """One sentence: class, origin, image size, tokens, rate, parameters."""
    height, width = config["image"]["size"]
    kind = config["tokenizer"]["class_path"].rsplit(".", 1)[-1]
    if config["tokens"]["streams"]:
        nature = "discrete"
        bits = config["tokens"]["bits"]
        tokens = " + ".join(
            f"{stream['length']} {stream['name']} tokens of {codebook_text(stream['codebook_sizes'])} codes"
            for stream in config["tokens"]["streams"]
        )
        content = f"{tokens}, {bits:g} bits per image ({bits / (height * width):.4g} per pixel)"
    else:
        nature = "continuous"
        content = "{} latents of {} channels".format(*config["latents"])
    published = config["metadata"].get("published_model")
    origin = "made with" if published is None else f"released as {published}, converted to"
    return (
        f"A {nature} image tokenizer ({kind}), {origin} Vistok: {height}x{width} images as {content}, "
        f"{config['parameters'] / 1e6:.1f} M parameters."
    )
