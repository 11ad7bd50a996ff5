"""Write docs/results.md, and the figures of README.md, from the result files in docs/benchmarks.

python -m benchmarks.results            write them
python -m benchmarks.results --check    exit 1 if one of them is not what would be written
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.pages import ROOT, divergence, fill, markdown, page, records, rows, sentence, tables
from benchmarks.lib.readme import PEERS_TEXTS, fastest, quality

QUALITY = ("bits per weight", "perplexity", "KL mean", "top-1")
NO_DATA = (
    "trellis, 4 bits", "trellis, 3.5 bits", "trellis, 3 bits", "trellis, 2 bits", "seedlm, 4 bits", "bitsandbytes NF4",
    "HQQ g64, 4 bits", "torchao int4 g64", "GGUF Q4_K", "GGUF IQ4_XS", "GGUF Q3_K", "HQQ g64, 3 bits", "GGUF Q2_K",
    "round to nearest, min/max, g128, 4 bits",
)  # fmt: skip
ENCODER = (
    "trellis, 4 bits",
    "trellis, 3 bits",
    "EXL3, 4 bits",
    "EXL3, 3 bits",
    "ik_llama.cpp IQ4_KT",
    "bitsandbytes NF4",
    "GGUF IQ4_XS",
    "GGUF Q4_K",
    "HQQ g64, 4 bits",
    "HQQ g64, 3 bits",
)
CLASSIFIERS = (
    "original", "trellis, budget of 4.04 bits", "trellis, 4 bits", "trellis, budget of 3.04 bits", "trellis, 3 bits",
    "trellis, budget of 2.04 bits", "trellis, 2 bits", "EXL3, 4 bits", "EXL3, 3 bits", "EXL3, 2 bits", "ik_llama.cpp IQ4_KT",
    "ik_llama.cpp IQ3_KT", "ik_llama.cpp IQ2_KT", "bitsandbytes NF4", "GGUF Q4_K", "HQQ g64, 4 bits", "HQQ g64, 3 bits",
)  # fmt: skip
GAUSSIAN = (
    "bitsandbytes NF4",
    "GGUF IQ4_XS",
    "GGUF Q4_K",
    "torchao int4 g64",
    "round to nearest, min/max, g128, 4 bits",
)
RENAMED = {
    "NF4 (its arithmetic)": "NF4 (its arithmetic), no data",
    "rotation": "incoherence processing",
    "balance": "per-channel scaling",
    "feedback": "error feedback",
}


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}%"


def calibrated(prefix: str) -> str:
    """Return the table of one language model with its linear layers packed."""
    mine = [
        row | {"label": label.removeprefix(prefix)}
        for label, row in records("calibration").items()
        if label.startswith("Gemma") == bool(prefix) and not label.removeprefix(prefix).startswith("svd")
    ]
    mine.sort(key=lambda row: (-round(row["bits"]), row["kl_mean"]))
    return markdown(
        ("linear layers", *QUALITY),
        [(RENAMED.get(row["label"], row["label"]), *calibrated_cells(row)) for row in mine],
    )


def calibrated_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of `QUALITY`."""
    perplexity, kl, agreement = row["perplexity_packed"], row["kl_mean"], row["top1_agreement"]
    return f"{row['bits']:.3f}", f"{perplexity:,.2f}", f"{kl:.4f}", percent(agreement, 1)


def unpacked(label: str) -> str:
    return f"{records('calibration')[label]['perplexity_original']:.2f}"


def language() -> str:
    measured = rows("language")
    tokens = sentence("language", r"([\d,]+) tokens scored")
    plain = sentence("language", r"perplexity unpacked ([\d.]+\d)")
    table = markdown(("method", *QUALITY), [(label, *(measured[label][c] for c in QUALITY)) for label in NO_DATA])
    return f"""## Language models

**Without data.** SmolLM2-135M-Instruct, all linear layers and the embedding; {tokens} tokens of WikiText-2, context 1024, perplexity unpacked {plain}.
The model is rescaled, so that the 4-bit grid it is shipped on helps no method. Peers are their own quantisers. [All rows](benchmarks/language.md)

{table}

![KL divergence against bits per weight](benchmarks/language.png)

**Calibrated.** The linear layers alone, embedding and head as they are; perplexity unpacked {unpacked("trellis 4 + self")}.
"self": calibrated on text that the model wrote; "budget": bits where they matter; "tuned": scales, norms and biases tuned afterwards; "imatrix": from the same text.
GPTQ is llm-compressor's, on real text, as its users would give it. Most rows are older than today's search and tuning ([what changed](benchmarks/README.md)); the table below is not. [All rows](benchmarks/calibration.md)

{calibrated("")}

![KL divergence against bits per weight, calibrated](benchmarks/calibration-smollm2-135m.png)

{strongest()}

Gemma 3 270M the same way; perplexity unpacked {unpacked("Gemma 3: trellis 4 + self")}:

{calibrated("Gemma 3: ")}

![KL divergence against bits per weight, Gemma 3](benchmarks/calibration-gemma-3-270m.png)"""


