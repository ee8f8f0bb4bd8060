"""The handler of a prefill engine's control server: it grants claims and leases, and tells decode engines the load.

The control thread calls it (control/server.py), and shares the block pool with vLLM's scheduler thread. `lock` guards
the pool. The scheduler holds it while it schedules or frees, the control thread for the microseconds that a claim or a
lease takes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_adrenaline.control import messages
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill.leases import LeaseHolder, LeaseManager
from vllm_adrenaline.prefill.mappers import Mappers


@dataclass
class Lending:
    """The handler of a prefill engine's control server.

    Attributes:
        leases: the lease manager.
        lock: guards the block pool, and so the lease manager.
        make_welcome, make_load: return what this engine says of itself; the former to a holder with this name, the
            latter with the lock held.
        exports: how the KV cache of each worker is read, by rank.
        weights: its weights, by rank; None for one that does not share them.
        adjust_share: called at most twice a second.
        kill_executors: ends the executors that run under one of these process ids.
        revoke: returns when no executor can write for the named decode engine any more.
        mappers: who has the KV cache mapped.
        heartbeats: what each decode engine last said of itself, by its connection.
    """

    leases: LeaseManager
    lock: threading.RLock
    make_welcome: Callable[[str], messages.Welcome]
    make_load: Callable[[], messages.Load]
    adjust_share: Callable[[], None]
    kill_executors: Callable[[list[int]], None]
    revoke: Callable[[str], None]
    exports: Sequence[KVExport] = ()
    weights: Sequence[messages.SharedWeights | None] = ()
    mappers: Mappers = field(default_factory=Mappers)
    heartbeats: dict[bytes, messages.Heartbeat] = field(default_factory=dict)

    def welcome(self, peer: bytes | None) -> messages.Welcome:
        """Return what this engine says to a decode engine that fits. One that is to claim and lease joins by it."""
        if peer is None:
            return self.make_welcome("")
        with self.lock:
            member = self.leases.join(peer)
        return self.make_welcome(member)

    def tick(self) -> None:
        """Adjust the shares of prefill and decode."""
        self.adjust_share()

    def note_sign_of_life(self, peer: bytes) -> bool:
        """Note that a decode engine said something. Return False for one that we do not know, or not any more."""
        with self.lock:
            return self.leases.note_sign_of_life(peer)

    def silent(self) -> list[bytes]:
        """Return the decode engines that have been silent for a lease, and that cannot write here any more."""
        with self.lock:
            silent = [(peer, self.leases.holders[peer].member) for peer in self.leases.silent()]
        return [peer for peer, member in silent if not self.mappers.may_write(member)]

    def map(self, message: messages.Map, process: int) -> messages.Message:
        """Let a decode worker map the KV cache of a rank; return how it is read, or why not. `process`: its pidfd."""
        if message.rank >= len(self.exports):
            return messages.Refused(f"there is no rank {message.rank} here")
        if message.member:
            with self.lock:
                if not self.leases.is_member(message.member):
                    return messages.Refused("what the decode engine had here is not kept for it any more")
                try:
                    self.mappers.add(message.member, process)
                except AdrenalineError as error:
                    return messages.Refused(str(error))
        weights = self.weights[message.rank] if message.rank < len(self.weights) else None
        return messages.Mappable(self.exports[message.rank], weights)

    def leave(self, peer: bytes, engine: str) -> Callable[[], None] | None:
        """Forget a decode engine. Return a function that takes back its blocks; None if it has none."""
        self.heartbeats.pop(peer, None)
        with self.lock:
            known, left = self.leases.holders.get(peer), self.leases.leave(peer)
        if left is not None:
            return functools.partial(self._take_back, left, engine)
        if known is not None:
            self.mappers.forget(known.member)
        return None

    def _take_back(self, left: LeaseHolder, engine: str) -> None:
        """Wait until nobody can write for a decode engine that left, then take back its blocks."""
        self.revoke(engine)
        self.mappers.wait(left.member)
        with self.lock:
            self.leases.evict(left)

    def answer(self, peer: bytes, message: messages.AnyMessage) -> messages.Message | None:
        """Carry out a message; return the answer, None for a message that has none."""
        if isinstance(message, messages.KillExecutors):
            self.kill_executors(message.pids)
            return None
        with self.lock:
            return self._lend(peer, message)

    def _lend(self, peer: bytes, message: messages.AnyMessage) -> messages.Message | None:
        """Carry out a message that needs the lock, which is held; return the answer, if there is one."""
        leases = self.leases
        if isinstance(message, messages.Claim):
            offer = leases.claim(peer, message.request)
            if offer is None:
                return messages.ClaimRejected(message.request)
            blocks = [block.block_id for block in offer.blocks]
            return messages.Claimed(message.request, blocks, offer.num_tokens, offer.prompt_hash)
        if isinstance(message, messages.Lease):
            return messages.Leased(leases.lease(peer, message.want))
        if isinstance(message, messages.Drop):
            leases.drop(message.requests)
        if isinstance(message, messages.Release):
            leases.release(peer, message.requests, message.blocks)
        if isinstance(message, messages.LetGo):
            self.mappers.let_go(message.member)
        if isinstance(message, messages.Heartbeat):
            self.heartbeats[peer] = message
            return self.make_load()
        return None
