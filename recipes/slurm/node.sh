#!/usr/bin/env bash
# Run by train.sh once a node: one launcher, and by it one process a GPU. Arguments are the training's.
set -euo pipefail

# Without these, SIGUSR1 kills the launcher and orphans its processes, and a checkpoint that takes
# longer than 30 seconds is killed.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=600
# All ranks have their logs; the job's own shows the first of each node.
export PET_RDZV_ID=$SLURM_JOB_ID PET_LOCAL_RANKS_FILTER=0

processes=$((NUM_NODES * GPUS_PER_NODE))
options=(--num_machines "$NUM_NODES" --machine_rank "$SLURM_NODEID" --num_processes "$processes"
    --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT"
    --tee 3 --log_dir "$LOGS/node-$SLURM_NODEID")
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
    options+=(--config_file "$ACCELERATE_CONFIG")
else
    options+=(--mixed_precision no --dynamo_backend no) # the recipe decides both
    if [ "$processes" -gt 1 ]; then options+=(--multi_gpu); fi
fi
mkdir -p "$LOGS/node-$SLURM_NODEID"
# exec, so that Slurm's signals meet no shell that dies of them.
exec accelerate launch "${options[@]}" -m hf_stable train "$@"
