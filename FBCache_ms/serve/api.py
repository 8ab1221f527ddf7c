"""The addresses: OpenAI's for pictures, jobs, and what operates a server."""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..config import CacheConfig
from . import settings as limits
from .errors import ApiError
from .jobs import SUCCEEDED, Job
from .pictures import encoded, psnr
from .requests import OURS, ImageFields, checked, ordered, parse, size_text

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
QUIET_SECONDS = 15
"""A stream in which so long nothing happens says so in a comment, so that nobody takes the connection for dead."""

METHODS = "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"
"""That are counted by their names."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer."""

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""JSON schema of what errors.py sends."""

EVERY_ERROR = {"default": {"description": "an error", "content": {"application/json": {"schema": ERROR}}}}
EVENTS = {200: {"description": "server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
DRAWN = {
    200: {
        "description": "pictures, or with stream server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, **EVENTS[200]["content"]},
    }
}


def fields_schema():
    """JSON schema of the fields, in one piece."""
    schema = ImageFields.model_json_schema()
    schema["properties"][OURS] = schema.pop("$defs")["FBCacheFields"]
    return schema


TAKES_FIELDS = {"requestBody": {"required": True, "content": {"application/json": {"schema": fields_schema()}}}}


class Envelope:
    """What every request and answer goes through: the host's name, headers, the count, and what nobody has caught."""

    def __init__(self, app, settings, metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = None

        async def send_with_headers(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            if self.is_foreign(scope):
                error = ApiError(403, "the Host header must name this machine; with an API key any host may be named")
                await error.response()(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except Exception as error:
            # Not the message, which may tell a prompt.
            place = error.__traceback__
            while place.tb_next is not None:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
            logger.error("%s in %s", type(error).__name__, where)
        # A client may make up methods, and each label takes memory for good.
        method = scope["method"] if scope["method"] in METHODS else "other"
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.answers.labels(method, path, str(status or "none")).inc()

    def is_foreign(self, scope):
        """Whether a page of another site may have found its way to this machine by a name of its own."""
        if self.settings.keys or not self.settings.loopback:
            return False
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return not limits.is_loopback(name.strip("[]"))


def make_app(settings, desk, metrics):
    """The FastAPI application of a Desk."""
    app = FastAPI(title="FBCache_ms", docs_url=None, redoc_url=None, openapi_url=None)
    kept = KeptJobs()

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        messages = {404: "there is nothing at this address", 405: f"{request.method} is not for this address"}
        message = messages.get(error.status_code, str(error.detail))
        methods = [each.methods for each in app.routes if each.path_regex.match(request.url.path)]
        allow = ", ".join(sorted(set().union(*methods))) if error.status_code == 405 else None
        return ApiError(error.status_code, message, allow=allow).response()

    @app.exception_handler(Exception)
    async def any_error(request, error):
        return ApiError(500, "the server has a fault").response()

    def owner(request: Request):
        """Whose request it is. Raises ApiError without a key, where one is needed."""
        if not settings.keys:
            return None
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = limits.owner_of(key.strip(), settings.keys) if kind.lower() == "bearer" else None
        if found is None:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY")
        return found

    async def job_of(request, streams=None):
        """The Job that a request's body asks for, in the queue."""
        fields = checked(parse(await body_of(request)))
        order = ordered(fields, settings, fields.stream if streams is None else streams)
        await moderated(settings, "check_prompt", fields.prompt, "prompt")
        if fields.negative_prompt is not None:
            await moderated(settings, "check_prompt", fields.negative_prompt, "negative_prompt")
        job = Job(order, owner(request))
        # A client may have left while its prompts were checked.
        if await request.is_disconnected():
            raise ApiError(499, "cancelled")
        desk.submit(job)
        return job

    def kept_job(job_id: str, owner=Depends(owner)):
        """A job of /v1/jobs. Raises ApiError for one that is not there, or is another key's."""
        job = kept.get(job_id)
        if job is None or job.owner != owner:
            raise ApiError(404, "there is no such job, or no longer", "job_id", "job_not_found")
        return job

    def route(method, path, needs_key=True, responses=(), **how):
        """Declares an address."""
        needs, responses = [Depends(owner)] if needs_key else [], {**EVERY_ERROR, **dict(responses)}
        return app.api_route(path, methods=[method], dependencies=needs, responses=responses, **how)

    @route("POST", "/v1/images/generations", responses=DRAWN, openapi_extra=TAKES_FIELDS)
    async def generate(request: Request):
        """Draws; the body is OpenAI's, with fields of our own."""
        job = await job_of(request)
        if job.order.fields.stream:
            return event_stream(leaving_cancels(job))
        done, left = asyncio.ensure_future(job.ended.wait()), asyncio.ensure_future(has_left(request))
        try:
            await asyncio.wait([done, left], return_when=asyncio.FIRST_COMPLETED)
        finally:
            done.cancel()
            left.cancel()
            if not job.finished:
                desk.cancel(job)
        if job.error is not None:
            raise job.error
        return JSONResponse(await answer(job, settings))

    async def leaving_cancels(job):
        """The events of a job that ends where nobody listens any more."""
        try:
            async for event in events(job, settings):
                yield event
        finally:
            if not job.finished:
                desk.cancel(job)

    @route("POST", "/v1/images/edits")
    @route("POST", "/v1/images/variations")
    async def not_served():
        """Is not served."""
        raise ApiError(501, "pictures are drawn from prompts alone: POST /v1/images/generations")

    @route("GET", "/v1/models")
    async def models():
        """What is served: sizes, presets, limits."""
        return {"object": "list", "data": [model_card(settings)]}

    @route("GET", "/v1/models/{name}")
    async def model(name: str):
        """The same for one model."""
        if name != settings.name:
            raise ApiError(404, f"there is no such model; {settings.name} is served", "model", "model_not_found")
        return model_card(settings)

    @route("POST", "/v1/jobs", status_code=202, openapi_extra=TAKES_FIELDS)
    async def begin_job(request: Request):
        """Begins a job, whose client may leave and come back."""
        job = await job_of(request, streams=True)
        kept.add(job)
        return job_card(job, desk)

    @route("GET", "/v1/jobs/{job_id}")
    async def show_job(job=Depends(kept_job)):
        """How far a job is, and once it is done its pictures."""
        card = job_card(job, desk)
        if job.state == SUCCEEDED:
            card["result"] = await answer(job, settings)
        return JSONResponse(card)

    @route("DELETE", "/v1/jobs/{job_id}")
    async def cancel_job(job=Depends(kept_job)):
        """Stops a job, within a step where it is being drawn."""
        if not job.finished:
            desk.cancel(job)
        return job_card(job, desk)

    @route("GET", "/v1/jobs/{job_id}/events", responses=EVENTS, response_class=StreamingResponse)
    async def follow_job(job=Depends(kept_job)):
        """What happens to a job, as server-sent events."""
        return event_stream(events(job, settings))

    @route("GET", "/live", needs_key=False)
    async def live():
        """Answers as long as the web process does."""
        return {"status": "live"}

    @route("GET", "/ready", needs_key=False)
    async def ready():
        """Answers 200 where requests are taken."""
        desk.check_ready()
        return {"status": "ready"}

    @route("GET", "/metrics", response_class=PlainTextResponse)
    async def show_metrics():
        """Prometheus's metrics."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @route("GET", "/openapi.json")
    async def openapi():
        """This list, for programs."""
        return app.openapi()

    for path, name in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.add_api_route(path, page_file(name), include_in_schema=False)
    return Envelope(app, settings, metrics)


def page_file(name):
    """What answers with a file of the page."""

    async def show():
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return show


class KeptJobs:
    """The jobs of /v1/jobs: all that run, and of those that are done the last ones."""

    def __init__(self):
        self.jobs = OrderedDict()

    def add(self, job):
        """Takes a Job; lets those go that are done for long, or have too many pictures."""
        self.jobs[job.id] = job
        pictures, now = 0, time.time()
        done = [each for each in self.jobs.values() if each.finished]
        for each in sorted(done, key=lambda job: job.finished_at, reverse=True):
            pictures += len(each.results)
            if pictures > limits.KEPT_PICTURES or now - each.finished_at > limits.KEPT_SECONDS:
                del self.jobs[each.id]

    def get(self, job_id):
        """The Job of this id; None where there is none."""
        return self.jobs.get(job_id)


async def body_of(request):
    """A request's body. Raises ApiError for another kind than JSON, and for one that is too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json")
    body = bytearray()

    async def read():
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > limits.BODY_BYTES:
                raise ApiError(413, f"the body must be {limits.BODY_BYTES} bytes or fewer")

    with suppress(ValueError):
        if int(request.headers.get("content-length", 0)) > limits.BODY_BYTES:
            raise ApiError(413, f"the body must be {limits.BODY_BYTES} bytes or fewer")
    try:
        await asyncio.wait_for(read(), limits.BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body must be there within {limits.BODY_SECONDS} s") from None
    return bytes(body)


async def has_left(request):
    """Returns once the client of a request, whose body was read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def moderated(settings, check, thing, field):
    """Raises ApiError, which names the request's field, for what the moderation hook refuses."""
    if settings.moderation is None:
        return
    reason = await asyncio.to_thread(getattr(settings.moderation, check), thing)
    if reason:
        raise ApiError(400, str(reason), field, "moderation_blocked")


def event_stream(found):
    """Server-sent events, which no proxy is to hold back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(found, media_type="text/event-stream", headers=headers)


def event(name, **data):
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


async def events(job, settings):
    """What happens to a Job, as the text of server-sent events."""
    fields, shown = job.order.fields, {}
    each = 2 if fields.fbcache.compare else 1
    about = picture_facts(job)
    news = job.news()
    coming = asyncio.ensure_future(news.__anext__())
    try:
        while True:
            await asyncio.wait([coming], timeout=QUIET_SECONDS)
            if not coming.done():
                yield f": {job.state}\n\n"
                continue
            kind, what = coming.result()
            if kind == "ended":
                break
            coming = asyncio.ensure_future(news.__anext__())
            if kind == "step":
                index, twin = divmod(what["index"], each)
                facts = {name: what[name] for name in ("step", "steps", "reused", "residual_diffs")}
                preview = what["preview"]
                picture = None if preview is None else await asyncio.to_thread(encoded, preview)
                if fields.fbcache.progress:
                    facts["threshold"] = threshold_of(job.order.drawings[what["index"]])
                    yield event("fbcache.step", index=index, uncached=bool(twin), **facts, b64_json=picture)
                due = (shown.get(index, 0) + 1) * what["steps"] / (fields.partial_images + 1)
                if picture and not twin and shown.get(index, 0) < fields.partial_images and what["step"] >= due:
                    number = shown[index] = shown.get(index, 0) + 1
                    partial = {"b64_json": picture, "partial_image_index": number - 1}
                    yield event("image_generation.partial_image", **partial, **about, output_format="png")
            elif (what + 1) % each == 0:
                found = await picture_of(job, what // each, settings)
                yield event("image_generation.completed", **found, **about, output_format=fields.output_format)
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
        return
    finally:
        coming.cancel()
    if job.error is not None:
        yield f"event: error\ndata: {json.dumps(job.error.body())}\n\n"


def picture_facts(job):
    """What is the same for all pictures of a Job."""
    first = job.order.drawings[0]
    return {
        "created_at": int(job.created),
        "size": size_text((first.width, first.height)),
        "quality": "auto",
        "background": "opaque",
    }


async def picture_of(job, index, settings):
    """A finished picture of a Job, as clients get it. Raises ApiError where the moderation hook refuses it."""
    fields = job.order.fields
    each = 2 if fields.fbcache.compare else 1
    (pixels, facts), drawing = job.results[index * each], job.order.drawings[index * each]
    await moderated(settings, "check_picture", pixels, None)
    found = {"b64_json": await asyncio.to_thread(encoded, pixels, fields.output_format), "seed": drawing.seed}
    own = {"cache": drawing.tag}
    if fields.fbcache.stats:
        names = ("computed_steps", "cached_steps", "residual_diffs", "skipped", "seconds")
        own["stats"] = {**{name: facts[name] for name in names}, "threshold": threshold_of(drawing)}
    if fields.fbcache.compare:
        reference, uncached = job.results[index * each + 1]
        own["compare"] = {
            "b64_json": await asyncio.to_thread(encoded, reference, fields.output_format),
            "psnr": psnr(reference, pixels),
            "seconds": uncached["seconds"],
        }
    return {**found, OURS: own}


def threshold_of(drawing):
    """What the differences of a Drawing are held against; None where nothing is compared."""
    config = CacheConfig.from_tag(drawing.tag)
    return getattr(config, config.rules[0].threshold) if config.rules else None


async def answer(job, settings):
    """The pictures of a Job that is done, as OpenAI's answer."""
    facts = picture_facts(job)
    data = [await picture_of(job, index, settings) for index in range(job.order.fields.n)]
    created = facts.pop("created_at")
    return {"created": created, "data": data, **facts, "output_format": job.order.fields.output_format}


def job_card(job, desk):
    """How far a Job is."""
    card = {
        "id": job.id,
        "object": "job",
        "created": int(job.created),
        "status": job.state,
        "waiting_before": desk.queue.index(job) if job in desk.queue else 0,
        "pictures": len(job.results) // (2 if job.order.fields.fbcache.compare else 1),
    }
    if job.step is not None:
        card.update({name: job.step[name] for name in ("step", "steps")})
    if job.error is not None:
        card.update(job.error.body())
    return card


def model_card(settings):
    """What is served, as OpenAI's model."""
    own = {
        "sizes": [size_text(size) for size in settings.sizes],
        "presets": settings.served_presets,
        "num_inference_steps": settings.steps,
        "guidance": dict(settings.guidance),
        "negative_prompts": settings.negative_prompts,
        "limits": {
            "num_inference_steps": settings.max_steps,
            "n": limits.MOST_PICTURES,
            "prompt_characters": limits.PROMPT_CHARACTERS,
            "body_bytes": limits.BODY_BYTES,
            "waiting": settings.queue,
            "seconds": settings.timeout,
        },
    }
    return {"id": settings.name, "object": "model", "created": 0, "owned_by": "FBCache_ms", OURS: own}
