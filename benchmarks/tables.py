"""The report as a reader sees it: tables, and what they say about the engine's aims."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.report import Comparison, Point, Report, Row, Sweep

AIMED_RATIO = 3.7
AIMED_TREE = 1.25
AIMED_DISPATCH = 0.02
OVER_TORCH = 2.0
TREE_STEPS = 512
MEMORY_NOISE = 1.05

Aim = tuple[str, str, bool | None]
"""What is aimed for, how it stands, and whether it is met, where that is known."""


def show(report: Report, console: Console) -> None:
    """Print everything."""
    parts: list[RenderableType] = []
    if report.quick:
        parts.append(Text("A smoke run: these numbers mean nothing.", style="bold red"))
    for comparison in report.comparisons:
        parts += [_comparison(comparison), *_limits(comparison), ""]
    for title, sweep in (("against length", report.lengths), ("against kept states", report.states)):
        if sweep is not None:
            parts += [_sweep(title, sweep), ""]
    if report.dispatch:
        parts += [_dispatch(report), ""]
    parts.append(_aims(report))
    parts.append(
        f"{report.hardware.processor}, {report.threads} cores, {report.memory_bytes / 2**30:.0f} GiB;"
        f" medians of {report.rounds} rounds [least – most]"
    )
    console.print(Group(*parts), highlight=False)


def _comparison(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.name}: {comparison.setting}", title_justify="left")
    table.add_column("way")
    for head in ("time / training", "seconds", "peak MiB", "states", "relative error", "GFLOP/s"):
        table.add_column(head, justify="right")
    for row in comparison.rows:
        if row.status != "measured":
            table.add_row(row.title, Text(f"{row.status}: {row.remark}", style="yellow"))
            continue
        seconds = median(r.seconds for r in row.rounds)
        memory = "?" if row.memory is None else f"{row.memory / 2**20:,.0f}"
        error = f"{row.error:.1e}" if row.agrees else f"{row.error:.1e} DIFFERS"
        kept = "" if row.kept is None else f"{row.kept:,}"
        rate = f"{comparison.rate(row) / 1e9:.1f}"
        table.add_row(row.title, _spread(row), f"{seconds:.2f}", memory, kept, error, rate)
    return table


def _spread(row: Row | Point) -> str:
    ratios = [r.ratio for r in row.rounds]
    return f"{row.ratio:.2f} [{min(ratios):.2f} – {max(ratios):.2f}]"


def _limits(comparison: Comparison) -> Iterator[str]:
    """How far from the limit."""
    count = comparison.operations
    yield (
        f"a step: {count.forward / 1e6:,.1f} million multiply-adds forward, {count.step / 1e6:,.1f}"
        f" in all, {count.vjp / 1e6:,.1f} for its VJP; floor by count, every step run again:"
        f" {count.floor:.2f}"
    )
    if not comparison.measured:
        return
    yield (
        f"training: {comparison.training_seconds:.2f} s,"
        f" {comparison.training_rate / 1e9:.1f} GFLOP/s"
        + (
            f"; in PyTorch {median(comparison.torch_training):.2f} s"
            if comparison.torch_training
            else ""
        )
    )
    if comparison.matrix_rates:
        matrix = median(comparison.matrix_rates)
        best = max(comparison.rate(row) for row in comparison.measured)
        yield (
            f"a large product: {matrix / 1e9:.1f} GFLOP/s; training is at"
            f" {comparison.training_rate / matrix:.0%} of it, the fastest metagradient at"
            f" {best / matrix:.0%}"
        )
    yield (
        f"a state: {comparison.state_bytes / 2**20:.2f} MiB; errors: against {comparison.reference};"
        " GFLOP/s: the floor's operations over the time"
    )


def _sweep(title: str, sweep: Sweep) -> Table:
    table = Table(title=f"cost {title}: {sweep.setting}", title_justify="left")
    table.add_column("way")
    heads = ("steps", "states", "time / training", "by the plan", "measured / plan")
    for head in heads:
        table.add_column(head, justify="right")
    for point in sweep.points:
        states = "" if point.states is None else f"{point.states:,}"
        row = [point.title, f"{point.steps:,}", states, _spread(point)]
        if point.forward is not None:
            predicted = _predicted(sweep, point)
            row += [f"{predicted:.2f}", f"{point.ratio / predicted:.2f}"]
        table.add_row(*row)
    table.caption = f"by the plan: steps counted, each VJP {sweep.vjp:.2f} steps (measured once)"
    return table


def _predicted(sweep: Sweep, point: Point) -> float:
    return sweep.predicted(point.forward or 0, point.differentiated or 0, point.steps)


def _vjp(report: Report) -> float:
    return report.comparisons[0].operations.floor - 1 if report.comparisons else 8 / 3


def _dispatch(report: Report) -> Table:
    table = Table(
        title="dispatch: an upper bound on the time that is not the step's", title_justify="left"
    )
    for head in ("way", "steps", "ms in all", "share at 20 ms a step"):
        table.add_column(head, justify="left" if head == "way" else "right")
    for one in report.dispatch:
        table.add_row(
            one.way,
            f"{one.setting.steps:,}",
            f"{1e3 * median(one.seconds):.1f}",
            f"{one.share(_vjp(report)):.3%}",
        )
    table.caption = (
        "the same schedule on a state of as many arrays, of one number each; over the counted steps"
        f" at 20 ms each and {_vjp(report):.2f} × 20 ms for a VJP"
    )
    return table


def _aims(report: Report) -> Table:
    table = Table(title="aims", title_justify="left")
    table.add_column("aim")
    table.add_column("measured", justify="right")
    table.add_column("")
    for aim, measured, met in aims(report):
        verdict = Text("met", style="green") if met else Text("missed", style="red")
        table.add_row(aim, measured, Text("unknown") if met is None else verdict)
    return table


def aims(report: Report) -> Iterator[Aim]:
    """Each aim that the report can speak of."""
    for comparison in report.comparisons:
        mine = [row for row in comparison.measured if _is_ours(row)]
        peers = [row for row in comparison.measured if not _is_ours(row)]
        if not mine:
            continue
        best = min(row.ratio for row in mine)
        name, floor = comparison.name, comparison.operations.floor
        yield f"{name}: at most {AIMED_RATIO} times training", f"{best:.2f}", best <= AIMED_RATIO
        yield f"{name}: below the floor of {floor:.2f}", f"{best:.2f}", best < floor
        for peer in peers:
            yield _against(name, mine, peer)
        torch = [row.ratio for row in peers if row.way.startswith("torch")]
        if torch:
            times = min(torch) / best
            yield f"{name}: half the time of PyTorch", f"{times:.2f} times as fast", times >= OVER_TORCH
    if report.lengths is not None:
        yield from _tree(report.lengths)
    if report.dispatch:
        share = max(one.share(_vjp(report)) for one in report.dispatch)
        yield (
            f"dispatch below {AIMED_DISPATCH:.0%} at 20 ms a step",
            f"{share:.3%}",
            share < AIMED_DISPATCH,
        )


def _is_ours(row: Row) -> bool:
    return row.way.startswith("ours-")


def _against(name: str, mine: list[Row], peer: Row) -> Aim:
    """Never slower than a peer at equal or less memory, with a little room for noise in the latter."""
    aim = f"{name}: not slower than “{peer.title}” in its memory"
    sizes = [row.memory for row in mine if row.memory is not None]
    if peer.memory is None or not sizes:
        return aim, "memory not measured", None
    room = MEMORY_NOISE * peer.memory
    within = [row.ratio for row in mine if row.memory is not None and row.memory <= room]
    if not within:
        return aim, f"ours needs {min(sizes) / 2**20:,.0f} MiB, it {peer.memory / 2**20:,.0f}", None
    return aim, f"{min(within):.2f} against {peer.ratio:.2f}", min(within) <= peer.ratio


def _tree(sweep: Sweep) -> Iterator[Aim]:
    for point in sweep.points:
        if point.way == "ours-tree-4" and point.steps == TREE_STEPS:
            times = point.ratio / _predicted(sweep, point)
            aim = f"tree of arity 4, {TREE_STEPS} steps: at most {AIMED_TREE} times its count"
            yield aim, f"{times:.2f}", times <= AIMED_TREE
