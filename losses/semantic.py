"""Semantic regularisation: a layer of the tokenizer learns to predict the patch features of a frozen vision model.

GigaTok (arXiv:2504.08736) aligns the third layer of its decoder with DINOv2 through a three-layer MLP by the cosine
similarity; without it, larger tokenizers reconstruct better and generate worse. Only the layers up to the chosen one
get a gradient from it. The MLP trains with the tokenizer and is not part of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .feature_cache import SampleCache
from .teachers import Teacher
from .term import LossTerm


class SemanticAlignment(LossTerm):
    """Mean of ``-cos(projector(hidden), teacher)`` over tokens and batch, in [-1, 1].

    :meth:`attach` lets it listen to a layer of the tokenizer; call it for every tokenizer that runs (the trained one,
    its moving average). The loss belongs to the one that ran last. The layer's output is either a map ``(B, D, h, w)``
    or a sequence ``(B, L, D)``; of a sequence, the module that holds the layer says which tokens are patches, by
    ``patch_tokens(hidden) -> (B, P, D)`` and ``patch_grid``.

    Args:
        teacher: gives the features to predict.
        layer: path of the layer in the tokenizer.
        student_dim: D; read off the layer's last linear map or convolution when it is attached, if ``None``.
        projector_layers: linear maps of the projector, with SiLU between.
        projector_ratio: its hidden width in multiples of D.
        resample: whose features are brought (bilinearly) to the grid of the other where the grids differ.
        weight: factor in the objective.
        start_step: optimizer step from which the term counts.
        precision: what the projector computes in; the similarity is float32 either way.
        cache: keeps the teacher's features of every training sample on disk. Only for deterministic crops without
            mirror images: features are looked up by the sample's index alone.

    Raises:
        ValueError: for values out of range.
    """

    name = "semantic"

    def __init__(
        self,
        teacher: Teacher,
        layer: str = "decoder.blocks.2",
        student_dim: int | None = None,
        projector_layers: int = 3,
        projector_ratio: int = 4,
        resample: Literal["student", "teacher"] = "student",
        weight: float = 0.5,
        start_step: int = 0,
        precision: Literal["bfloat16", "float32"] = "bfloat16",
        cache: SampleCache | None = None,
    ) -> None:
        super().__init__(weight, start_step, precision)
        if projector_layers < 1 or projector_ratio < 1:
            raise ValueError(
                f"projector_layers and projector_ratio must be at least 1; got {projector_layers} and {projector_ratio}"
            )
        if resample not in ("student", "teacher"):
            raise ValueError(f"resample must be 'student' or 'teacher'; got {resample!r}")
        self.teacher = teacher
        self.layer = layer
        self.resample = resample
        self.cache = cache
        self._projector_shape = (projector_layers, projector_ratio)
        self.projector: nn.Sequential | None = None
        self._seen = _Seen()
        self._cached_size: tuple[int, int] | None = None
        if student_dim is not None:
            self._build_projector(student_dim)

    def attach(self, tokenizer: nn.Module) -> None:
        """Listen to the layer of a tokenizer, before it runs for the first time.

        Raises:
            ValueError: if there is no such layer, or its width is not that of the projector.
        """
        layer, owner = _find(tokenizer, self.layer)
        width = _width(layer)
        if self.projector is None:
            if width is None:
                raise ValueError(f"layer {self.layer!r} is a {type(layer).__name__} of unknown width; give student_dim")
            self._build_projector(width)
            self.projector.to(next(layer.parameters()).device)
        layer.register_forward_hook(_Hook(self._seen, owner))

    def forward(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Loss of the tokenizer that ran last.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], which it should describe.
            indices: ``(B,)``, the samples' places in the dataset, for the cache.

        Raises:
            RuntimeError: if no attached tokenizer has run.
            ValueError: if what it put out does not suit the projector or the images.
        """
        student, student_grid = self._student(len(images))
        teacher, teacher_grid = self._teacher_features(images, indices), self.teacher.grid
        if student_grid != teacher_grid and self.resample == "student":
            student = _resample(student, student_grid, teacher_grid)
        elif student_grid != teacher_grid:
            teacher = _resample(teacher, teacher_grid, student_grid)
        with self.autocast(student.device.type):
            projected = self.projector(student.float() if self.precision == "float32" else student)  # (B, P, C)
        return negative_cosine(projected, teacher)

    def hold(self) -> Tensor:
        self._seen.take()
        return super().hold()

    def _build_projector(self, width: int) -> None:
        layers, ratio = self._projector_shape
        widths = [width] + [ratio * width] * (layers - 1) + [self.teacher.dim]
        parts: list[nn.Module] = []
        for i in range(layers):
            linear = nn.Linear(widths[i], widths[i + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)  # as the tokenizer's transformers
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.SiLU()]
        self.projector = nn.Sequential(*parts[:-1])

    def _student(self, batch_size: int) -> tuple[Tensor, tuple[int, int]]:
        """Patch features ``(B, P, D)`` of the layer, and their grid; forgets them, so that no graph is kept alive."""
        hidden, owner = self._seen.take()
        if hidden is None:
            raise RuntimeError(f"layer {self.layer!r} has not run since the last call; attach() every tokenizer first")
        if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
            kind = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"layer {self.layer!r} must put out (B, L, D) or (B, D, h, w); got {kind}")
        if hidden.ndim == 4:
            grid = (hidden.shape[2], hidden.shape[3])
            student = hidden.flatten(2).transpose(1, 2)  # (B, h * w, D)
        elif owner is not None:
            grid, student = tuple(owner.patch_grid), owner.patch_tokens(hidden)  # (B, P, D)
        else:
            raise ValueError(
                f"layer {self.layer!r} puts out a sequence, and no module that holds it has patch_tokens() and "
                f"patch_grid; choose a layer of a convolutional part, or of a transformer that has them"
            )
        width = self.projector[0].in_features
        if student.shape[0] != batch_size or student.shape[2] != width or student.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"layer {self.layer!r} put out {tuple(student.shape)} on a grid of {grid}; expected ({batch_size}, "
                f"{grid[0] * grid[1]}, {width}), where {width} is student_dim"
            )
        return student, grid

    def _teacher_features(self, images: Tensor, indices: Tensor | None) -> Tensor:
        # Validation samples have indices of their own.
        if self.cache is None or not self.training:
            return self.teacher(images)
        if indices is None:
            raise ValueError("cache needs the indices of the samples; train on a loader that gives them")
        size = (images.shape[2], images.shape[3])
        if size != self._cached_size:
            self.cache.bind({**self.teacher.fingerprint(), "images": list(size)})
            self._cached_size = size

        def compute(rows: Tensor) -> Tensor:
            return self.teacher(images if len(rows) == len(images) else images[rows.to(images.device)])

        return self.cache.get_or_compute(indices, compute, images.device).float()


