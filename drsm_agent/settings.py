"""The agent's settings: environment variables with the prefix `DRSM_`, or a TOML file named by `DRSM_CONFIG`.

The only reader of the environment. Every value is checked at start; a mistake is one message that
names the setting, what was expected and what was found.
"""

import json
import os
import re
from functools import cached_property
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from drsm_agent.core.lease import Leases, check_usage_lag
from drsm_agent.core.placement import BesideGo
from drsm_agent.errors import Misconfigured
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import FIFO, INTEGER, Space
from drsm_sdk.wire.subjects import Subjects

PREFIX = "DRSM_"
CONFIG_VARIABLE = "DRSM_CONFIG"
POOLS_MAX = 256
DURATION_MAX = 86_400.0
"""A day: a longer lease would only hide a mistake in the unit."""
QUARANTINE_MS_MAX = 30 * 86_400_000
"""A month, for the same reason."""
REVISION_MAX = 2**31 - 1
"""As with Kubernetes; a larger one could not be stored, or not be raised any more."""
DATABASE_NAME = "[A-Za-z0-9_-]{1,63}"
"""As MongoDB takes it on every system; with any other name an agent would wait for it without end."""
ADDRESS_DOMAIN_MAX = 64
NATS_CONNECT_TIMEOUT_MAX = 60.0
"""Where it takes longer, nothing that a lease depends on would come in time."""
INBOX_PREFIX = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
POOLS_EXAMPLE = '[{"name": "amfid", "bits": 24}]'


_OF_KUBERNETES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT|_PORT(_\d+_(TCP|UDP).*)?$")


class SpaceSettings(BaseModel):
    """One number space; `drsm_sdk.wire.space.Space` says what the fields mean, and checks them."""

    model_config = {"extra": "forbid", "frozen": True}

    name: str
    kind: str = INTEGER
    bits: int | None = Field(None, ge=1)
    ranges: tuple[str, ...] = ()
    prefix: int | None = Field(None, ge=1)
    block_bits: int | None = Field(None, ge=1)
    slots: int | None = Field(None, ge=1)
    reserved: tuple[tuple[int, int], ...] = ()
    excluded: tuple[str, ...] = ()
    order: str = FIFO

    def given(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The fields that were given; what was not has a default that depends on the others."""
        return self.model_dump(exclude=exclude, exclude_none=True)


class PoolSettings(SpaceSettings):
    """One pool: the fields of its definition, the database that holds its collection, and the name of the
    network in which its addresses are unique."""

    usage_lag_ms: int = Field(10_000, ge=0)
    quarantine_ms: int = Field(0, ge=0, le=QUARANTINE_MS_MAX)
    unscanned: str = "keep"
    revision: int = Field(1, le=REVISION_MAX)
    database: str = Field("", pattern=f"^({DATABASE_NAME})?$")
    address_domain: str = Field("", max_length=ADDRESS_DOMAIN_MAX)
    spaces: tuple[SpaceSettings, ...] = ()

    @cached_property
    def definition(self) -> Definition:
        spaces = tuple(Space(**space.given()) for space in self.spaces)
        return Definition(**self.given(exclude={"address_domain", "database", "spaces"}), spaces=spaces)

    @model_validator(mode="after")
    def _is_a_definition(self) -> "PoolSettings":
        if self.definition.usable == 0:  # which itself raises ValueError that names the field and the rule
            raise ValueError(
                f"pool {self.name}: expected a chunk with an id that may be issued, found that all ids are "
                "reserved, excluded, network, gateway or broadcast"
            )
        return self


class Settings(BaseSettings):
    """All settings of an agent. Durations are seconds unless their name ends in `_ms`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    nats_url: str = "nats://127.0.0.1:4222"
    """One or more NATS servers, separated by commas."""
    mongo_url: SecretStr = SecretStr("mongodb://127.0.0.1:27017/?replicaSet=rs0")
    """A replica set; a standalone mongod has no change streams and is refused."""
    mongo_database: str = Field("sdcore", pattern=f"^{DATABASE_NAME}$")
    subject_prefix: str = "drsm"
    pools: list[PoolSettings] = Field(default=[], min_length=1, max_length=POOLS_MAX)

    liveness_ttl: float = Field(3.0, gt=0, lt=DURATION_MAX)
    """`L`: without a renewal for so long a pod may be declared dead."""
    allocation_ttl: float = Field(300.0, gt=0, lt=DURATION_MAX)
    """`A`: a pod cut off goes on issuing for so long."""
    leader_ttl: float = Field(3.0, gt=0, lt=DURATION_MAX)
    """`T`: a standby takes over a leader that was silent for so long."""
    go_hold: float = Field(3600.0, ge=1, lt=DURATION_MAX)
    """Nothing is issued for so long from a chunk that was a Go DRSM pod's: it may have stood still, and go
    on."""
    go_claims_after: float | None = Field(None, gt=0, lt=DURATION_MAX)
    """Go DRSM pods may claim a dead pod's chunks so long after its death; if not given, after its chunks'
    hold."""
    settings_revision: int = Field(1, ge=1, le=REVISION_MAX)
    """Raise it to change a stored `L`, `A` or `T`, the subject prefix, or which pools there are."""

    agent_id: str = Field("", validation_alias=AliasChoices("DRSM_AGENT_ID", "HOSTNAME", "agent_id"))
    http_host: str = ""
    """Where HTTP is served; if empty, on all addresses, IPv4 and IPv6: probes come from the node, by the
    pod's address."""
    http_port: int = Field(8080, ge=0, le=65535)
    """`/livez`, `/readyz`, `/metrics`; 0 serves none."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    nats_credentials: Path | None = None
    """A `.creds` file (JWT and seed)."""
    nats_user: str = ""
    nats_password: SecretStr = SecretStr("")
    nats_token: SecretStr = SecretStr("")
    nats_tls_ca: Path | None = None
    nats_tls_certificate: Path | None = None
    nats_tls_key: Path | None = None
    nats_tls_key_password: SecretStr = SecretStr("")
    nats_tls_handshake_first: bool = False
    """For servers with `handshake_first`: TLS begins before the server says anything."""
    nats_nkey: Path | None = None
    """A file with an NKey seed."""
    nats_connect_timeout: float = Field(2.0, gt=0, le=NATS_CONNECT_TIMEOUT_MAX)
    """How long one try of a connection may take."""
    nats_inbox_prefix: str = Field("_INBOX", pattern=f"^{INBOX_PREFIX}$")
    """Subjects below it are where answers come."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get(CONFIG_VARIABLE))
        return init_settings, env_settings, toml

    @field_validator("nats_url")
    @classmethod
    def _is_of_nats(cls, urls: str) -> str:
        for url in urls.split(","):
            scheme, _, host = url.rpartition("://")
            if scheme not in {"", "nats", "tls", "ws", "wss"} or not host:
                raise ValueError(
                    "expected URLs such as nats://host:4222 (or tls, ws, wss), separated by commas"
                )
        return urls

    @model_validator(mode="after")
    def _holds_together(self) -> "Settings":
        leases = self.leases
        try:
            Subjects(self.subject_prefix)
        except ValueError as error:
            raise ValueError(f"DRSM_SUBJECT_PREFIX: {error}") from None
        names = [pool.name for pool in self.pools]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"pools: each name once, found twice: {', '.join(doubles)}")
        for pool in self.pools:
            check_usage_lag(pool.name, pool.usage_lag_ms / 1000, leases.allocation)
        _check_apart(self.pools)
        return self

    @property
    def leases(self) -> Leases:
        return Leases(liveness=self.liveness_ttl, allocation=self.allocation_ttl, leader=self.leader_ttl)

    @property
    def beside_go(self) -> BesideGo:
        return BesideGo(hold=self.go_hold, claims_after=self.go_claims_after)

    @property
    def nats_hosts(self) -> str:
        """Where NATS is, without credentials."""
        return ",".join(url.rpartition("//")[2].rpartition("@")[2] for url in self.nats_url.split(","))

    @property
    def mongo_hosts(self) -> str:
        """Where MongoDB is, without credentials and options."""
        return self.mongo_url.get_secret_value().rpartition("@")[2].rpartition("//")[2].split("/")[0]

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        return {pool.name: pool.definition for pool in self.pools}

    @property
    def databases(self) -> dict[str, str]:
        """The database of each pool's collection."""
        return {pool.name: pool.database or self.mongo_database for pool in self.pools}


