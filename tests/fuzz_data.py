"""Damaged and odd data sets: read as an independent reader does, or refused by file and row.

    python tests/fuzz_data.py --count 1000 --seed 0

Prints what came of them; exit status 1 if anything else did.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import unicodedata
import warnings
from pathlib import Path

import fuzz_pictures
import fuzzing
import numpy as np
from fuzzing import EQUAL, REFUSED, flipped, other_than_a_file

from flow_grpo import prompts
from flow_grpo.rewards import pictures
from flow_grpo.rewards.remote.servers import read_token
from flow_grpo.rewards.rules.quoted import target

WORDS = ("a cat", "zwei Vögel", "猫", "it's", 'a 12" pipe', "a\u2028b", "a\x0cb", "a\u200bb", "\\n")
WORDS += ("e\u0301", "\U0001f600", "<b>x</b>", "a, b", "a" * 70_000, "=1+1", "\u202eabc", "\x85c")
UNSEEN = ("", " ", "\t", "\ufeff", "\u200b", "\u2060", "\u3000", "\x0b", "\x1c", "\u200e", "\x07")
ENDS = ("\n", "\r\n", "\r")
ODD = ("a\0b", "\0", "\ud800", "x\udfff")
DEEP = ("[" * 70 + "]" * 70, "[" * 60 + "]" * 60, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000)
RAW = ("NaN", "-Infinity", "1e999", "-1e999", "1" * 5000, "1" * 4000, "[NaN]", "0x1", "01", ".5")
RAW += ("'a'", "1,", "nul", '"\\ud800"', '"\\ud83d\\ude00"', '{"a": 1, "a": 2}', "1e-400", "-0")
TAGS = (None, "", " ", "\u200b", "a", "all", "mean_of_tags", "x\ny", "x\u2028", 3, 2.5, True, [])
TAGS += ({}, ["a", "b"], {"a": "\n"}, 10**30, "all ", "a" * 5000, "\ufeffall", "é")
IMAGES = (None, [], {}, "", ".", "..", "/", "\0", "a" * 300, 3, [3], [[]], [None], "no.png")
# What closes each mark that opens; none of these may stand in what is quoted.
QUOTES = [
    *zip('"“„«»「『', '"”“»«」』', strict=True),
    ("“", '"'),
    ("＂", "＂"),
    ("”", "”"),
    ("„", "”"),
]
BEFORE = ("a sign ", "a 12\" pipe, 5' long, with ", "it's ", "", "the ’90s: ", "(")
AFTER = ("", ".", ' on a 3" wall', ", don't ask", ') and "MORE"', "’s end", " 5' ")
SAID = ("OPEN", "don't", "5 km", "Grüße", "A–B", "…", "ROUTE 66", "x", "'quoted'", "50%")


def strict(text: str) -> object:
    """Parse JSON as RFC 8259 and RFC 7493 have it: no NaN, no infinity, no key twice."""

    def once(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(word: str) -> None:
        raise ValueError(word)

    found = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # 1e999; half a surrogate pair
    return found


def depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inside), default=0) if isinstance(value, (dict, list)) else 0


def seen(text: str) -> bool:
    return any(not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc") for c in text)


def plain_lines(data: bytes) -> list[str] | None:
    """Return a text file's lines as docs/evaluate.md says; None if it must be refused."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError:
        return None
    edges = re.compile(r"^[\s\ufeff\u200b\0\x1c-\x1f]+|[\s\ufeff\u200b\0\x1c-\x1f]+$")
    found = [edges.sub("", line) for line in re.split("\r\n|\r|\n", text) if seen(line)]
    return None if any("\0" in line for line in found) else found


def plain_rows(data: bytes, key: str) -> list[dict] | None:
    """Return a .jsonl file's objects; None if one must be refused for what it says in itself."""
    found = plain_lines(data)
    try:
        rows = [strict(line) for line in found or []]
    except (ValueError, RecursionError):
        return None
    if found is None or not all(isinstance(row, dict) and depth(row) <= 64 for row in rows):
        return None
    for row in rows:
        texts = [row.get(key)] + [p for p in (row.get("prompt"),) if p is not None]
        tag = "" if row.get("tag") is None else str(row["tag"])
        tag = tag.strip("\ufeff\u200b\0") if seen(tag) else ""
        named = row.get("image", [])
        named = [named] if isinstance(named, str) else named
        if (
            not all(isinstance(t, str) and seen(t) for t in texts)
            or any("\0" in t.strip("\ufeff\u200b\0") for t in texts)
            or tag in ("all", "mean_of_tags")
            or len(f"{tag}.".splitlines()) > 1
            or not (isinstance(named, list) and all(isinstance(name, str) for name in named))
        ):
            return None
        row["tag for tables"] = tag
    return rows


