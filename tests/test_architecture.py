"""Imports go downward only and never in a circle, and importing is free."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.layers import LAYERS

ROOT = Path(__file__).resolve().parent.parent
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(p for p in (ROOT / "seedpack").rglob("*.py")) + sorted(
        p for folder in ("cli", "formats") for p in (ROOT / folder).rglob("*.py")
    )


def layer_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "seedpack":
        return None if parts == ("seedpack", "__init__.py") else parts[1].removesuffix(".py")
    return parts[0]


def imported(source: str) -> set[str]:
    """Return the names of seedpack that a module imports, also inside functions: modules, or attributes of modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("seedpack.")}


def violations(source: str, layer: str) -> list[str]:
    names = sorted(imported(source))
    return [f"{layer} imports {name}" for name in names if RANK.get(name.split(".")[1], 0) > RANK[layer]]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return for each module those that it imports."""

    def module_of(name: str) -> str | None:
        return name if name in sources else module_of(name.rpartition(".")[0]) if "." in name else None

    return {
        name: {found for used in imported(source) if (found := module_of(used)) and found not in (name, "seedpack")}
        for name, source in sources.items()
    }


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "seedpack" else ["seedpack", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_go_downward() -> None:
    found = []
    for path in modules():
        layer = layer_of(path)
        if layer is not None:
            assert layer in RANK, f"{path} belongs to no layer"
            found += violations(path.read_text(), layer)
    assert not found


def test_no_import_goes_in_a_circle() -> None:
    sources = {module_name(path): path.read_text() for path in modules()}
    TopologicalSorter(import_graph({name: text for name, text in sources.items() if name != "seedpack"})).prepare()


def test_a_circle_is_found() -> None:
    pair = {"seedpack.a": "from seedpack.b import x", "seedpack.b": "def f():\n    import seedpack.a"}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(pair)).prepare()


def test_a_violation_is_found() -> None:
    assert violations("from seedpack.hf.config import X", "formats") == ["formats imports seedpack.hf.config.X"]
    assert violations("def f():\n    from seedpack import cli", "api") == ["api imports seedpack.cli"]
    assert not violations("from seedpack.errors import X", "formats")


def test_formats_know_no_torch() -> None:
    for path in (ROOT / "formats").rglob("*.py"):
        assert "torch" not in {
            (name.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names
        }


FLOATS = {
    "empty",
    "zeros",
    "ones",
    "eye",
    "rand",
    "randn",
    "linspace",
    "logspace",
}  # of torch's default dtype if told none
BY_VALUE = {"tensor", "as_tensor", "full", "arange"}  # of the default dtype if they are told floats


def is_float(node: ast.AST) -> bool:
    """Return whether an expression is a float for certain."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Div)
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


def without_dtype(source: str) -> list[str]:
    """Return the calls whose result has torch's default dtype, but for parameters of layers, which are to have it."""
    tree, found = ast.parse(source), []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parameters = {id(call.args[0]) for call in calls if call.args and ast.unparse(call.func).endswith("Parameter")}
    for call in calls:
        module, _, name = ast.unparse(call.func).rpartition(".")
        if module != "torch" or id(call) in parameters or any(keyword.arg == "dtype" for keyword in call.keywords):
            continue
        inner = (node for argument in call.args for node in ast.walk(argument))
        if name in FLOATS or (name in BY_VALUE and any(map(is_float, inner))):
            found.append(ast.unparse(call))
    return found


def test_tensors_are_told_their_dtype() -> None:
    found = {module_name(path): calls for path in modules() if (calls := without_dtype(path.read_text()))}
    assert not found


def test_a_tensor_without_dtype_is_found() -> None:
    text = "torch.zeros(3); torch.full((2,), 0.5); torch.arange(3); Parameter(torch.empty(3)); torch.ones(2, dtype=d)"
    assert without_dtype(text) == ["torch.zeros(3)", "torch.full((2,), 0.5)"]


HEAVY = "{'torch', 'triton', 'transformers', 'numba', 'numpy', 'safetensors', 'rich'}"
LIGHT = {
    "import seedpack": "import seedpack",
    "import seedpack.formats": "import seedpack.formats",
    "seedpack --help": "import sys; sys.argv = ['seedpack', '--help']\nfrom seedpack.cli.main import main\n"
    "try: main()\nexcept SystemExit: pass",
}


def heavy_imports(code: str) -> str:
    script = f"{code}\nimport sys\nprint('HEAVY', sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.rpartition("HEAVY ")[2].strip()


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT.keys())
def test_import_is_free(code: str) -> None:
    assert heavy_imports(code) == "[]"


def test_a_heavy_import_is_found() -> None:
    assert heavy_imports("import seedpack.prng") == "['numpy', 'torch']"


def test_files_are_small() -> None:
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
