"""A run killed with SIGKILL and continued ends with the very weights of an uninterrupted one."""

import importlib.util
import json
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("vistok_test_runs", Path(__file__).with_name("runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

# One process imports everything and forks a child per run; a child that is to die kills itself with SIGKILL.
RUNNER = """
import json, os, signal, sys
import torch
from vistok.training import cli
from vistok.training.module import TokenizerTraining

def run(args, kill_at=None):
    pid = os.fork()
    if pid == 0:
        if kill_at is not None:
            def on_train_batch_end(self, outputs, batch, batch_idx):
                if self.global_step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            TokenizerTraining.on_train_batch_end = on_train_batch_end
        code = 1
        try:
            cli.main(args)
            code = 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)

torch.set_num_threads(1)
for args, kill_at in json.loads(sys.argv[1] if len(sys.argv) > 1 else os.environ["RUNS"]):
    code = run(args, kill_at)
    assert code == (-9 if kill_at is not None else 0), (args, kill_at, code)
"""


ADVERSARIAL = [
    "--model.objective.adversarial=vistok.losses.adversarial.AdversarialLoss",
    "--model.objective.adversarial.discriminator=vistok.losses.blur_discriminator.BlurDiscriminator",
    "--model.objective.adversarial.discriminator.channels=32",
    "--model.objective.adversarial.discriminator.num_stages=1",
    "--model.objective.adversarial.start_step=4",
    "--model.objective.adversarial.lecam_weight=0.1",
    "--model.objective.adversarial.augment=vistok.losses.diff_augment.DiffAugment",
    "--model.freeze=[encoder.patchify]",
]
# Overrides, and the steps at which the run is killed. 6 batches make an epoch. Checkpoints every 4 steps: killed before
# the first one, right after one, between two, and at the last batch of an epoch.
SCENARIOS = {
    "plain": ([], [1, 4, 7, 12]),
    "checkpoint-at-epoch-end": (["--checkpoint.every_n_steps", "6", *ADVERSARIAL], [6, 13]),
    "extended": (["--model.optimizer.schedule", "constant", "--checkpoint.keep", "0"], []),
    "accumulation-and-workers": (
        ["--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "8", "--data.num_workers", "2"],
        [5, 7],
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every scenario, run to its end without and with interruptions."""
    root, plan = tmp_path_factory.mktemp("resume"), []
    for name, (overrides, kills) in SCENARIOS.items():
        folder = root / name
        folder.mkdir()
        config = runs.write_config(folder / "config.yaml", folder / "whole")
        fit = ["fit", "--config", str(config), *overrides]
        again = [*fit, "--trainer.default_root_dir", str(folder / "killed"), "--ckpt_path", "last"]
        plan += [(fit, None), *((again, kill) for kill in kills)]
        if name == "extended":  # runs that ended, in the middle of an epoch and at the end of one, and go further
            plan += [([*again, "--trainer.max_steps", steps], None) for steps in ("3", "12")]
        plan.append((again, None))
    result = runs.run_all(RUNNER, RUNS=json.dumps(plan))
    assert result.returncode == 0, result.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_and_continued_equals_uninterrupted(finished, name):
    folder = finished / name
    last = sorted((folder / "whole" / "checkpoints").iterdir())[-1].name
    whole = runs.load(folder / "whole" / "checkpoints" / last)
    continued = runs.load(folder / "killed" / "checkpoints" / last)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert not runs.differences(whole[part], continued[part], part)
    assert any(key.startswith("ema_tokenizer.") for key in whole["state_dict"])
    assert not list((folder / "killed" / "checkpoints").glob(".*"))
    metrics = [json.loads((folder / run / "metrics.json").read_text()) for run in ("whole", "killed")]
    assert metrics[0] == metrics[1]
