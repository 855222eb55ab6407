"""The OCR rewards: what a prompt wants written, the score of a reading, and real readings."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from config.base import base
from flow_grpo.rewards import base as rewards_base
from flow_grpo.rewards import loading, options
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules import ocr, ocr_engines
from flow_grpo.rewards.rules.ocr_engines import Line, in_reading_order

ROOT = Path(__file__).parent.parent
HANG_S = 600.0  # of a test that hangs
SETTINGS = loading.settings(base()) | {"ocr_processes": 1}


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a sign "OPEN"', "OPEN"),
        ('"OPEN" on a sign', "OPEN"),
        ('a sign "Stay Hungry" by the road', "Stay Hungry"),
        ('first "one", then "two"', "one"),
        ('an empty "" sign, then "two"', "two"),
        ('only spaces "  " and "two"', "two"),
        ("curly “OPEN” quotes", "OPEN"),
        ("German „OFFEN“ quotes", "OFFEN"),
        ("French « OUVERT » quotes", " OUVERT "),
        ("Japanese 「営業中」 quotes", "営業中"),
        ('a mixed “OPEN" pair', "OPEN"),
        ('it says "don\'t"', "don't"),
        ('a sign "CAFÉ"', "CAFÉ"),
        ('a sign "100%"', "100%"),
    ],
)
def test_the_target_is_the_first_text_between_double_quotes(prompt, wanted):
    assert ocr.target(prompt) == wanted


@pytest.mark.parametrize(
    "prompt", ["a dog", "", "it's a dog's 'sign'", 'a sign ""', '"  "', 'a "b']
)
def test_a_prompt_without_a_target_is_named_at_the_start(prompt):
    with pytest.raises(ValueError) as error:
        loading.check("ocr", SETTINGS, ['a sign "OPEN"', prompt], [{}, {}])
    assert f"reward 'ocr': the prompt {prompt!r} quotes no text" in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a 12" pipe with the text "HELLO"', "HELLO"),
        ('a 5\'10" man with a "STOP" sign', "STOP"),
        ('a 12", a 14" and a 3½" rim, "GO"', "GO"),
        ('a 10 " x 12 " frame with "HELLO"', "HELLO"),
        ('a 12 " pipe with "HELLO"', "HELLO"),
        ("a 12” pipe with “HELLO”", "HELLO"),
        ('a 24" sign "24" high', "24"),
        ('"Area 51" on a 6" board', "Area 51"),
        ('a sign "“OPEN”"', "OPEN"),
        ('a sign “"OPEN"”', "OPEN"),
        ('a sign " „OFFEN“ "', "OFFEN"),
        ("『「開店」』", "開店"),
        ('"He said “yes” twice"', "He said “yes” twice"),
        ("「彼は『はい』と」", "彼は『はい』と"),
        ('a sign “A 6" NUT”', 'A 6" NUT'),
        ("»OFFEN« or »ÖPPET» or ”ÖPPET”", "OFFEN"),
        ("”ÖPPET” and „OTWARTE”", "ÖPPET"),
        ("第3「開店」", "開店"),
        ("it's a dog's \"it's\"", "it's"),
    ],
)
def test_inches_open_no_quote_and_quotes_are_paired(prompt, wanted):
    assert ocr.target(prompt) == wanted


@pytest.mark.parametrize(
    "prompt",
    [
        'a sign "12" PIPES"',
        '"HELLO" and "WORLD',
        'a sign "HELLO" "',
        'a sign "A 6" NUT"',
        "“OPEN” and 」",
        "«a «b» or “c”",
    ],
)
def test_a_prompt_with_an_odd_mark_is_refused_with_its_row(prompt):
    with pytest.raises(ValueError) as error:
        loading.check("ocr", SETTINGS, ['a sign "OPEN"', prompt], [{}, {}])
    message = str(error.value)
    assert f"the prompt {prompt!r} has a quotation mark without its other half" in message
    assert message.endswith("It is row 2 of 2.")


@pytest.mark.parametrize("split", ["train", "test"])
def test_of_the_prompts_that_are_there_the_same_text_is_wanted_as_ever(split):
    for line in (ROOT / f"dataset/ocr/{split}.txt").read_text().splitlines():
        assert line.count('"') == 2 and ocr.target(line) == line.split('"')[1]


@pytest.mark.parametrize(
    ("wanted", "read"),
    [
        ("Don’t Stop", "Don't Stop"),
        ("Wait…", "Wait..."),
        ("ＯＰＥＮ　２４", "OPEN 24"),
        ("OPEN\u200b", "OPEN"),
        ("so\u00adft\u2060", "soft"),
        ("9–5 — daily −3", "9-5 - daily -3"),
        ("non‑stop", "non-stop"),
        ("the “best” «one»", 'the "best" "one"'),
        ("½ price", "1/2 price"),
        ("ﬁne ﬂour №5", "fine flour No5"),
        ("5′ 10″", "5' 10\""),
        ("I ❤\ufe0f you", "I ❤ you"),
    ],
)
def test_a_text_that_looks_the_same_scores_1(wanted, read):
    for pair in ((wanted, read), (read, wanted), (wanted, wanted)):
        assert ocr.score(*pair) == ocr.likeness(*pair) == 1.0
    assert ocr.video_score(wanted, [read]) == 1.0


@pytest.mark.parametrize(
    ("text", "engine", "script"),
    [
        ("ОТКРЫТО", "rapidocr", "cyrillic"),
        ("열림", "rapidocr", "hangul"),
        ("مفتوح", "rapidocr", "arabic"),
        ("खुला", "rapidocr", "devanagari"),
        ("เปิด", "rapidocr", "thai"),
        ("営業中", "paddleocr", "cjk"),
    ],
)
def test_a_script_that_the_engine_can_not_read_is_warned_of(
    text, engine, script, caplog, monkeypatch
):
    monkeypatch.setattr(rewards_base, "find_spec", lambda name: name)
    prompts = ['"OPEN"', f'a sign "{text}"', f'"{text}"']
    loading.check("ocr", SETTINGS | {"ocr_engine": engine}, prompts, [{}] * 3)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"2 of 3 prompts want text that {engine} can't read ({script}), ")
    assert repr(text) in said


def test_of_what_it_can_read_nothing_is_said(caplog):
    texts = [
        "OPEN",
        "CAFÉ 24",
        "Straße",
        "営業中",
        "コーヒー々",
        "ΑΒΓ",
        "ＯＰＥＮ",
        "ʼ…½",
        "🎂 100%",
    ]
    loading.check("ocr", SETTINGS, [f'"{text}"' for text in texts], [{}] * len(texts))
    assert not caplog.records


def levenshtein(a, b):
    """By its recurrence; nothing of the reward's."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y)
            )
    return table[-1, -1]


