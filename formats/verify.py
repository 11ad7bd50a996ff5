"""Compare weight files with their digests where another library reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from seedpack.errors import FormatError
from seedpack.formats.manifest import Manifest, merge, part_key
from seedpack.formats.reader import SafetensorsFile, require_same_manifest


def verify_files(paths: Sequence[Path], of_config: Manifest) -> None:
    """Check every tensor of a checkpoint's weight files against its digest.

    Args:
        paths: of the files.
        of_config: the manifest in config.json, which serves where the files have none (transformers has saved them again);
            raw tensors have no digest then.

    Raises:
        DigestError: naming the tensor.
        FormatError: the files are not those that config.json was written for.
    """
    with ExitStack() as stack, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        files = [stack.enter_context(closing(SafetensorsFile(path))) for path in paths]
        manifests = [file.manifest() for file in files]
        own = [manifest for manifest in manifests if manifest is not None]
        if len(own) == len(files):
            require_same_manifest(merge(own, str(paths[0].parent)), of_config, str(paths[0].parent / "config.json"))
        checks = []
        for file, manifest in zip(files, manifests, strict=True):
            entries = (manifest or of_config).tensors.items()
            parts = {
                part_key(name, part): (name, part, d) for name, entry in entries for part, d in entry.parts.items()
            }
            if manifest is not None:
                file.require_canonical()
                if odd := parts.keys() ^ file.header.tensors.keys():
                    raise FormatError(
                        f"{file.path}: {min(odd)!r} is in its manifest or among its tensors, but not in both"
                    )
            checks += [
                pool.submit(file.require_digest, *parts[key]) for key in parts.keys() & file.header.tensors.keys()
            ]
        for check in checks:
            check.result()


def stored_keys(paths: Sequence[Path]) -> set[str]:
    """Return the keys of all tensors in weight files."""
    with ExitStack() as stack:
        files = [stack.enter_context(closing(SafetensorsFile(path))) for path in paths]
        return {key for file in files for key in file.header.tensors}
