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
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from safetensors import numpy as safetensors

from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote.bounded import VALUE_BYTES, Malformed, TooLarge, loads

CONTENT_TYPE = "application/x-safetensors"
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
MAX_ROWS_BYTES = 2**24  # of the JSON
MAX_VALUES = 2**18  # of the rows' JSON, and of that of the tensors, as bounded.py counts
MAX_FILE_PIXELS = 2**25  # of one compressed image: twice 4096 x 4096
MAX_COLUMNS = 64  # scores of an answer
MAX_ERROR = 500  # characters
ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1} | dict.fromkeys(
    ("I16", "U16", "F16", "BF16"), 2
) | dict.fromkeys(("I32", "U32", "F32"), 4) | dict.fromkeys(("I64", "U64", "F64"), 8)  # fmt: skip
Tensor = np.ndarray | str  # uint8, or what it is instead
Hold = Callable[[int], None]  # called with bytes before memory is taken for them; may raise


class _Bomb(ValueError):
    """A small file of more pixels than are unpacked."""


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


def decode(
    body: bytes | bytearray,
    max_items: int,
    max_pixels: int,
    max_values: int = MAX_VALUES,
    hold: Hold = lambda num_bytes: None,
) -> Batch:
    """Read a request. max_pixels: of all its images together. What is raw shares body's memory.

    An image that cannot be read is an error of its row alone. Raises Malformed or TooLarge.
    """
    text, tensors, has_references = _unpack(body, max_values, hold)
    prompts, metadata, group = _rows(text, max_items, max_values, hold)
    budget = _Budget(max_pixels, hold)
    images, references, errors, bombs = [], [], {}, 0
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
            bombs += isinstance(error, _Bomb)
        images.append(image)
        references.append(tuple(others))
    if tensors:
        raise Malformed(f"{next(iter(tensors))[:80]!r} belongs to none of the {len(prompts)} rows")
    if bombs and len(errors) == len(prompts):
        raise TooLarge(errors[0])
    return Batch(
        images, prompts, metadata, references if has_references else None, group, errors or None
    )


def encode_answer(scores: dict[str, np.ndarray], errors: list[str | None]) -> dict:
    """Return the answer as JSON has it. scores: name -> (B,), NaN for "could not be scored"."""
    if len(scores) > MAX_COLUMNS:
        raise RuntimeError(f"the reward returned {len(scores)} columns, more than {MAX_COLUMNS}")
    columns = {
        name: [None if math.isnan(value) else value for value in np.asarray(values).tolist()]
        for name, values in scores.items()
    }
    return {"scores": columns, "errors": [error and error[:MAX_ERROR] for error in errors]}


def max_answer_bytes(num_rows: int) -> int:
    """Return how long the answer for so many rows may be, or any refusal."""
    return 2**16 + num_rows * (MAX_COLUMNS * 32 + MAX_ERROR * 12)


def decode_answer(
    body: bytes, name: str, num_rows: int
) -> tuple[dict[str, np.ndarray], list[str | None]]:
    """Return {score: (B,) float64} and each row's error. Raises Malformed: nothing is guessed."""
    try:
        answer, _ = loads(body, 64 + (num_rows + 2) * (MAX_COLUMNS + 1), max_depth=8)
    except TooLarge as error:
        raise Malformed(str(error)) from None
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), dict):
        raise Malformed('the answer is no {"scores": ..., "errors": ...}')
    if len(answer["scores"]) > MAX_COLUMNS:
        raise Malformed(f"it has {len(answer['scores'])} scores, more than {MAX_COLUMNS}")
    errors = answer.get("errors")
    if not _is_list_of(errors, num_rows, (str, type(None))):
        raise Malformed(f'"errors" is no list of {num_rows} strings or nulls')
    if name not in answer["scores"]:
        raise Malformed(f"it has scores {str(sorted(answer['scores'])[:8])[:300]}, none {name!r}")
    scores = {}
    for key, values in answer["scores"].items():
        if not _is_list_of(values, num_rows, (int, float, type(None))):
            raise Malformed(f"its score {key[:80]!r} is no list of {num_rows} numbers or nulls")
        try:
            scores[key] = np.array(values, np.float64)  # null is NaN
        except OverflowError:  # of a long integer
            raise Malformed(f"its score {key[:80]!r} has an infinite number") from None
        scores[key][[error is not None for error in errors]] = np.nan
    return scores, errors


class _Budget:
    def __init__(self, max_pixels: int, hold: Hold):
        self.max, self._left, self._hold = max_pixels, max_pixels, hold

    def take(self, num_pixels: int, num_bytes: int = 0) -> None:
        self._left -= num_pixels
        if self._left < 0:
            raise TooLarge(f"the images have more than {self.max} pixels together")
        self._hold(num_bytes)