class DataSets:
    """A fuzzer."""

    def __init__(self, folder: Path):
        self.folder = folder / "set"

    def __call__(self, draw: random.Random) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        kinds = (self.lines, self.rows, self.rows, self.described, self.references, self.token)
        kinds += (self.quotes, self.pictures, self.one_picture, self.one_picture, self.one_picture)
        kind = kinds[draw.number % len(kinds)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's, of odd files
                return kind(draw)
        except BaseException as error:
            error.add_note(f"{kind.__name__}: {sorted(self.folder.iterdir())}")
            raise

    def text(self, draw: random.Random, lines: list[str]) -> bytes:
        """Join lines as some editor does, or none."""
        end = draw.choice(ENDS)
        ends = (draw.choice(ENDS) if draw.random() < 0.1 else end for _ in lines)
        joined = "".join(line + each for line, each in zip(lines, ends, strict=True))
        if draw.random() < 0.5:
            joined = joined.rstrip("\r\n")
        data = joined.encode("utf-8", "surrogatepass")
        chance = draw.random()
        if chance < 0.1:
            data = b"\xef\xbb\xbf" + data
        elif chance < 0.15:
            coding = draw.choice(("utf-16", "utf-16-le", "utf-32-be", "utf-7", "cp1252", "gb18030"))
            data = joined.encode(coding, "replace")
        elif chance < 0.2:
            data = flipped(data, draw)
        elif chance < 0.25:
            data = data[: draw.randrange(len(data) + 1)]
        return data

    def words(self, draw: random.Random, odd: bool) -> str:
        if not odd:
            return draw.choice(WORDS)
        around = draw.choice((*UNSEEN, "\0")), draw.choice((*UNSEEN, "\0"))
        return draw.choice((*WORDS, *UNSEEN, *ODD)).join(around)

    def lines(self, draw: random.Random) -> str:
        """train.txt"""
        one = draw.randint(-3, 4)
        lines = [self.words(draw, n == one) for n in range(draw.randint(0, 5))]
        path = self.folder / "train.txt"
        path.write_bytes(data := self.text(draw, lines))
        if draw.random() < 0.05:
            other_than_a_file(path, draw)
        truth = plain_lines(data) if path.is_file() and data.isascii() | bool(data) else None

        def read() -> list:
            found = prompts.read(str(self.folder), "train")
            assert all((p.metadata, p.images, p.tag) == ({}, (), "") for p in found)
            return [p.text for p in found]

        return self.judge(read, truth or None, "train.txt")

    def row(self, draw: random.Random, odd: bool) -> str:
        kind = draw.choice(("tag", "image", "prompt", "raw", "json", "words")) if odd else ""
        row = {"prompt": self.words(draw, kind == "words"), "tag": draw.choice((None, "a", "b"))}
        row["x"] = draw.choice((1, "y", [1, {"z": None}], 2.5, True))
        if kind == "tag":
            row["tag"] = draw.choice(TAGS)
        elif kind == "image":
            row["image"] = draw.choice(IMAGES)
        elif kind == "prompt":
            row["prompt"] = draw.choice((None, 3, "", [], ["a"], {}, True))
        text = json.dumps(row, ensure_ascii=draw.random() < 0.5)
        if kind == "raw":
            text = text[:-1] + f', "raw": {draw.choice((*RAW, *DEEP))}}}'
        elif kind == "json":
            twice = text[:-1] + ', "prompt": "b"}'
            text = draw.choice((text[:-1], "[]", "3", "null", '"a"', twice))
        return text

    def rows(self, draw: random.Random) -> str:
        """test_metadata.jsonl"""
        name = "test_metadata.jsonl"
        one = draw.randint(-2, 3)
        lines = [self.row(draw, n == one) for n in range(draw.randint(0, 4))]
        (self.folder / name).write_bytes(data := self.text(draw, lines))
        truth = plain_rows(data, "prompt") or None
        if truth and any(row.get("image", []) != [] for row in truth):
            truth = None  # none of these images is there

        def read() -> list:
            found = prompts.read(str(self.folder), "test")
            assert all(p.text == p.metadata["prompt"].strip("\ufeff\u200b\0") for p in found)
            return [p.metadata | {"tag for tables": p.tag} for p in found]

        return self.judge(read, truth, name)

    def described(self, draw: random.Random) -> str:
        """A folder of pictures with prompts.txt or metadata.jsonl."""
        names = [f"{n}.png" for n in draw.sample(range(100), draw.randint(1, 3))]
        for name in names:
            fuzz_pictures.plain(self.folder / name)
        names.sort(key=lambda name: int(name[:-4]))
        if draw.random() < 0.5:
            file = self.folder / "prompts.txt"
            file.write_bytes(data := self.text(draw, [self.words(draw, False) for _ in names]))
            if draw.random() < 0.1:
                other_than_a_file(file, draw)
            lines = plain_lines(data) if file.is_file() else None
            truth = lines and len(lines) == len(names) and list(zip(names, lines, strict=True))
        else:
            file, rows = self.folder / "metadata.jsonl", []
            for name in names:
                row = json.loads(self.row(draw, False)) | {"file": name}
                if draw.random() < 0.2:
                    row["file"] = draw.choice((*IMAGES[4:], None))
                rows.append(json.dumps(row))
            file.write_bytes(data := self.text(draw, rows))
            found = plain_rows(data, "file")
            known = found and all(row["file"] in names for row in found)
            marks = "\ufeff\u200b\0"
            truth = known and [(row["file"], row["prompt"].strip(marks)) for row in found]

        def read() -> list:
            return [(each.file.name, each.prompt) for each in pictures.read(self.folder)]

        return self.judge(read, truth or None, str(self.folder))

    def references(self, draw: random.Random) -> str:
        """Rows of which each has a reference picture, odd or damaged."""
        truths = [fuzz_pictures.draw_one(draw, self.folder, f"{n}") for n in range(2)]
        rows = [{"prompt": "a", "image": path.name} for path, _ in truths]
        path = self.folder / "train_metadata.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

        def read() -> list:
            found = prompts.read(str(self.folder), "train")
            sizes = [p.image_sizes for p in found]
            shown = [p.load_images()[0] for p in found]
            assert sizes == [((each.shape[1], each.shape[0]),) for each in shown], "another size"
            return shown

        known = [truth for _, truth in truths]
        missing = any(truth is None for truth in known)
        return self.judge(read, None if missing else known, "cannot read the image ")

    def one_picture(self, draw: random.Random) -> str:
        path, truth = fuzz_pictures.draw_one(draw, self.folder, "a")

        def read() -> list:
            prompts.check(str(self.folder))  # decodes
            return [prompts.read(str(self.folder), "test")[0].load_images()[0]]

        prompts._read_image.cache_clear()
        (self.folder / "test_metadata.jsonl").write_text(
            json.dumps({"prompt": "a", "image": path.name})
        )
        return self.judge(read, None if truth is None else [truth], path.name)

    def pictures(self, draw: random.Random) -> str:
        """A folder to score."""
        truths = [fuzz_pictures.draw_one(draw, self.folder, f"{n}") for n in range(2)]
        known = [truth for path, truth in truths if not path.is_dir()]  # which are none

        def read() -> list:
            loaded = [pictures.load(each.file) for each in pictures.read(self.folder)]
            return [each if each.ndim == 3 else each[0] for each in loaded]

        missing = not known or any(truth is None for truth in known)
        return self.judge(read, None if missing else known, str(self.folder))

    def token(self, draw: random.Random) -> str:
        path = self.folder / "token"
        tokens = ("0123456789abcdef", "x" * 1000, "short", "0123456789abcdeé", "a b" * 9)
        token = draw.choice(tokens)
        before, after = (draw.choice(("", "", "\n", " ", "\ufeff", "\r\n", "\u200b")) for _ in "ab")
        path.write_bytes(data := self.text(draw, [before + token + after]))
        if draw.random() < 0.2:
            other_than_a_file(path, draw)
        found = None
        if path.is_file():
            inside = data.removeprefix(b"\xef\xbb\xbf").strip()
            if re.fullmatch(rb"[!-~]{16,}", inside):
                found = inside.decode()
        return self.judge(lambda: read_token(str(path), "config.key"), found, "config.key=")

    def quotes(self, draw: random.Random) -> str:
        """A prompt that wants a text written, between quotes of all kinds."""
        (opening, closing), said = draw.choice(QUOTES), draw.choice(SAID)
        before = draw.choice(BEFORE)
        after = draw.choice(AFTER)
        prompt = f"{before}{opening}{said}{closing}{after}"
        odd = draw.random() < 0.3
        if odd:
            mark, at = draw.choice('"“”„«»「」『』'), draw.randrange(len(prompt) + 1)
            prompt = prompt[:at] + mark + prompt[at:]
        truth = None if odd else said
        try:
            found = target(prompt)
        except ValueError as error:
            assert repr(prompt) in str(error), "the message does not name the prompt"
            assert truth is None, f"{prompt!r} was refused: {error}"
            return REFUSED
        assert seen(found) and (odd or found == truth), f"{prompt!r} gives {found!r}"
        return EQUAL

    def judge(self, read, truth, named: str) -> str:
        """truth: what must be read; None: it must be refused. `fuzz_pictures.EITHER`: or both."""
        free = isinstance(truth, list) and any(isinstance(t, fuzz_pictures.Either) for t in truth)
        try:
            found = read()
        except ValueError as error:
            said = str(error)
            said.encode()
            assert named in said, f"the message names neither file nor row: {said}"
            assert len(said) < 2000, "the message is too long"
            assert truth is None or free, f"refused, though it can be read: {said}"
            return REFUSED
        assert truth is not None, f"read, though it must be refused: {found!r:.300}"
        if isinstance(truth, list) and isinstance(found[0], np.ndarray):
            for one, other in zip(found, truth, strict=True):
                fuzz_pictures.compare(one, other)
        else:
            assert found == truth, f"read {found!r:.300}, not {truth!r:.300}"
        return EQUAL


if __name__ == "__main__":
    sys.exit(fuzzing.main("data sets", DataSets, sys.argv))
