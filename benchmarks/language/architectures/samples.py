"""Random tokens, images and sounds, of the sizes that a config asks for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.language.architectures.rules import VOCABULARY


def lookup(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of some entries that a config has, or else one of its parts."""
    configs = [config]
    while configs:
        current = configs.pop(0)
        for name in names:
            value = vars(current).get(getattr(current, "attribute_map", {}).get(name, name))
            if value is not None:
                return value
        configs += [part for part in vars(current).values() if isinstance(part, transformers.PreTrainedConfig)]
    return default


def lookup_integer(config: Any, *names: str, default: int) -> int:
    """Return the same, or the default where the first is no integer."""
    value = lookup(config, *names)
    return value if isinstance(value, int) else default


def channels_of(config: Any) -> Any:
    """Return the count of an image's channels."""
    return lookup(config, "in_channels", "num_channels", "in_chans", default=3)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    """Return Gaussian noise, the same for the same shape."""
    return torch.randn(*shape, generator=generator())


def ones(*shape: int) -> Tensor:
    """Return a mask of ones."""
    return torch.ones(*shape, dtype=torch.long)


def tokens(config: Any, batch: int = 2, length: int = 12) -> Tensor:
    """Return token ids [batch, length], not of the first and last of the vocabulary, which are special."""
    vocabulary: Any = None
    with contextlib.suppress(Exception):  # some configs have no text part, and say so in their own ways
        vocabulary = config.get_text_config().vocab_size
    vocabulary = vocabulary or lookup(config, "vocab_size", default=VOCABULARY)
    end = vocabulary - 40 if vocabulary >= 200 else vocabulary
    ids: Tensor = torch.randint(min(5, max(0, end - 2)), max(end, 6), (batch, length), generator=generator(3))
    return ids.remainder(max(1, vocabulary))


def boxes() -> Tensor:
    """Return the boxes of twelve tokens in a document [2, 12, 4]."""
    corners = torch.randint(0, 60, (2, 12, 2, 2), generator=generator(6))
    return torch.sort(corners, dim=2)[0].reshape(2, 12, 4)


def images(config: Any, batch: int = 2) -> list[Tensor]:
    """Return images [batch, channels, side, side] of the config's side, and of usual ones."""
    channels = lookup(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    channels = channels if isinstance(channels, int) and channels <= 4 else 3
    side = lookup(config, "image_size", "crop_size", "input_size", "img_size")
    if isinstance(side, dict):
        side = side.get("height") or side.get("shortest_edge") or side.get("longest_edge")
    if isinstance(side, (list, tuple)) and side:
        side = side[0]
    sides = dict.fromkeys([*([side] if isinstance(side, int) and side > 1 else []), 32, 64, 128, 224])
    random = generator(4)
    return [torch.randn(batch, channels, size, size, generator=random) for size in sides]


def sounds(config: Any, name: str) -> list[Tensor]:
    """Return spectrograms for `input_features`, waves for other inputs."""
    bins = lookup_integer(
        config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim",
        "feature_projection_input_dim", default=80,
    )  # fmt: skip
    if name != "input_features":
        length = lookup(config, "max_length", default=128)
        shapes = [(4000,), (16000,), (1, 4000), (1, 16000), (length, bins), (1, 32000)]
    else:
        length = 2 * lookup_integer(config, "max_source_positions", default=128)
        shapes = [
            (bins, length), (length, bins), (64, bins), (bins, 64), (1, 64, bins), (64, 160), (1, 1024, 64), (64, 80),
            (64, 128), (4000,),
        ]  # fmt: skip
    return [noise(2, *shape) for shape in shapes]
