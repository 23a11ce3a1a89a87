"""Small training runs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]

TITOK = {
    "class_path": "vistok.tokenizers.titok.TiTok",
    "init_args": {
        "image_size": 16,
        "patch_size": 8,
        "num_latent_tokens": 4,
        "encoder_size": [32, 1, 2],
        "decoder_size": [32, 1, 2],
        "quantizer": {
            "class_path": "vistok.quantizers.vq.VectorQuantizer",
            "init_args": {"codebook_size": 32, "dim": 4, "l2_normalize": True, "restart_after": 3},
        },
    },
}


def write_config(path: Path, run_dir: Path, **trainer) -> Path:
    """A run of a tiny TiTok on the demo photographs: 24 images, batches of 4, hence 6 steps per epoch."""
    config = {
        "seed_everything": 7,
        "trainer": {
            "default_root_dir": str(run_dir),
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 14,
            "log_every_n_steps": 2,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
        "checkpoint": {"every_n_steps": 4},
        "model": {
            "tokenizer": TITOK,
            "objective": {
                "class_path": "vistok.training.objectives.ReconstructionObjective",
                "init_args": {"l1": 0.5},
            },
            "optimizer": {"lr": 3e-3, "warmup_steps": 2},
            "ema_decay": 0.9,
        },
        "data": {
            "train": {"class_path": "vistok.data.demo.DemoPhotographs", "init_args": {"num_samples": 24}},
            "val": {
                "class_path": "vistok.data.demo.DemoPhotographs",
                "init_args": {"split": "val", "num_samples": 6},
            },
            "batch_size": 4,
            "num_workers": 0,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def run_all(code: str, timeout: int = 240, **env: str) -> subprocess.CompletedProcess:
    """Run Python code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_close(a: dict, b: dict, atol: float = 2e-5) -> None:
    """Equal up to rounding, but for the biases of attention keys: their true gradient is zero, Adam walks on noise."""
    assert set(a) == set(b)
    for name, value in a.items():
        other = b[name]
        if name.endswith("qkv.bias"):
            query, _, values = range(3)
            value, other = value.view(3, -1)[[query, values]], other.view(3, -1)[[query, values]]
        assert torch.allclose(value, other, atol=atol), (name, (value - other).abs().max())


def differences(a, b, path="") -> list[str]:
    """Paths at which two nested structures of tensors and plain data are not equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{path}: {sorted(map(str, set(a) ^ set(b)))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} != {b}"]
