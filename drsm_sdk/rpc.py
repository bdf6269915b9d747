"""Requests to the leading agent: tried again with jitter until their deadline.

Repeats are harmless by the protocol: a request that changes something carries a `request_id` or names
what it means. Answers of a lower term than one already seen come from a fallen leader and are dropped.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from drsm_sdk.ambient import Backoff, Chance, Clock
from drsm_sdk.errors import AgentUnavailable, BadRequest, DrsmError, from_failure
from drsm_sdk.transport import Message, NoAnswer, TooLarge, Transport, TransportError
from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import ERROR_CODE_HEADER, ERROR_HEADER, Failure, Stamp, of_an_agent

log = logging.getLogger("drsm_sdk")

M = TypeVar("M")

TRY_TIMEOUT = 2.0
TERM_BELIEVED = 30.0
"""Seconds after which a term that nobody has repeated is not held against lower ones any more. A leader
repeats its own with every sync, and one that has fallen is silent long before; but a forged one must not
make every later answer useless."""
RETRY_FIRST, RETRY_MOST = 0.05, 0.5
STRANGER = (
    "somebody who is no agent answered; a JetStream stream that records these subjects? Make it anew with "
    "--no-ack (no_ack)"
)


@dataclass(frozen=True, slots=True)
class Answer(Generic[M]):
    """An answer, who gave it, and when the request that it answers was sent (seconds of the pod's clock)."""

    body: M
    stamp: Stamp
    sent: float


class Refused(Exception):
    """An error answer: as the error the application would get, whether to try again, and who gave it."""

    def __init__(self, error: DrsmError, retry: bool, stamp: Stamp | None) -> None:
        super().__init__(str(error))
        self.error, self.retry, self.stamp = error, retry, stamp


class Unusable(Exception):
    """An answer that counts as none: unreadable, or of a fallen leader."""


@dataclass(slots=True)
class Rpc:
    """`term` is the highest that was seen, in answers and events of all pools; `trouble` says why the last
    try of a call was not answered, and is empty after one that was."""

    transport: Transport
    clock: Clock
    chance: Chance
    term: int = 0
    trouble: str = ""
    _said_at: float = float("-inf")
    _strangers: int = 0

    def saw(self, term: int) -> None:
        """A message of a leader with this term came."""
        if term >= self.term:
            self.term, self._said_at = term, self.clock()

    async def once(
        self, subject: str, request: Any, kind: type[M], timeout: float, *, pool: str = ""
    ) -> Answer[M]:
        """One try. Raises Refused, Unusable, TransportError; BadRequest for one that is too large."""
        data = codec.encode(codec.to_map(request))
        if len(data) > codec.REQUEST_BYTES_MAX:
            raise BadRequest(
                f"expected a request of at most {codec.REQUEST_BYTES_MAX} bytes, found {len(data)}",
                "too_large",
            )
        sent = self.clock()
        with self.naming_strangers():
            reply = await self.transport.request(subject, data, timeout, self.is_answer)
        return self.read(reply, kind, pool=pool, sent=sent)

    @contextmanager
    def naming_strangers(self) -> Iterator[None]:
        """That no answer came is explained by others' answers meanwhile: NATS may deliver only the first."""
        strangers = self._strangers
        try:
            yield
        except NoAnswer as error:
            raise NoAnswer(f"{error}; {STRANGER}") if self._strangers > strangers else error from None

    def is_answer(self, reply: Message) -> bool:
        """Whether a reply is an agent's. Who is none may answer before it, and is passed over; said once."""
        if of_an_agent(reply.headers, reply.data):
            return True
        if not self._strangers:
            log.warning("passed over an answer of %.60r on a request: %s", reply.data, STRANGER)
        self._strangers += 1
        return False

    async def call(
        self, subject: str, request: Any, kind: type[M], timeout: float, *, pool: str = ""
    ) -> Answer[M]:
        """Try until there is an answer. Raises the error it tells, as a Refused, unless it says that the
        same request may succeed later; AgentUnavailable with the last reason after `timeout` seconds."""
        deadline = self.clock() + timeout
        backoff = Backoff(self.chance, RETRY_FIRST, RETRY_MOST)
        while (left := deadline - self.clock()) > 0:
            try:
                answer = await self.once(subject, request, kind, min(left, TRY_TIMEOUT), pool=pool)
            except TooLarge as error:
                raise BadRequest(str(error), "too_large") from None
            except (TransportError, Unusable) as error:
                self.trouble = str(error)
            except Refused as refused:
                if not refused.retry:
                    raise
                self.trouble = str(refused.error)
            else:
                self.trouble = ""
                return answer
            await asyncio.sleep(max(min(backoff.delay(), deadline - self.clock()), 0))
        raise AgentUnavailable(self.trouble or f"no time left to ask (deadline of {timeout:g} s)")

    def read(self, reply: Message, kind: type[M], *, pool: str = "", sent: float = 0.0) -> Answer[M]:
        """The answer in a message. Raises Refused for an error, Unusable for what counts as none."""
        if ERROR_CODE_HEADER in reply.headers or ERROR_HEADER in reply.headers:
            raise self._refusal(reply, pool)
        try:
            body = codec.decode(reply.data)
            stamp = codec.from_map(Stamp, body)
            self._check(stamp)
            return Answer(codec.from_map(kind, body), stamp, sent)
        except codec.DecodeError as error:
            log.warning("unreadable answer on %s: %s", reply.subject, error)
            raise Unusable(f"unreadable answer ({error})") from None

    def _refusal(self, reply: Message, pool: str) -> Refused:
        """Error answers must be understood even from other versions: their code alone is enough."""
        code = reply.headers.get(ERROR_CODE_HEADER, "")
        number = int(code) if code.isascii() and code.isdigit() and len(code) == 3 else 500
        failure = Failure("unknown", reply.headers.get(ERROR_HEADER, ""), retry=number in {500, 503})
        stamp: Stamp | None = None
        try:
            body = codec.decode(reply.data)
            failure = codec.from_map(Failure, body)
            stamp = codec.from_map(Stamp, body)
        except codec.DecodeError as error:
            log.warning("incomplete error answer: %s", error)
        if stamp is not None:
            self._check(stamp)
        return Refused(from_failure(failure, number, pool), failure.retry, stamp)

    def _check(self, stamp: Stamp) -> None:
        if stamp.term < self.term and self.clock() - self._said_at < TERM_BELIEVED:
            raise Unusable(f"answer of agent {stamp.agent} of term {stamp.term}, term {self.term} was seen")
        self.term, self._said_at = stamp.term, self.clock()
