"""How a number was measured, as a record that travels with it.

Reference images, crop, filter, rounding, network, its input resize: published numbers differ in all of them and rarely
say so. Two numbers may stand in one table if their protocols have one hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

Crop = Literal["adm", "center", "none"]
Rounding = Literal["nearest", "half_up", "truncate", "given"]
Resize = Literal["tf1", "torch", "antialias", "clean"]
InceptionScore = Literal["torch-fidelity", "adm", "one-split"]


@dataclass(frozen=True)
class Protocol:
    """What has to be equal for two results to be comparable.

    Attributes:
        preset: name of the convention that the other fields began from.
        dataset: hash of the original pixels that were evaluated, whatever their order; empty until they are known.
        num_images: how many there are.
        height: of the images, in pixels.
        width: of the images, in pixels.
        crop: how originals were brought to that size: ``adm`` (box halvings, bicubic; through PIL), ``center``
            (bicubic with antialias, torchvision), ``none`` (they had it).
        rounding: how reconstructions became uint8; ``given`` for those that came as files.
        reference: ``paired`` (the originals themselves), or a file of statistics and its SHA-256.
        extractor: network behind rFID and its relatives.
        extractor_sha256: of its weights; empty if it did not run.
        resize: how images reach the network's 299 x 299: ``tf1`` (TensorFlow 1 bilinear), ``torch`` (half-pixel
            bilinear), ``antialias`` (with antialias), ``clean`` (PIL's bicubic filter on float channels).
        extractor_dtype: the network computes in ``float32``, ``float64`` or, opt-in, ``tf32`` or ``bfloat16``.
        inception_score: splits and order of the inception score.
        psnr: how images are averaged.
        ssim: window of SSIM.
        precision: of the tokenizer: ``32``, ``bf16`` or ``fp16``.
        other_weights: files that took the place of published weights of judging networks, with the beginnings of their
            SHA-256; empty if none did.
        weights: ``released``: those that load by default, of a training checkpoint the moving average; or ``raw``.
        seed: of perturbations, subsets and stochastic decoders.
    """

    preset: str = "torch-fidelity"
    dataset: str = ""
    num_images: int = 0
    height: int = 0
    width: int = 0
    crop: Crop = "adm"
    rounding: Rounding = "nearest"
    reference: str = "paired"
    extractor: str = "inception-v3-compat"
    extractor_sha256: str = ""
    resize: Resize = "tf1"
    extractor_dtype: Literal["float32", "float64", "tf32", "bfloat16"] = "float32"
    inception_score: InceptionScore = "torch-fidelity"
    psnr: Literal["per-image"] = "per-image"
    ssim: Literal["gaussian-11"] = "gaussian-11"
    precision: Literal["32", "bf16", "fp16"] = "32"
    other_weights: str = ""
    weights: Literal["released", "raw"] = "released"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (
            ("crop", Crop),
            ("rounding", Rounding),
            ("resize", Resize),
            ("inception_score", InceptionScore),
            ("extractor_dtype", Literal["float32", "float64", "tf32", "bfloat16"]),
            ("precision", Literal["32", "bf16", "fp16"]),
            ("weights", Literal["released", "raw"]),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")

    @property
    def hash(self) -> str:
        """Twelve hex digits that change with every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """The fields in which two protocols differ, with both values."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: values for name, values in pairs.items() if values[0] != values[1]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Protocol:
        """A protocol out of JSON data.

        Raises:
            ValueError: for fields that are missing or unknown, or values that are not allowed.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = sorted(set(values) ^ names)
            raise ValueError(f"a protocol of another version: {', '.join(odd)} missing or unknown")
        return cls(**values)


PRESETS = {
    "torch-fidelity": Protocol(),
    "adm": Protocol("adm", rounding="half_up", inception_score="adm"),
    "titok": Protocol("titok", crop="center", extractor_dtype="float64", inception_score="one-split"),
    "pytorch-fid": Protocol("pytorch-fid", crop="center", resize="torch"),
    "clean-fid": Protocol("clean-fid", resize="clean"),
}


def preset(name: str, **changes: Any) -> Protocol:
    """A named convention, with some fields changed.

    Raises:
        ValueError: for an unknown name or value.
    """
    if name not in PRESETS:
        raise ValueError(f"protocol must be one of {', '.join(PRESETS)}; got {name!r}")
    return replace(PRESETS[name], **changes)
