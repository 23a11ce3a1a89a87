"""A loss that is not finite costs its step and nothing else; too many in a row end the run with its weights intact."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.training.checkpoints import RunCheckpoints, list_checkpoints
from vistok.training.guard import NonFiniteLossError, StepGuard
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective
from vistok.training.optimization import Optimization

_spec = importlib.util.spec_from_file_location("vistok_test_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


class Failing(ReconstructionObjective):
    """Multiplies the loss by a number that is not one at some calls."""

    def __init__(self, calls, factor=float("nan")):
        super().__init__()
        self.calls, self.factor, self.count = set(calls), factor, 0

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        if self.count in self.calls:
            result.loss = result.loss * self.factor
        self.count += 1
        return result


class Snapshots(small.pl.Callback):
    """The weights after every batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(copy.deepcopy(module.tokenizer.state_dict()))


def module(objective, **options):
    return TokenizerTraining(small.titok(), objective, Optimization(lr=1e-3, schedule="constant"), **options)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_step_without_a_finite_gradient_changes_nothing(factor):
    model, snapshots = module(Failing({2, 3}, factor)), Snapshots()
    trainer = small.fit(model, 6, callbacks=[snapshots], gradient_clip_val=1.0)
    states = snapshots.states
    assert [equal(a, b) for a, b in zip(states, states[1:], strict=False)] == [False, True, True, False, False]
    assert all(torch.isfinite(value).all() for value in states[-1].values())
    moments = trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in moments} == {4}
    assert all(torch.isfinite(state["exp_avg_sq"]).all() for state in moments)
    assert int(model.guard.total) == 2 and int(model.guard.in_a_row) == 0 and trainer.global_step == 6


def test_one_bad_micro_batch_costs_the_whole_accumulated_step():
    model, snapshots = module(Failing({3})), Snapshots()
    small.fit(model, 3, callbacks=[snapshots], accumulate_grad_batches=2)
    assert equal(snapshots.states[1], snapshots.states[3]) and not equal(snapshots.states[3], snapshots.states[5])
    assert int(model.guard.total) == 1


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    model = module(Failing(range(4, 100)), max_skipped_steps=5)
    saving = RunCheckpoints(every_n_steps=2, keep=2)
    with pytest.raises(NonFiniteLossError, match=r"\d+ steps in a row .* max_skipped_steps=5"):
        small.fit(model, 50, callbacks=[saving], folder=tmp_path, log_every_n_steps=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step=00000002.ckpt", "step=00000004.ckpt"]
    saved = torch.load(list_checkpoints(tmp_path)[-1], weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"tokenizer.{name}"], value) for name, value in model.tokenizer.state_dict().items())


def test_a_checkpoint_that_falls_on_a_skipped_step_is_saved_after_the_next_good_one(tmp_path):
    model = module(Failing({3, 4}))
    small.fit(model, 7, callbacks=[RunCheckpoints(every_n_steps=4, keep=0)], folder=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step=00000006.ckpt", "step=00000007.ckpt"]


def test_skipped_steps_that_do_not_follow_each_other_are_no_reason_to_stop():
    guard = StepGuard(3)
    nan, one = torch.tensor(float("nan")), torch.ones(())
    for _ in range(10):
        assert float(guard.observe([one, nan])) == 1 and float(guard.observe([nan, nan])) == 1
        assert float(guard.observe([one, one])) == 0
        guard.check(0)
    assert int(guard.total) == 20
    for _ in range(3):
        guard.observe([nan])
    guard.observe([one])
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        guard.check(0)
    with pytest.raises(ValueError, match="got 0"):
        StepGuard(0)
