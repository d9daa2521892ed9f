"""Makes `docs/engine.md` and its pictures from the engine's docstrings and plans.

    uv run python docs/build.py            # write them
    uv run python docs/build.py --check    # fail if the page is not what the docstrings give

Pictures are drawn by the schedules themselves: what is seen is what a run does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poisonbench import metagradient as engine
from poisonbench._files import replacing, write_text
from poisonbench.metagradient import replay, schedule
from poisonbench.metagradient.planning import Plan, plan
from poisonbench.metagradient.schedule import (
    Advance,
    Keep,
    Record,
    Restore,
    Reverse,
)

HERE = Path(__file__).parent
NUM_STEPS = 64
DRAWN = {
    "store_all": plan(NUM_STEPS, "store_all"),
    "tree, arity 4": plan(NUM_STEPS, "tree", arity=4),
    "binomial, 10 states": plan(NUM_STEPS, "binomial", max_states=10),
}
FORWARD, BACKWARD, KEPT = "#4477aa", "#cc6677", "#bbbbbb"


def page() -> str:
    """The text of `engine.md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, autoescape=False,
        keep_trailing_newline=True, trim_blocks=True,
    )  # fmt: skip
    return environment.get_template("engine.md.j2").render(
        replay=_plain(replay.__doc__), schedule=_plain(schedule.__doc__), plans=DRAWN, plan=plan,
        metagradient=_signed(engine.metagradient), plan_function=_signed(engine.plan),
        errors=[engine.NonFiniteError, engine.AdamWithoutEpsRoot], doc=inspect.getdoc,
    )  # fmt: skip


def draw(path: Path) -> None:
    """How each schedule goes through the run: steps taken, against time."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, drawn) in zip(figure.subplots(1, 3, sharey=True), DRAWN.items(), strict=True):
        _draw_one(axes, drawn)
        axes.set_title(f"{title}\n{drawn.kept} states, {drawn.forward} steps forward", fontsize=9)
        axes.set_xlabel("steps run so far")
    figure.axes[0].set_ylabel("place in the training run")
    figure.axes[0].plot([], [], color=FORWARD, label="forward")
    figure.axes[0].plot([], [], color=BACKWARD, label="differentiated")
    figure.axes[0].plot([], [], color=KEPT, label="a kept state")
    figure.axes[0].legend(fontsize=7, loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def _draw_one(axes: Axes, drawn: Plan) -> None:
    now, recorded = 0, range(0)
    kept: dict[int, int] = {}

    def free(step: int, since: int) -> None:
        axes.plot([since, now], [step, step], color=KEPT, linewidth=0.6, zorder=0)

    for action in drawn.actions():
        match action:
            case Keep(step):
                kept[step] = now
            case Restore(step):
                free(step, kept.pop(step))
            case Advance(start, stop):
                axes.plot([now, now + stop - start], [start, stop], color=FORWARD, linewidth=1.2)
                now += stop - start
            case Record(start, stop):
                end = now + action.forward
                axes.plot([now, end], [start, start + action.forward], color=FORWARD, linewidth=1.2)
                recorded, first = range(start, stop), now
                now = end
            case Reverse(start, stop):
                axes.plot([now, now + stop - start], [stop, start], color=BACKWARD, linewidth=1.2)
                for step in recorded:
                    axes.plot(
                        [first + step - start, now + stop - step], [step, step],
                        color=KEPT, linewidth=0.6, zorder=0,
                    )  # fmt: skip
                now += stop - start


def _plain(text: str | None) -> str:
    return inspect.cleandoc(text or "")


def _signed(function: Callable[..., Any]) -> str:
    """A function as it is called, and its docstring."""
    parameters = inspect.signature(function).parameters.values()
    lines = [
        f"    {p.name}" + (f"={p.default!r}" if p.default is not p.empty else "") for p in parameters
    ]
    first = next(i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY)
    lines.insert(first, "    *")
    return f"{function.__name__}(\n" + ",\n".join(lines) + f",\n)\n\n{inspect.getdoc(function)}"


def main() -> None:
    """Write the page and its pictures, or with `--check` compare the page."""
    target = HERE / "engine.md"
    if "--check" in sys.argv[1:]:
        if target.read_text("utf-8") != page():
            sys.exit("docs/engine.md is not what the docstrings give: run `uv run python docs/build.py`")
        return
    write_text(target, page())
    draw(HERE / "schedules.png")


if __name__ == "__main__":
    main()
