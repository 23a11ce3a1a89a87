"""Batches with an exact position: the plan, resume, workers, ranks, and samples that cannot be read."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter

import pytest
import torch

from vistok.data.images import ImageError
from vistok.data.loader import MAX_REPLACEMENTS, ImageLoader
from vistok.data.source import ImageSource, Sample
from vistok.data.transforms import EvalTransform, TrainTransform
from vistok.data.webdataset import WebDataset


class Numbered(ImageSource):
    """``count`` images of noise called "0", "1", ...; those in ``bad`` cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.images = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        if index in self.bad:
            raise ImageError(f"numbered/{index}: spoilt")
        return Sample(self.images[index], index % 3, str(index))


LOADERS: list[ImageLoader] = []


@pytest.fixture(autouse=True)
def stop_workers():
    yield
    while LOADERS:
        LOADERS.pop().close()


def training_loader(source: ImageSource, batch_size: int = 4, seed: int = 0, **options) -> ImageLoader:
    transform = TrainTransform(8, "random_resized", scale=(0.3, 1.0))
    LOADERS.append(ImageLoader(source, transform, batch_size, training=True, seed=seed, **options))
    return LOADERS[-1]


def evaluation_loader(source: ImageSource, batch_size: int = 4, **options) -> ImageLoader:
    LOADERS.append(ImageLoader(source, EvalTransform(8), batch_size, training=False, seed=0, **options))
    return LOADERS[-1]


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def contents(batches) -> list[tuple]:
    """Everything about the batches, in a form that can be compared."""
    return [(b["key"], b["label"].tolist(), b["image"].flatten().tolist(), b["skipped"]) for b in batches]


def some(loader: ImageLoader, count: int) -> list[dict]:
    batches = []
    for _, batch in zip(range(count), loader, strict=False):
        batches.append(batch)
    return batches


# ------------------------------------------------------------------------------------------------------------ batches
def test_a_batch_is_uint8_images_labels_keys_and_skipped():
    source = Numbered(9)
    batch = next(iter(training_loader(source)))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 8, 8)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [int(key) % 3 for key in batch["key"]] and batch["skipped"] == []
    assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == [int(key) for key in batch["key"]]
    assert set(batch) == {"image", "label", "key", "index", "skipped"}


class Described(Numbered):
    """With a caption and a target: the negative of the image."""

    has_text, has_target = True, True

    def read(self, index: int) -> Sample:
        return super().read(index)._replace(text=f"number {index}", target=255 - self.images[index])


@pytest.mark.parametrize("make", ["training", "evaluation"])
def test_captions_and_targets_come_from_sources_that_have_them(make):
    source = Described(9, bad=(2, 3, 4, 5))
    for batch in training_loader(source) if make == "training" else evaluation_loader(source):
        assert batch["text"] == [f"number {key}" for key in batch["key"]]
        assert batch["target"].dtype == torch.uint8 and batch["target"].shape == batch["image"].shape
        assert (batch["target"].int() + batch["image"].int() - 255).abs().max() <= 1  # the same window, up to rounding


def test_training_epochs_have_full_batches_of_distinct_samples_in_a_new_order_each():
    loader = training_loader(Numbered(23))
    epochs = [keys(loader) for _ in range(3)]
    assert len(loader) == 5
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20
    assert epochs[0] != epochs[1] != epochs[2]
    again = training_loader(Numbered(23))
    assert [keys(again) for _ in range(3)] == epochs
    assert keys(training_loader(Numbered(23), seed=1)) != epochs[0]


def test_random_transforms_differ_between_epochs_and_samples_but_not_between_runs():
    source = Numbered(4)
    source.images[:] = source.images[0].clone()
    loader = training_loader(source)
    first, second = next(iter(loader))["image"], next(iter(loader))["image"]
    assert len({tuple(image.flatten().tolist()) for image in torch.cat([first, second])}) == 8
    assert torch.equal(next(iter(training_loader(source)))["image"], first)


