"""What a run found, as Markdown: tables, what they come to, and two runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .ways import OTHERS

Report = dict[str, Any]
"""What the benchmark writes as JSON; a part that wasn't run is an empty list."""

MEASURES = ("training", "inference")
LABELS = {"peft": "PEFT", "parametrize": "plain parametrize", "full": "full fine-tuning"}
LABELS |= {"bare": "bare products"}
ABOVE, AIM = 1.02, 0.85
"""The aims: against the best other way in each cell, against PEFT in the geometric mean."""


def read(path: Path) -> Report:
    """Read a run's figures.

    Raises:
        ValueError: It isn't a run of this benchmark.
    """
    try:
        found: Report = json.loads(path.read_text())
        if lacks := {"environment", "cells", "scale", "decoder"} - {*found}:
            raise ValueError(f"it has no {', '.join(sorted(lacks))}")
    except ValueError as error:
        raise ValueError(f"{path}: not a benchmark.json of this benchmark: {error}") from None
    return found


def show(report: Report) -> str:
    """Write a run's tables, and what they come to."""
    env, cells = report["environment"], report["cells"]
    packages = [f"{each} {env[each]}" for each in ("torch", "peft", "loralib") if each in env]
    where = f"{env['device_name'] or env['device']}, {env['threads']} threads"
    parts = [", ".join([where, f"{env['clock']} time", *packages])]
    parts += ["\n".join(f"- {line}" for line in summary(cells))]
    for measure in MEASURES if cells else ():
        title = f"### {measure}, multiples of the frozen model's time: median (quartiles)"
        parts += [title, _times(cells, measure)]
    parts += [_growth(report["scale"]), _decoder(report["decoder"])]
    return "\n\n".join(filter(None, parts))


def summary(cells: Sequence[Report]) -> list[str]:
    """Say what the cells come to, and which of them miss the aim."""
    lines = []
    for mode in dict.fromkeys(each["mode"] for each in cells):
        for measure in MEASURES:
            own = {_name(each): each[measure] for each in cells if each["mode"] == mode}
            best = {name: found for name, each in own.items() if (found := best_other(each))}
            peft = {
                name: (each["peft"]["ours"][1], "peft")
                for name, each in own.items()
                if "peft" in each
            }
            for other, ratios in ((f"PEFT's time (aim {AIM})", peft), ("the best other's", best)):
                if ratios:
                    lines.append(f"{mode}, {measure}: {_together(ratios, other)}")
            above = sorted(best, key=lambda name: -best[name][0])
            above = [_said(name, *best[name]) for name in above if best[name][0] > ABOVE]
            lines.append(f"{mode}, {measure}: {len(above)} cells above {ABOVE} of the best other's")
            lines[-1] += f": {'; '.join(above)}" if above else ""
    merged = [
        each["inference"]["merged"]["ratio"][1] for each in cells if "merged" in each["inference"]
    ]
    if merged:
        lines.append(f"merged, inference: {mean(merged):.2f} of the plain model's time")
    idle = [f"{_name(each)} ({', '.join(each['idle'])})" for each in cells if each["idle"]]
    if idle:
        lines.append(f"left out of inference, as the adapter doesn't act there: {'; '.join(idle)}")
    return lines


def best_other(figures: dict[str, Any]) -> tuple[float, str] | None:
    """Return lora_param's ratio to the fastest of the other ways, and which that is."""
    return max(((figures[way]["ours"][1], way) for way in OTHERS if way in figures), default=None)


