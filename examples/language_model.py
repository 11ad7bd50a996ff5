"""A small Llama trained inside a pseudorandom subspace by transformers' Trainer, on Python's manual, byte by byte."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data import topics

import common
import torch
import transformers

import seedpack
from seedpack.reparam import basis_

CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="coefficients (default 20,000)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("llama.safetensors"))
    options = parser.parse_args()
    data = "\n\n".join(topics.topics.values()).encode()
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    held, rows = rows[::20], rows[torch.arange(len(rows)) % 20 != 0]
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip

    def fresh() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)

    def loss(model: transformers.PreTrainedModel) -> float:
        with torch.no_grad():
            return float(model.eval()(input_ids=held, labels=held).loss)

    model = basis_(fresh(), options.count, coef_bits=8)
    before, seen = loss(model), []

    class Watch(transformers.TrainerCallback):
        def on_log(self, *args: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
            if logs and "loss" in logs:
                seen.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=options.steps, learning_rate=5e-3, lr_scheduler_type="cosine",
            per_device_train_batch_size=16, logging_steps=max(1, options.steps // 20), save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        transformers.Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Watch()]).train()
    model.cpu()
    after = loss(model)
    seedpack.save(model, options.output, force=True)
    loaded = seedpack.load(options.output, model=fresh())
    weights = sum(p.numel() for p in loaded.parameters())
    common.report(
        {
            "weights": f"{weights:,} as {options.count:,} coefficients",
            "file": f"{options.output.stat().st_size:,} bytes (the dense weights: {4 * weights:,})",
            "nats per byte, held-out": f"{before:.3f} before, {after:.3f} after, {loss(loaded):.3f} loaded",
        }
    )
    common.plotted(
        seen, "training loss", f"Llama as {options.count:,} coefficients", options.output.with_suffix(".png")
    )


if __name__ == "__main__":
    main()
