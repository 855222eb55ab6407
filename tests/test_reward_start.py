"""Reward servers at a run's start, and what a run makes of those that fail."""

from __future__ import annotations

import logging
import socket
import threading

import numpy as np
import pytest
import serving
from serving import (
    HANG_S,
    HTTP,
    client,
    faulty,
    mean,
    picky,
    pictures,
    reply,
    rows,
    serve,
)

from config.base import base
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.remote import health, servers
from flow_grpo.rewards.remote.servers import Servers

pytestmark = pytest.mark.usefixtures("patient")


def configured(**keys):
    config = base()
    with config.unlocked():
        config.update(keys)
    return config


def test_a_server_that_is_down_at_start_is_named(monkeypatch):
    down = f"http://127.0.0.1:{serving.free_port()}"
    with serve(mean, name="pickscore") as server:
        with pytest.raises(ValueError, match=f"'pickscore' at {down} does not answer"):
            health.check(Servers({"pickscore": [server.url, down]}))
        assert health.check(Servers({"pickscore": [server.url]})) == set()
        with pytest.raises(ValueError, match="serves another reward, 'pickscore'. Start it"):
            health.check(Servers({"ocr": [server.url]}))


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_a_server_that_hangs_or_drips_at_start_is_named(says, monkeypatch):
    monkeypatch.setattr(health, "HEALTH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, ended = f"http://127.0.0.1:{listener.getsockname()[1]}", threading.Event()

        def drip():
            peer, _ = listener.accept()
            with peer:
                while says and not ended.wait(0.05):  # oftener than a read's patience
                    peer.sendall(says if not sent else b"1")
                    sent.append(1)
                ended.wait(HANG_S)

        sent: list = []
        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ValueError, match=f"'mean' at {url} does not answer within 0.2 s"):
            health.check(Servers({"mean": [url]}))
        ended.set()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"reward": ', b"{}", b" " * 2**16 + b"{}"])
def test_something_else_than_a_reward_server_is_named(body):
    with faulty(lambda handler, _: reply(handler, 200, body)) as (url, _):
        with pytest.raises(ValueError, match=f"{url} is no reward server: GET /health gives"):
            health.check(Servers({"mean": [url]}))


def test_health_is_asked_without_proxy_redirects_or_another_s_password(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{serving.free_port()}")
    headers = []

    def answer(handler, number):
        headers.append(dict(handler.headers))
        if handler.path == "/health":
            reply(handler, 302, b"", location="/elsewhere")
        else:
            reply(handler, 200, {"reward": "mean"})

    with faulty(answer) as (url, seen):
        with pytest.raises(ValueError, match="is no reward server: GET /health gives b''"):
            health.check(Servers({"mean": [url]}))
    assert len(seen) == 1 and "Authorization" not in headers[0]


def test_a_server_says_whether_its_reward_compares():
    with serve(mean, compares=True) as server, serve(mean, name="other") as other:
        assert HTTP.get(f"{server.url}/health").json()["compares"] is True
        asked = Servers({"mean": [server.url], "other": [other.url]})
        assert health.check(asked) == {"mean"}
        assert health.check(asked, ["other"]) == set()


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"reward_urls": {"shapes": ["localhost:18085"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": ["http://"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": ["http://a:99999"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": [7]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": []}}, "one URL or several different ones"),
        ({"reward_urls": {"shapes": ["http://a:1", "http://a:1"]}}, "several different ones"),
        ({"reward_urls": {"ocr": ["http://a:1"]}}, "neither config.reward_fn nor"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        servers.of(configured(reward_fn={"shapes": 1.0}, **keys))


def scorer(url: str, masks: bool, timeout_s: float = 0.1, weight: float = 1.0) -> Scorer:
    where = Servers({"mean": [url]}, timeout_s)
    weights = {"mean": weight, "jpeg_incompressibility": 1.0}
    return Scorer(weights, {}, where=where, masks=masks)


def test_a_failure_stops_or_masks_as_configured(caplog):
    url = f"http://127.0.0.1:{serving.free_port()}"
    stops, masks = scorer(url, False), scorer(url, True)
    monitors = scorer(url, True, weight=0.0)
    batch = rows(pictures(3, side=16))
    with pytest.raises(RuntimeError, match=f"reward 'mean' failed: {url}: no scores"):
        stops.score(batch)
    with caplog.at_level(logging.WARNING):
        scores = masks.score(batch)
    assert "reward 'mean' failed" in caplog.text and "rows are masked" in caplog.text
    assert np.isnan(scores["mean"]).all() and np.isnan(scores["avg"]).all()
    assert np.isfinite(scores["jpeg_incompressibility"]).all()
    assert np.isfinite(monitors.score(batch)["avg"]).all()  # its weight is 0
    for each in (stops, masks, monitors):
        each.close()


def test_masking_takes_only_the_rows_that_failed():
    with serve(picky) as server:
        masks = scorer(server.url, True, timeout_s=HANG_S)
        scores = masks.score(rows(pictures(3, side=16), metadata=[{"n": 1}, {}, {"n": 2}]))
        np.testing.assert_array_equal(scores["mean"], [1, np.nan, 2])
        assert np.isnan(scores["avg"]).tolist() == [False, True, False]
        masks.close()


def test_nothing_is_left_behind():
    before = threading.active_count()
    for _ in range(5):
        with serve(mean) as server, client(server.url) as reward:
            reward(rows(pictures(2)))
    serving.wait_until(lambda: threading.active_count() <= before + 1)
