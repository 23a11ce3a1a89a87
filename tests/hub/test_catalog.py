"""The catalogue of published models: its facts against the architectures, and loading by name, file and repository.

The weights of the published models are not at hand. Their layout is: the tensors of the TiTok family are laid out here
from the description of the architecture, and the small fixtures of the originals take the place of released files.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vistok
from vistok.hub import catalog
from vistok.hub.catalog import CATALOG, find, of_file, of_repository
from vistok.hub.format import CheckpointError, latent_shape
from vistok.hub.load import load_with_source
from vistok.hub.published import FAMILIES

ROOT = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[2] / ".." / "shared" / "parity"))
TITOK = [model for model in CATALOG if model.family == "TiTok"]
SIZES = {"small": (512, 8), "base": (768, 12), "large": (1024, 24)}
KEYS = {"titok-s-128": 308, "titok-b-64": 404, "titok-l-32": 692, "titok-bl-64-vq": 459, "titok-sl-256-vq": 411}
KEYS |= {"tatitok-bl-128-vq": 462, "tatitok-sl-128-vae": 413, "one-d-piece-s-256": 308}


@pytest.fixture
def fixture():
    def fixture(name):
        if not (ROOT / name).is_dir():
            pytest.skip(f"no fixtures in {ROOT} (set VISTOK_PARITY)")
        return ROOT / name

    return fixture


def test_names_and_files_tell_models_apart():
    names = [model.name for model in CATALOG]
    files = [file for model in CATALOG for file in model.files]
    assert len(set(names)) == len(names) == 28 and len(set(files)) == len(files)
    for model in CATALOG:
        assert model.family in FAMILIES and FAMILIES[model.family].recognise(model.config)
        assert model.is_address or model.source.count("/") == 1
        assert model.grid is None or model.grid[0] * model.grid[1] == model.tokens
        assert model.continuous == (model.latent_dim is not None)
        assert json.loads(json.dumps(model.metadata)) == model.metadata
        assert 0 < model.rfid < 10


def transformer(prefix, size, tokens):
    width, layers = SIZES[size]
    shapes = {
        "class_embedding": (1, width),
        "positional_embedding": (257, width),
        "latent_token_positional_embedding": (tokens, width),
        **{f"ln_{place}.{kind}": (width,) for place in ("pre", "post") for kind in ("weight", "bias")},
    }
    for layer in range(layers):
        block = {f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
        block |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        block |= linear("attn.out_proj", width, width) | linear("mlp.c_fc", width, 4 * width)
        block |= linear("mlp.c_proj", 4 * width, width)
        shapes |= {f"transformer.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear(name, inside, outside, kernel=()):
    return {f"{name}.weight": (outside, inside, *kernel), f"{name}.bias": (outside,)}


def maskgit_decoder():
    """The decoder of MaskGIT's VQGAN: widths 128, 128, 256, 256, 512 from full resolution down."""
    shapes = linear("conv_in", 256, 512, (3, 3)) | linear("conv_out", 128, 3, (3, 3))
    shapes |= {"norm_out.weight": (128,), "norm_out.bias": (128,)}
    inside = 512
    for name in ("mid.0", "mid.1"):
        shapes |= residual(name, 512, 512)
    for level, outside in reversed(list(enumerate((128, 128, 256, 256, 512)))):
        for block in range(2):
            shapes |= residual(f"up.{level}.block.{block}", inside, outside)
            inside = outside
        if level:
            shapes |= linear(f"up.{level}.upsample_conv", outside, outside, (3, 3))
    return {f"pixel_decoder.{name}": shape for name, shape in shapes.items()}


def residual(name, inside, outside):
    shapes = {f"{name}.norm1.{kind}": (inside,) for kind in ("weight", "bias")}
    shapes |= {f"{name}.norm2.{kind}": (outside,) for kind in ("weight", "bias")}
    shapes |= {f"{name}.conv1.weight": (outside, inside, 3, 3), f"{name}.conv2.weight": (outside, outside, 3, 3)}
    if inside != outside:  # of the block's output in the released weights, hence not (outside, inside)
        shapes[f"{name}.nin_shortcut.weight"] = (outside, outside, 1, 1)
    return shapes


