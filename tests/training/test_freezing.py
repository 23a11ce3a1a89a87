"""Frozen parts: no gradient, eval mode, outside of optimizer and moving average; first weights from elsewhere."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from vistok import VectorQuantizer
from vistok.data.demo import DemoPhotographs
from vistok.data.module import ImageData
from vistok.training.ema import ema_copy
from vistok.training.initialization import Initialization, initialize
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective
from vistok.training.optimization import Optimization

_spec = importlib.util.spec_from_file_location("vistok_test_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


def module(tokenizer, **options):
    optimizer = Optimization(lr=1e-2, weight_decay=0.1, schedule="constant")
    return TokenizerTraining(tokenizer, ReconstructionObjective(), optimizer, ema_decay=0.9, **options)


def test_frozen_parts_stay_and_the_rest_trains():
    tokenizer = small.titok()
    before = copy.deepcopy(tokenizer.state_dict())
    model = module(tokenizer, freeze=["encoder", "quantizer", "decoder.mask_token"])
    trainer = small.fit(model, 5)
    for name, value in tokenizer.state_dict().items():
        frozen = name.startswith(("encoder.", "quantizer.")) or name == "decoder.mask_token"
        assert torch.equal(value, before[name]) == frozen, name
        assert torch.equal(model.ema_tokenizer.state_dict()[name], value) == frozen, name
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    expected = {id(p) for p in tokenizer.decoder.parameters()} - {id(tokenizer.decoder.mask_token)}
    assert trained == expected
    assert all(parameter.grad is None for parameter in tokenizer.encoder.parameters())
    assert not tokenizer.encoder.training and not tokenizer.quantizer.training and tokenizer.decoder.training
    model.eval().train()
    assert not tokenizer.encoder.training and not model.ema_tokenizer.training


def test_the_moving_average_holds_frozen_parts_once():
    tokenizer = small.titok()
    model = module(tokenizer, freeze=["encoder"])
    assert model.ema_tokenizer.encoder is tokenizer.encoder and model.ema_tokenizer.decoder is not tokenizer.decoder
    assert not model.ema_tokenizer.decoder.to_pixels.weight.requires_grad
    assert ema_copy(tokenizer).encoder is not tokenizer.encoder


def test_a_frozen_codebook_is_not_restarted_or_averaged():
    quantizer = VectorQuantizer(16, 4, codebook_update="ema", restart_after=1)
    tokenizer = small.TiTok(quantizer, 16, 8, 3, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2))
    before = copy.deepcopy(quantizer.state_dict())
    small.fit(module(tokenizer, freeze=["quantizer"]), 4)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_a_name_that_is_no_part_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'enc' is no part of TiTok; its parts are \[.*'encoder'.*'decoder'\]"):
        module(small.titok(), freeze=["enc"])


@pytest.fixture
def export(tmp_path):
    torch.manual_seed(5)
    other = small.titok()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return other, str(other.save_pretrained(tmp_path / "other"))


def test_named_parts_start_from_another_tokenizer_and_so_does_the_average(export):
    other, source = export
    model = module(small.titok(), initialize=[Initialization(source, {"encoder": "encoder"})])
    fresh = copy.deepcopy(model.tokenizer.decoder.state_dict())

    class Look(small.pl.Callback):
        def on_train_start(self, trainer, module):
            for tokenizer in (module.tokenizer, module.ema_tokenizer):
                expected = other.encoder.state_dict() | {}
                assert all(torch.equal(value, expected[name]) for name, value in tokenizer.encoder.state_dict().items())
                assert all(torch.equal(value, fresh[name]) for name, value in tokenizer.decoder.state_dict().items())

    small.fit(model, 1, callbacks=[Look()])


def test_parts_can_be_renamed_and_put_together_from_several_sources(export):
    other, source = export
    model = small.titok()
    before = copy.deepcopy(model.state_dict())
    initialize(
        model,
        [
            Initialization(
                source, {"decoder.blocks.1": "decoder.blocks.0", "quantizer.codebook": "quantizer.codebook"}
            ),
            Initialization(source, {"encoder": "encoder"}),
        ],
    )
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("decoder.blocks.1."):
            assert torch.equal(value, theirs[name.replace("blocks.1.", "blocks.0.")])
        else:
            copied = name.startswith("encoder.") or name == "quantizer.codebook"
            assert torch.equal(value, theirs[name] if copied else before[name])
    initialize(model, [Initialization(source)])
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_what_has_no_counterpart_is_named(export):
    _, source = export
    wide = small.TiTok(VectorQuantizer(16, 4), 16, 8, 5, encoder_size=(32, 3, 2), decoder_size=(32, 2, 2))
    with pytest.raises(ValueError, match=r"encoder.latent_\w+ .* shape \(3, 32\).*shape \(5, 32\)"):
        initialize(wide, [Initialization(source, {"encoder": "encoder"})])
    with pytest.raises(ValueError, match=r"no source has \['encoder.blocks.2"):
        initialize(wide, [Initialization(source, {"encoder.blocks": "encoder.blocks"})])
    with pytest.raises(ValueError, match="has no part 'pixels'"):
        initialize(small.titok(), [Initialization(source, {"decoder": "pixels"})])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        initialize(small.titok(), [Initialization("nowhere at all")])


def test_a_cache_of_features_refuses_images_that_change_from_epoch_to_epoch():
    class Cached(ReconstructionObjective):
        needs_fixed_images = True

    def run(**data):
        module = TokenizerTraining(small.titok(), Cached(), Optimization(schedule="constant"))
        source = DemoPhotographs(num_samples=8)
        small.fit(module, 1, data=ImageData(source, image_size=16, batch_size=4, num_workers=0, **data))

    run(crop="center", flip=0.0)
    for data in ({"crop": "random", "flip": 0.0}, {"crop": "center", "flip": 0.5}):
        with pytest.raises(ValueError, match=f"data.crop={data['crop']}, data.flip={data['flip']}"):
            run(**data)
