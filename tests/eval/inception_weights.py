"""A file of Inception weights that has the right shape and random values, made once per session."""

import io

import torch


def save_random_inception(path, seed=0):
    """He-normal convolutions and slightly varied normalization, under torch-fidelity's names; 96 MB."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **_):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):  # no initial values: names and shapes are all that is needed
        network = Unloaded("inception", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in network.state_dict().items():
        value = torch.zeros(like.shape, dtype=like.dtype)
        if value.dim() == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.8, 1.25, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(0, 0.1, generator=generator)
        elif name.startswith("fc."):
            value.normal_(0, 0.05, generator=generator)
        state[name] = value
    torch.save(state, path)
    return path