def strongest() -> str:
    """Return the table of the strongest peers on SmolLM2, the best at about the same bits first."""
    found = [row for label, row in records("peers").items() if not label.startswith("Gemma")]
    found.sort(key=lambda row: (-round(row["bits"]), row["texts"][PEERS_TEXTS[0]]["kl_mean"]))
    body = [
        (row["label"], f"{row['bits']:.3f}", *(divergence(row["texts"][text]) for text in PEERS_TEXTS)) for row in found
    ]
    return f"""**Beside the strongest peers**, on two kinds of text: KL to the original. `seedpack` has the command's defaults: calibrated on text that
the model writes. Embedding and head stay as they are. Those with "WikiText" or "imatrix" are calibrated on the text whose beginning is scored. [All rows](benchmarks/peers.md)

{markdown(("linear layers", "bits per weight", *(f"KL, {text}" for text in PEERS_TEXTS)), body)}"""


def ingredients() -> str:
    found = records("ingredients")
    quick, full = (
        [(label, found[label]) for label, *_ in table[1:]] for table in tables("ingredients")
    )  # of 3 bits at effort fast, and of 2 bits at effort default

    def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
        body = [
            (", ".join(RENAMED.get(part, part) for part in label.split(", ")), f"{row['kl_mean']:.3f}", f"{row['perplexity_packed']:,.2f}")
            for label, row in rows
        ]  # fmt: skip
        return markdown(("fit", "KL mean", "perplexity"), body)

    return f"""### What each part of the fit brings

SmolLM2-135M, its linear layers at 3 bits by trellis, effort fast; {quick[0][1]["tokens"]:,} tokens, perplexity unpacked {quick[0][1]["perplexity_original"]:.2f}. [Page](benchmarks/ingredients.md)

{table(quick)}

The last three are sketches of the Hessian of the whole model's KL divergence in Kronecker factors (YAQA, [arXiv 2505.22988](https://arxiv.org/abs/2505.22988)). The same at 2 bits and effort default, with incoherence processing, per-channel scaling and error feedback, on {full[0][1]["tokens"]:,} tokens:

{table(full)}

They cost a backward pass. Sketched token by token they bring 4% at most at 3 bits, and lose more at 2, with power iterations by 41 to 50%. They are left out."""


def others() -> str:
    encoder = rows("sentences")
    first, second = rows("images", 0), rows("images", 1)
    return f"""## Other models

**A sentence encoder**, all-MiniLM-L6-v2 with true float32 weights: how far its embeddings move, without data. `trellis` has two weights per window at 3 bits; EXL3 is our rewrite. [All rows](benchmarks/sentences.md)

{markdown(("method", "bits per weight", "1 − cosine"), [(m, encoder[m]["bits per weight"], encoder[m]["1 − cosine"]) for m in ENCODER])}

**CIFAR-10 classifiers**; trellis: the mean over three seeds (least … most). [All rows](benchmarks/images.md)

{markdown(("method", "bits per weight", "ResNet-20", "ResNet-32"), [(m, second[m]["bits per weight"], first[m]["accuracy"], second[m]["accuracy"]) for m in CLASSIFIERS])}"""


def codecs() -> str:
    ours, peers = tables("trellis")[0], rows("trellis", 1)
    speeds = rows("seedlm", 1)["4"]
    columns, exact = ours[0], tables("svd")[1]
    picked = ("k", "weights per window", "effort", "bits per weight", "gap, dB", "million weights/s")
    body = [[dict(zip(columns, cells, strict=True))[name] for name in picked] for cells in ours[1:]]
    seedlm = rows("seedlm", 0, keys=2)["seedlm, exponents=3, 4.0000"]
    worst = sentence("svd", r"Worst with two power iterations: (\d\.\d+)")
    return f"""## Codecs on random and real matrices

**trellis** on Gaussian weights: decibels above the rate–distortion limit at the bits that are stored. [Page](benchmarks/trellis.md)

{markdown(picked, body)}

Others at 4 bits: {"; ".join(f"{name} {peers[name]['gap, dB']} dB at {float(peers[name]['bits per weight']):.3f}" for name in GAUSSIAN)}.

**seedlm**: relative error {seedlm["D"]} at {float(seedlm["bits per weight"]):.1f} bits, {seedlm["gap"]} above the limit. The exact search over all 65,535 seeds fits {speeds["weights/s"]} weights/s at 4 bits, {speeds["ratio"]} a matrix product in torch and {speeds["of the limit"]} of the multiply–add limit of the same run. [Page](benchmarks/seedlm.md)

**svd**: with two power iterations the randomized error is at most {worst} of the optimal one on real layers. [Page](benchmarks/svd.md)

{markdown(exact[0], exact[1:])}"""