PAIRS = [
    ("OPEN", "open"),
    ("OPEN", "we are open today"),
    ("OPEN", "O P E N"),
    ("OPEN", "OPFN"),
    ("OPEN", ""),
    ("OPEN", "something else entirely"),
    ("Stay Hungry", "Stay Hugry"),
    ("Stay Hungry", "Hungry Stay"),
]


@pytest.mark.parametrize(("wanted", "read"), PAIRS)
def test_a_reading_scores_one_minus_its_relative_distance_or_one_if_it_contains(wanted, read):
    a, b = (text.replace(" ", "").lower() for text in (wanted, read))
    truth = 1 - min(levenshtein(a, b), len(a)) / len(a)
    assert ocr.likeness(wanted, read) == pytest.approx(truth, abs=1e-12)
    assert ocr.score(wanted, read) == pytest.approx(1.0 if a in b else truth, abs=1e-12)


def test_composed_and_decomposed_letters_are_the_same():
    assert ocr.score("CAFÉ", "cafe\u0301") == 1.0 and ocr.score("CAFÉ", "CAFE") == 0.75


def test_a_video_scores_the_mean_of_the_frames_that_have_any_likeness():
    assert ocr.video_score("OPEN", ["OPEN", "zzzzzzz", "OPFN"]) == pytest.approx((1 + 0.75) / 2)
    assert ocr.video_score("OPEN", ["", "zzzzzzz"]) == 0.0
    assert ocr.video_score("OPEN", ["we are open today"]) == 0.0  # contained is not enough here


def box(left, top, width=40, height=20):
    right, bottom = left + width, top + height
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)


def test_lines_are_read_row_by_row_whatever_order_they_were_found_in():
    lines = [
        Line("City", box(120, 13)),
        Line("never", box(0, 60)),
        Line("York", box(60, 8)),
        Line("sleeps", box(70, 58)),
        Line("New", box(0, 10)),
    ]
    assert in_reading_order(lines) == ["New", "York", "City", "never", "sleeps"]
    assert in_reading_order([]) == []


CORNERS = [[[0.0, 0.0], [9.0, 0.0], [9.0, 5.0], [0.0, 5.0]]]
OLD_PADDLE = [[[CORNERS[0], ("OPEN", 0.97)]]]
NEW_PADDLE = [{"rec_texts": ["OPEN"], "rec_scores": [0.97], "rec_polys": np.array(CORNERS)}]


