"""Facts about the code base itself: layers, sizes, names that stand in two places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
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
PACKAGE = ROOT / "flow_grpo"
LAYERS = (  # a module imports only from its own line or from a line above
    ("cli", "inputs", "keys", "sde", "randomness"),
    ("advantages", "prompts", "records", "rollouts", "windows"),
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
ENGINE_NAMES = {"deepspeed", "gloo", "ddp", "fsdp", "gradient_state", "sync_gradients"}
SIZES = {  # group: its folders of flow_grpo/, whose sub-folders are counted apart; most lines
    "core": ((".", "diffusers_patch", "objectives", "parallel", "training", "rewards"), 6000),
    "scorers": (("rewards/clip", "rewards/judges", "rewards/rules"), 1800),
    "the rest": (("rewards/remote", "reward_server", "report", "launch", "evaluation"), 4000),
}
SINCE = {  # of what came after: compiled passes, safe checkpoints, any LoRA, files of others,
    # ranks that meet again, disks that fill; objectives, windows, branches; losses on final
    # images; engines that cut weights; BAGEL (870 lines, most of them a transformer, a pipeline and
    # a folder's reader that for other models are diffusers'); signs of hacking; states that are cut
    # anew, released sizes, what a run needs; ranks that watch each other;
    # judges that read, protocols, evaluations that go on and at other sizes; sizes of prompts,
    # what waits on the host; room for a checkpoint's copies; LoRAs merged for rollouts
    "core": 5950,
    "scorers": 1040,
    "the rest": 2190,
}
NEED_TRANSFORMERS = {  # for the constructors of rewards, which import them
    "flow_grpo.rewards.clip.encoder",
    "flow_grpo.rewards.rules.detector",
}


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


def test_no_modules_import_each_other_in_a_circle():
    graph = {n: {imported_module(i) for i in imports(path)} for n, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


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
        own["parallel"] = {e for e in ENGINE_NAMES if any(re.search(rf"(^|_){e}", n) for n in used)}
        for folder in set(own) - set(file.parts):
            seen |= {(folder, str(file), name) for name in own[folder]}
    assert not seen


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
    assert set(done.stdout.split()) == NEED_TRANSFORMERS


def test_only_a_model_reaches_into_its_pipeline():
    seen = set()
    for path in (p for folder in ("flow_grpo", "scripts") for p in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        reached = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if "diffusers_patch" not in path.parts:
            seen |= {(str(path.relative_to(ROOT)), name) for name in reached & {"pipe", "stock"}}
    assert not seen


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
    assert all(sizes[name] < most + SINCE.get(name, 0) for name, (_, most) in SIZES.items()), sizes


def test_every_model_is_in_the_registry_under_its_stock_class():
    for name, family in FAMILIES.items():
        assert name == family.stock_name()
    named = {family.__module__ for family in FAMILIES.values()}
    for script in (ROOT / "scripts").glob("train_*.py"):
        (module,) = set(re.findall(r"flow_grpo\.diffusers_patch\.[.\w]+", script.read_text()))
        assert module in named, f"{script}: {module} is not in diffusers_patch/registry.py"


def test_the_choices_of_a_config_are_those_of_the_code():
    tables = {
        "sample.sde_type": sde.STOCHASTIC,
        "mixed_precision": DTYPES,
        "ocr_engine": ENGINES,
        "rewards.geneval_score": SCORES,
    }
    for name, known in tables.items():
        assert set(COMMON[name].choices) == set(known), name


def test_an_objectives_keys_are_read_in_its_own_folder_alone():
    own = {key for each in OBJECTIVES.values() for key in each.keys}
    for name, path in MODULES.items():
        if not name.startswith("objectives"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            chains = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
            assert not [c for c in chains for key in own if f".{c}".endswith(f".{key}")], name
            assert not own & {n.value for n in nodes if isinstance(n, ast.Constant)}, name


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
        if not {"parallel", "benchmark"} & {*path.relative_to(ROOT).parts}:
            assert not [word for word in words(path) if names.search(word)], path


@pytest.mark.parametrize("folder", ["parallel", "training", "launch"])
def test_a_training_s_state_is_never_unpickled(folder):
    for path in (ROOT / "flow_grpo" / folder).rglob("*.py"):
        calls = {word for word in words(path) if not word.startswith("__")}
        assert not calls & {"pickle", "load_checkpoint", "save_checkpoint"}, path
        assert not re.search(r"torch\.(load|save)\b", path.read_text()), path


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


CLOCKS = {"sleep", "time", "monotonic", "perf_counter", "process_time"}
WAITING = ("waiting.py", "mutants.py", "serving.py", "fuzzing.py", "test_ocr.py")


def test_no_test_reads_a_clock():
    """How fast a machine is decides nothing; waiting.py ends what hangs."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name in WAITING:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                clock = node.value.id == "time" and node.attr in CLOCKS
                assert not clock, f"{path}, line {node.lineno}"
