# shellcheck shell=bash
# Shared by the jobs of this directory. They source it on their first node, in the directory of `sbatch`: the checkout.

# EDIT: make `rlhf launch` available on every node: an environment on a file system that all nodes share, ...
# shellcheck source=/dev/null
source .venv/bin/activate
launch() { exec rlhf launch "$@"; }
# ... or a container. It sees only `runs` of this directory, so put the configurations there too:
# launch() { exec apptainer exec --nv --pwd /app --bind "$PWD/runs:/app/runs" --env HF_HOME=/app/runs/hf_home \
#     rlhf_recipes.sif rlhf launch "$@"; }
export -f launch

# EDIT: a cache that all nodes share, and the server that all jobs report to. Several jobs at the same time need a
# server, because SQLite does not support them on a network file system.
export HF_HOME=${HF_HOME:-$PWD/runs/hf_home}
# export MLFLOW_TRACKING_URI=http://mlflow.example.org:5000

# EDIT: the network between the nodes, if NCCL or Gloo picks the wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Write the commit, environment and packages of this job beside its log. Variables that may hold a secret are left out.
describe_job() {
    {
        date --iso-8601=seconds
        scontrol show job "$SLURM_JOB_ID"
        git log -1 --format='commit %H' || true
        git status --short --untracked-files=no || true
        env | grep -aE '^(SLURM|CUDA|NCCL|GLOO|TORCH|OMP|HF_HOME|HF_HUB_OFFLINE|VIRTUAL_ENV|PYTHONPATH|PATH|LD_)' \
            | grep -avE '^[^=]*(JWT|TOKEN|KEY|SECRET|PASS)' | sort
        python -m pip freeze || true
        nvidia-smi || true
    } >>"$SLURM_JOB_NAME-$SLURM_JOB_ID.env" 2>&1
}

# launch_on NODES ARGUMENTS...: start a launcher on each node, with one process per GPU (one process without a GPU).
launch_on() {
    local hosts processes=${SLURM_GPUS_ON_NODE:-1}
    mapfile -t hosts < <(scontrol show hostnames "$1")
    # The first node may still send results when the others are done. It has 600 s for that. So a failed node costs up
    # to 600 s too. Jobs that share a node need different ports. The single quotes let each node insert its own rank.
    # shellcheck disable=SC2016
    srun --nodes "${#hosts[@]}" --nodelist "$1" --ntasks "${#hosts[@]}" --ntasks-per-node 1 \
        --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --wait 600 \
        bash -c 'launch --machine_rank "$SLURM_PROCID" "$@"' launch \
        --num_machines "${#hosts[@]}" --num_processes $((processes * ${#hosts[@]})) \
        --main_process_ip "${hosts[0]}" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) "${@:2}"
}

# end_job CODE: 75 means that a signal came and the work is saved. The job then goes back into the queue.
end_job() {
    local job=$SLURM_JOB_ID
    # Requeue one job of an array, not all: one of them has the same number as the array.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if (($1 == 75)); then
        scontrol requeue "$job"
        sleep 60 # Slurm ends this script
    fi
    exit "$1"
}
