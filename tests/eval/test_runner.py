"""The pass over the data: every image once, whatever the batches, processes, kills and restarts."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vistok.data.folder import ImageFolder
from vistok.data.images import save_png
from vistok.eval import runner
from vistok.eval.metric import MetricUnavailable, Pairs
from vistok.eval.processes import Processes
from vistok.eval.runner import run_pass
from vistok.eval.variants import GivenVariant

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


class Interrupted(small.PixelSum):
    """Gets so many signals in the middle of the third batch, after it has seen the images."""

    def __init__(self, signals, batches):
        super().__init__()
        self.signals, self.batches = signals, batches

    def update(self, pairs):
        super().update(pairs)
        self.batches.append(pairs.index.tolist())
        if len(self.batches) == 3:
            for _ in range(self.signals):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("signals", "kept"), [(1, 12), (2, 8)])
def test_ctrl_c_in_the_middle_of_a_batch_counts_no_image_twice(tmp_path, whole, signals, kept):
    batches = []

    def build():
        evaluations = small.build()
        evaluations[0].metrics = {"interrupted": Interrupted(signals, batches), **evaluations[0].metrics}
        evaluations[1].metrics["sum after"] = small.PixelSum()
        return evaluations

    options = {"plan": PLAN, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        run_pass(
            small.RandomImages(), small.same, build, tmp_path, save_seconds=0.0 if signals == 2 else 1e9, **options
        )
    progress = []
    result = run_pass(
        small.RandomImages(), small.same, build, tmp_path, resume=True, advance=progress.append, **options
    )
    assert progress[0] == kept and sum(map(len, batches)) == 23 + 12 - kept
    sums = [evaluation.metrics.pop(name) for evaluation in result.evaluations for name in ("interrupted", "sum after")
            if name in evaluation.metrics]  # fmt: skip
    assert [sum_.compute()["pixel_sum"] for sum_ in sums] == [
        whole["dark/half", "sum", "pixel_sum"],
        whole["originals", "sum", "pixel_sum"],
    ]
    assert values(result) == whole


class GivesUp(small.PixelSum):
    """Can say nothing about one of the images, and is not asked again."""

    def update(self, pairs):
        assert not hasattr(self, "gave_up")
        if 17 in pairs.index:
            self.gave_up = True
            raise MetricUnavailable("nothing to say about image 17")
        super().update(pairs)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_metric_that_gives_up_is_left_out_and_the_others_are_whole(tmp_path, whole, world_size, monkeypatch):
    build = small.build

    def with_one_more():
        evaluations = build()
        evaluations[0].metrics = {"gives up": GivesUp(), **evaluations[0].metrics}
        return evaluations

    monkeypatch.setattr(small, "build", with_one_more)
    result = in_ranks(world_size, tmp_path)
    assert result.unavailable == {"gives up": "nothing to say about image 17"}
    assert result.metric("dark/half", "gives up") is None
    assert values(result) == whole
    result = run(tmp_path, resume=True)  # as the parts say
    assert result.unavailable == {"gives up": "nothing to say about image 17"} and values(result) == whole


def test_no_metric_is_unavailable_unless_it_says_so(tmp_path):
    assert run(tmp_path).unavailable == {}


@pytest.mark.parametrize("name", ["dark_half", "dark%2Fhalf", "dark half"])
def test_variants_with_similar_names_keep_their_tables_apart(tmp_path, name):
    class Brighter(small.Darker):
        def reconstruct(self, originals):
            return Pairs(originals, originals.images // 2 + 100)

    Brighter.name = name

    def build():
        return [small.Evaluation(variant, {"table": small.Table()}) for variant in (small.Darker(), Brighter())]

    result = run_pass(small.RandomImages(), small.same, build, tmp_path, plan=PLAN)
    dark, bright = (evaluation.metrics["table"].rows.read().int() for evaluation in result.evaluations)
    assert torch.equal(dark + 100, bright)


def test_a_removed_part_is_missed(tmp_path):
    def remove():
        calls.append(None)
        if len(calls) == 3:  # the barrier before parts are merged
            next((tmp_path / "parts").glob("*.pt")).unlink()

    calls = []
    with pytest.raises(ValueError, match=r"the parts there are of 0 images instead of the 23 to evaluate; was one"):
        run(tmp_path, processes=Processes(barrier=remove))


def test_a_copied_part_is_noticed(tmp_path):
    run(tmp_path)
    shutil.copy(tmp_path / "parts" / "0000-0000.pt", tmp_path / "parts" / "0000-0001.pt")
    with pytest.raises(ValueError, match="an image was evaluated twice"):
        run(tmp_path, resume=True)


def test_every_start_has_files_of_its_own(tmp_path):
    for batches in (1, 2):  # what is done already counts as one
        with pytest.raises(Killed):
            run(tmp_path, advance=killed_after(batches), resume=True)
    run(tmp_path, resume=True)
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.pt")) == [f"000{i}-0000.pt" for i in range(3)]
    rows = sorted(path.name for path in (tmp_path / "rows" / "dark%2Fhalf" / "table").iterdir())
    assert rows == [f"000{i}-0000.rows" for i in range(3)]


def test_parts_are_saved_as_often_as_asked_but_not_all_the_time(tmp_path, monkeypatch):
    saved, write = [], runner.write_part

    def counted(path, part):
        saved.append(len(part["index"]))
        write(path, part)

    monkeypatch.setattr(runner, "write_part", counted)
    run(tmp_path / "always", batch_size=5)
    assert saved == [5, 10, 15, 20, 23, 23]
    del saved[:]
    run(tmp_path / "seldom", batch_size=5, save_seconds=1e9)
    assert saved == [23]
    del saved[:]

    class Clock:
        """A second passes for every batch, a hundred for every part."""

        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def monotonic():
            return 100.0 * len(saved) + ticks[0]

    def tick(images):
        ticks[0] += 1.0 if images else 0.0

    ticks = [0.0]
    monkeypatch.setattr(runner, "time", Clock)
    run(tmp_path / "slow", small.RandomImages(4100), batch_size=1, save_seconds=10.0, advance=tick)
    assert saved == [11, 2012, 4013, 4100]  # a twentieth of the time goes into saving


def test_reconstruction_and_metrics_are_timed(tmp_path):
    stages = run(tmp_path).timing
    assert stages.keys() >= {"read", "reconstruct/codec", "reconstruct/originals", "metric/sum", "metric/table"}
    assert all(seconds >= 0 for seconds in stages.values())
    assert stages["read"] > 0


def test_times_of_all_parts_add_up(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, advance=killed_after(3))
    (path,) = (tmp_path / "parts").glob("*.pt")
    part = torch.load(path, weights_only=True)
    part["timing"] = {"read": 1000.0, "earlier": 1.0}
    torch.save(part, path)
    timing = run(tmp_path, resume=True).timing
    assert timing["read"] > 1000 and timing["earlier"] == 1


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


def test_unreadable_images_are_not_tried_again(tmp_path):
    run(tmp_path, small.RandomImages(damaged=(3, 20)))
    progress = []
    result = run(tmp_path, small.RandomImages(), resume=True, advance=progress.append)
    assert progress == [23] and result.unreadable == ["image 3: damaged", "image 20: damaged"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_without_a_readable_image_are_passed_over(tmp_path, world_size):
    damaged = tuple(range(4, 15))
    result = in_ranks(world_size, tmp_path, source=small.RandomImages(damaged=damaged), batch_size=2)
    assert result.index.tolist() == [i for i in range(23) if i not in damaged]
    assert result.unreadable == [f"image {i}: damaged" for i in damaged]
    assert result.metric("dark/half", "brightness").table()[1].shape == (12, 2)


def test_a_dataset_of_which_nothing_can_be_read_has_no_images(tmp_path):
    result = run(tmp_path, small.RandomImages(damaged=range(23)))
    assert (len(result.index), len(result.keys), len(result.labels), result.expected) == (0, 0, 0, 23)
    assert len(result.unreadable) == 23


def test_nothing_chosen_is_nothing_evaluated(tmp_path):
    result = run(tmp_path, chosen=[])
    assert (len(result.index), result.expected, result.unreadable) == (0, 0, [])


def test_names_that_are_no_utf8_can_be_written_down(tmp_path):
    path = os.fsencode(tmp_path) + b"/images/caf\xe9.png"
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), Path(os.fsdecode(path)))
    result = run(tmp_path / "out", ImageFolder(str(tmp_path / "images")))
    assert result.keys == ["caf\ufffd.png"]


def test_the_first_of_several_ranks_tells_the_progress_of_all(tmp_path):
    progress = []
    with pytest.raises(ValueError, match="the parts there are of 12 images instead of the 23"):
        run(tmp_path, processes=Processes(0, 2), advance=progress.append)
    assert progress == [0, 8, 8, 8]


def test_progress_counts_every_image_once(tmp_path):
    progress = []
    run(tmp_path, advance=progress.append, batch_size=5)
    assert progress == [0, 5, 5, 5, 5, 3]


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


def crop(image):
    return image[:, : 4 if image[0, 0, 0] % 2 else 8]


def test_images_of_different_sizes_are_refused_also_in_different_batches(tmp_path):
    with pytest.raises(ValueError, match=r"images differ in size \(8x4 and 8x8 pixels\)"):
        run_pass(small.RandomImages(), crop, small.build, tmp_path, plan=PLAN, batch_size=1)


def test_images_of_different_sizes_are_refused_also_in_different_parts(tmp_path):
    tall = [i for i in range(23) if small.RandomImages().image(i)[0, 0, 0] % 2 == 0]
    with pytest.raises(Killed):
        run(tmp_path, small.RandomImages(damaged=[i for i in range(23) if i not in tall]), advance=killed_after(3))

    def low(image):
        return image[:, :4]

    with pytest.raises(ValueError, match=r"images differ in size \(8x4 and 8x8 pixels\)"):
        run_pass(small.RandomImages(), low, small.build, tmp_path, plan=PLAN, resume=True)


def test_a_reconstruction_of_another_size_is_named(tmp_path):
    class Given(small.RandomImages):
        def read(self, index):
            return super().read(index)._replace(target=torch.zeros(3, 8, 6, dtype=torch.uint8))

    message = "image 0: the reconstruction has 6x8 pixels, the reference 8x8; give --size and --crop"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, Given())


def test_targets_reach_the_variants_beside_their_originals(tmp_path):
    class Given(small.RandomImages):
        def read(self, index):
            sample = super().read(index)
            return sample._replace(target=sample.image // 2)

    def build():
        return [small.Evaluation(GivenVariant(), {"table": small.Table()})]

    result = run_pass(Given(), small.same, build, tmp_path, plan=PLAN, batch_size=4)
    expected = torch.stack([Given().image(i) // 2 for i in range(23)])[:, 0, 0]
    assert torch.equal(result.metric("reconstruction", "table").rows.read(), expected)


def test_metrics_and_variants_run_without_gradient(tmp_path):
    class Look(small.PixelSum):
        def update(self, pairs):
            seen.append(torch.is_grad_enabled())

    seen = []
    build = lambda: [small.Evaluation(small.OriginalsVariant(), {"look": Look()})]  # noqa: E731
    run_pass(small.RandomImages(2), small.same, build, tmp_path, plan=PLAN)
    assert seen == [False]


def test_the_state_of_the_global_generator_stays(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(tmp_path, num_workers=2)
    assert torch.equal(torch.rand(2), expected)


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
