"""The tree and the picture of docs/architecture.md, from the modules' own first sentences and the three flows below.

python docs/architecture.py        # writes docs/architecture.md anew between its marks, and docs/images/data_flow.png
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.report.style import COLOURS, house_style, png_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: python docs/architecture.py -->\n", "<!-- end of tree -->\n"
PACKAGES = {
    "tiltmeter": COLOURS["policy"],
    "datamodules": COLOURS["chosen"],
    "lightning_modules": COLOURS["rejected"],
    "callbacks": COLOURS["dpo_shuffled"],
    "analysis": COLOURS["sft_chosen"],
    "launch": COLOURS["base"],
}
"""Package → its colour in the picture."""


class Step(NamedTuple):
    """One file of a flow."""

    file: str
    does: str
    hands_on: str = ""
    """What the next file gets."""


FLOWS = {
    "A batch, from source to loss": (
        Step("datamodules/hh.py", "reads rows, splits them into prompt and responses", "PreferencePair"),
        Step("datamodules/splits.py", "deals whole prompts to train, validation, probe", "PreferencePair"),
        Step("datamodules/tokenization.py", "encodes segment by segment, counts what it cuts", "TokenizedPair"),
        Step("datamodules/sampler.py", "draws the pairs of a step, cuts it by tokens", "StepPlan"),
        Step("datamodules/step_dataset.py", "makes the micro-batches of the step", "TokenizedPair"),
        Step("tiltmeter/pairs/batch.py", "lays out [prompt | chosen | rejected]", "StepBatch"),
        Step("lightning_modules/base.py", "takes the exact mean over micro-batches", "micro-batch"),
        Step("lightning_modules/dpo.py", "joins policy and cached reference", "PreferenceBatch"),
        Step("tiltmeter/pairs/log_probs.py", "runs the backbone once, the head on completions", "log-probs"),
        Step("tiltmeter/pairs/preference_losses.py", "gives one loss a pair", ""),
    ),
    "A hidden state, from hook to figure": (
        Step("tiltmeter/models/hooks.py", "finds the module that computes a site", "hidden"),
        Step("tiltmeter/states/capture.py", "keeps the wanted rows of one forward pass", "HiddenStates"),
        Step("tiltmeter/states/probe_set.py", "reads the fixed held-out pairs", "HiddenStates"),
        Step("tiltmeter/states/snapshots.py", "writes and reads them, with ids and hashes", "StatePair"),
        Step("tiltmeter/states/state_pair.py", "holds base and policy rows of the same tokens", "StatePair"),
        Step("analysis/open/observed.py", "opens them, stored or read now", "Observed"),
        Step("analysis/figures/fig3_consistency.py", "measures a table and draws from it alone", ""),
    ),
    "A steering vector, from estimate to figure": (
        Step("analysis/steering/directions.py", "estimates v* on one half of the prompts", "Made"),
        Step("analysis/steering/vectors.py", "puts controls of equal norm beside it", "SteeringVector"),
        Step("analysis/steering/sweep.py", "plans site × vector × λ on the other half", "Unit"),
        Step("tiltmeter/steering/sweep_logits.py", "runs the blocks above the site for all λ at once", "logits"),
        Step("analysis/steering/teacher_forced.py", "scores recovery and preference, pair by pair", "rows"),
        Step("analysis/steering/table.py", "appends them to sweep.csv", "tables"),
        Step("analysis/controls/c15_random_vectors.py", "judges it among random vectors", "tables"),
        Step("analysis/figures/fig2_steering.py", "draws Figure 2 from the tables alone", ""),
    ),
}


def main() -> None:
    """Write the page's tree and the picture."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(head + BEGIN + tree() + END + rest.partition(END)[2], encoding="utf-8")
    with house_style():
        (ROOT / "docs" / "images" / "data_flow.png").write_bytes(png_bytes(picture()))


def tree() -> str:
    """A table for each folder of the product: its files, and the first sentence of each."""
    text = ""
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            files = [file for file in sorted(init.parent.glob("*.py")) if file != init]
            rows = "".join(f"| `{file.name}` | {first_sentence(file)} |\n" for file in files)
            text += f"\n### {init.parent.relative_to(ROOT)}\n\n{first_sentence(init)}\n"
            text += f"\n| file | |\n|---|---|\n{rows}" if rows else ""
    return text + "\n"


def first_sentence(file: Path) -> str:
    """First paragraph of a module's docstring, on one line and fit for a table."""
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split()).replace("|", "\\|")


def picture() -> Figure:
    """The three flows beside each other, a box a file, what is handed on written on the arrows."""
    longest = max(map(len, FLOWS.values()))
    figure = Figure(figsize=(22 / 2.54, (0.9 + 1.42 * longest) / 2.54), dpi=200, layout="constrained")
    for axes, (title, steps) in zip(figure.subplots(1, len(FLOWS)), FLOWS.items(), strict=True):
        axes.set(xlim=(0, 1), ylim=(longest - 0.2, -0.15))
        axes.set_axis_off()
        axes.set_title(title, x=0.02)
        for i, step in enumerate(steps):
            draw_step(axes, i, step, is_last=i == len(steps) - 1)
    return figure


def draw_step(axes: Axes, at: int, step: Step, *, is_last: bool) -> None:
    """A box with the file and what it does, and the arrow to the next one."""
    package = step.file.split("/")[0]
    box = {"boxstyle": "round,pad=0.02", "facecolor": "white", "edgecolor": PACKAGES[package], "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((0.03, at), 0.94, 0.58, **box))
    axes.text(0.06, at + 0.17, step.file, color=PACKAGES[package], fontweight="bold", fontsize=6.5, va="center")
    axes.text(0.06, at + 0.42, step.does, fontsize=6.5, va="center")
    if not is_last:
        arrow = {"arrowstyle": "-|>", "color": COLOURS["mark"], "linewidth": 0.9}
        axes.annotate("", xy=(0.5, at + 0.97), xytext=(0.5, at + 0.61), arrowprops=arrow)
        axes.text(0.53, at + 0.79, step.hands_on, fontsize=6.5, color=COLOURS["mark"], va="center")


if __name__ == "__main__":
    main()
