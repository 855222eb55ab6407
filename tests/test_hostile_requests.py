"""Hostile requests to a reward server: promised answers, no invented score, nothing that stays."""

from __future__ import annotations

import errno
import json
import random
import re
import struct
import subprocess
import sys
import threading
from collections import Counter

import fuzz_requests
import hostile_server
import numpy as np
import pytest
import serving
from hostile_requests import bomb
from PIL import Image, UnidentifiedImageError
from serving import HANG_S, HTTP, ONE, ROOT, Gate, exact, file, mean, pictures, post, rows, serve

from flow_grpo.reward_server import app
from flow_grpo.rewards.remote import wire


def test_random_requests_are_answered_as_promised():
    with hostile_server.server(**{"body-timeout": 0.2}) as at:
        seen, kinds = fuzz_requests.requests(at, random.Random(7), 150)
    assert set(seen) == {"right", "refused", "lost"} and len(kinds) == 16, seen


def test_random_answers_give_no_score_that_was_not_sent():
    seen = fuzz_requests.answers(random.Random(7), 80)
    assert set(seen) == {"right", "refused"}, seen


@pytest.mark.slow
def test_the_fuzzer_prints_a_row_for_each_case_and_finds_nothing():
    command = [sys.executable, "tests/fuzz_requests.py", "--count", "1000", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 7 and all(len(line) == len(table[0]) for line in table)
    assert table[1][0] == "| hostile requests" and all(line[5] == "0" for line in table[1:])


# A key stands for one body.


def keyed(server, body: bytes, key: str = "one"):
    return post(server.url, body, **{"idempotency-key": key})


@pytest.mark.parametrize("when", ["while it waits", "while it is scored", "afterwards"])
def test_a_key_that_comes_with_another_body_gets_no_scores(when):
    gate, answers = Gate(), {}
    one, other = (wire.encode(rows(pictures(2, seed=seed))) for seed in (0, 1))
    with serve(gate) as server:
        first = threading.Thread(target=lambda: answers.update(first=keyed(server, one)))
        first.start()
        serving.wait_until(lambda: gate.calls == [2])
        if when == "afterwards":
            gate.go.set()
            first.join(HANG_S)
        if when == "while it waits":
            second = threading.Thread(target=lambda: keyed(server, one, "two"))
            second.start()
            serving.wait_for_requests(server, 2)
        refused = keyed(server, other, "two" if when == "while it waits" else "one")
        assert refused.status_code == 409 and "another body" in refused.json()["detail"]
        gate.go.set()
        first.join(HANG_S)
        assert keyed(server, one).json() == answers["first"].json()
        assert keyed(server, other, "three").json() != answers["first"].json()


def test_a_key_whose_request_failed_may_come_again_with_any_body():
    with serve(serving.picky) as server:
        assert keyed(server, exact(ONE)).status_code == 422
        assert keyed(server, exact(ONE | {"metadata": [{"n": 4}]})).json()["scores"]["mean"] == [4]


@pytest.mark.parametrize("limit", [{"NUM_REMEMBERED": 3}, {"REMEMBERED_BYTES": 200}])
def test_few_answers_are_remembered(limit, monkeypatch):
    for name, value in limit.items():
        monkeypatch.setattr(app, name, value)
    body = exact(ONE)
    with serve(mean) as server:
        for n in range(20):
            assert keyed(server, body, f"key {n}").status_code == 200
        lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
        found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        assert 1 <= found["reward_remembered_answers"] <= limit.get("NUM_REMEMBERED", 4)
        assert found["reward_remembered_bytes"] <= 200
        assert server.batcher.num_scored == 20
        assert keyed(server, body, "key 19").status_code == 200
        assert server.batcher.num_scored == 20  # the newest is there


# A row that can't be read costs that row.

OF_ROW = (
    *(
        OSError("truncated"),
        FileNotFoundError(errno.ENOENT, "x"),
        PermissionError(errno.EACCES, "x"),
    ),
    *(UnidentifiedImageError("x"), Image.DecompressionBombError("x"), SyntaxError("broken PNG")),
    *(struct.error("x"), ZeroDivisionError("x"), OverflowError("x"), EOFError(), UnicodeError("x")),
)
OF_ALL = (
    *(ConnectionError("judge"), TimeoutError("judge"), OSError(errno.ENOSPC, "x"), MemoryError()),
    *(OSError(errno.EMFILE, "x"), RuntimeError("CUDA"), ImportError("x"), NotImplementedError()),
)


def test_an_error_of_a_row_is_its_own_and_one_of_the_machine_is_all_rows():
    raised = []

    def reads(batch):
        if any("bad" in row for row in batch.metadata):
            raise raised[-1]
        return mean(batch)

    sent = wire.encode(rows(pictures(3), metadata=[{}, {"bad": 1}, {}]))
    with serve(reads) as server:
        for error in OF_ROW + OF_ALL:
            raised.append(error)
            answer = post(server.url, sent)
            if error in OF_ALL:
                assert answer.status_code in (500, 504), error
                continue
            found = answer.json()
            missing = [score is None for score in found["scores"]["mean"]]
            assert missing == [False, True, False], error
            assert found["errors"][1].startswith(type(error).__name__)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 12_000), (65_000, 65_000)])
