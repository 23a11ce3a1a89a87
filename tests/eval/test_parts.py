"""The folder of an unfinished evaluation: one evaluation at a time, one plan, whole parts."""

import multiprocessing
import time

import pytest
import torch

from vistok.eval.metric import EvaluationError
from vistok.eval.parts import claimed, covered, prepare_parts, read_parts, write_part


def claim(folder, connection):
    """Claim the folder, say so, and hold it until told to stop."""
    try:
        with claimed(folder):
            connection.send("claimed")
            connection.recv()
    except ValueError as error:
        connection.send(str(error))


def other_process(folder):
    """A process that claims the folder, and what it says."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=claim, args=(folder, there), daemon=True)
    process.start()
    assert here.poll(60)
    return process, here.recv()


def test_a_folder_belongs_to_one_process_until_that_is_done_or_dead(tmp_path):
    folder = tmp_path / "out" / "unfinished"
    with claimed(folder):
        process, said = other_process(folder)
        process.join()
        assert said.startswith(f"another evaluation is at work in {tmp_path / 'out'};")
    process, said = other_process(folder)
    assert said == "claimed"
    with pytest.raises(EvaluationError, match="another evaluation is at work"), claimed(folder):
        pass
    process.kill()
    process.join()
    with claimed(folder):
        pass


def test_processes_that_read_for_an_evaluation_do_not_claim_its_folder(tmp_path):
    with claimed(tmp_path):
        reader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        reader.start()
    process, said = other_process(tmp_path)
    assert said == "claimed"
    for one in (reader, process):
        one.kill()


def test_parts_come_back_in_order_and_say_what_they_cover(tmp_path):
    write_part(tmp_path / "0001-0000.pt", {"index": torch.tensor([7, 2]), "unreadable": {5: "damaged"}})
    write_part(tmp_path / "0000-0001.pt", {"index": torch.tensor([1]), "unreadable": {}})
    parts = read_parts(tmp_path)
    assert [part["index"].tolist() for part in parts] == [[1], [7, 2]]
    assert covered(parts).tolist() == [1, 7, 2, 5]
    assert covered([]).tolist() == []


def test_a_plan_that_cannot_be_read_is_named(tmp_path):
    prepare_parts(tmp_path, {"a": (1, 2)}, resume=False)
    prepare_parts(tmp_path, {"a": (1, 3)}, resume=False)  # nothing was done by the first plan
    write_part(tmp_path / "0000-0000.pt", {})
    prepare_parts(tmp_path, {"a": (1, 3)}, resume=True)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"plan.json cannot be read \(.*\); begin again"):
        prepare_parts(tmp_path, {"a": (1, 3)}, resume=True)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(EvaluationError, match=r"plan.json cannot be read"):
        prepare_parts(tmp_path, {"a": (1, 3)}, resume=True)


def test_all_differences_of_plans_are_named(tmp_path):
    prepare_parts(tmp_path, {"a": 1, "b": 2, "c": 3}, resume=False)
    write_part(tmp_path / "0000-0000.pt", {})
    with pytest.raises(EvaluationError, match=r"\(a: 1 there, None now; b: 2 there, 4 now; d: None there, 5 now\)"):
        prepare_parts(tmp_path, {"b": 4, "c": 3, "d": 5}, resume=True)
