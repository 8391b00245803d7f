"""Rows that can't be read: refused at once, or counted and left out as long as they are few."""

from typing import Literal, get_args

from datamodules.records import LoadReport
from tiltmeter.errors import UserError

Malformed = Literal["strict", "skip"]
MAX_SHARE = 0.01
"""Largest share of a file's rows that may be left out; more, and it is another kind of file."""


def check_policy(malformed: str) -> None:
    """Check the name of a policy. Raises UserError."""
    if malformed not in get_args(Malformed):
        raise UserError(f"data.malformed: expected strict or skip, got {malformed!r}")


class MalformedRows:
    """Refuses or counts the malformed rows of one file; called with each error.

    Args:
        policy: ``strict`` raises the first; ``skip`` keeps them for :meth:`settle`.
    """

    def __init__(self, policy: Malformed) -> None:
        self.policy = policy
        self._errors: list[UserError] = []

    def __call__(self, error: UserError) -> None:
        """Refuse a row, or leave it out. Raises UserError."""
        if self.policy == "strict":
            raise error
        self._errors.append(error)

    def settle(self, report: LoadReport, n_read: int) -> None:
        """Write into a file's report what was left out.

        Args:
            n_read: rows of the file that were read.

        Raises:
            UserError: more than 1 % of its rows.
        """
        if not self._errors:
            return
        n, first = len(self._errors), self._errors[0]
        n_rows = n + n_read
        if n > MAX_SHARE * n_rows:
            raise UserError(
                f"{report.location}: {n} of {n_rows} rows are malformed, more than {MAX_SHARE:.0%}; the first: {first}"
            )
        report.notes["malformed, left out"] = f"{n} ({first})"
