"""What README and docs say of the code is there: links, runs, scripts, rewards, statistics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import running

from config import grpo
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.report.output import read_metrics
from flow_grpo.rewards.registry import REWARDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "scripts/testbed/README.md"]
PAGES += sorted(ROOT.glob("docs/**/*.md")) + sorted(ROOT.glob("dataset/*/README.md"))


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', page.read_text())
    for link in (first or second for first, second in links):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_project_that_a_page_names_is_there(page):
    named = re.findall(
        r"`((?:config|dataset|docs|flow_grpo|scripts|tests)/[\w./-]+)[`:]", page.read_text()
    )
    for path in named:
        generated = path == "dataset/geneval/train_metadata.jsonl"
        assert generated or (ROOT / path).exists(), path


def test_readme_is_short_and_names_scripts_and_runs_that_exist():
    assert len(README.splitlines()) < 150
    rows = re.findall(r"^\| [^|]+ \| `(train_\w+\.py)` \| ([^|]+) \|", README, re.MULTILINE)
    scripts = {path.name for path in (ROOT / "scripts").glob("train_*.py")}
    assert {script for script, _ in rows} == scripts and len(rows) == len(scripts)
    for _, runs in rows:
        for name in re.findall(r"`(\w+)`", runs):
            assert callable(getattr(grpo, name)), name


def test_every_objective_and_reward_has_its_row():
    for name in OBJECTIVES:
        assert re.search(rf"^\| `{name}` \|", README, re.MULTILINE), name
    for page in ("rewards.md", "verification.md"):
        rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert set(REWARDS) <= names, set(REWARDS) - names


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_measures_is_defined_in_metrics_md(name):
    page = (ROOT / "docs" / "metrics.md").read_text()
    section = page.split(f"| `{name}` |")[1].split("\n| `")[0].split("\n\n")[0]
    defined = {key for row in section.split("\n") for key in re.findall(r"`(\w+)`", row[:60])}
    assert set(OBJECTIVES[name].statistics) <= defined


def test_the_example_of_a_new_objective_trains(files, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "add_an_objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "best_of.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    chosen = {"objective": "best_of:BestOf", "best_of__num_times": 3, "logdir": tmp_path}
    argv = running.arguments(files, num_epochs=1, eval_freq=1, **chosen)
    run = running.train([a for a in argv if "clip_range" not in a and "step_weight" not in a])
    updates = read_metrics(run.folder, "update")
    assert len(updates) == 2 and all(row["error"] > 0 for row in updates)
    assert ">Error</b>" in (run.folder / "report.html").read_text()
