"""What a full evaluation finds besides the pass over the data: legible text, the language of the tokens, a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.source import ImageSource
from .evaluate import UNFINISHED, manifest
from .metric import MetricUnavailable
from .probes.features import PooledFeatures, extract_features, kinds_of
from .probes.linear import linear_probe, num_steps
from .probes.token_model import token_model_probe
from .runner import Pass
from .suites import Settings
from .tokbench.suite import Progress, silent, tokbench
from .tokens.store import TokenStore
from .variants import Codes

_MODEL_STEPS = 300


@dataclass(frozen=True)
class TokenizerSections:
    """Makes the sections of a tokenizer's results from its pass; says which it had to skip and why.

    Attributes:
        settings: of the suite. ``full`` has TokBench on generated pages and the autoregressive token model.
        codes: the tokenizer.
        source: the images that are evaluated.
        transform: brings them to size.
        out: folder of the results; a run that is killed goes on from what it keeps there.
        probe_source: labelled training images for the linear probe; there is none without.
        batch_size: images at a time.
        num_workers: processes that read.
        subject: names the weights of the tokenizer.
        progress: opens progress bars.
    """

    settings: Settings
    codes: Codes
    source: ImageSource
    transform: Callable[[Tensor], Tensor]
    out: Path
    probe_source: ImageSource | None = None
    batch_size: int = 32
    num_workers: int = 0
    subject: str = ""
    progress: Progress = silent

    def __call__(self, found: Pass) -> tuple[dict[str, Any], dict[str, str]]:
        """Sections by name, and reasons by the name of those that are missing."""
        makers: dict[str, Callable[[], dict[str, Any]]] = {}
        if self.settings.suite == "full":
            makers["tokbench"] = self._tokbench
            store = found.metric("reconstruction", "tokens")
            if isinstance(store, TokenStore):
                makers["token_model"] = lambda: self._token_model(store)
        if self.probe_source is not None:
            makers["linear_probe"] = lambda: self._linear_probe(found.index.numpy())
        sections: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        for name, make in makers.items():
            try:
                sections[name] = make()
            except MetricUnavailable as reason:
                skipped[name] = str(reason)
        return sections, skipped

    def _tokbench(self) -> dict[str, Any]:
        height, width = self.settings.image_size
        if height != width:
            raise MetricUnavailable(f"TokBench needs square images; got {height} x {width}")
        device, subject = self.settings.device, self.subject
        work = self.out / UNFINISHED
        return tokbench(self.codes, height, work, device=device, subject=subject, progress=self.progress)

    def _token_model(self, store: TokenStore) -> dict[str, Any]:
        small = sum(sum(stream.codebook_sizes) for stream in store.layout) <= 1 << 31
        dtype = torch.int32 if small else torch.int64
        tokens = torch.cat([block.flatten().to(dtype) for block in store.blocks()])  # (N, L)
        pixels = self.settings.protocol.height * self.settings.protocol.width
        seed, device = self.settings.protocol.seed, self.settings.device
        with self.progress("token model", _MODEL_STEPS) as advance:
            return token_model_probe(
                tokens, store.layout, pixels, steps=_MODEL_STEPS, seed=seed, device=device, advance=advance
            )

    def _linear_probe(self, evaluated: np.ndarray) -> dict[str, Any]:
        train = self._features(self.probe_source, "training", None)
        val = self._features(self.source, "evaluated", evaluated)
        seed, device = self.settings.protocol.seed, self.settings.device
        results = {}
        for kind in train:
            with self.progress(f"linear probe, {kind}", num_steps(len(train[kind]))) as advance:
                results[kind] = linear_probe(train[kind], val[kind], seed=seed, device=device, advance=advance)
        return results

    def _features(self, source: ImageSource, name: str, chosen: np.ndarray | None) -> dict[str, PooledFeatures]:
        protocol = self.settings.protocol
        with self.progress(f"features, {name}", len(source) if chosen is None else len(chosen)) as advance:
            return extract_features(
                self.codes.tokenizer,
                source,
                self.transform,
                self.out / UNFINISHED / "features" / name,
                kinds_of(self.codes.tokenizer),
                self.batch_size,
                self.num_workers,
                self.settings.device,
                advance,
                plan={
                    "subject": self.subject,
                    "images": manifest(source) or len(source),
                    "size": [protocol.height, protocol.width],
                    "crop": protocol.crop,
                },
                chosen=chosen,
                autocast=self.codes.autocast,
            )
