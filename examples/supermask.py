"""A network whose weights stay as a seed gives them: only which of them are there is learnt."""

from __future__ import annotations

import common
import torch

import seedpack
from benchmarks.lib import pictures
from benchmarks.lib.classifiers import LeNet, accuracy, prepared, train
from seedpack.reparam import mask_


def main() -> None:
    parser = common.options(__doc__, "supermask.safetensors")
    parser.add_argument("--kept", type=float, default=0.5, help="share of the weights that is kept (default 0.5)")
    options = parser.parse_args()
    data = prepared(pictures.fashion_mnist() if options.fashion else pictures.mnist())
    data = data._replace(train=data.train[: options.limit], train_classes=data.train_classes[: options.limit])

    torch.manual_seed(0)
    model = mask_(LeNet(), options.kept)
    seen: list[float] = []
    train(model, data, options.epochs, 1e-3, label="mask", after_epoch=lambda: seen.append(100 * accuracy(model, data)))
    seedpack.save(model, options.output, force=True)
    loaded = seedpack.load(options.output, model=LeNet()).eval()
    size, weights = options.output.stat().st_size, sum(p.numel() for p in LeNet().parameters())
    common.report(
        {
            "weights": f"{weights:,}, {100 * options.kept:.0f}% of them kept, none trained",
            "file": f"{size:,} bytes, {8 * size / weights:.2f} bits per weight with the header",
            "accuracy loaded": f"{100 * accuracy(loaded, data):.2f}%",
        }
    )
    common.plotted(seen, "test accuracy (%)", "A learnt mask over random weights", options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
