"""The benchmark's tables and its picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..shared.plots import new_figure, save
from ..shared.tables import aligned

MARKERS = {"lora_param": "o", "peft": "s", "loralib": "^", "parametrize": "x", "full": "+"}


def show(report: dict[str, Any]) -> str:
    """Format a report as text.

    Args:
        report: What the benchmark writes as JSON.

    Returns:
        A table per measure, what they come to, the verbs, and many adapters.
    """
    results, env = report["cells"], report["environment"]
    lines = [
        f"{env['device_name'] or env['device']}, {env['threads']} threads, torch {env['torch']}"
    ]
    for measure in ("training", "training and AdamW", "inference"):
        lines += ["", f"{measure}, multiples of the frozen model: median (quartiles)"]
        lines.append(_table(results, measure))
    lines += ["", "MiB kept for backward and as gradients, beyond the parameters"]
    ways = list(results[0]["mebibytes"])
    kept = [
        [_name(each), *(_number(each["mebibytes"].get(way)) for way in ways)] for each in results
    ]
    lines.append(aligned([["", *ways], *kept]))
    lines += ["", *summary(results), ""]
    lines += [f"{name}: {seconds * 1e3:,.1f} ms" for name, seconds in report["verbs"].items()]
    lines += ["", *(f"{name}: {ratio:.2f}" for name, ratio in report["adapters"].items())]
    return "\n".join(lines)


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the tables come to.

    Args:
        results: One entry per cell and mode.

    Returns:
        Lines.
    """
    lines = []
    kinds = list(dict.fromkeys(each.get("kind", "lora") for each in results))
    for kind, measure in itertools.product(kinds, ("training", "training and AdamW", "inference")):
        own = [each for each in results if each.get("kind", "lora") == kind]
        said = measure if kind == "lora" else f"{kind}, {measure}"
        for peer in ("peft", "loralib"):
            ratios = {_name(each): _against(each[measure], peer) for each in own}
            known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
            if known:
                worst = max(known, key=lambda name: known[name])
                lines.append(
                    f"{said}: lora_param / {peer} is {_mean(known.values()):.2f} in the "
                    f"geometric mean of {len(known)} cells, at most {known[worst]:.2f} ({worst})"
                )
    merged = [each["inference"]["merged"]["ratio"][1] for each in results]
    lines.append(f"merged inference: {_mean(merged):.2f} of the plain model's time")
    return lines


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training steps: a line per cell, a mark per way, on a logarithmic scale.

    Args:
        results: One entry per cell and mode.
        path: Where the PNG goes.
    """
    figure, axes = new_figure(1.5 + 0.2 * len(results))
    for way, marker in MARKERS.items():
        points = [
            (each["training"][way]["ratio"][1], row)
            for row, each in enumerate(results)
            if way in each["training"]
        ]
        if points:
            filled = {"color": "black"} if way == "lora_param" else {"mfc": "none", "color": "0.4"}
            axes.plot(*zip(*points, strict=True), ls="", marker=marker, label=way, **filled)  # type: ignore[arg-type]
    axes.axvline(1, color="0.7", zorder=0)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    axes.set_yticks(range(len(results)), [_name(each) for each in results])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.3)
    axes.set_xlabel("a training step, as a multiple of the frozen model's")
    save(figure, path)


def _table(results: Sequence[dict[str, Any]], measure: str) -> str:
    ways = [way for way in results[0][measure] if way != "floor"]
    rows = [["", "floor, ms", *ways, "/ peft"]]
    for each in results:
        floor = each[measure]["floor"]["seconds"][1] * 1e3
        cells = [_quartiles(each[measure].get(way)) for way in ways]
        rows.append([_name(each), f"{floor:.2f}", *cells, _number(_against(each[measure], "peft"))])
    return aligned(rows)


def _against(figures: dict[str, Any], peer: str) -> float | None:
    """Return lora_param's median over a peer's."""
    if peer not in figures:
        return None
    ratio: float = figures["lora_param"]["ratio"][1] / figures[peer]["ratio"][1]
    return ratio


def _name(result: dict[str, Any]) -> str:
    return str(result["cell"]) + ("" if result["mode"] == "float32" else f", {result['mode']}")


def _quartiles(figures: dict[str, list[float]] | None) -> str:
    if figures is None:
        return "-"
    low, middle, high = figures["ratio"]
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(ratios: Iterable[float]) -> float:
    values = list(ratios)
    return math.exp(sum(map(math.log, values)) / len(values))
