#!/usr/bin/env python3
"""What the access log and traces cost: CPU time of weir per request, beside metrics alone.

Starts one weir per setting, loads them in turns with `weir bench load`, and divides the time that each process used
(user and system, of /proc) by the answers. Needs a release build and nothing else:

    bench/costs.py target/release/weir [--callers 16] [--seconds 8] [--rounds 5]
"""

import argparse
import http.server
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

TICKS = os.sysconf("SC_CLK_TCK")


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces and counts their bytes."""

    protocol_version = "HTTP/1.1"
    taken = 0

    def do_POST(self):
        Collector.taken += len(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Weir:
    def __init__(self, binary, name, directory, ports, flags):
        self.name, self.binary = name, binary
        home = pathlib.Path(directory, name)
        home.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WEIR_", "OTEL_"))}
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--cores", "1"]
            + ["--instance-ports", f"{ports}-{ports + 9}", "--data-dir", home / "data"]
            + [flag.format(home=home) for flag in flags],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        pattern = re.compile(r"on (http://[^,\s]+), the API on (http://[^,\s]+)")
        for line in self.process.stderr:
            if found := pattern.search(re.sub(r"\x1b\[[0-9;]*m", "", line)):
                self.data, self.admin = found.groups()
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.key = (home / "data" / "admin.key").read_text().strip()
        self.figures = home / "figures.json"
        self.answered = 0
        self.function = self.deploy()

    def api(self, path, body=None):
        request = urllib.request.Request(
            self.admin + path,
            json.dumps(body).encode() if body else None,
            {"authorization": f"Bearer {self.key}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def deploy(self):
        """One instance of the sample function."""
        made = self.api(
            "/v2/nvcf/functions",
            {
                "name": "costs",
                "inferenceUrl": "/infer",
                "process": {"command": [os.path.abspath(self.binary), "sample-function"]},
                "health": {"protocol": "HTTP", "uri": "/health", "timeout": "PT5S", "expectedStatusCode": 200},
            },
        )["function"]
        path = f"functions/{made['id']}/versions/{made['versionId']}"
        specification = {"gpu": "none", "instanceType": "none", "minInstances": 1, "maxInstances": 1}
        specification["maxRequestConcurrency"] = 64
        self.api(f"/v2/nvcf/deployments/{path}", {"deploymentSpecifications": [specification]})
        while self.api(f"/v2/nvcf/{path}")["function"]["status"] != "ACTIVE":
            time.sleep(0.05)
        return made["id"]

    def cpu(self):
        """Seconds, without its instances."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def load(self, callers, seconds):
        """Microseconds for each answer."""
        before = self.cpu()
        subprocess.run(
            [self.binary, "bench", "load", self.function, "--callers", str(callers), "--duration", f"PT{seconds}S"]
            + ["--json", self.figures, "--url", self.data, "--admin-url", self.admin, "--key", self.key],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # What waits to be written or sent is part of the cost.
        time.sleep(1.5)
        used = self.cpu() - before
        answered = json.loads(self.figures.read_text())["answered"]["200"]
        self.answered += answered
        return used / answered * 1e6

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weir")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    log = ["--access-log", "{home}/access.log"]
    traces = ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}"]
    settings = {
        "metrics": ["--access-log", "off"],
        "log-json": log,
        "log-text": log + ["--access-log-format", "text"],
        "log-traces-0.01": log + traces,
        "log-traces-1": log + traces + ["--trace-sample", "1"],
    }
    with tempfile.TemporaryDirectory() as directory:
        weirs = [
            Weir(args.weir, name, directory, 26_000 + 10 * i, flags)
            for i, (name, flags) in enumerate(settings.items())
        ]
        try:
            for weir in weirs:
                weir.load(args.callers, 2)
            rounds = []
            for number in range(args.rounds):
                # Each begins a round in its turn.
                turn = number % len(weirs)
                rounds.append({weir.name: weir.load(args.callers, args.seconds) for weir in weirs[turn:] + weirs[:turn]})
                print({name: round(cost, 1) for name, cost in rounds[-1].items()}, flush=True)
        finally:
            for weir in weirs:
                weir.stop()
    print(f"{args.callers} callers, {args.rounds} rounds of {args.seconds} s; bytes of traces: {Collector.taken}")
    for weir in weirs:
        name = weir.name
        ratios = [costs[name] / costs["metrics"] for costs in rounds]
        cost = statistics.median(costs[name] for costs in rounds)
        print(
            f"{name:16} {cost:6.1f} us/request, to metrics alone {statistics.median(ratios):.2f}"
            f" [{min(ratios):.2f}-{max(ratios):.2f}], {weir.answered} requests"
        )


if __name__ == "__main__":
    main()
