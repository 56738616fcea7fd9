#!/bin/sh
# Generates a client from /openapi.json, and walks a function through it:
# create, deploy, invoke (plain HTTP), a refusal, undeploy, delete.
#
#   control/openapi/client.sh target/debug/weir
#
# Needs python3 and PyPI (openapi-python-client, httpx); takes a few seconds
# once these are there. Weir runs on free ports of loopback in a directory
# that is removed afterwards.
set -eu
weir=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
serving=
trap 'test -z "$serving" || { kill "$serving"; wait "$serving" || :; }; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet openapi-python-client==0.29.1 httpx

"$weir" serve --listen 127.0.0.1:0 --admin 127.0.0.1:0 --data-dir "$work/data" --access-log off \
    >"$work/log" 2>&1 &
serving=$!
ports='s#.*invocations on \(http://[0-9.:]*\), the API on \(http://[0-9.:]*\).*#\1 \2#p'
tries=0
until urls=$(sed 's/\x1b\[[0-9;]*m//g' "$work/log" | sed -n "$ports") && test -n "$urls"; do
    tries=$((tries + 1))
    test "$tries" -lt 100 || { cat "$work/log"; exit 1; }
    sleep 0.1
done
set -- $urls
printf 'project_name_override: weir-client\npackage_name_override: weir_client\npost_hooks: []\n' >"$work/config.yaml"
"$work/venv/bin/openapi-python-client" generate --url "$2/openapi.json" --config "$work/config.yaml" \
    --output-path "$work/client" --fail-on-warning
PYTHONPATH="$work/client" "$work/venv/bin/python" "$here/client.py" "$1" "$2" "$(cat "$work/data/admin.key")" "$weir"
