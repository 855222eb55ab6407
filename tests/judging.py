"""An endpoint of this process that speaks the chat protocol of OpenAI, which rewards ask."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
from PIL import Image

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges import chat

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


@contextmanager
def asking(monkeypatch) -> Iterator[Callable]:
    """Yield ask(reward, reply, count=.., **settings) -> (columns, endpoint)."""
    monkeypatch.setattr(chat, "BACKOFF_S", 0.01)
    endpoints = []

    def run(name, reply, count=1, group=None, **changes):
        endpoint = Endpoint(reply)
        endpoints.append(endpoint)
        urls = {f"{name}_url": endpoint.url for name in ("unifiedreward", "qwenvl", "vlm")}
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
