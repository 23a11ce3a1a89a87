"""Training in this process: a tiny tokenizer, random images, and a trainer that writes nothing unless asked."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from vistok import TiTok, VectorQuantizer


class Noise(Dataset):
    """Images of 16x16 random pixels, the same for the same index."""

    def __init__(self, length=64):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return {"image": image, "index": index}


def titok(**options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4)
    return TiTok(quantizer, 16, 8, 3, encoder_size=(32, 2, 2), decoder_size=(32, 2, 2), **options)


def fit(module, steps, *, batch_size=4, callbacks=(), folder=None, data=None, **trainer):
    """Train for some optimizer steps; returns the trainer."""
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": folder is not None,
        "log_every_n_steps": 10**6,
        **trainer,
    }
    trainer = pl.Trainer(
        devices=1,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(Noise(), batch_size) if data is None else data)
    return trainer
