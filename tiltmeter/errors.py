"""The one exception that means: what you gave me can't work, and here is what to do."""


class UserError(ValueError):
    """Wrong input or configuration: shown as one line without a traceback, exit code 2.

    The message says what is wrong, what was expected, what was found and what to do, and starts with the configuration
    key or the file it is about: ``data.path: no such file: hh/test.jsonl (expected .jsonl, .jsonl.gz or a folder of them)``.
    """
