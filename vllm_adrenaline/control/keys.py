"""CURVE keys of the control plane: a key file, the public keys that are let in, and the check of who connects.

All keys are written as 64 hexadecimal digits. `adrenaline keygen` makes a key file; the public key belongs into the
allow-lists of the prefill engines, and into the addresses by which decode engines name a prefill engine.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth.thread
import zmq.utils.z85

from vllm_adrenaline.errors import AdrenalineError

logger = logging.getLogger("vllm.adrenaline")

DIGITS = 64
"""Hexadecimal digits of a key."""


def parse(text: str, where: str) -> bytes:
    """Return the 32 bytes of a key. Raises AdrenalineError, naming `where`, if the text is none. It is not repeated."""
    try:
        key = bytes.fromhex(text) if len(text) == DIGITS and text.isascii() and text.isalnum() else b""
    except ValueError:
        key = b""
    if len(key) != DIGITS // 2:
        raise AdrenalineError(
            f"{where} is no key: {DIGITS} hexadecimal digits are wanted, as `adrenaline keygen` prints"
        )
    return key


@dataclass(frozen=True, repr=False)
class Keys:
    """The key pair of an engine, and whom it lets in.

    Attributes:
        secret, public: 32 bytes each.
        allowed: public keys of those that may connect. Our own is one of them: an engine talks to its own executors.
    """

    secret: bytes
    public: bytes
    allowed: frozenset[bytes]

    @classmethod
    def load(cls, key_file: str, allow_file: str = "") -> Keys:
        """Read a key file and an allow-list: a public key in each line, then what anybody wants to say of it.

        Raises:
            AdrenalineError: a file cannot be read, is no such file, or others may read the key file.
        """
        try:
            others = os.stat(key_file).st_mode & 0o077
            text, lines = Path(key_file).read_text(), Path(allow_file).read_text().splitlines() if allow_file else []
        except (OSError, ValueError) as error:
            raise AdrenalineError(f"cannot read a key: {error}") from None
        if others:
            raise AdrenalineError(f"others may read the secret key in {key_file}: chmod 600 {key_file}")
        secret = parse(text.strip(), f"what is in {key_file}")
        public = public_of(secret)
        allowed = [
            parse(words[0], f"line {number} of {allow_file}")
            for number, line in enumerate(lines, 1)
            if (words := line.split()) and not line.startswith("#")
        ]
        return cls(secret, public, frozenset([public, *allowed]))


def public_of(secret: bytes) -> bytes:
    """Return the public key of a secret one, 32 bytes each."""
    return zmq.utils.z85.decode(zmq.curve_public(zmq.utils.z85.encode(secret)))


def generate(path: Path) -> str:
    """Write a new secret key into a file that only its owner may read. Return the public key, in digits.

    Raises:
        AdrenalineError: the file is there already, or cannot be written.
    """
    _, secret = zmq.curve_keypair()
    key = zmq.utils.z85.decode(secret)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{key.hex()}\n")
    except FileExistsError:
        raise AdrenalineError(f"{path} is there already, and may be in use: choose another file") from None
    except OSError as error:
        raise AdrenalineError(f"cannot write a key: {error}") from None
    return public_of(key).hex()


class _Allowed:
    """Says to ZMQ whether a key may connect."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        """Answer for a key as ZMQ writes it."""
        public = zmq.utils.z85.decode(key)
        if public not in self._keys.allowed:
            logger.warning("somebody with the key %s wants to connect, and is not in the allow-list", public.hex())
        return public in self._keys.allowed


_lock = threading.Lock()
_authenticator: zmq.auth.thread.ThreadAuthenticator | None = None


def guard(socket: zmq.Socket[bytes], keys: Keys) -> None:
    """Let only those connect to a socket that prove one of the allowed keys. To be called before it is bound."""
    global _authenticator
    with _lock:
        if _authenticator is None:  # one a process: ZMQ asks at one address
            _authenticator = zmq.auth.thread.ThreadAuthenticator(zmq.Context.instance())
            _authenticator.start()
        domain = os.urandom(8).hex()
        _authenticator.configure_curve_callback(domain, _Allowed(keys))
    socket.curve_server = True
    socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
    socket.zap_domain = domain.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # should nobody answer for the domain, nobody comes in


def prove(socket: zmq.Socket[bytes], keys: Keys, server: bytes) -> None:
    """Have a socket prove our key to whoever it connects to, and demand the key `server` there."""
    socket.curve_secretkey, socket.curve_publickey, socket.curve_serverkey = keys.secret, keys.public, server
