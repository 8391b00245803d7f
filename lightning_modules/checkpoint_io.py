"""Lightning's checkpoints through :mod:`tiltmeter.checkpoint_files`: committed or not there, and only tensors when read."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint.api import CheckpointException

from tiltmeter.checkpoint_files import commit, prune
from tiltmeter.errors import FailedWrite, UserError
from tiltmeter.models.shards import check_shards


class CommittedCheckpointIO(CheckpointIO):
    """Saves and loads the checkpoints of one run.

    A save that fails (a full disk, a missing permission) is reported and leaves the checkpoints of before, and training
    goes on: what it has learnt is in memory, and the next save may work.

    Args:
        made_by: goes into every manifest.
        on_failure: told which checkpoint could not be saved, and why; called on the first process.
    """

    def __init__(self, made_by: Mapping[str, Any], *, on_failure: Callable[[Path, FailedWrite], object]) -> None:
        self.made_by = made_by
        self.on_failure = on_failure
        self.failure: FailedWrite | None = None
        """Why the last save failed; None: it didn't. Known on the first process, for shards on all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """One file, written by the first process, which alone calls this."""
        self._save(Path(path), lambda partial: torch.save(checkpoint, partial), step=checkpoint["global_step"])

    def save_shards(self, write: Callable[[Path], object], path: Path, *, step: int) -> None:
        """A folder of shards; every process calls this, ``write`` begins with a message from the first to the others."""

        def write_all(partial: Path) -> None:
            try:
                write(partial)
            except CheckpointException as error:  # told to all processes alike, and no Exception
                raise next(iter(error.failures.values()))[0] from error

        self._save(path, write_all, step=step)

    def _save(self, link: Path, write: Callable[[Path], object], *, step: int) -> None:
        rank, world_size = _rank_and_world_size()
        self.failure = None
        try:
            commit(link, write, step=step, world_size=world_size, made_by=self.made_by, is_first=rank == 0)
        except FailedWrite as error:
            self.failure = error
        if self.failure is not None and rank == 0:
            self.on_failure(link, self.failure)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file that the first process chose, and had verified.

        Raises:
            UserError: it is a folder of shards, or holds more than tensors and plain values.
        """
        path = _first_process_s(Path(path))
        if path.is_dir():
            raise UserError(
                f"ckpt_path: {path} is a folder of shards, which only a sharded run reads; resume with trainer=fsdp"
            )
        return load_plain(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Take the link away; what it pointed to goes as soon as newer ones are there."""
        Path(path).unlink(missing_ok=True)
        prune(Path(path).parent)


def load_plain(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values, on the CPU.

    Raises:
        UserError: it holds anything else, or options from which Lightning would make objects.
    """
    with only_plain(path):
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if made := sorted(key for key in checkpoint if "hyper_parameters" in str(key) or str(key).startswith("_")):
        raise UserError(f"ckpt_path: {path} holds {', '.join(made)}, which no run writes here; it was not loaded")
    return checkpoint


def check_sharded(folder: Path) -> None:
    """Refuse a folder of shards that would run anything when PyTorch reads it.

    Raises:
        UserError: it would, or is no such folder.
    """
    with only_plain(folder):
        check_shards(folder)
        load_plain(folder / _METADATA_FILENAME)


@contextmanager
def only_plain(path: Path) -> Iterator[None]:
    """Turn PyTorch's refusal to make objects into one line."""
    try:
        yield
    except (pickle.UnpicklingError, OSError, EOFError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"ckpt_path: {path} was not read, since it is damaged or holds more than tensors and plain values ({reason}); "
            "choose another checkpoint"
        ) from error


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _first_process_s(path: Path) -> Path:
    """The first process's path on every process."""
    paths = [str(path)]
    if _rank_and_world_size()[1] > 1:
        torch.distributed.broadcast_object_list(paths, 0)
    return Path(paths[0])
