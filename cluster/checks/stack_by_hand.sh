#!/usr/bin/env bash
# Run the services `postgres` and `mlflow` of docker-compose.yml without Docker, in a temporary directory.
#
#   cluster/checks/stack_by_hand.sh                                 runs until Ctrl-C
#   cluster/checks/stack_by_hand.sh python recipes/quickstart.py    runs during a command, with MLFLOW_TRACKING_URI set
#
# Needs PostgreSQL (Debian: apt install postgresql) and a Python with mlflow, psycopg2 and PyYAML. PYTHON names this
# Python. KEEP=1 keeps the directory. PORT and DATABASE_PORT choose the ports.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
port=${PORT:-5000}
database_port=${DATABASE_PORT:-5433}
postgres=$(find /usr/lib/postgresql -mindepth 3 -maxdepth 3 -path '*/bin/initdb' 2>/dev/null | sort -V | tail -n 1)
postgres=$(dirname "${postgres:-$(command -v initdb || true)}")
[ -x "$postgres/initdb" ] || { echo "PostgreSQL is not installed: apt install postgresql" >&2; exit 1; }
"$python" -c 'import mlflow, psycopg2, yaml' || { echo "PYTHON=$python lacks a module that is named above" >&2; exit 1; }
"$python" -c 'import socket, sys; [socket.create_server(("127.0.0.1", int(port))).close() for port in sys.argv[1:]]' \
    "$port" "$database_port" || { echo "PORT=$port or DATABASE_PORT=$database_port is taken" >&2; exit 1; }

directory=$(mktemp -d)
as_user=()
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
    as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
    chown nobody:nogroup "$directory"
fi
server=
finish() {
    status=$?
    trap - EXIT INT TERM
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    if [ -e "$directory/data/postmaster.pid" ]; then
        "${as_user[@]}" "$postgres/pg_ctl" --pgdata="$directory/data" --mode=fast --silent stop || true
    fi
    if [ "${KEEP:-}" = 1 ]; then echo "Kept: $directory"; else rm -rf "$directory"; fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

password_file=$directory/password
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(24))' >"$password_file")
[ "$(id -u)" != 0 ] || chown nobody "$password_file"
"${as_user[@]}" "$postgres/initdb" --pgdata="$directory/data" --username=mlflow --pwfile="$password_file" \
    --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 >"$directory/initdb.log"
"${as_user[@]}" "$postgres/pg_ctl" --pgdata="$directory/data" --log="$directory/postgres.log" --wait --silent \
    --options="-c listen_addresses=127.0.0.1 -c port=$database_port -c unix_socket_directories=$directory" start ||
    { cat "$directory/postgres.log" >&2; exit 1; }
PGPASSWORD=$(cat "$password_file") "$postgres/createdb" --host=127.0.0.1 --port="$database_port" \
    --username=mlflow mlflow

# Use the command of the service itself. Only addresses and paths differ.
mapfile -t command < <("$python" - "$root/docker-compose.yml" "$port" "$database_port" "$directory" <<'PYTHON'
import sys

import yaml

path, port, database_port, directory = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    command = yaml.safe_load(file)["services"]["mlflow"]["command"]
changes = {
    "--host=0.0.0.0": "--host=127.0.0.1",
    "--port=5000": f"--port={port}",
    "--artifacts-destination=/artifacts": f"--artifacts-destination={directory}/artifacts",
}
for argument in command[1:]:
    print(changes.get(argument, argument).replace("@postgres:5432/", f"@127.0.0.1:{database_port}/"))
PYTHON
)
mkdir "$directory/artifacts"
cd "$directory"
MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false PGPASSWORD_FILE=$password_file \
    "$root/cluster/mlflow/entrypoint.sh" "$python" -m mlflow "${command[@]}" >"$directory/mlflow.log" 2>&1 &
server=$!
cd - >/dev/null
healthy() {
    "$python" -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health', timeout=4)" 2>/dev/null
}
for _ in $(seq 60); do
    healthy && break
    kill -0 "$server" 2>/dev/null || break
    sleep 1
done
healthy || { echo "MLflow does not answer; the end of its log:" >&2; tail -n 20 "$directory/mlflow.log" >&2; exit 1; }

export MLFLOW_TRACKING_URI=http://127.0.0.1:$port
echo "MLflow: $MLFLOW_TRACKING_URI   PostgreSQL: port $database_port   Directory: $directory"
if [ $# -gt 0 ]; then "$@"; else wait "$server"; fi
