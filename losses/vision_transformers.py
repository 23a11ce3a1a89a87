"""Frozen vision transformers of timm: built by name, filled from a file or by timm's own download."""

from __future__ import annotations

import sys

from torch import nn

from ..layers.weights_file import read_weights_file


def vision_transformer(model: str, weights: str | None, image_size: tuple[int, int] | None = None) -> nn.Module:
    """A vision transformer of timm with its weights and without a head.

    Args:
        model: timm's name.
        weights: file of the weights, safetensors or a pickle of tensors, with timm's or the authors' key names; timm's
            download (the Hugging Face Hub) if ``None``.
        image_size: ``(H, W)``; position embeddings are resampled to match. The model's own if ``None``.

    Raises:
        ValueError: for a name or size that timm does not have, what is no vision transformer, or a file that is not
            the weights of this model.
        FileNotFoundError: if the weights are neither given nor to be downloaded.
    """
    import timm

    if not timm.is_model(model):
        name = model.split(".")[0]
        close = timm.list_models(f"*{name.split('_')[-1]}*")[:5] or timm.list_models("vit_*dinov2*")
        raise ValueError(f"model {model!r} is not in timm {timm.__version__}; there are {', '.join(close)} ...")
    options = {"num_classes": 0} if image_size is None else {"num_classes": 0, "img_size": image_size}
    if weights is None:
        network = _downloaded(model, options)
    else:
        network = _created(model, options)
        _load(network, model, weights)
    if not hasattr(network, "forward_features") or not hasattr(network, "num_prefix_tokens"):
        raise ValueError(f"model {model!r} is a {type(network).__name__}; a vision transformer is needed")
    return network


def _created(model: str, options: dict, pretrained: bool = False) -> nn.Module:
    import timm

    try:
        return timm.create_model(model, pretrained=pretrained, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"timm cannot build {model!r} with {options}: {error}") from error


def _downloaded(model: str, options: dict) -> nn.Module:
    try:
        return _created(model, options, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # a hub client fails with many types: connection, HTTP, missing entry, cache
        message = f"the weights of {model!r} cannot be downloaded ({error}); {_remedy(model)}"
        raise FileNotFoundError(message) from error


def _load(network: nn.Module, model: str, path: str) -> None:
    """Load a weights file, with timm's translation of key names and positions."""
    state = read_weights_file(path, _remedy(model))
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        state = translate(state, network) if translate is not None else state
        # Heads and projections of the file have no place here; what the network has must all be there.
        missing = network.load_state_dict(state, strict=False).missing_keys
    except Exception as error:  # whatever a translation stumbles over in a foreign file
        raise ValueError(f"weights: {path} does not fit {model!r} ({error}); {_remedy(model)}") from error
    if missing:
        raise ValueError(
            f"weights: {path} lacks {missing[0]!r} of {model!r} ({len(missing)} missing); {_remedy(model)}"
        )


def _remedy(model: str) -> str:
    import timm

    config = timm.get_pretrained_cfg(model)
    places = []
    if config is not None and config.hf_hub_id:
        places.append(f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors")
    if config is not None and config.url:
        places.append(config.url)
    if not places:
        return f"timm publishes no weights for {model!r}; give the path of a file as weights"
    return f"fetch {' or '.join(places)} on a machine with internet access and give its path as weights"
