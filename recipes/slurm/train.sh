#!/usr/bin/env bash
#SBATCH --job-name=hf_stable
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=USR1@120
# Train on one Slurm node or many, and resume by itself after a preemption or the time limit:
#
#     sbatch [SBATCH OPTIONS] recipes/slurm/train.sh RUN RECIPE ... [TRAINING OPTIONS]
#     sbatch --nodes 4 --time 24:00:00 recipes/slurm/train.sh runs/830m base/830m
#
# Submit from the repository's root, or from a folder where `hf-stable recipes copy slurm` was run,
# on a file system that all nodes see. RUN is the run's folder; RUN/logs/JOB-RESTART/node-N has one
# folder of logs per rank. Two minutes before the time limit
# (--signal; more for a large model on slow disks) and when Slurm preempts the job, training writes
# a checkpoint and RUN/preempted.json, by which this script asks for the job to be run again. A run
# that finished, failed or was cancelled is not run again. Environment variables:
#
#     ACCELERATE_CONFIG   config file of accelerate; without one, training.sharding decides alone
#     GPUS_PER_NODE       processes of a node; default: what Slurm gives
#     MAX_REQUEUES        how often a job is run again at most; default 100
set -euo pipefail

if [ $# -lt 2 ] || [ "$1" = --help ]; then
    sed -n '/^# Train/,/^set/s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ] && exit 0 || exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this is a batch script: sbatch $0 $*" >&2
    exit 2
fi
# Slurm runs a copy of this file from a folder of its own, in the folder of the submission.
node_script=$PWD/recipes/slurm/node.sh
if [ ! -e "$node_script" ]; then
    echo "error: $PWD has no recipes/slurm/node.sh: run \`hf-stable recipes copy slurm\` here first" >&2
    exit 2
fi

run=$1
shift
restarts=${SLURM_RESTART_COUNT:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_HOST=${hosts[0]} MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) NUM_NODES=${#hosts[@]}
export GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:?give GPUS_PER_NODE}}
export LOGS=$run/logs/$SLURM_JOB_ID-$restarts
if [ -d .venv ]; then export PATH=$PWD/.venv/bin:$PATH; fi

# What a former attempt left must not be taken for this one's: it may fail before it starts.
marker=$run/preempted.json
rm -f "$marker"

# The signals of --signal and of a preemption go to the step's processes, not to this shell, which
# therefore sees the end. scancel's and the kill after a preemption's grace time do end it. A launcher
# that fails takes those of other nodes along. Without a binding a task has all cores of its node.
status=0
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \
    bash "$node_script" "$@" --output "$run" || status=$?

if [ ! -e "$marker" ]; then exit "$status"; fi # a launcher's own status does not tell
if [ "$restarts" -ge "${MAX_REQUEUES:-100}" ]; then
    echo "preempted, and run again $restarts times already: submit again to go on" >&2
    exit 75
fi
echo "preempted: run again"
if ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "job $SLURM_JOB_ID could not be requeued: submit again to go on" >&2
    exit 75
fi
