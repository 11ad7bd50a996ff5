"""The command `seedpack verify`."""

from __future__ import annotations

import sys
from collections import defaultdict

import click

from seedpack.cli import output


@click.command("verify")
@click.argument("packed")
@output.key_option
@output.limit_option(
    "Decode parts, to check them, that take up to this, as 5GB. Default: 50MB, or 1024 times the file if that is more."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(packed: str, max_bytes: int | None, as_json: bool) -> None:
    """Check every byte of the checkpoint PACKED against its digests; exit 1 and name the tensors and files if any differ.

    No private key is needed; one that is given must be the file's. Parts that would take long to decode, for so small a
    file, and those of codecs that are not installed are checked by their digests alone.
    """
    from seedpack.formats import Checkpoint

    with Checkpoint(packed, max_bytes=max_bytes) as checkpoint:
        from seedpack.loader.limits import enough  # behind the first errors, which so take no second
        from seedpack.loader.verify import TOO_MUCH, verify

        results = []
        with output.progress("Verifying", len(checkpoint.manifest.tensors), "tensors") as advance:
            for result in verify(checkpoint):
                results.append(result)
                advance(result.name, 1)
        undescribed = len(checkpoint.raw_keys())
        stored = checkpoint.stored_bytes
    damaged = [result for result in results if result.error is not None]
    digest_only = defaultdict(list)
    for result in results:
        if result.digest_only:
            digest_only[result.digest_only].append(result.name)
    if names := digest_only.pop(TOO_MUCH, []):
        needed = enough(sum(result.cost for result in results))
        digest_only[f"{TOO_MUCH}; --max-bytes {needed} allows it"] = names
    files = sum(result.is_file for result in results)
    count = len(results) - files
    if as_json:
        bad = [{"file" if r.is_file else "tensor": r.name, "error": str(r.error)} for r in damaged]
        alone = [{"reason": reason, "tensors": names} for reason, names in digest_only.items()]
        counts = {"tensors": count, "files": files, "without_digest": undescribed}
        output.show_json({**counts, "bad": bad, "digest_only": alone})
    else:
        for result in damaged:
            output.echo(str(result.error), err=True)
        for reason, names in digest_only.items():
            output.echo(f"{output.count(len(names), 'tensor')} checked by digest alone, such as {names[0]!r}: {reason}")
        note = f"; {undescribed} raw tensors have no digest (saved again by transformers)" if undescribed else ""
        checked = " and ".join([output.count(count, "tensor")] + [output.count(files, "other file")] * bool(files))
        verdict = f"{len(damaged)} of {checked} are damaged" if damaged else f"all {checked} match their digests"
        output.echo(f"{packed}: {verdict} ({output.size(stored)}){note}")
    if damaged:
        sys.exit(1)
