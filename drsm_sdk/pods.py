"""Who takes part: a pod as it presents itself, and the owner of an id as consumers see it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, Self

from drsm_sdk.errors import BadRequest
from drsm_sdk.wire.messages import OwnerRef, PodRef

_HOST_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*(?=[a-z0-9_-]*[a-z])[a-z0-9_-]{1,63}\.?", re.IGNORECASE)
"""Of which the last label is no number, as else it would be a wrong address (RFC 1123, section 2.1)."""
PodState = Literal["live", "down", "unknown"]


@dataclass(frozen=True, slots=True)
class Pod:
    """This process as a member of the domain. Raises BadRequest for a name that cannot be one.

    name      Kubernetes pod name (DNS-1123); two living pods must not share one
    ip        where the load balancer reaches it: one IPv4 or IPv6 address, or a host name, as text
    instance  what the network function calls itself, for example its NF instance id
    """

    name: str
    ip: str
    instance: str

    def __post_init__(self) -> None:
        try:
            PodRef(self.name, self.ip, self.instance)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if unresolved := [text for text in (self.ip, self.instance) if "$(" in text]:
            raise BadRequest(
                f"expected a pod's address and instance, found {unresolved[0]:.60}, which Kubernetes has not "
                "resolved; in the manifest, define the variable above the one that names it"
            )
        if not _is_host(self.ip):
            raise BadRequest(
                f"ip: expected one address or host name of the pod, found {self.ip!r:.60}; take status.podIP "
                "(downward API), of a dual-stack pod the address by which the load balancer reaches it"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The pod of HOSTNAME, POD_IP and POD_INSTANCE. Raises BadRequest that names what is not set."""
        environ = os.environ if environ is None else environ
        missing = [name for name in ("HOSTNAME", "POD_IP", "POD_INSTANCE") if not environ.get(name)]
        if missing:
            raise BadRequest(
                "expected HOSTNAME, POD_IP and POD_INSTANCE in the environment, "
                f"found no {', '.join(missing)}; set them in the pod's manifest (downward API), "
                "or pass Pod(name, ip, instance)"
            )
        return cls(environ["HOSTNAME"], environ["POD_IP"], environ["POD_INSTANCE"])

    @property
    def ref(self) -> PodRef:
        """The pod as the wire protocol writes it."""
        return PodRef(self.name, self.ip, self.instance)


@dataclass(frozen=True, slots=True)
class Owner:
    """The pod incarnation that an id belongs to. Incarnation 0 is a Go DRSM pod.

    `state` is `live`; `down`: the pod is gone and its chunks are about to move; or, of a Go DRSM pod,
    `unknown`: it has chunks and no keepalive, so it has just begun, or is about to be down.
    """

    name: str
    ip: str
    instance: str
    incarnation: int
    state: PodState = "live"

    @property
    def key(self) -> tuple[str, int]:
        """Name and incarnation: what tells one owner from another."""
        return self.name, self.incarnation

    @classmethod
    def of(cls, ref: OwnerRef, state: PodState) -> Self:
        """An owner as the wire protocol writes it, in a state."""
        return cls(ref.name, ref.ip, ref.instance, ref.incarnation, state)


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return _HOST_NAME.fullmatch(text) is not None
    return True
