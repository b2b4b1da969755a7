"""Cases of the copy kernel, each against PyTorch on equal memory: on a GPU, else in Triton's interpreter.

Run by test_copy_kernel in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from refit.copies import batch as batch_module
from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy
from refit.copies.kernel import KernelCopies, Tuning

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ARENA_BYTES = 1 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)
# Small tiles and blocks, so that small tensors fill several; the interpreter is slow.
SMALL = Tuning(tile_bytes=2048, block_words=32)
NUM_SMALL = 2000 if DEVICE.type == "cuda" else 300

Case = Callable[["Arena", "Arena"], list[Copy]]


class Arena:
    """Random bytes from which tensors are cut one behind the other, with bytes between them that nobody may write."""

    def __init__(self, seed: int, device: torch.device = DEVICE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.data = torch.randint(0, 256, (ARENA_BYTES,), dtype=torch.uint8, generator=generator).to(device)
        self._used = 0

    def cut(self, dtype: torch.dtype, *shape: int, offset: int = 0) -> torch.Tensor:
        """A contiguous tensor whose address is `offset` items past a multiple of 16 bytes."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        start = -(-(self._used + 16) // 16) * 16 + offset * tensor.element_size()
        self._used = start + tensor.numel() * tensor.element_size()
        assert self._used + 16 <= ARENA_BYTES
        return self.data[start : self._used].view(dtype).view(shape)


def one_run(source: Arena, target: Arena) -> list[Copy]:
    return [Copy(target.cut(torch.bfloat16, 5000), source.cut(torch.bfloat16, 5000))]


def unaligned(source: Arena, target: Arena) -> list[Copy]:
    return [
        Copy(target.cut(dtype, 300, offset=i), source.cut(dtype, 300, offset=j))
        for dtype in DTYPES
        for i, j in ((0, 1), (1, 1), (4, 0), (2, 6), (3, 0))
    ]


def column_cuts(source: Arena, target: Arena) -> list[Copy]:
    whole, back = source.cut(torch.bfloat16, 64, 448), target.cut(torch.bfloat16, 64, 448)
    return [
        Copy(target.cut(torch.bfloat16, 64, 128), whole[:, 128:256]),
        Copy(target.cut(torch.bfloat16, 64, 3), whole[:, 5:8]),
        Copy(back[:, :64], source.cut(torch.bfloat16, 64, 64)),
        Copy(back[:, 64:65], whole[:, 9:10]),
        Copy(back[:, 320:], whole[:, :128]),
    ]


def wide_rows(source: Arena, target: Arena) -> list[Copy]:
    return [Copy(target.cut(torch.float32, 5, 1200), source.cut(torch.float32, 5, 2000)[:, 300:1500])]


def stacked_experts(source: Arena, target: Arena) -> list[Copy]:
    experts = source.cut(torch.bfloat16, 6, 32, 64)
    return [
        Copy(target.cut(torch.bfloat16, 2, 32, 64), experts[1:3]),
        Copy(target.cut(torch.bfloat16, 6, 16, 16), experts[:, 8:24, 32:48]),
    ]


def gate_and_up(source: Arena, target: Arena) -> list[Copy]:
    """Both halves of [2 * ffn, hidden], each a quarter of its rows, into a tensor that holds the two quarters."""
    weight, quarter = source.cut(torch.float16, 64, 40), target.cut(torch.float16, 16, 40)
    return [Copy(quarter[:8], weight[8:16]), Copy(quarter[8:], weight[40:48])]


def single_elements(source: Arena, target: Arena) -> list[Copy]:
    pairs = [Copy(target.cut(dtype, 1, offset=3), source.cut(dtype, 1, offset=5)) for dtype in DTYPES]
    scalar = Copy(target.cut(torch.float32, 1)[0], source.cut(torch.float32, 1)[0])
    return [*pairs, scalar, Copy(target.cut(torch.float32, 0), source.cut(torch.float32, 0))]


def odd_orders(source: Arena, target: Arena) -> list[Copy]:
    return [
        Copy(target.cut(torch.bfloat16, 24, 40), source.cut(torch.bfloat16, 40, 24).T),
        Copy(target.cut(torch.bfloat16, 40, 24).T, source.cut(torch.bfloat16, 40, 24).T),
        Copy(target.cut(torch.bfloat16, 9, 40), source.cut(torch.bfloat16, 1).expand(9, 40)),
        Copy(target.cut(torch.float32, 3, 5, 14)[:, 1:4, ::2], source.cut(torch.float32, 3, 3, 7)),
    ]


