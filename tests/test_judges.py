"""The judges' client against a small local server that speaks the chat protocol of OpenAI.

Not seen with a real model: what is real is the HTTP and what is asked and made of the answers.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges import chat
from flow_grpo.rewards.judges.chat import Chat
from flow_grpo.rewards.judges.qwenvl import QwenVL
from flow_grpo.rewards.judges.unifiedreward import UnifiedReward, win_rates

HANG_S = 600.0  # of a test that hangs
DRIPS = "drips"
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (8, 8 + n, 3), dtype=np.uint8) for n in range(6)]


def said(text):
    """A chat completion as sglang and vLLM send it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


class Endpoint:
    """Answers what `reply(images, text, count)` says: (status, body), or DRIPS."""

    def __init__(self, reply):
        self.requests, self.at_once, self.most_at_once = [], 0, 0
        self.lock, self.ended, endpoint = threading.Lock(), threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append((self.path, dict(self.headers), body))
                    count = len(endpoint.requests)
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                *parts, text = body["messages"][0]["content"]
                pictures = [decode(part["image_url"]["url"]) for part in parts]
                answer = reply(pictures, text["text"], count)
                with endpoint.lock:
                    endpoint.at_once -= 1
                if answer == DRIPS:
                    return self.drip()
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def drip(self):
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while not endpoint.ended.wait(0.02):
                    try:
                        self.wfile.write(b" ")
                        self.wfile.flush()
                    except OSError:
                        return

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


def decode(url):
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))))


@pytest.fixture
def ask(monkeypatch):
    """Return ask(reward, reply, count=.., **settings) -> (columns, endpoint)."""
    monkeypatch.setattr(chat, "BACKOFF_S", 0.01)
    endpoints = []

    def run(name, reply, count=1, group=None, **changes):
        endpoint = Endpoint(reply)
        endpoints.append(endpoint)
        urls = {"unifiedreward_url": endpoint.url, "qwenvl_url": endpoint.url}
        settings = loading.settings(base()) | {"judge_timeout_s": HANG_S} | urls | changes
        prompts = [f"prompt {n}" for n in range(count)]
        loading.check(name, settings, prompts, [{}] * count)
        scorer = loading.load(name, settings, "cpu")
        try:
            return scorer(Batch(PICTURES[:count], prompts, [{}] * count, None, group)), endpoint
        finally:
            scorer.close()

    yield run
    for endpoint in endpoints:
        endpoint.close()


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("unifiedreward", "Good.\nFinal Score: 4", 0.8),
        ("unifiedreward", "**Final Score:** 3.5", 0.7),
        ("unifiedreward", "Final Score: 1 would be harsh.\nFinal Score: 5/5", 1.0),
        ("unifiedreward", "Final Score: 7", np.nan),
        ("unifiedreward", "Final Score: 0", np.nan),
        ("unifiedreward", "I would say four.", np.nan),
        ("unifiedreward", "", np.nan),
        ("qwenvl", "<Score>3</Score>", 0.6),
        ("qwenvl", "<Score>0</Score>", 0.0),
        ("qwenvl", "<Score>6</Score>", np.nan),
        ("qwenvl", "3", np.nan),
    ],
)
def test_a_score_is_the_last_number_in_range_or_nan_and_counted(name, answer, score, ask):
    found, _ = ask(name, lambda *question: said(answer))
    np.testing.assert_allclose(found[name], [score], equal_nan=True)
    assert found[f"{name}_unparsed"].tolist() == [np.isnan(score)]
    assert found[f"{name}_unanswered"].tolist() == [False]


