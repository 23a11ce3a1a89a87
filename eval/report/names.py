"""What the names of metrics mean: a title, a unit, which direction is better, how many digits are worth printing.

Tables, cards, charts and comparisons all ask here, so a number looks the same wherever it stands. A metric that is not
listed is shown under its own name, without a direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MetricName:
    """How a metric is shown.

    Attributes:
        title: for people.
        unit: behind the value; empty for a bare number.
        higher_is_better: ``None`` where neither direction is.
        decimals: behind the point; a small number gets as many as show three digits of it.
        scale: what the value is multiplied with before it is shown (100 for shares in percent).
        definition: one sentence.
    """

    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    decimals: int = 3
    scale: float = 1.0
    definition: str = ""

    def number(self, value: float | None) -> str:
        """The value without its unit; an en dash if there is none."""
        if value is None or not math.isfinite(value):
            return "–"
        value = value * self.scale
        decimals = self.decimals
        if decimals and 0 < abs(value) < 10.0 ** (1 - decimals):
            decimals = min(12, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}".replace("-", "−")

    def text(self, value: float | None) -> str:
        """The value with its unit."""
        number = self.number(value)
        return number if number == "–" or not self.unit else f"{number} {self.unit}"

    @property
    def arrow(self) -> str:
        """``↑`` if higher is better, ``↓`` if lower is."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


