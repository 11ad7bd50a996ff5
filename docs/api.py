"""Write docs/api.md: the public names of the package, by their docstrings.

python docs/api.py        (needs griffelib; a test holds that the page is what this writes)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe

PAGE = Path(__file__).with_suffix(".md")
NAMES = {  # of each module that a user imports, where its names live
    "seedpack": """
        api.compress api.load api.plan api.save api.unpack converter.options.CompressOptions converter.options.Calibration
        converter.plan.Plan hf.config.SeedpackConfig errors.SeedpackError codecs.registry.get_codec
        codecs.registry.register_codec codecs.base.Codec""",
    "seedpack.reparam": "reparam.basis.basis_ reparam.mask.mask_",
    "seedpack.nn": """
        nn.noise.Linear nn.noise.Conv2d nn.noise.Embedding nn.fast_feedforward.FastFeedforward
        nn.fast_feedforward.hardening_loss nn.distil.fastfeedforward_from""",
    "seedpack.image": "image.checkpoint.compress image.checkpoint.decompress image.checkpoint.Report",
    "seedpack.eval.evaluate": "eval.evaluate.evaluate",
}
HEAD = "# Python API\nWritten from the docstrings by `docs/api.py`. Everything raised on purpose is a `seedpack.SeedpackError`.\n"


def section(module: str, found: Any) -> str:
    """Return a name's section: its signature, and what its docstring says."""
    name = f"{module}.{found.path.rpartition('.')[2]}"
    lines = [f"### {name}", ""]
    if found.is_function or "__init__" in found.members:
        function = found if found.is_function else found.members["__init__"]
        lines += ["```text", written(function, name), "```", ""]
    for part in found.docstring.parsed if found.docstring else ():
        if part.kind.value == "text":
            lines += [str(part.value).replace("  # doctest: +SKIP", ""), ""]
        else:
            lines += [f"**{part.kind.value.capitalize()}**", "", *map(entry, part.value), ""]
    if found.is_class:
        methods = [m for m in found.members.values() if m.is_function and m.docstring and not m.name.startswith("_")]
        rows = [
            f"- `{m.name}({', '.join(p.name for p in m.parameters if p.name not in ('self', 'cls'))})`: "
            for m in methods
        ]
        lines += [row + first_sentence(m) for row, m in zip(rows, methods, strict=True)]
    return "\n".join(lines).rstrip() + "\n"


def written(function: Any, name: str) -> str:
    """Return a call as one writes it: each parameter with its annotation and default, a line for each where they are many."""
    kinds, parameters, starred = griffe.ParameterKind, [], False
    for p in function.parameters:
        if p.name in ("self", "cls"):
            continue
        if p.kind is kinds.keyword_only and not starred:
            starred = True
            parameters.append("*")
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(p.kind, "")
        default = "" if p.default is None or stars else f" = {p.default}"
        parameters.append(f"{stars}{p.name}{f': {p.annotation}' if p.annotation else ''}{default}")
    line = f"{name}({', '.join(parameters)})"
    return line if len(line) < 100 else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + ")"


def entry(item: Any) -> str:
    """Return a line of a list: a parameter, an attribute, what is returned or raised."""
    label = getattr(item, "name", "") or (str(item.annotation) if type(item).__name__ == "DocstringRaise" else "")
    text = " ".join(item.description.split())
    return f"- `{label}`: {text}" if label else f"- {text}"


def first_sentence(member: Any) -> str:
    return " ".join(member.docstring.value.partition("\n\n")[0].split())


def page() -> str:
    package = griffe.load("seedpack", search_paths=[PAGE.parent.parent], docstring_parser="google")
    parts = [HEAD]
    for module, names in NAMES.items():
        parts += [f"## {module}\n", *(section(module, package[name]) for name in names.split())]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
