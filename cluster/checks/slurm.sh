#!/usr/bin/env bash
# Run the Slurm job on a real Slurm with two nodes, both on this machine: preempt it, requeue it, compare the results.
#
#   apt install slurm-wlm munge && make demo
#   sudo cluster/checks/slurm.sh [DIRECTORY]
#
# Needs root for the daemons, and 127.0.0.1 as n1 and n2 in /etc/hosts. Writes everything into DIRECTORY, and ends the
# daemons. Prints one line per claim. Exits with 1 at the first false claim.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "${1:-$checkout/runs/slurm_check}" && cd "${1:-$checkout/runs/slurm_check}" && pwd)
steps=48
export SLURM_CONF=$work/slurm.conf OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true
getent hosts n1 n2 >/dev/null || { echo "add '127.0.0.1 n1 n2' to /etc/hosts" >&2; exit 2; }

start_cluster() {
    mkdir -p "$work"/{state,spool-n1,spool-n2,munge}
    dd if=/dev/urandom of="$work/munge/key" bs=1 count=1024 status=none
    chmod 700 "$work/munge" && chmod 400 "$work/munge/key"
    munged --force --key-file "$work/munge/key" --socket "$work/munge/socket" --pid-file "$work/munge/pid" \
        --log-file "$work/munge/log" --seed-file "$work/munge/seed"
    cat >"$SLURM_CONF" <<EOF
ClusterName=check
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
KillWait=60
MinJobAge=3600
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
EOF
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in {1..60}; do
        [[ $(sinfo --noheader --Node --format %t | sort -u) == idle ]] && return
        sleep 1
    done
    sinfo && exit 1
}

stop_cluster() {
    scancel --state RUNNING,PENDING --user root 2>/dev/null || true
    sleep 2
    for daemon in slurmd-n1 slurmd-n2 slurmctld munge/pid; do
        [[ ! -f $work/${daemon%.pid}.pid ]] || kill "$(cat "$work/${daemon%.pid}.pid")" || true
    done
    [[ ! -f $work/munge/pid ]] || kill "$(cat "$work/munge/pid")" || true
}

# submit NODES OUTPUT_DIR [OPTION OF SBATCH...]: submit the job with the quickstart's PPO, and print its number.
submit() {
    sbatch --parsable --nodes "$1" --gpus-per-node 0 --cpus-per-task 1 --time 60 "${@:3}" cluster/slurm/train.slurm \
        --config_file accelerate_configs/multi_gpu.yaml --mixed_precision no \
        recipes/ppo.py --config recipes/configs/quickstart/ppo.yaml --output_dir "$2" --run_name "$2" \
        --per_device_train_batch_size $((64 / $1)) --max_steps "$steps" --save_steps 40 --logging_steps 2 --eval_steps 24 \
        --experiment_name slurm_check
}

state_of() { scontrol show job "$1" | grep -o 'JobState=[A-Z_]*' | sort -u | cut -d= -f2; }

wait_for_end() { # of one job, or of all jobs of an array; the second argument is the log
    while [[ $(state_of "$1") =~ PENDING|RUNNING|COMPLETING|REQUEUED ]]; do sleep 1; done
    [[ $(state_of "$1") == COMPLETED ]] || { tail -n 40 "${2:-rlhf-$1.out}"; exit 1; }
}

wait_for_step() { # of a run, counted by the lines of its log
    until (($(cat "rlhf-$1.out" 2>/dev/null | grep -Ec '^step +[0-9]+/[0-9]+  ') >= $2)); do
        [[ $(state_of "$1") =~ PENDING|RUNNING|CONFIGURING ]] || { tail -n 40 "rlhf-$1.out"; exit 1; }
        sleep 0.2
    done
}

say() { printf '%s  %s\n' "$(date +%T)" "$1"; }