JUDGES = {"unifiedreward": UnifiedReward, "qwenvl": QwenVL}


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("unifiedreward", "Final Score: 4", 0.8),
        ("unifiedreward", "Good.\nFinal Score: 4", 0.8),
        ("unifiedreward", "**Final Score:** 3.5", 0.7),
        ("unifiedreward", "Final Score: 1 would be harsh.\nFinal Score: 5/5", 1),
        ("unifiedreward", "Final Score: 7", np.nan),
        ("unifiedreward", "Final Score: 0", np.nan),
        ("unifiedreward", "Final Score (1-5): 4", 0.8),
        ("unifiedreward", "Final Score: [1-5] 4", 0.8),
        ("unifiedreward", "Final Score [1–5] = **4**", 0.8),
        ("unifiedreward", "Final Score (1 to 5): 3.5", 0.7),
        ("unifiedreward", "Final Score (out of 5): 2", 0.4),
        ("unifiedreward", "Final Score (scale 1-5): 4/5", 0.8),
        ("unifiedreward", "Final Score (1-10): 4", np.nan),
        ("unifiedreward", "Final Score: (1-10) 4", np.nan),
        ("unifiedreward", "Final Score: -2", np.nan),
        ("unifiedreward", "Final Score: −2", np.nan),
        ("unifiedreward", "Final Score: –3", np.nan),
        ("unifiedreward", "Final Score -4", np.nan),
        ("unifiedreward", "Final Score - 4", 0.8),
        ("unifiedreward", "Final Score – 4", 0.8),
        ("unifiedreward", "Final Score: +4", 0.8),
        ("unifiedreward", "Final Score: .5", np.nan),
        ("unifiedreward", "Final Score: 4/5", 0.8),
        ("unifiedreward", "Final Score: 4 / 5", 0.8),
        ("unifiedreward", "Final Score: **4**/5", 0.8),
        ("unifiedreward", "Final Score: 4 out of 5", 0.8),
        ("unifiedreward", "Final Score: 4 of 5", 0.8),
        ("unifiedreward", "Final Score: 4/10", np.nan),
        ("unifiedreward", "Final Score: 8/10", np.nan),
        ("unifiedreward", "Final Score: 4 out of 10", np.nan),
        ("unifiedreward", "Final Score: 4 out of 5 stars", 0.8),
        ("unifiedreward", "Final Score: 4 points", 0.8),
        ("unifiedreward", "Final Score: 4 (good)", 0.8),
        ("unifiedreward", "Final Score: 4.", 0.8),
        ("unifiedreward", "Final Score: 4. The image shows 3 cats", 0.8),
        ("unifiedreward", "Final Score: 4, because it has 3 cats", 0.8),
        ("unifiedreward", "Final Score: 4 - good", 0.8),
        ("unifiedreward", "Final Score: 3-4", np.nan),
        ("unifiedreward", "Final Score: 3 - 4", np.nan),
        ("unifiedreward", "Final Score: 3 to 4", np.nan),
        ("unifiedreward", "Final Score: 3 or 4", np.nan),
        ("unifiedreward", "Final Score: 3~4", np.nan),
        ("unifiedreward", "Final Score: 1,5", np.nan),
        ("unifiedreward", "Final Score: 4th", np.nan),
        ("unifiedreward", "Final Score: 40%", np.nan),
        ("unifiedreward", "Final Score: 4 %", np.nan),
        ("unifiedreward", "Final Score: 4.5.1", np.nan),
        ("unifiedreward", "Final Score: 1e1", np.nan),
        ("unifiedreward", "Final Score: 3 + 1 = 4", np.nan),
        ("unifiedreward", "Final Score: 3, 4", np.nan),
        ("unifiedreward", "Final Score: [4]", 0.8),
        ("unifiedreward", "Final Score: (4)", 0.8),
        ("unifiedreward", "Final Score: <4>", 0.8),
        ("unifiedreward", "Final Score:\n4", 0.8),
        ("unifiedreward", "Final Score:\n\n**4**\n\n3 cats", 0.8),
        ("unifiedreward", "Final Score: 4\n- 3 cats", 0.8),
        ("unifiedreward", "Final Score:\n1. The cat\n2. x", np.nan),
        ("unifiedreward", "Final Score: four", np.nan),
        ("unifiedreward", "", np.nan),
        ("unifiedreward", "Final Score: 4 (1-5)", 0.8),
        ("unifiedreward", "Final Score: 4 (1-10)", np.nan),
        ("unifiedreward", "Final Score: 4\nFinal Score: -2", np.nan),
        ("unifiedreward", "Final Score: 4\nThe final score reflects all.", 0.8),
        ("unifiedreward", "Final Score (1-5)", np.nan),
        ("unifiedreward", "Final Score: 1-5", np.nan),
        ("unifiedreward", "Final Score: 4/5/2024", np.nan),
        ("unifiedreward", "Final Score: <3", np.nan),
        ("unifiedreward", "Final Score: < 3", np.nan),
        ("unifiedreward", "Final Score: ４", 0.8),
        ("unifiedreward", "Final Score: 5/5.", 1),
        ("unifiedreward", "Final Score: 4_", 0.8),
        ("unifiedreward", 'Final Score: "4"', 0.8),
        ("unifiedreward", "Final Score: 4/5 (very good)", 0.8),
        ("unifiedreward", "Final Score | 4 |", 0.8),
        ("unifiedreward", "Final Score: >4", np.nan),
        ("unifiedreward", "Final Score: 4;", 0.8),
        ("unifiedreward", 'Final Score: 4,\n"x": 3', 0.8),
        ("unifiedreward", "### Final Score\n4", 0.8),
        ("unifiedreward", "Final Score: 3/4", np.nan),
        ("unifiedreward", "Final Score: 2.5/5", 0.5),
        ("unifiedreward", "Final Score: 10", np.nan),
        ("unifiedreward", "Final Score: $4", np.nan),
        ("unifiedreward", "Final Score: 4\n5", 0.8),
        ("unifiedreward", "Final Score: 4 5", np.nan),
        ("unifiedreward", "Final Score: 3...4", np.nan),
        ("qwenvl", "<Score>3</Score>", 0.6),
        ("qwenvl", "<Score>0</Score>", 0),
        ("qwenvl", "<Score>6</Score>", np.nan),
        ("qwenvl", "3", np.nan),
        ("qwenvl", "<Score>4/5</Score>", 0.8),
        ("qwenvl", "<Score>.5</Score>", 0.1),
        ("qwenvl", "<Score>-1</Score>", np.nan),
        ("qwenvl", "<Score>(0-5) 4</Score>", 0.8),
        ("qwenvl", "<Score>0-5</Score>", np.nan),
        ("qwenvl", "<score> 4 points </score>", 0.8),
        ("qwenvl", "<Score>4</Score> no: <Score>-2</Score>", np.nan),
        ("qwenvl", "<Score>4", np.nan),
        ("qwenvl", "<Score>4.0</Score>", 0.8),
        ("qwenvl", "<Score>\n4\n</Score>", 0.8),
        ("qwenvl", "<Score>4 out of 10</Score>", np.nan),
        ("qwenvl", "<Score>-0</Score>", np.nan),
        ("qwenvl", "<Score>2</Score> <Score></Score>", 0.4),
    ],
)
def test_a_score_is_a_number_that_was_given_on_the_judge_s_scale_or_nan(name, answer, score):
    judge = JUDGES[name].__new__(JUDGES[name])  # parsing needs no endpoint
    np.testing.assert_allclose(judge.parse(answer), score, equal_nan=True)


