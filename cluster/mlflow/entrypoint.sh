#!/bin/sh
# libpq reads a password from the environment, but not from a mounted secret: a file that holds only the password.
set -eu
if [ -n "${PGPASSWORD_FILE:-}" ]; then
    PGPASSWORD=$(cat "$PGPASSWORD_FILE")
    export PGPASSWORD
fi
exec "$@"
