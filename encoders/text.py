"""Captions to features: the frozen text tower of CLIP that TA-TiTok's decoder reads (arXiv:2501.07730).

All 77 token outputs after the final norm, neither pooled nor projected, of OpenAI's ViT-L/14 at 336 pixels
(arXiv:2103.00020), built by open_clip. Only the text half is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.frozen import Frozen
from ..layers.weights_file import read_weights_file

_REPOSITORY = "timm/vit_large_patch14_clip_336.openai"
_FILE = "open_clip_model.safetensors"
_CONTEXT, _VOCABULARY = 77, 49408


class OpenCLIPText(nn.Module):
    """Features of captions; frozen, in no state dict.

    Args:
        weights: file of the weights of the CLIP model (its text half is enough), safetensors or a pickle of tensors,
            with open_clip's key names; a download from the Hugging Face Hub if ``None``.
        width: C, width of the features.
        layers: transformer layers.
        heads: attention heads.
        precision: what the tower computes in; the features are float32 either way.

    Attributes:
        dim: C.
        num_tokens: length of every sequence, 77.

    Raises:
        ImportError: if open_clip is not installed.
        ValueError: for an unknown precision, or a file that is not the weights of this tower.
        FileNotFoundError: if the weights are neither given nor to be downloaded.
    """

    num_tokens = _CONTEXT

    def __init__(
        self,
        weights: str | None = None,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16'; got {precision!r}")
        open_clip = _open_clip()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.dim = width
        self.precision = precision
        tower = TextTransformer(
            context_length=_CONTEXT,
            vocab_size=_VOCABULARY,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=None,  # features are wanted before the projection
            act_layer=QuickGELU,  # what OpenAI's models were trained with
            output_tokens=True,
        )
        _load(tower, weights)
        self.frozen = Frozen(tower)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=_CONTEXT)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(B, 77)`` int64 on the CPU: start, the caption, end, zeros. What is too long is cut."""
        return self._tokenizer(list(texts))

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Features ``(B, 77, C)`` float32 of B captions, on the device of the tower."""
        device = self.frozen.network.positional_embedding.device
        ids = self.tokenize(texts)
        if device.type == "cuda":
            ids = ids.pin_memory()  # so that the copy does not wait for the device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            _, features = self.frozen.network(ids.to(device, non_blocking=True))  # (B, 77, C)
        return features.float()


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("OpenCLIPText needs open_clip: pip install 'vistok[text]' or open_clip_torch") from error
    return open_clip


def _load(tower: nn.Module, path: str | None) -> None:
    remedy = (
        f"fetch https://huggingface.co/{_REPOSITORY}/resolve/main/{_FILE} on a machine with internet access and give "
        f"its path as weights"
    )
    if path is None:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(_REPOSITORY, _FILE))
        except Exception as error:  # a hub client fails with many types: connection, HTTP, missing entry, cache
            raise FileNotFoundError(f"CLIP's text tower cannot be downloaded ({error}); {remedy}") from error
    else:
        file = Path(path).expanduser()
    # A CLIP with a text module of its own prefixes the keys.
    state = {name.removeprefix("text."): value for name, value in read_weights_file(file, remedy).items()}
    own = tower.state_dict()
    wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise ValueError(f"weights: {file} is not this CLIP's: {wrong[0]!r} does not fit; {remedy}")
    tower.load_state_dict({name: state[name] for name in own})
