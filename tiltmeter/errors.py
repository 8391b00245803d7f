"""What ends a program with one line: wrong input (exit code 2), scores that are missing (3), numbers gone wrong (4)."""


class UserError(ValueError):
    """Wrong input or configuration: shown as one line without a traceback, exit code 2.

    The message says what is wrong, what was expected, what was found and what to do, and starts with the configuration
    key or the file it is about: ``data.path: no such file: hh/test.jsonl (expected .jsonl, .jsonl.gz or a folder of them)``.
    """


class NumericalStop(RuntimeError):
    """Training met a loss or gradient that is not finite: shown as one line, exit code 4, nothing exported."""


class IncompleteEvaluation(RuntimeError):
    """Too many scores of a figure are missing: shown as one line, exit code 3; everything that could be scored is kept."""
