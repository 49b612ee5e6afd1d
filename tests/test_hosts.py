"""Two hosts with a cable between them: network namespaces, each with a torchrun of its own."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from forks import LOST, PRETRAIN, Bench, Child, bench, start, steps_told, unreadable
from ranks import SOON, losses
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastidmm import pulse
from fastidmm import ranks as module
from fastidmm.__main__ import main

NEW_NAME = 0x04000000  # CLONE_NEWUTS: a host name of one's own
HOSTS = ("left", "right")
PORT = 29_500  # nobody else is in these networks
MINE = os.getpid()
COMMAND = f"{PRETRAIN} --device cpu"


def ip(words: str) -> None:
    """One of iproute2's commands."""
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def namespace(host: int) -> str:
    return f"fastidmm-{MINE}-{HOSTS[host]}"


def address(host: int) -> str:
    """Of the network that is set aside for documents (RFC 5737)."""
    return f"192.0.2.{host + 1}"


@pytest.fixture
def cable() -> Iterator[Callable[[], None]]:
    """Two hosts; what cuts the cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        for host in range(2):
            ip(f"netns add {namespace(host)}")
        ends = " peer name ".join(f"cable netns {namespace(host)}" for host in range(2))
        ip(f"link add {ends.replace(' peer', ' type veth peer', 1)}")
        for host in range(2):
            ip(f"-n {namespace(host)} addr add {address(host)}/24 dev cable")
            for link in ("lo", "cable"):
                ip(f"-n {namespace(host)} link set {link} up")
        yield lambda: ip(f"-n {namespace(1)} link set cable down")
    finally:
        for host in range(2):
            subprocess.run(["ip", "netns", "del", namespace(host)], capture_output=True)


def torchrun(host: int, each: int) -> None:
    """Be a host that begins so many ranks, as `torchrun --nnodes 2 --node-rank HOST` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    where = os.open(f"/run/netns/{namespace(host)}", os.O_RDONLY)
    if libc.setns(where, 0) or libc.unshare(NEW_NAME):
        raise OSError(ctypes.get_errno(), "cannot be a host")
    socket.sethostname(HOSTS[host])
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    os.dup2(os.open(f"said {host}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=each, max_restarts=0, start_method="fork",
        rdzv_backend="static", rdzv_endpoint=f"{address(0)}:{PORT}", rdzv_configs={"rank": host},
        run_id="none", local_addr=address(host),
    )  # fmt: skip
    elastic_launch(config, rank)()
    os._exit(0)


def rank() -> None:
    """Be one of its ranks; its status is left in a file, whatever torchrun makes of it."""
    child = os.fork()
    if not child:
        main()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"ended {os.environ['RANK']}").write_text(str(status))
    os._exit(status)


@pytest.fixture(scope="module")
def work() -> Iterator[Bench]:
    """A dataset of 32 photographs; all that children import is imported."""
    with bench() as made:
        yield made


def begun(work: Bench, name: str, each: int) -> tuple[Path, list[Child]]:
    """Both hosts with so many ranks each, in a folder of the disk that they share."""
    place = work.work / name
    place.mkdir()
    return place, [start(COMMAND, place, partial(torchrun, host, each)) for host in range(2)]


def said(place: Path) -> str:
    """All that both hosts said."""
    return "".join(path.read_text() for path in sorted(place.glob("said*")))


def test_two_hosts_train_as_one_process_does(work: Bench, cable: Callable[[], None]) -> None:
    place, children = begun(work, "hosts", 2)
    assert [child.status() for child in children] == [0, 0], said(place)
    work.truth("pretrain idmm")
    alone = losses(work.work / "truth pretrain idmm" / "runs" / "run")
    assert losses(place / "runs" / "run") == pytest.approx(alone, rel=1e-3)


def test_where_the_cable_is_cut_the_ranks_of_both_hosts_end(
    work: Bench, cable: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the host without the launcher's store, too; no connection is closed."""
    for where in (pulse, module):
        monkeypatch.setattr(where, "EVERY", 0.3)
    place, children = begun(work, "cut", 1)
    run, until = place / "runs" / "run", time.monotonic() + LOST
    while steps_told(run) < 3:
        assert time.monotonic() < until and not children[0].wait(0.02), said(place)
    cable()
    began = time.monotonic()
    while len(list(place.glob("ended *"))) < 2:
        assert time.monotonic() < began + SOON, said(place)
        time.sleep(0.1)
    assert [(place / f"ended {rank}").read_text() for rank in range(2)] == ["75", "75"]
    words = said(place)
    assert "fastidmm: rank 1 on right gives no sign; `fastidmm resume` goes on." in words
    assert "fastidmm: the launcher gives no sign; `fastidmm resume` goes on." in words
    for child in children:  # torchrun itself may wait for its peers
        os.killpg(child.pid, signal.SIGKILL)
        child.status()
        child.gone(5)
    assert unreadable(run) == 0
    child = start("resume run --json", place)
    assert child.status() == 0, said(place)
    child.gone(5)
    work.truth("pretrain idmm")
    alone = losses(work.work / "truth pretrain idmm" / "runs" / "run")
    assert losses(run) == pytest.approx(alone, rel=1e-3)
