"""A profile of one iteration: how busy the GPU is in each phase, how often the CPU waits for it, its top kernels."""

import bisect
from collections import Counter, defaultdict
from typing import Any

from phases import MARK, PHASES
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "aten::item", "aten::nonzero")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
COUNTED = (*WAITS, *LAUNCHES)


class Profile:
    """Profile what happens between `start` and `stop`."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device != "cpu"
        self.profiler: profile | None = None

    def start(self) -> None:
        """Start the profiler."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_cuda
        self.profiler = profile(activities=activities)
        self.profiler.__enter__()

    def stop(self) -> dict[str, Any]:
        """Return the summary as `profile`, or nothing if no profiler runs."""
        if self.profiler is None:
            return {}
        profiler, self.profiler = self.profiler, None
        profiler.__exit__(None, None, None)
        # `profiler.events()` takes minutes for the millions of events of an iteration.
        return {"profile": summary(profiler.profiler.kineto_results.events(), self.is_cuda)}


def summary(events: Any, is_cuda: bool) -> dict[str, Any]:
    """Return busy seconds, kernels, launches and waits by phase, and the longest kernels (on a CPU: calls)."""
    kernels, calls, spans, top = [], [], [], defaultdict(lambda: [0.0, 0])
    for event in events:
        name, start, length = event.name(), event.start_ns(), event.duration_ns()
        on_device = "CUDA" in str(event.device_type())
        if name.startswith(MARK):
            if not on_device:
                spans.append((start, start + length, name.removeprefix(MARK)))
            continue
        if on_device:
            kernels.append((start, start + length))
        elif name in COUNTED:
            calls.append((start, name))
        if on_device == is_cuda:
            top[name][0] += length / 1e9
            top[name][1] += 1
    longest = sorted(top.items(), key=lambda item: -item[1][0])[:15]
    return {
        "phases": by_phase(sorted(spans), sorted(kernels), calls),
        "top": [{"name": name[:90], "seconds": seconds, "count": count} for name, (seconds, count) in longest],
    }


def by_phase(
    spans: list[tuple[int, int, str]], kernels: list[tuple[int, int]], calls: list[tuple[int, str]]
) -> dict[str, dict[str, float]]:
    """Sort kernels and calls into the phases in whose spans they start; the rest belongs to the update.

    Clock and GPU are synchronised at the ends of phases, so no kernel crosses one.
    """
    starts = [start for start, _, _ in spans]

    def phase_at(time: int) -> str:
        index = bisect.bisect_right(starts, time) - 1
        return spans[index][2] if index >= 0 and time < spans[index][1] else "update"

    found: dict[str, Counter] = {name: Counter() for name in PHASES}
    end = 0
    for start, stop in kernels:  # several streams may overlap
        counts = found[phase_at(start)]
        counts["kernels"] += 1
        counts["busy"] += max(0, stop - max(start, end)) / 1e9
        end = max(end, stop)
    for start, name in calls:
        found[phase_at(start)]["launches" if name in LAUNCHES else name] += 1
    return {name: dict(counts) for name, counts in found.items()}


def profile_table(profiled: dict[str, Any], plain: dict[str, float]) -> list[str]:
    """Return the profile of one trainer as lines of Markdown.

    Args:
        profiled: Summary.
        plain: Median seconds of each phase without a profiler, which slows the CPU but not the kernels.
    """
    lines = ["| phase | seconds without profiler | GPU busy (s) | idle share | kernels | launches | "]
    lines[0] += " | ".join(WAITS) + " |"
    lines.append("|---" * (6 + len(WAITS)) + "|")
    for name, counts in profiled["phases"].items():
        seconds, busy = plain.get(name, 0.0), counts.get("busy", 0.0)
        idle = f"{max(0.0, 1 - busy / seconds):.2f}" if seconds and busy else ""
        cells = [f"{counts.get(key, 0):.0f}" for key in ("kernels", "launches", *WAITS)]
        lines.append(f"| {name} | {seconds:.3f} | {busy:.3f} | {idle} | " + " | ".join(cells) + " |")
    lines += ["", "| longest | seconds | calls |", "|---|---|---|"]
    lines += [f"| `{row['name']}` | {row['seconds']:.3f} | {row['count']} |" for row in profiled["top"]]
    return [*lines, ""]
