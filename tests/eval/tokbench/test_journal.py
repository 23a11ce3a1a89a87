"""Entries that outlive the process."""

import numpy as np
import pytest

from vistok.eval.tokbench.journal import Journal, pixels_sha256

SETTINGS = {"size": 256, "subject": "a"}


def entry(name, value=0):
    return {"image": name, "value": value}


def test_entries_are_found_again_by_another_process(tmp_path):
    journal = Journal(tmp_path / "deep" / "j.jsonl", SETTINGS)
    journal.append([entry("a", 1), entry("ü", "ß")])
    journal.append([entry("b", 2), entry("a", 3)])
    again = Journal(tmp_path / "deep" / "j.jsonl", SETTINGS)
    for each in (journal, again):
        assert len(each) == 3 and "b" in each and "c" not in each
        assert each.find("ü") == entry("ü", "ß") and each.find("c") is None
        assert list(each.entries(["b", "a"])) == [entry("b", 2), entry("a", 3)]


def test_a_torn_line_is_forgotten_and_written_again(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, SETTINGS).append([entry("a"), entry("b")])
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, SETTINGS)
        missing = [name for name in "ab" if name not in journal]
        journal.append([entry(name) for name in missing])
        assert path.read_bytes() == whole


def test_another_run_does_not_go_on_in_the_same_file(tmp_path):
    Journal(tmp_path / "j.jsonl", SETTINGS).append([entry("a")])
    with pytest.raises(ValueError, match="belongs to a run with other size; delete it or use another folder"):
        Journal(tmp_path / "j.jsonl", SETTINGS | {"size": 512})
    assert "a" in Journal(tmp_path / "j.jsonl", SETTINGS)


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "j.jsonl"
    for content in (b"hello\n", b"[1, 2]\n", b'{"size": 256, "subject": "a"}\n{"no": "image"}\n'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"j.jsonl"):
            Journal(path, SETTINGS)
        assert path.read_bytes() == content


def test_two_writers_do_not_mix_their_lines(tmp_path):
    first, second = Journal(tmp_path / "j.jsonl", SETTINGS), Journal(tmp_path / "j.jsonl", SETTINGS)
    first.append([entry("a", 1)])
    second.append([entry("b", 2)])
    first.append([entry("c", 3)])
    assert first.find("c") == entry("c", 3) and second.find("b") == entry("b", 2)
    assert len(Journal(tmp_path / "j.jsonl", SETTINGS)) == 3


def test_hash_of_pixels_knows_their_shape():
    pixels = np.arange(24, dtype=np.uint8)
    assert pixels_sha256(pixels.reshape(2, 4, 3)) != pixels_sha256(pixels.reshape(4, 2, 3))
    assert pixels_sha256(pixels.reshape(2, 4, 3)) == pixels_sha256(np.asfortranarray(pixels.reshape(2, 4, 3)))
