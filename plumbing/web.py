"""
What a server on somebody's own computer needs around its answers: whom it answers, how much it reads and how long, errors
in the shape that OpenAI's clients know, a page that can load nothing, and an end that lets the answers be finished.

in    an app of new_app(), with its routes
out   Guard (the app, behind its checks), Wrong, json_object, page_headers, listen, serve

Any page that a browser shows can send requests to this computer. They are told from our own page's by the Host header, which
names the other site where that has made its name point here, and by the content type: without being allowed to, a page of
another site can't send JSON.
"""
import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import socket
import time
import traceback

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from plumbing import stop

MOST_BYTES = 10**6           # of a body: the text of a context of 2,048 tokens is 10 KB, a chat with all its turns some more
BODY_SECONDS = 10            # a body must be here by then
IDLE_SECONDS = 30            # a connection without a request is closed after so long, or twice that
LAST_SECONDS = 30            # after a signal, what is being answered may take so long
SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"), (b"cache-control", b"no-store")]


class Wrong(Exception):
    """A request that is answered with an error: one line for a person; param and code for a program."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def content(self):
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self):
        return JSONResponse(self.content(), self.status, self.headers)


def new_app():
    """A FastAPI without pages of its own, whose errors have the one shape."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(Wrong, lambda request, wrong: wrong.response())
    app.add_exception_handler(HTTPException, lambda request, error: Wrong(
        error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}", headers=error.headers).response())
    app.add_exception_handler(Exception, lambda request, error: mistake().response())
    return app


def mistake():
    return Wrong(500, "a mistake in the server, which has printed where; the request can be tried again")


class Guard:
    """
    An app behind its checks: it is called with the whole body, and cancelled when the client goes.

    host     what the server is bound to
    api_key  asked for everywhere but at / and /health; "" = not asked for, but requests must be for a loopback name or host
    cors     an origin, like https://example.org, whose pages may use the API; "" = none but our own
    """

    def __init__(self, app, host, api_key="", cors=""):
        self.app, self.host, self.api_key, self.cors = app, host, api_key.encode(), cors

    async def __call__(self, scope, receive, send):
        headers, started = dict(scope["headers"]), False

        async def send_safe(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*SAFE, *self.cors_headers(headers), *message["headers"]]
            await send(message)

        try:
            body = await read_body(headers, receive)           # also of those who are turned away: they have to listen
            self.admit(scope["method"], scope["path"], headers)
            if scope["method"] == "OPTIONS" and self.cors:     # a page of another site asks whether it may
                await Response(status_code=204)(scope, receive, send_safe)
            else:
                await self.call(scope, body, receive, send_safe)
        except Wrong as wrong:
            await wrong.response()(scope, receive, send_safe)
        except Exception:
            traceback.print_exc()
            if not started:
                await mistake().response()(scope, receive, send_safe)

    def admit(self, method, path, headers):
        """Nothing, where a request may come in; raises Wrong where it may not."""
        if not self.api_key and not self.is_ours(headers.get(b"host", b"").decode("latin-1")):
            raise Wrong(403, "the Host header names another computer than this server's; open it by the address that it "
                             "printed when it started")
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        is_known = scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)
        if self.api_key and not is_known and path not in ("/", "/health") and method != "OPTIONS":
            raise Wrong(401, "this server wants its api_key: send the header Authorization: Bearer KEY",
                        code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and content_type != b"application/json":
            raise Wrong(415, "send JSON, with the header Content-Type: application/json")

    def is_ours(self, host):
        """Whether a Host header names this computer."""
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        return is_loopback(name) or name == self.host.lower()

    def cors_headers(self, headers):
        if not self.cors or headers.get(b"origin") != self.cors.encode():
            return []
        return [(b"access-control-allow-origin", self.cors.encode()), (b"vary", b"origin"),
                (b"access-control-allow-headers", b"authorization, content-type")]

    async def call(self, scope, body, receive, send):
        """Run the app on a body that is here, until it has answered or the client is gone."""
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return bodies.pop() if bodies else await asyncio.Future()     # that the client goes is noticed here, not there

        work, gone = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


def is_loopback(host):
    """Whether a name or an address is this computer's own, which nobody else can reach."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


async def read_body(headers, receive):
    """
    The body, of at most MOST_BYTES that come within BODY_SECONDS.

    One that is longer is read to its end and thrown away, or its sender would not listen to the answer.
    """
    body, size = bytearray(), 0
    too_long = Wrong(413, f"the body is longer than {MOST_BYTES:,} bytes; send less", headers={"connection": "close"})
    if int(headers.get(b"content-length", 0)) > MOST_BYTES and headers.get(b"expect", b"").lower() == b"100-continue":
        raise too_long                                     # it asks before it sends

    async def read():
        nonlocal body, size
        more = True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            if size <= MOST_BYTES:
                body += message.get("body", b"")
            more = message.get("more_body")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        if size <= MOST_BYTES:
            raise Wrong(408, f"the body has not ended within {BODY_SECONDS} s", headers={"connection": "close"}) from None
    if size > MOST_BYTES:
        raise too_long
    return bytes(body)


def json_object(body):
    """The dict that a body holds; raises Wrong for all else, also for what JSON can't say: NaN, half a character."""
    def no_number(name):
        raise ValueError(f"{name} is no number in JSON")

    try:
        content = json.loads(body.decode(), parse_constant=no_number)
        json.dumps(content, ensure_ascii=False).encode()       # half of a pair of surrogates is no character
    except UnicodeError:
        raise Wrong(400, "the body is no text in UTF-8, or a \\u escape in it is half a character") from None
    except RecursionError:
        raise Wrong(400, "the body is JSON inside of JSON, too deep to be read") from None
    except ValueError as error:
        raise Wrong(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise Wrong(400, 'the body must be a JSON object, like {"messages": [{"role": "user", "content": "Hello"}]}')
    return content


def page_headers(html):
    """Of a page with its style and script inside: nothing else runs in it, and it loads nothing from anywhere else."""
    def hashes(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    return {"content-security-policy": f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def listen(host, port):
    """A socket that is bound; SystemExit, one line, where it can't be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise SystemExit(f"host={host}, port={port}: can't be listened at ({error.strerror}); try another --port=") from None


class Server(uvicorn.Server):
    capture_signals = contextlib.nullcontext               # they are plumbing.stop's


async def serve(app, listener, writer):
    """Answer until a signal has come; then the writer (serving.py) finishes what is open, for at most LAST_SECONDS."""
    told = set()

    def once(loop, context):                               # when there are too many connections it would be thousands of lines
        if context["message"] not in told:
            told.add(context["message"])
            loop.default_exception_handler(context)

    writer.loop = asyncio.get_running_loop()
    writer.loop.set_exception_handler(once)
    writer.start()
    server = Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", access_log=False, log_level="critical",
                                   server_header=False, timeout_graceful_shutdown=2))
    running = asyncio.ensure_future(server.serve([listener]))
    idle, swept = {}, time.monotonic()
    while not stop.asked and not running.done():
        await asyncio.sleep(0.1)
        if time.monotonic() - swept > IDLE_SECONDS:        # who sends a header byte by byte goes as well
            before, swept = idle, time.monotonic()
            idle = {connection: connection.cycle for connection in server.server_state.connections
                    if not connection.cycle or connection.cycle.response_complete}
            for connection, cycle in idle.items():
                if before.get(connection, connection) is cycle:
                    connection.transport.close()
    begin = time.monotonic()
    while writer.open and time.monotonic() - begin < LAST_SECONDS:
        await asyncio.sleep(0.05)
    server.should_exit = True
    await running
    await writer.end()
