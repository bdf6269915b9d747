"""Request subjects -> handlers -> answers: the bytes, the errors and the bounds around `requests`.

nats-py awaits the callbacks of a subscription one by one, so a request becomes a task at once, and a
requester that waits never holds up others. Whatever goes wrong in a handler, the requester gets a
typed error (or silence where nobody waits, or when this agent does not lead any more: rule R2).
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import structlog

from drsm_agent.errors import BusUnavailable, LeadLost, Refused, StoreRefused, StoreUnavailable, TooLarge
from drsm_agent.lead import Lead
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Bus, Incoming
from drsm_agent.requests import Requests
from drsm_agent.snapshots import Snapshots
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Route, Subjects

IN_FLIGHT_MAX = 4096
"""Requests that are being answered at once: some thousand pods that start together. More are told to
come back, before anything is done for them."""
UNDER_WAY_MAX = 256 * 1024
"""Bytes of one snapshot that the server may not have yet; others' answers wait behind no more."""
HANDLER_TIMEOUT = 8.0
"""Longer than anything a handler waits for by itself; a guard, not a rule."""

log = structlog.get_logger("drsm_agent.endpoints")


class Endpoints:
    """Answers the requests of one lead, once `open` is called; before, only probes."""

    def __init__(
        self,
        *,
        tasks: asyncio.TaskGroup,
        bus: Bus,
        subjects: Subjects,
        lead: Lead,
        history: str,
        definitions: Mapping[str, Definition],
        metrics: Metrics,
    ) -> None:
        self._tasks, self._bus, self._subjects, self._lead = tasks, bus, subjects, lead
        self._stamp = codec.to_map(m.Stamp(lead.agent, lead.term, history))
        self._snapshots = Snapshots(definitions, self._stamp)
        self._metrics = metrics
        self._requests: Requests | None = None
        self._in_flight = 0
        self._overloaded = False
        """From the first request that was turned away until half as many are under way."""

    def open(self, requests: Requests) -> None:
        """From now on requests are answered."""
        self._requests = requests

    async def receive(self, incoming: Incoming) -> None:
        """The subscription's callback: never waits."""
        route = self._subjects.route(incoming.subject)
        if route is None or (self._requests is None and route.verb != "probe"):
            return
        if self._subjects.ours(incoming.reply):
            return  # a client must not have us speak among the events, nor ask ourselves
        if self._in_flight >= IN_FLIGHT_MAX:
            await self._turn_away(incoming, route)
            return
        if self._in_flight < IN_FLIGHT_MAX // 2:
            self._overloaded = False
        serving = self._serve(incoming, route)
        try:
            self._tasks.create_task(serving)
        except RuntimeError:  # the lead's scope is ending: this agent answers nothing any more
            serving.close()
        else:
            self._in_flight += 1

    async def _turn_away(self, incoming: Incoming, route: Route) -> None:
        if not self._overloaded:
            self._overloaded = True
            log.warning(
                "overloaded",
                in_flight=self._in_flight,
                action="requests are told to come back: look at MongoDB's latency and who asks so much",
            )
        self._metrics.requests.labels(verb=route.verb, outcome="overloaded").inc()
        error = Refused("store_unavailable", "too many requests at once", reason="overloaded", retry=True)
        await self._refuse(incoming, route, error)

    async def _serve(self, incoming: Incoming, route: Route) -> None:
        started = time.perf_counter()
        outcome = "ok"
        try:
            async with asyncio.timeout(HANDLER_TIMEOUT):
                await self._answer(incoming, route)
        except Refused as error:
            outcome = error.failure.error
            await self._refuse(incoming, route, error)
        except (StoreUnavailable, TimeoutError) as error:
            outcome = "store_unavailable"
            log.warning("store_unavailable", verb=route.verb, error=str(error))
            message = "the store did not answer in time; the request may be repeated"
            if isinstance(error, StoreRefused):
                message = f"MongoDB refuses what this takes: {error}"
            await self._refuse(incoming, route, Refused("store_unavailable", message, retry=True))
        except TooLarge as error:
            outcome = "too_large"
            await self._refuse(incoming, route, Refused("too_large", f"the answer has {error}"))
        except (LeadLost, BusUnavailable) as error:
            outcome = "silent"
            log.debug("not_answered", verb=route.verb, error=str(error))
        except Exception:
            outcome = "internal"
            log.exception("internal_error", verb=route.verb)
            await self._refuse(incoming, route, Refused("internal", "the agent's log says more", retry=True))
        finally:
            self._in_flight -= 1
            self._metrics.requests.labels(verb=route.verb, outcome=outcome).inc()
            self._metrics.request_seconds.labels(verb=route.verb).observe(time.perf_counter() - started)

    async def _answer(self, incoming: Incoming, route: Route) -> None:
        if len(incoming.data) > codec.REQUEST_BYTES_MAX:
            raise Refused("too_large", f"a request has at most {codec.REQUEST_BYTES_MAX} bytes")
        try:
            body = codec.decode(incoming.data)
            as_json = codec.is_json(incoming.data)
            if route.verb == "probe":
                probe = codec.from_map(m.Probe, body)
                await self._reply(incoming, codec.to_map(probe), as_json=as_json)
            elif route.verb == "snapshot":
                await self._send_snapshot(incoming, route, as_json=as_json)
            else:
                answer = await self._dispatch(route, body, as_json=as_json)
                await self._reply(incoming, codec.to_map(answer), as_json=as_json)
        except codec.DecodeError as error:
            raise Refused("bad_request", str(error)) from None

    async def _dispatch(self, route: Route, body: dict[str, Any], *, as_json: bool) -> Any:
        requests = self._serving()
        if route.pool is None:
            kind, handler = requests.handlers[route.verb]
            return await handler(codec.from_map(kind, body, text_integers=as_json))
        pool = requests.pool(route.pool)
        kind, pool_handler = requests.pool_handlers[route.verb]
        return await pool_handler(pool, codec.from_map(kind, body, text_integers=as_json))

    def _serving(self) -> Requests:
        if self._requests is None:
            raise LeadLost("not serving yet")
        return self._requests

    async def _send_snapshot(self, incoming: Incoming, route: Route, *, as_json: bool) -> None:
        """All pages at one version, then what says so; paced by what the server has taken."""
        pool = self._serving().pool(route.pool or "")
        if not incoming.reply:
            return
        headers = {m.CONTENT_TYPE_HEADER: m.JSON_CONTENT_TYPE if as_json else m.CONTENT_TYPE}

        under_way = 0

        async def send(page: bytes) -> None:
            nonlocal under_way
            self._lead.check()
            await self._bus.publish(incoming.reply, page, headers)
            under_way += len(page)
            if under_way >= UNDER_WAY_MAX:
                await self._bus.carried()
                under_way = 0

        end = await self._snapshots.send(pool, self._bus.max_payload, send, as_json=as_json)
        await self._reply(incoming, codec.to_map(end), as_json=as_json)

    async def _reply(self, incoming: Incoming, body: dict[str, Any], *, as_json: bool) -> None:
        if not incoming.reply:
            return
        self._lead.check()
        headers = {m.CONTENT_TYPE_HEADER: m.JSON_CONTENT_TYPE if as_json else m.CONTENT_TYPE}
        await self._bus.publish(incoming.reply, codec.encode(body | self._stamp, as_json=as_json), headers)

    async def _refuse(self, incoming: Incoming, route: Route, error: Refused) -> None:
        if not incoming.reply:
            return
        failure = error.failure
        as_json = codec.is_json(incoming.data)
        headers = {
            m.CONTENT_TYPE_HEADER: m.JSON_CONTENT_TYPE if as_json else m.CONTENT_TYPE,
            m.ERROR_CODE_HEADER: str(failure.code),
            m.ERROR_HEADER: failure.message.encode("ascii", "replace").decode()[:200],
        }
        try:
            self._lead.check()
            body = codec.to_map(failure) | self._stamp
            await self._bus.publish(incoming.reply, codec.encode(body, as_json=as_json), headers)
        except (LeadLost, BusUnavailable, TooLarge) as unanswered:
            log.debug("not_refused", verb=route.verb, error=str(unanswered))
