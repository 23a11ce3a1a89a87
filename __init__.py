"""Vistok: train, evaluate and ship discrete visual tokenizers.

The public names are imported when first used, so ``import vistok`` costs nothing: no torch, no Lightning.

>>> import vistok
>>> tokenizer = vistok.load("path-or-hub-id")        # doctest: +SKIP
>>> tokens = tokenizer.encode(images)                # doctest: +SKIP
>>> images = tokenizer.decode(tokens)                # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Tokens": "tokenizers.base",
    "Stream": "tokenizers.base",
    "Tokenizer": "tokenizers.base",
    "TokenizerOutput": "tokenizers.base",
    "AutoencoderTokenizer": "tokenizers.autoencoder",
    "TiTok": "tokenizers.titok",
    "TwoStageTiTok": "tokenizers.titok",
    "TATiTok": "tokenizers.ta_titok",
    "OneDPiece": "tokenizers.one_d_piece",
    "ContinuousTiTok": "tokenizers.continuous",
    "GaussianTokenizer": "tokenizers.continuous",
    "GigaTok": "tokenizers.gigatok",
    "GigaTok2D": "tokenizers.gigatok",
    "VQGAN": "tokenizers.vqgan",
    "MaskGITVQGAN": "tokenizers.maskgit_vqgan",
    "Quantizer": "quantizers.base",
    "Quantized": "quantizers.base",
    "VectorQuantizer": "quantizers.vq",
    "SimVQ": "quantizers.sim_vq",
    "IndexBackpropQuantizer": "quantizers.ibq",
    "GumbelQuantizer": "quantizers.gumbel",
    "LookupFreeQuantizer": "quantizers.lfq",
    "BinarySphericalQuantizer": "quantizers.bsq",
    "BernoulliQuantizer": "quantizers.bernoulli",
    "FiniteScalarQuantizer": "quantizers.fsq",
    "ScalarQuantizer": "quantizers.scalar",
    "Grouped": "quantizers.grouped",
    "Factorized": "quantizers.factorized",
    "Residual": "quantizers.residual",
    "MultiScaleResidual": "quantizers.multi_scale",
    "Product": "quantizers.product",
    "SharedIndex": "quantizers.shared_index",
    "LatentPerturbation": "quantizers.perturbation",
    "TailTokenDrop": "regularizers.tail_drop",
    "load": "hub.load",
    "save": "hub.save",
    "push": "hub.save",
    "load_tokens": "hub.token_files",
    "save_tokens": "hub.token_files",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
