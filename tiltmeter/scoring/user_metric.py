"""Any metric of Hugging Face's ``evaluate``, by name or as a script of your own."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from tiltmeter.errors import UserError, argument
from tiltmeter.scoring.scorer import Figure, Sample, Scores, mean_figure

_PREFIX = "evaluate:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class UserMetric:
    """Figures ``<metric>_<key>`` of both models, one for each number that the metric's ``compute`` gives.

    ``compute`` gets the completions as ``predictions`` and, if it takes them, the data set's chosen responses as
    ``references``. A number is a figure of all samples together, without an interval; a list of one number a sample is a
    column, and its mean a figure with an interval. Anything else it gives is named in a warning. When it fails, the figure
    ``<metric>`` is missing.

    **This runs code**: a script on disk is your own; a name makes ``evaluate`` download a script from the hub and run it.

    Args:
        metric: ``evaluate:PATH``, a script (``.py``) or a folder with one of its name; or ``evaluate:NAME`` on the hub.
        trust: allow that code from the hub is run; needed for names.
        revision: commit or tag of a metric on the hub; pin it for figures that are to be remade.
        options: further arguments of ``compute``, for example ``{lang: en}`` for bertscore.
    """

    is_slow = False

    def __init__(
        self,
        metric: str,
        trust: bool = False,
        revision: str | None = None,
        options: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        if not metric.startswith(_PREFIX) or metric == _PREFIX:
            raise UserError(f"{argument('UserMetric.metric')}: expected evaluate:NAME or evaluate:PATH, got {metric!r}")
        self.where = metric.removeprefix(_PREFIX)
        self.script = _find_script(self.where)
        if self.script is None and not _HUB_NAME.fullmatch(self.where):
            raise UserError(
                f"{argument('UserMetric.metric')}: no such metric script: {self.where} (expected FILE.py, a folder FOLDER with "
                "FOLDER.py in it, or a name on the hub)"
            )
        if self.script is None and not trust:
            raise UserError(
                f"{argument('UserMetric.trust')}: {self.where} is code that evaluate downloads from the hub and runs; read it, "
                "then set trust=true, or give the path of a script of your own"
            )
        if self.script is not None and revision is not None:
            raise UserError(
                f"{argument('UserMetric.revision')}: only for a metric from the hub; leave it out for a script on disk"
            )
        self.revision = revision
        self.options = dict(options or {})
        self.figure = re.sub(r"\W+", "_", (self.script or Path(self.where)).stem)
        version = f"@{revision}" if revision else ""
        extra = "".join(f" {key}={value}" for key, value in self.options.items())
        self.name = f"{metric}{version}{extra}"
        self._module: Any = None

    def start(self) -> None:
        """Load the metric. Raises UserError: a script that fails, or a name that can't be had, for example without network."""
        import evaluate  # type: ignore[import-untyped]  # takes seconds, and only here is it wanted

        if self.script is None:
            warnings.warn(
                f"metric: runs code of {self.where} from the Hugging Face hub, as trust=true allows", stacklevel=2
            )
        try:
            where = self.where if self.script is None else str(self.script)
            self._module = evaluate.load(where, revision=self.revision, keep_in_memory=True)
        except Exception as error:  # whatever the script raises
            raise UserError(self._cannot_load(error)) from error

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score the completions of both models."""
        scores = Scores()
        of: Literal["policy", "base"]
        for of in ("policy", "base"):
            found = self._compute(samples, of) if samples else {}
            if not found:
                scores.figures.append(self._of_all(self.figure, of, math.nan, len(samples)))
            for key, value in found.items():
                name = f"{self.figure}_{key}"
                if isinstance(value, list):
                    scores.columns[f"{name}/{of}"] = value
                    scores.figures.append(mean_figure(name, of, value, samples, scorer=self.name))
                else:
                    scores.figures.append(self._of_all(name, of, value, len(samples)))
        return scores

    def _of_all(self, name: str, of: Literal["policy", "base"], value: float, n_samples: int) -> Figure:
        n_missing = n_samples if math.isnan(value) else 0
        return Figure(name, of, value, math.nan, math.nan, n_samples - n_missing, n_missing, self.name)

    def _compute(self, samples: Sequence[Sample], of: str) -> dict[str, float | list[float]]:
        if self._module is None:
            raise RuntimeError("call start() before scoring")
        predictions, references = zip(*((getattr(sample, of).text, sample.chosen) for sample in samples), strict=True)
        try:  # evaluate itself leaves out references that a metric doesn't take
            result = self._module.compute(predictions=list(predictions), references=list(references), **self.options)
        except Exception as error:  # a metric that fails is a missing figure, whatever it raised
            warnings.warn(f"metric: {self.where} failed on the {of}'s completions: {_first_line(error)}", stacklevel=3)
            return {}
        return self._numbers(result or {}, len(samples))

    def _numbers(self, result: Mapping[str, Any], n_samples: int) -> dict[str, float | list[float]]:
        """The entries that are a number, or one a sample; the names of all others go into a warning."""
        numbers: dict[str, float | list[float]] = {}
        for key, value in result.items():
            plain = value.tolist() if hasattr(value, "tolist") else value
            if _is_number(plain):
                numbers[key] = _finite(float(plain))
            elif isinstance(plain, list) and len(plain) == n_samples and all(map(_is_number, plain)):
                numbers[key] = [_finite(float(one)) for one in plain]
        left_out = sorted(set(result) - set(numbers))
        if left_out:
            warnings.warn(
                f"metric: {self.where} also gave {', '.join(left_out)}: no number, nor one a sample", stacklevel=4
            )
        return numbers

    def _cannot_load(self, error: Exception) -> str:
        if self.script is not None:
            return f"{argument('UserMetric.metric')}: can't load {self.script}: {_first_line(error)}"
        return (
            f"{argument('UserMetric.metric')}: can't get {self.where} from the Hugging Face hub ({_first_line(error)}); check "
            "the name and the network, or give the path of a script on disk"
        )


def _find_script(where: str) -> Path | None:
    """The script that a path means; None when there is none."""
    path = Path(where).expanduser()
    script = path / f"{path.resolve().name}.py" if path.is_dir() else path
    return script.resolve() if script.suffix == ".py" and script.is_file() else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
