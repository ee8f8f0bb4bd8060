"""Fake engines with the metrics of a small busy cluster, which go on from one look to the next."""

from __future__ import annotations

from aiohttp import web

from tests.unit.proxy_cases import FakeEngine

PREFILL = """\
# HELP vllm:num_requests_running Running.
vllm:num_requests_running{{model_name="m"}} 2.0
vllm:num_requests_waiting{{model_name="m"}} 1.0
vllm:kv_cache_usage_perc{{model_name="m"}} 0.46
vllm:cache_config_info{{num_gpu_blocks="900"}} 1.0
vllm:generation_tokens_total {n}
vllm:time_to_first_token_seconds_sum {first}
vllm:time_to_first_token_seconds_count {n}
vllm:adrenaline_local_rows{{model_name="m"}} 0.0
vllm:adrenaline_executor_share{{model_name="m"}} 0.5
"""
DECODE = """\
# HELP vllm:num_requests_running Running.
vllm:num_requests_running{{model_name="m"}} 12.0
vllm:num_requests_waiting{{model_name="m"}} 3.0
vllm:kv_cache_usage_perc{{model_name="m"}} 0.92
vllm:cache_config_info{{num_gpu_blocks="400"}} 1.0
vllm:generation_tokens_total {tokens}
vllm:time_to_first_token_seconds_sum {first}
vllm:time_to_first_token_seconds_count {n}
vllm:inter_token_latency_seconds_sum {latency}
vllm:inter_token_latency_seconds_count {tokens}
vllm:adrenaline_local_rows{{model_name="m"}} 7.0
vllm:adrenaline_offloaded_rows{{model_name="m"}} 5.0
vllm:adrenaline_borrowed_blocks{{model_name="m"}} 310.0
vllm:adrenaline_exposed_wait_seconds_total {exposed}
vllm:adrenaline_placements_total{{placement="local",reason="fits"}} 30.0
vllm:adrenaline_placements_total{{placement="offloaded",reason="local_full"}} {n}
vllm:adrenaline_placements_total{{placement="wait",reason="<b>no_room</b>"}} 4.0
"""


class Busy(FakeEngine):
    """An engine that does something between two looks. `looks` counts them."""

    def __init__(self, template: str) -> None:
        super().__init__({"choices": []})
        self._template, self.looks = template, 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/metrics":
            return await super().handle(request)
        self.looks += 1
        n = self.looks
        figures = {"n": 40 + n, "tokens": 5000 + 120 * n, "exposed": 1 + 0.1 * n, "first": 6.0 + 0.3 * n}
        return web.Response(text=self._template.format(latency=60 + (1.4 + 0.2 * (n % 5)) * n, **figures))


def busy_prefill() -> Busy:
    return Busy(PREFILL)


def busy_decode() -> Busy:
    return Busy(DECODE)
