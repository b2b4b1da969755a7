# shellcheck shell=bash
# Runs scenarios one after another, for a script that sets `root`, CONFIGS, TITLE and CLUSTER: as a job, in an allocation, as
# a job array, or on this machine without Slurm. This file has the options and what is submitted; `refit sweep` has the loop.

# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"

script=$(readlink -f -- "$0")
action=run dry_run='' scenarios='' model='' output_dir='' timeout_s='' resume='' only='' num_runs='' asked_nodes='' array='' throttle=''
cluster='' sweep_file='' cancelled=''
flags=() selection=() common=() allocation=()

suite() {
    parse "$@"
    check_options
    load_site
    # After load_site, which may load a module with sbatch, and before anything is written.
    [[ $action != submit ]] || type -P sbatch >/dev/null ||
        die "--submit needs sbatch, which is not on PATH: call it on a login node of the cluster, or use --local on this machine"
    cluster=${REFIT_CLUSTER:-${CLUSTER:-}}
    timeout_s=${timeout_s:-${REFIT_SCENARIO_TIMEOUT:-}}
    [[ $timeout_s != 0 ]] || timeout_s=''
    output_dir=$(realpath -m -- "${output_dir:-benchmark_results/kimi_k2}")
    [[ $scenarios != *.y*ml ]] || scenarios=$(realpath -- "$scenarios")
    [[ $action =~ ^(dry-run|summary|array-task)$ ]] || mkdir -p -- "$output_dir"
    choose_python "$output_dir"
    case $action in
        run | local) run_suite ;;
        array-task) run_array_task ;;
        summary) decide sweep end "$sweep_file" ;;
        dry-run) plan ;;
        submit) submit ;;
    esac
}

usage() {
    local name=${script##*/}
    cat <<HELP
usage: sbatch $name [options] [-- FLAGS]        as a job, with its #SBATCH lines and your site's defaults
       $name [options] [-- FLAGS]               inside an allocation (salloc)
       $name --submit [options] [-- FLAGS]      calls sbatch, with the account and partition of site.env
       $name --dry-run [options] [-- FLAGS]     the plan table and what would be submitted; never starts or submits
       $name --local [options] [-- FLAGS]       on this machine alone, with torchrun

  --scenarios NAME    a list of configs/scenarios, or a YAML file, in place of CONFIGS
  --model NAME        a preset of configs/models; default: kimi_k2 with CONFIGS, the list's own with --scenarios
  --output-dir DIR    results go to DIR/logs; default: benchmark_results/kimi_k2 here
  --timeout S         longest time of one scenario, in seconds; default: REFIT_SCENARIO_TIMEOUT, else no limit
  --num-runs N        run each scenario N times, interleaved (A B A B), with the spread between runs in the summary
  --resume RUN_ID     continue an earlier run: only scenarios without a result
  --only failed       with --resume: only scenarios that did not succeed
  --nodes N           with --submit and --dry-run: nodes to ask for; default: those of the #SBATCH line
  --array             with --submit and --dry-run: a job array, one scenario per job, then a summary job
  --throttle N        with --array: at most N at once
  -- FLAGS            flags of benchmark_refit.py for every scenario

SEQ_LENGTH in the environment is passed on as --seq-length. Exit codes: 0 all ok, 1 wrong data, 2 usage, 3 nothing could
run here, 4 a scenario failed or was refused, 143 cancelled. See docs/slurm.md.
HELP
}

parse() {
    while (($#)); do
        case $1 in
            --help | -h) usage && exit 0 ;;
            --dry-run) dry_run=yes ;;
            --submit | --local) action=${1#--} ;;
            --array) array=yes ;;
            --scenarios | --model | --output-dir | --timeout | --resume | --only | --num-runs | --nodes | --throttle | --array-task | --summary)
                (($# > 1)) || die "$1 needs a value"
                set_option "$1" "$2"
                shift
                ;;
            --) flags=("${@:2}") && return ;;
            *) die "unknown option $1: --help lists them; flags of benchmark_refit.py follow --" ;;
        esac
        shift
    done
}

