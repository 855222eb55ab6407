"""report.html: what a run leaves for a person, seen with a browser's eyes."""

from __future__ import annotations

import ast
import html
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import running
from PIL import Image

from flow_grpo.launch import provenance
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.report import charts, facts, images, output, plots, recorded
from flow_grpo.report.__main__ import main
from flow_grpo.report.sheets import contact_sheet, cut_sheet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROBE = """<script>addEventListener("load", () => {
  const all = (css, read) => Array.from(document.querySelectorAll(css), read);
  const seen = {
    before: all("img.before", i => [i.naturalWidth, i.width]),
    after: all("img.after", i => [i.naturalWidth, i.width]),
    captions: all(".pair > p", p => p.textContent),
    values: all(".tile .values", v => v.textContent),
    evaluations: all(".evaluations tr", r => Array.from(r.children, c => c.textContent)),
    drawings: all("figure", f => ({
      title: f.querySelector("b").textContent,
      width: f.querySelector("svg").getBoundingClientRect().width,
      curves: Array.from(f.querySelectorAll("path.line")).filter(p => p.getTotalLength() > 20)
        .map(p => getComputedStyle(p).stroke),
    })),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    loaded: performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
  };
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
});</script>"""
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory) -> Path:
    """A run of one epoch, resumed for a second one; its prompts have tags."""
    data, logs = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("logs")
    rows = [{"prompt": p, "tag": "long" if len(p) > 9 else "short"} for p in running.PROMPTS]
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}_metadata.jsonl").write_text(lines)
    chosen = {"dataset": data, "logdir": logs, "run_name": "seen & done", "eval_freq": 1}
    running.train(running.arguments(files, **chosen, num_epochs=1))
    return running.train(running.arguments(files, **chosen, resume_from="latest")).folder


def browse(page_: Path, profile: Path, *options: str) -> str:
    profile.mkdir()
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *options, page_.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def seen(page_: Path, tmp_path: Path, width: int) -> dict:
    """What a browser made of the page once all was loaded."""
    probed = tmp_path / "probed.html"
    probed.write_text(page_.read_text().replace("</body>", PROBE + "</body>"))
    dom = browse(probed, tmp_path / "profile", f"--window-size={width},2000", "--dump-dom")
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))


