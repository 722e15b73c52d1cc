# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Counters and histograms as /v1/metrics shows them."""

from __future__ import annotations

import threading

from gpus import Gpu


class Histogram:
    BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)

    def __init__(self) -> None:
        self.counts = [0] * len(self.BOUNDS)
        self.total = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        for position, bound in enumerate(self.BOUNDS):
            if value <= bound:
                self.counts[position] += 1
        self.total += 1
        self.sum += value

    def text(self, name: str, label: str) -> list[str]:
        lines = ["# HELP %s %s" % (name, name), "# TYPE %s histogram" % name]
        for bound, count in zip(self.BOUNDS, self.counts):
            lines.append('%s_bucket{%s,le="%s"} %d' % (name, label, bound, count))
        lines.append('%s_bucket{%s,le="+Inf"} %d' % (name, label, self.total))
        lines.append("%s_count{%s} %d" % (name, label, self.total))
        lines.append("%s_sum{%s} %s" % (name, label, self.sum))
        return lines


class Metrics:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.prompt_tokens = self.generation_tokens = self.success = self.failure = 0
        self.ttft, self.per_token, self.e2e = Histogram(), Histogram(), Histogram()

    def text(self, dialect: str, model: str, gpus: list[Gpu], slots: int) -> str:
        second = dialect == "2"
        prefix = "vllm:" if second else ""
        label = 'model_name="%s"' % model
        out = []  # type: list[str]

        def value(name: str, kind: str, number: float, labels: str = label) -> None:
            out.extend(
                ["# HELP %s %s" % (name, name), "# TYPE %s %s" % (name, kind), "%s{%s} %s" % (name, labels, number)]
            )

        with self.lock:
            use = min(1.0, self.running / max(1, slots))
            value(prefix + "num_requests_running", "gauge", float(self.running))
            value(prefix + "num_requests_waiting", "gauge", 0.0)
            if second:
                value("vllm:kv_cache_usage_perc", "gauge", use)
            else:
                value("num_request_max", "gauge", float(slots))
                value("gpu_cache_usage_perc", "gauge", use)
            value(prefix + "prompt_tokens_total", "counter", float(self.prompt_tokens))
            value(prefix + "generation_tokens_total", "counter", float(self.generation_tokens))
            if second:
                value("vllm:request_success_total", "counter", float(self.success), label + ',finished_reason="stop"')
            else:
                value("request_success_total", "counter", float(self.success))
                value("request_failure_total", "counter", float(self.failure))
                value("request_finish_total", "counter", float(self.success), label + ',finished_reason="stop"')
            out.extend(self.ttft.text(prefix + "time_to_first_token_seconds", label))
            name = "vllm:inter_token_latency_seconds" if second else "time_per_output_token_seconds"
            out.extend(self.per_token.text(name, label))
            out.extend(self.e2e.text(prefix + "e2e_request_latency_seconds", label))
            if not second:
                for gpu in gpus:
                    device = 'device_id="%d"' % gpu.index
                    value("gpu_utilization", "gauge", 0.9 * use, device)
                    value("gpu_power_usage_watts", "gauge", 70.0 + 230.0 * use, device)
                    value("gpu_power_limit_watts", "gauge", 350.0, device)
                    value("gpu_total_energy_consumption_joules", "counter", 1000.0, device)
                    value("gpu_memory_used_bytes", "gauge", float(gpu.used << 20), device)
                    value("gpu_memory_total_bytes", "gauge", float(gpu.total << 20), device)
        return "\n".join(out) + "\n"
