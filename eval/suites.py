"""What a suite measures: which variants, judged by which metrics, and what is left out because something is missing.

``quick`` is what to watch and to compare first: rFID, PSNR, SSIM, LPIPS, use of the codebook. ``standard`` adds the
other numbers that papers report, the language of the tokens, the lengths of a tokenizer of variable length and the
curves of codecs. ``full`` adds pFID and the metrics that look through further networks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..data.files import cache_folder
from .codecs import QUALITIES, codec_variants
from .inception.feature_table import FeatureTable
from .inception.frechet import FrechetInceptionDistance
from .inception.kernel_distance import KernelInceptionDistance
from .inception.network import Inception
from .inception.precision_recall import PrecisionRecall
from .inception.reference import InceptionReference, ReferenceStatistics, load_statistics
from .inception.reference_cache import ReferenceCache
from .inception.score import InceptionScore
from .length import length_variants
from .metric import EvaluationError, Metric, MetricUnavailable
from .perceptual import DISTS, LPIPS
from .protocol import Protocol
from .rate_distortion import RateMetric
from .reconstruction import PSNR
from .report.gallery import Gallery
from .runner import Evaluation, Pass
from .similarity import CLIPSimilarity, DINOSimilarity
from .structural import MSSSIM, SSIM
from .tokens.code_neighbours import code_digits
from .tokens.language import TokenLanguage
from .tokens.pfid import perturbed_variants
from .tokens.store import TokenStore
from .tokens.usage import CodebookUsage
from .variants import Codes, GivenVariant, OriginalsVariant, TokenizerVariant, Variant
from .weights import Weights

logger = logging.getLogger(__name__)

SuiteName = Literal["quick", "standard", "full"]
CODECS = ("jpeg", "webp", "avif")
CODEC_SCALES = (1.0, 0.5, 0.25)
PREVIEWS, EXTREMES = 8, 8


@dataclass(frozen=True)
class Settings:
    """What a suite is made from.

    Attributes:
        suite: its name.
        protocol: how to measure.
        weights: where judging networks find their weights.
        device: to compute on.
        numbers: of the images that will be evaluated, ascending.
        manifest: names the dataset, to find cached statistics of the originals; none are kept if empty.
        reference: statistics file that takes the place of the originals in rFID.
        lengths: numbers of tokens to decode; the powers of two if ``None``, in suites that look at lengths.
        previews: how many images to show whatever they look like.
        extremes: how many of the best, and of the worst, to show.
    """

    suite: SuiteName
    protocol: Protocol
    weights: Weights
    device: torch.device
    numbers: np.ndarray
    manifest: str = ""
    reference: Path | None = None
    lengths: tuple[int, ...] | None = None
    previews: int = PREVIEWS
    extremes: int = EXTREMES

    @property
    def image_size(self) -> tuple[int, int]:
        return self.protocol.height, self.protocol.width


@dataclass
class Suite:
    """A plan of measurements.

    Attributes:
        protocol: the one asked for, with what the suite adds: hashes of weights and of reference statistics.
        build: makes the evaluations with empty metrics.
        skipped: metrics left out -> why.
        finish: called with what was found, before anything is computed from it.
        manifest: names the dataset, see :class:`Settings`; a resumed run must have the same.
    """

    protocol: Protocol
    build: Callable[[], list[Evaluation]]
    skipped: dict[str, str] = field(default_factory=dict)
    finish: Callable[[Pass], None] = lambda found: None
    manifest: str = ""

    @property
    def plan(self) -> dict[str, list[str]]:
        """Names of the metrics of every variant: a resumed run must have the same."""
        return {evaluation.variant.name: list(evaluation.metrics) for evaluation in self.build()}


def tokenizer_suite(settings: Settings, codes: Codes) -> Suite:
    """The suite for a tokenizer.

    Raises:
        ValueError: for lengths that the tokenizer does not have, or weights that are not the published ones.
        FileNotFoundError: if a statistics file is missing.
    """
    return _Builder(settings, codes).suite(TokenizerVariant(codes))


def images_suite(settings: Settings) -> Suite:
    """The suite for reconstructions that came as files; they have no tokens.

    Raises:
        ValueError: for weights that are not the published ones.
        FileNotFoundError: if a statistics file is missing.
    """
    return _Builder(settings, None).suite(GivenVariant())


class _Builder:
    """Loads what is shared, notes what is missing, and lists the metrics."""

    def __init__(self, settings: Settings, codes: Codes | None) -> None:
        self.settings, self.codes = settings, codes
        self.skipped: dict[str, str] = {}
        self.protocol = settings.protocol
        self.loaded: ReferenceStatistics | None = None
        self.cache, self.cache_key = ReferenceCache(cache_folder() / "references"), ""
        self.inception = self._inception()
        self.trunks = {name: self._weights(name, metric) for name, metric in self._trunk_names().items()}
        self.protocol = replace(self.protocol, other_weights=settings.weights.unpublished())

    @property
    def thorough(self) -> bool:
        return self.settings.suite != "quick"

    @property
    def full(self) -> bool:
        return self.settings.suite == "full"

    def suite(self, main: Variant) -> Suite:
        discrete = self.codes is not None and bool(self.codes.tokenizer.layout())
        lengths = self._lengths() if discrete else []
        codecs = self._codecs() if self.thorough else []
        perturbed = self._perturbed() if self.full and discrete else []

        def build() -> list[Evaluation]:
            evaluations = []
            reference = self._reference()
            if reference is not None:
                evaluations.append(Evaluation(OriginalsVariant(), {"reference": reference}))
            evaluations.append(Evaluation(main, self._main_metrics(reference, discrete)))
            for variant in lengths:
                metrics = self._pixels() | self._rfid(reference) | self._rate() | self._gallery(0)
                evaluations.append(Evaluation(variant, metrics))
            for variant in codecs:
                metrics = self._pixels() | (self._rfid(reference) if self.full else {}) | self._rate()
                evaluations.append(Evaluation(variant, metrics))
            for variant in perturbed:
                evaluations.append(Evaluation(variant, self._pixels() | self._rfid(reference)))
            return evaluations

        build()  # notes what is missing
        return Suite(self.protocol, build, self.skipped, self._finish, self.settings.manifest)

    def _main_metrics(self, reference: InceptionReference | None, discrete: bool) -> dict[str, Metric]:
        metrics = self._pixels()
        if self.thorough:
            metrics |= self._try("ms_ssim", lambda: MSSSIM(self.settings.image_size))
            metrics |= self._lpips("vgg")
        if self.full:
            metrics |= self._similarities()
        metrics |= self._rfid(reference)
        if self.thorough and reference is not None:
            metrics |= self._inception_metrics(reference)
        if discrete:
            metrics |= self._token_metrics()
            metrics |= self._rate()
        return metrics | self._gallery(self.settings.extremes)

    def _pixels(self) -> dict[str, Metric]:
        """What every variant is judged by."""
        metrics: dict[str, Metric] = {"psnr": PSNR()}
        metrics |= self._try("ssim", lambda: SSIM(self.settings.image_size))
        return metrics | self._lpips("alex")

    def _lpips(self, net: str) -> dict[str, Metric]:
        weights = self.trunks.get({"alex": "alexnet", "vgg": "vgg16"}[net])
        if weights is None:
            return {}
        return self._try(f"lpips_{net}", lambda: LPIPS(net, weights=weights, image_size=self.settings.image_size))

    def _similarities(self) -> dict[str, Metric]:
        size, weights = self.settings.image_size, self.trunks["vgg16"]
        metrics = {} if weights is None else self._try("dists", lambda: DISTS(weights=weights, image_size=size))
        if weights is None:
            self.skipped.setdefault("dists", self.skipped["lpips_vgg"])
        download = self.settings.weights.download
        for name, metric in (("dino_similarity", DINOSimilarity), ("clip_similarity", CLIPSimilarity)):
            if name not in self.skipped:
                file = self.settings.weights.optional(name)
                metrics |= self._try(name, lambda metric=metric, file=file: metric(file, download=download))
        return metrics

    def _rfid(self, reference: InceptionReference | None) -> dict[str, Metric]:
        if reference is None:
            return {}
        return self._try("rfid", lambda: FrechetInceptionDistance(self.inception, reference))

    def _inception_metrics(self, reference: InceptionReference) -> dict[str, Metric]:
        table = FeatureTable(self.inception)
        score = InceptionScore(self.inception, self.settings.numbers, self.protocol.inception_score)
        metrics: dict[str, Metric] = {"ris": score}
        metrics |= self._try("rsfid", lambda: FrechetInceptionDistance(self.inception, reference, "spatial"))
        compared = self._try("kid", lambda: KernelInceptionDistance(table, reference))
        compared |= self._try("precision_recall", lambda: PrecisionRecall(table, reference, seed=self.protocol.seed))
        return metrics | ({"features": table} | compared if compared else {})

    def _token_metrics(self) -> dict[str, Metric]:
        tokenizer = self.codes.tokenizer
        store = TokenStore()
        huge = max(tokenizer.codebook_sizes) > 1 << 20
        keep = store if self.thorough or huge else None
        metrics: dict[str, Metric] = {} if keep is None else {"tokens": store}
        metrics["codebook"] = CodebookUsage(tokenizer.codebook_sizes, code_digits(tokenizer), keep)
        if self.thorough:
            metrics["token_language"] = TokenLanguage(store, tokenizer.codebook_sizes)
        return metrics

    def _rate(self) -> dict[str, Metric]:
        return {"rate": RateMetric()}

    def _gallery(self, extremes: int) -> dict[str, Metric]:
        numbers = self.settings.numbers
        count = min(self.settings.previews, len(numbers))
        shown = [int(numbers[i * len(numbers) // count]) for i in range(count)]
        return {"gallery": Gallery(shown, extremes)}

    def _reference(self) -> InceptionReference | None:
        if self.inception is None:
            return None
        return InceptionReference(self.inception, spatial=self.thorough, features=self.thorough, loaded=self.loaded)

    def _inception(self) -> Inception | None:
        """The network, and what is known of the originals already."""
        settings, protocol = self.settings, self.protocol
        names = ["rfid", *(("rsfid", "ris", "kid", "precision_recall") if self.thorough else ())]
        try:
            path = settings.weights.find("inception")
            inception = Inception(path, resize=protocol.resize, dtype=protocol.extractor_dtype, device=settings.device)
        except MetricUnavailable as reason:
            self.skipped |= dict.fromkeys(names, str(reason))
            return None
        self.protocol = protocol = replace(protocol, extractor_sha256=settings.weights.sha256(path))
        if settings.reference is not None:
            self.loaded = load_statistics(settings.reference)
            digest = hashlib.sha256(settings.reference.read_bytes()).hexdigest()[:16]
            self.protocol = replace(protocol, reference=f"{settings.reference.name}:{digest}")
        elif settings.manifest:
            self.cache_key = _cache_key(settings, protocol)
            self.loaded = self.cache.load(self.cache_key, spatial=self.thorough, features=self.thorough)
        return inception

    def _finish(self, found: Pass) -> None:
        """Keep the statistics of the originals, or see that those that were kept are of the same pixels.

        Raises:
            EvaluationError: if they are not.
        """
        reference = found.metric("originals", "reference")
        if not self.cache_key or not isinstance(reference, InceptionReference) or found.unreadable:
            return
        if self.loaded is None:
            try:
                self.cache.save(self.cache_key, reference.statistics(), found.dataset)
            except (MetricUnavailable, OSError) as error:  # one image; a full disk, or another evaluation that keeps it
                logger.warning("statistics of the originals are not kept for the next evaluation: %s", error)
        elif self.loaded.content != found.dataset:
            folder = self.cache.folder / self.cache_key
            raise EvaluationError(
                f"the originals are not those whose statistics are kept in {folder}: delete that folder and begin again"
            )

    def _trunk_names(self) -> dict[str, str]:
        return {"alexnet": "lpips_alex", **({"vgg16": "lpips_vgg"} if self.thorough else {})}

    def _weights(self, name: str, metric: str) -> Path | None:
        try:
            return self.settings.weights.find(name)
        except MetricUnavailable as reason:
            self.skipped[metric] = str(reason)
            return None

    def _lengths(self) -> list[Variant]:
        if self.settings.lengths is None and not (self.thorough and self.codes.tokenizer.variable_length):
            return []
        return [*length_variants(self.codes, self.settings.lengths, self.settings.image_size)]

    def _codecs(self) -> list[Variant]:
        if self.full:
            variants, skipped = codec_variants(CODECS, QUALITIES, CODEC_SCALES)
        else:
            some = {name: grid[::2] for name, grid in QUALITIES.items()}
            variants, skipped = codec_variants(CODECS, some)
            reduced, _ = codec_variants(CODECS[1:2], some, CODEC_SCALES[-1:])  # reaches the rates of tokenizers
            variants += reduced
        self.skipped |= skipped
        return [*variants]

    def _perturbed(self) -> list[Variant]:
        try:
            return [*perturbed_variants(self.codes, seed=self.protocol.seed)]
        except MetricUnavailable as reason:
            self.skipped["pfid"] = str(reason)
            return []

    def _try(self, name: str, make: Callable[[], Metric]) -> dict[str, Metric]:
        """``{name: make()}``, or nothing and a note why."""
        try:
            return {name: make()}
        except MetricUnavailable as reason:
            self.skipped[name] = str(reason)
            return {}


def _cache_key(settings: Settings, protocol: Protocol) -> str:
    """Names the reference: which pixels, through which network."""
    fields = ("height", "width", "crop", "extractor", "extractor_sha256", "resize", "extractor_dtype")
    values = {name: getattr(protocol, name) for name in fields}
    values |= {"manifest": settings.manifest, "numbers": hashlib.sha256(settings.numbers.tobytes()).hexdigest()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]
