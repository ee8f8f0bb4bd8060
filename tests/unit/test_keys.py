"""Keys of the control plane: who has none, or the wrong one, gets no answer; loopback and ipc need none."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import keys as curve
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.errors import AdrenalineError

KEY = "ab" * 32
PATIENCE_S = 0.7
"""How long an answer is waited for that does not come."""


def make(folder: Path, name: str, allowed: list[str] | None = None) -> Keys:
    """Keys of an engine that lets these public keys in."""
    curve.generate(folder / name)
    allow = folder / f"{name}.allow"
    allow.write_text("# who may come in\n\n" + "".join(f"{key}  a decode engine\n" for key in allowed or []))
    return Keys.load(str(folder / name), str(allow))


class Echo(threading.Thread):
    """A prefill engine of which only the socket is there. `heard` is how many messages reached it."""

    def __init__(self, address: str, keys: Keys | None) -> None:
        super().__init__(daemon=True)
        self.socket, self.address = sockets.bind(address, keys)
        self.heard = 0
        self.done = False

    def run(self) -> None:
        while not self.done:
            if self.socket.poll(20) and (received := sockets.receive(self.socket)):
                self.heard += 1
                sockets.answer(self.socket, received[0], messages.Load(total=7))
        sockets.unbind(self.socket, self.address)

    def __enter__(self) -> Echo:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.join()


@pytest.fixture
def decode(tmp_path: Path) -> Keys:
    """A decode engine that is let in."""
    return make(tmp_path, "decode")


@pytest.fixture
def prefill(tmp_path: Path, decode: Keys) -> Iterator[Echo]:
    """A prefill engine that lets `decode` in."""
    with Echo("tcp://127.0.0.1:*", make(tmp_path, "prefill", [decode.public.hex()])) as echo:
        yield echo


def ask(address: str, keys: Keys | None = None, patience_s: float = PATIENCE_S) -> messages.AnyMessage | None:
    return sockets.ask_once(address, messages.Heartbeat(), patience_s, keys)


def test_who_is_in_the_allow_list_is_answered(prefill: Echo, decode: Keys) -> None:
    assert ask(prefill.address, decode, 10) == messages.Load(total=7)


def test_an_engine_talks_to_its_own_executors(tmp_path: Path) -> None:
    own = make(tmp_path, "own")
    with Echo("tcp://127.0.0.1:*", own) as executor:
        assert ask(executor.address, own, 10) == messages.Load(total=7)


def test_who_is_not_in_the_allow_list_gets_no_answer(prefill: Echo, tmp_path: Path, decode: Keys) -> None:
    assert ask(prefill.address, make(tmp_path, "stranger")) is None
    assert prefill.heard == 0
    assert ask(prefill.address, decode, 10) is not None, "others are served as before"


def test_who_has_no_key_gets_no_answer(prefill: Echo) -> None:
    plain = f"tcp://{prefill.address.partition('@')[2]}"
    assert ask(plain) is None
    assert prefill.heard == 0
    with pytest.raises(AdrenalineError, match="--adrenaline-key"):
        ask(prefill.address)


def test_a_prefill_engine_with_another_key_than_its_address_says_is_not_talked_to(prefill: Echo, decode: Keys) -> None:
    wrong = f"tcp://{decode.public.hex()}@{prefill.address.partition('@')[2]}"
    assert ask(wrong, decode) is None
    assert prefill.heard == 0


class Relay(threading.Thread):
    """What lies between two hosts: it passes on what it gets, and keeps what it saw, and what the near end said."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.listener, self.port, self.seen = socket.create_server(("127.0.0.1", 0)), port, bytearray()
        self.near_said = bytearray()

    def run(self) -> None:
        with (
            self.listener,
            self.listener.accept()[0] as near,
            socket.create_connection(("127.0.0.1", self.port)) as far,
        ):
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    if not (data := ready.recv(65536)):
                        return
                    self.seen += data
                    if ready is near:
                        self.near_said += data
                    (far if ready is near else near).sendall(data)


