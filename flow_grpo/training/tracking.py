"""What a run reports: metrics, images, phase times, statistics per step index."""

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_collections
import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker, WandBTracker
from torch import Tensor

from flow_grpo.cli import redacted
from flow_grpo.parallel.engine import Ranks
from flow_grpo.report.sheets import contact_sheet

GIF_FRAMES_PER_SECOND = 16  # as Wan's videos are meant to be played
MAX_GIF_SIDE = 1600  # pixels of a whole sheet


class Tracker:
    """Writes a run's metrics, on the main process only; every method may be called on all ranks."""

    def __init__(self, ranks: Ranks, folder: Path):
        self._main = ranks.is_main
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._remote = None

    def start(self, config: ml_collections.ConfigDict) -> None:
        if not self._main:
            return
        folder = self._folder
        (folder / "images").mkdir(parents=True, exist_ok=True)
        known = redacted(json.loads(config.to_json_best_effort()))
        (folder / "config.json").write_text(json.dumps(known, indent=2) + "\n")
        if config.tracker == "tensorboard":
            self._remote = TensorBoardTracker("tensorboard", folder)
        elif config.tracker == "wandb":
            login = os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
            mode = os.environ.get("WANDB_MODE") or ("online" if login else "offline")
            self._remote = WandBTracker(
                config.project_name,
                name=folder.name,
                dir=folder,
                mode=mode,
                config=redacted(config.to_dict()),
            )
        if self._remote:
            self._remote.start()

    @property
    def num_bytes(self) -> int:
        """How long metrics.jsonl is; a checkpoint remembers it."""
        return self._path.stat().st_size if self._path.exists() else 0

    def cut(self, num_bytes: int) -> None:
        """Forget the rows that were written after a checkpoint."""
        if self._main and self.num_bytes > num_bytes:
            os.truncate(self._path, num_bytes)

    def log(self, kind: str, epoch: int, num_updates: int, values: dict[str, float]) -> None:
        """Append a row. kind: update | epoch | eval | look."""
        if not self._main:
            return
        row = {"kind": kind, "epoch": epoch, "step": num_updates}
        assert not row.keys() & values.keys(), values
        row |= values
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._remote:
            named = {f"{kind}/{key}": value for key, value in values.items()}
            self._remote.log(named | {"epoch": epoch}, step=num_updates)

    def write(self, name: str, values: dict) -> None:
        if self._main:
            (self._folder / name).write_text(json.dumps(values, indent=2) + "\n")

    def save_images(self, name: str, images: list[np.ndarray], num_columns: int) -> None:
        """Save a sheet of images as images/<name>.png; of videos their middle, and a .gif."""
        if not (self._main and images):
            return
        videos = [image if image.ndim == 4 else image[None] for image in images]
        sheets = [
            contact_sheet([video[min(frame, len(video) - 1)] for video in videos], num_columns)
            for frame in range(max(map(len, videos)))
        ]
        path = self._folder / "images" / name
        sheets[len(sheets) // 2].save(f"{path}.png")
        if len(sheets) > 1:
            for sheet in sheets:
                sheet.thumbnail((MAX_GIF_SIDE, MAX_GIF_SIDE))
            sheets[0].save(
                f"{path}.gif",
                save_all=True,
                append_images=sheets[1:],
                duration=1000 // GIF_FRAMES_PER_SECOND,
                loop=0,
            )

    def close(self) -> None:
        if self._remote:
            self._remote.finish()


class Timer:
    """Seconds spent in each phase since the last report; clock: seconds since any moment.

    told: called with each phase that begins, and with "other work" or the outer one where it ends.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        told: Callable[[str], None] = lambda phase: None,
    ):
        self._clock, self._told = clock, told
        self._seconds: Counter[str] = Counter()
        self._phase = "other work"

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, outer, self._phase = self._clock(), self._phase, phase
        self._told(phase)
        try:
            yield
        finally:
            self._seconds[phase] += self._clock() - start
            self._phase = outer
            self._told(outer)

    def report(self) -> dict[str, float]:
        """Return {"seconds/<phase>": s} and start again."""
        seconds = {f"seconds/{phase}": value for phase, value in self._seconds.items()}
        self._seconds.clear()
        return seconds


def memory() -> dict[str, float]:
    """Return the peak memory so far, in GiB, of this process and its device."""
    peak = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peak["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


class Statistics:
    """Weighted mean and std of the rows' statistics, in all and per step index, on the device."""

    def __init__(self, num_steps: int, device: torch.device):
        self._num_steps, self._device = num_steps, device
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], steps: Tensor, weights: Tensor) -> None:
        """stats: name -> (B,). steps: (B,) int64 below num_steps. weights: (B,)."""
        weights = weights.double()
        for name, values in stats.items():
            sums = self._sums.setdefault(
                name, torch.zeros(self._num_steps, 3, dtype=torch.float64, device=self._device)
            )
            values = values.double()
            parts = [weights, weights * values, weights * values**2]
            sums.index_add_(0, steps, torch.stack(parts, dim=1))

    def sums(self) -> Tensor:
        """Return all that was added in one fp64 row, for ranks to add up."""
        none = torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.cat([none, *(sums.flatten() for sums in self._sums.values())])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return {"ratio": mean, "ratio_std": std, "ratio/3": at step 3, ...} of sums()."""
        metrics: dict[str, float] = {}
        shape = (len(self._sums), self._num_steps, 3)
        for name, rows in zip(self._sums, np.reshape(sums, shape), strict=True):
            of_steps = {f"{name}/{index}": row for index, row in enumerate(rows) if row[0] > 0}
            for key, (weight, total, squares) in ({name: rows.sum(0)} | of_steps).items():
                weight = max(weight, 1e-300)
                metrics[key] = float(mean := total / weight)
                if name == "ratio":
                    metrics[f"{key}_std"] = float(np.sqrt(max(squares / weight - mean**2, 0.0)))
        return metrics
