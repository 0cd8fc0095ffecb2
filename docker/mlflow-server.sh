#!/usr/bin/env bash
# The MLflow server on PostgreSQL, in the foreground. Arguments go to `mlflow server`.
#
#   MLFLOW_BACKEND_STORE_URI  the database, without a password
#   POSTGRES_PASSWORD_FILE    the file that holds it; so it stands in no list of processes
set -euo pipefail

if [ ! -s "$POSTGRES_PASSWORD_FILE" ]; then
  echo "POSTGRES_PASSWORD_FILE=$POSTGRES_PASSWORD_FILE: no password there; set POSTGRES_PASSWORD" >&2
  exit 2
fi
PGPASSWORD="$(cat "$POSTGRES_PASSWORD_FILE")"
export PGPASSWORD
# Its jobs (evaluations that MLflow would run itself) are not used here and would be one more process.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
exec mlflow server --serve-artifacts "$@"
