"""How well an image writes the text that its prompt quotes, as read by an OCR engine.

Flow-GRPO's text-rendering reward (arXiv:2505.05470), with the text cut from the prompt with care.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

import numpy as np

from flow_grpo.rewards.base import Reward, check_package, only_images
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules import ocr_engines
from flow_grpo.rewards.rules.quoted import plain, target

FRAME_STRIDE = 4  # of a video every fourth frame is read


def likeness(wanted: str, read: str) -> float:
    """Return 1 - Levenshtein distance / length of `wanted`, at least 0."""
    from rapidfuzz.distance import Levenshtein

    wanted, read = plain(wanted), plain(read)
    return 1 - min(Levenshtein.distance(wanted, read), len(wanted)) / len(wanted)


def score(wanted: str, read: str) -> float:
    """Return 1 if `read` contains `wanted`, otherwise their likeness."""
    return 1.0 if plain(wanted) in plain(read) else likeness(wanted, read)


def video_score(wanted: str, reads: list[str]) -> float:
    """Return the mean likeness of the frames that have any, 0 if none has."""
    scores = [likeness(wanted, read) for read in reads]
    return float(np.mean([s for s in scores if s > 0])) if any(scores) else 0.0


class OCR(Reward):
    """Score how well the quoted text is written, 0 to 1; 1 if it is read as it stands."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_package("rapidfuzz", "ocr")
        engine = settings["ocr_engine"]
        for package in {"rapidocr": ("rapidocr", "onnxruntime")}.get(engine, (engine,)):
            check_package(package, "ocr" if engine == "rapidocr" else engine)
        wanted = []
        for row, prompt in enumerate(prompts, start=1):
            try:
                wanted.append(target(prompt))
            except ValueError as error:
                raise ValueError(f"{error} It is row {row} of {len(prompts)}.") from None
        for script, texts in ocr_engines.unreadable(engine, wanted).items():
            logging.getLogger(__name__).warning(
                "%d of %d prompts want text that %s can't read (%s), such as %r: no image of it "
                "scores 1", len(texts), len(wanted), engine, script.lower(), texts[0],
            )  # fmt: skip

    def __init__(self, settings, device):
        self._pool = ProcessPoolExecutor(
            settings["ocr_processes"],
            multiprocessing.get_context("spawn"),  # a fork would copy the threads of torch
            initializer=_start,
            initargs=(settings["ocr_engine"], settings["ocr_side"]),
        )

    def __call__(self, batch: Batch) -> dict:
        wanted = [target(prompt) for prompt in batch.prompts]
        reads = self._pool.map(_read, only_images(batch.images, "ocr"))
        return {"ocr": np.array([score(w, r) for w, r in zip(wanted, reads, strict=True)])}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class VideoOCR(OCR):
    """Score how well frames write the quoted text; 0 to 1, the mean of those that write any."""

    def __call__(self, batch: Batch) -> dict:
        videos = [image[None] if image.ndim == 3 else image for image in batch.images]
        frames = [video[::FRAME_STRIDE] for video in videos]
        reads = self._pool.map(_read, [frame for video in frames for frame in video])
        scores = [
            video_score(target(prompt), [next(reads) for _ in video])
            for prompt, video in zip(batch.prompts, frames, strict=True)
        ]
        return {"video_ocr": np.array(scores)}


_engine: ocr_engines.Engine  # of a worker process


def _start(engine: str, side: int) -> None:
    global _engine
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _engine = ocr_engines.ENGINES[engine](side)


def _leave_with_parent() -> None:
    """End this process when its parent is gone, killed as it may be."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _read(image: np.ndarray) -> str:
    return " ".join(ocr_engines.in_reading_order(_engine(image)))