set_option() {
    case $1 in
        --scenarios) scenarios=$2 ;;
        --model) model=$2 ;;
        --output-dir) output_dir=$2 ;;
        --timeout) timeout_s=$2 ;;
        --resume) resume=$2 ;;
        --only) only=$2 ;;
        --num-runs) num_runs=$2 ;;
        --nodes) asked_nodes=$2 ;;
        --throttle) throttle=$2 ;;
        --array-task | --summary) action=${1#--} sweep_file=$2 ;; # how a job array calls this script again
    esac
}

check_options() {
    [[ " ${flags[*]} " != *' --dry-run '* ]] || die "--dry-run goes before --: there it plans, and nothing is started or submitted"
    if [[ -n $dry_run ]]; then
        [[ $action == run ]] || echo "Dry run: --$action is left out, nothing is started or submitted."
        action=dry-run
    fi
    [[ -z $only || ($only == failed && -n $resume$sweep_file) ]] || die "--only takes failed, and goes with --resume RUN_ID"
    [[ -z $array$throttle$asked_nodes || $action =~ ^(submit|dry-run)$ ]] || die "--array, --throttle and --nodes go with --submit"
    [[ -z $throttle || -n $array ]] || die "--throttle goes with --array"
    [[ -z $asked_nodes ]] || asked_nodes=$(whole_number --nodes "$asked_nodes" 1 "$MAX_NODES")
    [[ -z $throttle ]] || throttle=$(whole_number --throttle "$throttle" 1 "$MAX_NODES")
    [[ -z $timeout_s ]] || timeout_s=$(whole_number --timeout "$timeout_s" 1 "$MAX_SECONDS")
    [[ -z $num_runs ]] || num_runs=$(whole_number --num-runs "$num_runs" 1 "$MAX_RUNS")
    [[ -z $resume || -z $scenarios$model$num_runs && ${#flags[@]} -eq 0 ]] ||
        die "--resume goes on with the scenarios and flags of the earlier run: leave all others out"
    [[ $action != run ]] || in_slurm || die "there is no Slurm allocation here: sbatch ${script##*/}, or --submit;" \
        "--dry-run plans without one, --local runs on this machine"
}

# Sets the arrays `selection` and `common`: the scenarios, as arguments of `refit sweep`.
select_scenarios() {
    local line
    selection=() common=()
    [[ -z $resume ]] || return 0
    if [[ -n $scenarios ]]; then
        selection=(--scenarios "$scenarios")
    else
        for line in "${CONFIGS[@]}"; do
            selection+=(--config "$line")
        done
        selection+=(--title "$TITLE")
        model=${model:-kimi_k2}
    fi
    selection+=(${num_runs:+--num-runs "$num_runs"})
    common=(${model:+--model "$model"} ${SEQ_LENGTH:+--seq-length "$SEQ_LENGTH"} "${flags[@]}")
}

# Sets the array `allocation`: the GPUs and the cluster, as arguments of `refit sweep`.
describe_allocation() {
    local count nodes
    if [[ $action == local ]]; then
        nodes=1 count=$(gpus_per_node)
        if ((count == 0)); then
            allocation=(--cpu-fallback)
            echo "There is no GPU here: ranks run on the CPUs, gloo stands in for nccl and shm for nvshmem."
            return
        fi
    elif [[ $action == run ]]; then
        nodes=$(num_nodes) count=$(gpus_per_node)
    else # what a job would get
        nodes=${asked_nodes:-$(header nodes "$MAX_NODES")}
        count=${REFIT_GPUS_PER_NODE:-$(header gpus-per-node "$MAX_GPUS_PER_NODE")}
    fi
    allocation=(--num-gpus "$((nodes * count))" --gpus-per-node "$count" ${cluster:+--cluster "$cluster"})
}

# header NAME MAX: prints the number in an #SBATCH line of the script.
header() {
    local found
    found=$(sed -n "s/^#SBATCH --$1=\(.*:\)\{0,1\}\([0-9]*\).*/\2/p" "$script")
    [[ -n $found ]] || die "$script has no line '#SBATCH --$1=N'"
    whole_number "the number in '#SBATCH --$1' of $script" "$found" 1 "$2"
}

# Checks every scenario, prints the table and sets `sweep_file`.
begin() {
    describe_sweep
    sweep_file=$(decide sweep begin "${sweep[@]}")
}

# Sets the array `sweep`: what to run, as arguments of `refit sweep begin` and `run`.
describe_sweep() {
    select_scenarios
    describe_allocation
    sweep=("${allocation[@]}" --output-dir "$output_dir" "$@")
    if [[ -n $resume ]]; then
        sweep+=(--resume "$resume")
    else
        sweep+=("${selection[@]}" -- "${common[@]}")
    fi
}

# Sets the array `pending` to the lines of `refit sweep pending`.
list_pending() {
    local text
    text=$(decide sweep pending "$sweep_file" ${only:+--only "$only"})
    pending=()
    [[ -z $text ]] || mapfile -t pending <<<"$text"
}

# Prints the command that goes on with this run, but for --resume.
again() {
    local words=("$script")
    [[ $action != local ]] || words+=(--local)
    # A job's script is a copy in a spool folder.
    [[ -e ${script%/*}/benchmark_refit.py ]] || words=(sbatch "$root/benchmark_refit_kimi_k2.sh")
    words+=(--output-dir "$output_dir" ${timeout_s:+--timeout "$timeout_s"} ${only:+--only "$only"})
    echo "${words[*]@Q}"
}

run_suite() {
    describe_sweep --again "$(again)" ${timeout_s:+--timeout "$timeout_s"} ${only:+--only "$only"}
    run_loop sweep run "${sweep[@]}"
}

# One job of an array. FLAGS is a list of scenario names; the job's number is an index into it.
run_array_task() {
    : "${SLURM_ARRAY_TASK_ID:?--array-task is for jobs of an array}" # checked with the environment
    run_loop sweep task ${timeout_s:+--timeout "$timeout_s"} ${only:+--only "$only"} \
        "$sweep_file" "$SLURM_ARRAY_TASK_ID" "${flags[@]}"
}

# run_loop ARGUMENTS...: `refit` with these arguments, which starts steps until all is done or a signal comes. In a container
# it cannot start any: there it asks this script to.
run_loop() {
    [[ -n $in_container ]] || exec env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m refit "$@" </dev/null
    coproc loop { container_python -m refit "${@:1:2}" --ask "${@:3}"; }
    # shellcheck disable=SC2154 # coproc sets it
    local process=$loop_PID from=${loop[0]} to=${loop[1]} code=0
    exec 4<&"$from" 5>&"$to"
    exec {from}<&- {to}>&- # bash drops these when the process has ended
    trap 'cancel_loop "$process"' TERM INT
    serve
    wait "$process" || code=$?
    exit "$code"
}

# Starts the steps that the loop asks for, in lines that begin with a record separator: the time limit, the log, the command.
serve() {
    local line fields code
    while IFS= read -r line <&4; do
        if [[ $line != $'\x1e'* ]]; then
            printf '%s\n' "$line"
            continue
        fi
        [[ -z $cancelled ]] || continue
        mapfile -d $'\t' -t fields < <(printf '%s\t' "${line#$'\x1e'}")
        code=0
        exec 3>>"${fields[1]}"
        wait_for "$(whole_number seconds "${fields[0]}" 0 "$MAX_SECONDS")" "${fields[@]:2}" || code=$?
        exec 3>&-
        echo "$code" >&5
    done
}

# Ends the step and the loop's input, which tells it to sum up.
cancel_loop() {
    trap '' TERM INT
    stop_step
    exec 5>&-
    cancelled=yes # what is left is to print what the loop says
    serve
    wait "$1" || true
    exit 143
}

# Sets the array `job` to the sbatch command with these ARGUMENTS.
job_command() {
    job=(sbatch ${REFIT_ACCOUNT:+--account="$REFIT_ACCOUNT"} ${REFIT_PARTITION:+--partition="$REFIT_PARTITION"} "$@")
}

suite_job() {
    local name arguments=(--output-dir "$output_dir")
    for name in scenarios model resume only num_runs; do
        [[ -z ${!name} ]] || arguments+=("--${name//_/-}" "${!name}")
    done
    [[ -z $timeout_s ]] || arguments+=(--timeout "$timeout_s")
    ((${#flags[@]} == 0)) || arguments+=(-- "${flags[@]}")
    job_command ${asked_nodes:+--nodes="$asked_nodes"} "$script" "${arguments[@]}"
}

# Sets `job` to a job array of the `pending` scenarios of SWEEP_FILE. Each of its jobs asks for `most_nodes` nodes.
array_job() {
    local line name nodes rest names=()
    most_nodes=0
    for line in "${pending[@]}"; do
        IFS=$'\t' read -r name nodes rest <<<"$line"
        names+=("$name")
        nodes=$(whole_number nodes "$nodes" 1 "$MAX_NODES")
        most_nodes=$((nodes > most_nodes ? nodes : most_nodes))
    done
    most_nodes=${asked_nodes:-$most_nodes}
    job_command --parsable --array="0-$((${#names[@]} - 1))${throttle:+%$throttle}" --nodes="$most_nodes" \
        --output="%x_%A_%a.out" "$script" --array-task "$1" ${only:+--only "$only"} \
        ${timeout_s:+--timeout "$timeout_s"} -- "${names[@]}"
}

summary_job() {
    job_command --parsable --dependency="afterany:$2" --job-name=refit_summary --nodes=1 --ntasks=1 --time=10 \
        --output="%x_%j.out" --wrap "exec $(printf '%q ' "$script" --summary "$1")"
}

submit() {
    if [[ -z $array ]]; then
        suite_job
        "${job[@]}"
        return
    fi
    begin
    list_pending
    ((${#pending[@]} > 0)) || die "nothing is left to run in $sweep_file"
    array_job "$sweep_file"
    local id
    if ! id=$("${job[@]}"); then
        [[ -n $resume ]] || rm -f -- "$sweep_file" # a sweep without a job would be taken for the latest run
        die "sbatch refused the job array: see the line above"
    fi
    id=${id%%;*} # on a federation, the cluster's name follows
    # The array needs the sweep file, so the job is added to that file only now.
    decide sweep add-job "$sweep_file" "$id" >/dev/null
    summary_job "$sweep_file" "$id"
    echo "Submitted job array $id: ${#pending[@]} scenarios, $most_nodes nodes each"
    echo "Submitted summary job $("${job[@]}"), to run after all of them"
    echo "Sweep: $sweep_file"
}

# Prints the plan table and the command that would be submitted.
plan() {
    local code=0 table
    if [[ -n $resume ]]; then
        sweep_file=$output_dir/logs/${resume}_sweep.json
        list_pending
        echo "To run: ${#pending[@]} scenarios"
        ((${#pending[@]} == 0)) || printf '  %s\n' "${pending[@]%%$'\t'*}"
    else
        select_scenarios
        describe_allocation
        table=$(decide sweep plan "${selection[@]}" "${allocation[@]}" -- "${common[@]}") || code=$?
        [[ -n $table ]] || return "$code" # not even a plan: the error has been printed
        echo "$table"
    fi
    if [[ ${table:-} == *$'\n0 ready'* ]]; then
        echo "Nothing to submit: no scenario is ready, for the reasons above"
    elif [[ -n $array ]]; then
        echo "To submit: a job array of the scenarios above that are ready, and a summary job, with --submit --array"
    else
        suite_job
        printf 'To submit:'
        printf ' %q' "${job[@]}"
        echo
        [[ ! ${table:-} =~ $'\n'([0-9]+)' ready' ]] || compare_time "${BASH_REMATCH[1]}"
    fi
    return "$code"
}

# Says where NUM scenarios, each as long as --timeout allows, take longer than the job that runs them all may.
compare_time() {
    local hours minutes seconds limit needed=$(($1 * ${timeout_s:-0} * ${num_runs:-1}))
    IFS=: read -r hours minutes seconds < <(sed -nE 's/^#SBATCH --time=([0-9]+:[0-9]+:[0-9]+)$/\1/p' "$script") || return 0
    limit=$((10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))
    ((needed <= limit)) || echo "Note: $1 scenarios${num_runs:+, $num_runs times each,} of at most $timeout_s s may take $needed s;" \
        "the job ends after $limit s: give sbatch --time=$((needed / 60 + 1)), or --timeout $((limit / $1 / ${num_runs:-1}))"
}
