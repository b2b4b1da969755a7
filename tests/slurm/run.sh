#!/usr/bin/env bash
# The scripts under a real Slurm on this one machine (`make slurm-test`). Exits with 3, saying why, where that cannot be.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

if ! tests/slurm/one_machine.sh check . 2>/dev/null && ((EUID == 0)) && type -P apt-get >/dev/null; then
    echo "Installing slurm-wlm, munge and iproute2" >&2
    export DEBIAN_FRONTEND=noninteractive
    { timeout 120 apt-get update --quiet --quiet && timeout 300 apt-get install --yes --quiet --quiet slurm-wlm munge iproute2; } >&2 || true
fi
tests/slurm/one_machine.sh check .
REFIT_SLURM_TEST=1 exec "${1:-python3}" -m pytest tests/slurm
