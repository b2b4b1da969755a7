"""The result types of reading and writing checkpoints, as result files hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A source filled from a checkpoint, after a plain read of the same files by the same ranks.

    `nbytes` are those of the model's tensors in the files, `file_bytes` all bytes of these. Times are those of the
    slowest rank, `raw_s` of each rank's equal share of all files, read once from begin to end. `read_bytes_per_rank`
    counts what the ranks read to fill `weights_bytes_per_rank`; both are 0 on ranks outside the source.
    `extra_memory_bytes_per_rank` is how much more resident memory than its weights each took; None where that cannot be
    told, and on GPUs. `cold_share` is the share of probed places of the files that were not in the page cache when
    loading began, `raw_cold_share` when the plain read did; None where the file system does not tell.
    """

    folder: str
    num_tensors: int
    num_files: int
    nbytes: int
    file_bytes: int
    seconds: float
    raw_s: float
    read_bytes_per_rank: tuple[int, ...]
    weights_bytes_per_rank: tuple[int, ...]
    extra_memory_bytes_per_rank: tuple[int | None, ...]
    cold_share: float | None = None
    raw_cold_share: float | None = None
    status: Status = Status.OK

    @property
    def gb_per_s(self) -> float:
        """Bytes of the checkpoint over the time until every rank has its weights."""
        return self.nbytes / self.seconds / 1e9

    @property
    def raw_gb_per_s(self) -> float:
        return self.file_bytes / self.raw_s / 1e9


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor with elements other than expected in the files, and the first of them as text."""

    key: str
    num_wrong: int
    first: str


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a destination held, written as a checkpoint and read again.

    `compared_with` says whose values the elements of the files were compared with, bit for bit; None where nothing was
    compared. `seconds` is the time until all bytes were on disk, of the slowest rank.
    """

    folder: str
    num_tensors: int
    num_files: int
    nbytes: int
    seconds: float
    compared_with: str | None = None
    num_compared: int = 0
    num_wrong: int = 0
    wrong: tuple[WrittenTensor, ...] = field(default_factory=tuple)

    @property
    def fault(self) -> str | None:
        """What is wrong, in one sentence; None where nothing that was compared is."""
        if not self.num_wrong:
            return None
        what = f"{self.num_wrong:,} of {self.num_compared:,} elements of {self.folder}"
        return f"{what} are not those of {self.compared_with}"