@pytest.mark.parametrize("answer", ["Final Score: -2", "Final Score: 3-4", "Final Score: 4/10"])
def test_a_number_that_is_no_score_is_counted(answer, ask):
    found, _ = ask("unifiedreward", lambda *question: said(answer))
    assert np.isnan(found["unifiedreward"]).all()
    assert found["unifiedreward_unparsed"].tolist() == [True]
    assert found["unifiedreward_unanswered"].tolist() == [False]


def test_each_picture_is_asked_about_with_its_own_prompt(ask, monkeypatch):
    monkeypatch.setenv("FLOW_GRPO_JUDGE_KEY", "sesame")

    def reply(pictures, text, count):
        (number,) = [n for n in range(6) if f"prompt {n}" in text]
        assert len(pictures) == 1 and np.array_equal(pictures[0], PICTURES[number])
        return said(f"Final Score: {number % 5 + 1}")

    found, endpoint = ask("unifiedreward", reply, count=6)
    assert found["unifiedreward"].tolist() == [0.2, 0.4, 0.6, 0.8, 1.0, 0.2]
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sesame"
    assert body["model"] == "UnifiedReward-7b-v1.5" and body["temperature"] == 0


def test_questions_are_asked_several_at_a_time_but_no_more_than_allowed(ask):
    three = threading.Barrier(3)

    def together(*question):
        three.wait(HANG_S)
        return said("Final Score: 2")

    _, endpoint = ask("unifiedreward", together, count=6, judge_concurrency=3)
    assert endpoint.most_at_once == 3


