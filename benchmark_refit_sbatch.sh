#!/usr/bin/env bash
#SBATCH --job-name=refit
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --output=%x_%j.out
#SBATCH --signal=B:TERM@60
#
# Runs one scenario with the given flags: in an allocation (salloc), as a job (sbatch), or on this machine without Slurm.
set -euo pipefail

usage() {
    cat <<HELP
usage: benchmark_refit_sbatch.sh FLAGS          inside an allocation (salloc), or on this machine where there is no Slurm job
       sbatch benchmark_refit_sbatch.sh FLAGS   as a job, with the #SBATCH lines above and your site's defaults

FLAGS are those of benchmark_refit.py; with --dry-run it only plans. The layouts determine the number of ranks. The log and
the result go to <--output-dir>/<--run-name>.log and .json; default: benchmark_results/<time>_<job>.
Without Slurm and without a GPU, ranks run on CPUs: gloo replaces nccl and shm replaces nvshmem, and a note says so.
REFIT_SCENARIO_TIMEOUT ends the run after that many seconds.

Exit codes: 0 ok, 1 wrong data, 2 usage, 3 something is missing on this machine, 4 failed or timed out, 143 cancelled.
HELP
}

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

if (($# == 0)) || [[ " $* " =~ \ (-h|--help)\  ]]; then
    usage
    exit $(($# ? 0 : 2))
fi
root=$(find_root)
# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"

# Prints the value of flag $1 in the remaining arguments; of several, the last.
flag_value() {
    local wanted=$1 found=''
    shift
    while (($#)); do
        case $1 in
            "$wanted"=*) found=${1#*=} ;;
            "$wanted") found=${2:-} ;;
        esac
        shift
    done
    echo "$found"
}

# Is flag $1 among the remaining arguments?
has_flag() {
    local wanted=$1 word
    shift
    for word in "$@"; do
        [[ $word != "$wanted" ]] || return 0
    done
    return 1
}

flags=() nodes=1 ranks_per_node=1 note=''

# Sets `flags`, `nodes` and `ranks_per_node`, or ends with the reason why the scenario cannot run here.
place() {
    local count options=() placement
    count=$(gpus_per_node)
    if in_slurm; then
        options=(--num-gpus "$(($(num_nodes) * count))" --gpus-per-node "$count")
    elif ((count > 0)); then
        options=(--num-gpus "$count" --gpus-per-node "$count")
    else
        options=(--cpu-fallback)
    fi
    [[ -z ${REFIT_CLUSTER:-} || ${options[0]} == --cpu-fallback ]] || options+=(--cluster "$REFIT_CLUSTER")
    placement=$(decide place "${options[@]}" -- "$@")
    read_placement "$placement"
    [[ -z $note ]] || echo "# note: $note"
}

# Ends with the exit code in the result. torchrun's own is 1 for any failure.
finish() {
    exec 3>&-
    wait "$tee" 2>/dev/null || true
    local code=0
    decide outcome "$stem" "$@" || code=$?
    keep_rank_logs "$stem" "$code" "$ranks_per_node"
    exit "$code"
}

# shellcheck disable=SC2329 # a trap calls it
cancel() {
    trap '' TERM INT
    stop_step
    [[ -z $in_container ]] || choose_host_python
    (finish --exit-code 143 --cancelled) || true
    exit 143
}

load_site
output_dir=$(flag_value --output-dir "$@")
output_dir=$(realpath -m -- "${output_dir:-benchmark_results}")
choose_python "$output_dir"
if has_flag --dry-run "$@"; then
    run_python "$root/benchmark_refit.py" "$@"
    exit
fi
place "$@"

name=$(flag_value --run-name "$@")
stem=$output_dir/${name:-$(date +%Y%m%d-%H%M%S)_${SLURM_JOB_ID:-$$}}
mkdir -p -- "$output_dir"
# Of two scripts that start at once, one makes the log.
if [[ -e $stem.json ]] || ! (set -o noclobber && : >"$stem.log") 2>/dev/null; then
    die "$stem.json or .log is there already, or cannot be written: choose another --run-name"
fi
ranks_command "$stem" "$nodes" "$ranks_per_node" "${flags[@]}" --output-dir="$output_dir" --run-name="${stem##*/}"
timeout_s=${REFIT_SCENARIO_TIMEOUT:-0} code=0
exec 3> >(exec tee --ignore-interrupts -- "$stem.log")
tee=$!
trap cancel TERM INT
wait_for "$timeout_s" "${ranks[@]}" || code=$?
ending=(--exit-code "$code")
((code != 124)) || ending+=(--timed-out "$timeout_s")
finish "${ending[@]}"
