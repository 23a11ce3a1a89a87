"""Two gloo processes: equal weights on both ranks, and those of one process at the same global batch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("vistok_test_runs", Path(__file__).with_name("runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

# A script, as Lightning's own launcher starts it once per rank. Every rank writes what it holds at the end.
SCRIPT = """
import sys, torch
from vistok.training.cli import main
from vistok.training.module import TokenizerTraining

def on_train_end(self):
    torch.save(self.state_dict(), f"{sys.argv[1]}/rank{self.global_rank}.pt")

TokenizerTraining.on_train_end = on_train_end
if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[2:])
"""


def launch(tmp_path, name, *overrides, launcher=()):
    """Run the tiny configuration; returns the state of every rank and the run folder."""
    out = tmp_path / name
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    config = runs.write_config(out / "config.yaml", out / "run", max_steps=8)
    command = [sys.executable, *launcher, str(out / "script.py"), str(out), "fit", "--config", str(config), *overrides]
    result = subprocess.run(
        command,
        cwd=runs.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [runs.load(path) for path in sorted(out.glob("rank*.pt"))], out / "run"


TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
NO_RESTART = ["--model.tokenizer.quantizer.restart_after", "null"]
ADVERSARIAL = [  # starts late: under plain ddp, without find_unused_parameters, before the start and after it
    "--model.objective.adversarial=vistok.losses.adversarial.AdversarialLoss",
    "--model.objective.adversarial.discriminator=vistok.losses.blur_discriminator.BlurDiscriminator",
    "--model.objective.adversarial.discriminator.channels=32",
    "--model.objective.adversarial.discriminator.num_stages=1",
    "--model.objective.adversarial.start_step=3",
    "--model.freeze=[encoder.patchify]",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_ranks_stay_equal_while_codes_move_between_them(tmp_path):
    (first, second), run = launch(tmp_path, "two", *TWO, launcher=TORCHRUN)
    assert not runs.differences(first, second)
    assert list((run / "checkpoints").iterdir()) and (run / "export" / "config.json").is_file()


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path, start_method):
    """Under Lightning's own launcher, with workers (where a rank looked up inside one is wrong), a discriminator that
    starts late, and frozen parts."""
    workers = ["--data.num_workers", "1", "--data.multiprocessing_context", start_method]
    (first, second), _ = launch(tmp_path, "two", *TWO, *NO_RESTART, *workers, *ADVERSARIAL)
    (single,), _ = launch(tmp_path, "one", *NO_RESTART, *ADVERSARIAL)
    assert not runs.differences(first, second)
    runs.assert_close(first, single)


RESTART = """
import sys, torch, torch.distributed as dist
from vistok import VectorQuantizer
torch.manual_seed(0)
quantizer = VectorQuantizer(12, 3, restart_after=2)  # built before there is a process group
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
with torch.no_grad():
    quantizer.codebook.normal_()
before = quantizer.codebook.detach().clone()
torch.manual_seed(rank)  # every rank has latents and random numbers of its own, and another number of tokens
z = torch.randn(1, 1, 3).expand(1, 5 + rank, 3)
for _ in range(2):
    found = quantizer(z).indices
    quantizer.commit_update()
torch.save((quantizer.state_dict(), before, found, z[0, 0]), sys.argv[3])
dist.barrier()
dist.destroy_process_group()  # left to the end of the interpreter, gloo's threads may abort the process
"""


def test_a_code_that_any_rank_uses_stays_and_the_others_move_to_latents_of_all_ranks(tmp_path):
    (tmp_path / "script.py").write_text(RESTART)
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", str(rank), str(tmp_path / "store"), f"out{rank}"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
    (state, before, found0, z0), (other, _, found1, z1) = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    assert not runs.differences(state, other)
    used = set(found0.flatten().tolist()) | set(found1.flatten().tolist())
    for code in range(12):
        row = state["codebook"][code]
        assert torch.equal(row, before[code]) == (code in used)
        assert code in used or torch.equal(row, z0) or torch.equal(row, z1)
    moved = [code for code in range(12) if code not in used]
    assert any(torch.equal(state["codebook"][code], z1) for code in moved)
