"""Every published recipe parses, says where it comes from, and builds the published model to the parameter."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.training.cli import TokenizerCLI
from vistok.training.freezing import freeze

_spec = importlib.util.spec_from_file_location("vistok_test_runs", Path(__file__).with_name("runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

# Parameters of the whole tokenizer, counted with the original implementations. LlamaGen's and taming's follow from
# their published configurations.
PIXELS = 30_478_339 + 262_144  # MaskGIT-VQGAN's decoder and codebook, which stage 1 does not have
PARAMETERS = {
    "titok/s128_stage1": 83_674_639 - PIXELS,
    "titok/s128_stage2": 83_674_639,
    "titok/b64_stage1": 204_814_095 - PIXELS,
    "titok/b64_stage2": 204_814_095,
    "titok/l32_stage1": 641_054_735 - PIXELS,
    "titok/l32_stage2": 641_054_735,
    "titok/bl64_vq8k": 390_016_148,
    "titok/bl128_vq8k": 390_179_988,
    "titok/sl256_vq8k": 330_260_884,
    "ta_titok/bl32": 390_800_532,
    "ta_titok/bl64": 390_882_452,
    "ta_titok/bl128": 391_046_292,
    "one_d_piece/s256_stage1": 83_871_247 - PIXELS,
    "one_d_piece/s256_stage2": 83_871_247,
    "one_d_piece/b256_stage1": 205_256_463 - PIXELS,
    "one_d_piece/b256_stage2": 205_256_463,
    "one_d_piece/l256_stage1": 641_742_863 - PIXELS,
    "one_d_piece/l256_stage2": 641_742_863,
    "gigatok/s_s": 129_252_619,  # without the head that is aligned with DINOv2, a part of the loss here
    "gigatok/s_b": 218_236_939,
    "gigatok/b_l": 597_510_923,
    "gigatok/b_l_dino": 597_510_923,
    "gigatok/xl_xxl": 2_842_052_875,
    "vqgan/maskgit_vqgan": 23_775_104 + 30_478_339 + 262_144,
    "vqgan/llamagen_vq16": 71_883_403,
    "vqgan/llamagen_vq8": 70_109_835,
    "vqgan/taming_f16_1024": 72_141_699,
    "vqgan/taming_f16_16384": 76_073_859,
}
TRAINABLE = {
    "titok/s128_stage2": 57_741_315,
    "titok/b64_stage2": 118_811_139,
    "titok/l32_stage2": 337_562_627,
    "one_d_piece/s256_stage2": 57_806_851,
    "one_d_piece/b256_stage2": 118_958_595,
    "one_d_piece/l256_stage2": 337_792_003,
}
FOLDERS = ("titok", "ta_titok", "one_d_piece", "gigatok", "vqgan")
CONFIGS = runs.ROOT / "configs"
FILES = {f"{path.parent.name}/{path.stem}": path for f in FOLDERS for path in (CONFIGS / f).glob("*.yaml")}


class Parsed(TokenizerCLI):
    """Parses, which checks every name and type, and builds nothing (the losses need files of weights)."""

    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@functools.cache
def parse(name):
    return Parsed(["fit", "--config", str(FILES[name])]).config["fit"]


def test_the_table_lists_every_recipe():
    assert set(FILES) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_recipe_builds_the_published_model(name):
    config = parse(name)
    with torch.device("meta"):
        tokenizer = build(config.model.tokenizer.as_dict())
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == PARAMETERS[name]
    freeze(tokenizer, config.model.freeze)
    trainable = sum(parameter.numel() for parameter in tokenizer.parameters() if parameter.requires_grad)
    assert trainable == TRAINABLE.get(name, PARAMETERS[name])


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_recipe_states_source_batch_steps_and_published_rfid(name):
    text, config = FILES[name].read_text(), parse(name)
    head = text[: text.index("seed_everything")]
    assert f"configs/{name}.yaml" in head and re.search(r"arXiv:\d{4}\.\d{5}", head)
    assert re.search(r"[Pp]ublished rFID|No rFID", head)
    batch = config.data.batch_size * config.trainer.devices * (config.trainer.accumulate_grad_batches or 1)
    batch *= config.trainer.num_nodes
    stated = re.search(r"[Gg]lobal batch (\d+)|\(8 x 32 = (\d+)\)", head)
    assert batch == int(stated[1] or stated[2])
    steps = re.search(r"([\d,]+) steps", head)[1]
    assert config.trainer.max_steps == int(steps.replace(",", ""))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_other_recipes_parse_and_build_their_tokenizers(path):
    config = Parsed(["fit", "--config", str(path)]).config["fit"]
    with torch.device("meta"):
        tokenizer = build(config.model.tokenizer.as_dict())
    freeze(tokenizer, config.model.freeze)
    assert path.read_text().startswith("#") and f"configs/{path.name}" in path.read_text()