def cut(batch: Batch, num_rows: int) -> list[list[int]]:
    """List rows in parts of at most num_rows, unless rows to be scored together are more."""
    parts: list[list[int]] = [[]]
    for unit in batch.units():
        if parts[-1] and len(parts[-1]) + len(unit) > num_rows:
            parts.append([])
        parts[-1] += unit
    return parts


def _unpack(
    body: bytes | bytearray, max_values: int, hold: Hold
) -> tuple[str, dict[str, Tensor], bool]:
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise Malformed("the body is no safetensors file")
    if size > 2 * MAX_ROWS_BYTES:
        raise TooLarge(f"the header has {size} bytes, at most {2 * MAX_ROWS_BYTES} are allowed")
    hold(12 * size)  # its text, that of the rows, and their strings
    header, num_values = loads(body[8 : 8 + size], max_values)
    hold(VALUE_BYTES * num_values)
    kept = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(kept, dict) or not isinstance(kept.get("rows"), str):
        raise Malformed('the safetensors metadata has no "rows"')
    data = np.frombuffer(body, np.uint8)[8 + size :]
    return kept["rows"], dict(_tensors(header, data)), bool(kept.get("references"))


def _tensors(header: dict[str, Any], data: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Yield safetensors' tensors, which must lie one behind another from end to end."""
    last = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        kind, shape, (begin, end) = entry.get("dtype"), entry.get("shape"), _offsets(name, entry)
        whole = isinstance(shape, list) and len(shape) <= 8 and _is_list_of(shape, len(shape), int)
        if not whole or kind not in ITEM_BYTES or min(shape, default=0) < 0:
            raise Malformed(f"the tensor {name[:80]!r} has no type and shape that we know")
        if begin != last or end > len(data) or end - begin != math.prod(shape) * ITEM_BYTES[kind]:
            raise Malformed(f"the bytes of the tensor {name[:80]!r} are not where its shape says")
        last = end
        if kind != "U8" or end == begin:
            yield name, f"{kind} {tuple(shape)}"[:80]
        else:
            yield name, data[begin:end].reshape(shape)
    if last != len(data):
        raise Malformed(f"the tensors have {last} bytes and the body {len(data)}")


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _is_list_of(offsets, 2, int):
        raise Malformed(f"{name[:80]!r} is no tensor of a safetensors file")
    return offsets[0], offsets[1]


def _rows(
    text: str, max_items: int, max_values: int, hold: Hold
) -> tuple[list[str], list[dict], np.ndarray | None]:
    if len(text) > MAX_ROWS_BYTES:
        raise TooLarge(f'"rows" has {len(text)} bytes, at most {MAX_ROWS_BYTES} are allowed')
    rows, num_values = loads(text, max_values)
    hold(VALUE_BYTES * num_values)
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


def _take(tensors: dict[str, Tensor], name: str) -> Tensor | list[Tensor] | None:
    """Take out an image's tensor, or the list of those of a video's frames."""
    if name in tensors:
        return tensors.pop(name)
    frames: list[Tensor] = []
    while f"{name}/{len(frames)}" in tensors:
        frames.append(tensors.pop(f"{name}/{len(frames)}"))
    return frames or None


def _image(sent: Tensor | list[Tensor], budget: _Budget) -> np.ndarray:
    """Return uint8 (H, W, 3), or (F, H, W, 3) of a video."""
    if isinstance(sent, list):
        frames = [_image(frame, budget) for frame in sent]
        if any(frame.shape != frames[0].shape or frame.ndim != 3 for frame in frames):
            raise ValueError("the frames have several sizes")
        budget.take(0, sum(frame.nbytes for frame in frames))
        return np.stack(frames)
    if not isinstance(sent, str) and sent.ndim == 1:
        return _decoded(sent.tobytes(), budget)
    if isinstance(sent, str) or sent.ndim not in (3, 4) or sent.shape[-1] != 3:
        other = sent if isinstance(sent, str) else sent.shape
        raise ValueError(f"uint8 (H, W, 3) or (F, H, W, 3), not empty, is needed, not {other}")
    budget.take(sent.size // 3)
    return sent


def _decoded(file: bytes, budget: _Budget) -> np.ndarray:
    opened = _read(lambda: Image.open(BytesIO(file), formats=(JPEG["format"],)))
    num_pixels, most = opened.width * opened.height, min(budget.max, MAX_FILE_PIXELS)
    if num_pixels > most:
        raise _Bomb(f"the image has {num_pixels} pixels, at most {most} pixels are unpacked")
    budget.take(num_pixels, 3 * num_pixels)  # before it is unpacked
    return _read(lambda: np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB")))


def _read(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Image.DecompressionBombError as error:
        raise _Bomb(str(error)) from None
    except Exception as error:  # a decoder's own, of many types
        raise ValueError(f"the image cannot be read ({str(error)[:200]})") from None


def _jpeg(image: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image).save(file, **JPEG)
    return np.frombuffer(file.getvalue(), np.uint8)


def _is_list_of(value: Any, count: int, kinds: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, kinds) and not isinstance(each, bool) for each in value)
    )
