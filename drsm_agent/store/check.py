"""Start-up checks: a MongoDB that the agent cannot work with is refused with what to do about it; one that
is not there yet is no mistake.

No message shows credentials: neither the URL nor the driver's words about one that has any.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import ConfigurationError

from drsm_agent.core import writes
from drsm_agent.core.documents import GRANT_MAX, OPENED, Document, Owner, Session
from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.errors import Misconfigured, PositionLost, StoreRefused, StoreUnavailable
from drsm_agent.store.faults import CONFIGURED, DENIED, DRIVER_ERRORS, REMEDIES, code_of, reason

OLDEST_WIRE_VERSION = 13  # MongoDB 5.0, the first with snapshot reads outside of transactions
NO_SUCH_ID = "drsm:none"  # of no chunk, pod or session: deleting it only shows that we may
PRODUCTS = {
    ".cosmos.azure.com": "Azure Cosmos DB",
    ".docdb.amazonaws.com": "Amazon DocumentDB",
    ".docdb-elastic.amazonaws.com": "Amazon DocumentDB",
}
"""By the ends of their hosts' names, as the driver tells them, too."""
BUILDS = {"ferretdb": "FerretDB", "ferretdbVersion": "FerretDB"}
"""By a field of the answer to `buildInfo`."""
STREAMS_OFF = 136
"""What Amazon DocumentDB says of a collection whose changes are not recorded; MongoDB never says it of a
stream that has just begun."""
_HOSTS = re.compile(r"[\w.\-:,\[\]%]+")

NO_SUCH_CHUNK = 2**63 - 1
"""Of no pool: there are fewer numbers."""
_NOBODY = Owner(NO_SUCH_ID, "127.0.0.1", "none", 1)
_SESSION = Session(
    pod=NO_SUCH_ID,
    ip="127.0.0.1",
    instance="none",
    incarnation=1,
    term=1,
    state=OPENED,
    pools=(),
    request_id="none",
    promised_ms=0,
)

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
    except DRIVER_ERRORS as error:
        if code_of(error) in DENIED:
            raise Misconfigured(_denied(hosts, error)) from error
        if isinstance(error, ConfigurationError):
            text = f"Expected MongoDB at {hosts} to take the connection, found: {reason(error)}; {CONFIGURED}"
            raise Misconfigured(text) from error
        text = f"Expected a MongoDB primary at {hosts}, found: {reason(error)}; start it or correct the URL. "
        text += f"If it runs but is no replica set yet: {INITIATE}"
        # A server that answers, but is not of the URL's set, is one that the driver forgets.
        strangers_only = not client.delegate.topology_description.server_descriptions()
        raise (Misconfigured(text) if strangers_only else StoreUnavailable(text)) from error
    if product := await _other_product(client, hosts):
        raise Misconfigured(
            f"Expected MongoDB at {hosts}, found {product}, which lacks change streams, or reads at a "
            "cluster time, as the agent needs them: give it a replica set of MongoDB 5.0 or newer"
        )
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


def samples(space: str) -> list[Document]:
    """Documents like those that the agent will insert into a collection, with keys that nobody has."""
    expire_at = datetime.fromtimestamp(0, tz=UTC)
    own: dict[str, list[Document]] = {
        SESSIONS: [_SESSION.document],
        STAMPS: [writes.first_stamp().document],
        writes.LEADER: [writes.first_lead(writes.LeaderRecord(NO_SUCH_ID, 1, 1, 1)).document],
        writes.POSITION: [writes.first_position().document],
        writes.SETTINGS: [{}],
    }
    if space in own:
        return [document | {"_id": NO_SUCH_ID} for document in own[space]]
    chunk = writes.allocate(space, NO_SUCH_CHUNK, _NOBODY, "0" * GRANT_MAX, "none")
    return [chunk.document, writes.mirror_keepalive(space, _NOBODY, expire_at).document]


async def _other_product(client: AsyncIOMotorClient[Document], hosts: str) -> str:
    """The name of what speaks MongoDB's protocol and is not MongoDB, as far as it says so."""
    for suffix, product in PRODUCTS.items():
        if any(host.partition(":")[0].endswith(suffix) for host in hosts.split(",")):
            return product
    try:
        built = await client.admin.command("buildInfo")
    except DRIVER_ERRORS:
        return ""
    return next((product for name, product in BUILDS.items() if name in built), "")


@contextmanager
def refused_at_once(hosts: str) -> Iterator[None]:
    """What MongoDB refuses for want of a permission, or does not know, it will refuse next time too."""
    try:
        yield
    except StoreRefused as error:
        if error.code in DENIED and error.__cause__:
            raise Misconfigured(_denied(hosts, error.__cause__)) from error
        raise Misconfigured(str(error)) from error
    except PositionLost as error:
        if error.code == STREAMS_OFF:
            raise Misconfigured(
                f"Expected MongoDB at {hosts} to have change streams, found that they are not enabled "
                f"({reason(error)}): give the agent a replica set of MongoDB 5.0 or newer"
            ) from error
        raise