def compare(then: Report, now: Report) -> str:
    """Hold two runs side by side, and say where their environments differ."""
    before, after = then["environment"], now["environment"]
    lines = [
        f"not the same environment: {key} was {before.get(key)}, is {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    old, new = _figures(then), _figures(now)
    both = {name: new[name] / old[name] for name in new if name in old}
    lines += [f"only in one of the runs: {name}" for name in {**old, **new} if name not in both]
    rows = [[name, f"{old[name]:.3g}", f"{new[name]:.3g}", f"{both[name]:.2f}"] for name in both]
    lines.append(table([["", "then", "now", "now / then"], *rows]))
    if both:
        lines.append(f"now / then: {mean(both.values()):.3f} in the geometric mean of {len(both)}")
    return "\n\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, aligned for reading as it is; the first row has the titles."""
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean."""
    values = list(ratios)
    return math.exp(sum(map(math.log, values)) / len(values))


def _together(ratios: dict[str, tuple[float, str]], other: str) -> str:
    worst = max(ratios, key=lambda name: ratios[name])
    said = f"{mean(ratio for ratio, _ in ratios.values()):.2f} of {other} in the geometric mean of "
    return said + f"{len(ratios)} cells, at most {_said(worst, *ratios[worst])}"


def _said(name: str, ratio: float, way: str) -> str:
    return f"{ratio:.2f} of {_label(way)}'s, {name}"


def _times(cells: Sequence[Report], measure: str) -> str:
    ways = list(dict.fromkeys(way for each in cells for way in each[measure]))[1:]
    rows = [["", "floor, ms", *map(_label, ways), "/ best other way", "/ PEFT"]]
    if measure == "training":
        rows[0] += ["MiB kept: floor, lora_param, PEFT"]
    for each in cells:
        figures, best, kept = each[measure], best_other(each[measure]), each["mebibytes"]
        row = [_name(each), f"{figures['floor']['seconds'][1] * 1e3:.2f}"]
        row += [_ratio(figures.get(way), way == "lora_param") for way in ways]
        row += [f"{best[0]:.2f} ({_label(best[1])})" if best else "-"]
        row += [f"{figures['peft']['ours'][1]:.2f}" if "peft" in figures else "-"]
        if measure == "training":
            row += [
                ", ".join(f"{kept[w]:.2f}" for w in ("floor", "lora_param", "peft") if w in kept)
            ]
        rows.append(row)
    return table(rows)


def _ratio(figures: dict[str, list[float]] | None, quartiles: bool) -> str:
    if figures is None:
        return "-"
    low, middle, high = figures["ratio"]
    return f"{middle:.2f} ({low:.2f}-{high:.2f})" if quartiles else f"{middle:.2f}"


def _growth(scale: Sequence[Report]) -> str:
    parts = []
    for title in dict.fromkeys(each["of"] for each in scale):
        own = [each for each in scale if each["of"] == title]
        rows = [["seconds", *(f"{count:,}" for count in own[0]["counts"]), "exponent"]]
        for each in own:
            times = [f"{value:.2g}" for value in each["seconds"]]
            rows.append([each["what"], *times, each["exponent"] or "-"])
        parts += [f"### {title}", table(rows)]
    return "\n\n".join(parts)


def _decoder(runs: Sequence[Report]) -> str:
    rows = [["", "ms", "/ full", "GiB", "/ full"]]
    for each in runs:
        full = next(r for r in runs if (r["mode"], r["way"]) == (each["mode"], "full"))
        time, size = each["seconds"] / full["seconds"], each["bytes"] / full["bytes"]
        row = [f"{_label(each['way'])}, {each['mode']}", f"{each['seconds'] * 1e3:.0f}"]
        rows.append([*row, f"{time:.2f}", f"{each['bytes'] / 2**30:.2f}", f"{size:.2f}"])
    title = "### AdamW's step of a decoder of "
    return f"{title}{runs[0]['parameters'] / 1e9:.2f} billion\n\n{table(rows)}" if runs else ""


def _figures(report: Report) -> dict[str, float]:
    """List what two runs can be compared by."""
    found = {
        f"{_name(each)}, {measure}": each[measure]["lora_param"]["ratio"][1]
        for each in report["cells"]
        for measure in MEASURES
    }
    found |= {
        f"{each['what']}, {count:,} {each['of']}, s": value
        for each in report["scale"]
        for count, value in zip(each["counts"], each["seconds"], strict=True)
    }
    return found | {f"{e['way']}, {e['mode']}, decoder, s": e["seconds"] for e in report["decoder"]}


def _name(cell: Report) -> str:
    return str(cell["cell"]) + ("" if cell["mode"] == "float32" else f", {cell['mode']}")


def _label(way: str) -> str:
    return LABELS.get(way, way)
