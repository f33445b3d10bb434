"""Tables and pictures of the experiments on sentiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .shared.plots import grouped_bars, new_figure, save
from .shared.scoring import Spread, spread
from .shared.tables import aligned

Row = dict[str, Any]


def methods_table(rows: Sequence[Row]) -> str:
    """Lay out a comparison of methods.

    Args:
        rows: A domain's and method's figures each.

    Returns:
        Two tables: accuracies with each learning rate's on the validation part, and costs.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by = {(row["method"], row["domain"]): row for row in rows}
    tests = [["test accuracy", *domains]]
    tuning = [["validation accuracy", *domains]]
    costs = [["cost", "trained", "file", "a step", "memory of a step"]]
    for method in methods:
        own = [by[method, domain] for domain in domains]
        tests.append([method, *(spread(row["accuracies"]).text(3) for row in own)])
        for rate in sorted({rate for row in own for rate in row["tried"]}):
            found = [_tried(row, rate) for row in own]
            tuning.append([f"{method}, {rate:g}", *found])
        seconds = min(row["seconds_a_step"] for row in own)
        costs.append(
            [
                method,
                f"{own[0]['parameters']:,}",
                f"{own[0]['file'] / 1e6:.2f} MB",
                f"{seconds:.2f} s",
                f"{own[0]['memory']['total'] / 1e6:.0f} MB",
            ]
        )
    return "\n" + "\n\n".join(map(aligned, (tests, tuning, costs)))


def _tried(row: Row, rate: float) -> str:
    if rate not in row["tried"]:
        return "- "
    return f"{row['tried'][rate]:.3f}{'*' if rate == row['rate'] else ' '}"


def draw_methods(rows: Sequence[Row], path: Path) -> None:
    """Draw each domain's accuracies as a group of bars, a bar a method.

    Args:
        rows: A domain's and method's figures each.
        path: Where the PNG goes.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    bars: dict[str, list[Spread]] = {}
    for row in rows:
        label = f"{row['method']}: {row['parameters']:,}"
        bars.setdefault(label, []).append(spread(row["accuracies"]))
    figure, axes = new_figure(3.5)
    grouped_bars(axes, bars, width=0.8 / len(bars))
    axes.set(ylabel="test accuracy", ylim=(0.5, 1))
    axes.set_xticks(range(len(domains)), domains)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def tree_table(found: Mapping[str, Sequence[float]], domains: Sequence[str]) -> str:
    """Lay out what each choice of adapters reaches on each domain.

    Args:
        found: Test accuracies in the order of the domains, by what acted.
        domains: The domains.

    Returns:
        The table.
    """
    rows = [["test accuracy", *domains, "mean"]]
    for name, values in found.items():
        rows.append([name, *(f"{value:.3f}" for value in (*values, mean(values)))])
    return aligned(rows)


def draw_tree(found: Mapping[str, Sequence[float]], domains: Sequence[str], path: Path) -> None:
    """Draw for each domain its own adapter alone, the root, the leaf on it, and TIES.

    Args:
        found: Test accuracies in the order of the domains, by what acted.
        domains: The domains.
        path: Where the PNG goes.
    """
    own = [found[f"{domain} alone"][index] for index, domain in enumerate(domains)]
    bars = {
        "the domain's alone": own,
        "sentiment": found["sentiment"],
        "sentiment + its domain's": found["sentiment + its domain's, routed"],
        "TIES of all, untrained": found["TIES of all"],
    }
    figure, axes = new_figure(3.2)
    spreads = {name: [Spread(value, None) for value in values] for name, values in bars.items()}
    grouped_bars(axes, spreads, width=0.2)
    axes.set(ylabel="test accuracy", ylim=(0.5, 1))
    axes.set_xticks(range(len(domains)), domains)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
