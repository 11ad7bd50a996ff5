"""How tensors are packed, guessed by their names and shapes."""

from __future__ import annotations

import re

from seedpack.codecs.base import matrix_shape
from seedpack.converter.sources.base import Kind

LEAST_AXIS = (
    32  # of a matrix that is no layer's weight: smaller ones are tables of states, decays or offsets, or tokens
)
_BIAS = re.compile(r".*bias(_\w+)?")
_TABLE = re.compile(  # values that are no weights: of positions, masks, states, statistics and scales
    r"(.*_)?(mask|masks|freqs?|cis|cos|sin|inv|decay|cache|running|avg|average|ema|mean|var|std|scale|scales|zeros?|points?"
    r"|ids|slopes?|log|state|states)(_.*|\d*)"
)
_EXPERTS = re.compile(r"(.*[._])?(experts?|moe)[._].*", re.IGNORECASE)
_CONVOLUTION_AXES = (3, 4, 5)


def guess_kind(name: str, shape: tuple[int, ...]) -> Kind:
    """Guess how a tensor of a bare state dict is packed: PyTorch calls layers' matrices `weight`, JAX's libraries `kernel`.

    >>> guess_kind("fc.weight", (10, 64)).kind, guess_kind("bn.weight", (64,)).kind, guess_kind("w", (48, 64)).kind
    ('linear', '', 'guess')
    """
    leaf = name.rpartition(".")[2]
    if 0 in shape or len(shape) < 2:
        return Kind()
    if leaf == "weight" and len(shape) == 2:
        return Kind("linear")
    if leaf == "weight" and len(shape) in _CONVOLUTION_AXES and not _EXPERTS.fullmatch(name):
        return Kind("conv")
    if leaf.rpartition("/")[2] == "kernel" and len(shape) == 2:
        return Kind("linear", transposed=True)
    if _TABLE.fullmatch(leaf.lower()):
        return Kind(note="by its name no weight")
    kind = matrix_kind(leaf, shape)
    return kind._replace(kind="guess") if kind.kind else kind


def matrix_kind(leaf: str, shape: tuple[int, ...]) -> Kind:
    """Tell how a parameter that is no layer's weight is packed, by its own name and shape.

    Its last two axes are those of matrices, or if they are short, it is one matrix of all axes after the first.

    >>> matrix_kind("gate_up_proj", (8, 64, 96)), matrix_kind("q", (64, 4, 16)).stacked, matrix_kind("A_log", (64, 16)).kind
    (Kind(kind='matrix', transposed=False, group='', stacked=True, note=''), False, '')
    """
    if 0 in shape or len(shape) < 2:
        return Kind()
    if _BIAS.fullmatch(leaf):
        return Kind(note="a bias")
    if min(shape[-2:]) >= LEAST_AXIS:
        return Kind("matrix", stacked=len(shape) > 2)
    if min(matrix_shape(shape)) >= LEAST_AXIS:
        return Kind("matrix")
    return Kind(note=f"shorter than {LEAST_AXIS} along an axis")
