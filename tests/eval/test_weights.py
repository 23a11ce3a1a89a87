"""Weights of judging networks: found where they lie, refused if they are others."""

import hashlib

import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.weights import FILES, Weights, WeightsFile


@pytest.fixture
def known(monkeypatch, tmp_path):
    """A published file with contents that this test knows."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    digest = hashlib.sha256(b"published").hexdigest()
    monkeypatch.setitem(FILES, "net", WeightsFile("net.pth", "http://127.0.0.1:9/net.pth", digest[:8]))
    return digest


def test_the_given_folder_comes_before_the_cache(tmp_path, known):
    for folder in (tmp_path / "given", tmp_path / "hub" / "checkpoints"):
        folder.mkdir(parents=True)
        (folder / "net.pth").write_bytes(b"published")
    assert Weights(tmp_path / "given").find("net") == tmp_path / "given" / "net.pth"
    assert Weights().find("net") == tmp_path / "hub" / "checkpoints" / "net.pth"
    assert Weights().sha256(tmp_path / "given" / "net.pth") == known


def test_a_file_of_another_hash_is_refused_unless_asked_for(tmp_path, known):
    (tmp_path / "net.pth").write_bytes(b"another")
    with pytest.raises(ValueError, match="is not the published net.pth: its SHA-256 begins with"):
        Weights(tmp_path).find("net")
    assert Weights(tmp_path, check=False).find("net") == tmp_path / "net.pth"


def test_missing_weights_say_where_to_get_them_and_where_to_put_them(tmp_path, known):
    with pytest.raises(MetricUnavailable, match=rf"fetch http://127.0.0.1:9/net.pth .* put it at {tmp_path}/net.pth"):
        Weights(tmp_path, download=False).find("net")


def test_published_names_end_in_the_hash_that_is_checked():
    for file in FILES.values():
        assert file.name.endswith(f"-{file.sha256}.pth") and file.address.endswith(file.name)


def test_files_of_other_networks_are_found_by_their_name(tmp_path):
    assert Weights().optional("net") is None and Weights(tmp_path).optional("net") is None
    for suffix in (".bin", ".pth", ".safetensors"):
        (tmp_path / f"net{suffix}").write_bytes(b"weights")
        assert Weights(tmp_path).optional("net") == tmp_path / f"net{suffix}"


def test_what_was_not_published_is_named_with_its_hash(tmp_path, known):
    weights = Weights(tmp_path, check=False)
    (tmp_path / "net.pth").write_bytes(b"published")
    weights.find("net")
    assert weights.unpublished() == ""
    other = Weights(tmp_path, check=False)
    (tmp_path / "net.pth").write_bytes(b"another")
    other.find("net")
    assert other.unpublished() == f"net:{hashlib.sha256(b'another').hexdigest()[:8]}"
