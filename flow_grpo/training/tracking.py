"""What a run reports: metrics, pictures, phase times, statistics per step index."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_collections
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class Tracker:
    """Writes a run's metrics, on the main process only; every method may be called on all ranks."""

    def __init__(self, accelerator: Accelerator, folder: Path):
        self._main = accelerator.is_main_process
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._remote = None

    def start(self, config: ml_collections.ConfigDict) -> None:
        """Make the run's folder and open the tracker."""
        if not self._main:
            return
        folder = self._folder
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
        if config.tracker == "tensorboard":
            self._remote = TensorBoardTracker("tensorboard", folder)
        elif config.tracker == "wandb":
            offline = not (
                os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
            )
            mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
            self._remote = WandBTracker(
                config.project_name,
                name=folder.name,
                dir=folder,
                mode=mode,
                config=config.to_dict(),
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
        """Append a row. kind: update | epoch | eval."""
        if not self._main:
            return
        row = {"kind": kind, "epoch": epoch, "step": num_updates} | values
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._remote:
            named = {f"{kind}/{key}": value for key, value in values.items()}
            self._remote.log(named | {"epoch": epoch}, step=num_updates)

    def write(self, name: str, values: dict) -> None:
        """Write a JSON file into the run's folder."""
        if self._main:
            (self._folder / name).write_text(json.dumps(values, indent=2) + "\n")

    def save_images(self, name: str, images: list[np.ndarray], num_columns: int) -> None:
        """Save a sheet of pictures as images/<name>.png; of a video the first frame."""
        if self._main and images:
            frames = [image if image.ndim == 3 else image[0] for image in images]
            contact_sheet(frames, num_columns).save(self._folder / "images" / f"{name}.png")

    def close(self) -> None:
        if self._remote:
            self._remote.finish()


def contact_sheet(images: list[np.ndarray], num_columns: int) -> Image.Image:
    """Lay uint8 (H, W, 3) pictures of one size out in rows; small ones are magnified."""
    height, width, _ = images[0].shape
    num_rows, gap = -(-len(images) // num_columns), 2
    sheet = np.full(
        (num_rows * (height + gap) + gap, num_columns * (width + gap) + gap, 3), 128, np.uint8
    )
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    scale = max(1, 96 // width)
    return Image.fromarray(sheet).resize(
        (sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST
    )


def progress(accelerator: Accelerator, total: int, desc: str, initial: int = 0) -> tqdm:
    """Return a progress bar that only the main process shows, and only on a terminal."""
    disable = None if accelerator.is_main_process else True
    return tqdm(total=total, desc=desc, initial=initial, leave=False, disable=disable)


class Timer:
    """Seconds spent in each phase since the last report."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def report(self) -> dict[str, float]:
        """Return {"seconds/<phase>": s} and start again."""
        seconds = {f"seconds/{phase}": value for phase, value in self._seconds.items()}
        self._seconds = {}
        return seconds


def memory() -> dict[str, float]:
    """Return the peak memory so far, in GiB, of this process and its device."""
    peak = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peak["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


class Statistics:
    """Weighted mean and std of the rows' statistics, in all and per step index, on the device."""

    def __init__(self, num_bins: int, device: torch.device):
        self._num_bins, self._device = num_bins, device
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], bins: Tensor, weights: Tensor) -> None:
        """stats: name -> (B,). bins: (B,) int64 below num_bins. weights: (B,)."""
        weights = weights.double()
        for name, values in stats.items():
            sums = self._sums.setdefault(
                name, torch.zeros(self._num_bins, 3, dtype=torch.float64, device=self._device)
            )
            values = values.double()
            parts = [weights, weights * values, weights * values**2]
            sums.index_add_(0, bins, torch.stack(parts, dim=1))

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Return {"ratio": mean, "ratio_std": std, "ratio/3": at step 3, ...} over all ranks."""
        metrics: dict[str, float] = {}
        for name, sums in self._sums.items():
            sums = accelerator.reduce(sums, "sum").cpu().numpy()
            metrics |= _moments(name, sums.sum(0))
            for index, row in enumerate(sums):
                if row[0] > 0:
                    metrics |= _moments(f"{name}/{index}", row)
        self._sums = {}
        return metrics


def _moments(name: str, sums: np.ndarray) -> dict[str, float]:
    weight = max(sums[0], 1e-300)
    mean = sums[1] / weight
    metrics = {name: float(mean)}
    if name.split("/")[0] == "ratio":
        metrics[f"{name}_std"] = float(np.sqrt(max(sums[2] / weight - mean**2, 0.0)))
    return metrics
