"""Around every request: id, access, security headers, log line, metrics, and errors as problem details."""

import json
import re
import sys
import time
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixelplay.serving.access import AccessPolicy
from pixelplay.serving.metrics import ServiceMetrics
from pixelplay.serving.problems import MEDIA_TYPE, Problem, problem_json

REQUEST_ID = "x-request-id"
CLIENT_CLOSED = 499  # status in the log when the client has gone before the answer
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestGuard:
    """ASGI middleware: nothing inside it can answer with a stack, or without a log line.

    Args:
        log_requests: write a line for each request; without it, only for errors of the server.
    """

    def __init__(
        self, app: ASGIApp, *, policy: AccessPolicy, metrics: ServiceMetrics, log_requests: bool
    ) -> None:
        self._app, self._policy, self._metrics, self._log_requests = app, policy, metrics, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, started, status = Headers(scope=scope).get(REQUEST_ID, ""), time.monotonic(), CLIENT_CLOSED
        request_id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "n_images": 0}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        failure = None
        try:
            refusal, failure = await self._run(scope, receive, send_with_headers)
            if refusal is not None and status == CLIENT_CLOSED:  # no response has been started
                await problem_response(refusal, request_id)(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - started
            self._metrics.count_request(scope["path"], status, seconds)
            if self._log_requests or failure is not None:
                _log_request(scope, status, seconds, failure)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> tuple[Problem | None, str | None]:
        """Run the application; return a problem that is still to be sent, and the traceback of a failure."""
        try:
            self._policy.check(scope["path"], Headers(scope=scope))
            await self._app(scope, receive, send)
        except Problem as problem:
            return problem, None
        except ClientDisconnect:
            pass
        except Exception as error:
            reason = "the server failed; its log has the error under this request_id"
            return Problem(500, reason), "".join(traceback.format_exception(error))
        return None, None


def problem_response(problem: Problem, request_id: str) -> JSONResponse:
    """Return an error as an application/problem+json response."""
    content = problem_json(problem.status, problem.detail, request_id)
    return JSONResponse(content, problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def write_log(event: str, **fields: Any) -> None:
    """Write one JSON object to stderr, without the fields that have no value."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    shown = {name: value for name, value in line.items() if value is not None}
    print(json.dumps(shown), file=sys.stderr, flush=True)


def _log_request(scope: Scope, status: int, seconds: float, failure: str | None) -> None:
    client = scope.get("client")
    write_log(
        "request",
        id=scope["state"]["request_id"],
        client=client[0] if client else None,
        method=scope["method"],
        path=scope["path"],
        status=status,
        seconds=round(seconds, 4),
        images=scope["state"]["n_images"] or None,
        error=failure,
    )
