"""What travels between a run and a reward server; both ends use this file. No pickle, no torch.

A request is a safetensors file of uint8 tensors "image/<row>" and "reference/<row>/<k>": an image
(H, W, 3) or a video (F, H, W, 3) as it is, or one dimension, a JPEG file's bytes; a video's frames
as JPEG files are "<name>/<frame>". Its metadata has JSON under "rows": {"prompts": [str],
"metadata": [object], "group": [int] or null}. The answer is JSON, {"scores": {name: [number or
null]}, "errors": [str or null]}; null is NaN.
"""

from __future__ import annotations

import json
import math
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from flow_grpo.rewards.batch import Batch

CONTENT_TYPE = "application/x-safetensors"
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
MAX_ROWS_BYTES = 2**24  # of the JSON


class Malformed(Exception):
    """A body that is not what this file says."""


class TooLarge(Exception):
    """A body that asks for more than the server allows."""


def encode(batch: Batch, encoding: str = "raw") -> bytes:
    """Return a request's body. encoding: "raw" or "jpeg"."""
    group = None if batch.group is None else [int(number) for number in batch.group]
    rows = {"prompts": batch.prompts, "metadata": batch.metadata, "group": group}
    named = {f"image/{i}": image for i, image in enumerate(batch.images)}
    for i, images in enumerate(batch.references or ()):
        named |= {f"reference/{i}/{k}": image for k, image in enumerate(images)}
    tensors: dict[str, np.ndarray] = {}
    for name, image in named.items():
        if encoding == "raw":
            tensors[name] = np.ascontiguousarray(image)
        elif image.ndim == 3:
            tensors[name] = _jpeg(image)
        else:
            tensors |= {f"{name}/{k}": _jpeg(frame) for k, frame in enumerate(image)}
    has = "" if batch.references is None else "yes"
    text = json.dumps(rows, allow_nan=False)
    return safetensors.save(tensors, metadata={"rows": text, "references": has})


def decode(body: bytes, max_items: int, max_pixels: int) -> Batch:
    """Read a request. max_pixels: of all its images together.

    An image that cannot be read is an error of its row alone. Raises Malformed or TooLarge.
    """
    text, tensors, has_references = _unpack(body)
    prompts, metadata, group = _rows(text, max_items)
    budget = _Budget(max_pixels)
    images, references, errors = [], [], {}
    for i in range(len(prompts)):
        sent = [_take(tensors, f"image/{i}")]
        if sent[0] is None:
            raise Malformed(f"there are {len(prompts)} prompts and no image/{i}")
        while (other := _take(tensors, f"reference/{i}/{len(sent) - 1}")) is not None:
            sent.append(other)
        try:
            image, *others = [_image(each, budget) for each in sent]
        except ValueError as error:
            image, others, errors[i] = None, [], str(error)
        images.append(image)
        references.append(tuple(others))
    if tensors:
        raise Malformed(f"{next(iter(tensors))[:80]!r} belongs to none of the {len(prompts)} rows")
    return Batch(
        images, prompts, metadata, references if has_references else None, group, errors or None
    )


def encode_answer(scores: dict[str, np.ndarray], errors: list[str | None]) -> dict:
    """Return the answer as JSON has it. scores: name -> (B,), NaN for "could not be scored"."""
    columns = {
        name: [None if math.isnan(value) else value for value in np.asarray(values).tolist()]
        for name, values in scores.items()
    }
    return {"scores": columns, "errors": errors}


def decode_answer(
    body: bytes, name: str, num_rows: int
) -> tuple[dict[str, np.ndarray], list[str | None]]:
    """Return {score: (B,) float64} and each row's error. Raises Malformed: nothing is guessed."""
    answer = _json(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), dict):
        raise Malformed('the answer is no {"scores": ..., "errors": ...}')
    errors = answer.get("errors")
    if not _is_list_of(errors, num_rows, (str, type(None))):
        raise Malformed(f'"errors" is no list of {num_rows} strings or nulls')
    if name not in answer["scores"]:
        raise Malformed(f"it has scores {sorted(answer['scores'])[:8]} and none named {name!r}")
    scores = {}
    for key, values in answer["scores"].items():
        if not _is_list_of(values, num_rows, (int, float, type(None))):
            raise Malformed(f"its score {key[:80]!r} is no list of {num_rows} numbers or nulls")
        try:
            scores[key] = np.array(values, np.float64)  # null is NaN
            finite = not np.isinf(scores[key]).any()
        except OverflowError:  # of a long integer
            finite = False
        if not finite:
            raise Malformed(f"its score {key[:80]!r} has an infinite number")
        scores[key][[error is not None for error in errors]] = np.nan
    return scores, errors