# Clone the checkout, so that the jobs have a directory of their own.
rm -rf "$work/checkout" && git clone --quiet "$checkout" "$work/checkout" && cd "$work/checkout"
ln -s "$checkout/.venv" .venv
export PYTHONPATH=$PWD
mkdir -p runs && cp -r "$checkout/runs/quickstart" runs/
trap stop_cluster EXIT
start_cluster
say "Slurm $(slurmctld -V | cut -d' ' -f2) runs with $(sinfo --noheader --Node | wc -l) nodes"

# Claims that need no training use stand-ins. A stand-in prints its arguments.
mkdir -p "$work/stand_in/.venv/bin" && cp -r cluster "$work/stand_in/"
echo "PATH=$work/stand_in/.venv/bin:\$PATH" >"$work/stand_in/.venv/bin/activate"
cat >"$work/stand_in/.venv/bin/rlhf" <<'EOF'
#!/bin/sh
shift # `launch`
echo "launched: $*"
[ "$1 $2" = "--machine_rank 0" ] || exit 3
case "$* ${SLURM_RESTART_COUNT:-0}" in *"--seed 1 "*0) sleep 5; exit 75 ;; esac
EOF
printf '#!/bin/sh\necho "served: $*"; sleep 300\n' >"$work/stand_in/.venv/bin/trl"
chmod +x "$work"/stand_in/.venv/bin/*
stand_in() { (cd "$work/stand_in" && sbatch --parsable --gpus-per-node 0 --cpus-per-task 1 "$@"); }

served=$(stand_in --nodes 2 cluster/slurm/train_vllm.slurm POLICY recipes/ppo.py)
wait_for_end "$served" "$work/stand_in/rlhf-vllm-$served.out"
grep -q "launched: --machine_rank 0 --num_machines 1 .*vllm_server_base_url http://n2:8000" "$work/stand_in/rlhf-vllm-$served.out"
grep -q "served: vllm-serve --model POLICY" "$work/stand_in/rlhf-vllm-$served-vllm.out"
say "two nodes: one trains, the other serves vLLM (stand-ins for both)"

elements=$(stand_in --array 0-2 cluster/slurm/train.slurm recipes/ppo.py)
wait_for_end "$elements" "$work/stand_in/rlhf-$elements.out"
[[ $(scontrol show job "$elements" | grep -o 'Restarts=[0-9]*' | sort | uniq -c | xargs) == "2 Restarts=0 1 Restarts=1" ]]
say "an array of three: only the one that exits with 75 is requeued (stand-in)"

whole=$(submit 2 runs/whole)
wait_for_end "$whole"
say "two nodes, not interrupted: job $whole has ended"

requeued=$(submit 2 runs/requeued)
wait_for_step "$requeued" 6
scontrol requeue "$requeued"
say "two nodes: job $requeued is requeued in the middle"
until grep -q "Stopped by a signal" "rlhf-$requeued.out"; do sleep 1; done
say "  $(grep -m 1 -o 'Stopped by a signal at step [0-9]*, with a checkpoint' "rlhf-$requeued.out")"
wait_for_end "$requeued"
[[ $(scontrol show job "$requeued" | grep -o 'Restarts=[0-9]*') == Restarts=1 ]]
for file in model.safetensors value_head.safetensors; do
    cmp "runs/whole/$file" "runs/requeued/$file"
    say "  $file is the same, bit for bit, as in the run that was not interrupted"
done

timed=$(submit 1 runs/timed --time 2 --signal USR1@75)
until grep -qs "Stopped by a signal" "rlhf-$timed.out"; do
    [[ $(state_of "$timed") =~ PENDING|RUNNING|CONFIGURING ]] || exit 1
    sleep 1
done
say "one node: job $timed stops before its time limit, and puts itself back into the queue"
scontrol update JobId="$timed" TimeLimit=60
wait_for_end "$timed"
say "  and has ended after $(scontrol show job "$timed" | grep -o 'Restarts=[0-9]*')"

array=$(submit 1 unused --array 0-1)
wait_for_end "$array"
say "an array of two seeds: job $array has ended"
.venv/bin/python recipes/compare.py --experiment slurm_check --output_dir runs/compare
say "compared: $PWD/runs/compare"
