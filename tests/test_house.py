"""Facts about the code base itself: layers, sizes, names that stand in two places."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from config.base import COMMON
from flow_grpo import sde
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.launch.encoders import DTYPES
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.rewards.rules.geneval_rules import SCORES
from flow_grpo.rewards.rules.ocr_engines import ENGINES

ROOT = Path(__file__).parent.parent
LAYERS = (  # a module imports only from its own line or from a line above
    ("cli", "keys", "own", "sde", "randomness"),
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


def test_the_choices_of_a_config_are_those_of_the_code():
    tables = {
        "sample.sde_type": sde.STOCHASTIC,
        "mixed_precision": DTYPES,
        "ocr_engine": ENGINES,
        "rewards.geneval_score": SCORES,
    }
    for name, known in tables.items():
        assert set(COMMON[name].choices) == set(known), name


@pytest.mark.parametrize("path", sorted((ROOT / "flow_grpo").rglob("*.py")), ids=str)
def test_only_objectives_know_an_objectives_name_class_or_keys(path):
    if "objectives" in path.parts:
        return
    classes = {each.__name__ for each in OBJECTIVES.values()}
    own = {key for each in OBJECTIVES.values() for key in each.keys}
    tree = ast.parse(path.read_text())
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    chains = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not texts & {*OBJECTIVES, *own} and not names & classes
    assert not [chain for chain in chains for key in own if f".{chain}".endswith(f".{key}")]


def test_the_loop_names_no_model_and_no_objective():
    source = (ROOT / "flow_grpo" / "training" / "loop.py").read_text().lower()
    for name in ("sd3", "flux", "qwen", "wan", *OBJECTIVES):
        assert not re.search(rf"\b{name}\b", source), name


def words(path: Path) -> list[str]:
    """The identifiers of a file and its strings, docstrings excepted."""
    tree, found = ast.parse(path.read_text()), []
    told = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            found.append(node.value)
        found += [getattr(node, name) for name in ("id", "attr", "arg") if hasattr(node, name)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
    return [word for word in found if isinstance(word, str)]


def test_only_parallel_knows_an_engine():
    names = re.compile(r"deepspeed|_hp_|gloo|GradScaler|Distributed|Accelerat(or|ed)\b", re.I)
    for path in [*(ROOT / "flow_grpo").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        if path.parent.name != "parallel":
            assert not [word for word in words(path) if names.search(word)], path


@pytest.mark.parametrize("folder", ["parallel", "training", "launch"])
def test_a_training_s_state_is_never_unpickled(folder):
    for path in (ROOT / "flow_grpo" / folder).glob("*.py"):
        calls = {word for word in words(path) if not word.startswith("__")}
        assert not calls & {"pickle", "load_checkpoint", "save_checkpoint"}, path
        assert not re.search(r"torch\.(load|save)\b", path.read_text()), path


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
