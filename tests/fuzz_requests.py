"""Hostile requests to a reward server, and hostile answers to its client and to a judge's.

    python tests/fuzz_requests.py --count 10000 --seed 0

Prints a markdown table of what came of them, with seconds and the server's peak memory, and then of
the dear inputs by name. Exit status 1 if anything came that was not promised: another status, a
score that is none, a crash, memory or keys that stay. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter  # of what is printed; nothing is decided by it

import hostile_answers
import hostile_requests
import numpy as np
import serving
from hostile_http import HEAD, draw
from hostile_requests import Case
from hostile_server import NAME, Server, server
from serving import Clock

from flow_grpo.reward_server.app import NUM_REMEMBERED, REMEMBERED_BYTES
from flow_grpo.rewards.judges.chat import Chat
from flow_grpo.rewards.remote.client import RemoteReward
from flow_grpo.rewards.remote.exchange import Refused
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

REFUSALS = {400, 401, 404, 405, 408, 409, 411, 413, 415, 422, 429}


def judged(case: Case, status: int, body: bytes) -> str:
    """Return what an answer is: right, refused, lost, or what is wrong with it."""
    if status == 0 and (case.raw is not None or case.then):
        return "lost"
    if status not in (case.must or {200, *REFUSALS}):
        return f"wrong: status {status}"
    if status != 200:
        return "refused"
    if case.scores is None:
        return "wrong: scored"
    found = json.loads(body)
    for wanted, score, error in zip(
        case.scores, found["scores"][NAME], found["errors"], strict=True
    ):
        missing = score is None and error
        if not (missing if wanted is None else score == wanted or (missing and not case.must)):
            return f"wrong: {score} instead of {wanted}"
    return "right"


def requests(at: Server, rng: random.Random, count: int) -> tuple[Counter, Counter]:
    """Send so many; return what came of them, and how many of each kind there were."""
    seen, kinds = Counter(), Counter()
    sent = 0
    while sent < count:
        kind, case = draw(rng)
        while case:
            status, body = at.send(case)
            outcome = judged(case, status, body)
            if outcome.startswith("wrong"):
                print(kind, outcome, status, body[:300], (case.raw or case.body)[:300])
            seen[outcome] += 1
            kinds[kind] += 1
            sent, case = sent + 1, case.again
    at.held.clear()
    serving.wait_until(at.rests)
    found = at.metrics()
    if found["reward_remembered_answers"] > NUM_REMEMBERED:
        seen["wrong: keys"] += 1
    if found["reward_remembered_bytes"] > REMEMBERED_BYTES:
        seen["wrong: bytes of answers"] += 1
    return seen, kinds


def answers(rng: random.Random, count: int) -> Counter:
    """Let a client and a judge's client ask servers that give hostile answers, half each."""
    seen, sent, clock = Counter(), [], Clock()

    def drawn(right: dict) -> Iterator[bytes]:
        while True:
            sent.append(hostile_answers.answer(rng, right))
            yield sent[-1]

    batch = serving.rows(serving.pictures(2))
    with hostile_answers.serving(drawn(hostile_answers.GOOD)) as url:
        with serving.client(url, timeout_s=20, clock=clock) as reward:
            for _ in range(count // 2):
                seen[_outcome(lambda: _right(reward(batch), sent[-1]), sent)] += 1
                clock.now += 10**6  # the circuit is closed again
                reward._open_until = 0.0
    passed = []
    with hostile_answers.serving(drawn(hostile_answers.SAID)) as url:
        judge = Chat(url, "m", 1, 20.0, lambda: sum(passed), passed.append)
        for _ in range(count - count // 2):
            ask = lambda: _said(judge.ask([(batch.images[:1], "?")]), sent[-1])  # noqa: E731
            seen[_outcome(ask, sent)] += 1
        judge.close()
    return seen


def _outcome(call: Callable[[], bool], sent: list[bytes]) -> str:
    try:
        right = call()
    except (Refused, SomeFailed, ConnectionError):
        return "refused"
    except Exception as error:
        print(repr(error)[:300], sent[-1][:300])
        return f"wrong: {type(error).__name__}"
    if not right:
        print("invented", sent[-1][:300])
    return "right" if right else "wrong: invented"


def _right(scores: dict[str, np.ndarray], answer: bytes) -> bool:
    if answer.startswith(b"HTTP/1.1 422"):
        return bool(np.isnan(scores["mean"]).all())
    given = json.loads(answer.rpartition(b"\r\n\r\n")[2])["scores"]["mean"]
    return np.array_equal(scores["mean"], np.array(given, float), equal_nan=True)


def _said(texts: list[str | None], answer: bytes) -> bool:
    given = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    return texts == [given["choices"][0]["message"]["content"]]


def maps(at: Server) -> None:
    """8 MiB of empty maps, wherever they may stand."""
    text = "[" + "{}," * (2**23 // 3) + "{}]"
    tensors, _, _ = hostile_requests.plain(random.Random(0))
    for rows in (f'{{"prompts": ["x"], "metadata": {text}}}', f'{{"prompts": {text}}}', text):
        assert at.send(Case(hostile_requests.request(tensors, rows)))[0] == 413
    assert at.send(Case(hostile_requests.headed(text)))[0] == 413


def admitted(at: Server) -> None:
    """Nearly as many values as a request may have."""
    tensors, _, _ = hostile_requests.plain(random.Random(0))
    first = {"image/0": tensors["image/0"]}
    text = f'{{"prompts": ["x"], "metadata": [{{"a": [{"{}," * 131_000}{{}}]}}]}}'
    case = Case(hostile_requests.request(first, text), [float(first["image/0"].mean())], (200,))
    assert judged(case, *at.send(case)) == "right"


def announcements(at: Server) -> None:
    """64 connections announce 256 MiB each and send a byte; others are served meanwhile."""
    lines = ["POST /score HTTP/1.1", *HEAD, f"content-length: {2**28}", "", "x"]
    for _ in range(64):
        at.ask("\r\n".join(lines).encode(), "waits")
    case = hostile_requests.good(random.Random(0))
    assert judged(case, *at.send(case)) == "right"


def lists() -> None:
    """60 MB of `[]` as an answer, to a reward's client or a judge's."""
    answer = hostile_answers.http(b"[" + b"[]," * 20_000_000 + b"[]]")
    batch = serving.rows(serving.pictures(2))
    with hostile_answers.serving(iter(lambda: answer, 0)) as url:
        reward = RemoteReward("mean", Servers({"mean": [url]}, 3.0))
        judge = Chat(url, "m", 1, 3.0)
        for call in (lambda: reward(batch), lambda: judge.ask([(batch.images[:1], "?")])):
            try:
                call()
            except (Refused, ConnectionError):
                continue
            raise AssertionError("it was taken for an answer")
        reward.close()
        judge.close()


def row(what: str, seen: Counter, seconds: float, mib: str) -> str:
    wrong = sum(count for name, count in seen.items() if name.startswith("wrong"))
    cells = (what, seen.total(), seen["right"], seen["refused"], seen["lost"], wrong)
    return f"| {' | '.join(map(str, cells))} | {seconds:.1f} | {mib} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=10_000, help="requests; a tenth as many answers"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv[1:])
    rng, rows = random.Random(args.seed), []
    num_answers = args.count // 10
    with server() as at:
        requests(at, random.Random(-1), 50)  # what it needs to be warm
        before, start = at.mib("VmRSS"), perf_counter()
        seen, kinds = requests(at, rng, args.count)
        grown = f"{at.mib('VmHWM'):.0f} peak, {before:.0f} before, {at.mib('VmRSS'):.0f} after"
        rows.append(row("hostile requests", seen, perf_counter() - start, grown))
    print(dict(kinds), dict(seen))
    start = perf_counter()
    to_clients = answers(rng, num_answers)
    rows.append(row("hostile answers", to_clients, perf_counter() - start, "-"))
    for name, case, seen_ in (
        ("8 MiB of empty maps, four times", maps, Counter(refused=4)),
        ("131,000 empty maps, as many as are let in", admitted, Counter(right=1)),
        (
            "64 announcements of 256 MiB, and a good request",
            announcements,
            Counter(right=1, lost=64),
        ),
    ):
        with server() as at:
            requests(at, random.Random(-1), 50)
            before, start = at.mib("VmRSS"), perf_counter()
            case(at)
            seconds, peak = perf_counter() - start, at.mib("VmHWM")
            rows.append(row(name, seen_, seconds, f"{peak:.0f} peak, {before:.0f} before"))
    start = perf_counter()
    lists()
    name, seconds = "60 MB of `[]` to a client and to a judge", perf_counter() - start
    rows.append(row(name, Counter(refused=2), seconds, "-"))
    print("| what | number | scored, rightly | refused | no answer | wrong | s | MiB |")
    print("|---|---|---|---|---|---|---|---|", *rows, sep="\n")
    both = seen + to_clients
    return int(any(name.startswith("wrong") for name in both))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
