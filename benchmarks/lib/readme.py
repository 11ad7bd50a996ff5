"""The figures of README.md, from the result files in docs/benchmarks."""

from __future__ import annotations

from benchmarks.lib.pages import markdown, records, rows, tables

PEERS_TEXTS = ("WikiText-2", "Python code")
STRONGEST = {  # of README's table, by what is shown
    "**seedpack, 4 bits**": "seedpack 4",
    "EXL3, 4 bits": "EXL3 4, WikiText",
    "ik_llama.cpp IQ4_KT": "ik_llama.cpp IQ4_KT, imatrix",
    "llama.cpp Q4_K_M": "llama.cpp Q4_K_M, imatrix",
    "bitsandbytes NF4": "bitsandbytes NF4",
    "HQQ, groups of 64": "HQQ 4 g64",
    "**seedpack, 3 bits**": "seedpack 3",
    "EXL3, 3 bits": "EXL3 3, WikiText",
    "ik_llama.cpp IQ3_KT": "ik_llama.cpp IQ3_KT, imatrix",
    "**seedpack, 2 bits**": "seedpack 2",
    "EXL3, 2 bits": "EXL3 2, WikiText",
    "ik_llama.cpp IQ2_KT": "ik_llama.cpp IQ2_KT, imatrix",
}


def quality() -> str:
    """Return README's table: what each method loses, at about the same bits."""
    found = records("peers")
    body = [
        (name, f"{row['bits']:.2f}", *(f"{row['texts'][text]['kl_mean']:.3f}" for text in PEERS_TEXTS))
        for name, label in STRONGEST.items()
        if (row := found.get(label)) is not None
    ]
    return (
        "KL divergence to the original (nats per token) of SmolLM2-135M with its linear layers packed. seedpack is calibrated on text "
        f"that the model writes, which it does unasked; EXL3 is its algorithm written again, calibrated on WikiText-2, as importance matrices are.\n\n"
        f"{markdown(('', 'bits per weight', *PEERS_TEXTS), body)}"
    )


def fastest() -> str:
    """Return README's line about speed."""
    small, large = rows("generation", 0), rows("generation", 2)
    ours, half, peer, dense = (
        float(large[name]["tokens/s"])
        for name in ("seedpack, 4 bits", "seedpack, 2 bits", "llama.cpp Q4_K_M", "bfloat16")
    )
    prompts = [large[name]["prompt, tokens/s"] for name in ("seedpack, 4 bits", "llama.cpp Q4_K_M")]
    few = {name: float(row["tokens/s"]) for name, row in small.items()}
    size = next(cells for cells in tables("kernels")[-1] if cells[0] == "trellis, 4 bits")[4]
    spent = rows("generation", 1)["seedpack, 4 bits"]
    rest = next(value for name, value in spent.items() if name.startswith("all else"))
    return (
        f"**Speed.** On 2 CPU cores, in transformers, a 4-bit model of Llama 3.2 1B's shape generates {ours:.0f} tokens a second, of 2 bits {half:.0f} "
        f"(dense bfloat16 {dense:.0f}, llama.cpp Q4_K_M {peer:.0f}), SmolLM2-135M {few['seedpack, 4 bits']:.0f} (dense float32 "
        f"{few['float32']:.0f}, llama.cpp Q4_0 {few['llama.cpp Q4_0']:.0f}; of {float(spent['token']):.0f} ms a token {float(rest):.0f} are "
        f"transformers' own). Prompts: {prompts[0]} (Q4_K_M {prompts[1]}). Activations are rounded "
        f"unless `int8_activations=False`. They take {size.rstrip('×')} of float32's memory. "
        "[More](docs/results.md#speed)"
    )
