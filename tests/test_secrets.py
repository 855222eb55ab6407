"""Passwords and keys that stand in URLs are in no file that a run writes, and in no message."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import running
import serving
from serving import pictures, rows

from config.base import base
from flow_grpo.cli import redacted, user_errors
from flow_grpo.launch import entry, provenance
from flow_grpo.report import output
from flow_grpo.rewards import loading
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.judges.chat import Chat
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.remote import servers

URLS = {
    "http://me:sesame@host:1/v1": "http://***@host:1/v1",
    "https://sesame@host": "https://***@host",
    "http://:sesame@host/": "http://***@host/",
    "http://me:ses/sesame?@host": "http://***@host",
    "http://h/v1?api_key=sesame&n=1": "http://h/v1?api_key=***&n=1",
    "http://h/?n=1&Token=sesame": "http://h/?n=1&Token=***",
    "http://h/#access_token=sesame": "http://h/#access_token=***",
    "http://h/?X-Amz-Signature=sesame;n=1": "http://h/?X-Amz-Signature=***;n=1",
    "http://h/?client%5Fsecret=sesame": "http://h/?client%5Fsecret=***",
    "http://h/?password=sesame": "http://h/?password=***",
}


@pytest.mark.parametrize("url, shown", URLS.items())
def test_a_url_is_shown_without_its_secrets(url, shown):
    assert redacted(url) == shown
    assert redacted(f"no answer from {url}, 'x'").startswith(f"no answer from {shown}")
    nested = {"a": [url, 1, None], "b": {"c": (url,)}}
    assert redacted(nested) == {"a": [shown, 1, None], "b": {"c": (shown,)}}
    assert "sesame" not in redacted(str({"x": url, "y": [url]}))
    assert "sesame" not in redacted(json.dumps({"x": url}))


@pytest.mark.parametrize(
    "text", ["http://h:1/v1", "a cat @ night", "me@host.org", "?n=1", "a://b", ""]
)
def test_what_has_no_secret_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_secret_is_refused_for_servers_and_judges_without_saying_it(url):
    config = base()
    with config.unlocked():
        config.update({"reward_fn": {"shapes": 1.0}, "reward_urls": {"shapes": [url]}})
        config.rewards.qwenvl_url = url
    with pytest.raises(ValueError, match="reward_token_file") as error:
        servers.of(config)
    assert "sesame" not in str(error.value)
    with pytest.raises(ValueError, match="FLOW_GRPO_JUDGE_KEY") as error:
        loading.check("qwenvl", loading.settings(config), [], [])
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize("url", list(URLS)[:5])
def test_messages_do_not_say_it(url, monkeypatch, caplog):
    def fails(batch):
        raise OSError(f"{url} does not answer")

    with pytest.raises(SystemExit) as exit, user_errors():
        raise ValueError(f"config.x={url!r}: no")
    assert "sesame" not in str(exit.value)
    monkeypatch.setitem(REWARDS, "fails", fails)
    for masks in (False, True):
        scorer = Scorer({"fails": 1.0}, {}, masks=masks)
        with caplog.at_level(logging.WARNING):
            try:
                assert np.isnan(scorer.score(rows(pictures(1)))["fails"]).all()
            except RuntimeError as error:
                assert "sesame" not in str(error) and not masks
        scorer.close()
        assert "sesame" not in caplog.text + scorer.last_masked
    assert "masked" in caplog.text
    command = provenance.command(["train.py", f"--config.x={url}"], 1, run_name="a")
    assert "sesame" not in command and "--config.run_name=a" in command


@pytest.mark.parametrize("error", [RuntimeError, ValueError, ConnectionError])
def test_a_server_does_not_say_it_either(error, caplog):
    def fails(batch):
        raise error("http://me:sesame@host/?key=sesame does not answer")

    with serving.serve(fails) as server:
        answer = serving.post(server.url, serving.exact(serving.ONE))
    assert answer.status_code in (422, 500) and "does not answer" in answer.text
    assert "sesame" not in answer.text + caplog.text


def test_a_judge_that_fails_is_named_without_its_password():
    judge = Chat(f"http://me:sesame@127.0.0.1:{serving.free_port()}/v1?token=sesame", "m", 1, 0.5)
    with pytest.raises(ConnectionError) as error:
        judge.ask([(pictures(1), "?")])
    judge.close()
    assert "sesame" not in str(error.value) and "127.0.0.1" in str(error.value)


@pytest.mark.usefixtures("fresh_logs")
def test_no_file_of_a_run_has_it_and_the_run_goes_on(files, capsys, caplog):
    """In a key that may be any text, as a setting of one's own reward may."""
    secret = "http://me:sesame@host/?api_key=sesame"
    keys = {"run_name": "secret", "project_name": secret, "tracker": "tensorboard"}
    run = running.train(running.arguments(files, **keys))
    again = running.arguments(files, **keys, resume_from="latest", num_epochs=3)
    run = running.prepare(again)
    assert "goes on with" not in capsys.readouterr().out  # the same key is no difference
    assert entry.execute(run) == 0
    assert (output.table(run.folder), run.again) and "sesame" not in run.again
    paths = [path for path in run.folder.rglob("*") if path.is_file()]
    names = {path.name for path in paths}
    assert {"config.json", "trainer.json", "launches.json", "report.html", "run.json"} <= names
    assert not [path for path in paths if b"sesame" in path.read_bytes()]
    said = capsys.readouterr()
    assert "sesame" not in said.out + said.err + caplog.text


@pytest.mark.usefixtures("fresh_logs")
def test_a_run_says_what_it_goes_on_with(files, capsys):
    running.train(running.arguments(files, run_name="other"))
    again = {"resume_from": "latest", "num_epochs": 3, "train__adam_weight_decay": 0.5}
    capsys.readouterr()
    running.prepare(running.arguments(files, run_name="other", **again)).claim.release()
    told = [line for line in capsys.readouterr().out.splitlines() if "goes on with" in line]
    assert len(told) == 1 and "checkpoint-" in told[0]
    assert "config.train.adam_weight_decay=0.5 (was " in told[0] and "num_epochs" not in told[0]
