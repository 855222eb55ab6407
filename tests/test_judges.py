"""The judges' client against a small local server that speaks the chat protocol of OpenAI.

Not seen with a real model: what is real is the HTTP and what is asked and made of the answers.
"""

import threading

import numpy as np
import pytest
from judging import DRIPS, HANG_S, PICTURES, Endpoint, asking, said

from flow_grpo.rewards.judges import chat
from flow_grpo.rewards.judges.chat import Chat


@pytest.fixture
def ask(monkeypatch):
    with asking(monkeypatch) as run:
        yield run


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
