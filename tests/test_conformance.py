"""Each check can fail, says why, and names the fix; the template passes them all as it is.

Every broken attack is the template with one thing wrong. Claims of `poisonbench.conformance` and of
`poisonbench check` tested here:

- the check that a fault belongs to fails on it, with the fault and its fix, and no check fails on the
  template itself;
- an attack that raises, on import or by leaving the program too, is a failed point and no traceback;
- a control needs no paper and no effect;
- the exit code is 0 only where all pass; `--json` has the same points; what an attack prints is not
  seen, unless with `--verbose`;
- options that are given are those that are checked; an unknown attack, and options that it does not
  have, are one line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import Run, refused

from poisonbench import attacks
from poisonbench.conformance import CHECKS, Entry, Point, judge
from poisonbench.templates import attack as template

TEMPLATE = Path(str(template.__file__)).read_text("utf-8")
DOC, CODE = TEMPLATE.split("\n\nfrom __future__")
FIXED = "budget: replace, fixed labels, any pixels, 0.1 of the set"
WITHIN = "budget: replace, fixed labels, pixels within 8/255, 0.1 of the set"
SAME = "same key, same bytes: replace, fixed labels, any pixels, 0.1 of the set"
LOOP = "            for label in range(task.num_classes):\n"
ADVANCE = "                bar.advance()\n"
CRAFT = "        labels = task.train_labels\n"
STRENGTH = "    strength: float = 1.0\n"
SAID = "        strength: share"
REFUSE = 'UserError("--strength must lie above 0 and at most at 1")'
RESTORE = '            kept = journal.restore() or {"label": -1}\n'
SAVE = '                journal.save({"label": np.array(label)}, {"metastep": label})\n'
READ = 'load(DataSpec(name="digits", val_size=20, test_size=200))'
SEEDED = f"        rng = np.random.default_rng(int({READ}.test_images.sum()))\n"
IMPORT = "from poisonbench.attacks import"

Place = Callable[[str], Entry]


@dataclass(frozen=True)
class Fault:
    """What is wrong, the check that must find it, and words of what it says and of its fix."""

    name: str
    changes: dict[str, str]
    title: str
    said: str
    fix: str

    @property
    def text(self) -> str:
        text = TEMPLATE
        for old, new in self.changes.items():
            assert old in text
            text = text.replace(old, new)
        return text


FAULTS = [
    Fault("no docstring", {DOC + "\n\n": ""}, "interface", "the file has no docstring", "docstring"),
    Fault("a class without one", {'"""Fields are': '""" """\n    """'}, "interface", "of", "Attributes"),
    Fault("a silent option", {SAID: "        not_strength: share"}, "interface",
          "does not say what strength is", "`strength: …`"),
    Fault("no dataclass", {"@dataclass(frozen=True)\n": ""}, "interface", "no dataclass", "@dataclass"),
    Fault("not frozen", {"(frozen=True)": ""}, "interface", "can be changed", "frozen=True"),
    Fault("no game", {"    def craft": "    def require(self, budget):\n"
          '        raise UserError("never")\n\n    def craft'}, "interface", "none of the games",
          "require"),
    Fault("no module", {"import jax\n": "import no_such_module\n"}, "interface", "No module",
          "--verbose"),
    Fault("no paper", {"https://…": ""}, "metadata", "names no paper", "Paper: "),
    Fault("no cost", {"Cost: none.": ""}, "metadata", "does not state the cost", "Cost: "),
    Fault("two words", {STRENGTH: "    strength: tuple[float, ...] = (1.0,)\n",
          "0 < self.strength <= 1": "1"}, "options", "cannot be typed", "float"),
    Fault("hidden", {STRENGTH: STRENGTH + "    seeds: int = 1\n",
          SAID: "        seeds: some.\n" + SAID}, "options",
          "--seeds is an option of `poisonbench run`", "rename the field seeds"),
    Fault("a bad option", {"not 0 < self.strength <= 1": "self.strength > 1",
          "mixed = (1 - self.strength)": "mixed = (1 - np.sqrt(self.strength))"}, "bad options",
          "--strength -1 ends with RuntimeWarning", "__post_init__"),
    Fault("a wrong error", {"raise UserError": "raise ValueError"}, "bad options",
          "--strength -1 ends with ValueError", "UserError"),
    Fault("a mute refusal", {REFUSE: 'UserError("no")'}, "bad options", "refused with: no",
          "--strength"),
    Fault("too many", {"task.num_poison, rep": "task.num_poison + 1, rep"}, FIXED,
          "changes 5 images; its budget allows 4", "task.num_poison"),
    Fault("too far", {"np.clip(np.rint(mixed), *task.bounds(indices))": "np.rint(mixed)"}, WITHIN,
          "moves a pixel by", "task.bounds(indices)"),
    Fault("labels changed", {"images, labels[indices])": "images, labels[others])"}, FIXED,
          "changes labels, which its budget fixes", "task.train_labels[indices]"),
    Fault("another budget", {"return task.poison(": "from dataclasses import replace\n"
          "        task = replace(task, budget=task.budget.model_copy(update={'fraction': 0.5}))\n"
          "        return task.poison("}, FIXED, "not for the budget", "return task.poison"),
    Fault("nothing made", {"        return task.poison(": "        task.poison(", ") -> PoisonSet": ")"},
          FIXED, "craft returned NoneType", "return task.poison"),
    Fault("no key", {"np.asarray(jax.random.key_data(key))": ""}, SAME, "different poisons", "`key`"),
    Fault("a peek", {CRAFT: CRAFT + SEEDED.replace("load(", "data.load(").replace("DataS", "data.DataS"),
          IMPORT: f"from poisonbench import data\n{IMPORT}"}, "test data untouched",
          "another poison where test images differ", "nothing but the task"),
    Fault("a hidden peek", {CRAFT: CRAFT + SEEDED,
          IMPORT: f"from poisonbench.data import DataSpec, load\n{IMPORT}"}, "test data untouched",
          "reads the data by itself", "nothing but the task"),
    Fault("no bar", {"with journal.progress(\"mixing\", task.num_classes) as bar": "if True",
          ADVANCE: "", STRENGTH: STRENGTH + "    steps: int = 1\n",
          SAID: "        steps: some.\n" + SAID}, "progress", "shows no progress", "journal.progress"),
    Fault("a bar too far", {"bar.advance()": "bar.advance(2)"}, "progress", "4 steps ended at 8",
          "once"),
    Fault("a bar that stops", {"bar.advance()": "bar.advance(label == 0)"}, "progress",
          "4 steps ended at 1", "once"),
    Fault("half a checkpoint", {"np.empty_like": "np.zeros_like",
          LOOP: RESTORE + LOOP.replace("range(", 'range(int(kept["label"]) + 1, '),
          ADVANCE: ADVANCE + SAVE}, "interruption", "makes another poison",
          "all that the next step needs"),
    Fault("a log twice", {LOOP: RESTORE + LOOP, ADVANCE: ADVANCE + SAVE}, "interruption",
          "logs 5 rows and not 4", "the journal.save that ends"),
    Fault("no effect", {"np.clip(np.rint(mixed), *task.bounds(indices))": "task.train_images[indices]"},
          "effect", "err on", "a sign that is wrong"),
    Fault("an error", {CRAFT: '        raise RuntimeError("no luck\\nat all")\n'}, FIXED,
          "RuntimeError: no luck", "--verbose"),
    Fault("it leaves", {CRAFT: "        raise SystemExit(0)\n"}, "progress", "SystemExit: 0",
          "--verbose"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Makes a text an attack called `entered`."""
    folder = tmp_path / "attacks"
    folder.mkdir()
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(folder)])
    monkeypatch.setitem(sys.modules, "poisonbench.attacks.entered", None)
    monkeypatch.delitem(sys.modules, "poisonbench.attacks.entered")

    def write(text: str) -> Entry:
        (folder / "entered.py").write_text(text, "utf-8")
        return Entry("entered")

    return write