NAMES = {
    "rfid": MetricName(
        "rFID",
        "",
        False,
        3,
        definition="Fréchet distance between Gaussians fitted to Inception features of originals and reconstructions.",
    ),
    "rsfid": MetricName(
        "rsFID",
        "",
        False,
        3,
        definition="The Fréchet distance of rFID on spatial Inception features, which notice layout.",
    ),
    "ris": MetricName(
        "rIS",
        "",
        True,
        2,
        definition="Inception score of the reconstructions: confident class predictions that vary over the images.",
    ),
    "ris_std": MetricName("rIS, deviation", "", None, 2, definition="Standard deviation of rIS over its splits."),
    "kid": MetricName(
        "KID",
        "",
        False,
        6,
        definition="Unbiased squared maximum mean discrepancy of Inception features under a cubic kernel.",
    ),
    "kid_std": MetricName("KID, deviation", "", None, 6, definition="Standard deviation of KID over its subsets."),
    "precision": MetricName(
        "Precision",
        "",
        True,
        4,
        definition="Share of reconstructions whose features lie within the manifold of the originals.",
    ),
    "recall": MetricName(
        "Recall",
        "",
        True,
        4,
        definition="Share of originals whose features lie within the manifold of the reconstructions.",
    ),
    "psnr": MetricName(
        "PSNR", "dB", True, 2, definition="Peak signal-to-noise ratio of every image, averaged over the images."
    ),
    "ssim": MetricName(
        "SSIM", "", True, 4, definition="Structural similarity in Gaussian windows of 11 pixels, averaged over images."
    ),
    "ms_ssim": MetricName("MS-SSIM", "", True, 4, definition="Structural similarity over five scales."),
    "lpips_alex": MetricName(
        "LPIPS (AlexNet)", "", False, 4, definition="Learned perceptual distance on AlexNet features, mean over images."
    ),
    "lpips_vgg": MetricName(
        "LPIPS (VGG)", "", False, 4, definition="Learned perceptual distance on VGG-16 features, mean over images."
    ),
    "dists": MetricName(
        "DISTS", "", False, 4, definition="Distance of structure and texture statistics of VGG-16 features."
    ),
    "dino_similarity": MetricName(
        "DINO similarity", "", True, 4, definition="Cosine of the DINOv2 embeddings of original and reconstruction."
    ),
    "clip_similarity": MetricName(
        "CLIP similarity", "", True, 4, definition="Cosine of the CLIP embeddings of original and reconstruction."
    ),
    "usage": MetricName(
        "Codebook usage",
        "%",
        True,
        2,
        100.0,
        definition="Codes used at least once over all tokens that were evaluated; grows with the number of images.",
    ),
    "perplexity": MetricName(
        "Codebook perplexity", "", True, 1, definition="Exponential of the entropy of the codes over all images."
    ),
    "usage_1pct": MetricName(
        "Codes in real use",
        "%",
        True,
        2,
        100.0,
        definition="Codes used at least a hundredth as often as they would be if all were used alike.",
    ),
    "dead_codes": MetricName("Dead codes", "", False, 0, definition="Codes that no image used."),
    "code_entropy": MetricName("Code entropy", "bit", True, 3, definition="Entropy of the codes over all images."),
    "code_entropy_normalised": MetricName(
        "Code entropy, relative",
        "",
        True,
        4,
        definition="Entropy of the codes over the largest possible; 1 is even use.",
    ),
    "digit_entropy": MetricName(
        "Digit entropy", "", True, 4, definition="Mean entropy of the digits of a code over the largest possible."
    ),
    "digit_correlation": MetricName(
        "Digit correlation", "", False, 4, definition="Mean absolute correlation of every two digits of a code."
    ),
    "bits_per_pixel": MetricName(
        "Rate", "bpp", False, 4, definition="Bits per pixel as stored: at a fixed rate for tokens, files for codecs."
    ),
    "bits_per_pixel_entropy": MetricName(
        "Rate, entropy-coded",
        "bpp",
        False,
        4,
        definition="Bits per pixel that an ideal entropy coder with the overall code frequencies would need.",
    ),
    "bits_per_pixel_entropy_position": MetricName(
        "Rate, entropy-coded by position",
        "bpp",
        False,
        4,
        definition="Bits per pixel of an ideal entropy coder that knows the frequencies at every position.",
    ),
    "bytes": MetricName("Size", "B", False, 0, definition="Mean bytes of an image as stored."),
    "type_token_ratio": MetricName("Types per token", "", None, 4, definition="Different words over words in all."),
    "unigram_entropy": MetricName("Word entropy", "bit", None, 3, definition="Entropy of single words."),
    "bigram_entropy": MetricName("Pair entropy", "bit", None, 3, definition="Entropy of pairs of neighbours."),
    "conditional_entropy_left": MetricName(
        "Entropy given the left", "bit", None, 3, definition="Entropy of a word if the one before it is known."
    ),
    "conditional_entropy_above": MetricName(
        "Entropy given above", "bit", None, 3, definition="Entropy of a word if the one above it is known."
    ),
    "mutual_information_left": MetricName(
        "Information from the left", "bit", None, 3, definition="What the word before tells; too large with few tokens."
    ),
    "mutual_information_left_excess": MetricName(
        "Information from the left, excess",
        "bit",
        None,
        3,
        definition="What the word before tells, less what one of another image seems to tell by chance.",
    ),
    "mutual_information_above": MetricName(
        "Information from above", "bit", None, 3, definition="What the word above tells; too large with few tokens."
    ),
    "mutual_information_above_excess": MetricName(
        "Information from above, excess",
        "bit",
        None,
        3,
        definition="What the word above tells, less what one of another image seems to tell by chance.",
    ),
    "zipf_exponent": MetricName(
        "Zipf exponent", "", None, 3, definition="How steeply frequencies fall with the rank; near 1 in text."
    ),
    "zipf_exponent_head": MetricName("Zipf exponent, frequent", "", None, 3, definition="Of the frequent words."),
    "zipf_exponent_tail": MetricName("Zipf exponent, rare", "", None, 3, definition="Of the rare words."),
    "heaps_exponent": MetricName(
        "Heaps exponent", "", None, 3, definition="How fast the number of different words grows with the text."
    ),
    "images_to_90pct_types": MetricName(
        "Images to 90 % of the words", "", None, 0, definition="After how many images 90 % of the words have occurred."
    ),
    "huffman_ratio": MetricName(
        "Huffman ratio", "", None, 4, definition="Size under a Huffman code of the words over that at a fixed rate."
    ),
    "xz_ratio": MetricName(
        "xz ratio", "", None, 4, definition="Size of the tokens under xz over that at a fixed rate."
    ),
    "psnr_of_mean_error": MetricName(
        "PSNR of the mean error", "dB", True, 2, definition="PSNR of the squared error averaged over all images first."
    ),
    "pfid": MetricName("pFID", "", False, 3, definition="Mean rFID over a grid of perturbations of the tokens."),
    "precision_recall": MetricName("Precision and recall"),
    "token_language": MetricName("Token language"),
    "tokbench": MetricName("TokBench"),
    "linear_probe": MetricName("Linear probe"),
    "token_model": MetricName("Token model"),
    "reference": MetricName("Inception on originals"),
    "jpeg": MetricName("JPEG"),
    "webp": MetricName("WebP"),
    "avif": MetricName("AVIF"),
}


def metric_name(name: str) -> MetricName:
    """What a metric is called and how it is shown.

    Parts of a metric (``"usage/0"``, ``"perplexity/semantic"``) are shown like the whole.
    """
    if name in NAMES:
        return NAMES[name]
    whole, _, part = name.partition("/")
    if part and whole in NAMES:
        return replace(NAMES[whole], title=f"{NAMES[whole].title}, {part}", definition="")
    return MetricName(name)


def sort_names(names: set[str] | list[str]) -> list[str]:
    """Metric names in the order in which tables show them: as listed here, then the others by the alphabet."""
    order = {name: place for place, name in enumerate(NAMES)}
    return sorted(set(names), key=lambda name: (order.get(name.partition("/")[0], len(order)), "/" in name, name))
