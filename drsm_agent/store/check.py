"""Start-up checks: a MongoDB that the agent cannot work with is refused with what to do about it; one that
is not there yet is no mistake.

No message shows credentials: neither the URL nor the driver's words about one that has any.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import PyMongoError

from drsm_agent.core.documents import Document
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.store.faults import DENIED, REMEDIES, code_of, reason

OLDEST_WIRE_VERSION = 13  # MongoDB 5.0, the first with snapshot reads outside of transactions
NO_SUCH_ID = "drsm:none"  # of no chunk, pod or session: deleting it only shows that we may
_HOSTS = re.compile(r"[\w.\-:,\[\]%]+")

INITIATE = (
    "start mongod with --replSet rs0 and run rs.initiate() once in mongosh (one member is enough), "
    "or give the URL of a replica set"
)


def hosts_of(url: str) -> str:
    """What of a URL may be shown: the hosts."""
    hosts = re.split(r"[/?]", url.rpartition("@")[2].rpartition("://")[2])[0]
    return hosts if _HOSTS.fullmatch(hosts) else "the given URL"


def malformed(url: str, error: Exception) -> str:
    # The driver quotes the part that it did not understand, which may be one of a password.
    found = reason(error) if "@" not in url else "credentials with special characters, or a wrong option"
    return (
        "Expected a MongoDB URL like mongodb://user:password@host:27017/?replicaSet=rs0, "
        f"found: {found}; correct the URL (user and password percent-encoded) and the TLS files"
    )


async def check_deployment(client: AsyncIOMotorClient[Document], hosts: str) -> None:
    """Raise Misconfigured unless a replica set or sharded cluster of a fit version answers; StoreUnavailable
    where none does so far."""
    try:
        hello = await client.admin.command("hello")
    except PyMongoError as error:
        if code_of(error) in DENIED:
            raise Misconfigured(_denied(hosts, error)) from error
        text = f"Expected a MongoDB primary at {hosts}, found: {reason(error)}; start it or correct the URL. "
        text += f"If it runs but is no replica set yet: {INITIATE}"
        # A server that answers, but is not of the URL's set, is one that the driver forgets.
        strangers_only = not client.delegate.topology_description.server_descriptions()
        raise (Misconfigured(text) if strangers_only else StoreUnavailable(text)) from error
    if "setName" not in hello and hello.get("msg") != "isdbgrid":
        text = f"Expected MongoDB at {hosts} to have change streams, found no replica set: {INITIATE}"
        to_be_initiated = hello.get("isreplicaset")  # what a member says before it is one
        raise StoreUnavailable(text) if to_be_initiated else Misconfigured(text)
    if hello["maxWireVersion"] < OLDEST_WIRE_VERSION:
        raise Misconfigured(
            f"Expected MongoDB 5.0 or newer at {hosts}, found an older one "
            f"(wire version {hello['maxWireVersion']}): upgrade it"
        )


def _denied(hosts: str, error: BaseException) -> str:
    remedy = REMEDIES[code_of(error) or 0]
    return f"Expected MongoDB at {hosts} to let the agent in, found: {reason(error)}; {remedy}"


@contextmanager
def permitted(hosts: str) -> Iterator[None]:
    """An operation that fails for want of a permission will fail next time too."""
    try:
        yield
    except StoreUnavailable as error:
        cause = error.__cause__
        if cause is not None and code_of(cause) in DENIED:
            raise Misconfigured(_denied(hosts, cause)) from error
        raise
