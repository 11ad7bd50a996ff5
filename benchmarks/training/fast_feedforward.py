"""Fast feedforward layers: time beside a dense block, accuracy when trained, and real blocks distilled."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import models, pictures, plots, report
from benchmarks.lib.classifiers import accuracy, prepared, train
from seedpack.nn import FastFeedforward, fastfeedforward_from, hardening_loss

FEATURES, HIDDEN = 1024, 4096
DEPTH = 8
EPOCHS = 5
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any], Tensor]  # hidden states, what else goes to a layer, its mask


def dense(features_in: int, hidden: int, features_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features_in, hidden), nn.GELU(), nn.Linear(hidden, features_out))


def medians(runs: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    spent: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(times + 2):
        for label, run in runs.items():
            started = time.perf_counter()
            run()
            spent[label].append(time.perf_counter() - started)
    return {label: sorted(found[2:])[times // 2] for label, found in spent.items()}


@functools.cache
def blocks() -> tuple[FastFeedforward, dict[str, nn.Module], float]:
    """The tree, dense blocks of its training width and of its width at inference, and bytes copied a second."""
    width = HIDDEN // 2**DEPTH
    tree, whole = FastFeedforward(FEATURES, FEATURES, DEPTH, width).eval(), dense(FEATURES, HIDDEN, FEATURES).eval()
    small = dense(FEATURES, width + DEPTH // 2, FEATURES).eval()
    copied, source = torch.empty(1 << 25, dtype=torch.uint8), torch.ones(1 << 25, dtype=torch.uint8)
    bandwidth = 2 * source.numel() / medians({"copy": lambda: copied.copy_(source)}, 20)["copy"]
    return tree, {"dense": whole, "bfloat16": copy.deepcopy(whole).bfloat16(), "small": small}, bandwidth


@torch.no_grad()
def timed(tokens: int) -> dict[str, Any]:
    """Milliseconds of every block in turn with the others, and alone."""
    (tree, others, bandwidth), x = blocks(), torch.randn(tokens, FEATURES)
    given = {"bfloat16": x.bfloat16()}
    runs: dict[str, Callable[[], object]] = {
        label: functools.partial(block, given.get(label, x)) for label, block in {"tree": tree, **others}.items()
    }
    times = max(5, min(100, 2000 // tokens))
    found = medians(runs, times)
    found |= {f"{label}, alone": medians({label: runs[label]}, times)[label] for label in ("tree", "dense")}
    leaves = len(tree.leaves(x).unique())
    rows = min(tokens * DEPTH, 2**DEPTH) + leaves * 2 * tree.leaf_width
    found["floor"] = 4 * (rows * FEATURES + 2 * x.numel()) / bandwidth
    return {label: 1e3 * seconds for label, seconds in found.items()} | {"bandwidth": bandwidth / 1e9}


def speed(result: report.Result) -> None:
    """The tree against the dense block of the same training width, and of the tree's width at inference."""
    methods = {f"time, {tokens:,} tokens": tokens for tokens in (1, 8, 64, 256, 1024, 4096)}
    rows = measured(result, {label: functools.partial(timed, tokens) for label, tokens in methods.items()})
    width = HIDDEN // 2**DEPTH
    result.say(
        f"## Time\n{FEATURES} features in and out, depth {DEPTH}, leaves of {width} units: a training width of {HIDDEN}, of which "
        f"a token uses {DEPTH} rows of nodes and {width} units, {100 * (width + DEPTH / 2) / HIDDEN:.2f}% of the dense block's "
        f"multiplications. Milliseconds, medians, {torch.get_num_threads()} cores; 'as small': a dense block that multiplies as "
        "much as one token's way. Floor: rows that are read once, at the speed of copying. Blocks run in turn, so that each "
        "finds caches that another one filled, as in a model of many layers; 'alone': each in a loop of its own."
    )
    result.table(
        ["tokens", "tree", "dense", "dense, bfloat16", "as small", "floor", "copying, GB/s", "over dense", "over bfloat16",
         "tree, alone", "dense, alone", "over dense, alone", "measured"],
        [
            (f"{methods[r['label']]:,}", *(f"{r[key]:.3f}" for key in ("tree", "dense", "bfloat16", "small")),
             f"{r['floor']:.4f}", f"{r['bandwidth']:.1f}", f"{r['dense'] / r['tree']:.1f}×",
             f"{r['bfloat16'] / r['tree']:.1f}×", f"{r['tree, alone']:.3f}", f"{r['dense, alone']:.3f}",
             f"{r['dense, alone'] / r['tree, alone']:.1f}×", r["measured"])
            for r in rows
        ],
    )  # fmt: skip


