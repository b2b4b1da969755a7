#!/usr/bin/env bash
# megatron-core 0.19.2 with torch 2.13.0, on CPUs: its own refit, `swap_model_weights`, puts other experts' weights into
# a layout with more expert parallelism where experts are sequential, and returns without an error.
#
# Two ranks. The source holds all 8 experts on each (EP1), the destination 4 on each (EP2); both have `SequentialMLP`,
# `get_gpt_layer_local_spec(8, moe_grouped_gemm=False)`. Every weight of expert number e is e, everything else 100.
# Seen in 2 layers:
#   rank 0: experts 0 to 3 hold 0 to 3
#   rank 1: experts 4 to 7 hold 0 to 3, in all of their 16 tensors; the 18 other tensors are right
# Names of sequential experts count from 0 on each rank, and source and destination are matched by name. Both models are
# whole, and either would generate text.
#
# Megatron-Core's copy services need CUDA streams, so the script gives it one of its own over Gloo, which is what the
# `refit_method` argument takes besides a name; two functions of torch.cuda are replaced, since Megatron-Core allocates on
# the current GPU whatever the configuration says. Fails (exit code 1) once experts arrive where they belong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 packaging triton==3.9.0
"$folder/venv/bin/pip" install --quiet --no-deps --ignore-requires-python megatron-core==0.19.2
cat >"$folder/look.py" <<'PYTHON'
"""Two ranks: a model whose ranks hold all eight experts is refitted into one whose ranks hold four each."""
import sys
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

NUM_EXPERTS = 8
torch.cuda.current_device = lambda: "cpu"  # Megatron-Core allocates there even with use_cpu_initialization
torch.cuda.synchronize = lambda *a, **k: None
moe_utils.te_general_gemm = None
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


def model(alone, both, expert_parallel):
    groups = ProcessGroupCollection()
    spans = {"dp", "dp_cp", "tp_dp_cp", "intra_dist_opt"}
    spans |= {"ep", "tp_ep", "tp_ep_pp"} if expert_parallel else {"expt_dp"}
    for name in ("tp", "cp", "pp", "mp", "tp_cp", "dp", "dp_cp", "tp_dp_cp", "expt_tp", "ep", "tp_ep", "tp_ep_pp",
                 "expt_dp", "embd", "pos_embd", "intra_dist_opt"):
        setattr(groups, name, both if name in spans else alone)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=NUM_EXPERTS, moe_ffn_hidden_size=32,
        expert_model_parallel_size=2 if expert_parallel else 1, moe_router_topk=2, add_bias_linear=False,
        gated_linear_unit=True, use_cpu_initialization=True, moe_token_dispatcher_type="allgather",
    )
    return GPTModel(
        config, get_gpt_layer_local_spec(NUM_EXPERTS, moe_grouped_gemm=False), vocab_size=128, max_sequence_length=16,
        position_embedding_type="rope", share_embeddings_and_output_weights=False, pg_collection=groups,
    ).eval()


dist.init_process_group("gloo")
rank = dist.get_rank()
alone = [dist.new_group([each]) for each in range(2)][rank]
both = dist.new_group([0, 1])
source, destination = model(alone, both, False), model(alone, both, True)
held = NUM_EXPERTS // 2
with torch.no_grad():
    for name, weight in source.named_parameters():
        number = int(name.split("local_experts.")[1].split(".")[0]) if "local_experts." in name else 100
        weight.fill_(float(number))
    for weight in destination.parameters():
        weight.fill_(-1.0)
    swap_model_weights(source, destination, Copies())
wrong, experts, num_right = [], {}, 0
for name, weight in destination.named_parameters():
    is_expert = "local_experts." in name
    local = int(name.split("local_experts.")[1].split(".")[0]) if is_expert else 0
    right = float(rank * held + local) if is_expert else 100.0
    if is_expert:
        experts.setdefault(rank * held + local, set()).update(weight.unique().tolist())
    if not bool((weight == right).all()):
        wrong.append(name)
    elif not is_expert:
        num_right += 1
answers = [None, None]
dist.all_gather_object(answers, (len(wrong), experts, num_right))
if rank == 0:
    for each, (count, found, others) in enumerate(answers):
        print(f"rank {each}: {count} wrong tensors, {others} others right; expert: number in it:",
              ", ".join(f"{key}: {'/'.join(f'{value:g}' for value in sorted(values))}" for key, values in found.items()))
    print([count for count, _, _ in answers])
dist.destroy_process_group()
sys.exit([count for count, _, _ in answers] != [0, 16])
PYTHON
if (cd "$folder" && OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore venv/bin/torchrun --standalone --nproc-per-node 2 look.py); then
    echo "As described: the second rank's experts hold the first rank's weights."
else
    echo "Not as described: see above." >&2
    exit 1
fi