def _check_apart(pools: list[PoolSettings]) -> None:
    """Raises ValueError when two ranges of one address domain have an address in common: it would be issued
    twice."""
    ranges = sorted(
        (pool.address_domain, network.version, int(network[0]), -network.num_addresses, pool.name, network)
        for pool in pools
        for space in (pool, *pool.spaces)
        for network in map(ip_network, space.ranges)
    )
    for (domain, version, *_, former, wide), (again, same, *_, pool, network) in pairwise(ranges):
        if (domain, version) == (again, same) and network.overlaps(wide):
            raise ValueError(
                f"pools: expected ranges without an address in common, found {wide} of {former} and "
                f"{network} of {pool}, so that addresses would be issued twice; change a range, or, if the "
                "pools are for networks that do not meet, give them an `address_domain` each"
            )


def load(**overrides: Any) -> Settings:
    """The settings from the environment. Raises Misconfigured with one line per mistake."""
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        raise Misconfigured(f"{CONFIG_VARIABLE}: expected a TOML file, found none at {config}")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise Misconfigured("\n".join(_mistake(entry) for entry in error.errors())) from None
    except SettingsError:
        raise Misconfigured(f"DRSM_POOLS: expected JSON, for example {POOLS_EXAMPLE}") from None
    except (ValueError, OSError) as error:
        raise Misconfigured(f"{CONFIG_VARIABLE}: expected a TOML file at {config}: {error}") from None


def names_pools() -> bool:
    """Whether the environment, or the file that it names, may say which pools there are."""
    return bool(os.environ.get(f"{PREFIX}POOLS") or os.environ.get(CONFIG_VARIABLE))


def unknown_variables() -> list[str]:
    """Variables with our prefix that mean nothing to us: most likely misspelt. Not refused, as Kubernetes
    sets such ones for a service whose name begins with `drsm`."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    ours = {name for name in os.environ if name.startswith(PREFIX)}
    return sorted(name for name in ours - known if not _OF_KUBERNETES.search(name))


def _mistake(entry: Any) -> str:
    """One mistake as a person reads it: the variable, the rule, what was found."""
    message = entry["msg"].removeprefix("Value error, ")
    if not entry["loc"]:
        return str(message)
    first, *rest = entry["loc"]
    name = first if str(first).startswith(PREFIX) else f"{PREFIX}{str(first).upper()}"
    where = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    if entry["type"] == "too_short" and name == "DRSM_POOLS":
        return f"DRSM_POOLS: expected at least one pool, for example {POOLS_EXAMPLE}"
    if entry["type"] == "extra_forbidden":
        known = SpaceSettings if "spaces" in rest else PoolSettings if rest else Settings
        return f"{where}: no such field; the fields are {', '.join(known.model_fields)}"
    if entry["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, found {json.dumps(entry.get('input'), default=str)[:80]}"