@pytest.mark.parametrize(
    ("release", "answer", "arguments"),
    [
        ("2.9.1", OLD_PADDLE, {"use_gpu", "show_log", "use_angle_cls", "lang"}),
        ("3.7.0", NEW_PADDLE, {"device", "use_textline_orientation", "lang"}),
    ],
)
def test_both_apis_of_paddleocr_are_read(release, answer, arguments, monkeypatch):
    """The engine is stood in for by its documented answers; not seen with the real one."""
    asked = []

    class PaddleOCR:
        def __init__(self, **given):
            assert arguments <= set(given)

        def _answer(self, image, **given):
            asked.append(image[0, 0].tolist())
            return answer

    setattr(PaddleOCR, "ocr" if release < "3" else "predict", PaddleOCR._answer)
    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=PaddleOCR))
    monkeypatch.setattr(ocr_engines, "version", lambda name: release)
    (line,) = ocr_engines.paddle(384)(np.full((8, 8, 3), (1, 2, 3), np.uint8))
    assert line.text == "OPEN" and line.corners.shape == (4, 2) and asked == [[3, 2, 1]]


def test_pictures_without_text_are_read_as_nothing_by_both_apis_of_paddleocr():
    assert ocr_engines.paddle2_lines([None]) == ocr_engines.paddle2_lines([[]]) == []
    assert ocr_engines.paddle3_lines([{"rec_texts": [], "rec_polys": []}]) == []


def test_an_engine_is_never_chosen_by_what_is_installed(monkeypatch):
    with pytest.raises(ValueError, match="config.ocr_engine='tesseract': one of rapidocr, paddle"):
        options.settings(["ocr_engine=tesseract"], ["ocr"])
    there = {"rapidocr", "onnxruntime", "rapidfuzz"}
    monkeypatch.setattr(rewards_base, "find_spec", lambda name: name if name in there else None)
    with pytest.raises(ValueError, match=r"pip install 'flow_grpo\[paddleocr\]'"):
        loading.check("ocr", SETTINGS | {"ocr_engine": "paddleocr"}, [], [])


def written(text, size=40):
    image = Image.new("RGB", (256, 128), "white")
    font = ImageFont.truetype("DejaVuSans.ttf", size)
    ImageDraw.Draw(image).text((20, 40), text, "black", font)
    return np.asarray(image)


def test_pictures_and_videos_are_read_by_processes_that_end_with_the_scorer():
    pytest.importorskip("rapidocr")
    blank = np.full((128, 256, 3), 255, np.uint8)
    scorer = loading.load("ocr", SETTINGS, "cpu")
    images, prompts = [written("OPEN"), written("OPFN"), blank], ['a sign "Open"'] * 3
    found = scorer(Batch(images, prompts, [{}] * 3))
    assert found["ocr"].tolist() == [1.0, 0.75, 0.0]
    (worker,) = multiprocessing.active_children()
    scorer.close()
    deadline = time.monotonic() + HANG_S
    while worker.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.05)  # the pool joins it as well: a join here may return without its status
    assert worker.exitcode == 0


def test_thin_pictures_are_read():
    pytest.importorskip("rapidocr")
    scorer = loading.load("ocr", SETTINGS, "cpu")
    sides = [(16, 4096), (4096, 16), (1, 3000), (2000, 40), (1, 1), (32, 8192)]
    images = [np.full((*side, 3), 255, np.uint8) for side in sides]
    wide = np.full((20, 500, 3), 255, np.uint8)
    wide[:, :256] = written("OPEN", 18)[41:61]
    found = scorer(Batch([*images, wide], ['"OPEN"'] * 7, [{}] * 7))
    scorer.close()
    assert found["ocr"].tolist() == [0.0] * 6 + [1.0]


@pytest.mark.parametrize("shape", [(512, 512), (32, 512), (512, 32), (1024, 64), (8, 8)])
def test_other_pictures_are_handed_to_the_engine_as_they_are(shape):
    image = np.zeros((*shape, 3), np.uint8)
    assert ocr_engines._less_thin(image, 384) is image


@pytest.mark.slow
def test_a_video_is_read_at_every_fourth_frame():
    pytest.importorskip("rapidocr")
    right, wrong = written("OPEN"), written("OPFN")
    videos = [np.stack([right] + [wrong] * 3 + [wrong]), right, np.stack([wrong, right])]
    scorer = loading.load("video_ocr", SETTINGS, "cpu")
    found = scorer(Batch(videos, ['a sign "OPEN"'] * 3, [{}] * 3))
    scorer.close()
    assert found["video_ocr"].tolist() == [(1 + 0.75) / 2, 1.0, 0.75]


@pytest.mark.slow
def test_the_processes_end_with_a_parent_that_is_killed(tmp_path):
    pytest.importorskip("rapidocr")
    program = tmp_path / "parent.py"
    program.write_text(
        "import multiprocessing, time\n"
        "import numpy as np\n"
        "from config.base import base\n"
        "from flow_grpo.rewards import loading\n"
        "from flow_grpo.rewards.batch import Batch\n"
        "if __name__ == '__main__':\n"
        "    settings = loading.settings(base()) | {'ocr_processes': 1}\n"
        "    scorer = loading.load('ocr', settings, 'cpu')\n"
        "    scorer(Batch([np.zeros((32, 32, 3), np.uint8)], ['\"a\"'], [{}]))\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, str(program)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{worker}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")
