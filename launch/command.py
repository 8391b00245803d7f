"""The command line around a Hydra main: arguments checked first, wrong input as one line and exit code 2."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from signal import SIGINT
from typing import Any

from hydra.errors import HydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed import DistNetworkError

from launch.config_keys import config_key
from launch.configuration import prepare_overrides
from launch.processes.interrupts import INTERRUPTED, interrupts_end_commands
from launch.run_folder import is_first_process
from launch.screen import quiet_libraries
from launch.studies.running import run_study, study_of
from tiltmeter.errors import FailedWrite, IncompleteEvaluation, NumericalStop, Preempted, UserError, arguments_shown
from tiltmeter.plain_text import allow_any_encoding

TODAY = "TILTMETER_DATE"
"""Environment variable that ``chat_date`` is read from."""
Known = FailedWrite | UserError | IncompleteEvaluation | NumericalStop | Preempted
EXIT_CODES: Mapping[type[Known], int] = {
    FailedWrite: 1,
    UserError: 2,
    IncompleteEvaluation: 3,
    NumericalStop: 4,
    Preempted: 143,
}


def run_command(main: Callable[[], Any], *, config_name: str) -> None:
    """Check ``sys.argv``, then call a function decorated with ``hydra.main``; exit codes as in DESIGN §8."""
    with interrupts_end_commands():
        allow_any_encoding()
        quiet_libraries()
        # one day for all processes and jobs of a command
        os.environ.setdefault(TODAY, datetime.now().astimezone().date().isoformat())
        try:
            sys.argv[1:] = prepare_overrides(sys.argv[1:], config_name=config_name)
            if config_name == "train" and study_of(sys.argv[1:]) is not None:
                run_study(sys.argv[1:])
                return
        except UserError as error:
            exit_with(error)
        main()


@contextmanager
def one_line_errors(config: DictConfig, *, clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End the process with one line on wrong input or another known reason (``EXIT_CODES``); anything else passes.

    Args:
        config: whose keys the line names, in the place of arguments; with ``debug`` the traceback is shown instead.
        clean_up: called before leaving, whatever the reason.
    """
    try:
        with arguments_shown(lambda name: config_key(name, config)):
            yield
    except KeyboardInterrupt:
        clean_up()
        raise
    except (Exception, Preempted) as error:
        clean_up()
        known = error if isinstance(error, Known) else as_user_error(error)
        if known is None or config.debug:
            raise
        exit_with(known)


def exit_with(error: Known) -> None:
    """Print one line and leave with the exit code of its kind; only the first process prints."""
    if is_first_process():
        print(f"tiltmeter: {error}", file=sys.stderr, flush=True)  # noqa: T201
    if isinstance(error, Preempted) and error.signal == SIGINT and error.checkpoint is None:
        sys.exit(INTERRUPTED)
    sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))


def as_user_error(error: BaseException) -> UserError | None:
    """The user error inside an exception of a library that wrapped it, or a library's own complaint about options."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    if isinstance(error, DistNetworkError):
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return UserError(
            f"MASTER_PORT: the processes can't meet at {address} ({str(error).splitlines()[0]}); set it to a free port"
        )
    if isinstance(error, InstantiationException | MisconfigurationException | HydraException | OmegaConfBaseException):
        text = str(error.__cause__ or error).strip()
        return UserError(" ".join(text.split()))
    return None
