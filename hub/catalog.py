"""The published tokenizers that :func:`vistok.load` knows by name.

One entry per model: where its authors keep it, what it is, and what they report. Weights that come without a config
beside them are read with the entry's ``config``, written in the authors' own keys, so one reader serves both forms.

Figures are the authors': rFID on the 50 000 validation images of ImageNet at 256x256. Sources: the READMEs and
inference configs of bytedance/1d-tokenizer (arXiv:2406.07550, 2501.07730), turingmotors/One-D-Piece-Tokenizer
(arXiv:2501.10064), SilentView/GigaTok (arXiv:2504.08736), FoundationVision/LlamaGen (arXiv:2406.06525) and
CompVis/taming-transformers (arXiv:2012.09841).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class PublishedModel:
    """A published tokenizer.

    Attributes:
        name: what :func:`vistok.load` takes.
        source: repository ``organisation/name`` of the Hub, or the address of the weights.
        filename: the file within the repository; ``None`` where the repository holds this model only, under a standard
            name, and for addresses.
        files: names under which its weights circulate as a lone file, by which such a file is recognised.
        family: how it is read, see :mod:`vistok.hub.published`.
        config: the smallest published config, in the authors' keys.
        tokens: per image; the largest number for variable lengths.
        grid: ``(h, w)`` of the tokens, ``None`` for 1D sequences.
        codebook: ``(codes, dim)``; ``None`` for continuous latents.
        parameters: of encoder, codebook and decoder.
        rfid: as its authors report it.
        licence: SPDX identifier.
        paper: arXiv id.
        latent_dim: channels of a continuous latent.
        variable_length: whether every prefix of the tokens decodes.
        image_size: side in pixels.
        crop: how the authors crop images for it, ``"center"`` or ``"adm"``.
        sha256: of the weights, where known; checked for addresses (the Hub checks its own files).
        by_hand: whether a person has to fetch the address: Google Drive asks back before it gives large files.
    """

    name: str
    source: str
    filename: str | None
    files: tuple[str, ...]
    family: str
    config: dict[str, Any]
    tokens: int
    grid: tuple[int, int] | None
    codebook: tuple[int, int] | None
    parameters: int
    rfid: float | None
    licence: str
    paper: str
    latent_dim: int | None = None
    variable_length: bool = False
    image_size: int = 256
    crop: str = "center"
    sha256: str | None = None
    by_hand: bool = False

    @property
    def continuous(self) -> bool:
        """Whether its latents are continuous: there are no tokens to store."""
        return self.codebook is None

    @property
    def is_address(self) -> bool:
        """Whether ``source`` is the address of a file rather than a repository."""
        return "://" in self.source

    @property
    def metadata(self) -> dict[str, Any]:
        """What an export of this model says about its origin, see :func:`vistok.save`."""
        origin = self.source if self.is_address else _HUB + self.source
        facts = {"published_model": self.name, "source": origin, "file": self.filename, "license": self.licence}
        facts |= {"paper": f"arXiv:{self.paper}", "published_rfid": self.rfid}
        return {key: value for key, value in facts.items() if value is not None}


def of_name(name: str) -> PublishedModel | None:
    """The entry of that name."""
    return next((model for model in CATALOG if model.name == name), None)


def find(name: str) -> PublishedModel:
    """The entry of that name.

    Raises:
        ValueError: if there is none; names the closest.
    """
    model = of_name(name)
    if model is None:
        raise ValueError(f"there is no published model {name!r}{suggestion(name)}; vistok models lists what is known")
    return model


def suggestion(name: str) -> str:
    """``; did you mean 'titok-l-32'?`` for a name that is close to one of the catalogue, else nothing."""
    close = difflib.get_close_matches(name.lower(), [model.name for model in CATALOG], n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def of_repository(repo_id: str, filename: str | None) -> PublishedModel | None:
    """The entry that a repository, or one file of it, holds."""
    entries = [model for model in CATALOG if model.source == repo_id]
    if filename is None:
        return next((model for model in entries if model.filename is None), None)
    return next((model for model in entries if model.filename in (filename, None)), None) or of_file(filename)


def of_file(filename: str) -> PublishedModel | None:
    """The entry whose weights circulate under a file name."""
    return next((model for model in CATALOG if filename in model.files), None)


def _titok(
    name: str,
    source: str,
    file: str,
    sizes: tuple[str, str],
    tokens: int,
    parameters: int,
    rfid: float,
    codebook: tuple[int, int] | None = None,
    *,
    two_stage: bool = False,
    variable_length: bool = False,
    paper: str = "2406.07550",
) -> PublishedModel:
    """An entry of the TiTok family; models without a codebook are VAEs of 16 channels."""
    latents: dict[str, Any] = {"quantize_mode": "vae", "token_size": 16}
    if codebook is not None:
        latents = {"quantize_mode": "vq", "codebook_size": codebook[0], "token_size": codebook[1]}
        latents |= {"use_l2_norm": two_stage, "commitment_cost": 0.25}
    architecture = {"vit_enc_model_size": sizes[0], "vit_dec_model_size": sizes[1]}
    architecture |= {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "num_latent_tokens": tokens}
    stages = {"finetune_decoder": two_stage, "is_legacy": two_stage}
    model: dict[str, Any] = {"vq_model": {**latents, **architecture, **stages}}
    if variable_length:
        model = {"type": "one_d_piece", "vq_model": {**model["vq_model"], "strict_length_assertion": False}}
    return PublishedModel(
        name=name,
        source=source,
        filename=None,
        files=(file,),
        family="TiTok",
        config={"model": model, "dataset": {"preprocessing": {"crop_size": 256}}},
        tokens=tokens,
        grid=None,
        codebook=codebook,
        parameters=parameters,
        rfid=rfid,
        licence="apache-2.0",
        paper=paper,
        latent_dim=None if codebook is not None else 16,
        variable_length=variable_length,
    )


def _titok_models() -> Iterable[PublishedModel]:
    small, base, large = "small", "base", "large"
    for name, sizes, tokens, parameters, rfid in (
        ("l-32", (large, large), 32, 641_054_735, 2.21),
        ("b-64", (base, base), 64, 204_814_095, 1.70),
        ("s-128", (small, small), 128, 83_674_639, 1.71),
    ):
        short = name.replace("-", "")
        source, file = f"yucornetto/tokenizer_titok_{short}_imagenet", f"tokenizer_titok_{short}.bin"
        yield _titok(f"titok-{name}", source, file, sizes, tokens, parameters, rfid, (4096, 12), two_stage=True)
    for name, sizes, tokens, parameters, rfid in (
        ("bl-64", (base, large), 64, 390_016_148, 2.06),
        ("bl-128", (base, large), 128, 390_179_988, 1.49),
        ("sl-256", (small, large), 256, 330_260_884, 1.03),
    ):
        stem = f"tokenizer_titok_{name.replace('-', '')}_vq8k"
        source = f"yucornetto/{stem}_imagenet"
        yield _titok(f"titok-{name}-vq", source, f"{stem}.bin", sizes, tokens, parameters, rfid, (8192, 64))
    for name, sizes, tokens, parameters, rfid in (
        ("ll-32", (large, large), 32, 606_879_604, 1.61),
        ("bl-64", (base, large), 64, 389_418_100, 1.25),
        ("bl-128", (base, large), 128, 389_581_940, 0.84),
    ):
        stem = f"titok_{name.replace('-', '')}_vae_c16"  # the authors' configs leave out "tokenizer_" here
        source = f"yucornetto/tokenizer_{stem}_imagenet"
        yield _titok(f"titok-{name}-vae", source, f"{stem}.bin", sizes, tokens, parameters, rfid)


def _tatitok_models() -> Iterable[PublishedModel]:
    for name, encoder, tokens, parameters, rfid, codebook in (
        ("bl-32-vq", "base", 32, 390_800_532, 3.95, (8192, 64)),
        ("bl-64-vq", "base", 64, 390_882_452, 2.43, (8192, 64)),
        ("bl-128-vq", "base", 128, 391_046_292, 1.53, (8192, 64)),
        ("bl-32-vae", "base", 32, 390_202_484, 1.53, None),
        ("bl-64-vae", "base", 64, 390_284_404, 1.47, None),
        ("sl-128-vae", "small", 128, 330_275_188, 0.90, None),
    ):
        size, length, kind = name.split("-")
        stem = f"tatitok_{size}{length}_{kind}"
        source, sizes = f"turkeyju/tokenizer_{stem}", (encoder, "large")
        yield _titok(
            f"tatitok-{name}", source, f"{stem}.bin", sizes, tokens, parameters, rfid, codebook, paper="2501.07730"
        )


def _one_d_piece_models() -> Iterable[PublishedModel]:
    for letter, size, parameters, rfid in (
        ("l", "large", 641_742_863, 1.08),
        ("b", "base", 205_256_463, 1.11),
        ("s", "small", 83_871_247, 1.48),
    ):
        yield _titok(
            f"one-d-piece-{letter}-256",
            f"turing-motors/One-D-Piece-{letter.upper()}-256",
            f"one-d-piece_{letter}256.bin",
            (size, size),
            256,
            parameters,
            rfid,
            (4096, 12),
            two_stage=True,
            variable_length=True,
            paper="2501.10064",
        )


def _gigatok(
    name: str, file: str, drive: str, sizes: tuple[str, str], parameters: int, rfid: float, entropy: float = 0.0
) -> PublishedModel:
    arguments = {"codebook_size": 16384, "codebook_embed_dim": 8, "codebook_l2_norm": True, "rot": True}
    arguments |= {"entropy_loss_ratio": entropy, "z_channels": 256, "use_attn": False}
    arguments |= {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]}
    arguments |= {"encoder_size": sizes[0], "decoder_size": sizes[1], "num_latent_tokens": 256}
    arguments |= {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True}
    return PublishedModel(
        name=f"gigatok-{name}",
        source=f"https://drive.google.com/file/d/{drive}/view",
        filename=None,
        files=(file,),
        family="GigaTok",
        config={"model": {"model_cls": "VQVitModelPlus", "init_args": arguments}},
        tokens=256,
        grid=None,
        codebook=(16384, 8),
        parameters=parameters,
        rfid=rfid,
        licence="mit",
        paper="2504.08736",
        crop="adm",
        by_hand=True,
    )


def _gigatok_models() -> Iterable[PublishedModel]:
    # The authors count the head of the alignment with DINOv2 too, which is of no use after training.
    small, base, large = "small", "base", "large"
    file, drive = "VQ_SS256_e100.pt", "1Q_WHCT6mdNnu0GkHCm0CbXaP6kFeTe5h"
    yield _gigatok("s-s", file, drive, (small, small), 129_252_619, 1.01)
    file, drive = "VQ_SB256_e200.pt", "17K-h2Jwep53RUEf6CEOV3ro7Cz_DaIWC"
    yield _gigatok("s-b", file, drive, (small, base), 218_236_939, 0.89)
    file, drive = "VQ_BL256_e200.pt", "1VnBu4aj0N7lFa1_wKBdTgLNZmaNgFvwi"
    yield _gigatok("b-l", file, drive, (base, large), 597_510_923, 0.81)
    file, drive = "VQ_BL256_dino_disc.pt", "11bXyg6y15hIWYnIsl7YbwDtRAJMK7jjn"
    yield _gigatok("b-l-dino", file, drive, (base, large), 597_510_923, 0.51)
    file, drive = "VQ_XLXXL256_e300.pt", "1HK_bV_zklLfGmIHGE4gMwjfhLLKi6Z3G"
    yield _gigatok("xl-xxl", file, drive, ("xl", "xxl"), 2_842_052_875, 0.79, entropy=0.005)


def _llamagen(stride: int, multipliers: list[int], parameters: int, rfid: float) -> PublishedModel:
    file, side = f"vq_ds{stride}_c2i.pt", 256 // stride
    arguments = {"codebook_size": 16384, "codebook_embed_dim": 8, "codebook_l2_norm": True, "z_channels": 256}
    arguments |= {"encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers}
    return PublishedModel(
        name=f"llamagen-vq-{stride}",
        source="FoundationVision/LlamaGen",
        filename=file,
        files=(file,),
        family="LlamaGen VQ",
        config={"model": f"VQ-{stride}", "model_args": arguments},
        tokens=side**2,
        grid=(side, side),
        codebook=(16384, 8),
        parameters=parameters,
        rfid=rfid,
        licence="mit",
        paper="2406.06525",
        crop="adm",
    )


def _taming(codes: int, address: str, parameters: int, rfid: float) -> PublishedModel:
    sizes = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    sizes |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}
    return PublishedModel(
        name=f"taming-f16-{codes}",
        source=address,
        filename=None,
        files=(f"vqgan_imagenet_f16_{codes}.ckpt",),
        family="taming VQGAN",
        config={"model": {"params": {"embed_dim": 256, "n_embed": codes, "ddconfig": sizes}}},
        tokens=256,
        grid=(16, 16),
        codebook=(codes, 256),
        parameters=parameters,
        rfid=rfid,
        licence="mit",
        paper="2012.09841",
    )


_MASKGIT = PublishedModel(
    name="maskgit-vqgan",
    source="fun-research/TiTok",
    filename="maskgit-vqgan-imagenet-f16-256.bin",
    files=("maskgit-vqgan-imagenet-f16-256.bin",),
    family="MaskGIT VQGAN",
    config={
        "channel_mult": [1, 1, 2, 2, 4],
        "num_resolutions": 5,
        "hidden_channels": 128,
        "num_channels": 3,
        "num_res_blocks": 2,
        "resolution": 256,
        "z_channels": 256,
        "num_embeddings": 1024,
        "embedding_dim": 256,
    },
    tokens=256,
    grid=(16, 16),
    codebook=(1024, 256),
    parameters=54_515_587,
    rfid=2.28,
    licence="apache-2.0",
    paper="2202.04200",
)

CATALOG: tuple[PublishedModel, ...] = (
    *_titok_models(),
    *_tatitok_models(),
    *_one_d_piece_models(),
    *_gigatok_models(),
    _MASKGIT,
    _llamagen(16, [1, 1, 2, 2, 4], 71_883_403, 2.19),
    _llamagen(8, [1, 2, 2, 4], 70_109_835, 0.59),
    _taming(1024, "https://heibox.uni-heidelberg.de/f/140747ba53464f49b476/?dl=1", 72_141_699, 7.94),
    _taming(16384, "https://heibox.uni-heidelberg.de/f/867b05fc8c4841768640/?dl=1", 76_073_859, 4.98),
)