def test_the_batches_of_two_ranks_together_are_those_of_one_process():
    source = Numbered(32)
    alone = list(training_loader(source, 8))
    ranks = [list(training_loader(source, 4, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        images = {key: image for part in parts for key, image in zip(part["key"], part["image"], strict=True)}
        assert set(images) == set(whole["key"])
        assert all(torch.equal(images[key], image) for key, image in zip(whole["key"], whole["image"], strict=True))


@pytest.mark.parametrize(
    ("count", "world_size", "batch_size"), [(10, 1, 4), (9, 2, 4), (9, 2, 2), (17, 3, 4), (2, 2, 8)]
)
def test_evaluation_sees_every_sample_once_in_equally_many_batches_per_rank(count, world_size, batch_size):
    source = Numbered(count)
    loaders = [evaluation_loader(source, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        batches = [list(loader) for loader in loaders]
        assert [len(part) for part in batches] == [len(loader) for loader in loaders]
        assert len({len(part) for part in batches}) == 1
        assert sorted(map(int, keys(batch for part in batches for batch in part))) == list(range(count))
        assert all(1 <= len(batch["key"]) <= batch_size for part in batches for batch in part)


def test_iterating_leaves_torchs_global_generator_alone():
    source = Numbered(8)
    state = torch.get_rng_state()
    loader = training_loader(source, num_workers=1, multiprocessing_context="fork")
    list(loader), list(loader)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- workers and start methods
def test_workers_and_start_methods_change_nothing(tmp_path, make_shards):
    """The same two epochs and a resumed third, whatever reads them; spawned workers share nothing with this process."""
    source = WebDataset(make_shards(tmp_path, [5, 1, 9, 3, 3]))

    def three_epochs(**options) -> list[tuple]:
        loader = training_loader(source, **options)
        seen = [*contents(loader), *contents(loader)]
        state = training_loader(source).state_dict() | {"epoch": 2, "batches": 3}
        loader.load_state_dict(state)
        return [*seen, *contents(loader)]

    expected = three_epochs()
    assert len(expected) == 5 + 5 + 2
    for options in (
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 3, "multiprocessing_context": "fork", "persistent_workers": False, "prefetch_factor": 5},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ):
        assert three_epochs(**options) == expected, options


# ------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_sees_exactly_the_remaining_samples(tmp_path, make_shards, workers, world_size):
    source = WebDataset(make_shards(tmp_path, [7, 2, 9, 4, 6]))
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "batch_size": 3, "multiprocessing_context": "fork"}
        whole = training_loader(source, num_workers=workers[0], **options)
        length = len(whole)
        expected = [contents(whole) for _ in range(3)]
        for consumed in (1, length - 1, length):
            first = training_loader(source, num_workers=workers[0], **options)
            list(first)
            some(first, consumed)  # of the second epoch; the workers have prefetched more
            state = first.state_dict()
            assert (state["epoch"], state["batches"]) == (1, consumed)
            second = training_loader(source, num_workers=workers[1], **options)
            second.load_state_dict(state)
            if consumed < length:
                assert contents(second) == expected[1][consumed:]
            assert contents(second) == expected[2]


def test_the_position_is_the_same_on_all_ranks():
    loaders = [training_loader(Numbered(40), rank=rank, world_size=3) for rank in range(3)]
    for loader in loaders:
        some(loader, 2)
    assert loaders[0].state_dict() == loaders[1].state_dict() == loaders[2].state_dict()


def test_an_untouched_position_survives_extra_calls_of_iter():
    loader = training_loader(Numbered(16))
    loader.load_state_dict(loader.state_dict() | {"batches": 2})
    iter(loader), iter(loader)
    assert len(list(loader)) == 2


def test_an_iteration_left_early_is_followed_by_the_next_epoch():
    source = Numbered(40)
    reference = training_loader(source)
    epochs = [contents(reference) for _ in range(3)]
    for workers in (0, 2):
        loader = training_loader(source, num_workers=workers, multiprocessing_context="fork")
        assert [contents(some(loader, 3)) for _ in range(3)] == [epoch[:3] for epoch in epochs]


def test_set_epoch_moves_to_an_epoch_and_keeps_the_position_within_the_present_one():
    source = Numbered(16)
    reference = training_loader(source)
    epochs = [contents(reference) for _ in range(4)]
    loader = training_loader(source)
    loader.sampler.set_epoch(3)
    assert contents(loader) == epochs[3]
    loader.load_state_dict(loader.state_dict() | {"epoch": 1, "batches": 2})
    loader.sampler.set_epoch(1)
    assert contents(loader) == epochs[1][2:]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_closed_loader_has_no_workers_and_can_be_used_again(persistent):
    source = Numbered(40)
    reference = training_loader(source)
    epochs = [contents(reference) for _ in range(2)]
    others = set(multiprocessing.active_children())
    options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    loader = training_loader(source, **options)
    iteration = iter(loader)  # keeps the workers' iterator alive beyond close()
    assert contents([next(iteration)]) == epochs[0][:1]
    assert len(set(multiprocessing.active_children()) - others) == 2
    loader.close()
    assert not set(multiprocessing.active_children()) - others
    assert contents(loader) == epochs[1]


def test_two_iterations_at_once_are_refused():
    loader = training_loader(Numbered(40))
    old, new = iter(loader), iter(loader)
    next(old), next(new)
    with pytest.raises(RuntimeError, match="closed, or a newer iteration began"):
        next(old)


def test_a_position_of_other_data_or_another_seed_is_refused():
    state = training_loader(Numbered(40), seed=3).state_dict()
    with pytest.raises(ValueError, match="seed=3, this run has seed=4"):
        training_loader(Numbered(40), seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="num_samples=40, this run has num_samples=41"):
        training_loader(Numbered(41), seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks.*num_samples"):
        training_loader(Numbered(40)).load_state_dict({"epoch": 0})


def test_a_changed_batch_or_world_size_restarts_the_epoch_with_a_warning(caplog):
    loader = training_loader(Numbered(48))
    list(loader), some(loader, 3)
    state = loader.state_dict()
    for options, words in (({"batch_size": 6}, "batch_size=4, this run has 6"), ({"world_size": 2}, "world_size=1")):
        other, fresh = training_loader(Numbered(48), **options), training_loader(Numbered(48), **options)
        caplog.clear()
        other.load_state_dict(state)
        assert words in caplog.text and "epoch 1 starts again" in caplog.text
        list(fresh)
        assert keys(other) == keys(fresh)


# --------------------------------------------------------------------------------------------------------- bad samples
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_training_sample_is_replaced_named_and_counted(workers, caplog):
    source = Numbered(12, bad=(3, 4, 9))
    loader = training_loader(source, num_workers=workers, multiprocessing_context="fork")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(loader)
            assert [len(batch["key"]) for batch in batches] == [4, 4, 4]
            assert keys(batches) == [str(i) for batch in batches for i in batch["index"].tolist()], "not those read"
            assert Counter(keys(batches)) == Counter([*map(str, (0, 1, 2, 5, 6, 7, 8, 10, 11)), "5", "5", "10"])
    assert loader.skipped == {"numbered/3: spoilt": 2, "numbered/4: spoilt": 4, "numbered/9: spoilt": 2}
    assert sorted(caplog.messages) == [f"skipped numbered/{i}: spoilt" for i in (3, 4, 9)], "each is logged once"


@pytest.mark.parametrize("bad", [(3,), (0, 1, 2, 3)])
def test_a_bad_evaluation_sample_is_left_out_never_doubled(bad):
    source = Numbered(10, bad=bad)
    loader = evaluation_loader(source)
    assert sorted(map(int, keys(loader))) == [i for i in range(10) if i not in bad]
    if len(bad) == 1:
        assert loader.skipped == {"numbered/3: spoilt": 1}


def test_a_hopeless_source_is_an_error_that_says_so():
    source = Numbered(40, bad=tuple(range(1, 40)))
    with pytest.raises(RuntimeError, match=f"the {MAX_REPLACEMENTS} taken in its place are all unreadable: numbered/"):
        list(training_loader(source))


def test_a_shard_that_goes_bad_during_the_run_costs_its_samples_only(tmp_path, make_shards):
    source = WebDataset(make_shards(tmp_path, [4, 4, 4]))
    loader = training_loader(source, num_workers=2, multiprocessing_context="fork")
    next(iter(loader))
    path = tmp_path / "shard-001.tar"
    data = bytearray(path.read_bytes())
    for offset, size in source._indexes[1].images:
        data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    seen = keys(loader)
    assert len(seen) == 12 and not any(key.startswith("s1-") for key in seen)
    assert all("shard-001.tar/s1-" in line and "not an image" in line for line in loader.skipped)
    assert len(loader.skipped) == 4


# ------------------------------------------------------------------------------------------------------------ arguments
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"num_workers": -1}, "num_workers.*-1"),
        ({"prefetch_factor": 0}, "prefetch_factor.*0"),
        ({"rank": 2, "world_size": 2}, "rank must lie between 0 and world_size - 1 = 1; got 2"),
        ({"batch_size": 7}, "6 samples do not make one batch on every rank: batch_size 7 x world_size 1 = 7"),
        ({"batch_size": 4, "world_size": 2}, "batch_size 4 x world_size 2 = 8"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        training_loader(Numbered(6), **options)