@pytest.fixture
def chatter():
    """Return chatter(reply) -> (Chat, Endpoint, pauses) whose time passes while it sleeps alone."""
    made = []

    def make(reply):
        endpoint, pauses = Endpoint(reply), []
        clock, sleep = lambda: sum(pauses), pauses.append
        judge = Chat(endpoint.url, "m", 1, HANG_S, clock, sleep)
        made.extend((judge, endpoint))
        return judge, endpoint, pauses

    yield make
    for each in made:
        each.close()


def test_a_question_is_not_asked_again_when_its_time_would_be_over(chatter, monkeypatch):
    judge, endpoint, pauses = chatter(lambda *question: (503, b"busy"))
    with pytest.raises(ConnectionError, match="503"):
        judge.ask([(PICTURES[:1], "?")])
    assert len(endpoint.requests) == chat.NUM_ATTEMPTS and len(pauses) == chat.NUM_ATTEMPTS - 1
    assert all(0.5 <= pause <= 2**n for n, pause in enumerate(pauses))
    monkeypatch.setattr(chat, "BACKOFF_S", 3 * HANG_S)  # the least pause is half of it
    judge, endpoint, pauses = chatter(lambda *question: (503, b"busy"))
    with pytest.raises(ConnectionError, match="503"):
        judge.ask([(PICTURES[:1], "?")])
    assert len(endpoint.requests) == 1 and not pauses


def test_nothing_of_the_environment_is_sent_but_the_judge_s_own_key(chatter, monkeypatch, tmp_path):
    """As the package openai would send OPENAI_CUSTOM_HEADERS, whatever key it is given."""
    (tmp_path / "netrc").write_text("default login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", "x-secret: secret")
    for key in (None, "sesame"):
        if key:
            monkeypatch.setenv("FLOW_GRPO_JUDGE_KEY", key)
        judge, endpoint, _ = chatter(lambda *question: said("yes"))
        assert judge.ask([(PICTURES[:1], "?")]) == ["yes"]
        ((_, headers, _),) = endpoint.requests
        assert "secret" not in str(headers)
        assert headers.get("Authorization") == (f"Bearer {key}" if key else None)
        assert not [name for name in headers if name.lower().startswith(("openai", "x-"))]


def test_a_busy_endpoint_is_asked_again_a_bounded_number_of_times(ask):
    found, endpoint = ask(
        "qwenvl", lambda p, t, n: (503, b"busy") if n < 3 else said("<Score>5</Score>")
    )
    assert found["qwenvl"].tolist() == [1.0] and len(endpoint.requests) == 3
    with pytest.raises(ConnectionError, match=r"'Qwen/Qwen2.5-VL-7B-Instruct' at http.*503"):
        ask("qwenvl", lambda *question: (503, b"busy"))


def test_a_refusal_is_not_asked_again(ask):
    seen = []
    with pytest.raises(ConnectionError, match="answered none of 1 questions.*400"):
        ask("qwenvl", lambda *question: seen.append(1) or (400, b"{}"))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b"[1]", b"\xff", b"x" * 2**21]
)
def test_an_answer_that_is_none_is_nan_and_counted(body, ask):
    found, _ = ask(
        "qwenvl",
        lambda p, text, n: (200, body) if "prompt 1" in text else said("<Score>2</Score>"),
        count=3,
    )
    np.testing.assert_array_equal(found["qwenvl"], [0.4, np.nan, 0.4])
    assert found["qwenvl_unanswered"].tolist() == [False, True, False]
    assert not found["qwenvl_unparsed"].any()


def test_an_endpoint_that_drips_is_given_up_at_the_deadline(chatter):
    def drip(*question):
        passed.append(HANG_S + 1)
        return DRIPS

    judge, _, passed = chatter(drip)
    with pytest.raises(ConnectionError, match="no complete answer in 600 s"):
        judge.ask([(PICTURES[:1], "?")])


def test_an_endpoint_that_is_not_there_is_named(ask):
    with pytest.raises(ConnectionError, match="at http://127.0.0.1:9/v1 answered none"):
        ask("qwenvl", None, qwenvl_url="http://127.0.0.1:9/v1")


