"""The house of docs/design.md: who may import whom, how long a file may be, what must be
documented, what never said.

Everything is read from source by `ast`; nothing is imported. Each check takes a root and returns
its findings as lines.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Each may import those before it, never those behind it. A name is a file or a folder of jaxmodel/.
FLOORS = [
    *(
        "errors",
        "brief",
        "moved",
        "limits",
        "files",
        "progress",
        "child",
        "child_reader",
        "schema",
        "text_form",
        "rng",
    ),
    *(
        "tree",
        "axes",
        "sharding",
        "leaves",
        "ops",
        "report",
        "layers",
        "models",
        "adapt",
        "hub",
        "data",
        "lifecycle",
    ),
    *("losses", "optim", "distributed", "checkpoint", "train", "contrib"),
    *(
        "generation",
        "evaluate",
        "features",
        "compress",
        "plan",
        "ensemble",
        "tune",
        "explain",
        "trust",
        "serving",
    ),
    "cli",
]
ROOF = {"__init__", "__main__"}  # may import anything, and nothing below may import them
# all they may import besides the standard library and what is below them
GROUND = ("errors", "brief", "moved", "limits", "text_form", "files", "child", "schema")
ONLY = {**{name: set() for name in GROUND}, "rng": {"jax"}, "tree": {"jax"}}
FLAX = {"layers", "models"}
LONGEST = 650

REGISTRIES = re.compile(
    r"pypi\.org|python[h]osted\.org|npmjs\.org|yarnpkg\.com|anaconda\.org|download\.pytorch\.org|crates\.io|rubygems\.org"
    r"|proxy\.golang\.org|docker\.io|ghcr\.io|quay\.io|gcr\.io|pkg\.dev"
)
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work)/\w|\b[A-Z]:\\Users\\")


# ------------------------------------------------------------------------------------------ reading


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module in `root/jaxmodel`; a package is named as its folder."""
    found = {}
    for path in sorted((root / "jaxmodel").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports: lazily, in TYPE_CHECKING and by a
    name in a string too.

    `from package import name` counts as an import of `package.name` where that is a module, else as
    one of `package`.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole in known else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", None)
            )
            if called in {"import_module", "require", "__import__"} and isinstance(
                node.args[0].value, str
            ):
                yield node.lineno, node.args[0].value


def floor(name: str) -> str:
    """`jaxmodel.ops.rope` -> `ops`; the package itself -> `__init__`."""
    return name.split(".")[1] if "." in name else "__init__"


# ------------------------------------------------------------------------------------------- checks


def wrong_floors(root: Path) -> list[str]:
    """Imports of a higher floor, floors without a place in the house, and what the lowest floors
    may not import.
    """
    found = []
    known = modules(root)
    for name, path in known.items():
        here = floor(name)
        if here in ROOF:
            continue
        if here not in FLOORS:
            found.append(f"{path.relative_to(root)}: {here} has no floor in the house")
            continue
        for line, target in imports(name, path, set(known)):
            there = floor(target)
            top = target.split(".")[0]
            at = f"{path.relative_to(root)}:{line}"
            if top != "jaxmodel":
                if here in ONLY and top not in sys.stdlib_module_names | ONLY[here]:
                    found.append(f"{at}: {here} may not import {target}")
            elif there != here and (
                there not in FLOORS or FLOORS.index(there) > FLOORS.index(here)
            ):
                found.append(f"{at}: {here} may not import {target}, which stands above it")
    return found