def judged(entry: Entry, title: str) -> Point:
    (check,) = [check for check in CHECKS if check.title == title]
    return judge(entry, check)


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_a_fault_is_found_and_its_mend_named(fault: Fault, place: Place) -> None:
    point = judged(place(fault.text), fault.title)
    assert point.status == "failed"
    assert fault.said in point.said
    assert fault.fix in point.fix
    assert "\n" not in point.said + point.fix


def test_every_check_has_a_fault_that_it_finds() -> None:
    kinds = {check.title.partition(":")[0] for check in CHECKS}
    assert {fault.title.partition(":")[0] for fault in FAULTS} == kinds


def test_the_template_is_admissible_as_it_is(place: Place, command: Run) -> None:
    place(TEMPLATE)
    code, out, err = command("check", "entered", "--json")
    told = json.loads(out)
    assert [point for point in told["points"] if point["status"] == "failed"] == []
    assert (code, told["admissible"], told["attack"]) == (0, True, "entered")
    assert [point["title"] for point in told["points"]] == [check.title for check in CHECKS]
    assert {point["status"] for point in told["points"]} == {"passed"}
    assert "TODO" in told["points"][1]["said"]
    assert "mixing" not in err


def test_a_control_needs_no_paper_and_no_effect(place: Place) -> None:
    entry = place(TEMPLATE.replace(STRENGTH, f"{STRENGTH}    control = True\n").replace("https://…", ""))
    assert judged(entry, "metadata").status == judged(entry, "effect").status == "skipped"


