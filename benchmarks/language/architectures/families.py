"""Inputs of single families of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.language.architectures import samples
from benchmarks.language.architectures.samples import channels_of, lookup, lookup_integer, noise, ones

Candidates = Iterator[tuple[str, dict[str, Any]]]
GRIDS = ("grid_thw", "image_grid_thw", "grid_hw", "image_grid_hws", "grid_hws")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
TOKENS_PER_IMAGE = (4, 16, 1, 2, 8, 5, 17, 20, 64, 9, 24)


def candidates(config: Any, names: set[str]) -> Candidates:
    """Generate the inputs of each family that one of a model's arguments stands for."""
    for name, family in FAMILIES.items():
        if name in names:
            yield from family(config)


def text(config: Any) -> dict[str, Any]:
    ids = samples.tokens(config)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def siglip2(config: Any) -> Candidates:
    side = lookup(config, "patch_size", default=8)
    image = {
        "pixel_values": noise(2, 16, 3 * side * side), "pixel_attention_mask": ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }  # fmt: skip
    yield "siglip2", image
    yield "siglip2", {"input_ids": samples.tokens(config), **image}


def qformer(config: Any) -> Candidates:
    image, plain = samples.images(config)[0], text(config)
    query = {"qformer_input_ids": plain["input_ids"], "qformer_attention_mask": plain["attention_mask"]}
    for count in (8, 32):
        token = lookup(config, "image_token_index", "video_token_index", default=297)
        ids = torch.cat([torch.full((2, count), token), plain["input_ids"]], 1)
        woven = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield "qformer", {**woven, "pixel_values": image, **query}
        yield "qformer", {**plain, "pixel_values": image, **query}


def kosmos(config: Any) -> Candidates:
    count, ids = lookup(config, "latent_query_num", default=8), samples.tokens(config)
    woven = torch.cat([ids[:, :1].repeat(1, count), ids], 1)
    places = torch.cat([ones(2, count), torch.zeros_like(ids)], 1)
    yield "kosmos", {
        "input_ids": woven, "attention_mask": torch.ones_like(woven), "pixel_values": samples.images(config)[0],
        "image_embeds_position_mask": places,
    }  # fmt: skip


def idefics(config: Any) -> Candidates:
    plain, image = text(config), samples.images(config)[0]
    mask = ones(2, plain["input_ids"].shape[1], 1)
    yield "idefics", {**plain, "pixel_values": image[:, None], "image_attention_mask": mask}


def mllama(config: Any) -> Candidates:
    plain, tiles = text(config), lookup(config, "max_num_tiles", default=4)
    yield "mllama", {
        **plain, "pixel_values": samples.images(config)[0][:, None, None].repeat(1, 1, tiles, 1, 1, 1),
        "aspect_ratio_ids": ones(2, 1), "aspect_ratio_mask": ones(2, 1, tiles),
        "cross_attention_mask": ones(2, plain["input_ids"].shape[1], 1, tiles),
    }  # fmt: skip


def pix2struct(config: Any) -> Candidates:
    side, channels = lookup(config, "patch_size", default=16), lookup(config, "num_channels", default=3)
    patches = noise(2, 16, 2 + channels * side * side)
    patches[..., :2] = torch.arange(1, 17)[None, :, None].float() % 5  # row and column
    yield "patches", {"flattened_patches": patches, "decoder_input_ids": samples.tokens(config, length=7)}
    yield "patches", {"flattened_patches": patches, "input_ids": samples.tokens(config)}
    yield "patches", {"flattened_patches": patches}


def oneformer(config: Any) -> Candidates:
    shape = (2, lookup(config, "task_seq_len", default=77))
    task = torch.randint(0, 20, shape, generator=samples.generator())
    yield "task", {"pixel_values": samples.images(config)[0], "task_inputs": task}


def lxmert(config: Any) -> Candidates:
    yield "lxmert", {
        "input_ids": samples.tokens(config),
        "visual_feats": noise(2, 5, lookup(config, "visual_feat_dim", default=2048)),
        "visual_pos": torch.rand(2, 5, 4, generator=samples.generator()),
    }  # fmt: skip


def clap(config: Any) -> Candidates:
    for length in (256, 1024, 64):
        yield "clap", {
            "input_ids": samples.tokens(config), "is_longer": torch.zeros(2, 1, dtype=torch.bool),
            "input_features": noise(2, 1, length, lookup(config, "num_mel_bins", default=64)),
        }  # fmt: skip


def seggpt(config: Any) -> Candidates:
    image = samples.images(config)[0]
    yield "prompt", {"pixel_values": image, "prompt_pixel_values": image, "prompt_masks": image}


def masked_audio(config: Any) -> Candidates:
    for sound in samples.sounds(config, "input_features")[:5]:
        for length in (sound.shape[-1], sound.shape[1]):
            yield "masked audio", {"input_features": sound, "input_features_mask": ones(2, length)}


FAMILIES: dict[str, Callable[[Any], Candidates]] = {
    "spatial_shapes": siglip2,
    "qformer_input_ids": qformer,
    "image_embeds_position_mask": kosmos,
    "image_attention_mask": idefics,
    "aspect_ratio_ids": mllama,
    "flattened_patches": pix2struct,
    "task_inputs": oneformer,
    "visual_feats": lxmert,
    "is_longer": clap,
    "prompt_pixel_values": seggpt,
    "input_features_mask": masked_audio,
}


def patches(config: Any, name: str) -> Candidates:
    """Generate flat patches with a grid, as the towers of Qwen2-VL and its kin take them."""
    side, channels = lookup(config, "patch_size"), channels_of(config)
    if not isinstance(side, int) or not isinstance(channels, int):
        return
    depth = channels * lookup_integer(config, "temporal_patch_size", default=1)
    flat, grid = noise(16, depth * side * side), torch.tensor([[1, 4, 4]])
    for key in GRIDS:
        shape = grid if "thw" in key else grid[:, 1:]
        yield "patches", {name: flat, key: shape}
        yield "patches", {name: flat.view(16, depth, side, side), key: shape}


def image_in_text(config: Any, names: set[str]) -> Candidates:
    """Generate one image among the tokens, with as many image tokens as the model may want."""
    token = next((vars(config)[name] for name in IMAGE_TOKENS if isinstance(vars(config).get(name), int)), None)
    if token is None or "input_ids" not in names:
        return
    for image in images_for_text(config, names):
        for count in TOKENS_PER_IMAGE:
            parts = [samples.tokens(config, 1, 3), torch.full((1, count), token), samples.tokens(config, 1, 4)]
            ids = torch.cat(parts, 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
            for name in names & {"mm_token_type_ids", "token_type_ids"}:
                inputs[name] = (ids == token).long()
            yield "image in text", inputs


def images_for_text(config: Any, names: set[str]) -> Iterator[dict[str, Any]]:
    """Generate one image, as patches with a grid or whole."""
    side, channels = lookup(config, "patch_size", default=8), channels_of(config)
    if "image_grid_thw" in names and isinstance(side, int) and isinstance(channels, int):
        depth = channels * lookup_integer(config, "temporal_patch_size", default=1)
        yield {"pixel_values": noise(16, depth * side * side), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    elif "pixel_values" in names:
        for image in samples.images(config, 1)[:2]:
            side = image.shape[-1]
            sizes: dict[str, Any] = {"image_sizes": torch.tensor([[side, side]])} if "image_sizes" in names else {}
            yield {"pixel_values": image, **sizes}
            yield {"pixel_values": image[:, None], **sizes}