class _Budget:
    def __init__(self, max_pixels: int):
        self._max, self._left = max_pixels, max_pixels

    def take(self, num_pixels: int) -> None:
        self._left -= num_pixels
        if self._left < 0:
            raise TooLarge(f"the images have more than {self._max} pixels together")


def cut(batch: Batch, num_rows: int) -> list[list[int]]:
    """List rows in parts of at most num_rows, unless rows to be scored together are more."""
    parts: list[list[int]] = [[]]
    for unit in batch.units():
        if parts[-1] and len(parts[-1]) + len(unit) > num_rows:
            parts.append([])
        parts[-1] += unit
    return parts


def _unpack(body: bytes) -> tuple[str, dict[str, np.ndarray], bool]:
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise Malformed("the body is no safetensors file")
    if size > 2 * MAX_ROWS_BYTES:
        raise TooLarge(f"the header has {size} bytes, at most {2 * MAX_ROWS_BYTES} are allowed")
    header = _json(body[8 : 8 + size])
    kept = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(kept, dict) or not isinstance(kept.get("rows"), str):
        raise Malformed('the safetensors metadata has no "rows"')
    try:
        tensors = safetensors.load(body)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Malformed(f"the body is no safetensors file ({str(error)[:200]})") from None
    return kept["rows"], tensors, bool(kept.get("references"))


def _rows(text: str, max_items: int) -> tuple[list[str], list[dict], np.ndarray | None]:
    if len(text) > MAX_ROWS_BYTES:
        raise TooLarge(f'"rows" has {len(text)} bytes, at most {MAX_ROWS_BYTES} are allowed')
    rows = _json(text)
    if not isinstance(rows, dict) or not isinstance(rows.get("prompts"), list):
        raise Malformed('"rows" is no {"prompts": [..], "metadata": [..], "group": ..}')
    count = len(rows["prompts"])
    if count > max_items:
        raise TooLarge(f"there are {count} rows, at most {max_items} are allowed")
    if count == 0 or not _is_list_of(rows["prompts"], count, str):
        raise Malformed('"prompts" is no list of one string or more')
    if not _is_list_of(rows.get("metadata"), count, dict):
        raise Malformed(f'"metadata" is no list of {count} objects')
    group = rows.get("group")
    if group is not None:
        if not _is_list_of(group, count, int) or any(abs(number) >= 2**63 for number in group):
            raise Malformed(f'"group" is neither null nor a list of {count} 64-bit integers')
        group = np.array(group, np.int64)
    return rows["prompts"], rows["metadata"], group


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray | list[np.ndarray] | None:
    """Take out an image's tensor, or the list of those of a video's frames."""
    if name in tensors:
        return tensors.pop(name)
    frames: list[np.ndarray] = []
    while f"{name}/{len(frames)}" in tensors:
        frames.append(tensors.pop(f"{name}/{len(frames)}"))
    return frames or None


def _image(sent: np.ndarray | list[np.ndarray], budget: _Budget) -> np.ndarray:
    """Return uint8 (H, W, 3), or (F, H, W, 3) of a video."""
    if isinstance(sent, list):
        frames = [_image(frame, budget) for frame in sent]
        if any(frame.shape != frames[0].shape or frame.ndim != 3 for frame in frames):
            raise ValueError("the frames have several sizes")
        return np.stack(frames)
    if sent.dtype == np.uint8 and sent.ndim == 1:
        return _decoded(sent.tobytes(), budget)
    if sent.dtype != np.uint8 or sent.ndim not in (3, 4) or sent.shape[-1] != 3:
        raise ValueError(
            f"uint8 (H, W, 3) or (F, H, W, 3) is needed, not {sent.dtype} {sent.shape}"
        )
    budget.take(sent.size // 3)
    if not sent.size:
        raise ValueError("the image is empty")
    return sent


def _decoded(file: bytes, budget: _Budget) -> np.ndarray:
    try:
        with Image.open(BytesIO(file), formats=(JPEG["format"],)) as opened:
            budget.take(opened.width * opened.height)  # before it is unpacked
            return np.asarray(opened.convert("RGB"))
    except TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(str(error)) from None
    except Exception as error:  # a decoder's own, of many types
        raise ValueError(f"the image cannot be read ({str(error)[:200]})") from None


def _jpeg(image: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image).save(file, **JPEG)
    return np.frombuffer(file.getvalue(), np.uint8)


def _json(text: str | bytes) -> Any:
    """Parse strictly: JSON has no NaN, and nesting that exhausts the stack is malformed."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON ({str(error)[:200]})") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _is_list_of(value: Any, count: int, kinds: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, kinds) and not isinstance(each, bool) for each in value)
    )
