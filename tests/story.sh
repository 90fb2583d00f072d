#!/usr/bin/env bash
# The main job with an installed program: write to a primary that a replica follows, kill the primary, promote
# the replica's directory, start a primary on it, read what was written.
# Usage: tests/story.sh [path/to/understudy]
set -euo pipefail

understudy=$(command -v "${1:-understudy}") || { echo "story: no such program: ${1:-understudy}" >&2; exit 2; }
python=$(dirname "$understudy")/python
[[ -x $python ]] || python=python3
wait_s=60

work=$(mktemp -d)
pids=()

say() { printf 'story: %s\n' "$*"; }

fail() {
    say "FAILED: $*"
    tail -n 40 "$work"/*.err
    exit 1
} >&2

clean_up() {
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

# wait_for WHAT COMMAND...: until COMMAND succeeds
wait_for() {
    local what=$1 end=$((SECONDS + wait_s))
    shift
    until "$@"; do
        ((SECONDS < end)) || fail "no $what within $wait_s s"
        sleep 0.1
    done
}

# start NAME ARGUMENTS...: runs it until it is ready; leaves its process id in $pid and its address in $address
start() {
    local name=$1
    shift
    "$understudy" "$@" >"$work/$name.out" 2>"$work/$name.err" </dev/null &
    pid=$!
    pids+=("$pid")
    wait_for "ready $name" is_ready_or_gone "$name"
    address=$(sed -n 's/^[a-z]* ready on //p' "$work/$name.out")
    [[ -n $address ]] || fail "$name ended before it was ready"
    say "$name ready on $address"
}

is_ready_or_gone() { grep -q '^[a-z]* ready on ' "$work/$1.out" || gone "$pid"; }
gone() { ! kill -0 "$1" 2>/dev/null; }

# stop PID NAME: asks it to end, and expects that it does so cleanly
stop() {
    kill -TERM "$1" 2>/dev/null || true
    wait_for "end of $2" gone "$1"
    wait "$1" || fail "$2 ended with exit code $?"
}

# status ADDRESS KEY: one fact of a running node
status() {
    "$understudy" status --server "$1" --json |
        "$python" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$2"
}

# holds ADDRESS LSN: whether that node has made everything up to LSN durable
holds() { (($(status "$1" durable_lsn) >= $2)); }

start primary primary --data-dir "$work/first" --listen 127.0.0.1:0
primary=$address primary_pid=$pid
start replica replica --data-dir "$work/second" --primary "$primary" --listen 127.0.0.1:0
replica=$address replica_pid=$pid

for number in 1 2 3 4 5; do
    "$understudy" put --server "$primary" /story "line/$number" "spoken $number times"
done
lsn=$(status "$primary" lsn)
wait_for "replica at $lsn" holds "$replica" "$lsn"
say "replica has everything up to $lsn"

kill -KILL "$primary_pid"
wait_for "end of the primary" gone "$primary_pid"
say "primary killed"

"$understudy" promote "$work/second"
stop "$replica_pid" replica
start promoted primary --data-dir "$work/second" --listen 127.0.0.1:0
[[ $(status "$address" role) == primary ]] || fail "the promoted node is no primary"

for number in 1 2 3 4 5; do
    value=$("$understudy" get --server "$address" /story "line/$number")
    [[ $value == "spoken $number times" ]] || fail "line/$number came back as '$value'"
done
"$understudy" put --server "$address" /story epilogue "goes on"
[[ $("$understudy" get --server "$address" /story epilogue) == "goes on" ]] || fail "a new write is not there"
stop "$pid" promoted
say "all there, and it goes on"
