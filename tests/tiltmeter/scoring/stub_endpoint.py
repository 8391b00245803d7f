"""An OpenAI-compatible chat endpoint on loopback: a real HTTP server whose words, log-probs and faults a test chooses.

    with StubEndpoint(lambda messages, params: {"4": 0.6, "5": 0.3}) as stub:
        EndpointJudge("stub", base_url=stub.base_url, allow_local=True).ask(...)
        assert stub.requests[0].body["max_tokens"] == 1

``faults`` are used up one a request, then requests are answered; ``always`` is a fault that never ends.
"""

import json
import math
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

Answer = Callable[[list[dict[str, str]], dict[str, Any]], str | dict[str, float]]
"""From messages and the whole request body to words, or to the probabilities of the first token (the likeliest is said)."""


class Request(NamedTuple):
    """What arrived."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: dict[str, Any]


class Response(NamedTuple):
    """What goes back. ``delay`` seconds pass before it; ``declared`` bytes are promised in Content-Length (None: true length)."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    delay: float = 0.0
    declared: int | None = None


Fault = Callable[[Request, Response], Response | None]
"""From a request and its right response to another response; None: the connection is dropped without a word."""


def slow(seconds: float) -> Fault:
    """The right response, late."""
    return lambda request, response: response._replace(delay=seconds)


def status(code: int, message: str = "no", /, *, retry_after: str | None = None, **error: str) -> Fault:
    """An error as OpenAI words it. ``error`` may set code, param and type."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return lambda request, response: Response(code, _json({"error": {"message": message, **error}}), headers)


def echoing_key(code: int = 401) -> Fault:
    """An error that repeats the Authorization header, as careless proxies do."""
    return lambda request, response: status(code, f"bad header {request.headers.get('authorization')}")(
        request, response
    )


def html() -> Fault:
    """A page with status 200, as from a gateway or a wrong address."""
    return lambda request, response: Response(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})


def truncated(*, broken_connection: bool = False) -> Fault:
    """Half of the right JSON; with ``broken_connection`` the whole was promised."""
    return lambda request, response: response._replace(
        body=response.body[: len(response.body) // 2], declared=len(response.body) if broken_connection else None
    )


def empty_choices() -> Fault:
    """Status 200 and no answer in it."""
    return lambda request, response: response._replace(body=_json(json.loads(response.body) | {"choices": []}))


def redirect(url: str) -> Fault:
    """307 to somewhere else."""
    return lambda request, response: Response(307, b"", {"Location": url})


def dropped() -> Fault:
    """The connection closes before a response."""
    return lambda request, response: None


class StubEndpoint:
    """A chat endpoint on a free loopback port, from ``with`` to its end.

    Args:
        answer: what is said.
        faults: one a request, in the order of arrival; None: no fault.
        always: for every request after ``faults``.
        key: requests without it get 401; None: no key is needed.
        models: others get 404.
        log_probs: whether they come when asked for; ``"refused"``: HTTP 400 says so.
        supports_n: whether ``n`` answers come; False: one, whatever was asked; ``"refused"``: HTTP 422 says so.
        max_tokens_name: the only name under which the token limit is taken.
        usage: (prompt, completion) tokens of every response; None: responses have no usage.
    """

    def __init__(
        self,
        answer: Answer = lambda messages, params: "4",
        *,
        faults: Iterable[Fault | None] = (),
        always: Fault | None = None,
        key: str | None = None,
        models: Iterable[str] = ("stub",),
        log_probs: bool | str = True,
        supports_n: bool | str = True,
        max_tokens_name: str | None = None,
        usage: tuple[int, int] | None = (10, 1),
    ) -> None:
        self.answer = answer
        self.faults = list(faults)
        self.always = always
        self.key = key
        self.models = tuple(models)
        self.log_probs = log_probs
        self.supports_n = supports_n
        self.max_tokens_name = max_tokens_name
        self.usage = usage
        self.requests: list[Request] = []
        """In the order of arrival."""
        self.most_at_once = 0
        """The largest number of requests that were open at one time."""
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def stop_waiting(self) -> None:
        """Let delayed responses go, and faults be over."""
        self.always = None
        self._closing.set()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def respond(self, request: Request) -> Response | None:
        with self._lock:
            self.requests.append(request)
            fault = self.faults.pop(0) if self.faults else self.always
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            response = self._refusal(request) or Response(200, _json(self._completion(request.body)))
            replaced = response if fault is None else fault(request, response)
            if replaced is not None and replaced.delay:
                self._closing.wait(replaced.delay)
            return replaced
        finally:
            with self._lock:
                self._at_once -= 1

    def _refusal(self, request: Request) -> Response | None:
        body = request.body
        refusal = None
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            refusal = echoing_key()
        elif body["model"] not in self.models:
            refusal = status(404, f"The model `{body['model']}` does not exist", code="model_not_found")
        elif body.get("logprobs") and self.log_probs == "refused":
            refusal = status(400, "logprobs are not supported with this model", param="logprobs")
        elif "n" in body and self.supports_n == "refused":
            refusal = status(422, "Unsupported fields in the request: {'n'}")
        elif self.max_tokens_name not in (None, *body):
            refusal = status(400, f"Unsupported parameter. Use '{self.max_tokens_name}' instead.", param="max_tokens")
        return refusal(request, Response(200, b"")) if refusal else None

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        n = body.get("n", 1) if self.supports_n is True else 1
        choices = [self._choice(body) | {"index": i} for i in range(n)]
        content: dict[str, Any] = {"id": "stub", "object": "chat.completion", "model": body["model"]}
        if self.usage is not None:
            prompt, completion = self.usage
            content["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        return content | {"choices": choices}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        said = self.answer(body["messages"], body)
        tokens = {said: 1.0} if isinstance(said, str) else said
        text = max(tokens, key=lambda token: tokens[token])
        choice: dict[str, Any] = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.log_probs:
            top = [{"token": t, "logprob": math.log(p) if p else -9999.0, "bytes": None} for t, p in tokens.items()]
            top = sorted(top, key=lambda one: -one["logprob"])[: body.get("top_logprobs", 0)]
            first = {"token": text, "logprob": math.log(tokens[text]), "bytes": None, "top_logprobs": top}
            choice["logprobs"] = {"content": [first]}
        return choice


def refused_url() -> str:
    """Address of a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the tests."""


def _handler(stub: StubEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            response = stub.respond(Request(self.path, headers, json.loads(content)))
            if response is None:
                self.close_connection = True
                return
            sent = {"Content-Type": "application/json", **response.headers}
            length = len(response.body) if response.declared is None else response.declared
            self.close_connection = response.declared is not None
            self.send_response(response.status)
            for name, value in {**sent, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


def _json(content: object) -> bytes:
    return json.dumps(content).encode()
