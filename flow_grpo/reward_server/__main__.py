"""Serve one reward over HTTP.

    python -m flow_grpo.reward_server --reward pickscore --port 18085

GET /health and /metrics, POST /score, and /openapi.json, which describes them; docs/rewards.md says
how a run uses it. Only this machine can reach it unless --host says otherwise, and that needs
--token-file. SIGTERM lets it finish what it has taken in.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flow_grpo.cli import user_errors
from flow_grpo.reward_server.batcher import Batcher
from flow_grpo.rewards import loading, options
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.remote import servers

if TYPE_CHECKING:
    from flow_grpo.reward_server.app import Limits

OPTIONS = (  # name, type, default, least, most, meaning
    ("batch-size", int, 64, 1, 65536, "images of a scorer's call"),
    ("linger-ms", float, 5.0, 0, 10_000, "how long a call that is not full waits for more"),
    ("timeout", float, 600.0, 1, 86_400, "seconds of a request, and of a scorer's call"),
    ("body-timeout", float, 30.0, 0.1, 86_400, "seconds for a body; longer at 256 KiB/s"),
    ("idle-timeout", float, 60.0, 1, 86_400, "seconds of a connection without a request's head"),
    ("max-connections", int, 4096, 1, 65536, "then those end that have no request"),
    ("max-body-mib", int, 256, 1, 65536, "of a request"),
    ("max-pixels", int, 2**27, 1, 2**40, "of a request"),
    ("max-items", int, 4096, 1, 2**20, "images of a request"),
    ("max-values", int, 2**18, 16, 2**24, "commas and opening brackets of a request's JSON"),
    ("max-queue", int, 256, 1, 65536, "requests that wait or are scored"),
    ("max-queue-mib", int, 1024, 1, 2**20, "that all requests hold in memory"),
)


def main(argv: list[str]) -> None:
    """Load the reward, then serve until SIGTERM or SIGINT; leave with 1 at a mistake."""
    args = _parser().parse_args(argv)
    with user_errors():
        token = servers.read_token(args.token_file, "--token-file") if args.token_file else ""
        if not token and not _is_loopback(args.host):
            raise ValueError(
                f"--host={args.host} lets other machines in, so --token-file is needed: a file "
                f"with a line of at least {servers.MIN_TOKEN} characters that the clients have too."
            )
        serve(args, token)
    sys.exit(0)


def serve(args: argparse.Namespace, token: str) -> None:
    """Load and serve. Raises ValueError for a reward or a setting that is not there."""
    try:
        import uvicorn

        from flow_grpo.reward_server import connections
        from flow_grpo.reward_server.app import create_app
    except ImportError as error:
        raise ValueError(
            f"a reward server needs the package {error.name}: pip install 'flow_grpo[server]'."
        ) from None
    settings = options.settings(args.set, [args.reward])
    loading.check(args.reward, settings, [], [])
    device = args.device or options.device([args.reward])
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # wire.py has its own limit
    scorer = Scorer({args.reward: 1.0}, settings, device)

    def score(batch: Batch) -> dict[str, np.ndarray]:
        try:
            found = scorer.score(batch)
        except RuntimeError as error:  # the scorer's own says more of whose fault it is
            raise error.__cause__ or error from None
        return {name: values for name, values in found.items() if name != "avg"}

    batcher = Batcher(score, args.batch_size, args.linger_ms / 1000)
    compares = loading.find(args.reward).needs_groups
    app = create_app(args.reward, batcher, _limits(args), token, compares)
    # uvicorn repeats the signal that ended it once it has shut down; that is to change nothing.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **keywords: Any) -> None:
            await super().startup(*arguments, **keywords)
            for socket in (each for server in self.servers for each in server.sockets):
                host, port = socket.getsockname()[:2]
                url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                print(f"{args.reward} is served at {url}", flush=True)

    config = connections.config(
        app,
        args.idle_timeout,
        connections.room_for(args.max_connections),
        host=args.host,
        port=args.port,
        log_level="error",  # what strangers send fills no log
        timeout_graceful_shutdown=int(args.timeout) + 1,
    )
    Server(config).run()
    scorer.close()


def _limits(args: argparse.Namespace) -> Limits:
    from flow_grpo.reward_server.app import Limits

    mib = 2**20
    return Limits(
        body_bytes=args.max_body_mib * mib,
        queue_bytes=max(args.max_queue_mib, args.max_body_mib) * mib,
        pixels=args.max_pixels,
        items=args.max_items,
        queue=args.max_queue,
        timeout_s=args.timeout,
        values=args.max_values,
        body_s=args.body_timeout,
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _within(kind: type, least: float, most: float) -> Callable[[str], float]:
    """Return what reads a number of an option."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r:.40}: a number from {least} to {most} is needed"
            )
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flow_grpo.reward_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reward", required=True, help="a name, or one's own module:function")
    parser.add_argument("--port", type=_within(int, 0, 65535), required=True, help="0: a free one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--token-file",
        type=os.path.expanduser,
        help="its line is what clients send as bearer token",
    )
    parser.add_argument("--device", default="", help="cpu | cuda | cuda:N; default: a GPU if any")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of config.rewards"
    )
    for name, kind, default, least, most, meaning in OPTIONS:
        told = f"{meaning}; {least} to {most}, default {default}"
        parser.add_argument(
            f"--{name}", type=_within(kind, least, most), default=default, help=told
        )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
