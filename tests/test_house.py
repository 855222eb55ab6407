"""Facts about the code base itself: layers, sizes, names that stand in two places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from flow_grpo import sde
from flow_grpo.diffusers_patch import FAMILIES
from flow_grpo.launch import preflight
from flow_grpo.launch.encoders import DTYPES
from flow_grpo.objectives import OBJECTIVES
from flow_grpo.rewards import REWARDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flow_grpo"
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
ENGINES = {"deepspeed", "gloo", "ddp", "fsdp", "gradient_state", "sync_gradients"}
SIZES = {  # group: its folders of flow_grpo/, whose sub-folders are counted apart; most lines
    "core": ((".", "diffusers_patch", "objectives", "parallel", "training", "rewards"), 6000),
    "scorers": (("rewards/clip", "rewards/judges", "rewards/rules"), 1800),
    "the rest": (("rewards/remote", "reward_server", "report", "launch", "evaluation"), 4000),
}

# What is not yet as it shall be. The lists only get shorter: an entry without need fails too.
CIRCULAR = {  # imports without which there would be no circle
    ("rewards.remote.servers", "rewards.remote.client"),
    ("rewards.remote.servers", "rewards.remote.exchange"),
}
NAMED_OUTSIDE = {  # the folder of a name, and where else it stands
    ("objectives", "launch/preflight.py", "nft"),
    ("objectives", "plan.py", "grpo"),
    ("parallel", "launch/build.py", "deepspeed"),
    ("parallel", "launch/build.py", "gloo"),
    ("parallel", "training/checkpoint.py", "deepspeed"),
    ("parallel", "training/folders.py", "deepspeed"),
    ("parallel", "training/optimizer.py", "deepspeed"),
    ("parallel", "training/optimizer.py", "gradient_state"),
    ("parallel", "training/optimizer.py", "sync_gradients"),
    ("parallel", "training/snapshots.py", "deepspeed"),
}
NEED_TRANSFORMERS = {"flow_grpo.rewards.clip.encoder", "flow_grpo.rewards.rules.detector"}
REACH_INTO_A_PIPELINE = {
    ("flow_grpo/evaluation/stock.py", "pipe"),
    ("flow_grpo/launch/build.py", "pipe"),
    ("flow_grpo/launch/build.py", "stock"),
    ("flow_grpo/launch/encoders.py", "pipe"),
    ("flow_grpo/launch/encoders.py", "stock"),
    ("flow_grpo/launch/verify.py", "pipe"),
    ("flow_grpo/training/checkpoint.py", "stock"),
}
TOO_LARGE = {"the rest"}


def assert_listed(seen: set, listed: set) -> None:
    assert not (new := seen - listed), f"new: {sorted(new)}"
    assert not (gone := listed - seen), f"delete from its list: {sorted(gone)}"


def module(path: Path) -> str:
    """The module of a file as a dotted name after the package's; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> list[str]:
    """What a file imports of flow_grpo, wherever it does, and by a string as in a registry."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+(:\w+)?", str(node.value)):
            names.append(str(node.value).replace(":", "."))
    return [n.removeprefix("flow_grpo.") for n in names if n.startswith("flow_grpo.")]


def imported_module(name: str) -> str:
    """The longest beginning of a dotted name that is a module."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    here = name.split(".")[0]
    if name and not name.endswith("__main__"):  # a command may use all
        for other in imports(MODULES[name]):
            assert RANK[other.split(".")[0]] <= RANK[here], f"{name} imports {other}"


def circle(edges: set[tuple[str, str]]) -> list[str]:
    graph = {}
    for importer, imported in edges:
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    edges = {(n, imported_module(i)) for n, path in MODULES.items() for i in imports(path)}
    assert not circle(edges - CIRCULAR)
    for edge in CIRCULAR:
        assert edge in edges and circle(edges - CIRCULAR | {edge}), f"delete from its list: {edge}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_folder_has_at_most_14_files(folder):
    assert len(list(folder.glob("*.py"))) <= 14


