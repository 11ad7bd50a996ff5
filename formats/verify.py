"""Compare weight files with their digests while another library reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from seedpack.errors import FormatError
from seedpack.formats.digest import verifies
from seedpack.formats.manifest import Manifest, merge, part_key
from seedpack.formats.reader import SafetensorsFile, require_same_manifest

Check = tuple[SafetensorsFile, str, str, str]  # a file, and the tensor, the part and the digest to compare in it


def check_files(paths: Sequence[Path], of_config: Manifest) -> tuple[set[str], Callable[[], None]]:
    """Begin to check every tensor of a checkpoint's weight files against its digest, on all cores, beside other work.

    Digests are left out if SEEDPACK_VERIFY is 0.

    Args:
        paths: of the files.
        of_config: the manifest in config.json, which serves where the files have none (transformers has saved them again);
            raw tensors have no digest then.

    Returns:
        The keys in the files, and a function that waits for the digests, and raises `DigestError` naming the tensor if one
        differs.

    Raises:
        FormatError: the files are not those that config.json was written for.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(closing(SafetensorsFile(path))) for path in paths]
        keys = {key for file in files for key in file.header.tensors}
        if not verifies():
            return keys, lambda: None
        manifests = [file.manifest() for file in files]
        own = [manifest for manifest in manifests if manifest is not None]
        if len(own) == len(files):
            require_same_manifest(merge(own, str(paths[0].parent)), of_config, str(paths[0].parent / "config.json"))
        found = zip(files, manifests, strict=True)
        checks = [check for file, manifest in found for check in _checks(file, manifest, of_config)]
        workers = min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(workers)
        results = [pool.submit(_compare, checks[i::workers]) for i in range(workers)]
        pool.shutdown(wait=False)  # what is submitted is done all the same

    def wait() -> None:
        for result in results:
            result.result()

    return keys, wait


def _checks(file: SafetensorsFile, own: Manifest | None, of_config: Manifest) -> list[Check]:
    keys, entries = file.header.tensors.keys(), (own or of_config).tensors.items()
    parts = {part_key(name, part): (name, part, d) for name, entry in entries for part, d in entry.parts.items()}
    if own is not None and (odd := parts.keys() ^ keys):
        raise FormatError(f"{file.path}: {min(odd)!r} is in its manifest or among its tensors, but not in both")
    return [(file, *parts[key]) for key in keys if key in parts]


def _compare(checks: Sequence[Check]) -> None:
    with ExitStack() as stack:
        opened = {file: stack.enter_context(open(file.path, "rb")) for file in {check[0] for check in checks}}
        for file, name, part, digest in checks:
            file.require_digest_on_disk(opened[file], name, part, digest)
