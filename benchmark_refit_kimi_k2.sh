#!/usr/bin/env bash
#SBATCH --job-name=refit_kimi_k2
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --output=%x_%j.out
#SBATCH --signal=B:TERM@60
#
# The Kimi K2 suite: checks and runs each scenario below in turn, and writes a log and a result of each, and a summary.
# Account, partition and other site settings are in site.env (see site.env.example). See `--help` and docs/slurm.md.
set -euo pipefail

CONFIGS=(
    # Format: "SRC_TP:SRC_EP:DST_TP:DST_EP:REFIT_MODE:REFIT_METHOD:DESCRIPTION"
    "8:8:8:4:non-collocated:nvshmem:TP8_EP8_to_TP8_EP4_64to32"
    "16:4:8:4:non-collocated:nvshmem:TP16_EP4_to_TP8_EP4_64to32"
    "16:4:16:2:non-collocated:nvshmem:TP16_EP4_to_TP16_EP2_64to32"
    "16:4:32:2:non-collocated:nvshmem:TP16_EP4_to_TP32_EP2_64to64"
    "8:8:16:4:non-collocated:nvshmem:TP8_EP8_to_TP16_EP4_64to64"
    "16:8:8:16:collocated:nccl:TP16_EP8_to_TP8_EP16_128gpus"
    "32:4:16:8:collocated:nccl:TP32_EP4_to_TP16_EP8_128gpus"
    # Add more configs...
)
TITLE="Kimi K2"
# The cluster of configs/clusters whose memory the scenarios must fit and whose links give the lower bounds. REFIT_CLUSTER
# overrides it.
CLUSTER=h100_ib400

# sbatch runs a copy of this script from a spool folder. So the checkout is searched for beside the script, where the job's
# script came from, and where the job was submitted.
find_root() {
    local folder
    for folder in "${REFIT_ROOT:-}" "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"; do
        [[ -n $folder && -e $folder/benchmark_refit.py ]] && cd -- "$folder" && pwd -P && return
    done
    folder=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p')
    while [[ $folder == */* ]]; do # the script's path, then its arguments
        folder=${folder%/*}
        [[ -e $folder/benchmark_refit.py ]] && cd -- "$folder" && pwd -P && return
    done
    [[ -e ${SLURM_SUBMIT_DIR:-}/benchmark_refit.py ]] && cd -- "$SLURM_SUBMIT_DIR" && pwd -P && return
    echo "error: benchmark_refit.py is not beside this script: set REFIT_ROOT to the checkout" >&2
    return 2
}

root=$(find_root)
# shellcheck source=scripts/suite.sh
source "$root/scripts/suite.sh"
suite "$@"