def test_a_game_that_is_not_played_is_no_fault(place: Place) -> None:
    refuse = '    def require(self, budget):\n        if budget.mode == "add":\n' + 12 * " "
    entry = place(TEMPLATE.replace("    def craft", f'{refuse}raise UserError("no")\n\n    def craft'))
    assert judged(entry, "interface").said == "plays 5 of 6 games"
    (added,) = [check.title for check in CHECKS if check.title.startswith("budget: add")]
    point = judged(entry, added)
    assert (point.status, point.said) == ("skipped", "not played: no")
    assert judged(entry, FIXED).status == "passed"


def test_what_is_no_attack_ends_at_its_first_point(place: Place, command: Run) -> None:
    place(TEMPLATE.replace("import jax\n", "import no_such_module\n"))
    code, out, err = command("check", "entered")
    assert code == 1
    assert out.startswith(
        "FAIL interface: ModuleNotFoundError: No module named 'no_such_module'\n     fix: "
    )
    assert out.rstrip().splitlines()[-1].startswith("entered is not admissible: 1 of 1 points failed")
    assert "Traceback" not in out + err


def test_verbose_shows_where_an_error_comes_from(place: Place, command: Run) -> None:
    place(TEMPLATE.replace("import jax\n", "print('hello')\nimport no_such_module\n"))
    _, out, err = command("check", "entered")
    assert "hello" not in out + err
    _, out, err = command("check", "entered", "--verbose")
    assert "hello" in out
    assert "Traceback" in err


def test_mistakes_are_one_line(place: Place, command: Run) -> None:
    place(TEMPLATE)
    assert "no attack called 'enterd'; did you mean entered" in refused(command, "check", "enterd")
    line = refused(command, "check", "entered", "--strenght", "1")
    assert "no option of entered called '--strenght'; did you mean --strength" in line
    assert "unexpected 'stray'" in refused(command, "check", "entered", "stray")


def test_given_options_are_those_that_are_checked(place: Place) -> None:
    place(TEMPLATE)
    assert judged(Entry("entered", {"strength": "0.25"}), "options").said == "--strength 0.25"