def released_titok(model):
    """Names and shapes of a released checkpoint of the TiTok family."""
    config = model.config["model"]["vq_model"]
    encoder, decoder, dim = config["vit_enc_model_size"], config["vit_dec_model_size"], config["token_size"]
    width, wide, tokens = SIZES[encoder][0], SIZES[decoder][0], config["num_latent_tokens"]
    shapes = transformer("encoder", encoder, tokens) | transformer("decoder", decoder, tokens)
    shapes |= {"latent_tokens": (tokens, width), "decoder.mask_token": (1, 1, wide)}
    shapes |= linear("encoder.patch_embed", 3, width, (16, 16)) | linear("decoder.decoder_embed", dim, wide)
    shapes |= linear("encoder.conv_out", width, dim * (1 if model.codebook else 2), (1, 1))
    if model.codebook:
        shapes["quantize.embedding.weight"] = model.codebook
    if config["is_legacy"]:
        shapes |= linear("decoder.ffn.0", wide, 2 * wide, (1, 1)) | linear("decoder.ffn.2", 2 * wide, 1024, (1, 1))
        shapes |= {"pixel_quantize.embedding.weight": (1024, 256), **maskgit_decoder()}
    else:
        shapes |= linear("decoder.ffn.0", wide, 768, (1, 1)) | linear("decoder.conv_out", 3, 3, (3, 3))
    if model.name.startswith("tatitok"):
        shapes |= linear("decoder.text_guidance_proj", 768, wide)
        shapes["decoder.text_guidance_positional_embedding"] = (77, wide)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("model", TITOK, ids=[model.name for model in TITOK])
def test_every_titok_reads_the_released_layout_and_has_the_published_parameters(model):
    state = released_titok(model)
    assert len(state) == KEYS.get(model.name, len(state))
    assert sum(tensor.numel() for tensor in state.values()) == model.parameters
    with torch.device("meta"):
        tokenizer, renamed = FAMILIES[model.family].read(model.config, {}, state, {})
    own = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in renamed.items()}
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == model.parameters
    assert tokenizer.image_size == (model.image_size,) * 2 and tokenizer.variable_length == model.variable_length
    assert tokenizer.takes_context == model.name.startswith("tatitok")
    if model.continuous:
        assert latent_shape(tokenizer) == (model.tokens, model.latent_dim)
    else:
        (stream,) = tokenizer.layout()
        assert (stream.length, stream.codebook_sizes) == (model.tokens, (model.codebook[0],))
        assert tokenizer.quantizer.dim == model.codebook[1]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llamagen-vq-16", 72), ("llamagen-vq-8", 70), ("taming-f16-1024", None), ("taming-f16-16384", None)],
)
def test_parameters_of_the_cnns_are_those_of_the_architecture(name, millions):
    model = find(name)
    sizes = model.config["model_args"] if "model_args" in model.config else model.config["model"]["params"]["ddconfig"]
    multipliers = sizes.get("encoder_ch_mult") or sizes["ch_mult"]
    with torch.device("meta"):
        quantizer = vistok.VectorQuantizer(*model.codebook)
        tokenizer = vistok.VQGAN(quantizer, model.image_size, channel_multipliers=multipliers)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == model.parameters
    assert millions is None or round(model.parameters / 1e6) == millions, "what the authors say"
    assert tokenizer.layout()[0].grid == model.grid


def test_unknown_names_suggest_the_closest():
    with pytest.raises(ValueError, match="no published model 'TiTok-L32'; did you mean 'titok-l-32'"):
        vistok.load("anything", model="TiTok-L32")
    with pytest.raises(FileNotFoundError, match="nothing to load at 'one-d-piece-l256'; did you mean 'one-d-piece-l-"):
        vistok.load("one-d-piece-l256")
    with pytest.raises(ValueError, match="no published model 'zebra'; vistok models lists"):
        find("zebra")