class References(HTMLParser):
    """Collects what a page would load: addresses in attributes and in styles."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self._in_style = set(), [], False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._in_style = tag == "style"
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "poster", "data", "action"):
                self.addresses.append(value)
            elif name in ("style", "clip-path", "fill", "mask", "filter"):
                self._find(value)

    def handle_data(self, data):
        if self._in_style:
            assert "@import" not in data
            self._find(data)
            self._in_style = False

    def _find(self, css):
        self.addresses += re.findall(r"url\(['\"]?([^)]*)", css)


def test_a_run_leaves_a_page_that_is_small_and_loads_nothing(folder):
    text = (folder / "report.html").read_text()
    assert len(text.encode()) < 500_000 and "<h1>seen &amp; done</h1>" in text
    found = References()
    found.feed(text)
    assert len(found.addresses) > 12 and {"img", "svg", "style"} <= found.tags
    assert [a for a in found.addresses if not a.startswith(("data:", "#"))] == []
    assert not found.tags & {"script", "iframe", "object", "embed", "base", "video", "audio"}


@pytest.mark.slow
@browser
def test_a_browser_shows_the_curves_the_images_and_the_numbers(folder, tmp_path):
    found = seen(folder / "report.html", tmp_path, 1200)
    assert found["loaded"] == [] and found["overflow"] == 0
    for side in ("before", "after"):
        assert len(found[side]) == len(running.PROMPTS)
        assert all(natural == 32 and shown > 50 for natural, shown in found[side])
    assert found["captions"] == running.PROMPTS
    evals = output.read_metrics(folder, "eval")
    assert [row["epoch"] for row in evals] == [0, 1, 2]
    score = "jpeg_incompressibility"
    first, *_, last = (facts.number(row[score]) for row in evals)
    assert found["values"] == [f"{first}→{last}"]
    cells = [[str(r["step"]), str(r["epoch"]), facts.number(r[score])] for r in evals]
    assert found["evaluations"] == [["step", "epoch", score], *cells]
    drawn = {drawing["title"]: drawing for drawing in found["drawings"]}
    assert {score, "long", "short", "Mean reward", "Loss", "Seconds per epoch"} <= set(drawn)
    assert all(drawing["width"] > 150 for drawing in found["drawings"])
    curves = {title: drawing["curves"] for title, drawing in drawn.items()}
    assert curves[score] == curves["Loss"] == ["rgb(31, 111, 92)"]  # the page's --series-1
    updates = output.read_metrics(folder, "update")
    steps = {key for row in updates for key in row if key.startswith("approx_kl/")}
    assert len(steps) == 4 and len(set(curves["Approximate KL"])) == 4  # each has its colour


@browser
@pytest.mark.parametrize("scheme, paper", [("1", (251, 250, 248)), ("0", (20, 22, 26))])
def test_the_page_is_painted_in_light_and_in_dark(folder, tmp_path, scheme, paper):
    shot = tmp_path / "shot.png"
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    size = "--window-size=1200,2500"
    browse(folder / "report.html", tmp_path / "profile", size, colours, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert tuple(pixels[0, 0]) == paper
    packed = pixels.astype(np.int64) @ (65536, 256, 1)
    assert len(np.unique(packed)) > 500
    inked = (pixels != paper).any(axis=2)
    assert (inked.reshape(25, -1).mean(axis=1) > 0.005).all()  # no empty stretch


@browser
def test_nothing_sticks_out_on_a_phone(folder, tmp_path):
    inner, outer = tmp_path / "inner.html", tmp_path / "outer.html"
    tell = "parent.postMessage(document.documentElement.scrollWidth, '*')"
    text = (folder / "report.html").read_text()
    inner.write_text(text.replace("</body>", f"<script>onload = () => {tell}</script></body>"))
    outer.write_text(  # a window is never that narrow
        "<script>onmessage = e => document.body.textContent = `width ${e.data}`</script>"
        '<iframe src="inner.html" width="360" height="700" style="border: 0"></iframe>'
    )
    dom = browse(outer, tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom")
    assert "width 360" in dom


def test_every_launch_is_kept_with_what_it_takes_to_repeat_it(folder):
    first, second = json.loads((folder / provenance.FILE).read_text())
    assert first["resumed_from"] is None and second["resumed_from"] == "checkpoint-2"
    assert "--config.resume_from=latest" in second["command"]
    assert first["command"].startswith("python train.py --config=")
    assert first["versions"]["torch"] and first["machine"]["cores"] > 0
    text = html.unescape((folder / "report.html").read_text())
    assert second["command"] in text and f"torch {first['versions']['torch']}" in text


def test_settings_that_differ_from_the_defaults_are_marked(folder):
    found = {one.key: one for one in facts.settings(recorded.load(folder))}
    assert (found["sample.num_steps"].value, found["sample.num_steps"].default) == ("5", "10")
    assert found["sample.num_steps"].changed and found["reward_fn"].changed
    assert not found["seed"].changed and not found["run_name"].changed


def test_a_run_that_did_not_record_its_defaults_shows_all_settings(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "run.json").unlink()
    run = recorded.load(tmp_path / "old")
    shown = facts.settings(run)
    assert {one.key for one in shown if one.changed} >= {"seed", "train.learning_rate"}
    text = output.render(run, [])
    assert "are not recorded in its folder" in text and "What differs" not in text


def test_the_report_knows_nothing_of_the_code_that_ran():
    for path in Path(output.__file__).parent.glob("*.py"):
        modules = [
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        ]
        own = [name for name in modules if name.split(".")[0] in ("flow_grpo", "config")]
        known = ("flow_grpo.report", "flow_grpo.cli", "flow_grpo.inputs")  # a file of a user's
        assert all(name.startswith(known) for name in own), path


def chart_rows(tmp_path, updates: list[dict], about: dict | None = None) -> recorded.Recorded:
    """A run of one evaluation with these updates."""
    rows = [{"kind": "eval", "epoch": 0, "step": 0, "avg": 0.5}]
    rows += [{"kind": "update", "epoch": 0, "step": n} | row for n, row in enumerate(updates, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"reward_fn": {"avg": 1.0}}))
    if about is not None:
        written = {"statistics": about, "defaults": {}}
        (tmp_path / "run.json").write_text(json.dumps(written))
    return recorded.load(tmp_path)


STEPS = {"gap": 2.5, "gap/0": 2.0, "gap/10": 3.0, "gap_std": 0.5, "gap/0_std": 0.25}


def test_a_statistic_that_nobody_described_is_drawn_under_its_name(tmp_path):
    run = chart_rows(tmp_path, [STEPS | {"loss": 1.0, "scale": 7.0}] * 2)
    by_title = {chart.title: chart for chart in charts.denoising(run)}
    assert list(by_title) == ["gap", "gap_std"]
    assert [s.label for s in by_title["gap"].series] == ["step 0", "step 10"]
    assert [s.y for s in by_title["gap"].series] == [[2.0, 2.0], [3.0, 3.0]]
    assert [s.y for s in by_title["gap_std"].series] == [[0.25, 0.25]]
    assert [chart.title for chart in charts.updates(run)] == ["Loss", "scale"]


def test_a_statistic_has_the_title_the_note_and_the_origin_that_the_run_wrote(tmp_path):
    about = {"gap_std": {"title": "Spread", "note": "of gaps", "origin": 0.0}}
    about["gap"] = {"title": "Gap − 2", "note": "", "origin": 2.0}
    spread, gap = charts.denoising(chart_rows(tmp_path, [STEPS], about))
    assert (spread.title, spread.note, gap.title) == ("Spread", "of gaps", "Gap − 2")
    assert [s.y for s in gap.series] == [[0.0], [1.0]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_page_has_a_described_chart_for_all_that_it_measures(name, files, tmp_path):
    chosen = {"objective": name, "num_epochs": 1, "eval_freq": 1, "logdir": tmp_path}
    keys = OBJECTIVES[name].keys
    optional = ("beta", "proximal", "dgpo.clip_range")
    pulls = [key for key in keys if key.endswith(optional) and not keys[key].default]
    chosen |= {key.replace(".", "__"): 0.01 for key in pulls}
    run = running.train(running.arguments(files, **chosen))
    drawn = charts.denoising(recorded.load(run.folder))
    described = [each.title for each in type(run.objective).statistics.values()]
    assert [chart.title for chart in drawn] == described
    text = (run.folder / "report.html").read_text()
    assert "stochastic" not in text
    assert ("in the unit of train.kl_mode" in text) == ("train.kl_mode" in keys)


def test_a_comparison_draws_the_other_run_over_this_one(folder, tmp_path, capsys):
    mine, other = tmp_path / "mine", tmp_path / "control"
    shutil.copytree(folder, mine)
    shutil.copytree(folder, other)
    main([str(mine), "--compare", str(other)])
    assert capsys.readouterr().out.strip() == str(mine / "report.html")
    text = (mine / "report.html").read_text()
    assert "Runs compared" in text and "<td>control</td>" in text
    run, control = recorded.load(mine), recorded.load(other)
    drawn = charts.evaluation(run, [control]) + charts.tags(run, [control])
    assert [[s.label for s in chart.series] for chart in drawn] == [["mine", "control"]] * 4
    assert [chart.title for chart in drawn[1:]] == ["long", "short", "mean_of_tags"]
    assert [s.dash for s in drawn[0].series] == ["", "dashed"]
    (mean, *_) = charts.rewards(run, [control])
    assert [s.label for s in mean.series] == ["mine", "control"]


def test_every_run_compared_has_a_line_of_its_own_and_controls_are_grey(folder):
    run = recorded.load(folder)
    shuffled = {"train": run.config["train"] | {"shuffle_advantages": True}}
    control = replace(run, config=run.config | shuffled)
    lines = charts.lines(run, [*[run] * 5, control, *[run] * 5])
    assert lines[6] == (control, ("var(--ink-soft)", "dotted"))
    assert len({look for _, look in lines}) == 12


def test_a_folder_without_a_run_is_refused_by_hand_and_only_warned_of_in_training(tmp_path):
    with pytest.raises(SystemExit, match="has no config.json: a run's folder"):
        main([str(tmp_path)])
    with pytest.warns(UserWarning, match="report.html was not drawn"):
        output.redraw(tmp_path)


def test_the_module_draws_from_the_command_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    command = [sys.executable, "-m", "flow_grpo.report", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000


def test_intervals_become_bands_and_are_no_scores_of_their_own(tmp_path):
    ends = {"shapes_low": 0.2, "shapes_high": 0.6, "shapes_low/two": 0.1, "shapes_high/two": 0.9}
    row = {"kind": "eval", "epoch": 0, "step": 0, "shapes": 0.5, "shapes/two": 0.4, "avg": 0.5}
    rows = [row | ends, row | ends | {"epoch": 2, "step": 8, "shapes": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "config.json").write_text(json.dumps({"reward_fn": {"shapes": 1.0}}))
    table = output.table(tmp_path)
    assert [line.split()[0] for line in table.splitlines()] == ["step", "shapes", "avg"]
    run = recorded.load(tmp_path)
    assert run.scores() == ["shapes"] and run.tags() == ["two"]  # avg is the same again
    (whole,), (tag,) = charts.evaluation(run, []), charts.tags(run, [])
    assert whole.series[0].low == [0.2, 0.2] and whole.series[0].high == [0.6, 0.6]
    assert tag.series[0].low == [0.1, 0.1] and tag.series[0].y == [0.4, 0.4]
    (change,) = facts.changes(run)
    assert (change.difference, change.rises) == ("+0.100", True)
    assert change.interval_after == "0.200 – 0.600"


def test_the_strip_shows_prompts_before_and_after_with_their_scores(folder, tmp_path, monkeypatch):
    out, script = tmp_path / "strip.png", Path(__file__).parent.parent / "scripts/testbed/strip.py"
    score = "jpeg_incompressibility"
    argv = [script, folder, "--out", out, "--num", "3", "--score", score]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    strip = runpy.run_path(str(script), run_name="strip")
    strip["main"]()
    pixels = np.asarray(Image.open(out))
    first, *_, last = recorded.load(folder).evals
    sheets = [images.read_sheet(images.sheet_path(folder, r["step"]))[1] for r in (first, last)]
    pair = strip["stack"](sheets[0][0], sheets[1][0])
    height, width, _ = pair.shape
    assert (height, width) == (2 * 96 + 2, 96) and pixels.shape[1] == 3 * (width + 6) + 6
    np.testing.assert_array_equal(pixels[6 : 6 + height, 6 : 6 + width], pair)
    mean = sum(strip["scores"](folder, last["step"], score)) / len(running.PROMPTS)
    assert mean == pytest.approx(last[score])


@pytest.mark.parametrize("side", [32, 200])
def test_cutting_a_sheet_gives_its_pictures_back(side):
    generator = np.random.default_rng(0)
    tiles = list(generator.integers(0, 256, (7, side // 2, side, 3), dtype=np.uint8))
    cut = cut_sheet(contact_sheet(tiles, num_columns=3), 7, (side // 2, side), num_columns=3)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in cut]), tiles)


def test_many_large_pictures_are_made_small_enough(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    run = recorded.load(tmp_path / "run")
    generator = np.random.default_rng(0)
    noise = list(generator.integers(0, 256, (48, 256, 256, 3), dtype=np.uint8))
    sheet = contact_sheet(noise, num_columns=12)
    for row in (run.evals[0], run.evals[-1]):
        sheet.save(run.folder / "images" / f"eval-{row['step']:06d}.png", compress_level=0)
    layout = {"num_columns": 12, "size": (256, 256), "prompts": ["noise"] * 48}
    (run.folder / "images" / "eval.json").write_text(json.dumps(layout))
    text = output.render(run, [])
    assert 2_000_000 < len(text.encode()) < output.MOST_BYTES
    assert images.encode(Image.fromarray(noise[0]), 256).startswith("data:image/jpeg")
    assert text.count("data:image/jpeg") == 2 * 48


def test_a_long_curve_is_thinned_to_means_and_gaps_stay_gaps():
    np.testing.assert_array_equal(plots.thin([1.0, 3.0, 5.0, 7.0], most=2), [2.0, 6.0])
    thinned = plots.thin([1.0, float("nan"), float("inf"), float("nan")], most=2)
    assert thinned[0] == 1.0 and np.isnan(thinned[1])
    series = plots.Series("loss", list(range(50_000)), [0.5] * 50_000, plots.colour(0))
    (curve,) = plots.draw(plots.Chart("Loss", "", [series])).curves
    assert len(curve.line) < 5_000


def test_a_gap_breaks_the_line_and_a_lone_value_is_a_dot():
    series = plots.Series("loss", [0, 1, 2, 3], [1.0, 2.0, float("nan"), 3.0], "red")
    (curve,) = plots.draw(plots.Chart("Loss", "", [series])).curves
    assert curve.line.count("M") == 2 and len(curve.dots) == 1


def test_a_drawing_puts_values_where_its_ticks_say():
    series = plots.Series("x", [0, 10], [0.25, 0.75], "red", low=[0.2, 0.7], high=[0.3, 0.8])
    chart = plots.Chart("X", "", [series], limits=(0.0, 1.0), markers=True)
    drawing = plots.draw(chart)
    (left, bottom), (right, top) = drawing.curves[0].dots
    columns = {text: x for x, text in drawing.x_ticks}
    rows = {text: y for y, text in drawing.y_ticks}
    assert (columns["0"], columns["10"]) == (left, right)
    assert list(rows) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert rows["0.2"] > bottom > rows["0.4"] and rows["0.6"] > top > rows["0.8"]
    assert rows["0.0"] == drawing.floor
    assert f"{left},{rows['0.2']}" in drawing.curves[0].band


@pytest.mark.parametrize(
    "low, high, texts",
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-1.2e-6, 2.1e-6, ["−1e-6", "0", "1e-6", "2e-6"]),
        (7.6e-5, 8.4e-5, ["7.6e-5", "7.8e-5", "8.0e-5", "8.2e-5", "8.4e-5"]),
        (0, 2_500_000, ["0", "5e5", "1.0e6", "1.5e6", "2.0e6", "2.5e6"]),
        (0.98, 1.06, ["0.98", "1.00", "1.02", "1.04", "1.06"]),
    ],
)
def test_ticks_are_round_and_no_two_read_alike(low, high, texts):
    assert [text for _, text in plots.ticks(low, high, most=5)] == texts


def test_steps_and_epochs_are_counted_in_whole_numbers():
    assert [text for _, text in plots.ticks(-0.04, 2.04, most=6, whole=True)] == ["0", "1", "2"]
