"""The tables of `ppo_iteration.py`."""

import json
from datetime import date
from typing import Any

import numpy as np
from floors import Machine, needed_work
from phases import PHASES
from ppo_iteration_trainers import TRAINERS, Scenario
from profile_iteration import profile_table

Rows = list[dict[str, Any]]


def report(result: dict[str, Any]) -> str:
    """Return the tables of one scenario: seconds by phase and ratios, work against its floor, and profiles."""
    settings = dict(result["scenario"])
    name, machine = settings.pop("name"), Machine(**result["machine"])
    scenario = Scenario(**settings)
    rows = [row for row in result["rows"] if not row["profiled"]]
    kinds = [kind for kind in TRAINERS if any(row["trainer"] == kind for row in rows)]
    lines = [
        f"{name}: {json.dumps(settings)}; {json.dumps(vars(scenario.sizes))}; {date.today()}",
        "",
        f"{machine.name}: {machine.square / 1e9:,.0f} GFLOP/s in large square products, {machine.own / 1e9:,.0f} in "
        f"those of a micro-batch and the MLP, {machine.bandwidth / 1e9:,.1f} GB/s",
        "",
        *time_table(rows, kinds, machine),
        *floor_table(rows, kinds, scenario, machine),
    ]
    for row in result["rows"]:
        if row["profiled"] and row["trainer"] in kinds:
            plain = {phase: median(of(rows, row["trainer"]), phase, "wall") for phase in PHASES}
            lines += [f"Profile of {TRAINERS[row['trainer']]}:", "", *profile_table(row["profile"], plain)]
    return "\n".join(lines)


def of(rows: Rows, kind: str) -> Rows:
    """Return the rows of one trainer."""
    return [row for row in rows if row["trainer"] == kind]


def median(rows: Rows, phase: str, figure: str) -> float:
    """Return the median of one figure of one phase."""
    return float(np.median([row["phases"].get(phase, {}).get(figure, 0.0) for row in rows]))


def total(row: dict[str, Any], figure: str) -> float:
    """Return one figure of all phases."""
    return sum(figures[figure] for figures in row["phases"].values())


def ratios_to_ours(rows: Rows, kind: str, unit: str) -> str:
    """Return the median and the range over rounds of the ratio to our time in the same round."""
    ours = {row["round"]: total(row, unit) for row in of(rows, "ours")}
    found = [total(row, unit) / ours[row["round"]] for row in of(rows, kind) if row["round"] in ours]
    return f"{np.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]" if found else ""


def time_table(rows: Rows, kinds: list[str], machine: Machine) -> list[str]:
    """Return CPU seconds (on a GPU: seconds) by phase, both per iteration, the ratio to ours, and peak memory."""
    unit = {"cpu": "CPU s", "wall": "s"}[machine.unit]
    lines = [
        "| trainer | " + " | ".join(f"{phase} ({unit})" for phase in PHASES),
        "|---" * (len(PHASES) + 5) + "|",
    ]
    lines[0] += " | CPU s/iteration | s/iteration | time / ours | peak memory (GB) |"
    for kind in kinds:
        mine = of(rows, kind)
        cells = [f"{median(mine, phase, machine.unit):.2f}" for phase in PHASES]
        cells += [f"{np.median([total(row, figure) for row in mine]):.2f}" for figure in ("cpu", "wall")]
        peak = max(row["peak_bytes"] for row in mine) / 1e9
        cells += [ratios_to_ours(rows, kind, machine.unit), f"{peak:.2f}"]
        lines.append(f"| {TRAINERS[kind]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def floor_table(rows: Rows, kinds: list[str], scenario: Scenario, machine: Machine) -> list[str]:
    """Return, by trainer and phase, tokens that count and that were computed, FLOP, floor, and time / floor.

    MFU is the reciprocal of the last for a phase without decoding, against the peak of large products.
    """
    lines = [
        "| trainer | phase | tokens that count | tokens computed | GFLOP | floor (s) | time / floor | MFU |",
        "|---" * 8 + "|",
    ]
    for kind in kinds:
        work = needed_work(scenario, kind, 4 if machine.unit == "cpu" else 2)
        for phase in PHASES:
            seconds, computed = (median(of(rows, kind), phase, figure) for figure in (machine.unit, "tokens"))
            if not computed:
                continue
            flop, floor = work[phase].flop + work[phase].decode_flop, work[phase].floor(machine)
            lines.append(
                f"| {TRAINERS[kind]} | {phase} | {work[phase].tokens:,} | {computed:,.0f} | {flop / 1e9:,.2f} | "
                f"{floor:.3f} | {seconds / floor:.2f} | {flop / seconds / machine.peak:.1%} |"
            )
    return [*lines, ""]