@pytest.mark.parametrize("has_keys", [True, False])
def test_with_keys_nothing_can_be_read_on_the_way(tmp_path: Path, decode: Keys, has_keys: bool) -> None:
    secret = messages.Claim("the-prompt-of-somebody")
    with Echo("tcp://127.0.0.1:*", make(tmp_path, "p", [decode.public.hex()]) if has_keys else None) as echo:
        key, _, port = echo.address.rpartition(":")
        relay = Relay(int(port))
        relay.start()
        address = f"{key}:{relay.listener.getsockname()[1]}"
        assert sockets.ask_once(address, secret, 10, decode) == messages.Load(total=7)
        assert (secret.request.encode() in relay.seen) != has_keys


@pytest.mark.parametrize("address", ["ipc://{}/p", "tcp://127.0.0.1:*"])
def test_without_keys_this_host_is_talked_to_as_before(tmp_path: Path, address: str) -> None:
    with Echo(address.format(tmp_path), None) as echo:
        assert "@" not in echo.address
        assert ask(echo.address, patience_s=10) == messages.Load(total=7)


def test_an_ipc_socket_needs_no_key_of_an_engine_that_has_some(tmp_path: Path, decode: Keys) -> None:
    with Echo(f"ipc://{tmp_path}/p", decode) as echo:
        assert ask(echo.address, patience_s=10) == messages.Load(total=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "prefill", "listen": "tcp://10.0.0.1:5"}, "--adrenaline-key and --adrenaline-allow"),
        ({"role": "prefill", "listen": "tcp://10.0.0.1:5", "key": "k"}, "go together"),
        ({"role": "prefill", "listen": f"tcp://{KEY}@10.0.0.1:5", "key": "k", "allow": "a"}, "no key in its address"),
        ({"role": "prefill", "listen": "tcp://0.0.0.0:5", "key": "k", "allow": "a"}, "every interface"),
        ({"role": "prefill", "listen": "tcp://0.0.0.0:5", "insecure": True}, "every interface"),
        ({"role": "decode", "peers": "tcp://10.0.0.1:5"}, "tcp://KEY@host:port"),
        ({"role": "decode", "peers": "tcp://10.0.0.1:5", "key": "k"}, "tcp://KEY@host:port"),
        ({"role": "decode", "peers": f"tcp://{KEY}@10.0.0.1:5"}, "wants to know our key"),
        ({"role": "decode", "peers": "tcp://abc@10.0.0.1:5", "key": "k"}, "is no key"),
        ({"role": "decode", "peers": "tcp://10.0.0.1:5", "key": "k", "insecure": True}, "exclude each other"),
        ({"role": "decode", "allow": "a"}, "of no use"),
    ],
)
def test_another_host_is_talked_to_with_keys_only(values: dict[str, object], message: str) -> None:
    with pytest.raises(AdrenalineError, match=message):
        Options.parse(values)


@pytest.mark.parametrize(
    "values",
    [
        {"role": "prefill", "listen": "tcp://10.0.0.1:5", "key": "k", "allow": "a"},
        {"role": "prefill", "listen": "tcp://10.0.0.1:5", "insecure": True},
        {"role": "prefill", "listen": "tcp://127.0.0.1:5"},
        {"role": "decode", "peers": f"tcp://{KEY}@10.0.0.1:5,ipc:///p", "key": "k"},
        {"role": "decode", "peers": "tcp://10.0.0.1:5", "insecure": True},
    ],
)
def test_with_keys_or_on_the_operators_word_it_is(values: dict[str, object]) -> None:
    Options.parse(values)


def test_a_key_file_is_for_its_owner_only_and_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    assert cli.main(["keygen", str(file)]) == 0
    printed = capsys.readouterr().out.strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert Keys.load(str(file)).public.hex() == printed
    assert printed not in file.read_text()
    assert cli.main(["keygen", str(file)]) == 1
    assert "is there already" in capsys.readouterr().err
    file.chmod(0o640)
    with pytest.raises(AdrenalineError, match="chmod 600"):
        Keys.load(str(file))


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, KEY + "00", " " * 64, "\N{FULLWIDTH DIGIT ONE}" * 64])
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(AdrenalineError, match="the file is no key") as error:
        curve.parse(text, "the file")
    assert not text.strip() or text not in str(error.value)


def test_a_wrong_line_of_an_allow_list_is_named(tmp_path: Path) -> None:
    curve.generate(tmp_path / "key")
    (tmp_path / "allow").write_text(f"{KEY} one\nabc two\n")
    with pytest.raises(AdrenalineError, match=r"line 2 of .*allow is no key"):
        Keys.load(str(tmp_path / "key"), str(tmp_path / "allow"))
