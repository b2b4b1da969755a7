#!/usr/bin/env bash
# megatron-core 0.19.2 with torch 2.13.0, on CPUs: its own refit, `swap_model_weights`, scrambles a gated delta net
# (Qwen3-Next) where the tensor-parallel size changes, and returns without an error.
#
# Two ranks. The source holds the whole net on each (TP1), the destination half of it (TP2). `in_proj.weight` has the rows
# of six projections, one behind another, on every rank: query, key, value, z, beta, alpha. All rows of projection number n
# are n. Seen:
#   rank 0, in_proj: query 0, key 0, value 1, z 2, beta 2, alpha 2
#   rank 0, conv1d: query 0, key 0, value 1
#   rank 1, in_proj: query 2, key 3, value 3, z 3/4, beta 5, alpha 5
#   rank 1, conv1d: query 2, key 2, value 2
# Both tensors are marked as parallel along dim 0 with a stride of 1, so that a rank gets one half of all rows. Each rank's
# forward pass takes them for halves of each projection, as `sharded_state_dict` states them.
#
# The layer is built without flash-linear-attention, with which it computes; no pass runs. Megatron-Core's copy services
# need CUDA streams, so the script gives it one of its own over Gloo, which is what the `refit_method` argument takes
# besides a name; two functions of torch.cuda are replaced, since Megatron-Core allocates on the current GPU whatever the
# configuration says. Fails (exit code 1) once a rank's projections are its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 packaging triton==3.9.0
"$folder/venv/bin/pip" install --quiet --no-deps --ignore-requires-python megatron-core==0.19.2
cat >"$folder/look.py" <<'PYTHON'
"""Two ranks: a gated delta net that is whole on each is refitted into one that both hold half of."""
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

SECTIONS = {"query": 8, "key": 8, "value": 16, "z": 16, "beta": 4, "alpha": 4}  # rows: 2 key heads, 4 value heads of 4
torch.cuda.current_device = lambda: "cpu"  # Megatron-Core allocates there even with use_cpu_initialization
torch.cuda.synchronize = lambda *a, **k: None
common.HAVE_FLA = True  # the library that the layer computes with; nothing is computed here
initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


class Copies(CopyService):
    """Megatron's own services need CUDA streams. This one is its documented interface over Gloo."""

    def __init__(self):
        self.operations, self.sources, self.destinations = [], {}, {}

    def submit_send(self, tensor, rank, task_id=None):
        if rank == dist.get_rank():
            self.sources[task_id] = tensor
        else:
            self.operations.append(dist.P2POp(dist.isend, tensor, rank))

    def submit_recv(self, tensor, rank, task_id=None):
        if rank == dist.get_rank():
            self.destinations[task_id] = tensor
        else:
            self.operations.append(dist.P2POp(dist.irecv, tensor, rank))

    def run(self):
        for number, tensor in self.destinations.items():
            tensor.copy_(self.sources[number])
        for request in dist.batch_isend_irecv(self.operations) if self.operations else []:
            request.wait()


def net(alone, both, tensor_parallel):
    groups = ProcessGroupCollection()
    spans = {"tp", "mp", "tp_cp", "tp_dp_cp"} if tensor_parallel else {"dp", "dp_cp", "tp_dp_cp"}
    for name in ("tp", "cp", "pp", "mp", "tp_cp", "dp", "dp_cp", "tp_dp_cp", "expt_tp", "ep", "tp_ep", "tp_ep_pp",
                 "expt_dp", "embd", "pos_embd", "intra_dist_opt"):
        setattr(groups, name, both if name in spans else alone)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, add_bias_linear=False, normalization="RMSNorm",
        tensor_model_parallel_size=2 if tensor_parallel else 1, activation_func=F.silu, use_cpu_initialization=True,
        deterministic_mode=True,  # in which the rule is torch's
        linear_num_key_heads=2, linear_key_head_dim=4, linear_num_value_heads=4, linear_value_head_dim=4,
    )
    parts = GatedDeltaNetSubmodules(ColumnParallelLinear, WrappedTorchNorm, RowParallelLinear)
    return GatedDeltaNet(config, parts, layer_number=1, pg_collection=groups)


def sections(weight, parts):
    """Section -> the numbers in its rows, of `in_proj.weight`, or `conv1d.weight`, which has the first three."""
    sizes = [size // parts for size in SECTIONS.values()][: 6 if weight.dim() == 2 else 3]
    return dict(zip(SECTIONS, weight.split(sizes)))


dist.init_process_group("gloo")
rank = dist.get_rank()
alone = [dist.new_group([each]) for each in range(2)][rank]
both = dist.new_group([0, 1])
source, destination = net(alone, both, False), net(alone, both, True)
with torch.no_grad():
    for tensor in (source.in_proj.weight, source.conv1d.weight):
        for number, rows in enumerate(sections(tensor, 1).values()):
            rows.fill_(float(number))
    for tensor in destination.parameters():
        tensor.fill_(-1.0)
    swap_model_weights(source, destination, Copies())
found = {
    name: {section: sorted({int(value) for value in rows.unique()}) for section, rows in sections(tensor, 2).items()}
    for name, tensor in (("in_proj", destination.in_proj.weight), ("conv1d", destination.conv1d.weight))
}
answers = [None, None]
dist.all_gather_object(answers, found)
if rank == 0:
    for each, held in enumerate(answers):
        for name, numbers in held.items():
            print(f"rank {each}, {name}:", ", ".join(f"{key} {'/'.join(map(str, of))}" for key, of in numbers.items()))
right = [all(numbers == [place] for place, numbers in enumerate(held["in_proj"].values())) for held in answers]
dist.destroy_process_group()
sys.exit(any(right))
PYTHON
if (cd "$folder" && OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore venv/bin/torchrun --standalone --nproc-per-node 2 look.py); then
    echo "As described: no rank has its own rows in every projection."
else
    echo "Not as described: see above." >&2
    exit 1
fi
