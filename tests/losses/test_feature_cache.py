"""The cache of per-sample rows: what is read equals what was computed, whoever wrote it and however it died."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from vistok.losses.feature_cache import SampleCache

WHAT = {"teacher": "a", "images": [16, 16]}


def cache(folder, num_samples=20, dtype="float32", what=WHAT) -> SampleCache:
    subject = SampleCache(str(folder), num_samples, dtype)
    subject.bind(what)
    return subject


def features(indices: torch.Tensor) -> torch.Tensor:
    """What the network would say: ``(B, 2, 3)``."""
    return torch.sin(indices.double()[:, None, None] + torch.arange(6.0).view(2, 3)).float()


class Network:
    """Computes rows of the batch that it is given, and remembers which samples it was asked for."""

    def __init__(self, make=features) -> None:
        self.make, self.asked = make, []

    def read(self, subject: SampleCache, indices: list[int]) -> torch.Tensor:
        batch = torch.tensor(indices)

        def compute(rows: torch.Tensor) -> torch.Tensor:
            assert rows.dtype == torch.int64 and rows.device.type == "cpu"
            self.asked += batch[rows].tolist()
            return self.make(batch[rows])

        return subject.get_or_compute(batch, compute)


def test_every_row_is_computed_once_and_comes_back_in_the_order_asked_for(tmp_path):
    subject, network = cache(tmp_path), Network()
    rng = np.random.default_rng(0)
    for _ in range(30):
        indices = rng.choice(20, 5, replace=False).tolist()
        assert torch.equal(network.read(subject, indices), features(torch.tensor(indices)))
    assert sorted(network.asked) == list(range(20))


def test_a_sample_that_comes_twice_in_a_batch_is_right_both_times(tmp_path):
    subject, network = cache(tmp_path), Network()
    for indices in ([3, 3, 4], [4, 3, 3, 5]):
        assert torch.equal(network.read(subject, indices), features(torch.tensor(indices)))


def test_rows_outlive_the_process(tmp_path):
    Network().read(cache(tmp_path / "new" / "folder"), [0, 5, 7])
    network = Network()
    assert torch.equal(network.read(cache(tmp_path / "new" / "folder"), [7, 1]), features(torch.tensor([7, 1])))
    assert network.asked == [1]


def test_what_is_just_computed_equals_what_is_read_later(tmp_path):
    """Or an interrupted run would go on with other numbers than the uninterrupted one."""
    subject = cache(tmp_path, dtype="float16")
    first = Network().read(subject, [1, 2])
    mixed = Network().read(subject, [1, 3])
    later = Network().read(subject, [1, 2, 3])
    assert first.dtype == mixed.dtype == later.dtype == torch.float16
    assert torch.equal(first, later[:2]) and torch.equal(mixed, later[[0, 2]])
    assert not torch.equal(first.float(), features(torch.tensor([1, 2])))


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
def test_codes_of_any_shape_are_kept_exactly(tmp_path, dtype):
    def codes(indices):
        return indices * 1000 + 7

    subject = cache(tmp_path, dtype=dtype)
    for indices in ([3, 9], [9, 4]):
        read = Network(codes).read(subject, indices)
        assert read.dtype == getattr(torch, dtype) and read.tolist() == [i * 1000 + 7 for i in indices]


def test_values_that_the_type_cannot_hold_are_refused_and_not_marked(tmp_path):
    cases = (
        ("int16", lambda i: i * 40_000, "int16 .* cannot hold 40000 to 80000"),
        ("int16", lambda i: i / 3, "int16"),
        ("float16", lambda i: i * 1e5, "float16 .* cannot hold 100000 to 200000"),
        ("float32", lambda i: i / 0.0, "float32"),
    )
    for number, (dtype, make, words) in enumerate(cases):
        subject = cache(tmp_path / str(number), dtype=dtype)
        with pytest.raises(ValueError, match=words):
            Network(make).read(subject, [1, 2])
        network = Network(lambda i: i)
        network.read(subject, [1, 2])
        assert network.asked == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"what": WHAT | {"teacher": "b"}}, "fingerprint.teacher is 'a' there, 'b' here"),
        ({"what": WHAT | {"images": (32, 32)}}, r"fingerprint.images is \[16, 16\] there, \[32, 32\] here"),
        ({"what": {}}, "fingerprint"),
        ({"num_samples": 21}, "num_samples is 20 there, 21 here"),
        ({"dtype": "float16"}, "dtype is 'float32' there, 'float16' here"),
    ],
)
def test_the_cache_of_something_else_is_refused(tmp_path, change, words):
    Network().read(cache(tmp_path), [0])
    with pytest.raises(ValueError, match=f"{words}.*Delete the folder"):
        cache(tmp_path, **change)
    cache(tmp_path, what={"images": (16, 16), "teacher": "a"})


def test_rows_of_another_shape_and_indices_out_of_range_are_refused(tmp_path):
    subject = cache(tmp_path)
    Network().read(subject, [0])
    with pytest.raises(ValueError, match=r"takes rows \(1, 2, 3\) here; got \(1, 2\)"):
        Network(lambda i: torch.zeros(len(i), 2)).read(subject, [1])
    for indices in ([20], [-1], []):
        with pytest.raises(ValueError, match="from 0 to 19"):
            Network().read(subject, indices)
    with pytest.raises(RuntimeError, match="bind"):
        Network().read(SampleCache(str(tmp_path), 20), [0])
    for options, words in (({"num_samples": 0}, "num_samples.*0"), ({"dtype": "bool"}, "dtype.*'bool'")):
        with pytest.raises(ValueError, match=words):
            SampleCache(**{"folder": "x", "num_samples": 1} | options)


def test_copies_and_pickles_read_the_same_files(tmp_path):
    subject = cache(tmp_path)
    early = [copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))]  # before the files are there
    Network().read(subject, [1, 2])
    for other in [*early, copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))]:
        network = Network()
        assert torch.equal(network.read(other, [2, 1]), features(torch.tensor([2, 1])))
        assert not network.asked


def test_a_process_killed_between_row_and_mark_leaves_the_row_to_be_computed_again(tmp_path):
    subject = cache(tmp_path)
    Network().read(subject, [0, 1, 2])
    subject._present[1] = 0  # as it is when the process died before the mark
    subject._rows[1] = 99
    network = Network()
    assert torch.equal(network.read(cache(tmp_path), [0, 1]), features(torch.tensor([0, 1])))
    assert network.asked == [1]


def fill_for_ever(folder, started) -> None:
    subject = cache(folder, 4000)
    for start in range(0, 4000, 8):
        Network().read(subject, list(range(start, start + 8)))
        started.set()


def test_a_killed_process_leaves_only_whole_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=fill_for_ever, args=(tmp_path, started))
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    network, subject = Network(), cache(tmp_path, 4000)
    assert torch.equal(network.read(subject, list(range(4000))), features(torch.arange(4000)))
    assert 0 < 4000 - len(network.asked)


def test_files_half_made_are_made_anew(tmp_path):
    (tmp_path / "rows.bin").write_bytes(b"half")
    (tmp_path / "present.bin").write_bytes(b"\1" * 20)
    network = Network()
    network.read(cache(tmp_path), [0, 1])
    assert network.asked == [0, 1]
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="cache.json is damaged"):
        cache(tmp_path)


def fill_share(folder, rank, barrier, results) -> None:
    subject, network = cache(folder, 60), Network()
    barrier.wait()
    right = True
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(60)[rank::3].reshape(5, 4)  # another share in every epoch
        for batch in order.tolist():
            right &= torch.equal(network.read(subject, batch), features(torch.tensor(batch)))
        barrier.wait()
    results.put((right, network.asked))


def test_three_ranks_fill_one_folder_together(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=fill_share, args=(tmp_path, rank, barrier, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert all(right for right, _ in answers)
    assert sorted(i for _, asked in answers for i in asked) == list(range(60)), "a row was computed twice, or lost"
    stored = json.loads((tmp_path / "cache.json").read_text())
    assert stored["fingerprint"] == WHAT and stored["shape"] == [2, 3]


def test_files_take_room_only_as_rows_are_written(tmp_path):
    subject = cache(tmp_path, 1_000_000)
    Network(lambda i: torch.zeros(len(i), 100)).read(subject, [999_999])
    assert os.stat(tmp_path / "rows.bin").st_size == 400_000_000
    assert os.stat(tmp_path / "rows.bin").st_blocks * 512 < 10_000_000
