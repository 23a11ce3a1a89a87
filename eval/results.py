"""What an evaluation leaves behind, ``results.json``: numbers, their protocol, and what is missing from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import atomic_write
from .protocol import Protocol

FORMAT = 1


@dataclass
class VariantResult:
    """What one way to a reconstruction scored.

    Attributes:
        name: of the variant: ``"reconstruction"``, ``"length=32"``, ``"jpeg/q=50"`` ...
        kind: ``"reconstruction"``, ``"length"``, ``"perturbed"`` or ``"codec"``.
        settings: what tells it from others of its kind.
        bits_per_pixel: mean over the images; ``None`` if unknown.
        metrics: values by name.
        details: tables and curves behind them, by the name of their metric.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    bits_per_pixel: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """Everything that an evaluation found.

    Attributes:
        subject: what was evaluated: ``name``, ``kind`` (``tokenizer`` or ``images``), and for a tokenizer its class,
            parameters, tokens, codebooks, bits per image.
        data: what it was evaluated on: ``name``, ``num_images``.
        protocol: how.
        evaluated: images that the numbers rest on.
        expected: images that they should rest on.
        variants: ``"reconstruction"`` first.
        sections: what is not a number of a variant, by name: ``pfid``, ``tokbench``, ``rate_distortion``,
            ``linear_probe``, ``token_model`` ...; JSON data.
        skipped: metric -> why it was not computed, one line.
        unreadable: images that could not be read, one line each.
        partial: why this is not a whole result (a subset, unreadable images, an interrupted run); empty if it is whole.
        timing: seconds by stage.
        version: of Vistok.
    """

    subject: dict[str, Any]
    data: dict[str, Any]
    protocol: Protocol
    evaluated: int
    expected: int
    variants: list[VariantResult] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    partial: str = ""
    timing: dict[str, float] = field(default_factory=dict)
    version: str = ""

    @property
    def main(self) -> VariantResult:
        """The plain reconstruction."""
        return self.variants[0]

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all. Numbers that are not finite become ``null``."""
        values = {"format": FORMAT, **asdict(self), "protocol_hash": self.protocol.hash}
        with atomic_write(path) as file:
            file.write(json.dumps(finite(values), indent=1, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a result, one of another format, or one whose protocol was edited.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a result of vistok evaluate: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path} is not a result of format {FORMAT}; got {found!r}")
        try:
            values.pop("format")
            stated = values.pop("protocol_hash")
            values["protocol"] = Protocol.from_dict(values["protocol"])
            values["variants"] = [VariantResult(**variant) for variant in values["variants"]]
            results = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole result of vistok evaluate: {error}") from error
        if results.protocol.hash != stated:
            raise ValueError(f"{path}: the protocol does not have the hash {stated} that stands beside it")
        return results


def finite(value: Any) -> Any:
    """JSON data with ``None`` for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
