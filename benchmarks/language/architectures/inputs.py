"""Inputs of a model, found by trial: candidates by the arguments of its forward pass, some of which it takes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.language.architectures import families, samples
from benchmarks.language.architectures.models import described
from benchmarks.language.architectures.outputs import floats
from benchmarks.language.architectures.rules import WIDTH
from benchmarks.language.architectures.samples import lookup, lookup_integer, noise, ones
from benchmarks.language.architectures.time_limit import TimedOut, time_limit

Inputs = dict[str, Any]
Candidate = tuple[str, Inputs]
SOUNDS = ("input_features", "input_values", "audio_values")
IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")


@torch.no_grad()
def working_inputs(model: Any, seconds: int = 25) -> tuple[list[Candidate], list[str]]:
    """Return the first inputs of each label that a model takes, and what became of the others."""
    kept: Inputs = {}
    errors: list[str] = []
    try:
        with time_limit(seconds):
            for label, inputs in candidates(model):
                if label in kept:
                    continue
                try:
                    works = takes(model, inputs)
                except Exception as error:  # foreign code, given what it may not be made for
                    errors.append(f"{label}: {described(error)[:200]}")
                    continue
                if works:
                    kept[label] = inputs
    except TimedOut:
        errors.append("timed out")
    return list(kept.items()), errors


@torch.no_grad()
def tower_inputs(model: Any, seconds: int = 15) -> list[tuple[str, str, Inputs]]:
    """Return inputs of up to four towers that work: name of the tower, label, inputs."""
    kept = []
    with contextlib.suppress(TimedOut), time_limit(seconds):
        for name, tower in towers(model)[:4]:
            for label, inputs in candidates(tower):
                with contextlib.suppress(Exception):
                    if takes(tower, inputs):
                        kept.append((name, label, inputs))
                        break
    return kept


def takes(model: Any, inputs: Inputs) -> bool:
    """Run a model, and tell whether anything comes out."""
    return any(value.numel() for value in floats(model(**cloned(inputs))).values())


def towers(model: Any) -> list[tuple[str, Any]]:
    """Return the pretrained parts of a model whose main input is no text, the outermost alone."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if name and isinstance(module, transformers.PreTrainedModel):
            text = module.main_input_name in ("input_ids", "inputs_embeds")
            if not text and not any(name.startswith(f"{outer}.") for outer, _ in found):
                found.append((name, module))
    return found


def cloned(inputs: Inputs) -> Inputs:
    """Return a copy of inputs, as models may write to them."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def candidates(model: Any) -> Iterator[Candidate]:
    """Generate labelled inputs to try, the best of a label first."""
    config, names = model.config, set(inspect.signature(model.forward).parameters)
    decoder: Inputs = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoder = {"decoder_input_ids": samples.tokens(config, length=7)}
    if "input_ids" in names:
        yield from text(config, names, decoder)
    for name in IMAGES:
        if name in names:
            yield from pictures(config, name, decoder)
    for name in (*SOUNDS, "input_audio"):
        if name in names:
            yield from ((name, {name: sound, **decoder}) for sound in samples.sounds(config, name))
    if "past_values" in names:
        yield from series(config)
    if "states" in names:
        yield from decisions(config)
    for name, label in (("hidden_states", "hidden"), ("inputs_embeds", "embeds")):
        if name in names:
            yield label, {name: noise(2, 12, lookup(config, "hidden_size", default=WIDTH))}
        if name in names and name == "hidden_states":
            yield from families.patches(config, name)
    yield from families.patches(config, "pixel_values")
    yield from families.candidates(config, names)
    yield from families.image_in_text(config, names)


def frames(config: Any) -> int:
    """Return the count of a video's frames."""
    return lookup_integer(config, "num_frames", "frames_per_clip", default=4)


def text(config: Any, names: set[str], decoder: Inputs) -> Iterator[Candidate]:
    """Generate tokens, alone and beside an image, a video or a sound."""
    ids = samples.tokens(config)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places = {"bbox": samples.boxes()} if "bbox" in names else {}
    if places:
        yield "text", {"input_ids": ids, **places, **decoder}
    yield "text", {"input_ids": ids, **decoder}
    yield "text", {**masked, **decoder}
    if "pixel_values" in names:
        for image in samples.images(config):
            yield "text+image", {**masked, "pixel_values": image, **decoder, **places}
        for image in samples.images(config)[:2]:
            yield "text+video", {**masked, "pixel_values": image[:, None].repeat(1, frames(config), 1, 1, 1)}
    for name in SOUNDS:
        if name in names:
            for sound in samples.sounds(config, name):
                yield f"text+{name}", {**masked, name: sound, **decoder}


def pictures(config: Any, name: str, decoder: Inputs) -> Iterator[Candidate]:
    """Generate images and videos, the frames before the channels or behind."""
    for image in samples.images(config):
        yield name, {name: image, **decoder}
    for image in samples.images(config)[:2]:
        yield f"{name}:video", {name: image[:, None].repeat(1, frames(config), 1, 1, 1)}
        yield f"{name}:video", {name: image[:, :, None].repeat(1, 1, frames(config), 1, 1)}


def series(config: Any) -> Iterator[Candidate]:
    """Generate series of time for models that predict them."""
    length = lookup(config, "context_length", "prediction_length", default=32)
    channels = lookup(config, "num_input_channels", "input_size", default=1)
    yield "series", {"past_values": noise(2, length, channels)}
    yield "series", {"past_values": noise(2, length)}
    yield "series", {"past_values": [noise(length), noise(length)]}
    past = length + max(lookup(config, "lags_sequence", default=[0]) or [0])
    future, features = lookup(config, "prediction_length", default=8), lookup(config, "num_time_features", default=0)
    yield "series", {
        "past_values": noise(2, past), "past_time_features": noise(2, past, features or 0),
        "past_observed_mask": torch.ones(2, past),
        "future_values": noise(2, future), "future_time_features": noise(2, future, features or 0),
    }  # fmt: skip


def decisions(config: Any) -> Iterator[Candidate]:
    """Generate states, actions and rewards for decision transformers."""
    states, actions = lookup(config, "state_dim", default=17), lookup(config, "act_dim", "action_dim", default=4)
    yield "decision", {
        "states": noise(2, 5, states), "actions": noise(2, 5, actions), "rewards": noise(2, 5, 1),
        "returns_to_go": noise(2, 5, 1), "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": ones(2, 5).float(),
    }  # fmt: skip