def negative_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``-cos`` of two ``(B, P, C)``, over C, in float32; the scalar mean over batch and patches."""
    student = F.normalize(student.float(), dim=-1, eps=1e-12)
    teacher = F.normalize(teacher.detach().float(), dim=-1, eps=1e-12)
    return -(student * teacher).sum(-1).mean()


class _Seen:
    """What a layer put out last, and the module that knows its patches."""

    def __init__(self) -> None:
        self.hidden: Any = None
        self.owner: nn.Module | None = None

    def take(self) -> tuple[Any, nn.Module | None]:
        hidden, owner = self.hidden, self.owner
        self.hidden = self.owner = None
        return hidden, owner


class _Hook:
    """The listener on a layer. A copied tokenizer reports to the same place; the loss itself is not copied."""

    def __init__(self, seen: _Seen, owner: nn.Module | None) -> None:
        self.seen = seen
        self.owner = owner

    def __call__(self, layer: nn.Module, inputs: tuple, output: Any) -> None:
        self.seen.hidden, self.seen.owner = output, self.owner

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self


def _find(tokenizer: nn.Module, path: str) -> tuple[nn.Module, nn.Module | None]:
    """The layer at a path, and the innermost module around it that can tell patches from other tokens."""
    module, owner, walked = tokenizer, None, []
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            place = f"{'.'.join(walked)!r}" if walked else f"this {type(tokenizer).__name__}"
            raise ValueError(f"layer {path!r} does not exist; {place} has {', '.join(children) or 'no layers'}")
        module = children[name]
        walked.append(name)
        if hasattr(module, "patch_tokens") and hasattr(module, "patch_grid"):
            owner = module
    return module, owner


def _width(layer: nn.Module) -> int | None:
    """Channels that a layer puts out, from the last linear map or convolution in it."""
    for module in reversed(list(layer.modules())):
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.out_channels
    return None


def _resample(features: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """``(B, h * w, C)`` to another grid, bilinearly."""
    maps = features.float().transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
    return F.interpolate(maps, to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
