"""OCR engines behind one call: uint8 (H, W, 3) RGB -> the lines that were found.

Their scores are not interchangeable: config.ocr_engine names one, whatever else is installed.
"""

from __future__ import annotations

import re
import unicodedata
import zlib  # noqa: F401  before paddleocr 2.x, whose pyclipper brings another one
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from flow_grpo.rewards.rules import quoted

RAPID_SIDE = 2000  # to which RapidOCR shrinks before it looks at Det.limit_side_len
LEAST = 24  # pixels of a shrunk side; it rounds sides to 32s, 16 to 0


class Line(NamedTuple):
    text: str
    corners: np.ndarray  # (4, 2) x, y in pixels, y downwards


Engine = Callable[[np.ndarray], list[Line]]


def in_reading_order(lines: Iterable[Line]) -> list[str]:
    """Return the texts row by row, top to bottom, each from left to right.

    A line is in the row above if its middle is less than half that row's height below its middle.
    Engines' own order mixes up words of one row.
    """
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.corners[:, 1].mean()):
        middle = line.corners[:, 1].mean()
        if rows:
            first = rows[-1][0].corners[:, 1]
            if middle - first.mean() < np.ptp(first) / 2:
                rows[-1].append(line)
                continue
        rows.append([line])
    return [line.text for row in rows for line in sorted(row, key=lambda x: x.corners[:, 0].min())]


def rapid(side: int) -> Engine:
    """Start RapidOCR (PP-OCR models on ONNX, which come in its wheel) on one thread.

    side: pixels to which an image's longer side is shrunk.
    """
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Det.limit_side_len": side,
            "Det.limit_type": "max",
            "Global.use_cls": False,  # text upside down is not looked for
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
    )

    def read(image: np.ndarray) -> list[Line]:
        found = engine(np.ascontiguousarray(_less_thin(image, side)[..., ::-1]))  # BGR
        if found.txts is None:
            return []
        return [Line(*pair) for pair in zip(found.txts, found.boxes, strict=True)]

    return read


def _less_thin(image: np.ndarray, side: int) -> np.ndarray:
    """Repeat the edge of an image that RapidOCR would shrink to nothing, and then raise."""
    longer = max(image.shape[:2])
    least = min(longer, -(-LEAST * longer // min(side, RAPID_SIDE)))
    more = [(0, max(0, least - pixels)) for pixels in image.shape[:2]]
    return np.pad(image, (*more, (0, 0)), mode="edge") if any(map(any, more)) else image


def paddle(side: int) -> Engine:
    """Start PaddleOCR, 2.x or 3.x, English, on the CPU. It downloads its models at first use."""
    from paddleocr import PaddleOCR

    if int(version("paddleocr").split(".")[0]) < 3:
        old = PaddleOCR(lang="en", use_angle_cls=False, use_gpu=False, show_log=False)
        return lambda image: paddle2_lines(old.ocr(image[..., ::-1], cls=False))
    new = PaddleOCR(
        lang="en",
        device="cpu",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda image: paddle3_lines(new.predict(np.ascontiguousarray(image[..., ::-1])))


def paddle2_lines(result: list) -> list[Line]:
    """Read what PaddleOCR 2.x returns for one image: [[[corners, (text, score)], ...]]."""
    return [Line(text, np.array(corners)) for corners, (text, _) in result[0] or []]


def paddle3_lines(result: list[Mapping[str, Any]]) -> list[Line]:
    """Read what PaddleOCR 3.x returns for one image: [{"rec_texts": ..., "rec_polys": ...}]."""
    texts, polygons = result[0]["rec_texts"], result[0]["rec_polys"]
    return [Line(text, np.array(poly)) for text, poly in zip(texts, polygons, strict=True)]


def unreadable(engine: str, texts: Iterable[str]) -> dict[str, list[str]]:
    """Return the texts that have letters of a script which an engine does not know, by script."""
    found: dict[str, list[str]] = {}
    for text in texts:
        letters = (c for c in quoted.plain(text) if unicodedata.category(c)[0] == "L")
        scripts = {re.split("[ -]", unicodedata.name(c, "UNNAMED"))[0] for c in letters}
        for script in sorted(scripts - SCRIPTS[engine]):
            found.setdefault(script, []).append(text)
    return found


ENGINES = {"rapidocr": rapid, "paddleocr": paddle}
SCRIPTS = {  # by the first word of their letters' names; as each model's list of characters says
    "rapidocr": {"LATIN", "GREEK", "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA"},
    "paddleocr": {"LATIN"},
}
