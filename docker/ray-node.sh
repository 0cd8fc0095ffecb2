#!/usr/bin/env bash
# One Ray node, in the foreground: `ray-node.sh head` or `ray-node.sh worker`, then options of `ray start`.
#
#   RAY_HEAD             host:port of the head
#   RAY_AUTH_TOKEN_PATH  the file with the token that everyone is asked for
set -euo pipefail

kind="$1"
shift
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  echo "RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH: no token there, and without one whoever reaches Ray runs code" >&2
  exit 2
fi
# A job that is stopped has this long for a last checkpoint.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=120
case "$kind" in
  head) exec ray start --head --port="${RAY_HEAD##*:}" --block "$@" ;;
  worker) exec ray start --address="$RAY_HEAD" --block "$@" ;;
  *)
    echo "$kind: head or worker" >&2
    exit 2
    ;;
esac
