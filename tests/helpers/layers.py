"""The layers of seedpack: a package imports from its own layer and those above it in this list."""

from __future__ import annotations

LAYERS = [
    {"errors", "_version", "units"},
    {"formats"},
    {"_shapes", "dtypes", "keys", "memory", "prng", "linalg"},
    {"kernels"},
    {"codecs"},
    {"loader"},
    {"converter"},
    {"reparam"},
    {"nn"},
    {"hf", "vllm"},
    {"image"},
    {"eval"},
    {"page"},
    {"api"},
    {"cli", "__main__"},
]