def speed() -> str:
    times = rows("kernels", 0, keys=2)
    picked = ("packed", "dense fp32", "dense bf16", "faster than fp32", "than bf16")
    body = [
        (tokens, codec, *(times[f"{tokens}, {codec}"][name] for name in picked))
        for tokens in ("1", "4", "16", "256")
        for codec in ("trellis, 4 bits", "trellis, 2 bits", "seedlm, 4 bits")
    ]
    whole = tables("kernels")[-1]
    return f"""## Speed

The product x·Wᵀ of a layer [8192, 8192] on 2 CPU cores, straight from the packed weight, beside torch's dense product in the same run; milliseconds. [All rows](benchmarks/kernels.md)

{markdown(("tokens", "codec", *picked), body)}

{sentence("kernels", r"(SmolLM2-135M-Instruct, 128 tokens [^;]*);")}:

{markdown(whole[0], whole[1:])}

{generation()}

Nothing has been timed on a GPU."""


def generation() -> str:
    """Return the tables of whole models beside llama.cpp."""
    parts = [
        "Tokens per second of whole models, one sequence, all in one run on the same cores, beside llama.cpp; with activations "
        "of up to 8 tokens rounded to 8 bits, as above. [Page](benchmarks/generation.md)"
    ]
    picked = ("tokens/s", "ms a token", "floor, ms", "prompt, tokens/s")
    for table, title in ((0, "SmolLM2-135M"), (2, "Llama-3.2-1B-shaped, random weights")):
        body = [(name, *(row[column] for column in picked)) for name, row in rows("generation", table).items()]
        parts.append(f"{title}:\n\n{markdown(('model', *picked), body)}")
    return "\n\n".join(parts)


def memory() -> str:
    compress, load, calibrate, start = tables("footprint")
    return f"""## Memory and start-up

What `compress` takes does not grow with the number of layers. [Page](benchmarks/footprint.md)

{markdown(compress[0], compress[1:])}

`load`, and a first pass of four tokens:

{markdown(load[0], load[1:])}

Calibration of models that stay on disk:

{markdown(calibrate[0], calibrate[1:])}

`seedpack --help` takes {dict(start[1:])["seedpack --help"]}."""


def subspace() -> str:
    found = records("pranc")

    def lenet(label: str) -> tuple[str, ...]:
        both = [found.get(f"{data}: {label}") for data in ("MNIST", "Fashion-MNIST")]
        size = next(f"{row['bytes']:,}" for row in both if row)
        return label, size, *(percent(row["accuracy"]) if row else "" for row in both)

    labels = [
        label.removeprefix("MNIST: ") for label, row in found.items() if label.startswith("MNIST") and "bytes" in row
    ]
    family = {label: found[f"MNIST: {label}"]["family"] for label in labels}
    shown = sorted(
        (label for label in labels if family[label] not in ("float32", "generators")),
        key=lambda label: (("all weights", "8 bits", "other bits", "pruned").index(family[label]), found[f"MNIST: {label}"]["bytes"]),
    )  # fmt: skip
    structured, dense = (found[f"MNIST: 440 coefficients, {name}, 3 epochs"] for name in ("hadamard", "philox"))
    projected = [found[f"MNIST: trained, then {count} coefficients"] for count in (1000, 10000, 22213)]
    resnet = [row for row in records("pranc_resnet").values() if row["epochs"] in (54, 100)]
    masks = records("masks")
    levels = next(table for table in tables("pranc") if table[0][0] == "levels")
    step = next(table for table in tables("pranc") if table[0][0] == "trained")
    return f"""## Trained in a random subspace

**LeNet-5** (44,426 parameters), 10 epochs; bytes of the coefficients, without the file's header. Pruned: 16 bits per weight, the mask at its entropy. [All rows](benchmarks/pranc.md)

{markdown(("network", "bytes", "MNIST", "Fashion-MNIST"), map(lenet, shown))}

![Accuracy against bytes, MNIST](benchmarks/pranc-mnist.png)

Structured and dense bases span alike: {structured["trained"]} coefficients after 3 epochs give {percent(structured["accuracy"])} and {percent(dense["accuracy"])}, in {structured["seconds"]:.0f} and {dense["seconds"]:.0f} seconds.

**Files that are cut off**: bytes received, and accuracy on MNIST.

{markdown(levels[0], levels[1:])}

![Accuracy against bytes received](benchmarks/pranc-levels.png)

**From a trained network**: the share of its energy that a projection on M bases holds, and accuracy on MNIST before and after ten epochs of distillation.

{markdown(("coefficients", "energy", "projected", "distilled"), [(f"{int(row['label'].split()[-2]):,}", percent(row["energy"], 1), percent(row["before"]), percent(row["accuracy"])) for row in projected])}

**ResNet-20 on CIFAR-10.** PRANC's published figures are after 400 epochs. [Page](benchmarks/pranc_resnet.md)

{markdown(("network", "epochs", "accuracy", "published"), [(row["family"], row["epochs"], percent(row["accuracy"]), rows("pranc_resnet")[row["family"]]["published"]) for row in resnet])}

**A training step** of ResNet-20, 32 pictures:

{markdown(step[0], step[1:])}

**Supermasks.** [Page](benchmarks/masks.md)

{markdown(("network", "epochs", "accuracy", "bits per weight of the file"), [(label, row["epochs"], percent(row["accuracy"]), f"{8 * row['bytes'] / row['weights']:.3f}") for label, row in masks.items()])}

**Layers of noise.** Twelve transformer blocks at the start, and the product of one token with a weight of 4096×4096, 128 coefficients per row. [Page](benchmarks/noise_layers.md)

{chr(10).join(markdown(table[0], table[1:]) + chr(10) for table in tables("noise_layers")).rstrip()}"""


