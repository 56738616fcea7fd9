"""What client.sh runs: client.py DATA_URL ADMIN_URL KEY WEIR, with the generated weir_client importable."""

import sys
import time

import httpx
from weir_client import AuthenticatedClient
from weir_client.api.deployments import deployments_create, deployments_delete
from weir_client.api.functions import functions_create, functions_delete, functions_read
from weir_client.models import (
    CreateFunctionRequest,
    DeploymentRequest,
    FunctionState,
    HealthProtocol,
    HealthRequest,
    Problem,
    ProcessSpec,
    SpecificationRequest,
)

data, admin, key, weir = sys.argv[1:]
client = AuthenticatedClient(base_url=admin, token=key)

request = CreateFunctionRequest(
    name="generated",
    inference_url="/infer",
    process=ProcessSpec(command=[weir, "sample-function"]),
    health=HealthRequest(protocol=HealthProtocol.HTTP, uri="/health", timeout="PT10S", expected_status_code=200),
)
function = functions_create.sync(client=client, body=request).function
ids = (function.id, function.version_id)
assert function.status == FunctionState.INACTIVE

specification = SpecificationRequest(gpu="none", min_instances=1, max_instances=2, max_request_concurrency=4)
request = DeploymentRequest(deployment_specifications=[specification], start_timeout="PT30S")
deployment = deployments_create.sync(*ids, client=client, body=request).deployment
assert deployment.queue.max_requests == 1000, "the default"

for _ in range(200):
    status = functions_read.sync(*ids, client=client).function.status
    if status == FunctionState.ACTIVE:
        break
    time.sleep(0.1)
assert status == FunctionState.ACTIVE, status

answer = httpx.post(
    f"{data}/v2/nvcf/pexec/functions/{function.id}",
    headers={"Authorization": f"Bearer {key}"},
    content=b"{}",
)
assert (answer.status_code, answer.headers["nvcf-status"]) == (200, "fulfilled")

problem = deployments_create.sync(*ids, client=client, body=request)
assert isinstance(problem, Problem) and problem.status == 409, problem

assert deployments_delete.sync(*ids, client=client).function.status == FunctionState.INACTIVE
assert functions_delete.sync_detailed(*ids, client=client).status_code == 204
assert functions_read.sync_detailed(*ids, client=client).status_code == 404
print("created, deployed, invoked, undeployed and deleted")
