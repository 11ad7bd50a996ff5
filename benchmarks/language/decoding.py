"""Measure the cost of rounding in products, and of busy cores, to decoding on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest.mock

import seedpack
from benchmarks.language.generation import in_a_process
from benchmarks.lib import models, report
from seedpack.eval.language import compare_language_models, windows
from seedpack.hf.language_model import load_language_model
from seedpack.kernels.trellis import bytes as byte_products


def rounding(result: report.Result) -> None:
    """Measure the divergence that rounding adds: activations in groups as few tokens have, and many tokens in bytes."""
    name, text = models.text()
    original, tokenizer = load_language_model(models.smollm2())
    ids, rows = windows(tokenizer, text, 1024, 16384), []
    for bits in (4, 3, 2):
        path = models.packed_smollm2("trellis", bits)
        many = (f"bytes{'' if bits == 4 else ', the default'}", True if bits == 4 else None, True)
        for label, int8, in_bytes in (("groups of 256", True, False), many):
            packed = [seedpack.load(path, dtype="float32", int8_activations=choice) for choice in (False, int8)]
            with unittest.mock.patch.object(byte_products, "_multiplies_bytes", lambda choice=in_bytes: choice):
                floats, rounded = compare_language_models(original, packed, ids)
            ratio = rounded.kl_mean / floats.kl_mean
            rows.append((bits, label, f"{floats.kl_mean:.5f}", f"{rounded.kl_mean:.5f}", f"{ratio:.4f}"))
            print(rows[-1], flush=True)
    result.say(
        f"Rounding in all products of packed SmolLM2-135M, on {floats.tokens:,} tokens of {name}, context 1024: KL divergence to "
        "the dense model with floats, with activations of 8 bits in groups of 256 (as few tokens have, here for all), and in "
        "bytes (weights too; activations of 8 bits, of 4-bit weights 16), as many tokens are multiplied on CPUs with VNNI: up to 3 "
        "bits by default, at 4 with int8_activations=True."
    )
    result.table(["bits", "rounded", "floats", "rounded", "times as much"], rows)


BUSY = "while True: pass"


def beside_others(result: report.Result) -> None:
    """The time of a token while as many busy loops as there are cores run beside."""
    rows: list[tuple[object, ...]] = []
    for kind in ("4 bits", "float32"):
        for waiting in ({}, {"OMP_WAIT_POLICY": "passive"}):
            quiet = in_a_process("smollm2", f"{kind}, few", **waiting)["decode"]
            loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
            try:
                busy = in_a_process("smollm2", f"{kind}, few", **waiting)["decode"]
            finally:
                for loop in loops:
                    loop.kill()
            rows.append(
                (
                    kind,
                    waiting.get("OMP_WAIT_POLICY", "not set"),
                    f"{1e3 / quiet:.0f}",
                    f"{1e3 / busy:.0f}",
                    f"{quiet / busy:.1f}×",
                )
            )
            print(rows[-1], flush=True)
    result.say(
        "Milliseconds a token of SmolLM2-135M, on quiet cores and with a busy loop on each core beside. A region of several threads ends "
        "when its last thread does; one that waits actively, as OpenMP's do by default, holds its core meanwhile, which the thread "
        "that is waited for may need. Packed layers leave regions out when they come late; torch's attention does not."
    )
    result.table(["model", "OMP_WAIT_POLICY", "quiet", "busy", "ratio"], rows)


def measure(result: report.Result) -> None:
    beside_others(result)
    rounding(result)


if __name__ == "__main__":
    report.run("decoding", "Decoding on a CPU: rounded activations, busy cores", measure)
