"""A simulated request, and what its work costs. Times are seconds, memory is blocks."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_adrenaline.placement.batch import Progress
from vllm_adrenaline.placement.costs import Costs, Seconds
from vllm_adrenaline.placement.policy import Decision
from vllm_adrenaline.system.arithmetic import neighbours, on_line


@dataclass(eq=False)
class Row:
    """One request on its way through a prefill and a decode engine.

    Attributes:
        arrived: When it arrived (seconds).
        prompt: Tokens of its prompt.
        output: Tokens that it generates.
        prefill: Number of its prefill engine, and of the executor beside that.
        decode: Number of its decode engine.
        made: Tokens that it has generated.
        where: The prefill engine in whose memory its KV stays; None for the decode engine's.
        is_mapped: Whether the decode engine attends it there.
        blocks: Blocks that it holds: of the decode engine if its KV is there, else of the prefill engine.
        computed: Tokens of its prompt that its prefill engine has computed.
        own: Tokens that its decode engine computes itself, and has not computed yet.
        stays: Whether the prefill engine decodes it.
        is_handed_over: Whether the decode engine computes its prompt.
        recompute: Whether its KV is lost.
        moving: Whether it was offloaded and waits for local blocks.
        decision: Why it may take local memory, if it may.
        waited: Whether it was counted as one that has to wait.
        starved_since: Since when it lacks a block to grow into (seconds).
        first_at: When it had its first token (seconds).
        last_at: When it had its last token so far (seconds).
    """

    arrived: float
    prompt: int
    output: int
    prefill: int
    decode: int
    made: int = 0
    where: int | None = None
    is_mapped: bool = False
    blocks: int = 0
    computed: int = 0
    own: int = 0
    stays: bool = False
    is_handed_over: bool = False
    recompute: bool = False
    moving: bool = False
    decision: Decision | None = None
    waited: bool = False
    starved_since: float | None = None
    first_at: float = 0.0
    last_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of its context so far."""
        return self.prompt + self.made

    # What admission asks (placement/admission.py, Pending)

    @property
    def executor(self) -> int:
        """Number of the executor beside its prompt."""
        return self.prefill

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.prompt, self.made, self.output)

    @property
    def only_local(self) -> None:
        """No simulated request refuses cached KV, and no simulated prompt ends early."""


@dataclass
class Model:
    """What things cost. `costs`: the truth about decode steps; `overhead`, `row_overhead`: of the engine and its API
    around each step and each row of it; `prefill`: prompts by tokens; `pull`: seconds per token of moving KV; `shared`:
    whether executors run on their prefill engine's cores; `batch_tokens`: prompts computed together; `prefill_costs`:
    of decode steps on a prefill engine, None for those of a decode engine."""

    costs: Costs
    prefill: list[tuple[int, Seconds]]
    overhead: float = 0.0
    row_overhead: float = 0.0
    pull: float = 0.0
    shared: bool = True
    batch_tokens: int = 2048
    prefill_costs: Costs | None = None

    def prompt_seconds(self, tokens: int) -> float:
        """Return the seconds to compute a prompt: between measured sizes, and beyond them, on a line."""
        points = self.prefill
        if len(points) == 1:
            return points[0][1] * tokens / points[0][0]
        return max(on_line(*neighbours(points, tokens), tokens), 1e-6)

    def rest_seconds(self, begin: int, end: int) -> float:
        """Return the seconds to compute a prompt up to the token `end` of which `begin` are computed."""
        return self.prompt_seconds(end) - (self.prompt_seconds(begin) if begin else 0.0)
