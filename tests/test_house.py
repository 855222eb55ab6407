"""Facts about the code base itself: layers, sizes, names that stand in two places."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.launch import preflight
from flow_grpo.launch.encoders import DTYPES
from flow_grpo.objectives import OBJECTIVES
from flow_grpo.rewards import REWARDS

ROOT = Path(__file__).parent.parent
LAYERS = (  # a module imports only from its own line or from a line above
    ("cli", "sde", "randomness"),
    ("advantages", "prompts", "records", "rollouts"),
    ("plan",),
    ("diffusers_patch",),
    ("conditioning",),
    ("sampling",),
    ("objectives", "rewards"),
    ("reward_server",),
    ("parallel",),
    ("report",),
    ("evaluation",),
    ("training",),
    ("launch",),
)
RANK = {name: number for number, line in enumerate(LAYERS) for name in line}


def imports(path: Path) -> list[str]:
    """The modules of flow_grpo that a file imports, as dotted names after the package's."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flow_grpo"):
            module = node.module.removeprefix("flow_grpo").strip(".")
            found += [f"{module}.{a.name}".strip(".") for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name[10:] for a in node.names if a.name.startswith("flow_grpo.")]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "flow_grpo").rglob("*.py")), ids=str)
def test_imports_point_one_way(path):
    here = path.relative_to(ROOT / "flow_grpo").with_suffix("").parts[0]
    if here == "__init__" or path.name == "__main__.py":  # a command may use all
        return
    for name in imports(path):
        assert RANK[name.split(".")[0]] <= RANK[here], f"{path} imports {name}"


@pytest.mark.parametrize("folder", sorted({p.parent for p in (ROOT / "flow_grpo").rglob("*.py")}))
def test_a_folder_has_at_most_14_files(folder):
    assert len(list(folder.glob("*.py"))) <= 14


def test_every_model_is_in_the_registry_under_its_stock_class():
    for name, family in FAMILIES.items():
        assert name == family.stock_name()
    named = {family.__module__ for family in FAMILIES.values()}
    for script in (ROOT / "scripts").glob("train_*.py"):
        (module,) = set(re.findall(r"flow_grpo\.diffusers_patch\.\w+", script.read_text()))
        assert module in named, f"{script}: {module} is not in diffusers_patch/registry.py"


@pytest.mark.parametrize("folder", ["flow_grpo", "scripts"])
def test_the_stock_pipeline_is_known_to_the_models_alone(folder):
    models = ROOT / "flow_grpo" / "diffusers_patch"
    for path in (ROOT / folder).rglob("*.py"):
        if models not in path.parents:
            assert not re.search(r"\.(pipe|stock)\b", path.read_text()), path


def test_every_name_in_a_registry_resolves():
    for path in (*OBJECTIVES.values(), *REWARDS.values()):
        module, attribute = path.split(":")
        assert callable(getattr(import_module(module), attribute))


def test_the_choices_of_a_config_are_those_of_the_code():
    assert set(preflight.CHOICES["mixed_precision"]) == set(DTYPES)
    assert set(preflight.CHOICES["objective"]) == set(OBJECTIVES)


def test_the_loop_names_no_model_and_no_objective():
    source = (ROOT / "flow_grpo" / "training" / "loop.py").read_text().lower()
    for name in ("sd3", "flux", "qwen", "wan", *OBJECTIVES):
        assert not re.search(rf"\b{name}\b", source), name


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("folder", ["flow_grpo", "scripts"])
def test_files_and_functions_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path
        for function in functions(path):
            assert function.end_lineno - function.lineno < 60, (path, function.name)


def test_public_functions_of_the_library_have_type_hints():
    for path in (ROOT / "flow_grpo").rglob("*.py"):
        for function in functions(path):
            if not function.name.startswith("_"):
                assert function.returns is not None, (path, function.name)
