"""Toxicity by the Perspective API: for figures comparable with published ones, as long as the service runs."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence

import httpx

from tiltmeter.errors import UserError
from tiltmeter.scoring.scorer import Sample, Scores, notice
from tiltmeter.scoring.toxicity import TextScore, toxicity_scores

URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
MAX_CHARACTERS = 20_480  # of a text that are sent, as RealToxicityPrompts' client does
SUNSET = "Google ends the Perspective API on 31 December 2026; use ClassifierToxicity (unitary/toxic-bert) instead"


class PerspectiveToxicity:
    """Perspective's summary score of one ``attribute``, 0 … 1, for each completion.

    Deprecated: the service ends in 2026. One request a text, ``qps`` a second, with the key in the variable ``api_key_env``.
    Empty texts and what isn't answered have no score; of a long text the beginning is sent (``toxicity_truncated``).
    """

    is_slow = True

    def __init__(self, api_key_env: str = "PERSPECTIVE_API_KEY", qps: float = 1.0, attribute: str = "TOXICITY",
                 language: str = "en", timeout_s: float = 10.0, time_limit_s: float = 600.0) -> None:  # fmt: skip
        if not re.fullmatch(r"[A-Z_]+", attribute):
            raise UserError(f"perspective.attribute: expected a name such as TOXICITY, got {attribute!r}")
        if not re.fullmatch(r"[A-Za-z_]\w*", api_key_env, re.ASCII):  # not shown: it may be the key itself
            raise UserError("perspective.api_key_env: expected the name of an environment variable, not a key")
        for name, value in {"qps": qps, "timeout_s": timeout_s, "time_limit_s": time_limit_s}.items():
            if not 0 < value < math.inf:
                raise UserError(f"perspective.{name}: expected a number above 0, got {value}")
        self.api_key_env, self.attribute, self.language = api_key_env, attribute, language
        self.qps, self.timeout_s, self.time_limit_s = qps, timeout_s, time_limit_s
        self.name = f"Perspective API v1alpha1 {attribute} language={language}"

    def start(self) -> None:
        """Score one harmless text. Raises UserError: no key, or a service that is gone, refuses or can't be reached."""
        notice(f"PerspectiveToxicity: {SUNSET}")
        if isinstance(problem := self._ask("Good morning."), str):
            raise UserError(f"perspective: {problem}; check the key in {self.api_key_env}. {SUNSET}")

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score the completions of both models, in bounded time; what fails is missing."""
        figure = self.attribute.lower()
        return toxicity_scores(samples, self.score_texts, figure=figure, scorer=self.name, can_cut=True)

    def score_texts(self, texts: Sequence[str]) -> list[TextScore]:
        """Score texts by themselves, in their order; what could not be scored is summed up in one warning."""
        deadline, found = time.monotonic() + self.time_limit_s, list[float | str]()
        for text in texts:
            found.append(self._next(text, found, deadline))
        if problems := Counter(problem for problem in found if isinstance(problem, str)):
            reasons = "; ".join(f"{n} × {problem}" for problem, n in problems.most_common())
            notice(f"perspective: {problems.total()} of {len(texts)} texts have no score: {reasons}. {SUNSET}")
        scores = zip((math.nan if isinstance(one, str) else one for one in found), texts, strict=True)
        return [TextScore(score, score == score and len(text) > MAX_CHARACTERS) for score, text in scores]

    def _next(self, text: str, found: Sequence[float | str], deadline: float) -> float | str:
        if found and time.monotonic() + 1 / self.qps > deadline:
            return f"over time_limit_s={self.time_limit_s:g}"
        is_gone = bool(found) and str(found[-1]).endswith(("403", "404", "410"))
        time.sleep(1 / self.qps if found and not is_gone else 0)
        if not text.strip():
            return "empty text"
        return found[-1] if is_gone else self._ask(text)

    def _ask(self, text: str) -> float | str:
        """The score of a text, or why there is none, in words of our own: a reply could repeat the key."""
        if not re.fullmatch(r"[\x21-\x7e]+", key := os.environ.get(self.api_key_env, "").strip()):
            raise UserError(
                f"perspective.api_key_env: the environment variable {self.api_key_env} is not set, or no key"
            )
        body = {"comment": {"text": text[:MAX_CHARACTERS], "type": "PLAIN_TEXT"}, "languages": [self.language]}
        asked = body | {"requestedAttributes": {self.attribute: {}}, "doNotStore": True}
        try:
            reply = httpx.post(URL, json=asked, headers={"X-Goog-Api-Key": key}, timeout=self.timeout_s)
            if not reply.is_success:  # a redirect, too, is not followed: it would take the key to another host
                return f"the service answered {reply.status_code}"
            value = float(reply.json()["attributeScores"][self.attribute]["summaryScore"]["value"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
            return f"no usable answer from the service ({type(error).__name__})"
        return value if 0 <= value <= 1 else "an answer without a score from 0 to 1"
