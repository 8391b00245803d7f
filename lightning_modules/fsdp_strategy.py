"""FSDP2 through Lightning: every process of the job is one data-parallel shard."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_modules.checkpoint_io import CommittedCheckpointIO, check_sharded, only_plain
from tiltmeter.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """ModelParallelStrategy whose data-parallel dimension is the whole world, and no tensor parallelism.

    Lightning's own default shards over nodes and splits tensors over the devices of each; which modules are sharded is
    said in :func:`lightning_modules.policy.shard`.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Fix the mesh's size as soon as the number of processes is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """A folder of shards, committed as a whole when it comes through :class:`CommittedCheckpointIO`."""
        save = super().save_checkpoint
        if isinstance(self.checkpoint_io, CommittedCheckpointIO):
            step = checkpoint["global_step"]
            self.checkpoint_io.save_shards(lambda partial: save(checkpoint, partial), Path(filepath), step=step)
        else:
            save(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Looked through first: PyTorch would run whatever a folder of shards asks for."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            raise UserError(
                f"ckpt_path: {path} is one file, which a sharded run doesn't read; resume with the trainer it was started with"
            )
        check_sharded(path)
        with only_plain(path):
            return super().load_checkpoint(path, weights_only)
