"""The options of an engine, each described once, here. The help of `vllm serve` and all processes read them.

They travel inside vLLM's `additional_config["adrenaline"]`, and so reach every process of an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from vllm_adrenaline.control import addresses
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import cores

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLUGIN = "adrenaline"
"""The value of `--plugin` that turns this plugin on, and the key of its options in `additional_config`."""
FLAG_PREFIX = "--adrenaline-"


def _option(description: str, metavar: str | None = None, **bounds: Any) -> msgspec.Meta:
    """Return the description of an option. One that begins with a role is of no use to the other role."""
    role = next((role for role in ("prefill", "decode") if description.startswith(f"{role.title()} engine:")), None)
    return msgspec.Meta(description=description, extra={"metavar": metavar, "role": role}, **bounds)


def ratio_of(flag: str, value: str | float) -> float | None:
    """Return a share of the requests, 0 to 1, None for `auto`. Raises AdrenalineError, naming `flag`, for the rest."""
    try:
        ratio = None if value == "auto" else float(value)
    except ValueError:
        ratio = -1.0
    if ratio is not None and not 0 <= ratio <= 1:
        raise AdrenalineError(f"{flag} is {value}; it is auto, or a share of the requests, from 0 to 1")
    return ratio


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All options of one engine. Field names are flag names: `offload_ratio` is `--adrenaline-offload-ratio`."""

    role: Annotated[
        Literal["prefill", "decode"],
        _option(
            "What this engine does: `prefill` computes prompts and runs the attention executors, `decode` decodes."
        ),
    ]
    listen: Annotated[
        str,
        _option(
            "Prefill engine: control address to listen at, ipc:///absolute/path or tcp://host:port. Beyond loopback it "
            "wants --adrenaline-key and --adrenaline-allow. Default: an ipc path in the temporary folder, the same for "
            "all engines of one user.",
            "ADDRESS",
        ),
    ] = ""
    peers: Annotated[
        str,
        _option(
            "Decode engine: control addresses of the prefill engines, separated by commas. Of one with a key: "
            "tcp://KEY@host:port, with its public key. Default: the default of --adrenaline-listen.",
            "ADDRESS[,ADDRESS...]",
        ),
    ] = ""
    key: Annotated[
        str,
        _option(
            "File with this engine's secret key, made by `adrenaline keygen`. Control messages over TCP are then "
            "encrypted, and both sides prove who they are.",
            "FILE",
        ),
    ] = ""
    allow: Annotated[
        str,
        _option(
            "Prefill engine: file with the public keys of the decode engines that may connect, one a line.",
            "FILE",
        ),
    ] = ""
    insecure: Annotated[
        bool,
        _option(
            "Let control addresses be on other hosts without keys. Whoever reaches this network can then read, write "
            "and end what is served."
        ),
    ] = False
    interface: Annotated[
        str,
        _option(
            "Network interface, like eth1, over which engines on other hosts exchange KV cache, and attention with "
            "--adrenaline-pool remote. What listens there knows no keys: it is to be a network of the engines alone. "
            "Default: loopback, and so engines on this host only.",
            "NAME",
        ),
    ] = ""
    experimental_cuda: Annotated[
        bool,
        _option(
            "Serve on CUDA, which is refused otherwise: no engine has run on a GPU. The way to executors has, without "
            "vLLM (docs/gpu-status.md). Of no use on CPU, where it is refused."
        ),
    ] = False
    pool: Annotated[
        Literal["remote", "mapped", "both"],
        _option(
            "How KV cache that stays with a prefill engine is attended. `remote`: by its attention executors. "
            "`mapped`: by the decode engine itself, which maps the prefill engine's memory; both run on one device, "
            "and nothing is sent or moved. `both`: decided for each request. A prefill engine with `mapped` starts no "
            "executors. Default: remote."
        ),
    ] = "remote"
    share_weights: Annotated[
        Literal["auto", "on", "off"],
        _option(
            "Whether engines with the same model keep one copy of its weights in memory. A prefill engine offers its "
            "own; a decode engine compares them with what it has loaded, and maps those that are equal. `auto`: a "
            "decode engine does so with --adrenaline-pool mapped or both, and neither side does where steps would get "
            "much slower: weights in huge pages, another NUMA node. Elsewhere steps of several requests take a little "
            "longer (docs/performance.md). Default: off."
        ),
    ] = "off"
    offload_ratio: Annotated[
        str,
        _option(
            "Decode engine: `auto` decides by load which requests keep their KV cache on the prefill engine, where "
            "their decode attention runs then. Or a fixed share of requests, 0: all local (plain disaggregation), "
            "to 1: all offloaded.",
            "auto|RATIO",
        ),
    ] = "auto"
    offload_rule: Annotated[
        Literal["or", "and", "c1", "c2"],
        _option(
            "Decode engine: which of the paper's conditions permits offloading: c1 (within the bound even at the "
            "request's greatest length), c2 (at present lengths and batch sizes), one of them, or both. Default: or."
        ),
    ] = "or"
    tpot_slo_ms: Annotated[
        float,
        _option(
            "Time per output token that is to be met. Decode engine: bounds the batch that offloading may make. "
            "Prefill engine: decode gets more of its device when it is violated: its executors, or with "
            "--adrenaline-pool mapped the decode engine. 0: none.",
            "MILLISECONDS",
            ge=0,
            le=1e6,
        ),
    ] = 0.0
    elastic: Annotated[
        Literal["off", "prompts", "decodes", "both"],
        _option(
            "Which engine may do the other's work when it has the time. `prompts`: decode engines compute prompts, in "
            "chunks beside their decodes, when the prefill engine would be later. `decodes`: the prefill engine "
            "decodes requests when decode engines are full or have more to do. That works behind `adrenaline up` and "
            "`adrenaline proxy`, not behind other routers. Give all engines the same value, or nothing moves. Default: "
            "off."
        ),
    ] = "off"
    profile: Annotated[
        str,
        _option(
            "Decode engine: JSON file with the costs of a step, to be used instead of measuring them at start-up. "
            "Default: measured once per model, machine and vLLM version, kept in ~/.cache/vllm-adrenaline/profiles.",
            "FILE",
        ),
    ] = ""
    lease_seconds: Annotated[
        float,
        _option(
            "Prefill engine: take back what a decode engine has claimed and was lent when it is silent for so long. "
            "One that has this engine's memory mapped keeps it until it ends.",
            "SECONDS",
            ge=6,
            le=3600,
        ),
    ] = 60.0
    claim_seconds: Annotated[
        float,
        _option(
            "Prefill engine: let a finished prompt go when no decode engine has claimed it for so long. They claim a "
            "prompt as soon as its request reaches them.",
            "SECONDS",
            ge=1,
            le=3600,
        ),
    ] = 20.0
    prefill_reserve: Annotated[
        float,
        _option("Prefill engine: share of its KV blocks that is never lent for growing requests.", "SHARE", ge=0, le=1),
    ] = 0.05
    growth_reserve: Annotated[
        float,
        _option(
            "Prefill engine: share of its KV blocks that new prompts leave free for offloaded requests to grow into, "
            "as long as decode engines have prompts to fetch or to release.",
            "SHARE",
            ge=0,
            le=0.9,
        ),
    ] = 0.2
    executor_cores: Annotated[
        str,
        _option(
            "Prefill engine: cores of its attention executors, like 2-3 or 2,4; ranks of a tensor-parallel engine "
            "separated by |. Default: the cores of the prefill workers.",
            "CORES[|CORES...]",
        ),
    ] = ""
    executor_threads: Annotated[
        int,
        _option(
            "Prefill engine: threads of each attention executor. 0: as many as it has cores with "
            "--adrenaline-executor-cores, else as many as its prefill worker.",
            "COUNT",
            ge=0,
            le=1024,
        ),
    ] = 0
    executor_share: Annotated[
        float,
        _option(
            "Prefill engine: what its attention executors get of their device when the prefill engine wants it too. On "
            "CPU: so many of the prefill workers' cores, and of a core that both use, so much time; 1 is real-time "
            "priority. On CUDA: so many of the GPU's multiprocessors, at most. With --adrenaline-ttft-slo-ms or "
            "--adrenaline-tpot-slo-ms it is where the controller begins.",
            "SHARE",
            ge=0.05,
            le=1,
        ),
    ] = 1.0
    ttft_slo_ms: Annotated[
        float,
        _option(
            "Prefill engine: time to first token that is to be met; prefill gets more of its device when it is "
            "violated. 0: none.",
            "MILLISECONDS",
            ge=0,
            le=1e7,
        ),
    ] = 0.0
    executor_timeout: Annotated[
        float,
        _option(
            "Decode engine: the most that a step waits for an attention executor, all its layers together. Then the "
            "executor is left out, its requests are recomputed locally, and it is tried again after a pause. One that "
            "was stopped, or whose threads all sleep, is given up after 0.3 s, or 4 times what steps usually wait if "
            "that is longer. One that has ended is noticed at once. Where steps usually wait for more than half of "
            "this time, twice that is the most.",
            "SECONDS",
            ge=0.01,
            le=200,  # below the 300 s after which vLLM ends a step itself
        ),
    ] = 1.0
    connect_timeout: Annotated[
        float,
        _option("Decode engine: how long to wait at start-up for the prefill engines.", "SECONDS", ge=0, le=3600),
    ] = 300.0

    @property
    def ratio(self) -> float | None:
        """The fixed share of requests to offload, 0 to 1; None for load-aware placement."""
        return ratio_of(f"{FLAG_PREFIX}offload-ratio", self.offload_ratio)

    @property
    def moves_prompts(self) -> bool:
        """Whether decode engines may compute prompts."""
        return self.elastic in ("prompts", "both")

    @property
    def moves_decodes(self) -> bool:
        """Whether a prefill engine may decode."""
        return self.elastic in ("decodes", "both")

    @property
    def maps(self) -> bool:
        """Whether decode engines map the memory of prefill engines."""
        return self.pool != "remote"

    @property
    def shares_weights(self) -> bool:
        """Whether this engine tries to share its weights."""
        return self.share_weights == "on" or (self.share_weights == "auto" and (self.role == "prefill" or self.maps))

    @property
    def uses_executors(self) -> bool:
        """Whether there are attention executors."""
        return self.pool != "mapped"

    def load_keys(self) -> Keys | None:
        """Return this engine's keys, read from their files; None if it has none. Raises AdrenalineError."""
        return Keys.load(self.key, self.allow) if self.key else None

    @property
    def listen_address(self) -> str:
        """The control address of a prefill engine."""
        return self.listen or addresses.default()

    @property
    def peer_addresses(self) -> list[str]:
        """The control addresses of a decode engine's prefill engines. Their order numbers the executors."""
        return [address.strip() for address in (self.peers or addresses.default()).split(",")]

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Options:
        """Return the options with these values, by field name. Raises AdrenalineError that names the wrong flag."""
        if "role" not in values:
            raise AdrenalineError("--plugin adrenaline needs --adrenaline-role prefill or --adrenaline-role decode")
        if "offload_ratio" in values:
            ratio = ratio_of(f"{FLAG_PREFIX}offload-ratio", values["offload_ratio"])
            values = {**values, "offload_ratio": "auto" if ratio is None else f"{ratio:g}"}
        try:
            options = msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            message = str(error)
            for name in cls.__struct_fields__:
                message = message.replace(f"`$.{name}`", f"{FLAG_PREFIX}{name.replace('_', '-')}")
            raise AdrenalineError(f"Adrenaline option refused: {message}") from None
        binds = options.role == "prefill"
        if options.key and options.insecure:
            raise AdrenalineError(f"{FLAG_PREFIX}key and {FLAG_PREFIX}insecure exclude each other")
        if binds and bool(options.key) != bool(options.allow):
            raise AdrenalineError(f"{FLAG_PREFIX}key and {FLAG_PREFIX}allow of a prefill engine go together")
        for address in [options.listen_address] if binds else options.peer_addresses:
            addresses.check(address, binds, has_keys=bool(options.key), insecure=options.insecure)
        cores.parse(options.executor_cores)
        if options.elastic != "off" and options.ratio is not None:
            raise AdrenalineError(
                f"{FLAG_PREFIX}elastic needs {FLAG_PREFIX}offload-ratio auto: with a fixed ratio nothing is known of "
                "what a step costs"
            )
        if options.elastic != "off" and options.maps:
            raise AdrenalineError(
                f"{FLAG_PREFIX}elastic is of no use with {FLAG_PREFIX}pool {options.pool}: both engines have all of "
                "one device already"
            )
        for name in ("executor_cores", "executor_threads", "executor_share", "executor_timeout"):
            if name in values and not options.uses_executors:
                raise AdrenalineError(
                    f"{FLAG_PREFIX}{name.replace('_', '-')} is of no use with {FLAG_PREFIX}pool mapped: there are no "
                    "executors"
                )
        for name, meta in _described():
            if name not in values or (meta.extra or {})["role"] in (None, options.role):
                continue
            raise AdrenalineError(
                f"{FLAG_PREFIX}{name.replace('_', '-')} is of no use with --adrenaline-role {options.role}"
            )
        return options

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Return the options of an engine with this configuration, in which the plugin is active."""
        return cls.parse(dict(vllm_config.additional_config[PLUGIN]))


def _described() -> list[tuple[str, msgspec.Meta]]:
    """Return each option's field name and description."""
    hints = get_type_hints(Options, include_extras=True)
    return [(n, m) for n, hint in hints.items() for m in hint.__metadata__ if isinstance(m, msgspec.Meta)]


def role_of(name: str) -> str | None:
    """Return the role for which an option is, by its field name; None if both have it. Raises AdrenalineError."""
    for known, meta in _described():
        if known == name:
            role: str | None = (meta.extra or {})["role"]
            return role
    raise AdrenalineError(f"there is no option {name}: `vllm serve --help=Adrenaline` has them all")


def flags() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (field name, flag, arguments of argparse's add_argument) for every option."""
    result = []
    kinds = get_type_hints(Options)
    for name, meta in _described():
        kind = kinds[name]
        arguments: dict[str, Any] = {"help": meta.description}
        if get_origin(kind) is Literal:
            arguments["choices"] = list(get_args(kind))
        elif kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments |= {"type": kind, "metavar": (meta.extra or {})["metavar"]}
            default = next(f.default for f in msgspec.structs.fields(Options) if f.name == name)
            if default != "":
                arguments["help"] = f"{meta.description} Default: {default}."
        result.append((name, FLAG_PREFIX + name.replace("_", "-"), arguments))
    return result
