"""Which charts a run gets, from its rows of metrics."""

from __future__ import annotations

from dataclasses import replace

from flow_grpo.report.plots import DASHES, NUM_COLOURS, Chart, Series, colour, padded, ramp
from flow_grpo.report.recorded import Recorded, interval

UPDATE_VALUES = {
    "loss": ("Loss", "weighted mean over rows and trained steps"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "of each optimizer step"),
}
PHASES = ("sample", "reward", "update", "eval", "save")


def evaluation(run: Recorded, others: list[Recorded]) -> list[Chart]:
    """One chart per score, with its interval; the runs compared with lie over it."""
    charts = []
    for name in run.scores():
        series = [_evaluated(one, name, None, one.name, *look) for one, look in lines(run, others)]
        charts.append(Chart(name, "", series, markers=True))
    return _present(charts)


def tags(run: Recorded, others: list[Recorded]) -> list[Chart]:
    """One chart per tag, all with one scale."""
    names = run.scores()
    values = [row[name] for row in run.evals for name in names if name in row]
    if others or not all(0 <= value <= 1 for value in values):  # shares have one scale
        names = names[:1]
    shown = [(run, name, name, colour(i)) for i, name in enumerate(names)]
    if others:
        shown = [(one, names[0], one.name, *look) for one, look in lines(run, others)]
    charts = []
    for tag in run.tags():
        series = [_evaluated(one, name, tag, *look) for one, name, *look in shown]
        charts.append(Chart(tag, "", series, markers=True, width="narrow"))
    limits = padded([one for chart in charts for one in chart.series])
    return [replace(chart, limits=limits) for chart in _present(charts)]


def rewards(run: Recorded, others: list[Recorded]) -> list[Chart]:
    """The training reward, with those of runs compared, its spread, and what teaches nothing."""
    names = ["avg", *run.trained] if len(run.trained) > 1 else ["avg"]
    means = {f"reward/{name}": name for name in names}
    band = [_over(run.epochs, "reward/avg", "avg", colour(0), spread="reward/avg_std")]
    equal = {"reward/zero_std_fraction": ""}
    mean = _of_epochs(run, "Mean reward", "of an epoch's images", means)
    if others:
        series = [
            _over(one.epochs, "reward/avg", one.name, shade, dash=dash)
            for one, (shade, dash) in lines(run, others)
        ]
        mean = replace(mean, series=series)
    charts = [
        mean,
        Chart("Mean reward ± standard deviation", "over an epoch's images", band, "epoch"),
        _of_epochs(run, "Groups of equal scores", "they teach nothing", equal),
    ]
    return _present(charts)


def denoising(run: Recorded) -> list[Chart]:
    """What the objective measured at each denoising step, under the titles that the run wrote."""
    charts = []
    for name in _statistics(run):
        about = run.statistics.get(name, {"title": name, "note": "", "origin": 0.0})
        keys = _step_keys(run.updates, name)
        series = [
            _over(run.updates, key, f"step {step}", ramp(n, len(keys)), origin=about["origin"])
            for n, (step, key) in enumerate(keys.items())
        ]
        charts.append(Chart(about["title"], about["note"], series))
    return _present(charts)


def hacking(run: Recorded) -> list[Chart]:
    """What shows that images please the reward and nobody else; facts.signs() says it in words."""
    looks = {
        "saturation": ("Saturation", "of evaluated images, 0 to 1"),
        "sharpness": ("Sharpness", "of evaluated images: differences of neighbours, 0 to 1"),
    }
    spread = {"diversity": "pixels", "reward/dino_diversity": "features"}
    ratio = [_over(run.updates, "norm_ratio", "", colour(0))]
    charts = [
        _of_epochs(run, "Diversity", "differences between a prompt's images", spread),
        Chart("Norm ratio", "the velocity's norm over the reference's", ratio),
        *(Chart(*words, [_over(run.looks, key, "", colour(0))]) for key, words in looks.items()),
    ]
    return _present(charts)


