#!/usr/bin/env bash
# The servers of compose.yaml from packages, where there are no containers: PostgreSQL, an MLflow server on it, and a
# Ray head with two workers.
#
# PostgreSQL, MLflow and Ray's dashboard listen on loopback only. RAY'S OTHER SERVERS LISTEN ON EVERY INTERFACE, and no
# option of Ray changes that: they ask for the token, but its metrics ask for nothing. On a network that others are in,
# put a firewall before this machine.
#
#   docker/servers.sh start   # its last line is a file of variables to source
#   docker/servers.sh stop    # ends them; what they stored stays until the folder is removed
#
# SERVERS       folder of data, logs and secrets, which has to be yours; /tmp/budgetdraft-servers
# PORTS         the first of 12 ports that are free; 18000
# RAY_CPUS      of each of the three Ray nodes; 1
# PYTHON        of an environment that has this project; .venv/bin/python
#
# Needs curl, and PostgreSQL's server programs, which never run as root: root starts them as the user `postgres`.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SERVERS="${SERVERS:-/tmp/budgetdraft-servers}"
PORTS="${PORTS:-18000}"
RAY_CPUS="${RAY_CPUS:-1}"
PYTHON="${PYTHON:-$HERE/../.venv/bin/python}"
PATIENCE_S=120
POSTGRES_PORT=$PORTS MLFLOW_PORT=$((PORTS + 1)) DASHBOARD_PORT=$((PORTS + 2)) RAY_PORT=$((PORTS + 3))
DATABASE="postgresql+psycopg2://mlflow@127.0.0.1:$POSTGRES_PORT/mlflow"

fail() {
  echo "$1" >&2
  exit 1
}

# How to run something as the user that PostgreSQL may run as.
AS_POSTGRES=() OWNER=()
if [ "$(id -u)" = 0 ]; then
  AS_POSTGRES=(setpriv --reuid=postgres --regid=postgres --clear-groups)
  OWNER=(--owner=postgres)
fi

# Its programs are on no PATH on Debian.
postgres_program() {
  command -v "$1" || { compgen -G "/usr/lib/postgresql/*/bin/$1" | sort -V | tail -n 1; }
}

# launch NAME COMMAND…: in the background, with a log and a file that holds its process id.
launch() {
  local name="$1"
  shift
  setsid "$@" > "$SERVERS/$name.log" 2>&1 < /dev/null &
  echo $! > "$SERVERS/$name.pid"
}

# wait_for NAME COMMAND…: until the command succeeds, while the server NAME lives.
wait_for() {
  local name="$1" deadline=$((SECONDS + PATIENCE_S))
  shift
  until "$@" > /dev/null 2>&1; do
    if [ $SECONDS -gt $deadline ] || ! kill -0 "$(cat "$SERVERS/$name.pid")" 2> /dev/null; then
      tail -n 20 "$SERVERS/$name.log" >&2
      fail "$name did not start; its log is $SERVERS/$name.log"
    fi
    sleep 0.5
  done
}

make_secret() {
  (umask 077 && "$PYTHON" -c "import secrets; print(secrets.token_hex(32), end='')" > "$1")
}

start_postgres() {
  local data="$SERVERS/postgres" password="$SERVERS/postgres_password" initdb postgres
  initdb="$(postgres_program initdb)" postgres="$(postgres_program postgres)"
  [ -n "$initdb" ] || fail "no initdb here: install PostgreSQL's server (Debian: apt-get install postgresql)"
  if [ ! -e "$data/PG_VERSION" ]; then
    make_secret "$password"
    install --directory --mode=700 "${OWNER[@]}" "$data"
    install --mode=600 "${OWNER[@]}" "$password" "$password.initdb" # to be read as that user
    "${AS_POSTGRES[@]}" "$initdb" --pgdata="$data" --username=mlflow --pwfile="$password.initdb" \
      --auth=scram-sha-256 --encoding=UTF8 --no-locale > "$SERVERS/initdb.log"
    rm "$password.initdb"
  fi
  launch postgres "${AS_POSTGRES[@]}" "$postgres" -D "$data" -p "$POSTGRES_PORT" \
    -c listen_addresses=127.0.0.1 -c unix_socket_directories=
}

start_mlflow() {
  local driver
  driver="$(grep '^psycopg2' "$HERE/requirements-mlflow.txt")"
  "$PYTHON" -m pip install --quiet --no-deps --upgrade --target "$SERVERS/driver" "$driver"
  export PYTHONPATH="$SERVERS/driver" POSTGRES_PASSWORD_FILE="$SERVERS/postgres_password"
  wait_for postgres database
  MLFLOW_BACKEND_STORE_URI="$DATABASE" MLFLOW_DISABLE_TELEMETRY=true launch mlflow "$HERE/mlflow-server.sh" \
    --host=127.0.0.1 --port="$MLFLOW_PORT" --artifacts-destination="$SERVERS/artifacts" --workers=2
  unset PYTHONPATH
}