def measured(result: report.Result, methods: dict[str, Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that are asked for, and those known from before, in the methods' order."""
    found = [report.kept("fast_feedforward", label, make) for label, make in methods.items() if result.wanted(label)]
    by_label = {row["label"]: row for row in result.joined(found)}
    return [by_label[label] for label in methods if label in by_label]


class Net(nn.Sequential):
    """A classifier of Fashion-MNIST whose hidden block is given."""

    def __init__(self, block: nn.Module):
        super().__init__(nn.Flatten(), block)


@functools.cache
def fashion() -> pictures.Pictures:
    return prepared(pictures.fashion_mnist())


def trained(label: str, block: Callable[[], nn.Module], hardening: float) -> Net:
    torch.manual_seed(0)
    model = Net(block())
    extra = (lambda: hardening * hardening_loss(model)) if hardening else None
    train(model, fashion(), EPOCHS, 1e-3, label=label, extra_loss=extra)
    return model


@functools.cache
def trained_dense(hidden: int) -> Net:
    return trained(f"dense, {hidden} units", lambda: dense(784, hidden, 10), 0.0)


def trained_tree(depth: int) -> Net:
    width = HIDDEN // 2**depth
    return trained(f"depth {depth}", lambda: FastFeedforward(784, 10, depth, width), 0.1)


def tree_from_dense(depth: int) -> Net:
    mlp = trained_dense(HIDDEN)[1]
    return Net(fastfeedforward_from(mlp, fashion().train.flatten(1), depth, HIDDEN // 2**depth))


@torch.no_grad()
def judged(make: Callable[[], Net]) -> dict[str, Any]:
    model, data = make(), fashion()
    tree = model[1]
    found = {"accuracy": accuracy(model, data)}
    if isinstance(tree, FastFeedforward):
        x = data.test.flatten(1)
        used = tree.leaves(x).bincount(minlength=2**tree.depth)
        soft = tree.train()(x)
        found |= {"soft": float((soft.argmax(1) == data.test_classes).float().mean()), "leaves": int((used > 0).sum())}
    return found


def accuracies(result: report.Result) -> None:
    methods: dict[str, Callable[[], Net]] = {
        f"dense, {hidden} units": functools.partial(trained_dense, hidden) for hidden in (HIDDEN, 16)
    }
    for how, make in (("tree", trained_tree), ("from the dense block, tree", tree_from_dense)):
        for depth in (2, 4, 6, 8):
            methods[f"{how} of depth {depth}, leaves of {HIDDEN // 2**depth}"] = functools.partial(make, depth)
    rows = measured(result, {label: functools.partial(judged, make) for label, make in methods.items()})
    result.say(
        f"## Trained\nFashion-MNIST, one hidden block, Adam, {EPOCHS} epochs, trees with hardening loss times 0.1; then trees that "
        "`fastfeedforward_from` makes of the trained dense block. 'Soft': all leaves, weighted, as in training; 'leaves': how "
        "many of them any test picture goes to."
    )
    result.table(
        ["block", "accuracy", "soft", "leaves", "measured"],
        [
            (r["label"], f"{100 * r['accuracy']:.2f}%", f"{100 * r['soft']:.2f}%" if "soft" in r else "",
             r.get("leaves", ""), r["measured"])
            for r in rows
        ],
    )  # fmt: skip


def texts() -> tuple[list[str], list[str]]:
    """Sentences to learn from and others to be judged by: the two halves of a text, each by length."""
    lines = [line.strip() for line in models.text()[1].splitlines() if len(line.split()) > 8]
    return sorted(lines[: len(lines) // 2], key=len), sorted(lines[len(lines) // 2 :], key=len)


class Encoder:
    """all-MiniLM-L6-v2, what its blocks see, and its embeddings."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = models.minilm()
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.given, self.judged_by = texts()
        self.embedded, self.calls = self.embeddings(self.model), self.states()

    def batches(self, lines: list[str]) -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(lines), 64):
            some = lines[first : first + 64]
            yield dict(self.tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        """Return embeddings of the sentences to be judged by."""
        found = []
        for batch in self.batches(self.judged_by):
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    @torch.no_grad()
    def states(self) -> list[Call]:
        """With what the first layer is called, for each batch to learn from, and which tokens are not padding."""
        calls: list[Call] = []
        mask = torch.empty(0)
        model = copy.deepcopy(self.model)
        model.encoder.layer = model.encoder.layer[:1]
        hook = model.encoder.layer[0].register_forward_pre_hook(
            lambda _, given, named: calls.append((given[0], given[1:], named, mask.bool())), with_kwargs=True
        )
        for batch in self.batches(self.given):
            mask = batch["attention_mask"]
            model(**batch)
        hook.remove()
        return calls


@torch.no_grad()
def passed(layer: Any, calls: list[Call]) -> tuple[list[Call], Tensor]:
    """The calls of the next layer, and what this layer's block sees of real tokens."""
    seen: list[Tensor] = []
    hook = layer.attention.register_forward_hook(lambda _, given, found: seen.append(first(found)))
    after = [(first(layer(x, *given, **named)), given, named, mask) for x, given, named, mask in calls]
    hook.remove()
    return after, torch.cat([x[call[-1]] for x, call in zip(seen, calls, strict=True)])


def first(found: Any) -> Tensor:
    """Layers of some versions of transformers return tuples."""
    return found if isinstance(found, Tensor) else found[0]


class Block(nn.Module):
    """A layer's linear, GELU, linear, without the residual and the norm behind."""

    def __init__(self, layer: Any):
        super().__init__()
        self.first, self.second = layer.intermediate.dense, layer.output.dense

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return y


def distilled(make: Callable[[], Encoder], depth: int, width: int) -> dict[str, Any]:
    """Distil all blocks of a model, each on what it sees behind those before it."""
    encoder = make()
    model, calls = copy.deepcopy(encoder.model), encoder.calls
    for number, layer in enumerate(model.encoder.layer):
        tree = fastfeedforward_from(Block(layer), passed(layer, calls)[1], depth, width, steps=1000)
        layer.intermediate = nn.Identity()
        layer.output.dense = tree
        calls = passed(layer, calls)[0]
        print(f"depth {depth}, leaves of {width}: block {number + 1} of {len(model.encoder.layer)}", flush=True)
    cosine = (encoder.embedded * encoder.embeddings(model)).sum(1)
    features, hidden = encoder.model.config.hidden_size, encoder.model.config.intermediate_size
    kept = (depth * features + 2 * width * features) / (2 * hidden * features)
    return {"kept": kept, "moved": float(1 - cosine.mean()), "text": models.text()[0]}


def distillation(result: report.Result) -> None:
    encoder = functools.cache(Encoder)  # not for rows that are known
    methods = {
        f"depth {depth}, leaves of {width}": (depth, width)
        for depth, width in ((0, 768), (0, 384), (0, 192), (2, 384), (4, 192), (4, 96), (6, 48))
    }
    rows = measured(result, {label: functools.partial(distilled, encoder, *how) for label, how in methods.items()})
    result.say(
        "## Distilled\nall-MiniLM-L6-v2's six blocks (384, 1536, 384) by `fastfeedforward_from`, block by block on half of a "
        "text; 1 − cosine of the other half's sentence embeddings with the original's, against the share of the "
        "blocks' multiplications that is left. Depth 0 is a smaller dense block."
    )
    result.table(
        ["distilled", "text", "multiplications kept", "1 − cosine", "measured"],
        [(r["label"], r["text"], f"{100 * r['kept']:.1f}%", f"{r['moved']:.4f}", r["measured"]) for r in rows],
    )
    if rows:
        drawn = [
            {**r, "share": 100 * r["kept"], "family": "smaller, dense" if r["label"].startswith("depth 0") else "trees"}
            for r in rows
        ]
        plots.curves(
            result, drawn, "moved", "1 − cosine", "MiniLM's blocks as trees", (0, 60), "distilled",
            ("share", "multiplications kept (%)"),
        )  # fmt: skip


def measure(result: report.Result) -> None:
    speed(result)
    accuracies(result)
    distillation(result)


if __name__ == "__main__":
    report.run("fast_feedforward", "Fast feedforward layers", measure)
