"""Who may import whom (docs/concepts.md, the last section), read from the source.

Downwards only; sideways within a package only. Floor 1 is one outside library each, floor 0 torch and the standard library.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dist_vlcl

PACKAGE = Path(dist_vlcl.__file__).parent
FLOORS = [  # first match rules; a module that no line covers has no floor, and is refused
    ("data.tasks", 0),
    ("commands", 4),
    ("model.clip", 1),
    ("continual.evaluator", 2),
    ("continual.metrics", 0),
    ("zo", 0),
    ("orders", 0),
    ("schedule", 0),
    ("masking", 0),
    ("reading", 0),
    ("saved", 1),
    ("options", 0),
    ("model", 0),
    ("dist", 1),
    ("data", 1),
    ("step", 2),
    ("losses", 2),
    ("precision", 2),
    ("run", 3),
    ("report", 4),
    ("train", 4),
    ("session", 4),
    ("experiment", 4),
    ("help", 4),
    ("__main__", 4),
    ("inference", 4),
    ("config", 4),
    ("paper", 4),
    ("tune", 4),
]
VOCABULARY = {("orders", "model.units")}  # the names of units, which a plan is written in
EVERYWHERE = {"options", "masking"}  # how an option is declared, and how a text is written
EMPTY = {"", "continual"}  # packages that hold nothing but a version or a docstring
ONLY_IN = {
    "torch.distributed": lambda m: _within(m, "dist"),
    "accelerate": lambda m: _within(m, "dist") or m == "run.trackers",
    "deepspeed": lambda m: _within(m, "dist"),
    "triton": lambda m: m == "zo.kernel",  # comes with torch where there are GPUs
    "open_clip": lambda m: m == "model.clip",
    "hydra": lambda m: floor_of(m) == 4,
    "omegaconf": lambda m: floor_of(m) == 4,
}


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def floor_of(module: str) -> int | None:
    return next((floor for prefix, floor in FLOORS if _within(module, prefix)), None)


def package_of(module: str) -> str:
    """Return what `sideways` is within; losses and precision are parts of the step."""
    return {"losses": "step", "precision": "step"}.get(module, module.split(".")[0])


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [module for module in SOURCES if module not in EMPTY]


def imports(tree: ast.Module) -> set[str]:
    """Return the dotted names of all that is imported, inside of functions too; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(tree: ast.Module) -> set[str]:
    """Return the modules of dist_vlcl that are imported, the most exact name of each."""
    named = {name.removeprefix("dist_vlcl").lstrip(".") for name in imports(tree) if _within(name, "dist_vlcl")}
    return {name for name in named if name in SOURCES} - EMPTY


def violation(importer: str, imported: str) -> bool:
    upper, lower = floor_of(importer), floor_of(imported)
    if (importer, imported) in VOCABULARY or imported in EVERYWHERE:
        return False
    return lower > upper or (lower == upper < 4 and package_of(importer) != package_of(imported))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_floor_and_imports_downwards_or_within_its_package(module):
    assert floor_of(module) is not None, f"give {module} a floor"
    wrong = sorted(other for other in own_imports(SOURCES[module]) if violation(module, other))
    assert not wrong, f"{module} (floor {floor_of(module)}) imports {[(other, floor_of(other)) for other in wrong]}"


@pytest.mark.parametrize("module", [module for module in MODULES if floor_of(module) == 0])
def test_floor_0_needs_torch_and_the_standard_library_only(module):
    outside = {name.split(".")[0] for name in imports(SOURCES[module])} - {"torch", "triton", "dist_vlcl"} - set(sys.stdlib_module_names)
    assert not outside, f"{module} imports {outside}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_one_place_only(library):
    users = [module for module, tree in SOURCES.items() if any(_within(name, library) for name in imports(tree))]
    wrong = [module for module in users if not ONLY_IN[library](module)]
    assert not wrong, f"{library} is imported by {wrong}"
    assert users


@pytest.mark.parametrize("module", [module for module in MODULES if (floor_of(module) or 0) < 4])
def test_no_function_below_floor_4_takes_a_whole_config(module):
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            for argument in arguments:
                annotation = ast.unparse(argument.annotation) if argument and argument.annotation else ""
                words = annotation.replace(".", " ").replace("[", " ").replace("]", " ").replace("'", " ").replace("|", " ").split()
                assert "Config" not in words, f"{module}.{node.name} takes a Config"


def test_what_only_some_runs_need_is_imported_late():
    """`--help` and the commands on shards wait for torch, and for nothing else that is slow to import."""
    slow = ("torchvision", "open_clip", "timm", "accelerate", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", "wandb", "deepspeed")
    code = f"import sys, dist_vlcl.train, dist_vlcl.commands.build_data; print(sorted(set({slow}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_rule_sees_what_it_should_refuse():
    assert violation("zo.noise", "model.units") and violation("dist.world", "data.loader") and violation("model.clip", "dist.world")
    assert violation("run.folder", "train") and violation("run.folder", "report.tables") and violation("data.loader", "step")
    assert violation("losses", "continual.evaluator") and not violation("step", "losses")
    assert violation("continual.metrics", "continual.evaluator") and violation("data.tasks", "data.loader")
    assert not violation("step", "dist.world") and not violation("train", "config") and not violation("data.loader", "data.tasks")
    assert imports(ast.parse("def f():\n    import torch.distributed as d\n    from a import b")) == {"torch.distributed", "a", "a.b"}
