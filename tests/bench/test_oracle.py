from __future__ import annotations

import pytest
import torch

from refit.bench import oracle
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec


def memory_of(spec: TensorSpec, *boxes: Box) -> LocalWeights:
    dtype = getattr(torch, spec.dtype)
    tensors = [torch.zeros(box.extents, dtype=dtype) for box in boxes]
    return LocalWeights(LocalShard(spec, box, tensor, tensor) for box, tensor in zip(boxes, tensors, strict=True))


def views(memory: LocalWeights) -> list[torch.Tensor]:
    return [shard.view for shard in memory]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(40,), (12, 10), (3, 8, 6), (2, 3, 4, 5)])
def test_shards_of_a_tensor_equal_the_whole_tensor(shape: tuple[int, ...], dtype: str) -> None:
    spec = TensorSpec("layers.0.w", shape, dtype)
    whole = memory_of(spec, Box.whole(shape))
    parts = memory_of(spec, *(Box.whole(shape).split(3)))
    oracle.fill(whole, 7)
    oracle.fill(parts, 7)
    assert torch.equal(torch.cat(views(parts)), views(whole)[0])
    assert oracle.check(parts, {spec.key: spec}, 7).num_wrong == 0
    assert oracle.check(whole, {spec.key: spec}, 7).num_compared == views(whole)[0].numel()


def test_a_column_slice_of_a_strided_view_matches() -> None:
    spec = TensorSpec("w", (4, 6, 8), "bfloat16")
    base = torch.zeros(4, 6, 8, dtype=torch.bfloat16).permute(1, 0, 2).contiguous().permute(1, 0, 2)
    box = Box((0, 2, 4), (4, 3, 4))
    strided = LocalWeights([LocalShard(spec, box, base, base[:, 2:5, 4:8])])
    whole = memory_of(spec, Box.whole(spec.shape))
    oracle.fill(strided, 0)
    oracle.fill(whole, 0)
    assert torch.equal(views(strided)[0], views(whole)[0][:, 2:5, 4:8])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_finite_moderate_and_rarely_equal(dtype: str) -> None:
    memory = memory_of(TensorSpec("w", (256, 256), dtype), Box.whole((256, 256)))
    oracle.fill(memory, 3)
    values = views(memory)[0].float()
    assert values.abs().min() >= 2**-7
    assert values.abs().max() < 2
    assert abs(values.mean()) < 0.02
    for shifted in (values.roll(1, 0), values.roll(1, 1), values.roll(128, 0), values.T.roll(1, 0), values.flip(0)):
        assert (shifted == values).float().mean() < 0.002


def test_iterations_and_names_give_other_values() -> None:
    spec, other = TensorSpec("a", (64, 64), "bfloat16"), TensorSpec("b", (64, 64), "bfloat16")
    memory = memory_of(spec, Box.whole((64, 64)))
    oracle.fill(memory, 1)
    assert oracle.check(memory, {"a": spec}, 2).num_wrong > 4080
    renamed = LocalWeights([LocalShard(other, s.box, s.owner, s.view) for s in memory])
    assert oracle.check(renamed, {"b": other}, 1).num_wrong > 4080


def test_poison_is_wrong_everywhere() -> None:
    spec = TensorSpec("w", (32, 32), "bfloat16")
    memory = memory_of(spec, Box.whole((32, 32)))
    oracle.fill(memory, 0)
    oracle.poison(memory)
    assert oracle.check(memory, {"w": spec}, 0).num_wrong == 32 * 32


def test_one_flipped_bit_is_named_with_its_logical_index() -> None:
    spec = TensorSpec("experts.w", (4, 8, 16), "bfloat16", stacked=True)
    memory = memory_of(spec, Box((2, 4, 8), (2, 4, 8)))
    oracle.fill(memory, 5)
    view = views(memory)[0]
    view.view(torch.int16)[1, 2, 3] ^= 1
    verdict = oracle.check(memory, {spec.key: spec}, 5)
    assert verdict.num_wrong == 1
    (wrong,) = verdict.wrong
    assert (wrong.key, wrong.first.index) == ("experts.w", (3, 6, 11))
    assert wrong.first.found == float(view[1, 2, 3])
    assert wrong.first.expected != wrong.first.found


def test_padding_beyond_the_source_must_be_zero() -> None:
    source, mine = (TensorSpec("emb", (rows, 4), "bfloat16", padded=True) for rows in (6, 8))
    memory = memory_of(mine, Box((4, 0), (4, 4)))
    oracle.fill(memory, 0)
    assert oracle.check(memory, {"emb": source}, 0).num_wrong == 8
    views(memory)[0][2:] = 0
    assert oracle.check(memory, {"emb": source}, 0).num_wrong == 0


def test_a_cast_is_checked_as_a_cast() -> None:
    source, mine = TensorSpec("w", (16, 16), "float32"), TensorSpec("w", (16, 16), "bfloat16")
    held, memory = memory_of(source, Box.whole((16, 16))), memory_of(mine, Box.whole((16, 16)))
    oracle.fill(held, 0)
    views(memory)[0].copy_(views(held)[0])
    assert oracle.check(memory, {"w": source}, 0).num_wrong == 0


def test_samples_are_a_sixteenth_and_move_with_the_iteration() -> None:
    spec = TensorSpec("w", (64, 8), "bfloat16")
    memory = memory_of(spec, Box.whole((64, 8)))
    found = 0
    for iteration in range(16):
        oracle.fill(memory, iteration)
        views(memory)[0][37] = 0
        verdict = oracle.check(memory, {"w": spec}, iteration, sample=True)
        assert verdict.num_compared == 4 * 8
        found += verdict.num_wrong
    assert found == 8
