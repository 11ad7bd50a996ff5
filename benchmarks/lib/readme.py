"""The figures of README.md, from the result files in docs/benchmarks."""

from __future__ import annotations

from benchmarks.lib.pages import markdown, records, rows, tables

PEERS_TEXTS = ("WikiText-2", "Python code")
STRONGEST = {  # of README's table: rows of the peers' page at about 4, 3 and 2 bits
    "**seedpack**": ("seedpack 4", "seedpack 3", "seedpack 2"),
    "**seedpack**, all on": tuple(f"seedpack {bits}, everything, self+WikiText" for bits in (4, 3, 2)),
    "EXL3": ("EXL3 4, WikiText", "EXL3 3, WikiText", "EXL3 2, WikiText"),
    "ik_llama.cpp IQ*_KT": tuple(f"ik_llama.cpp IQ{bits}_KT, imatrix" for bits in (4, 3, 2)),
    "llama.cpp Q4_K_M, IQ3_M": ("llama.cpp Q4_K_M, imatrix", "llama.cpp IQ3_M, imatrix"),
    "bitsandbytes NF4": ("bitsandbytes NF4",),
    "HQQ": ("HQQ 4 g64",),
}


def quality() -> str:
    """Return README's table: what each method loses, at about the same bits."""
    found = records("peers")

    def cell(bits: int, label: str) -> str:
        row = found.get(label)
        if row is None:
            return ""
        more = f" ({row['bits']:.2f})" if row["bits"] > bits + 0.05 else ""
        return "/".join(f"{row['texts'][text]['kl_mean']:.3f}" for text in PEERS_TEXTS) + more

    body = [
        (name, *(cell(bits, label) for bits, label in zip((4, 3, 2), (*labels, "", ""), strict=False)))
        for name, labels in STRONGEST.items()
        if any(label in found for label in labels)
    ]
    return (
        "KL divergence to the original (nats per token) of SmolLM2-135M on WikiText-2/Python code; in brackets: "
        "more bits per weight. Only linear layers are packed; the command [packs all](docs/benchmarks/new_user.md). seedpack reads text that the model writes; with [all on](docs/benchmarks/peers.md) half of it is WikiText-2, "
        f"which EXL3 (our rewrite) and importance matrices read.\n\n{markdown(('', '4 bits', '3 bits', '2 bits'), body)}"
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
    return (
        f"**Speed.** On 2 CPU cores, in transformers, a 4-bit model of Llama 3.2 1B's shape decodes {ours:.0f} tokens a second, of 2 bits {half:.0f} "
        f"(dense bfloat16 {dense:.0f}, llama.cpp Q4_K_M {peer:.0f}), SmolLM2-135M {few['seedpack, 4 bits']:.0f} (dense float32 "
        f"{few['float32']:.0f}, llama.cpp Q4_0 {few['llama.cpp Q4_0']:.0f}). Prompts: {prompts[0]} (Q4_K_M {prompts[1]}). Activations are rounded "
        f"unless `int8_activations=False`. Memory: {size.rstrip('×')} of float32's. "
        "[More](docs/results.md#speed)"
    )
