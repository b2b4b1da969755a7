# shellcheck shell=bash
# Locks, so that no two processes run the scenarios of one run into the same logs. scripts/suite.sh sources this file.
#
# The kernel drops a lock (flock) when its holder and all that the holder started have ended, also after SIGKILL. On some
# shared file systems a lock only counts on its own node. So a lock file also names its holder, which empties and removes
# it in the end: what another node's holder has left behind is refused unless Slurm says that its job is over.

lock_files=() lock_descriptors=() lock_kinds=()

# hold WHAT exclusive|shared FILE: takes the lock until this script exits, or ends with an error that names its holder.
hold() {
    local what=$1 kind=$2 file=$3 descriptor code=0
    local held_kind='' host='' pid='' job='' since=''
    type -P flock >/dev/null || die "flock is not on PATH, and $what needs a lock: install util-linux"
    while :; do
        exec {descriptor}>>"$file"
        flock --nonblock "--$kind" "$descriptor" || code=$?
        [[ $file -ef /dev/fd/$descriptor ]] && break # otherwise its last holder has just removed it
        exec {descriptor}>&-
        code=0
    done
    read -r held_kind host pid job since <"$file" || true
    if ((code == 1)); then
        die "$what is being run by $(holder): $(held_remedy "$file")"
    elif [[ -n $held_kind && $kind$held_kind != sharedshared ]]; then
        has_ended "$code" || die "$what may still be run by $(holder), which cannot be seen from here:" \
            "if that has ended, remove $(quoted_path "$file")"
        echo "The lock of $what was left by $(holder), which has ended" >&2
    fi
    lock_files+=("$file") lock_descriptors+=("$descriptor") lock_kinds+=("$kind")
    trap release EXIT
    echo "$kind $HOSTNAME $$ ${SLURM_JOB_ID:--} $(date '+%Y-%m-%d %H:%M:%S')" >"$file"
}

# The holder that `hold` has read, in words.
holder() {
    [[ -n $host ]] || { echo "a process that has not said its name yet" && return; }
    local slurm=''
    [[ $job == - ]] || slurm=", job $(quoted "$job")"
    echo "PID $(quoted "$pid") on $(quoted "$host")$slurm, since $(quoted_date "$since")"
}

held_remedy() {
    if [[ $host == "$HOSTNAME" && $pid =~ ^[0-9]+$ ]] && ! kill -0 "$pid" 2>/dev/null; then
        echo "that PID has ended, but what it started still runs: end it (fuser $(quoted_path "$1") lists it), or wait"
    else
        echo "wait until it has ended, or end it"
    fi
}

quoted_date() {
    if [[ $1 =~ ^[0-9:\ -]{1,30}$ ]]; then echo "$1"; else quoted "$1"; fi
}

quoted_path() { printf '%q\n' "$1"; }

# has_ended FLOCK_CODE: whether the holder that `hold` has read has ended. FLOCK_CODE 0: this node has no other holder.
has_ended() {
    if [[ $host == "$HOSTNAME" ]]; then
        (($1 == 0)) || { [[ $pid =~ ^[0-9]+$ ]] && ! kill -0 "$pid" 2>/dev/null; }
    else
        [[ $job =~ ^[0-9]{1,12}$ ]] && { [[ $job == "${SLURM_JOB_ID:-}" ]] || job_is_over "$job"; }
    fi
}

# Does Slurm say so?
job_is_over() {
    local text
    type -P squeue >/dev/null || return 1
    if text=$(squeue --noheader --jobs="$1" --format=%T 2>&1); then
        [[ -z $text ]]
    else
        [[ $text == *'Invalid job id'* ]]
    fi
}

# Gives all locks back. Of several holders the last removes the file.
release() {
    local index descriptor
    for index in "${!lock_files[@]}"; do
        descriptor=${lock_descriptors[index]}
        if flock --nonblock --exclusive "$descriptor" 2>/dev/null || [[ ${lock_kinds[index]} == exclusive ]]; then
            rm -f -- "${lock_files[index]}"
        fi
        exec {descriptor}>&-
    done
    lock_files=() lock_descriptors=() lock_kinds=()
}