def test_repositories_and_files_lead_to_their_model():
    assert of_repository("yucornetto/tokenizer_titok_l32_imagenet", None) is find("titok-l-32")
    assert of_repository("turing-motors/One-D-Piece-S-256", "pytorch_model.bin") is find("one-d-piece-s-256")
    assert of_repository("fun-research/TiTok", "tokenizer_titok_s128.bin") is find("titok-s-128")
    assert of_repository("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin") is find("maskgit-vqgan")
    assert of_repository("FoundationVision/LlamaGen", "vq_ds8_c2i.pt") is find("llamagen-vq-8")
    for repository in ("fun-research/TiTok", "FoundationVision/LlamaGen", "somebody/else"):
        assert of_repository(repository, None) is None
    assert of_repository("FoundationVision/LlamaGen", "c2i_B_256.pt") is None
    assert of_file("model.safetensors") is of_file("last.ckpt") is None


def released(folder, fixture, file, wrap=dict):
    """A fixture's weights as a file that circulates alone."""
    torch.save(wrap(load_file(fixture / "model.safetensors")), folder / file)
    return folder / file


def same(tokenizer, other):
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in tokenizer.state_dict().items())


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("llamagen-vq-16", "llamagen-vq16"), ("taming-f16-1024", "taming-vqgan-f16"), ("maskgit-vqgan", "maskgit-vqgan")],
)
def test_a_lone_file_is_known_by_its_name(name, stand_in, fixture, tmp_path):
    model = find(name)
    path = released(tmp_path, fixture(stand_in), model.files[0])
    loaded = load_with_source(path)
    assert same(loaded.tokenizer, vistok.load(fixture(stand_in))) and loaded.tokenizer.image_size == (256, 256)
    assert (loaded.metadata, loaded.crop) == (model.metadata, model.crop)
    assert loaded.source == f"released checkpoint, {path}"
    assert same(loaded.tokenizer, vistok.load(tmp_path, filename=model.files[0]))
    with pytest.raises(ValueError, match="is a file; leave it out"):
        vistok.load(path, filename=model.files[0])


def test_a_file_of_another_name_needs_its_model_named(fixture, tmp_path):
    path = released(tmp_path, fixture("llamagen-vq16"), "mine.pt")
    with pytest.raises(CheckpointError, match="mine.pt is not a file name that Vistok knows.*model='titok-l-32'"):
        vistok.load(path)
    expected = vistok.load(fixture("llamagen-vq16"))
    assert same(vistok.load(path, model="llamagen-vq-16"), expected)
    assert same(vistok.load(tmp_path, model="llamagen-vq-16"), expected)
    (tmp_path / "config.json").write_text('{"somebody": "else"}')
    assert same(vistok.load(path, model="llamagen-vq-16"), expected)
    with pytest.raises(CheckpointError, match=r"neither a Vistok config nor one of a known family.*\['somebody'\]"):
        vistok.load(path)


def test_a_lone_checkpoint_that_is_not_ours_can_be_named(fixture, tmp_path):
    path = released(tmp_path, fixture("taming-vqgan-f16"), "last.ckpt", lambda state: {"state_dict": state})
    with pytest.raises(CheckpointError, match="last.ckpt is not a checkpoint of a Vistok training run"):
        vistok.load(path)
    assert vistok.load(path, model="taming-f16-1024").image_size == (256, 256)


def test_averaged_weights_are_taken_where_the_authors_take_them(fixture, tmp_path):
    def both(state):
        return {"model": {name: torch.zeros_like(tensor) for name, tensor in state.items()}, "ema": state, "steps": 3}

    path = released(tmp_path, fixture("llamagen-vq16"), "vq_ds16_c2i.pt", both)
    assert same(vistok.load(path), vistok.load(fixture("llamagen-vq16")))


