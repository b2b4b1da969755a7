# shellcheck shell=bash
# Functions that the scripts at the top of the checkout share. They source this file with `root` set to the checkout. Every
# function works under `set -euo pipefail`. Decisions are made in Python, by `python -m refit`.

# Every setting with the prefix REFIT_, for the check below. docs/slurm.md describes them.
readonly KNOWN_SETTINGS=" ROOT SITE_FILE ACCOUNT PARTITION CONTAINER_IMAGE CONTAINER_MOUNTS MODULES NETWORK_INTERFACE \
NVSHMEM_LIBRARY PYTHON CLUSTER TASKS SCENARIO_TIMEOUT GPUS_PER_NODE SRUN_ARGS SLURM_TEST "

# The most that is accepted as a number of nodes, of GPUs of a node, of seconds (a year), and of runs of a scenario.
# shellcheck disable=SC2034 # the scripts use them
readonly MAX_NODES=100000 MAX_GPUS_PER_NODE=1024 MAX_SECONDS=31536000 MAX_RUNS=500
# What the site file's values end with, where it was read to its end. No entry of the environment has this form.
readonly SITE_END='end of the site file'

root=${root:?set by the script that sources this}
python='' in_container='' step=''
container=() ranks=()

die() {
    echo "error: $*" >&2
    exit 2
}

in_slurm() { [[ -n ${SLURM_JOB_ID:-} ]]; }

