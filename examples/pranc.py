"""LeNet-5 as a few coefficients of pseudorandom networks: train, save a small file, load it elsewhere."""

from __future__ import annotations

import common
import torch
from torch import nn

import seedpack
from benchmarks.lib import pictures
from benchmarks.lib.classifiers import LeNet, accuracy, prepared
from seedpack.reparam import basis_


def main() -> None:
    parser = common.options(__doc__, "lenet.safetensors")
    parser.add_argument("--count", type=int, default=1000, help="coefficients (default 1000)")
    parser.add_argument("--coef-bits", type=int, default=8, help="bits of a coefficient in the file (default 8)")
    options = parser.parse_args()
    data = prepared(pictures.fashion_mnist() if options.fashion else pictures.mnist())
    x, classes = data.train[: options.limit], data.train_classes[: options.limit]

    torch.manual_seed(0)
    model = basis_(LeNet(), options.count, coef_bits=options.coef_bits)
    optimiser = torch.optim.Adam(model.parameters(), 0.15 / options.count**0.5)
    steps = options.epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    seen = []
    for epoch in range(options.epochs):
        model.train()
        for index in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(model(x[index]), classes[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        seen.append(100 * accuracy(model, data))
        print(f"epoch {epoch + 1}/{options.epochs}: loss {loss.item():.3f}, test accuracy {seen[-1]:.2f}%", flush=True)

    seedpack.save(model, options.output, force=True)
    loaded = seedpack.load(options.output, model=LeNet()).eval()
    with torch.no_grad():
        same = torch.equal(loaded(data.test), model(data.test))
    size = options.output.stat().st_size
    common.report(
        {
            "weights": f"{sum(p.numel() for p in LeNet().parameters()):,}",
            "trained": f"{options.count:,} coefficients",
            "file": f"{size:,} bytes (the dense weights: {4 * sum(p.numel() for p in LeNet().parameters()):,})",
            "accuracy loaded": f"{100 * accuracy(loaded, data):.2f}%",
            "same predictions": "yes, to the bit" if same else "no",
        }
    )
    title = f"LeNet-5 as {options.count:,} coefficients: {size:,} bytes"
    common.plotted(seen, "test accuracy (%)", title, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