def test_a_decompression_bomb_costs_its_row(size):
    tensors = {"image/0": file(4), "image/1": np.frombuffer(bomb(*size), np.uint8)}
    sent = {"prompts": ["", ""], "metadata": [{}, {}], "group": None}
    with serve(mean) as server:
        answer = post(server.url, exact(sent, tensors)).json()
        assert answer["scores"]["mean"] == [0.0, None] and "pixels" in answer["errors"][1]
        sent = {"prompts": [""], "metadata": [{}], "group": None}
        assert post(server.url, exact(sent, {"image/0": tensors["image/1"]})).status_code == 413


# Who may ask, and where.


def test_nothing_is_said_without_the_token():
    token = "0123456789abcdef"
    allowed = {"authorization": f"Bearer {token}"}
    paths = {"/openapi.json": 200, "/docs": 404, "/redoc": 404, "/metrics": 200, "/x": 404}
    with serve(mean, token=token) as server:
        for path, status in paths.items():
            for given in (
                {},
                {"authorization": f"Bearer {token}x"},
                {"authorization": "Basic Og=="},
            ):
                answer = HTTP.get(server.url + path, headers=given)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json() == {"detail": "a bearer token is needed"}
            assert HTTP.get(server.url + path, headers=allowed).status_code == status
        counts = HTTP.get(f"{server.url}/metrics", headers=allowed).text
        assert f'status="401"}} {3 * len(paths)}' in counts


def test_two_lengths_in_one_request_are_refused():
    with serve(mean) as server:
        body = exact(ONE)
        odd = {"transfer-encoding": "chunked", "content-length": str(len(body))}
        assert post(server.url, body, **odd).status_code in (400, 411)


# What it says of itself.


@pytest.mark.parametrize("host, shown", [("127.0.0.1", "127.0.0.1"), ("localhost", r"[^/]+")])
def test_a_server_says_where_it_is_ready(host, shown):
    command = [sys.executable, "-m", "flow_grpo.reward_server", "--reward=shapes", "--port=0"]
    process = subprocess.Popen(
        [*command, f"--host={host}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(rf"shapes is served at (http://{shown}:\d+)\n", line)
        assert found, line
        assert HTTP.get(f"{found[1]}/health").json()["reward"] == "shapes"
    finally:
        process.kill()
        process.communicate()


def test_what_came_of_an_answer_is_told_by_status_and_scores():
    """The fuzzer's own judgement: what it must call wrong."""
    case = fuzz_requests.Case(b"", [1.0, None], (200,))

    def judged(scores, errors=(None, "x"), status=200) -> str:
        scored = {hostile_server.NAME: list(scores)}
        body = json.dumps({"scores": scored, "errors": list(errors)}).encode()
        return fuzz_requests.judged(case, status, body)

    assert judged([1.0, None]) == "right"
    for wrong in ([2.0, None], [None, None], [1.0, 0.0]):
        assert judged(wrong).startswith("wrong")
    assert judged([1.0, None], [None, None]).startswith("wrong")
    assert judged([], status=400) == "wrong: status 400" and judged([], status=500) != "refused"
    assert Counter(fuzz_requests.row("x", Counter(right=1), 0.1, "-"))["|"] == 9
