"""Push to a hub and load from it, against a stand-in server on this machine."""

import importlib.util
from pathlib import Path

import pytest

import vistok

_spec = importlib.util.spec_from_file_location("vistok_test_hub", Path(__file__).with_name("stand_in_hub.py"))
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)
client, COMMIT = stand_in.client, stand_in.COMMIT

REPO = "someone/my-titok"


@pytest.fixture
def hub():
    with stand_in.running_hub(REPO) as server:
        yield server


ROUND_TRIP = """
import vistok.hub.load
folder, images = sys.argv[1], torch.load(sys.argv[2])
tokenizer = vistok.load(folder)
address = vistok.push(tokenizer, "someone/my-titok", private=True, commit_message="First", metadata={"license": "mit"})
vistok.push(tokenizer, "someone/my-titok")  # a second time, to the repository that is there
tokenizer.push_to_hub("someone/my-titok", revision="trial")
print(address)
loaded = vistok.load("someone/my-titok")
other = vistok.load("someone/my-titok", revision="trial")
for name, tensor in tokenizer.state_dict().items():
    assert torch.equal(tensor, loaded.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name]), name
tokens, again = tokenizer.encode(images), loaded.encode(images)
assert torch.equal(tokens.indices["image"], again.indices["image"])
assert torch.equal(tokenizer.decode(tokens), loaded.decode(again))
print(vistok.hub.load.load_with_source("someone/my-titok").source)
for revision in ("nothing", None):
    try:
        vistok.load("someone/my-titok" if revision else "someone/else", revision=revision)
    except FileNotFoundError as error:
        print("refused:", error)
"""

OFFLINE = """
tokenizer = vistok.load("someone/my-titok")
assert torch.equal(tokenizer.quantizer.codebook, vistok.load(sys.argv[1]).quantizer.codebook)
try:
    vistok.load("someone/not-cached")
except FileNotFoundError as error:
    print("refused:", error)
"""


def test_pushed_tokenizer_loads_from_the_hub_and_then_from_the_cache(hub, titok, images, tmp_path):
    import torch

    folder = vistok.save(titok(), tmp_path / "export")
    torch.save(images, tmp_path / "images.pt")
    run = client(ROUND_TRIP, folder, tmp_path / "images.pt", hub=hub, cache=tmp_path / "cache")
    assert run.returncode == 0, run.stderr
    address, source, bad_revision, bad_name = run.stdout.splitlines()
    assert address == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert source == f"repository {REPO} at {COMMIT}"
    assert "there is no folder 'someone/my-titok', and the repository of that name cannot be fetched" in bad_revision
    assert "there is no folder 'someone/else', and the repository of that name cannot be fetched" in bad_name
    assert set(hub.repos[REPO]) == {"main", "trial"} and hub.private == {REPO}
    assert {"config.json", "model.safetensors", "README.md"} < set(hub.repos[REPO]["main"])
    fetched = {line.rsplit("/", 1)[-1] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors"}
    assert hub.messages == ["First", "Upload tokenizer", "Upload tokenizer"]
    assert 'vistok.load("someone/my-titok")' in hub.repos[REPO]["main"]["README.md"].decode()

    asked = len(hub.log)
    run = client(OFFLINE, folder, hub=hub, cache=tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused: there is no folder 'someone/not-cached'")
    assert len(hub.log) == asked
