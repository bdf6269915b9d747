"""Error answers become typed errors; names and arguments are checked before anything is sent."""

import pytest

import drsm_sdk
from drsm_sdk import AgentUnavailable, BadRequest, Demux, Drsm, DrsmError, Pod, PoolExhausted, SessionLost
from drsm_sdk.errors import from_failure
from drsm_sdk.wire.messages import ERROR_CODES, Failure

POD = Pod("amf-1", "10.0.0.1", "i")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("bad_request", BadRequest),
        ("not_joined", BadRequest),
        ("unknown_pool", BadRequest),
        ("too_large", BadRequest),
        ("session_lost", SessionLost),
        ("pool_exhausted", PoolExhausted),
        ("internal", AgentUnavailable),
        ("store_unavailable", AgentUnavailable),
    ],
)
def test_every_error_of_the_protocol_has_its_type(error: str, kind: type[DrsmError]) -> None:
    assert type(from_failure(Failure(error, "why"), ERROR_CODES[error], "p")) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, BadRequest),
        (429, BadRequest),
        (410, SessionLost),
        (507, PoolExhausted),
        (500, AgentUnavailable),
        (599, AgentUnavailable),
    ],
)
def test_an_error_of_a_newer_agent_is_judged_by_its_code(code: int, kind: type[DrsmError]) -> None:
    assert type(from_failure(Failure("made_up_later", "why"), code, "p")) is kind


def test_errors_carry_their_fields() -> None:
    lost = from_failure(Failure("session_lost", "over", reason="superseded"), 410, "")
    assert isinstance(lost, SessionLost)
    assert lost.reason == "superseded"
    refused = from_failure(Failure("unknown_pool", "no such pool"), 404, "p")
    assert isinstance(refused, BadRequest)
    assert refused.error == "unknown_pool"


def test_a_pod_comes_from_the_environment() -> None:
    environ = {"HOSTNAME": "amf-1", "POD_IP": "10.0.0.1", "POD_INSTANCE": "i"}
    assert Pod.from_env(environ) == POD


def test_what_the_environment_lacks_is_named() -> None:
    with pytest.raises(BadRequest, match=r"found no POD_IP, POD_INSTANCE; set them"):
        Pod.from_env({"HOSTNAME": "amf-1"})


@pytest.mark.parametrize(
    "ip", ["", "$(POD_IP)", "10.0.0.1,2001:db8::1", "10.0.0.1 fd00::1", "10.0.0", "10.0.0.300"]
)
def test_a_pods_address_that_is_not_one_is_refused_and_named(ip: str) -> None:
    """Empty, not resolved by Kubernetes, or both of a dual-stack pod: nobody would find the pod there."""
    with pytest.raises(BadRequest) as refused:
        Pod("amf-1", ip, "i")
    assert ip in str(refused.value)
    assert "expected" in str(refused.value)


@pytest.mark.parametrize("ip", ["10.0.0.1", "2001:db8::1", "amf-1", "amf-1.amf.core.svc.cluster.local"])
def test_a_pods_address_may_be_a_host_name(ip: str) -> None:
    """As containers of one network know each other."""
    assert Pod("amf-1", ip, "i").ip == ip


def test_an_instance_that_kubernetes_has_not_resolved_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"found \$\(NF_ID\), which Kubernetes has not resolved"):
        Pod("amf-1", "2001:db8::1", "$(NF_ID)")


@pytest.mark.parametrize("name", ["", "Amf", "a_b", "chunkid-7", "a" * 254])
def test_a_pod_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="pod name"):
        Pod(name, "10.0.0.1", "i")


@pytest.mark.parametrize("url", ["http://host:4222", "mongodb://host", "nats://", "", ["nats://a", "b://c"]])
def test_a_url_that_is_none_of_nats_is_refused(url: str | list[str]) -> None:
    with pytest.raises(BadRequest, match="expected a NATS URL such as nats://host:4222"):
        Drsm.connect(url, Pod("amf-1", "10.0.0.1", ""))


def test_a_refused_url_is_shown_without_its_password() -> None:
    with pytest.raises(BadRequest) as refused:
        Demux.connect("http://user:secret@host:4222", "amfid")
    assert "secret" not in str(refused.value)


def test_an_option_that_nats_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="found pasword"):
        Drsm.connect("nats://host", Pod("amf-1", "10.0.0.1", ""), pasword="x", user="y")


async def test_arguments_that_cannot_be_are_refused_before_connecting() -> None:
    with pytest.raises(BadRequest, match="prefix"):
        Drsm.connect("nats://127.0.0.1:1", POD, prefix="a b")
    with pytest.raises(BadRequest, match="on_silence"):
        Drsm.connect("nats://127.0.0.1:1", POD, on_silence="sometimes")  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="pool name"):
        Demux.connect("nats://127.0.0.1:1", "drsm_leader")


def test_a_demux_cannot_allocate() -> None:
    assert not [name for name in dir(Demux) if "alloc" in name or "release" in name or "acquire" in name]


def test_all_that_is_exported_is_there_and_sorted() -> None:
    assert list(drsm_sdk.__all__) == sorted(drsm_sdk.__all__)
    assert all(hasattr(drsm_sdk, name) for name in drsm_sdk.__all__)