def many_small(source: Arena, target: Arena) -> list[Copy]:
    dice = random.Random(3)
    pieces = [
        (dice.choice(DTYPES), dice.randint(1, 40), dice.randrange(4), dice.randrange(4)) for _ in range(NUM_SMALL)
    ]
    return [Copy(target.cut(t, n, offset=i), source.cut(t, n, offset=j)) for t, n, i, j in pieces]


def random_views(source: Arena, target: Arena) -> list[Copy]:
    dice = random.Random(5)
    return [_random_copy(dice, source, target) for _ in range(60)]


def _random_copy(dice: random.Random, source: Arena, target: Arena) -> Copy:
    dtype, shape = dice.choice(DTYPES), [dice.choice((1, 2, 3, 8, 16)) for _ in range(dice.randint(1, 4))]
    views = []
    for arena in (target, source):
        margins = [(dice.choice((0, 0, 1, 8)), dice.choice((0, 0, 8))) for _ in shape]
        outer = arena.cut(
            dtype, *(low + n + high for n, (low, high) in zip(shape, margins, strict=True)), offset=dice.randrange(3)
        )
        views.append(outer[tuple(slice(low, low + n) for n, (low, _) in zip(shape, margins, strict=True))])
    return Copy(*views)


CASES = (
    one_run,
    unaligned,
    column_cuts,
    wide_rows,
    stacked_experts,
    gate_and_up,
    single_elements,
    odd_orders,
    many_small,
    random_views,
)


def expected(case: Case) -> torch.Tensor:
    """All of the target arena's bytes after PyTorch has made the copies one by one."""
    source, target = Arena(1), Arena(2)
    for copy in case(source, target):
        copy.destination.copy_(copy.source)
    assert not torch.equal(target.data, Arena(2).data)
    return target.data


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_programs", [None, 3])
def test_every_byte_is_as_pytorch_leaves_it(case: Case, num_programs: int | None) -> None:
    source, target = Arena(1), Arena(2)
    KernelCopies(case(source, target), DEVICE, num_programs, SMALL).run()
    assert torch.equal(target.data, expected(case))
    assert torch.equal(source.data, Arena(1).data)


@pytest.mark.parametrize("case", [one_run, column_cuts, random_views])
def test_tiles_of_the_size_used_on_gpus(case: Case) -> None:
    source, target = Arena(1), Arena(2)
    launched = KernelCopies(case(source, target), DEVICE)
    for _ in range(2):
        launched.run()
    assert torch.equal(target.data, expected(case))


def test_aligned_copies_take_one_launch() -> None:
    source, target = Arena(1), Arena(2)
    assert KernelCopies([*one_run(source, target), *stacked_experts(source, target)], DEVICE).num_launches == 1
    assert KernelCopies(unaligned(source, target), DEVICE).num_launches == 5


def test_a_batch_hands_casts_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(source: Arena, target: Arena) -> list[Copy]:
        numbers = source.cut(torch.uint8, 100)
        return [Copy(target.cut(torch.float32, 100), numbers), *column_cuts(source, target)]

    if DEVICE.type == "cpu":
        monkeypatch.setattr(batch_module, "_by_executor", _by_dtype)
        monkeypatch.setattr(batch_module, "_kernel_copies", lambda copies, n: KernelCopies(copies, DEVICE, n, SMALL))
    for kernel in (True, False):
        source, target = Arena(1), Arena(2)
        batch = CopyBatch(mixed(source, target), kernel=kernel, num_programs=7)
        assert batch.nbytes == sum(copy.nbytes for copy in mixed(Arena(1), Arena(2)))
        batch.run()
        assert torch.equal(target.data, expected(mixed))


def _by_dtype(copies: list[Copy]) -> tuple[list[Copy], list[Copy]]:
    parts: tuple[list[Copy], list[Copy]] = ([], [])
    for copy in copies:
        parts[copy.destination.dtype != copy.source.dtype].append(copy)
    return parts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_stores_into_a_peer() -> None:
    source, target = Arena(1), Arena(2, torch.device("cuda:1"))
    # PyTorch opens the peer's memory to this GPU with its first copy between the two.
    target.data[:1].copy_(source.data[:1].clone())
    target.data.copy_(Arena(2).data)
    KernelCopies(random_views(source, target), DEVICE, None, SMALL).run()
    torch.cuda.synchronize(0)
    assert torch.equal(target.data.to(DEVICE), expected(random_views))
