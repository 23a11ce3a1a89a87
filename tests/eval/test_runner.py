"""The pass over the data: every image once, whatever the batches, processes, kills and restarts."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vistok.data.folder import ImageFolder
from vistok.data.images import save_png
from vistok.eval.processes import Processes
from vistok.eval.runner import run_pass

_spec = importlib.util.spec_from_file_location("vistok_test_eval_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

PLAN = {"suite": "test"}


def run(folder, source=None, **options):
    options = {"plan": PLAN, "batch_size": 4, "save_seconds": 0.0, **options}
    return run_pass(source or small.RandomImages(), small.same, small.build, folder, **options)


def values(result):
    """Everything that a result says, to compare with another's."""
    found = {}
    for evaluation in result.evaluations:
        for name, metric in evaluation.metrics.items():
            for key, value in metric.compute().items():
                found[evaluation.variant.name, name, key] = value
    found["table"] = result.metric("dark/half", "table").rows.read().tolist()
    found["per image"] = [part.tolist() for part in result.metric("dark/half", "brightness").table()]
    found["images"] = (result.index.tolist(), result.keys, result.labels.tolist(), result.dataset)
    return found


def in_ranks(world_size, folder, **options):
    """Run as so many ranks, each a thread; returns what rank 0 found."""
    barrier, found = threading.Barrier(world_size), {}

    def work(rank):
        try:
            found[rank] = run(folder, processes=Processes(rank, world_size, barrier.wait), **options)
        except BaseException as error:
            barrier.abort()
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [error for error in found.values() if isinstance(error, BaseException)]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    assert all(found[rank] is None for rank in range(1, world_size))
    return found[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return values(run(tmp_path_factory.mktemp("whole") / "out"))


def test_a_pass_sees_every_image_once(whole):
    source = small.RandomImages()
    darker = torch.stack([source.image(i) // 2 for i in range(23)])
    assert whole["dark/half", "sum", "pixel_sum"] == float(darker.sum())
    assert whole["originals", "sum", "pixel_sum"] == float(sum(source.image(i).double().sum() for i in range(23)))
    assert whole["dark/half", "brightness", "brightness"] == pytest.approx(float(darker.double().mean()), abs=1e-5)
    assert whole["table"] == darker[:, 0, 0].tolist()
    assert whole["images"][:3] == (
        list(range(23)),
        [f"image {i}" for i in range(23)],
        [i % 3 for i in range(23)],
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_result_does_not_depend_on_the_batch_size(tmp_path, whole, batch_size):
    assert values(run(tmp_path, batch_size=batch_size)) == whole


def test_reading_in_worker_processes_changes_nothing(tmp_path, whole):
    assert values(run(tmp_path, num_workers=2)) == whole


@pytest.mark.parametrize("world_size", [2, 3, 5, 30])
def test_ranks_share_the_images_without_padding_or_dropping(tmp_path, whole, world_size):
    assert values(in_ranks(world_size, tmp_path)) == whole


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def killed_after(batches):
    left = [batches]

    def advance(images):
        if images and not left[0]:
            raise Killed
        left[0] -= 1 if images else 0

    return advance


@pytest.mark.parametrize("batches", range(7))
def test_a_run_killed_at_any_batch_and_resumed_equals_one_that_was_not(tmp_path, whole, batches):
    with pytest.raises(Killed):
        run(tmp_path, advance=killed_after(batches), batch_size=3)
    assert values(run(tmp_path, resume=True)) == whole


def test_a_run_may_be_killed_twice_and_resumed_with_other_numbers_of_processes(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, advance=killed_after(2), batch_size=2)
    with pytest.raises(Killed):
        in_ranks(3, tmp_path, advance=killed_after(2), batch_size=1, resume=True)
    assert values(in_ranks(2, tmp_path, resume=True)) == whole


def test_a_resumed_run_does_not_evaluate_again_what_is_saved(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, advance=killed_after(3))
    progress = []
    run(tmp_path, resume=True, advance=progress.append)
    assert progress[0] == 12  # of the fourth batch nothing was saved
    assert sum(progress) == 23


def test_ctrl_c_loses_nothing(tmp_path, whole):
    def interrupt(images):
        if images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, advance=interrupt, save_seconds=1e9)
    progress = []
    assert values(run(tmp_path, resume=True, advance=progress.append)) == whole
    assert progress[0] == 4


def test_an_unfinished_evaluation_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        run(tmp_path)


def test_another_plan_cannot_be_resumed(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="suite: 'test' there, 'other' now"):
        run(tmp_path, plan={"suite": "other"}, resume=True)


def test_a_damaged_part_is_named_and_can_be_deleted(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, advance=killed_after(3))
    (part,) = (tmp_path / "parts").glob("*.pt")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{part.name} is damaged .* delete it"):
        run(tmp_path, resume=True)
    part.unlink()
    assert values(run(tmp_path, resume=True)) == whole


def test_unreadable_images_are_left_out_and_named(tmp_path):
    result = run(tmp_path, small.RandomImages(damaged=(3, 20)))
    assert result.unreadable == ["image 3: damaged", "image 20: damaged"]
    assert result.index.tolist() == [i for i in range(23) if i not in (3, 20)]
    assert result.expected == 23


def test_a_chosen_subset_is_evaluated_and_hashes_differently(tmp_path, whole):
    result = run(tmp_path, chosen=[5, 1, 9])
    assert result.index.tolist() == [1, 5, 9]
    assert result.expected == 3
    assert result.dataset != whole["images"][3]


def test_the_same_pixels_hash_alike_whatever_their_order(tmp_path, whole):
    class Backwards(small.RandomImages):
        def read(self, index):
            return super().read(len(self) - 1 - index)

    assert run(tmp_path, Backwards()).dataset == whole["images"][3]


def test_images_of_different_sizes_are_refused(tmp_path):
    def crop(image):
        return image[:, : 4 if image[0, 0, 0] % 2 else 8]

    with pytest.raises(ValueError, match=r"images differ in size \(8x4 and 8x8 pixels\)"):
        run_pass(small.RandomImages(), crop, small.build, tmp_path, plan=PLAN, batch_size=23)


def test_originals_reach_the_metrics_bit_for_bit(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    levels[1] = levels[1].flip(0)
    save_png(levels, tmp_path / "images" / "levels.png")

    class Keep(small.PixelSum):
        def update(self, pairs):
            super().update(pairs)
            seen.append(pairs.originals.images.clone())

    seen = []
    build = lambda: [small.Evaluation(small.OriginalsVariant(), {"keep": Keep()})]  # noqa: E731
    run_pass(ImageFolder(str(tmp_path / "images")), small.same, build, tmp_path / "out", plan=PLAN)
    assert torch.equal(seen[0][0], levels)


SCRIPT = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("small", sys.argv[1])
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)

import time
import torch
from vistok.eval.processes import from_environment
from vistok.eval.runner import run_pass

torch.set_num_threads(1)
calls = []

def advance(images):
    calls.append(images)
    if len(calls) == int(sys.argv[3]):
        print("waiting", flush=True)
        time.sleep(60)

result = run_pass(small.RandomImages(), small.same, small.build, Path(sys.argv[2]), plan={"suite": "test"},
                  batch_size=2, save_seconds=0.0, resume=True, advance=advance, processes=from_environment())
if result is not None:
    torch.save([metric.compute() for e in result.evaluations for metric in e.metrics.values()], sys.argv[4])
"""


def test_two_gloo_processes_that_are_killed_and_resumed_equal_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "values.pt"
    arguments = [str(script), str(Path(__file__).with_name("small.py")), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, *arguments, "4", str(out)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "waiting\n"  # in the third batch
    first.send_signal(signal.SIGKILL)
    first.wait()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launcher, *arguments, "0", str(out)], env=environment, check=True, timeout=120)
    result = run(tmp_path / "single")
    expected = [metric.compute() for evaluation in result.evaluations for metric in evaluation.metrics.values()]
    assert torch.load(out, weights_only=True) == expected
    parts = {path.stem: torch.load(path, weights_only=True)["index"] for path in (tmp_path / "out/parts").glob("*.pt")}
    assert {name: len(index) for name, index in parts.items()} == {"0000-0000": 4, "0001-0000": 10, "0001-0001": 9}
