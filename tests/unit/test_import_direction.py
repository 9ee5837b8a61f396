"""Imports go one way: kernels, model, the small nouns, engine, generation, what is built on it.

The rule is read from the source (no module is imported), so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module may import its own rank and lower ones.
RANKS = {
    "errors": 0,
    "files": 1,
    "hierarchy": 1,  # a plain description; exits and engine read it
    "jsonl": 1,
    "text": 1,
    "model": 2,
    "arguments": 3,
    "processors": 3,
    "picker": 3,
    "sampling": 3,
    "prompt": 3,
    "sources": 3,
    "tree": 3,
    "planner": 4,  # its tables are the shelf's, its replay is the engine's
    "odds": 4,
    "drafter": 4,
    "engine": 4,
    "shelf": 5,
    "result": 5,
    "streaming": 5,
    "generation": 5,
    "loading": 5,
    "advice": 6,
    "answers": 6,
    "bench": 6,
    "hf": 6,
    "hf_models": 6,
    "trial": 6,
    "commands": 7,
    "cli": 7,
    "__main__": 8,
}
KERNELS_MAY_IMPORT = {"hispec_kernels", "torch", "triton", *sys.stdlib_module_names}


def imports_of(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Every imported dotted name, and whether it is imported only when a function runs.

    Imports for type checkers do not count; ``from hispec import tree`` yields ``hispec.tree``.
    """

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for other in child.orelse:
                    yield from walk(other, lazy)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, lazy
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    parents = parts[: len(parts) - child.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                for alias in child.names:
                    yield f"{base}.{alias.name}", lazy
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, lazy or function)

    yield from walk(ast.parse(source), False)


def complaints(module: str, package: str, source: str) -> list[str]:
    """What a module of ours imports against the rules."""
    top = module.split(".")[0]
    found = []
    for name, lazy in imports_of(source, package):
        parts = name.split(".")
        if top == "hispec_kernels":
            if parts[0] not in KERNELS_MAY_IMPORT:
                found.append(f"{module} imports {name}; kernels know only torch and triton")
        elif top == "hispec":
            mine = module.split(".")[1] if "." in module else "__init__"
            if parts[0] == "hispec_training":
                if mine not in ("cli", "commands") or not lazy:
                    found.append(f"{module} imports {name}; only a command's functions may")
            elif parts[0] == "hispec" and len(parts) > 1 and parts[1] in RANKS:
                if mine != "__init__" and RANKS[parts[1]] > RANKS[mine]:
                    found.append(f"{module} imports {name}, which stands above it")
                if mine == "__init__" and not lazy and parts[1] != "errors":
                    found.append(f"importing hispec loads {name}")
    return found


def our_modules() -> list[tuple[str, str, Path]]:
    """(module, package, file) of every Python file in the three packages."""
    modules = []
    for base, top in (
        ("", "hispec"),
        ("kernels", "hispec_kernels"),
        ("training", "hispec_training"),
    ):
        for path in sorted((ROOT / base / top).rglob("*.py")):
            parts = path.relative_to(ROOT / base).with_suffix("").parts
            package = ".".join(parts[:-1])
            module = package if parts[-1] == "__init__" else ".".join(parts)
            modules.append((module, package, path))
    return modules


def test_every_import_goes_down() -> None:
    modules = our_modules()
    assert len(modules) > 10, "found almost no modules: the test looks in the wrong place"
    found = [
        complaint
        for module, package, path in modules
        for complaint in complaints(module, package, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_triton_is_loaded_only_where_its_kernels_are() -> None:
    # Everything imports without Triton and without a GPU.
    for module, package, path in our_modules():
        if module.startswith("hispec_kernels.gpu."):
            continue
        for name, lazy in imports_of(path.read_text(encoding="utf-8"), package):
            kernels = name.startswith(("triton", "hispec_kernels.gpu."))
            assert lazy or not kernels, f"importing {module} loads {name}"


def test_everything_imports_without_triton_and_touches_no_gpu() -> None:
    names = [name for name, _, _ in our_modules() if not name.startswith("hispec_kernels.gpu.")]
    names = [name for name in names if name.split(".")[-1] != "__main__"]
    code = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None  # as if it were not installed\n"
        "import torch\n"
        "def touched(*_):\n    raise AssertionError('a GPU is looked at')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "training"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_module_has_a_rank() -> None:
    names = {module.split(".")[1] for module, _, _ in our_modules() if module.startswith("hispec.")}
    unknown = names - RANKS.keys()
    assert not unknown, f"give {sorted(unknown)} a place in RANKS"


def test_folders_above_the_packages_are_no_packages() -> None:
    # `import kernels` must reach the package of that name that transformers probes for
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "training" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source", "guilty"),
    [
        ("hispec.model.llama", "from hispec.engine import Engine", True),
        ("hispec.model.llama", "from ..engine import Engine", True),
        ("hispec.model.llama", "from hispec import engine", True),
        ("hispec.model.llama", "def f():\n    import hispec.cli", True),
        ("hispec.model.llama", "from hispec.errors import UsageError", False),
        ("hispec.model.llama", "from .cache import Cache", False),
        ("hispec.hierarchy", "from hispec.model.llama import Llama", True),
        ("hispec.model.llama", "if TYPE_CHECKING:\n    import hispec.engine", False),
        ("hispec.engine", "from hispec.model.llama import Llama", False),
        ("hispec.engine", "from hispec.generation import stream", True),
        ("hispec.planner.costs", "from hispec.cli import main", True),
        ("hispec.engine", "def f():\n    import hispec_training", True),
        ("hispec.cli", "import hispec_training", True),
        ("hispec.cli", "def train():\n    from hispec_training.trainer import Trainer", False),
        ("hispec", "from hispec.engine import Engine", True),
        ("hispec", "if TYPE_CHECKING:\n    from hispec.engine import Engine", False),
        ("hispec_kernels.rope", "import numpy", True),
        ("hispec_kernels.rope", "from hispec.errors import UsageError", True),
        ("hispec_kernels.rope", "import math, torch, triton.language as tl", False),
    ],
)
def test_the_rule_itself(module: str, source: str, guilty: bool) -> None:
    package = module if module == "hispec" else module.rpartition(".")[0]
    assert bool(complaints(module, package, source)) == guilty