def test_several_weights_are_listed_with_what_they_are(tmp_path):
    for name in ("tokenizer_titok_l32.bin", "generator_titok_l32.bin", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    listed = r"generator_titok_l32.bin, tokenizer_titok_l32.bin \(titok-l-32\)$"
    with pytest.raises(CheckpointError, match=f"several files of weights, give one of them as filename: {listed}"):
        vistok.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file .*other.bin; the folder holds"):
        vistok.load(tmp_path, filename="other.bin", model="titok-l-32")


def test_a_config_in_yaml_is_read(fixture, tmp_path):
    released(tmp_path, fixture("taming-vqgan-f16"), "last.ckpt", lambda state: {"state_dict": state})
    (tmp_path / "model.yaml").write_text((fixture("taming-vqgan-f16") / "config.json").read_text())
    assert vistok.load(tmp_path, filename="last.ckpt").image_size == (64, 64)
    (tmp_path / "last.ckpt").rename(tmp_path / "model.ckpt")
    assert vistok.load(tmp_path).image_size == (64, 64)
    (tmp_path / "model.yaml").write_text("!!python/object/apply:os.mkdir [/tmp/sprung]")
    with pytest.raises(CheckpointError, match="model.yaml cannot be read as YAML"):
        vistok.load(tmp_path)


def test_the_weights_of_an_export_stand_for_its_folder(titok, images, tmp_path):
    folder = vistok.save(titok(), tmp_path / "export")
    for loaded in (vistok.load(folder / "model.safetensors"), vistok.load(folder, filename="model.safetensors")):
        assert same(loaded, titok())
    with pytest.raises(CheckpointError, match="no weights of the TiTok family|do not match"):
        vistok.load(folder, model="titok-l-32")


def test_known_names_of_training_scripts_are_read_as_nothing(fixture, tmp_path, monkeypatch):
    """Old checkpoints of Lightning key the state of a callback by its class, others hold the command line."""
    module = type(sys)("pytorch_lightning.callbacks.made_up")
    callback = type("Made", (), {"__module__": module.__name__})
    module.Made = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = {"epoch": 3, "callbacks": {callback: {"best": torch.ones(1), "object": callback()}}}
    state["args"] = argparse.Namespace(lr=1e-4)
    path = released(
        tmp_path, fixture("taming-vqgan-f16"), "vqgan_imagenet_f16_1024.ckpt", lambda s: {**state, "state_dict": s}
    )
    monkeypatch.undo()
    assert vistok.load(path).image_size == (256, 256)


@pytest.mark.parametrize("function", [os.mkdir, shutil.rmtree], ids=["mkdir", "rmtree"])
def test_nothing_in_a_released_pickle_runs(function, fixture, tmp_path):
    target = tmp_path / "target"
    if function is shutil.rmtree:
        target.mkdir()

    class Bomb:
        def __reduce__(self):
            return function, (str(target),)

    path = released(
        tmp_path, fixture("taming-vqgan-f16"), "vqgan_imagenet_f16_1024.ckpt", lambda s: {"x": Bomb(), "state_dict": s}
    )
    with pytest.raises(CheckpointError, match=f"f16_1024.ckpt is not a file of weights.*{function.__name__}"):
        vistok.load(path)
    assert target.exists() == (function is shutil.rmtree)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1], "holds a list"),
        ({}, "it is empty"),
        ({"model": {"a": 3}}, "'a' is not a tensor; .* state_dict, model"),
    ],
)
def test_pickles_without_weights_are_refused(content, reason, tmp_path):
    torch.save(content, tmp_path / "tokenizer_titok_l32.bin")
    with pytest.raises(CheckpointError, match=f"tokenizer_titok_l32.bin .*{reason}"):
        vistok.load(tmp_path / "tokenizer_titok_l32.bin")
    (tmp_path / "tokenizer_titok_l32.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="is not a file of weights, or is damaged"):
        vistok.load(tmp_path / "tokenizer_titok_l32.bin")


def test_a_model_at_an_address_is_fetched_and_kept(fixture, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    released(folder, fixture("taming-vqgan-f16"), "x", lambda state: {"state_dict": state})

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/x"
    changed = [dataclasses.replace(m, source=address) if m.name == "taming-f16-1024" else m for m in CATALOG]
    monkeypatch.setattr(catalog, "CATALOG", tuple(changed))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "downloads" / "vqgan_imagenet_f16_1024.ckpt"
    with pytest.raises(FileNotFoundError, match=f"{path} is not there, and downloads are off.*fetch {address}"):
        vistok.load("taming-f16-1024", local_files_only=True)
    loaded = load_with_source("taming-f16-1024")
    server.shutdown()
    server.server_close()
    assert loaded.source == f"released checkpoint, {address} as {path}" and loaded.metadata["published_rfid"] == 7.94
    assert same(loaded.tokenizer, vistok.load("taming-f16-1024", local_files_only=True))
    assert same(loaded.tokenizer, vistok.load(path))
    with pytest.raises(ValueError, match="taming-f16-1024 is one model; leave it out"):
        vistok.load("taming-f16-1024", filename="last.ckpt")
    shutil.copy(path, tmp_path / "cache" / path.name)
    assert same(loaded.tokenizer, vistok.load("taming-f16-1024", cache_dir=tmp_path / "cache", local_files_only=True))


_spec = importlib.util.spec_from_file_location("vistok_test_hub", Path(__file__).with_name("stand_in_hub.py"))
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

FROM_THE_HUB = """
import dataclasses, json
from pathlib import Path
from vistok.hub import catalog
from vistok.hub.load import load_with_source
calls = json.loads(sys.argv[1])
config = json.loads(Path(sys.argv[2]).read_text())
sizes = {"encoder_size": (48, 2, 3), "decoder_size": (48, 2, 3)}
for name, arguments in calls:
    if arguments.pop("small", False):
        model = catalog.of_name(name) or catalog.of_repository(name, None)
        small = dataclasses.replace(model, config=config)
        catalog.CATALOG = tuple(small if other is model else other for other in catalog.CATALOG)
        arguments |= sizes
    try:
        loaded = load_with_source(name, **arguments)
        print(type(loaded.tokenizer).__name__, loaded.metadata.get("published_model"), loaded.source, sep="; ")
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()), sep="; ")
"""


def ask(hub, folder, fixture, *calls):
    """What loading says, a line per call, and which files it fetched."""
    script = (FROM_THE_HUB, json.dumps(calls), fixture / "config.json")
    run = stand_in.client(*script, hub=hub, cache=folder / "cache")
    assert run.returncode == 0, run.stderr
    fetched = {line.rsplit("/", 1)[-1] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    return run.stdout.splitlines(), fetched


def test_as_little_of_a_repository_is_fetched_as_a_model_needs(fixture, tmp_path):
    llamagen, one_d_piece = "FoundationVision/LlamaGen", "turing-motors/One-D-Piece-S-256"
    files = {"README.md": b"", "c2i_B_256.pt": b"x", "vq_ds8_c2i.pt": b"x"}
    files["vq_ds16_c2i.pt"] = released(tmp_path, fixture("llamagen-vq16"), "w").read_bytes()
    plain = {"README.md": b"", "optimizer.bin": b"x"}  # and no config: the catalogue's counts
    plain["pytorch_model.bin"] = released(tmp_path, fixture("onedpiece"), "w").read_bytes()
    with stand_in.running_hub(llamagen) as hub:
        hub.repos |= {llamagen: {"main": files}, one_d_piece: {"main": plain}}
        lines, fetched = ask(
            hub,
            tmp_path,
            fixture("onedpiece"),
            ("llamagen-vq-16", {}),
            (llamagen, {"filename": "vq_ds16_c2i.pt"}),
            (llamagen, {}),
            (llamagen, {"filename": "nothing.pt"}),
            (one_d_piece, {"small": True}),
            ("llamagen-vq-16", {"local_files_only": True}),
            ("llamagen-vq-8", {"local_files_only": True}),
            ("titok-l-32", {"local_files_only": True}),
        )
    origin = f"released checkpoint, repository {llamagen} at {stand_in.COMMIT}"
    assert lines[0] == lines[1] == lines[5] == f"VQGAN; llamagen-vq-16; {origin}"
    choice = "c2i_B_256.pt, vq_ds16_c2i.pt (llamagen-vq-16), vq_ds8_c2i.pt (llamagen-vq-8)"
    assert lines[2].startswith("ValueError; repository") and lines[2].endswith(f"one of them as filename: {choice}")
    assert lines[3].startswith("FileNotFoundError; 'nothing.pt' of repository") and "c2i_B_256.pt, vq_" in lines[3]
    assert lines[4].startswith(f"OneDPiece; one-d-piece-s-256; released checkpoint, repository {one_d_piece} at ")
    assert lines[6].startswith("FileNotFoundError; ") and llamagen in lines[6], "some clients notice it themselves"
    assert "downloads are off, give the path of a local copy" in lines[7]
    assert fetched == {"vq_ds16_c2i.pt", "pytorch_model.bin"}
