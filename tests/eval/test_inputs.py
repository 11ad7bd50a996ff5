from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from seedpack.errors import ModelError
from seedpack.eval.inputs import encode_lines, find_images, image_batches, read_lines, text_batches
from tests.helpers.tokenizers import word_tokenizer

CLASSES = {"cat": 0, "dog": 1}


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a b \t x y\t z\n\n  c\tw\r\n")
    assert [(line.number, line.text, line.answer) for line in read_lines(path)] == [
        (1, "a b", "x y\t z"),
        (3, "c", "w"),
    ]
    path.write_text("a\nb")
    assert [line.answer for line in read_lines(path)] == [None, None]
    path.write_text("a\tx\n\nb\n")
    assert [line.text for line in read_lines(path, answers=False)] == ["a\tx", "b"]
    with pytest.raises(ModelError, match="line 3 has no tab, but line 1 has one; give each line an answer"):
        read_lines(path)
    path.write_text("\n \t\n")
    with pytest.raises(ModelError, match="has no lines of text"):
        read_lines(path)


@pytest.mark.parametrize("pad", [True, False])
def test_batches_of_texts(pad: bool) -> None:
    tokenizer = word_tokenizer(template="<s> $A </s>", pad=pad)
    texts = [" ".join(["w9"] * n) for n in (1, 2, 30, 4)]
    encoded = encode_lines(tokenizer, texts, context=8, tokens=15)
    assert [len(e["input_ids"]) for e in encoded] == [3, 4, 8], "30 words are cut off; 6 tokens more are too many"
    assert len(encode_lines(tokenizer, texts, context=8, tokens=2)) == 1
    model: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
    batches = list(text_batches(tokenizer, model, encoded))
    assert [tuple(b["input_ids"].shape) for b in batches] == ([(3, 8)] if pad else [(1, 3), (1, 4), (1, 8)])
    assert sum(int(b["attention_mask"].sum()) for b in batches) == 15


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 4)).save(folder / name)
    return folder


def test_images(tmp_path: Path) -> None:
    files, labels = find_images(images(tmp_path / "a", "dog/1.png", "cat/2.JPG", "cat/3.png"), CLASSES)
    assert [file.name for file in files] == ["2.JPG", "3.png", "1.png"] and labels == [0, 0, 1]
    assert find_images(images(tmp_path / "b", "1.png", "x/2.png"), CLASSES)[1] is None
    with pytest.raises(
        ModelError, match=r"cow/4.png: lies in no folder that is named by a label .* expected 'cat', 'dog'"
    ):
        find_images(images(tmp_path / "a", "cow/4.png"), CLASSES)
    (tmp_path / "c").mkdir()
    with pytest.raises(ModelError, match="has no images; expected files that end in .bmp"):
        find_images(tmp_path / "c", CLASSES)


def test_batches_of_images(tmp_path: Path) -> None:
    def processor(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, len(images.getbands()), images.height, images.width)}

    folder = images(tmp_path, *(f"{i:02}.png" for i in range(18)))
    Image.new("RGB", (7, 4)).save(folder / "02.png")
    batches = image_batches(processor, find_images(folder, CLASSES)[0])
    assert [tuple(b["pixel_values"].shape) for b in batches] == [
        (2, 3, 4, 5),
        (1, 3, 4, 7),
        (13, 3, 4, 5),
        (2, 3, 4, 5),
    ]
    (folder / "00.png").write_bytes(b"no picture")
    with pytest.raises(ModelError, match="00.png: cannot be read as an image"):
        list(image_batches(processor, find_images(folder, CLASSES)[0]))
