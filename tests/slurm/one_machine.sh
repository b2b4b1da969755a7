#!/usr/bin/env bash
# A real Slurm on this one machine: munge, slurmctld and two slurmd with eight pretended GPUs each, without systemd. Each
# node is a network namespace with an address of its own, so that ranks of two nodes are on two hosts.
#
#   one_machine.sh start FOLDER    brings it up; then `export SLURM_CONF=FOLDER/slurm.conf`
#   one_machine.sh stop FOLDER     cancels its jobs, stops its daemons by their process ids
#   one_machine.sh check FOLDER    whether it can be brought up here
#
# Needs root and the packages slurm-wlm, munge and iproute2. Exits with 3, saying why, where it cannot be done here.
set -euo pipefail

readonly NUM_NODES=2 GPUS_PER_NODE=8 MARK='# refit: pretended Slurm node'
readonly BRIDGE=refit-slurm NETWORK=10.78.0 CONTROLLER=254

waive() {
    echo "WAIVED: no Slurm on this machine: $*" >&2
    exit 3
}

check() {
    local program
    ((EUID == 0)) || waive "its daemons need root, this is $(id -un)"
    for program in munged munge slurmctld slurmd sbatch srun mknod ip nsenter; do
        type -P "$program" >/dev/null || waive "$program is missing: apt-get install slurm-wlm munge iproute2"
    done
}

write_config() {
    local host
    host=$(hostname -s)
    mkdir -p "$folder"/{state,log}
    cat >"$folder/slurm.conf" <<CONFIG
ClusterName=refit
SlurmctldHost=$host($NETWORK.$CONTROLLER)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool_%n
SlurmdPidFile=$folder/slurmd_%n.pid
SlurmdLogFile=$folder/log/slurmd_%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$NUM_NODES] NodeHostname=$host NodeAddr=$NETWORK.[1-$NUM_NODES] Port=[17001-$((17000 + NUM_NODES))] CPUs=8 RealMemory=8000 Gres=gpu:$GPUS_PER_NODE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONFIG
    # A count without files would drain the node; any character device does.
    local gpu
    for ((gpu = 0; gpu < GPUS_PER_NODE; gpu++)); do
        [[ -e $folder/gpu$gpu ]] || mknod "$folder/gpu$gpu" c 1 3
    done
    echo "NodeName=node[1-$NUM_NODES] Name=gpu File=$folder/gpu[0-$((GPUS_PER_NODE - 1))]" >"$folder/gres.conf"
}

# The nodes' namespaces, on a bridge that the controller has an address on.
add_network() {
    local node
    ip link add "$BRIDGE" type bridge
    ip addr add "$NETWORK.$CONTROLLER/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    for ((node = 1; node <= NUM_NODES; node++)); do
        ip netns add "$BRIDGE-$node"
        ip link add eth0 netns "$BRIDGE-$node" type veth peer name "$BRIDGE-$node"
        ip link set "$BRIDGE-$node" master "$BRIDGE" up
        ip -n "$BRIDGE-$node" addr add "$NETWORK.$node/24" dev eth0
        ip -n "$BRIDGE-$node" link set lo up
        ip -n "$BRIDGE-$node" link set eth0 up
    done
}

remove_network() {
    local node
    for ((node = 1; node <= NUM_NODES; node++)); do
        ip netns del "$BRIDGE-$node" 2>/dev/null || true
    done
    ip link del "$BRIDGE" 2>/dev/null || true
}

# The rendezvous resolves the names that `scontrol show hostnames` gives.
add_hosts() {
    local node
    for ((node = 1; node <= NUM_NODES; node++)); do
        echo "$NETWORK.$node node$node $MARK" >>/etc/hosts
    done
}

remove_hosts() {
    local kept
    kept=$(grep -v -F "$MARK" /etc/hosts) || true
    echo "$kept" >/etc/hosts # in place: /etc/hosts may be a mount
}

wait_until_idle() {
    local idle=0
    for _ in {1..240}; do
        idle=$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c '^idle$') || true
        ((idle == NUM_NODES)) && return
        sleep 0.5
    done
    sinfo --Node --long >&2 || true
    tail -n 5 "$folder"/log/*.log >&2 || true
    echo "error: Slurm did not come up within 120 s: $idle of $NUM_NODES nodes are idle" >&2
    return 1
}

start() {
    check
    mkdir -p "$folder"
    chmod 755 "$folder"
    write_config
    remove_hosts
    add_hosts
    remove_network
    add_network
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/log/munged.log"
    munge --socket="$folder/munge.socket" --no-input | unmunge --socket="$folder/munge.socket" >/dev/null
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF"
    local node
    for ((node = 1; node <= NUM_NODES; node++)); do
        # `ip netns exec` would mount another /sys, which lacks the cgroups that slurmd wants.
        nsenter --net="/run/netns/$BRIDGE-$node" slurmd -f "$SLURM_CONF" -N "node$node"
    done
    wait_until_idle
}

stop() {
    export SLURM_CONF=$folder/slurm.conf
    if [[ -e $folder/slurmctld.pid ]]; then
        timeout 10 scancel --user=root --quiet || true
        for _ in {1..20}; do
            [[ -z $(timeout 5 squeue --noheader 2>/dev/null) ]] && break
            sleep 0.5
        done
    fi
    local file pids=()
    for file in "$folder"/*.pid; do
        [[ ! -e $file ]] || pids+=("$(<"$file")")
    done
    ((${#pids[@]} == 0)) || stop_daemons "${pids[@]}"
    rm -f "$folder"/gpu[0-9]*
    remove_hosts
    remove_network
}

stop_daemons() {
    kill "$@" 2>/dev/null || true
    for _ in {1..100}; do
        kill -0 "$@" 2>/dev/null || return 0 # false only where none is left
        sleep 0.1
    done
    kill -KILL "$@" 2>/dev/null || true
}

[[ $# -eq 2 && $1 =~ ^(start|stop|check)$ ]] || {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
mkdir -p "$2"
folder=$(cd -- "$2" && pwd -P)
"$1"
