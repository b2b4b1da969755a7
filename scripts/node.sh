#!/usr/bin/env bash
# Starts benchmark_refit.py on the ranks of this node, in a Slurm step or without Slurm.
#
#   node.sh node PYTHON NODES RANKS_PER_NODE RANK_LOGS FLAGS...    all ranks of this node (one task per node): with
#                                                                  `refit run`, or torchrun where there are several nodes
#   node.sh gpu  PYTHON NODES RANKS_PER_NODE RANK_LOGS FLAGS...    one rank, as Slurm numbers it (one task per GPU)
#
# Each rank's stderr is also written below RANK_LOGS/node<N>.
set -euo pipefail

form=$1 python=$2 nodes=$3 ranks_per_node=$4 logs=$5/node${SLURM_NODEID:-0}
shift 5
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
mkdir -p -- "$logs"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# torchrun puts this before each line of a rank's stderr.
# shellcheck disable=SC2016
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank${rank}]:'

command=("$python")
if [[ -n ${REFIT_NVSHMEM_LIBRARY:-} ]]; then
    folder=$(dirname -- "$REFIT_NVSHMEM_LIBRARY")
    command=(env "LD_PRELOAD=$REFIT_NVSHMEM_LIBRARY" "LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$python")
fi

if [[ $form == gpu ]]; then
    exec "${command[@]}" "$root/benchmark_refit.py" "$@" 2> >(tee -- "$logs/rank$SLURM_PROCID.err" >&2)
fi

if ((nodes == 1)); then
    export PET_LOG_DIR=$logs PET_TEE=2 # torchrun's --log-dir and --tee
    exec "${command[@]}" -m refit run --start spawn --nproc-per-node "$ranks_per_node" "$@"
fi

port=$("$python" -m refit.cli.launch)
exec "${command[@]}" -m torch.distributed.run --nnodes "$nodes" --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" \
    --master-port "$port" --nproc-per-node "$ranks_per_node" --log-dir "$logs" --tee 2 "$root/benchmark_refit.py" "$@"
