"""Tokens per second of whole language models on a CPU, beside llama.cpp and dense models in transformers, and where the time goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.kernels.products import random_parts
from benchmarks.lib import llama_cpp, models, report
from seedpack.codecs.trellis import TrellisCodec
from seedpack.loader.fill import use_int8_activations_
from seedpack.loader.layers import PackedLinear, pack_module_

PROMPT, NEW, TURNS = 128, 128, 3
ONE_BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def llama_config() -> Any:
    """The shape of Llama 3.2 1B."""
    from transformers import LlamaConfig

    return LlamaConfig(**ONE_BILLION)  # type: ignore[arg-type]


def model_of(name: str, kind: str) -> Any:
    """SmolLM2-135M, or the model of Llama 3.2 1B's shape with random weights: dense in a dtype, or packed with some bits."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    bits, dtype = (int(kind[0]), torch.float32) if kind[0].isdigit() else (0, getattr(torch, kind.split(",")[0]))
    if name == "smollm2":
        path = models.packed_smollm2("trellis", bits) if bits else models.smollm2()
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(llama_config())
        model.to(dtype)
    if bits:
        embedding = model.model.embed_tokens
        held = random_parts(TrellisCodec(bits + 1), tuple(embedding.weight.shape))
        for part in (embedding, model.lm_head):
            pack_module_(part, TrellisCodec(bits + 1), held, dtype=dtype)
        for module in list(model.modules()):
            if type(module) is torch.nn.Linear:
                pack_module_(
                    module,
                    TrellisCodec(bits),
                    random_parts(TrellisCodec(bits), (module.out_features, module.in_features)),
                )
    for owner in model.modules():
        for key, value in owner._parameters.items():
            if value is not None and value.is_meta:
                filled = torch.empty(value.shape, dtype=value.dtype).normal_(std=0.02)
                owner._parameters[key] = torch.nn.Parameter(filled, requires_grad=False)
    if not bits:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(llama_config())
    return model.eval()


def generate(model: Any, compiled: bool, new: int = NEW) -> tuple[float, float, float]:
    """Return tokens per second of decoding and of prompt processing, the best of some turns, and of a whole `generate` call."""
    from transformers import DynamicCache, StaticCache

    vocabulary, best = 1000, [0.0, 0.0, 0.0]
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    for turn in range(TURNS):
        ids = (7 * torch.arange(PROMPT)[None] + 50 * turn) % vocabulary + 300
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + new) if compiled else DynamicCache()
        started = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        prompt = time.perf_counter() - started
        position, seconds = PROMPT, []
        while position < PROMPT + new:
            token = logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            logits = forward(
                input_ids=token, past_key_values=cache, use_cache=True, cache_position=torch.tensor([position])
            ).logits
            seconds.append(time.perf_counter() - started)
            position += 1
        first = new // 4 if turn == 0 else 0  # compiling
        best[:2] = max(best[0], (new - first) / sum(seconds[first:])), max(best[1], PROMPT / prompt)
        if not compiled and new == NEW:
            started = time.perf_counter()
            model.generate(ids, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            best[2] = max(best[2], NEW / (time.perf_counter() - started))
    return best[0], best[1], best[2]


def spent(model: Any) -> dict[str, float]:
    """Return milliseconds of a token: in compiled products of layers, in calling them, in the head, and in all the rest."""
    from transformers import DynamicCache

    from seedpack.kernels.common import few_tokens

    times = {"products": 0.0, "layers": 0.0, "head": 0.0, "token": 0.0}
    inner = few_tokens._run

    def timed(key: str, work: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = work(*args, **kwargs)
            times[key] += time.perf_counter() - started
            return result

        return call

    few_tokens._run = timed("products", inner)
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, torch.nn.Linear)):
            vars(module)["forward"] = timed("head" if "head" in name else "layers", module.forward)
    cache, count = DynamicCache(), 32
    model(input_ids=torch.arange(PROMPT)[None] + 300, past_key_values=cache, use_cache=True)
    for key in times:
        times[key] = 0.0
    step = timed("token", model.forward)
    for i in range(count):
        step(input_ids=torch.tensor([[300 + i]]), past_key_values=cache, use_cache=True)
    few_tokens._run = inner
    return {key: 1e3 * value / count for key, value in times.items()}


