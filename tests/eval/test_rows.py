"""Tables on disk: what was saved comes back in order, whoever wrote it and whatever a kill left behind."""

import pytest
import torch

from vistok.eval.rows import Rows


def written(folder, part, index, dtype="float32", extra=0):
    """A process that saves its state after the rows of ``index`` and then writes ``extra`` rows more."""
    rows = Rows(3, dtype)
    rows.open(folder, part)
    index = torch.tensor(index)
    rows.append(index, index[:, None] * torch.tensor([1, 2, 3]))
    state = rows.state_dict()
    if extra:
        rows.append(torch.full((extra,), 99), torch.full((extra, 3), 99))
        rows.state_dict()
    return state


def merged(folder, *states, dtype="float32"):
    rows = Rows(3, dtype)
    rows.open(folder, "merged")
    for state in states:
        rows.merge(state)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int64"])
def test_rows_of_several_processes_come_back_in_the_order_of_their_images(tmp_path, dtype):
    rows = merged(
        tmp_path, written(tmp_path, "a", [4, 0, 2], dtype), written(tmp_path, "b", [3, 1], dtype), dtype=dtype
    )
    assert len(rows) == 5 and rows.index().tolist() == [0, 1, 2, 3, 4]
    assert rows.read().tolist() == [[i, 2 * i, 3 * i] for i in range(5)]
    assert str(rows.read().dtype) == f"torch.{dtype}"
    assert [block.tolist() for block in rows.blocks(2)] == [
        [[0, 0, 0], [1, 2, 3]],
        [[2, 4, 6], [3, 6, 9]],
        [[4, 8, 12]],
    ]


def test_rows_written_after_the_last_saved_state_do_not_count(tmp_path):
    rows = merged(tmp_path, written(tmp_path, "a", [1, 0], extra=4))
    assert rows.read().tolist() == [[0, 0, 0], [1, 2, 3]]


def test_a_process_that_saw_nothing_adds_nothing(tmp_path):
    empty = Rows(3)
    empty.open(tmp_path, "empty")
    rows = merged(tmp_path, empty.state_dict())
    assert len(rows) == 0 and rows.read().shape == (0, 3) and len(rows.index()) == 0


def test_wrong_shapes_and_a_missing_folder_are_refused(tmp_path):
    rows = Rows(3)
    with pytest.raises(RuntimeError, match="open"):
        rows.append(torch.tensor([0]), torch.zeros(1, 3))
    rows.open(tmp_path, "a")
    with pytest.raises(ValueError, match=r"rows must have shape \(2, 3\); got \(2, 4\)"):
        rows.append(torch.tensor([0, 1]), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="width"):
        Rows(0)


def test_a_file_that_lost_rows_is_named(tmp_path):
    state = written(tmp_path, "a", [1, 0, 2])
    path = tmp_path / "a.rows"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.rows should hold 3 rows and is damaged"):
        merged(tmp_path, state).read()
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.rows should hold 3 rows and is damaged"):
        merged(tmp_path, state).index()


def test_what_a_state_counts_is_on_disk(tmp_path, monkeypatch):
    rows = Rows(3)
    rows.open(tmp_path, "a")
    rows.append(torch.tensor([5]), torch.ones(1, 3))
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    state = rows.state_dict()
    assert len(synced) == 1  # also where the machine loses power
    rows.append(torch.tensor([6]), torch.ones(1, 3))  # may stay in a buffer
    assert merged(tmp_path, state).index().tolist() == [5]
    assert state == {"file": "a.rows", "rows": 1}
