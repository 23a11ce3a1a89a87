"""A step that is not logged neither waits for the device nor speaks to other ranks about anything but gradients."""

import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vistok import VectorQuantizer
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.diff_augment import DiffAugment
from vistok.losses.perceptual_term import PerceptualTerm
from vistok.losses.semantic import SemanticAlignment
from vistok.losses.teachers import Teacher
from vistok.losses.trunks import Trunk
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective
from vistok.training.optimization import Optimization

_spec = importlib.util.spec_from_file_location("vistok_test_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

# What has to know the value of a tensor, or how many of its elements are not zero, before Python can go on.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "item"}


class Watch(TorchDispatchMode):
    """Collects the operators that would wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or boolean_index:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watched(pl.Callback):
    """Watches every batch from its start to its end, optimizer step included."""

    def __init__(self):
        self.found, self.reductions = [], []

    def on_train_start(self, trainer, module):
        self.reduce, trainer.strategy.reduce = trainer.strategy.reduce, self.count

    def count(self, *args, **kwargs):
        self.reductions[-1] += 1
        return self.reduce(*args, **kwargs)

    def on_train_batch_start(self, *_):
        self.reductions.append(0)
        self.mode = Watch()
        self.mode.__enter__()

    def on_train_batch_end(self, *_):
        self.mode.__exit__(None, None, None)
        self.found.append(self.mode.found)


class Means(Teacher):
    """Describes each of four patches by its mean colour."""

    dim, grid = 3, (2, 2)

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)

    def fingerprint(self):
        return {}


class Mean(PerceptualTerm):
    """Compares images as they are."""

    def __init__(self):
        super().__init__(Trunk(nn.Identity()))

    def compare(self, stage, features, targets):
        return (features - targets).abs().mean()


def objective_with_everything():
    adversarial = AdversarialLoss(
        BlurDiscriminator(channels=32, num_stages=1),
        start_step=3,
        adaptive=True,
        lecam_weight=0.001,
        r1_weight=1.0,
        r1_every=2,
        augment=DiffAugment(),
    )
    return ReconstructionObjective(
        l1=1.0,
        logit_laplace=0.1,
        perceptual=[Mean()],
        adversarial=adversarial,
        semantic=SemanticAlignment(Means(), layer="decoder.blocks.1", start_step=2),
    )


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_only_logging_steps_wait_for_the_device_or_reduce(tmp_path, update):
    quantizer = VectorQuantizer(16, 4, codebook_update=update, restart_after=2)
    tokenizer = small.TiTok(quantizer, 16, 8, 3, encoder_size=(32, 3, 2), decoder_size=(32, 3, 2))
    model = TokenizerTraining(
        tokenizer, objective_with_everything(), Optimization(schedule="constant"), freeze=["encoder.blocks.0"]
    )
    watched = Watched()
    small.fit(model, 8, callbacks=[watched], log_every_n_steps=4, gradient_clip_val=1.0, logger=True, folder=tmp_path)
    logging = [step for step in range(8) if (step + 1) % 4 == 0]
    for step, found in enumerate(watched.found):
        assert (not found) or step in logging, (step, found)
        assert (watched.reductions[step] > 0) == (step in logging)
    assert any(watched.found[step] for step in logging)  # the watch does see what it looks for
    assert not any(buffer.requires_grad or buffer.grad_fn is not None for buffer in model.buffers())


class Forbid(pl.Callback):
    """Lets CUDA raise on every synchronisation within a step that is not logged."""

    def on_train_batch_start(self, trainer, *_):
        logging = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        torch.cuda.set_sync_debug_mode("default" if logging else "error")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_cuda_sees_no_synchronisation_outside_logging_steps(tmp_path, precision):
    tokenizer = small.TiTok(VectorQuantizer(16, 4), 16, 8, 3, encoder_size=(32, 3, 2), decoder_size=(32, 3, 2))
    model = TokenizerTraining(tokenizer, objective_with_everything(), Optimization(schedule="constant"))
    options = {"accelerator": "gpu", "precision": precision, "log_every_n_steps": 4, "gradient_clip_val": 1.0}
    small.fit(model, 12, callbacks=[Forbid()], logger=True, folder=tmp_path, **options)
    assert int(model.guard.total) == 0
