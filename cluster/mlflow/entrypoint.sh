#!/bin/sh
# libpq reads a password from the environment, but not from a file that holds nothing else, as a mounted secret does.
set -eu
if [ -n "${PGPASSWORD_FILE:-}" ]; then
    PGPASSWORD=$(cat "$PGPASSWORD_FILE")
    export PGPASSWORD
fi
exec "$@"
