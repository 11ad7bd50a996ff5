"""AutoRound (Cheng et al., arXiv 2309.05516) by its own package, for the decoder layers of a language model.

It asks the processor's features of another Python, whose output what SINQ prints there spoils: not both in one environment.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from seedpack.hf.language_model import load_language_model

ITERATIONS = 50  # its recipe for those in a hurry; the usual 200 take hours on two cores
GROUP = 64  # divides all rows


def at_hand() -> bool:
    return find_spec("auto_round") is not None


def quantised(folder: Path, ids: Tensor, bits: int) -> tuple[dict[str, Tensor], float]:
    """Return the weights of a model's layers, rounded to codes that are tuned on tokens [n, context], and their bits: those of
    the codes and of a float16 scale for each group."""
    from auto_round import AutoRound

    model, tokenizer = load_language_model(folder)
    rounder = AutoRound(
        model, tokenizer, bits=bits, group_size=GROUP, sym=True, dataset=list(ids.split(8)), iters=ITERATIONS,
        seqlen=ids.shape[1], nsamples=len(ids), device_map="cpu", enable_torch_compile=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    rounded, _ = rounder.quantize()
    return {name: value.float() for name, value in rounded.state_dict().items()}, bits + 16 / GROUP
