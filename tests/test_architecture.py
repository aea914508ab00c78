"""What holds for the package as a whole: imports run one way, importing is light, names are documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dualxda_jax

PACKAGE = Path(dualxda_jax.__file__).parent

# A room may import from the lines above its own, and itself.
LAYERS = [
    ["types", "_check", "_version"],
    ["checkpoint"],
    ["data"],
    ["models"],
    ["features"],
    ["svm"],
    ["xda", "attribution"],
    ["baselines"],
    ["evaluation"],
    ["report"],
    ["pipeline"],
    ["cli"],
    ["__main__", "__init__"],
]
CORE = ["svm", "attribution", "xda"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    mine = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "dualxda_jax" or len(parts) < 2 or parts[1] not in height:
            continue
        assert parts[1] == mine or height[parts[1]] < height[mine], f"{mine} imports {parts[1]}"


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in CORE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_needs_only_jax_and_numpy(path):
    outside = {name.split(".")[0] for name in imports(path)} - {"dualxda_jax", "jax", "numpy"}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "name", [*CORE, "baselines", "data", "models", "features", "checkpoint", "evaluation", "report", "cli"]
)
def test_importing_starts_no_device_and_sets_no_config(name):
    code = (
        "import jax; before = dict(jax.config.values)\n"
        f"import dualxda_jax.{name}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was started'\n"
        "assert dict(jax.config.values) == before, 'a configuration was changed'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_are_loaded_when_used():
    code = (
        "import sys, dualxda_jax; assert 'flax' not in sys.modules and 'jax' not in sys.modules; dualxda_jax.svm.solve"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_room_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_room"):
        _ = dualxda_jax.no_such_room
