"""Credentials of a NATS operator's making, that end when a test wants them to."""

import base64
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nkeys

UNLIMITED = {"subs": -1, "data": -1, "payload": -1}
CREDENTIALS = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""


def _pair(prefix: int) -> Any:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


@dataclass(frozen=True)
class Operator:
    """An operator with one account, whose users it makes."""

    key: Any = field(default_factory=lambda: _pair(nkeys.PREFIX_BYTE_OPERATOR))
    account: Any = field(default_factory=lambda: _pair(nkeys.PREFIX_BYTE_ACCOUNT))

    def server_config(self) -> str:
        limits = UNLIMITED | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
        account = _signed(self.key, self.account, "account", {"limits": limits})
        return (
            f"operator: {_signed(self.key, self.key, 'operator', {})}\nresolver: MEMORY\n"
            f"resolver_preload: {{ {_name(self.account)}: {account} }}\n"
        )

    def write_user(self, file: Path, seconds: float) -> None:
        """A user's credentials, good for so long (whole seconds); replaces a file in one step."""
        user = _pair(nkeys.PREFIX_BYTE_USER)
        jwt = _signed(self.account, user, "user", UNLIMITED, expires=round(time.time() + seconds))
        new = file.with_suffix(".new")
        new.write_text(CREDENTIALS.format(jwt=jwt, seed=user.seed.decode()))
        new.replace(file)


def _name(key: Any) -> str:
    return str(key.public_key.decode())


def _signed(issuer: Any, subject: Any, kind: str, claims: dict[str, Any], expires: int = 0) -> str:
    body = {
        "jti": os.urandom(8).hex(),
        "iat": round(time.time()),
        "iss": _name(issuer),
        "sub": _name(subject),
        "name": kind,
        "nats": {"type": kind, "version": 2} | claims,
    }
    parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, body | ({"exp": expires} if expires else {})]
    text = ".".join(_text(json.dumps(part).encode()) for part in parts)
    return f"{text}.{_text(issuer.sign(text.encode()))}"


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