# Whether the database `mlflow` is there, which is made where it is not.
database() {
  "$PYTHON" - "$POSTGRES_PORT" "$SERVERS/postgres_password" << 'EOP'
import sys
import psycopg2

port, password = sys.argv[1], open(sys.argv[2]).read()
server = psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", password=password, dbname="postgres")
server.autocommit = True
with server.cursor() as cursor:
    cursor.execute("select 1 from pg_database where datname = 'mlflow'")
    if not cursor.fetchone():
        cursor.execute("create database mlflow")
EOP
}

# Three nodes share this machine: each has folders and ports of its own.
start_ray() {
  local node
  for node in 1 2 3; do
    local options=(--num-cpus="$RAY_CPUS" --temp-dir="$SERVERS/ray$node" --node-ip-address=127.0.0.1
      --metrics-export-port=$((PORTS + 3 + node)) --dashboard-agent-listen-port=$((PORTS + 6 + node))
      --min-worker-port=0 --max-worker-port=0 --object-store-memory=200000000)
    if [ "$node" = 1 ]; then
      launch ray1 "$HERE/ray-node.sh" head "${options[@]}" --ray-client-server-port=$((PORTS + 10)) \
        --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT"
      wait_for ray1 ray health-check --address "$RAY_HEAD"
    else
      launch "ray$node" "$HERE/ray-node.sh" worker "${options[@]}"
    fi
  done
  wait_for ray3 three_nodes
}

three_nodes() {
  [ "$(ray status --address "$RAY_HEAD" | grep -c '^ 1 node_')" = 3 ]
}

# Whoever owns the folder could read the secrets in it and say which processes `stop` ends.
own_folder() {
  if [ -L "$SERVERS" ] || ! [ -d "$SERVERS" ] || ! [ -O "$SERVERS" ]; then
    fail "SERVERS=$SERVERS is no folder of yours: name another one"
  fi
}

start() {
  [ -e "$SERVERS" ] || mkdir -p "$SERVERS"
  own_folder
  compgen -G "$SERVERS/*.pid" > /dev/null && fail "there are servers in $SERVERS already: stop them first"
  [ -x "$PYTHON" ] || fail "PYTHON=$PYTHON is no Python: run make setup, or name another one"
  chmod 700 "$SERVERS"
  # The user postgres passes through to its own folder, and nobody else.
  if [ "$(id -u)" = 0 ]; then
    chgrp postgres "$SERVERS"
    chmod 710 "$SERVERS"
  fi
  [ -s "$SERVERS/token" ] || make_secret "$SERVERS/token"
  PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH" # jobs run the `python` that the head finds
  export PATH RAY_HEAD="127.0.0.1:$RAY_PORT" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SERVERS/token"
  cat > "$SERVERS/environment" << EOE
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SERVERS/token RAY_USAGE_STATS_ENABLED=0
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
export MLFLOW_TRACKING_URI=http://127.0.0.1:$MLFLOW_PORT
EOE
  start_postgres
  start_ray
  start_mlflow
  wait_for mlflow curl --fail --silent "http://127.0.0.1:$MLFLOW_PORT/health"
  echo "PostgreSQL  $DATABASE (password in $SERVERS/postgres_password)" >&2
  echo "MLflow      http://127.0.0.1:$MLFLOW_PORT" >&2
  echo "Ray         http://127.0.0.1:$DASHBOARD_PORT (token in $SERVERS/token)" >&2
  echo "$SERVERS/environment"
}

# A process and all below it; some of Ray's have sessions of their own.
family() {
  local child
  echo "$1"
  for child in $(pgrep -P "$1"); do family "$child"; done
}

# Whether a process is a server of this folder: after a restart of the machine another one may have its id.
ours() {
  grep --quiet --text --fixed-strings -e "$SERVERS/" "/proc/$1/cmdline" 2> /dev/null
}

stop() {
  local file pid members deadline
  [ -e "$SERVERS" ] || return 0
  own_folder
  for name in ray3 ray2 ray1 mlflow postgres; do
    file="$SERVERS/$name.pid"
    [ -e "$file" ] || continue
    pid="$(cat "$file")"
    if ! ours "$pid"; then
      rm "$file"
      continue
    fi
    mapfile -t members < <(family "$pid")
    deadline=$((SECONDS + 20))
    kill "$pid" 2> /dev/null || true
    while kill -0 "$pid" 2> /dev/null && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    kill -9 "${members[@]}" 2> /dev/null || true
    rm "$file"
  done
}

case "${1:-}" in
  start | stop) "$1" ;;
  *) fail "usage: docker/servers.sh start|stop" ;;
esac
