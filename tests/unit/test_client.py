"""The client of benchmarks and the demonstration, before a server that answers as it is told."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.load import Request


class Server(http.server.ThreadingHTTPServer):
    """Remembers what it was asked; `status` and `events` are its answer."""

    status = 200
    events: tuple[dict[str, Any], ...] = (
        {"choices": [{"token_ids": [7]}]},
        {"choices": [{"token_ids": None}]},
        {"choices": [{"token_ids": [8, 9]}]},
        {"choices": []},
    )

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that left."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.times.append(time.monotonic())
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, args=[0.01], daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_completions_and_chats_are_asked_for_exact_greedy_tokens(server: Server) -> None:
    client.send(server.url, "m", [Request(0.0, [1, 2], 3), Request(0.05, "hello", 3, chat=True)])
    common = {"model": "m", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    common["return_token_ids"] = True
    assert server.seen == [
        ("/v1/completions", {"prompt": [1, 2]} | common),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]} | common),
    ]


def test_every_token_has_its_time_and_is_told_as_it_comes(server: Server) -> None:
    told: list[int] = []
    (answer,) = client.send(server.url, "m", [Request(0.1, "x", 3)], told.append)
    assert answer.tokens == [7, 8, 9]
    assert told == [1, 2]
    assert 0.1 <= answer.sent <= answer.times[0] <= answer.times[1] == answer.times[2]


def test_a_request_is_sent_when_it_is_due_and_answers_keep_the_order(server: Server) -> None:
    late, early = client.send(server.url, "m", [Request(0.3, "late", 3), Request(0.0, "early", 3)])
    assert [body["prompt"] for _, body in server.seen] == ["early", "late"]
    assert server.times[1] - server.times[0] > 0.2
    assert late.sent > early.times[-1]


@pytest.mark.parametrize(
    ("status", "events", "said"),
    [
        (503, ({"error": "full"},), "/v1/completions answered 503: data: .*full"),
        (200, ({"error": {"message": "lost"}},), "/v1/completions: .*lost"),
        (200, ({"choices": [{"token_ids": [1]}]},), "/v1/completions sent 1 tokens instead of 3"),
    ],
)
def test_a_bad_answer_is_one_error(server: Server, status: int, events: tuple[dict[str, Any], ...], said: str) -> None:
    server.status, server.events = status, events
    with pytest.raises(AdrenalineError, match=f"^{server.url}{said}"):
        client.send(server.url, "m", [Request(0.0, "x", 3)] * 2)


def test_a_server_that_is_not_there_or_says_nothing_is_one_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{reserve_ports(1)[0]}"
    with pytest.raises(AdrenalineError, match=f"^{nobody} does not answer: "):
        client.send(nobody, "m", [Request(0.0, "x", 3)])
    monkeypatch.setattr(Handler, "do_POST", lambda self: time.sleep(1))
    with pytest.raises(AdrenalineError, match=f"^{server.url} does not answer: "):
        client.send(server.url, "m", [Request(0.0, "x", 3)], silence_s=0.1)
