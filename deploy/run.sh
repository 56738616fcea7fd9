#!/usr/bin/env bash
# Serves Weir in the foreground with the examples applied, and prints what to try.
#   deploy/run.sh [PATH-OF-WEIR]
set -euo pipefail
cd "$(dirname "$0")/.."

weir=${1:-target/release/weir}
for program in curl python3; do
    if ! command -v "$program" >/dev/null; then
        echo "$program is missing" >&2
        exit 1
    fi
done

listen=${WEIR_LISTEN:-127.0.0.1:8080}
admin=${WEIR_ADMIN:-127.0.0.1:8081}
export WEIR_URL="http://$listen" WEIR_ADMIN_URL="http://$admin" WEIR_DATA_DIR=.weir
unset WEIR_API_KEY

# As root Weir starts instances as nobody, who may not be able to reach a checkout or a Python under /root.
if ((EUID == 0)) && [[ -z ${WEIR_INSTANCE_USER:-} ]] && command -v setpriv >/dev/null; then
    absolute=$(realpath "$weir")
    # shellcheck disable=SC2016  # the inner shell expands them
    if ! (cd deploy/examples && setpriv --reuid=nobody --regid=nogroup --clear-groups \
        sh -c '"$1" --version && python3 -c "open(\"$2\")"' sh "$absolute" "$PWD/hello.py") >/dev/null 2>&1; then
        echo "the user nobody can't run weir or python3 from here: instances run as root" >&2
        export WEIR_INSTANCE_USER=root
    fi
fi

"$weir" serve --listen "$listen" --admin "$admin" --data-dir .weir --access-log .weir/access.log &
server=$!
stopping=
# Ctrl-C reaches weir by itself.
trap 'stopping=1' INT
trap 'stopping=1; kill -TERM "$server" 2>/dev/null || true' TERM
trap 'kill -TERM "$server" 2>/dev/null || true' EXIT

ready=
for _ in {1..100}; do
    sleep 0.1
    if ! kill -0 "$server" 2>/dev/null; then
        echo "weir has ended before it was ready" >&2
        exit 1
    fi
    if curl -sf --max-time 1 -o /dev/null "$WEIR_ADMIN_URL/readyz"; then
        ready=1
        break
    fi
done
if [[ -z $ready ]]; then
    echo "weir was not ready after 100 looks at $WEIR_ADMIN_URL/readyz" >&2
    exit 1
fi

"$weir" apply -f deploy/examples/functions.yaml --timeout PT1M

# The ID of the function with this name.
id_of() {
    "$weir" function list --output json | python3 -c '
import json, sys
answer = json.load(sys.stdin)
functions = answer["functions"] if isinstance(answer, dict) else answer
print(next(f["id"] for f in functions if f["name"] == sys.argv[1]))
' "$1"
}
hello=$(id_of hello)
sample=$(id_of sample)

if [[ -n ${WEIR_ADMIN_KEY:-} ]]; then
    key="\$WEIR_ADMIN_KEY"
else
    key="\$(cat .weir/admin.key)"
fi
flags=
[[ $listen == 127.0.0.1:8080 ]] || flags+=" --url $WEIR_URL"
[[ $admin == 127.0.0.1:8081 ]] || flags+=" --admin-url $WEIR_ADMIN_URL"

cat <<TRY

Weir is ready. In another terminal, in $PWD:

  # hello runs already
  curl -H "Authorization: Bearer $key" -H "function-id: $hello" -d '{"name": "you"}' $WEIR_URL/hello
  curl -N -H "Authorization: Bearer $key" -H "function-id: $hello" "$WEIR_URL/stream?n=3"
  $weir invoke$flags hello -d '{"name": "you"}'

  # sample is scaled to zero: this request starts an instance
  curl -H "Authorization: Bearer $key" "$WEIR_URL/v2/nvcf/pexec/functions/$sample?ms=50"
  $weir invoke$flags sample --path '/infer?ms=50'

  $weir status$flags --instances
  $weir function list$flags
  curl -s $WEIR_ADMIN_URL/metrics
  tail .weir/access.log

Ctrl-C stops Weir and its instances.
TRY

while kill -0 "$server" 2>/dev/null; do
    wait "$server" || true
done
if [[ -z $stopping ]]; then
    echo "weir has ended by itself" >&2
    exit 1
fi