def updates(run: Recorded) -> list[Chart]:
    """What the optimizer saw, and the statistics that belong to no denoising step."""
    shown = UPDATE_VALUES | {
        name: (name, "") for name in _statistics(run) if not _step_keys(run.updates, name)
    }
    charts = [
        Chart(title, note, [_over(run.updates, key, key, colour(0))])
        for key, (title, note) in shown.items()
    ]
    return _present(charts)


def speed(run: Recorded) -> list[Chart]:
    """Where the time and the memory went."""
    seconds = {f"seconds/{phase}": phase for phase in PHASES}
    memory = {f"memory/{place}_gib": place for place in ("device", "host")}
    rate = {"images_per_second": ""}
    charts = [
        _of_epochs(run, "Seconds per epoch", "in each phase, on the main process", seconds),
        _of_epochs(run, "Images per second", "evaluation left out", rate),
        _of_epochs(run, "Peak memory, GiB", "so far, of the main process", memory),
    ]
    return _present(charts)


def lines(run: Recorded, others: list[Recorded]) -> list[tuple[Recorded, tuple[str, str]]]:
    """Return each run with its line's colour and dash: controls in grey, so that they recede."""
    found, number = [(run, (colour(0), ""))], 0
    for one in others:
        if one.config["train"].get("shuffle_advantages"):
            found.append((one, ("var(--ink-soft)", DASHES[-1])))
            continue
        again, place = divmod(number, NUM_COLOURS - 1)
        found.append((one, (colour(1 + place), DASHES[again % len(DASHES)])))
        number += 1
    return found


def _evaluated(
    run: Recorded, name: str, tag: str | None, label: str, shade: str, dash: str = ""
) -> Series:
    key = f"{name}/{tag}" if tag else name
    rows = [row for row in run.evals if key in row]
    ends = [interval(row, name, tag) for row in rows]
    low, high = map(list, zip(*ends, strict=True)) if rows and None not in ends else (None, None)
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    return Series(label, x, y, shade, low, high, dash)


def _over(
    rows: list[dict],
    key: str,
    label: str,
    shade: str,
    spread: str = "",
    origin: float = 0.0,
    dash: str = "",
) -> Series:
    """spread: the key of a band's half width. origin: is taken off the line's values."""
    held = [row for row in rows if key in row]
    x = [row["epoch" if row["kind"] == "epoch" else "step"] for row in held]
    y = [row[key] - origin for row in held]
    if not spread:
        return Series(label, x, y, shade, dash=dash)
    low = [row[key] - row[spread] for row in held]
    high = [row[key] + row[spread] for row in held]
    return Series(label, x, y, shade, low, high)


def _of_epochs(run: Recorded, title: str, note: str, keys: dict[str, str]) -> Chart:
    """keys: what the chart shows, each with its label."""
    lines = enumerate(keys.items())
    series = [_over(run.epochs, key, label, colour(i)) for i, (key, label) in lines]
    return Chart(title, note, series, "epoch")


def _statistics(run: Recorded) -> list[str]:
    """The updates' statistics: those that the run describes, in its order, then all others."""
    names = {key: None for row in run.updates for key in row if "/" not in key}
    others = [name for name in names if name not in {"kind", "epoch", "step", *UPDATE_VALUES}]
    described = [name for name in run.statistics if name in others]
    return described + [name for name in others if name not in described]


def _step_keys(rows: list[dict], name: str) -> dict[int, str]:
    """The denoising steps that have a statistic, each with its key: kl/3 of kl, ratio/3_std."""
    keys = {}
    for key in {key for row in rows for key in row}:
        base, _, rest = key.partition("/")
        step, _, suffix = rest.partition("_")
        if step.isdigit() and name == "_".join(filter(None, (base, suffix))):
            keys[int(step)] = key
    return dict(sorted(keys.items()))


def _present(charts: list[Chart]) -> list[Chart]:
    """Leave out series without a value, and charts without a series."""
    kept = [replace(chart, series=[s for s in chart.series if s.x]) for chart in charts]
    return [chart for chart in kept if chart.series]
