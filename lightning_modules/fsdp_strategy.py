"""FSDP2 through Lightning: every process of the job is one data-parallel shard."""

from lightning.pytorch.strategies import ModelParallelStrategy


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