def feedforward() -> str:
    time, trained, distilled = tables("fast_feedforward")
    found = records("fast_feedforward")
    picked = ("tokens", "tree", "dense", "over dense", "over dense, alone")
    body = [[dict(zip(time[0], cells, strict=True))[name] for name in picked] for cells in time[1:]]
    return f"""## Fast feedforward

**Time** of a tree of depth 8 with leaves of 16 units, beside the dense float32 block of the same training width, on 2 CPU cores; milliseconds. "Alone": each in a loop of its own; else in turn, as in a model. [Page](benchmarks/fast_feedforward.md)

{markdown(picked, body)}

**Trained** on Fashion-MNIST, and made from the trained dense block:

{markdown(("block", "accuracy", "leaves used"), [(cells[0], percent(found[cells[0]]["accuracy"]), cells[3]) for cells in trained[1:]])}

**Distilled**: the six blocks of all-MiniLM-L6-v2. Depth 0 is a smaller dense block.

{markdown(("blocks", "multiplications kept", "1 − cosine"), [(cells[0], percent(found[cells[0]]["kept"], 1), f"{found[cells[0]]['moved']:.4f}") for cells in distilled[1:]])}

![1 − cosine against the multiplications that are kept](benchmarks/fast_feedforward-distilled.png)"""


def photographs() -> str:
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for label, row in records("kodak").items():
        rate = label.rpartition(", ")[2]
        if row["family"] != "SIREN":  # one image, in the page alone
            groups.setdefault((float(rate), row["family"]), []).append(row)
    body = [
        (rate, family, *(f"{statistics.mean(row[key] for row in members):.{digits}f}"
                         for key, digits in (("rate", 3), ("psnr", 2), ("ms_ssim", 4), ("encode", 3), ("decode", 3))))
        for (rate, family), members in sorted(groups.items())
    ]  # fmt: skip
    gaps = [line for line in page("kodak").splitlines() if line.startswith("Mean PSNR over")]
    return f"""## Photographs

Means over 12 Kodak images, whole files, headers counted. [Page](benchmarks/kodak.md)

{markdown(("aim", "format", "bits per pixel", "PSNR, dB", "MS-SSIM", "encode, s", "decode, s"), body)}

{chr(10).join("- " + line for line in gaps)}

![PSNR against bits per pixel](benchmarks/kodak-psnr.png)"""


def results() -> str:
    """Return docs/results.md."""
    sections = (language, ingredients, others, codecs, speed, memory, subspace, feedforward, photographs)
    return f"""# Results

Every figure here is read from a result file in [docs/benchmarks](benchmarks/README.md), which says when, on what machine and with which versions it was measured. `make bench` measures them again; `python -m benchmarks.results` writes this page.

{(chr(10) * 2).join(section() for section in sections)}
"""


def documents() -> dict[Path, str]:
    """Return what the pages that show figures should hold."""
    readme = ROOT / "README.md"
    filled = fill(readme.read_text("utf-8"), {"quality": quality(), "speed": fastest()})
    return {ROOT / "docs" / "results.md": results(), readme: filled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = [
        (path, text) for path, text in documents().items() if not path.is_file() or path.read_text("utf-8") != text
    ]
    for path, text in stale:
        if not check:
            path.write_text(text, "utf-8")
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
    if check and stale:
        sys.exit("run `python -m benchmarks.results`")


if __name__ == "__main__":
    main()
