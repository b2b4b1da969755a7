"""The result types of reading and writing checkpoints, as result files hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A source filled from a checkpoint, after a plain read of the same files by the same ranks. Times are those of the
    slowest rank.
    """

    folder: str
    num_tensors: int
    num_files: int
    nbytes: int
    """Of the model's tensors in the files."""
    file_bytes: int
    """All bytes of the files."""
    seconds: float
    """Until the source is filled."""
    raw_s: float
    """The plain read: each rank's equal share of all files, read once from begin to end."""
    read_bytes_per_rank: tuple[int, ...]
    """Read to fill the weights; 0 on ranks outside the source."""
    weights_bytes_per_rank: tuple[int, ...]
    """0 on ranks outside the source."""
    extra_memory_bytes_per_rank: tuple[int | None, ...]
    """Resident memory beside the weights; None where that cannot be told, and on GPUs."""
    cold_share: float | None = None
    """Share of probed places of the files that were not in the page cache when loading began; None where the file
    system does not tell."""
    raw_cold_share: float | None = None
    """The same when the plain read began."""
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
    """A tensor with elements other than expected in the files."""

    key: str
    num_wrong: int
    first: str
    """The first wrong element, as text."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a destination held, written as a checkpoint and read again."""

    folder: str
    num_tensors: int
    num_files: int
    nbytes: int
    seconds: float
    """Until all bytes were on disk, of the slowest rank."""
    compared_with: str | None = None
    """Whose values the elements of the files were compared with, bit for bit; None where nothing was compared."""
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
