#!/usr/bin/env bash
# Build and run the image without a container engine. As its own user it trains, stops on SIGTERM, and resumes.
#
#   apt install buildah debootstrap
#   sudo cluster/checks/image.sh [DIRECTORY] [OPTION OF BUILDAH BUILD...]
#
# The base is a new Debian instead of CUDA's image. If pip needs an index or a certificate, give it by the options, for
# example `--volume my_pip.conf:/etc/pip.conf:ro`. Prints one line per claim. Exits with 1 at the first false claim.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "${1:-$checkout/runs/image_check}" && cd "${1:-$checkout/runs/image_check}" && pwd)
image=localhost/rlhf-recipes:check
b() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
say() { printf '%s  %s\n' "$(date +%T)" "$1"; }

if ! b inspect localhost/debian &>/dev/null; then
    [[ -d $work/context/debian ]] || debootstrap --variant=minbase bookworm "$work/context/debian" >"$work/debootstrap.log"
    printf 'FROM scratch\nCOPY debian /\n' >"$work/context/Dockerfile"
    b build --isolation chroot --tag localhost/debian "$work/context" >"$work/base.log"
fi
b build --isolation chroot --network host --build-arg BASE_IMAGE=localhost/debian --tag "$image" \
    --build-arg "REVISION=$(git -C "$checkout" rev-parse HEAD)" "${@:2}" "$checkout" >"$work/build.log" 2>&1
say "built: $(b images --format '{{.Size}}' "$image"), revision $(b inspect --type image \
    --format '{{index .OCIv1.Config.Labels "org.opencontainers.image.revision"}}' "$image")"

container=$(b from "$image")
trap 'b rm "$container" >/dev/null' EXIT
run() { b run --isolation chroot --network host --env HF_HUB_OFFLINE=1 --env OMP_NUM_THREADS=1 "$container" -- "$@"; }
entrypoint=$(b inspect --type image --format '{{index .OCIv1.Config.Entrypoint 0}}' "$image")
[[ $(run id -u) == 1000 ]]
[[ -z $(run find /app /opt/venv -writable -not -path '/app/runs*' -not -path '/app/mlruns*' -not -path /app -not -type l) ]]
say "runs as uid $(run id -u), which cannot write to the code; starts with $entrypoint"

run python recipes/quickstart.py --until reward_modeling >"$work/prepare.log" 2>&1
say "its user has trained SFT and reward model"

ppo=("$entrypoint" launch recipes/ppo.py --config recipes/configs/quickstart/ppo.yaml --max_steps 24 --logging_steps 2
    --eval_steps 12 --resume_from_checkpoint true)
run "${ppo[@]}" >"$work/ppo.log" 2>&1 &
until grep -Eq '^step +[0-9]+/[0-9]+  ' "$work/ppo.log"; do # the line of a log of the training
    kill -0 $! || { tail -n 20 "$work/ppo.log"; exit 1; }
    sleep 0.2
done
pkill -TERM --full "^/opt/venv/bin/python[0-9.]* /opt/venv/bin/$entrypoint launch recipes/ppo.py" # not buildah itself
sent=$SECONDS code=0
wait $! || code=$?
[[ $code == 75 ]]
say "SIGTERM to the entrypoint: $(grep -o 'Stopped by a signal at step [0-9]*, with a checkpoint' "$work/ppo.log"), exit code \
$code, $((SECONDS - sent)) s"

run "${ppo[@]}" >>"$work/ppo.log" 2>&1
run test -f runs/quickstart/ppo/model.safetensors
say "the same command has resumed and reached the end"