def identifiers(path: Path) -> set[str]:
    """All names in a file's code, and those in strings that are names, such as "nft.beta"."""
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = {v for node in nodes for _, v in ast.iter_fields(node) if isinstance(v, str)}
    dotted = [text for text in texts if re.fullmatch(r"\w+([.:/]\w+)*", text)]
    return {name.lower() for text in dotted for name in re.split("[.:/]", text)}


def registered(registry: dict) -> set[str]:
    """The keys of a registry and the names of what they stand for, in lower case."""
    classes = (
        v.rpartition(":")[2] if isinstance(v, str) else v.__name__ for v in registry.values()
    )
    return {name.lower() for name in (*registry, *classes)}


def test_a_name_of_an_objective_a_model_or_an_engine_stands_in_its_own_folder_alone():
    names = {"objectives": registered(OBJECTIVES), "diffusers_patch": registered(FAMILIES)}
    seen = set()
    for path in MODULES.values():
        file = path.relative_to(PACKAGE)
        used = identifiers(path)
        own = {folder: used & known for folder, known in names.items()}
        own["parallel"] = {e for e in ENGINES if any(re.search(rf"(^|_){e}", n) for n in used)}
        for folder in set(own) - set(file.parts):
            seen |= {(folder, str(file), name) for name in own[folder]}
    assert_listed(seen, NAMED_OUTSIDE)


IMPORT_ALL = """
import sys
from importlib import import_module
from pkgutil import walk_packages

sys.modules |= dict.fromkeys(("diffusers", "peft", "transformers"))  # importing these now fails
for package in map(import_module, ("flow_grpo.rewards", "flow_grpo.reward_server")):
    for found in walk_packages(package.__path__, f"{package.__name__}."):
        try:
            import_module(found.name)
        except ImportError:
            print(found.name)
"""


def test_rewards_and_their_server_import_where_model_libraries_are_missing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert_listed(set(done.stdout.split()), NEED_TRANSFORMERS)


def test_only_a_model_reaches_into_its_pipeline():
    seen = set()
    for path in (p for folder in ("flow_grpo", "scripts") for p in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        reached = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if "diffusers_patch" not in path.parts:
            seen |= {(str(path.relative_to(ROOT)), name) for name in reached & {"pipe", "stock"}}
    assert_listed(seen, REACH_INTO_A_PIPELINE)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_library_stays_small():
    sizes = dict.fromkeys(SIZES, 0)
    group = {folder: name for name, (folders, _) in SIZES.items() for folder in folders}
    for path in MODULES.values():
        folder = path.relative_to(PACKAGE).parent
        while str(folder) not in group:
            folder = folder.parent
            assert folder.name, f"{path} is in no group of SIZES"
        sizes[group[str(folder)]] += lines(path)
    large = {name for name, (_, most) in SIZES.items() if sizes[name] >= most}
    assert large == TOO_LARGE, sizes


def test_every_model_is_in_the_registry_under_its_stock_class():
    for name, path in FAMILIES.items():
        assert name in {family.stock.__name__ for family in resolve_name(path).variants()}
    named = {path.split(":")[0] for path in FAMILIES.values()}
    for script in (ROOT / "scripts").glob("train_*.py"):
        (module,) = set(re.findall(r"flow_grpo\.diffusers_patch\.\w+", script.read_text()))
        assert module in named, f"{script}: {module} is not in diffusers_patch/__init__.py"


def test_every_name_in_a_registry_resolves():
    for path in (*OBJECTIVES.values(), *REWARDS.values()):
        module, attribute = path.split(":")
        assert callable(getattr(import_module(module), attribute))


def test_the_choices_of_a_config_are_those_of_the_code():
    assert set(preflight.CHOICES["sample.sde_type"]) == set(sde.KINDS) - {"ode"}
    assert set(preflight.CHOICES["mixed_precision"]) == set(DTYPES)
    assert set(preflight.CHOICES["objective"]) == set(OBJECTIVES)


def test_the_loop_names_no_model_and_no_objective():
    source = (ROOT / "flow_grpo" / "training" / "loop.py").read_text().lower()
    for name in ("sd3", "flux", "qwen", "wan", *OBJECTIVES):
        assert not re.search(rf"\b{name}\b", source), name


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


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
