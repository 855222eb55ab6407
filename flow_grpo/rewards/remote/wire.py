"""What travels between a run and a reward server; both ends use this file. No pickle, no torch.

A request has as its body one of
  application/x-safetensors  uint8 tensors "image/<row>" and "reference/<row>/<k>", exact
  application/msgpack        {"images": [..], "references": [[..], ..] or nil, "rows": ..}, pictures
                             as PNG, WebP or JPEG files, videos as lists of them
with the same JSON beside the pictures, under "rows" (of the safetensors metadata or of the map):
{"prompts": [str], "metadata": [object], "group": [int] or null}. The answer is JSON,
{"scores": {name: [number or null]}, "errors": [str or null]}; null is NaN.
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

EXACT, PACKED = "application/x-safetensors", "application/msgpack"
ENCODINGS = {  # of config.reward_encoding, as PIL writes them; "raw" is EXACT
    "raw": {},
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
FORMATS = tuple(options["format"] for options in ENCODINGS.values() if options)
MAX_ROWS_BYTES = 2**24  # of the JSON


class Malformed(ValueError):
    """A body that is not what this file says."""


class TooLarge(ValueError):
    """A body that asks for more than the server allows."""


def encode(batch: Batch, encoding: str = "raw") -> tuple[str, bytes]:
    """Return a request's content type and body. encoding: of ENCODINGS."""
    group = None if batch.group is None else [int(number) for number in batch.group]
    rows = {"prompts": batch.prompts, "metadata": batch.metadata, "group": group}
    text = json.dumps(rows, allow_nan=False)
    if encoding == "raw":
        tensors = {f"image/{i}": np.ascontiguousarray(x) for i, x in enumerate(batch.images)}
        for i, pictures in enumerate(batch.references or ()):
            for k, picture in enumerate(pictures):
                tensors[f"reference/{i}/{k}"] = np.ascontiguousarray(picture)
        has = "" if batch.references is None else "yes"
        return EXACT, safetensors.save(tensors, metadata={"rows": text, "references": has})
    import msgpack

    references = batch.references and [
        [_file(picture, encoding) for picture in pictures] for pictures in batch.references
    ]
    images = [_file(image, encoding) for image in batch.images]
    return PACKED, msgpack.packb({"images": images, "references": references, "rows": text})


def decode(kind: str, body: bytes, max_items: int, max_pixels: int) -> Batch:
    """Read a request. kind: its content type. max_pixels: of all its pictures together.

    A picture that cannot be read is an error of its row alone. Raises Malformed or TooLarge.
    """
    unpack = _unpack_exact if kind == EXACT else _unpack_files
    text, tensors, has_references = unpack(body)
    prompts, metadata, group = _rows(text, max_items)
    count, budget = len(prompts), _Budget(max_pixels)
    images, references, errors = [], [], {}
    for i in range(count):
        if f"image/{i}" not in tensors:
            raise Malformed(f"there are {count} prompts and no image/{i}")
        found = [tensors.pop(f"image/{i}")]
        while f"reference/{i}/{len(found) - 1}" in tensors:
            found.append(tensors.pop(f"reference/{i}/{len(found) - 1}"))
        try:
            picture, *others = [_picture(each, budget) for each in found]
        except _Unreadable as error:
            picture, others, errors[i] = None, [], str(error)
        images.append(picture)
        references.append(tuple(others))
    if tensors:
        raise Malformed(f"{next(iter(tensors))[:80]!r} belongs to none of the {count} rows")
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
            scores[key] = np.array([np.nan if v is None else float(v) for v in values], np.float64)
        except OverflowError:
            raise Malformed(f"its score {key[:80]!r} has an infinite number") from None
        if np.isinf(scores[key]).any():
            raise Malformed(f"its score {key[:80]!r} has an infinite number")
        scores[key][[error is not None for error in errors]] = np.nan
    return scores, errors


class _Unreadable(ValueError):
    pass


class _Budget:
    """Pixels that a request may still take."""

    def __init__(self, max_pixels: int):
        self._max, self._left = max_pixels, max_pixels

    def take(self, num_pixels: int) -> None:
        self._left -= num_pixels
        if self._left < 0:
            raise TooLarge(f"the pictures have more than {self._max} pixels together")


def _unpack_exact(body: bytes) -> tuple[str, dict[str, np.ndarray], bool]:
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


def _unpack_files(body: bytes) -> tuple[str, dict[str, Any], bool]:
    import msgpack

    try:
        found = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Malformed(f"the body is no msgpack ({str(error)[:200]})") from None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), str):
        raise Malformed('the map has no "rows"')
    images, references = found.get("images"), found.get("references")
    if not isinstance(images, list) or not isinstance(references, (list, type(None))):
        raise Malformed('"images" is no list, or "references" neither a list nor nil')
    files = {f"image/{i}": image for i, image in enumerate(images)}
    for i, row in enumerate(references or ()):
        if not isinstance(row, list):
            raise Malformed(f'"references" row {i} is no list')
        files |= {f"reference/{i}/{k}": file for k, file in enumerate(row)}
    return found["rows"], files, references is not None


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


def _picture(source: Any, budget: _Budget) -> np.ndarray:
    """Return uint8 (H, W, 3) or (F, H, W, 3) of a tensor, a file or a list of files."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (3, 4) or source.shape[-1] != 3:
            raise _Unreadable(
                f"uint8 (H, W, 3) or (F, H, W, 3) is needed, not {source.dtype} {source.shape}"
            )
        budget.take(source.size // 3)
        if not source.size:
            raise _Unreadable("the picture is empty")
        return source
    if isinstance(source, list) and source:
        frames = [_read(file, budget) for file in source]
        if len({frame.shape for frame in frames}) > 1:
            raise _Unreadable("the frames have several sizes")
        return np.stack(frames)
    return _read(source, budget)


def _read(file: Any, budget: _Budget) -> np.ndarray:
    if not isinstance(file, bytes):
        raise _Unreadable("the picture is no file")
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as opened:
            budget.take(opened.width * opened.height)
            return np.asarray(opened.convert("RGB"))
    except TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(str(error)) from None
    except Exception as error:  # a decoder's own, of many types
        raise _Unreadable(f"the picture cannot be read ({str(error)[:200]})") from None


def _file(image: np.ndarray, encoding: str) -> bytes | list[bytes]:
    if image.ndim == 4:
        return [_file(frame, encoding) for frame in image]
    file = BytesIO()
    Image.fromarray(image).save(file, **ENCODINGS[encoding])
    return file.getvalue()


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
