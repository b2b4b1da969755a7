#!/usr/bin/env bash
# Tests that NVSHMEM refits and verifies on this machine: Config 1 on 6 of 8 GPUs (TP2 EP2 -> TP2 EP1), or with --minimal
# Config 4 on 3 GPUs. With --one-gpu it tests a workstation: two ranks share its GPU, over CUDA IPC.
set -euo pipefail

usage() {
    cat <<HELP
usage: test_nvshmem_refit.sh [--minimal | --one-gpu] [FLAGS]    in an allocation with 8 GPUs (3 with --minimal, 1 with
                                                                --one-gpu), or on such a machine

--one-gpu tests a workstation: trainer and engine share its GPU, over CUDA IPC in place of NVSHMEM.
FLAGS of benchmark_refit.py are added to the test's own. --refit-method gloo tests without NVSHMEM, also on CPUs.
The last line is PASS, FAIL or WAIVED with the reason; exit code 0, 1 or 3.
HELP
}

root=${REFIT_ROOT:-$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")}
[[ -e $root/scripts/common.sh ]] || {
    echo "error: $root is no checkout: start this in an allocation (salloc), or set REFIT_ROOT for sbatch, which runs a copy" >&2
    exit 2
}
# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"

layouts=(--tensor-model-parallel-size 2 --expert-model-parallel-size 2
    --rl-inference-tensor-model-parallel-size 2 --rl-inference-expert-model-parallel-size 1)
sizes=(--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512
    --num-experts 16 --moe-shared-expert-intermediate-size 512 --ffn-hidden-size 2688 --num-benchmark-iterations 3)
minimal_layouts=(--tensor-model-parallel-size 2 --expert-model-parallel-size 1
    --rl-inference-tensor-model-parallel-size 1 --rl-inference-expert-model-parallel-size 1)
minimal_sizes=(--num-layers 2 --hidden-size 512 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --num-experts 8 --moe-shared-expert-intermediate-size 256 --ffn-hidden-size 1344 --num-benchmark-iterations 2)
one_gpu_layouts=(--tensor-model-parallel-size 1 --expert-model-parallel-size 1
    --rl-inference-tensor-model-parallel-size 1 --rl-inference-expert-model-parallel-size 1)
shared=(--refit-mode non-collocated --refit-method nvshmem --micro-batch-size 1 --moe-router-topk 2 --disable-bias-linear
    --expert-tensor-parallel-size 1 --rl-inference-expert-tensor-model-parallel-size 1)

name='Config 1' needed=6 remedy=', --minimal, which needs 3, or --one-gpu' own=("${layouts[@]}" "${sizes[@]}")
one_gpu='' extra=()
for word in "$@"; do
    case $word in
        --help | -h) usage && exit 0 ;;
        --minimal) name='Config 4' needed=3 remedy=', or --one-gpu' own=("${minimal_layouts[@]}" "${minimal_sizes[@]}") ;;
        --one-gpu) name='One GPU' needed=1 remedy='' one_gpu=yes own=("${one_gpu_layouts[@]}" "${minimal_sizes[@]}") ;;
        *) extra+=("$word") ;;
    esac
done

verdict() {
    echo "$1: $name, $2"
    exit "$3"
}

load_site
if [[ ! " ${extra[*]} " =~ --refit-method[=\ ](gloo|shm)\  ]]; then
    count=$(gpus_per_node)
    in_slurm && count=$((count * $(num_nodes)))
    [[ -z $one_gpu ]] || shared+=(--refit-method cuda-ipc --ranks-per-gpu 2)
    what="$needed GPUs"
    ((needed > 1)) || what='a GPU'
    ((count >= needed)) || verdict WAIVED "it needs $what, $count are here: take a machine or an allocation with $needed$remedy" 3
fi
log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
code=0
"$root/benchmark_refit_sbatch.sh" "${own[@]}" "${shared[@]}" "${extra[@]}" 2>&1 | tee -- "$log" || code=$?
reason=$(tail -n 1 -- "$log")
case $code in
    0) verdict PASS "$reason" 0 ;;
    3) verdict WAIVED "$reason" 3 ;;
    *) verdict FAIL "$reason (exit code $code)" 1 ;;
esac
