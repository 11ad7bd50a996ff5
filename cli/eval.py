"""The command `seedpack eval`."""

from __future__ import annotations

from pathlib import Path

import click

from seedpack.cli import output


@click.command("eval")
@click.argument("original")
@click.argument("packed")
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file to score.",
)
@click.option(
    "--context",
    default=1024,
    show_default=True,
    type=click.IntRange(2),
    help="Tokens per window, at most as many as the model takes.",
)
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(2), help="Tokens of the text to use.")
@output.key_option
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    original: str, packed: str, text: Path, context: int, tokens: int, trust_remote_code: bool, as_json: bool
) -> None:
    """Score the language models ORIGINAL and PACKED on a text: perplexity, KL divergence, top-1 agreement.

    ORIGINAL may be a Hugging Face folder, a GGUF file or a hub id. Windows do not overlap.
    """
    from seedpack.converter.trust import trusting_remote_code
    from seedpack.eval.language import compare_language_models, windows
    from seedpack.hf.language_model import load_language_model

    output.quiet_transformers()
    with trusting_remote_code(trust_remote_code):
        model, tokenizer = load_language_model(original)
        other, _ = load_language_model(packed)
    limit = getattr(model.config, "max_position_embeddings", None) or context
    ids = windows(tokenizer, text.read_text("utf-8", "replace"), min(context, tokens, limit), tokens)
    with output.progress("Scoring", ids.numel(), "tokens") as advance:
        report = compare_language_models(model, other, ids, lambda count: advance("", count))
    if as_json:
        output.show_json({"original": original, "packed": packed, "text": str(text), **report.to_json()})
        return
    output.show_pairs(
        f"{packed} against {original}",
        [
            (
                "text",
                f"{text}, {report.tokens:,} tokens scored, context {report.context}, windows without overlap",
            ),
            ("perplexity", f"{report.perplexity_original:.3f} → {report.perplexity_packed:.3f}"),
            ("KL divergence", f"mean {report.kl_mean:.4f}, 99th percentile {report.kl_p99:.4f} nats"),
            ("top-1 agreement", f"{100 * report.top1_agreement:.2f}%"),
        ],
    )