def one(name: str, kind: str) -> dict[str, Any]:
    """Measure a model in this process."""
    with torch.inference_mode():
        model = model_of(name, kind)
        if "floats" in kind or "bytes" in kind:
            use_int8_activations_(model, "bytes" in kind)
        decode, prompt, whole = generate(model, "compiled" in kind, 32 if "few" in kind else NEW)
        found: dict[str, Any] = {"decode": decode, "prompt": prompt, "generate": whole}
        found["bytes"] = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
        if "compiled" not in kind and "few" not in kind:
            found["spent"] = spent(model)
    return found


def in_a_process(name: str, kind: str, **environment: str) -> dict[str, Any]:
    """Measure a model in a process of its own, with some variables of the environment."""
    command = [sys.executable, "-m", "benchmarks.language.generation", name, kind]
    given = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=models.ROOT, env=given)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{name}, {kind}: failed")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def read_bandwidth() -> float:
    """Bytes per second that all cores read of memory, the best of some sums over 1 GB."""
    values, best = torch.ones(1 << 28), 0.0
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - started))
    return best


SUBJECTS = {
    "smollm2": ("SmolLM2-135M", ["Q4_0", "Q4_1"]),
    "1b": ("Llama-3.2-1B-shaped, random weights", ["Q4_0", "Q4_K_M", "IQ4_XS"]),
}
KINDS = [
    "float32",
    "bfloat16",
    "4 bits",
    "4 bits, floats",
    "4 bits, bytes",
    "4 bits, compiled",
    "2 bits",
    "2 bits, compiled",
]


def measure(result: report.Result) -> None:
    threads, read = len(os.sched_getaffinity(0)), read_bandwidth()
    result.say(
        f"One sequence: {NEW} tokens after a prompt of {PROMPT}, the best of {TURNS} turns, each model in a process of its own, all in "
        f"one run on the same {threads} cores. 'Floor' is the time to read the model's bytes once at {read / 1e9:.1f} GB/s, the rate of a "
        "sum over 1 GB in the same run. llama.cpp is the wheel `xllamacpp`; packed models and dense ones run in transformers, tokens a second by forward passes alone, and with `generate` by whole calls. "
        "'Compiled' is `torch.compile` of the model's forward pass with a static cache, for the decoding alone. 'Floats' is "
        "`int8_activations=False`, 'bytes' True. Packed embeddings and heads have one bit more than the layers."
    )
    for name, (title, mixes) in SUBJECTS.items():
        if not result.wanted(name):
            continue
        rows, parts = [], []
        base: dict[str, float] = {}
        for mix in mixes:
            if name == "smollm2":
                path = models.smollm2_gguf() if mix == "Q4_1" else llama_cpp.smollm2(mix)
            else:
                path = llama_cpp.llama(llama_config(), mix)
            found: dict[str, Any] = llama_cpp.speed(path, threads, PROMPT, NEW)
            base[mix] = found["decode"]
            found["bytes"] = path.stat().st_size
            rows.append((f"llama.cpp {mix}", found))
            print(rows[-1], flush=True)
        for kind in KINDS:
            found = in_a_process(name, kind)
            rows.append((kind if kind[0].isalpha() else f"seedpack, {kind}", found))
            if "spent" in found:
                parts.append((rows[-1][0], found["spent"]))
            print(rows[-1], flush=True)
        known = mixes[1] if name == "1b" else mixes[0]
        result.say(f"**{title}**")
        result.table(
            ["model", "tokens/s", "ms a token", "floor, ms", f"of {known}", "with `generate`", "prompt, tokens/s"],
            [
                (label, f"{found['decode']:.1f}", f"{1e3 / found['decode']:.1f}", f"{1e3 * found['bytes'] / read:.1f}",
                 f"{found['decode'] / base[known]:.2f}×", f"{found['generate']:.1f}" if found.get("generate") else "–",
                 f"{found['prompt']:.0f}")
                for label, found in rows
            ],
        )  # fmt: skip
        result.say("Where a token's milliseconds go, in transformers without compiling, timed inside the process:")
        result.table(
            ["model", "token", "layers: products", "layers: calling them", "head", "all else (transformers, attention, norms)"],
            [
                (label, f"{t['token']:.1f}", f"{t['products'] - t['head'] if t['products'] else t['layers']:.1f}",
                 f"{t['layers'] - (t['products'] - t['head']):.1f}" if t["products"] else "–", f"{t['head']:.1f}",
                 f"{t['token'] - t['layers'] - t['head']:.1f}")
                for label, t in parts
            ],
        )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        print(json.dumps(one(*sys.argv[1:])))
    else:
        report.run("generation", "Whole models on a CPU", measure)
