"""Imports only flow downwards (a module may import its own room and the rooms below it)."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "emjax"

# Higher number = higher room. Modules directly under emjax/ that are not listed are commands, the highest room.
ROOMS = {
    "__version__": -1,
    "errors": -1,
    "cli": 0,
    "metrics": 1,
    "postprocess": 1,
    "losses": 1,
    "models": 1,
    "view": 2,
    "weights": 2,
    "data": 2,
    "systems": 3,
    "inference": 4,
    "config": 4,
    "training": 5,
}
COMMAND = 6


def room_of(module: str) -> tuple[str, int]:
    if module.endswith(".__main__"):
        return "__main__", COMMAND
    name = module.split(".")[1] if "." in module else ""
    return name, ROOMS.get(name, COMMAND) if name else 0


def imported_modules(path: pathlib.Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "emjax" else [node.module]
            )
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError(f"{path}: relative import; write the full name")
    return [name for name in names if name == "emjax" or name.startswith("emjax.")]


def test_imports_flow_downwards():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        module = "emjax." + ".".join(relative.with_suffix("").parts)
        if relative.parts == ("__init__.py",):
            continue
        room, level = room_of(module)
        for target in imported_modules(path):
            other, other_level = room_of(target)
            if other != room and other and other_level >= level:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_known():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found <= set(ROOMS), f"rooms without a place in the order: {sorted(found - set(ROOMS))}"
