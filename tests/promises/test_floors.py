"""The floors of the package: imports go down, never round, and name a thing where it is made."""

import ast
from pathlib import Path

import antidote_fast

ROOT = Path(antidote_fast.__file__).parent
# From top to bottom; a file imports from its own floor and from those below it.
FLOORS = [
    {"cli"},
    {"planning"},
    {"experiments"},
    {"fleet"},
    {"stages"},
    {"streaming"},
    {"training", "evaluation"},
    {"pruning"},
    {"norms"},
    {"data"},
    {"models"},
    {"ops", "masks", "_check"},
    {"files"},
    {"config"},
    {"distributed"},
    {"system"},
    {"selection", "backends"},
    {"errors"},
]
# Paths that users know, and that therefore stay.
HANDED_ON = {
    "antidote_fast.distributed": {"world", "session", "World", "ALONE"},
    "antidote_fast.cli": {"main", "entry_point"},
}
COMPILED = ("_cpu", "_cuda")  # from csrc/
DOORS = {"antidote_fast", "antidote_fast.__main__"}  # above all floors


def module_of(path):
    parts = ["antidote_fast", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def floor_of(module):
    """Its number, from the top."""
    [number] = [i for i, names in enumerate(FLOORS) if module.split(".")[1] in names]
    return number


def imported(tree):
    """(module, name or None) of every import of this package in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"line {node.lineno}: a relative import"
            if node.module.split(".")[0] == "antidote_fast":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield (inner, None) if inner in TREES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "antidote_fast":
                    yield alias.name, None


def made_in(tree):
    """The names that a file defines at its top level, conditions and ``try`` included."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {
                p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)
            }
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            waiting += ast.iter_child_nodes(node)
        elif isinstance(node, ast.ExceptHandler):
            waiting += node.body
    return names


def test_every_folder_is_on_a_floor():
    on_floors = set().union(*FLOORS)
    assert on_floors == {module.split(".")[1] for module in set(TREES) - DOORS}
    assert sum(map(len, FLOORS)) == len(on_floors)


def test_imports_go_down():
    wrong = []
    for module in set(TREES) - DOORS:
        for other, name in imported(TREES[module]):
            if other == "antidote_fast":
                if name not in (None, "__version__", *COMPILED):
                    wrong.append(f"{module} takes {name} at the door")
            elif other in DOORS or floor_of(other) < floor_of(module):
                wrong.append(f"{module} imports from {other}")
    assert wrong == []


def test_no_circle():
    ahead = {
        module: {other for other, _ in imported(tree) if other in TREES} - DOORS - {module}
        for module, tree in TREES.items()
    }
    while ahead:
        last = {module for module, others in ahead.items() if not others & set(ahead)}
        assert last, f"these import each other: {sorted(ahead)}"
        ahead = {module: others for module, others in ahead.items() if module not in last}


def test_a_name_comes_from_the_file_that_makes_it():
    wrong = []
    for module, tree in TREES.items():
        for other, name in imported(tree):
            if other not in TREES or name in (None, "__version__", *COMPILED) or module == other:
                continue
            if name.startswith("_"):
                wrong.append(f"{module} imports {name} of {other}")
            elif name not in made_in(TREES[other]) | HANDED_ON.get(other, set()):
                wrong.append(f"{module} imports {name} of {other}, which hands it on")
    assert wrong == []


def test_what_is_found():
    """Imports inside functions, of modules and of names, and names behind conditions."""
    text = "def f():\n    from antidote_fast.files import commit, nothing\nimport antidote_fast.ops"
    assert list(imported(ast.parse(text))) == [
        ("antidote_fast.ops", None),
        ("antidote_fast.files.commit", None),
        ("antidote_fast.files", "nothing"),
    ]
    text = "try:\n    a = b.c = 1\nexcept E:\n    def d(): e = 2\nif x:\n    f: int = 3"
    assert made_in(ast.parse(text)) == {"a", "d", "f"}