def circles(root: Path) -> list[str]:
    """Modules that import each other, directly or not."""
    known = modules(root)
    graph = {
        name: {t for _, t in imports(name, path, set(known)) if t in known}
        for name, path in known.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def stray_flax(root: Path) -> list[str]:
    """Imports of flax outside layers/ and models/."""
    known = modules(root)
    return [
        f"{path.relative_to(root)}:{line}: {target} is for layers/ and models/ only"
        for name, path in known.items()
        if floor(name) not in FLAX
        for line, target in imports(name, path, set(known))
        if target.split(".")[0] == "flax"
    ]


def long_files(root: Path) -> list[str]:
    """Python files of more than LONGEST lines."""
    folders = ("jaxmodel", "tests", "experiments", "notebooks")
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [
        f"{path.relative_to(root)}: {n} lines, allowed: {LONGEST}"
        for path, n in lengths.items()
        if n > LONGEST
    ]


def inherits(node: ast.ClassDef, method: str, classes: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a base of this class, looked up by its name anywhere in the house, documents the
    method.
    """
    bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    return any(
        any(
            getattr(child, "name", None) == method and ast.get_docstring(child)
            for child in base.body
        )
        or inherits(base, method, classes)
        for name in bases
        if name != node.name
        for base in classes.get(name, [])
    )


def undocumented(root: Path) -> list[str]:
    """Modules, and public functions, classes and methods, without a docstring; a method may inherit
    its own.
    """
    sources = {path.relative_to(root): parse(path) for path in modules(root).values()}
    classes: dict[str, list[ast.ClassDef]] = {}
    for node in (
        node
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ):
        classes.setdefault(node.name, []).append(node)

    def missing(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and child.name[0] != "_"
            ):
                inherited = isinstance(node, ast.ClassDef) and inherits(node, child.name, classes)
                if not ast.get_docstring(child) and not inherited:
                    yield f"{child.lineno}: {prefix}{child.name}"
                if isinstance(child, ast.ClassDef):
                    yield from missing(child, f"{prefix}{child.name}.")

    found = []
    for where, tree in sources.items():
        found += [f"{where}: the module has no docstring"] * (not ast.get_docstring(tree))
        found += [f"{where}:{line} has no docstring" for line in missing(tree, "")]
    return found


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Every text file that git tracks or would track; without git, every one outside hidden folders
    but .ci.
    """
    command = [
        "git",
        "-C",
        str(root),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    if (root / ".git").exists():
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )
        paths = [root / name for name in names if name]
    else:
        hidden = re.compile(r"(?:.*/)?\.(?!ci/)[^/]*/")
        paths = [
            path for path in root.rglob("*") if not hidden.match(path.relative_to(root).as_posix())
        ]
    for path in sorted(path for path in paths if path.is_file()):
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            yield path, content.decode("utf-8", errors="replace")


def told_secrets(root: Path) -> list[str]:
    """Lines that name a package registry's host or a path of somebody's own machine."""
    return [
        f"{path.relative_to(root)}:{i}: {match[0]}"
        for path, text in texts(root)
        for i, line in enumerate(text.splitlines(), 1)
        if (match := REGISTRIES.search(line) or MACHINE_PATHS.search(line))
    ]


CHECKS = (wrong_floors, circles, stray_flax, long_files, undocumented, told_secrets)


@pytest.mark.parametrize("check", CHECKS)
def test_house(check):
    assert check(REPO) == []


# --------------------------------------------------------------- the checks find what they look for


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


CLEAN = {
    "jaxmodel/__init__.py": '"""Roof."""\nfrom jaxmodel import cli, tree\nfrom jaxmodel.ops '
    "import einsum\n",
    "jaxmodel/__main__.py": '"""Main."""\nimport jaxmodel\nfrom jaxmodel.cli import main\n',
    "jaxmodel/errors.py": '"""Errors."""\nimport difflib\n',
    "jaxmodel/tree.py": '"""Tree."""\nimport re\nimport jax.numpy as jnp\nfrom jaxmodel.errors '
    "import InputError\n",
    "jaxmodel/ops/__init__.py": '"""Ops."""\nfrom jaxmodel.ops.contract import einsum\nfrom . '
    "import rope\n",
    "jaxmodel/ops/contract.py": '"""Contract."""\nfrom jaxmodel.ops import rope\nfrom .. import '
    "tree\n\n\n"
    'def einsum():\n    """Product."""\n\n    def inner(): ...\n\n\ndef _private(): ...\n',
    "jaxmodel/ops/rope.py": '"""Rope."""\n',
    "jaxmodel/layers/__init__.py": '"""Layers."""\nimport flax.linen as nn\nfrom jaxmodel import '
    "ops\n",
    "jaxmodel/cli.py": '"""Verbs."""\nimport flaxen\nfrom jaxmodel import layers\n\n\n'
    'class A:\n    """A."""\n\n    def __call__(self): ...\n\n    def run(self):\n        '
    '"""Run."""\n\n\n'
    'class B(A):\n    """B."""\n\n\nclass C(cli.B):\n    """C."""\n\n    def run(self): ...\n',
    "README.md": "see https://example.org/home/page and ~/work/x and ./Users/y and /tmp/z\n",
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_clean_house_has_no_findings(check, tmp_path):
    assert check(write(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("file", "text", "finding"),
    [
        (
            "ops/new.py",
            "from jaxmodel.layers import x",
            "jaxmodel/ops/new.py:1: ops may not import jaxmodel.layers",
        ),
        (
            "ops/new.py",
            "def f():\n    from jaxmodel import layers",
            "new.py:2: ops may not import jaxmodel.layers",
        ),
        ("ops/new.py", "import jaxmodel.layers as x", "ops may not import jaxmodel.layers"),
        ("ops/new.py", "from ..layers import x", "ops may not import jaxmodel.layers"),
        ("ops/new.py", "from ...jaxmodel import x", "ops may not import jaxmodel,"),
        ("ops/new.py", "import_module('jaxmodel.cli')", "ops may not import jaxmodel.cli"),
        (
            "ops/new.py",
            "if TYPE_CHECKING:\n    from jaxmodel import cli",
            "new.py:2: ops may not import jaxmodel.cli",
        ),
        ("cli.py", "import jaxmodel", "cli may not import jaxmodel,"),
        ("cli.py", "from jaxmodel import generate", "cli may not import jaxmodel,"),
        ("cli.py", "import jaxmodel.__main__", "cli may not import jaxmodel.__main__"),
        ("cli.py", "from jaxmodel.utils import x", "cli may not import jaxmodel.utils"),
        ("utils.py", "", "utils has no floor"),
        ("tree.py", "import numpy", "tree may not import numpy"),
        ("tree.py", "from jaxmodel.ops import rope", "tree may not import jaxmodel.ops.rope"),
        ("errors.py", "import jax", "errors may not import jax"),
        ("errors.py", "from jaxmodel import tree", "errors may not import jaxmodel.tree"),
    ],
)
def test_finds_a_wrong_floor(file, text, finding, tmp_path):
    (found,) = wrong_floors(write(tmp_path, {**CLEAN, f"jaxmodel/{file}": text}))
    assert finding in found


def test_finds_circles(tmp_path):
    write(tmp_path, CLEAN)
    write(tmp_path, {"jaxmodel/ops/rope.py": "from .contract import einsum"})
    write(tmp_path, {"jaxmodel/layers/__init__.py": "from jaxmodel.layers.a import y"})
    write(tmp_path, {"jaxmodel/layers/a.py": "from jaxmodel.layers import x"})
    assert circles(tmp_path) == [
        "jaxmodel.layers -> jaxmodel.layers.a -> jaxmodel.layers",
        "jaxmodel.ops.contract -> jaxmodel.ops.rope -> jaxmodel.ops.contract",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "import flax",
        "def f():\n    import flax.linen as nn",
        "from flax import nnx",
        "require('flax', '')",
    ],
)
def test_finds_flax(text, tmp_path):
    (found,) = stray_flax(write(tmp_path, {**CLEAN, "jaxmodel/ops/new.py": text}))
    assert found.startswith("jaxmodel/ops/new.py:") and "flax" in found


@pytest.mark.parametrize("folder", ["jaxmodel/ops", "tests", "experiments"])
def test_finds_a_long_file(folder, tmp_path):
    write(
        tmp_path,
        {f"{folder}/a.py": "x = 1\n" * LONGEST, f"{folder}/b.py": "x = 1\n" * (LONGEST + 1)},
    )
    assert long_files(tmp_path) == [f"{folder}/b.py: {LONGEST + 1} lines, allowed: {LONGEST}"]


def test_finds_what_is_undocumented(tmp_path):
    source = (
        "def f(): ...\nclass A:\n    @property\n    def p(self): ...\n    def _q(s): ...\n   "
        " async def r(s): 0\n"
    )
    assert undocumented(write(tmp_path, {"jaxmodel/ops/a.py": source})) == [
        "jaxmodel/ops/a.py: the module has no docstring",
        "jaxmodel/ops/a.py:1: f has no docstring",
        "jaxmodel/ops/a.py:2: A has no docstring",
        "jaxmodel/ops/a.py:4: A.p has no docstring",
        "jaxmodel/ops/a.py:6: A.r has no docstring",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("https://", "pypi", ".org/simple"),
        ("files.", "python", "hosted.org"),
        ("https://registry.", "npmjs", ".org/x"),
        ("'/ho", "me/somebody/x'"),
        ("path=/wo", "rk/shared/data"),
        ("/Us", "ers/somebody"),
        ("C:\\Us", "ers\\somebody"),
    ],
)
@pytest.mark.parametrize(
    "name", ["README.md", "uv.lock", ".ci/run", "notebooks/a.ipynb", "deep/er/Makefile"]
)
def test_finds_what_must_not_be_told(words, name, tmp_path):
    (found,) = told_secrets(write(tmp_path, {**CLEAN, name: f"one\n{''.join(words)}\n"}))
    assert found.startswith(f"{name}:2: ")


def test_reads_what_git_would_track(tmp_path):
    secret = "/ho" + "me/somebody"
    write(
        tmp_path,
        {".gitignore": "*.log\n", "a.log": secret, "new.txt": secret, "binary.npz": "\0" + secret},
    )
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert told_secrets(tmp_path) == [f"new.txt:1: {secret[:7]}"]
