# shellcheck shell=bash
# What the jobs of this directory share. They source it on their first node, in the directory of `sbatch`: the checkout.

# EDIT: what makes `rlhf-launch` available on every node, such as an environment on a file system that they share, ...
# shellcheck source=/dev/null
source .venv/bin/activate
launch() { exec rlhf-launch "$@"; }
# ... or a container, which sees of this directory only `runs`, so that configurations lie there too:
# launch() { exec apptainer exec --nv --pwd /app --bind "$PWD/runs:/app/runs" --env HF_HOME=/app/runs/hf_home \
#     rlhf_recipes.sif rlhf-launch "$@"; }
export -f launch

# EDIT: a cache that all nodes share, and the server that all jobs report to. Several jobs at once need one: SQLite's file on
# a network file system is not made for that.
export HF_HOME=${HF_HOME:-$PWD/runs/hf_home}
# export MLFLOW_TRACKING_URI=http://mlflow.example.org:5000

# EDIT: the network between the nodes, if NCCL or Gloo picks another.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Write down what this job runs with, beside its log; of the environment only what is known to hold no secret.
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

# launch_on NODES ARGUMENTS...: a launcher on each of the nodes, with a process for each GPU (one, if there is none).
launch_on() {
    local hosts processes=${SLURM_GPUS_ON_NODE:-1}
    mapfile -t hosts < <(scontrol show hostnames "$1")
    # The first node may have results to send when the others are done: 600 s for that, which a node that fails costs as
    # well. Jobs that share a node do not share a port. In single quotes: a node must put in its own rank; here it is 0.
    # shellcheck disable=SC2016
    srun --nodes "${#hosts[@]}" --nodelist "$1" --ntasks "${#hosts[@]}" --ntasks-per-node 1 \
        --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --wait 600 \
        bash -c 'launch --machine_rank "$SLURM_PROCID" "$@"' launch \
        --num_machines "${#hosts[@]}" --num_processes $((processes * ${#hosts[@]})) \
        --main_process_ip "${hosts[0]}" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) "${@:2}"
}

# end_job CODE: 75 says that a signal has come, and what was trained is saved: the job is put back into the queue.
end_job() {
    local job=$SLURM_JOB_ID
    # One job of an array has the array's own number, which would stand for all of them.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if (($1 == 75)); then
        scontrol requeue "$job"
        sleep 60 # Slurm ends this script
    fi
    exit "$1"
}
