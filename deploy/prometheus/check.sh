#!/usr/bin/env bash
# Checks what is in here and in ../grafana against a Weir under load and Debian's Prometheus.
#   deploy/prometheus/check.sh [PATH-OF-WEIR]
# CHECK_LONG=1 loads Weir for a whole minute, and then makes each alert fire by its cause; it takes two minutes or so.
set -euo pipefail
weir=$(realpath "${1:-$(dirname "$0")/../../target/debug/weir}")
cd "$(dirname "$0")"

if ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null; then
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        echo "skipped: the check of the dashboard and the alerts needs prometheus and promtool (Debian: apt-get install prometheus)"
        exit 0
    fi
    { apt-get install -y --no-install-recommends prometheus ||
        { apt-get update && apt-get install -y --no-install-recommends prometheus; }; } >/dev/null ||
        { echo "skipped: the check of the dashboard and the alerts needs prometheus, which could not be installed"; exit 0; }
    # The package starts a server where there is systemd; this check starts its own.
    systemctl disable --now prometheus >/dev/null 2>&1 || true
fi

promtool check config prometheus.yml
promtool check rules rules.yml
promtool test rules rules_test.yml
promtool check config --syntax-only ../docker/prometheus.yml
exec python3 -u check.py "$weir"
