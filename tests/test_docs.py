"""What README and docs say of the code is there: links, runs, scripts, rewards, statistics."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from config import grpo
from flow_grpo.objectives import OBJECTIVES
from flow_grpo.rewards import REWARDS

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
    assert set(resolve_name(OBJECTIVES[name]).statistics) <= defined