# whole_number NAME VALUE MIN MAX: prints VALUE without leading zeros, or ends with an error that names NAME. Bash arithmetic
# executes what is in its operands, so every value from outside passes through here first.
whole_number() {
    local LC_ALL=C
    if [[ ! $2 =~ ^0*([0-9]{1,18})$ ]] || ((10#${BASH_REMATCH[1]} < $3 || 10#${BASH_REMATCH[1]} > $4)); then
        die "$1 must be a whole number from $3 to $4, not $(quoted "$2")"
    fi
    echo "$((10#${BASH_REMATCH[1]}))"
}

# Prints a value as one short line for an error message.
quoted() {
    local shown=${1:0:60}
    [[ $shown == "$1" ]] || shown+=...
    [[ $shown =~ ^[a-zA-Z0-9.:_-]+$ ]] || shown=${shown@Q}
    echo "$shown"
}

# Checks every number that the environment may hold. Variables that hold one keep it in base 10, without leading zeros.
check_environment() {
    local limits name value min max
    for limits in REFIT_GPUS_PER_NODE:0:$MAX_GPUS_PER_NODE REFIT_SCENARIO_TIMEOUT:0:$MAX_SECONDS \
        SLURM_JOB_ID:0:999999999999 SLURM_JOB_NUM_NODES:1:$MAX_NODES SLURM_NNODES:1:$MAX_NODES \
        SLURM_NTASKS:1:99999999 SLURM_NTASKS_PER_NODE:1:99999 SLURM_ARRAY_TASK_ID:0:99999999; do
        IFS=: read -r name min max <<<"$limits"
        [[ -n ${!name:-} ]] || continue
        value=$(whole_number "$name" "${!name}" "$min" "$max") || exit
        printf -v "$name" %s "$value"
    done
}

# near NAME: prints a question about the known setting that begins as NAME does, if there is one.
near() {
    local known start=${1:0:6}
    for known in $KNOWN_SETTINGS; do
        [[ $known != "$start"* ]] || { echo "did you mean REFIT_$known? " && return; }
    done
}

# Takes the site file's values for every variable that the environment does not set.
load_site() {
    local file=${REFIT_SITE_FILE:-$root/site.env} entry name last=''
    if [[ -e $file ]]; then
        bash -n -- "$file" || die "site file $file is no valid bash: see the line above"
        while IFS= read -r -d '' entry; do
            name=${entry%%=*} last=$entry
            [[ $entry == *=* && $name =~ ^[a-zA-Z_][a-zA-Z0-9_]*$ ]] || continue # ${!name} would execute a[$(command)]
            [[ -n ${!name+set} ]] || export "${entry?}"
        done < <(
            set -a +eu # a command that fails does not end the file
            # shellcheck source=/dev/null
            source "$file" >&2
            env -0 && printf '%s\0' "$SITE_END"
        )
        [[ $last == "$SITE_END" ]] ||
            die "site file $file did not run to its end: take out 'exit', and what fails under 'set -e'"
    elif [[ -n ${REFIT_SITE_FILE:-} ]]; then
        die "REFIT_SITE_FILE names $file, which is not there"
    fi
    for name in "${!REFIT_@}"; do
        [[ $KNOWN_SETTINGS == *" ${name#REFIT_} "* ]] || die "unknown setting $name: $(near "${name#REFIT_}")known are" \
            "REFIT_ and one of$KNOWN_SETTINGS"
    done
    [[ ${REFIT_TASKS:-node} =~ ^(node|gpu)$ ]] || die "REFIT_TASKS must be node or gpu, not $REFIT_TASKS"
    check_environment
    export_network
    load_modules
}

export_network() {
    [[ -n ${REFIT_NETWORK_INTERFACE:-} ]] || return 0
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$REFIT_NETWORK_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$REFIT_NETWORK_INTERFACE}
    export NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=${NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME:-$REFIT_NETWORK_INTERFACE}
}

load_modules() {
    [[ -n ${REFIT_MODULES:-} ]] || return 0
    local file modules
    set +u # module systems do not expect it
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
        # shellcheck source=/dev/null
        type module &>/dev/null || [[ ! -e $file ]] || source "$file"
    done
    type module &>/dev/null || die "REFIT_MODULES=$REFIT_MODULES, but there is no module command here: unset it"
    read -ra modules <<<"$REFIT_MODULES"
    module load "${modules[@]}" || die "module load $REFIT_MODULES failed: see the lines above"
    set -u
}

# choose_python FOLDER...: the interpreter for `decide`, checked; in a container those folders are mounted too.
choose_python() {
    if in_slurm && [[ -n ${REFIT_CONTAINER_IMAGE:-} ]]; then
        in_container=yes
        python=${REFIT_PYTHON:-python3}
        local mounts=${REFIT_CONTAINER_MOUNTS:-} folder
        for folder in "$root" "$@"; do
            mounts+=${mounts:+,}$folder:$folder
        done
        container=(--container-image="$REFIT_CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$root")
    else
        choose_host_python
    fi
    # Keep its output for the error below, which is clearer than a traceback.
    local problem
    problem=$(run_python -c 'import numpy, rich, yaml' 2>&1) || die "$python cannot import numpy, rich and yaml (${problem##*$'\n'}):" \
        "set REFIT_PYTHON to a Python with the suite's packages, or REFIT_CONTAINER_IMAGE"
}

choose_host_python() {
    in_container='' python=${REFIT_PYTHON:-$root/.venv/bin/python} container=()
    if [[ -z ${REFIT_PYTHON:-} && ! -x $python ]]; then
        python=python3
    elif [[ -n ${REFIT_CONTAINER_IMAGE:-} ]] && ! type -P "$python" >/dev/null; then
        python=python3 # REFIT_PYTHON is a path in the container
    fi
}

run_python() {
    if [[ -n $in_container ]]; then
        container_python "$@"
    else
        env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "$python" "$@"
    fi </dev/null
}

container_python() {
    srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --export=ALL "${container[@]}" \
        env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "$python" "$@"
}

decide() { run_python -m refit "$@"; }

# read_placement TEXT: sets `nodes`, `ranks_per_node`, `note` and the array `flags` from the lines of `refit place`.
# shellcheck disable=SC2034 # the scripts use them
read_placement() {
    local line name value
    flags=() note=''
    while IFS= read -r line; do
        name=${line%%$'\t'*} value=${line#*$'\t'}
        case $name in
            nodes) nodes=$(whole_number nodes "$value" 1 "$MAX_NODES") ;;
            ranks_per_node) ranks_per_node=$(whole_number ranks_per_node "$value" 1 99999999) ;;
            note) note=$value ;;
            flag) flags+=("$value") ;;
        esac
    done <<<"$1"
}