def test_a_template_of_ones_own_replaces_the_reward_s(ask, tmp_path):
    (tmp_path / "qwenvl.txt").write_text("Is it {prompt}? {braces}")
    texts = []
    ask("qwenvl", lambda p, text, n: texts.append(text) or said("<Score>1</Score>"),
        judge_templates=str(tmp_path))  # fmt: skip
    assert texts == ["Is it prompt 0? {braces}"]
    (tmp_path / "qwenvl.txt").write_text("Is it nice?")
    with pytest.raises(ValueError, match="has no {prompt}"):
        ask("qwenvl", None, judge_templates=str(tmp_path))


def test_a_url_that_is_none_is_refused_before_anything_loads(ask):
    with pytest.raises(ValueError, match="config.rewards.qwenvl_url='localhost'"):
        ask("qwenvl", None, qwenvl_url="localhost")


def widest(pictures, text, count):
    """A fair judge, which prefers the wider image whatever its place."""
    first = pictures[0].shape[1] > pictures[1].shape[1]
    return said(f"Thus:\nImage {1 if first else 2} is better")


def test_pairs_score_the_share_of_the_group_that_a_picture_beats(ask):
    found, endpoint = ask("unifiedreward_pairs", widest, 6, np.array([7, 7, 7, 2, 2, 2]))
    assert found["unifiedreward_pairs"].tolist() == [0, 0.5, 1, 0, 0.5, 1]
    assert found["unifiedreward_pairs_unparsed"].tolist() == [0] * 6
    assert len(endpoint.requests) == 6  # 3 pairs a group


def test_pairs_are_shown_in_either_order_and_always_in_the_same(ask):
    orders = []

    def watch(pictures, text, count):
        orders.append(tuple(picture.shape[1] for picture in pictures))
        return widest(pictures, text, count)

    ask("unifiedreward_pairs", watch, 6, np.zeros(6))
    once, swapped = set(orders), sum(a > b for a, b in orders)
    assert len(once) == 15 and 3 <= swapped <= 12
    orders.clear()
    ask("unifiedreward_pairs", watch, 6, np.zeros(6))
    assert set(orders) == once


def test_a_judge_that_always_likes_the_first_place_is_split_by_the_random_order(ask):
    """The coin, not the order in the batch, decides: no image wins all of its pairs."""
    group = np.zeros(6)
    found, _ = ask("unifiedreward_pairs", lambda *q: said("Image 1 is better"), 6, group)
    scores = found["unifiedreward_pairs"]
    assert scores.sum() == 3 and scores.tolist() != [1, 0.8, 0.6, 0.4, 0.2, 0]


def test_a_pair_without_a_verdict_counts_half_and_a_picture_without_any_is_nan(ask):
    def shy(pictures, text, count):
        widths = {picture.shape[1] for picture in pictures}
        return said("A tie.") if 8 in widths else widest(pictures, text, count)

    found, _ = ask("unifiedreward_pairs", shy, 3, np.zeros(3))
    np.testing.assert_array_equal(found["unifiedreward_pairs"], [np.nan, 0.25, 0.75])
    assert found["unifiedreward_pairs_unparsed"].tolist() == [1, 0.5, 0.5]


def test_without_groups_there_is_nothing_to_compare(ask):
    assert loading.find("unifiedreward_pairs").needs_groups
    assert not loading.find("qwenvl").needs_groups
    found, endpoint = ask("unifiedreward_pairs", widest, 3)
    assert np.isnan(found["unifiedreward_pairs"]).all() and not endpoint.requests


def test_win_rates_of_a_group_of_four():
    # (0,1)=0 (0,2)=1 (0,3) without a verdict (1,2)=1 (1,3)=1 (2,3)=0, seen from the first
    nan = np.nan
    results = np.array([[nan, 0, 1, nan], [1, nan, 1, 1], [0, 0, nan, 0], [nan, 0, 1, nan]])
    assert win_rates(results).tolist() == [0.5, 1, 0, 0.5]


def test_win_rates_sum_to_half_the_group():
    upper = np.triu(RNG.integers(0, 3, (9, 9)) / 2, 1)
    assert win_rates(upper + np.tril(1 - upper.T, -1)).sum() == pytest.approx(4.5, abs=1e-12)
    with pytest.raises(AssertionError, match="add up to 1"):
        win_rates(upper)
