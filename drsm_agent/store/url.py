"""What of a MongoDB URL's options the agent takes, option by option.

The guarantees rest on some of them: those the agent sets itself, whatever the URL says. Others would lead to
a server that it cannot work with, or to what nobody has tried: those are refused at start, with the reason.
"""

from collections.abc import Iterator
from urllib.parse import unquote_plus

from drsm_agent.errors import Misconfigured

TAKEN = frozenset(
    {
        "authmechanism",
        "authmechanismproperties",
        "authsource",
        "compressors",
        "enableoverloadretargeting",
        "localthresholdms",
        "maxadaptiveretries",
        "maxconnecting",
        "maxidletimems",
        "replicaset",
        "servermonitoringmode",
        "srvmaxhosts",
        "srvservicename",
        "ssl",
        "tls",
        "tlsallowinvalidcertificates",
        "tlsallowinvalidhostnames",
        "tlscafile",
        "tlscertificatekeyfile",
        "tlscertificatekeyfilepassword",
        "tlscrlfile",
        "tlsdisableocspendpointcheck",
        "tlsinsecure",
        "zlibcompressionlevel",
    }
)
"""As they are given."""
OVERRIDDEN = frozenset(
    {
        "appname",
        "connect",
        "connecttimeoutms",
        "datetime_conversion",
        "directconnection",
        "heartbeatfrequencyms",
        "journal",
        "maxpoolsize",
        "minpoolsize",
        "readconcernlevel",
        "readpreference",
        "retryreads",
        "retrywrites",
        "serverselectiontimeoutms",
        "sockettimeoutms",
        "timeoutms",
        "tz_aware",
        "unicode_decode_error_handler",
        "uuidrepresentation",
        "w",
        "waitqueuetimeoutms",
        "wtimeoutms",
    }
)
"""Set by the agent (`mongo.py client_options`): what is written is of a majority and in its journals, what is
read is of the primary, wherever that moves, and every operation is bounded."""
_OF_CODE = "it is set in code, and means nothing in a URL"
_PRIMARY = "the agent reads from the primary alone"
REFUSED = {
    "driver": _OF_CODE,
    "server_api": _OF_CODE,
    "srvallowedhostssuffix": _OF_CODE,
    "fsync": "the agent writes with a majority and journal",
    "waitqueuemultiple": "the driver does not know it any more",
    "maxstalenessseconds": _PRIMARY,
    "readpreferencetags": _PRIMARY,
    "loadbalanced": "behind a load balancer the agent cannot read at one cluster time; give the URL of the "
    "replica set or of the mongos",
}
"""With the reason."""
MECHANISMS = frozenset({"DEFAULT", "SCRAM-SHA-1", "SCRAM-SHA-256", "MONGODB-X509", "PLAIN"})
"""Ways to authenticate that need no package beside the driver, and no service of a cloud."""


def check_options(url: str) -> list[str]:
    """The options of a URL that the agent overrides. Raises Misconfigured for those that it refuses."""
    overridden = []
    for name, value in _options(url):
        key = name.lower()
        reason = REFUSED.get(key, "")
        if key == "loadbalanced" and value.lower() == "false":
            reason = ""
        elif key == "authmechanism" and value.upper() not in MECHANISMS:
            reason = f"expected one of {', '.join(sorted(MECHANISMS))}"
        elif key not in TAKEN | OVERRIDDEN | REFUSED.keys():
            reason = "expected an option of MongoDB's drivers"
        if reason:
            raise Misconfigured(
                f"DRSM_MONGO_URL: found the option {name[:64]}: {reason}; take it out of the URL"
            )
        if key in OVERRIDDEN:
            overridden.append(name)
    return overridden


def _options(url: str) -> Iterator[tuple[str, str]]:
    """Names and values. (What is no URL the driver will say.)"""
    query = url.rpartition("@")[2].partition("?")[2]
    for option in query.replace(";", "&").split("&"):
        name, _, value = option.partition("=")
        if name:
            yield unquote_plus(name), unquote_plus(value)