# Prints the GPUs of each node of the allocation, or of this machine without one; 0 where there are none.
gpus_per_node() {
    local count name='the number of GPUs of this node'
    if [[ -n ${REFIT_GPUS_PER_NODE:-} ]]; then
        count=$REFIT_GPUS_PER_NODE
    elif in_slurm; then
        name="the number in SLURM_GPUS_ON_NODE or SLURM_GPUS_PER_NODE (REFIT_GPUS_PER_NODE replaces it)"
        count=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-8}}}
        count=${count%%(*} # h100:8(S:0-1)
        count=${count##*:}
    elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
    fi
    whole_number "$name" "$count" 0 "$MAX_GPUS_PER_NODE"
}

num_nodes() { echo "${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"; }

# One task per GPU where the allocation was made for several tasks per node, otherwise one per node that starts torchrun.
tasks_form() {
    if [[ -n ${REFIT_TASKS:-} ]]; then
        echo "$REFIT_TASKS"
    elif ((${SLURM_NTASKS_PER_NODE:-1} > 1 || ${SLURM_NTASKS:-1} > $(num_nodes))); then
        echo gpu
    else
        echo node
    fi
}

# ranks_command STEM NODES RANKS_PER_NODE FLAGS...: the array `ranks`, which runs benchmark_refit.py on that many ranks.
ranks_command() {
    local stem=$1 nodes=$2 per_node=$3
    shift 3
    local form=node tasks_per_node=1 hosts
    # A rank cannot tell a step of a single task from a script's own process, so torchrun starts it.
    if in_slurm && ((nodes * per_node > 1)) && [[ $(tasks_form) == gpu ]]; then
        form=gpu tasks_per_node=$per_node
    fi
    ranks=("$root/scripts/node.sh" "$form" "$python" "$nodes" "$per_node" "${stem}_ranks" "$@")
    in_slurm || return 0
    mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?no node list in this allocation}")
    ((${#hosts[@]} >= nodes)) || die "$nodes nodes needed, the allocation has ${#hosts[@]}"
    hosts=("${hosts[@]:0:nodes}")
    export MASTER_ADDR=${hosts[0]}
    local step_args=(--nodes="$nodes" --ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node")
    # Rank r has to be on node r / RANKS_PER_NODE, as planned. GPUs are not bound to tasks: a rank picks its own by its number.
    step_args+=(--nodelist="$(IFS=, && echo "${hosts[*]}")" --distribution=block --kill-on-bad-exit=1 --export=ALL)
    # Without this, a site's default may put torchrun and all its ranks on one core.
    [[ $form == gpu ]] || step_args+=(--cpu-bind=none)
    local site_args
    read -ra site_args <<<"${REFIT_SRUN_ARGS:-}"
    ranks=(srun "${step_args[@]}" "${container[@]}" "${site_args[@]}" "${ranks[@]}")
}

# wait_for SECONDS COMMAND...: runs the command with its output to descriptor 3. Returns its exit code, or 124 after SECONDS
# (0: no limit). The command runs in the background, since bash handles a signal only after a foreground command has ended.
wait_for() {
    local seconds=$1 code=0 started=$SECONDS
    shift
    step=starting # a signal may come before the next line but one
    timeout --signal=TERM --kill-after=40 "$seconds" "$@" </dev/null >&3 2>&1 &
    step=$!
    wait "$step" || code=$?
    step=''
    # 137: it had to be killed after the limit.
    ((code != 137 || seconds == 0 || SECONDS - started < seconds)) || code=124
    return "$code"
}

# Ends the step that wait_for waits for. Slurm gives a cancelled job some 30 s (KillWait), so the wait is short.
stop_step() {
    [[ -n $step ]] || return 0
    [[ $step != starting ]] || step=${!:-}
    kill -TERM "$step" 2>/dev/null || true
    for _ in {1..60}; do
        kill -0 "$step" 2>/dev/null || break
        sleep 0.25
    done
    kill -KILL "$step" 2>/dev/null || true
    step=''
}

# keep_rank_logs STEM EXIT_CODE RANKS_PER_NODE: keeps the ranks' own logs after a failure, as node<N>/rank<R>.err, and
# removes them after a success.
keep_rank_logs() {
    local folder=$1_ranks file node rank
    [[ -d $folder ]] || return 0
    if (($2 == 0)); then
        rm -rf -- "$folder"
        return
    fi
    for file in "$folder"/node*/*/attempt_0/*/stderr.log; do # torchrun's, by local rank
        [[ -e $file ]] || continue
        node=${file#"$folder/node"} node=${node%%/*}
        rank=${file%/stderr.log} rank=${rank##*/}
        [[ $node/$rank =~ ^(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})$ ]] || continue
        mv -- "$file" "$folder/node$node/rank$((node * $3 + rank)).err"
    done
    find "$folder" -depth -empty -delete
}
