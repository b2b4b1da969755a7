"""Which GPU each rank uses, where several ranks may share one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuMap:
    """The GPUs of ranks that fill hosts in order, `ranks_per_host` on each, and at most `ranks_per_gpu` on a GPU.

    Ranks go round the GPUs that are used, the fewest that suffice. So of a source and a destination on ranks of their
    own, each GPU has some of both.
    """

    ranks_per_host: int
    ranks_per_gpu: int = 1

    @property
    def gpus_per_host(self) -> int:
        """GPUs in use on a host that is full."""
        return -(-self.ranks_per_host // self.ranks_per_gpu)

    @property
    def most_ranks(self) -> int:
        """Ranks of the GPU that has most."""
        return -(-self.ranks_per_host // self.gpus_per_host)

    @property
    def is_shared(self) -> bool:
        """Whether any GPU has several ranks."""
        return self.most_ranks > 1

    def device_of(self, rank: int) -> int:
        """The GPU of `rank`, as its host numbers them."""
        return rank % self.ranks_per_host % self.gpus_per_host

    def gpu_of(self, rank: int) -> int:
        """The GPU of `rank`, numbered through all hosts."""
        return rank // self.ranks_per_host * self.gpus_per_host + self.device_of(rank)


def planned_gpus(num_ranks: int, gpus_per_host: int, ranks_per_gpu: int) -> GpuMap:
    """The GPUs of `num_ranks` ranks on hosts of `gpus_per_host`: of one host no more than needed, of several all."""
    return GpuMap(min(num_ranks, gpus_per_host * ranks_per_gpu), ranks_per_gpu)
