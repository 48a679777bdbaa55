"""Public names of the package that have no docstring: `make docs` and a test read this list."""

import ast
from pathlib import Path


def undocumented(package: Path) -> list[str]:
    """``file:line name`` of every public module, class, function and method without a docstring.

    A method that overrides one of a class of the package has that one's docstring.
    """
    missing, methods, classes = [], [], {}
    for path in sorted(package.rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(module):
            missing.append(f"{path}:1 {path.stem}")
        for node in _public(module):
            if not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef):
                own = [member for member in _public(node) if not isinstance(member, ast.ClassDef)]
                documented = {member.name for member in own if ast.get_docstring(member)}
                classes[node.name] = (documented, [_last_name(base) for base in node.bases])
                methods += [(path, node.name, m) for m in own if m.name not in documented]
    for path, owner, method in methods:
        if not _inherits(owner, method.name, classes):
            missing.append(f"{path}:{method.lineno} {owner}.{method.name}")
    return missing


def _public(node):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_")]


def _last_name(base):
    return ast.unparse(base).rpartition(".")[2]


def _inherits(owner, name, classes):
    _, bases = classes.get(owner, ((), ()))
    return any(
        base in classes and (name in classes[base][0] or _inherits(base, name, classes))
        for base in bases
    )
