"""Starting processes: what they have, and what becomes of all when one fails."""

import atexit
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bn_det.commands.launch import RankError, _raise_first, launch, world_size
from bn_det.errors import InputError
from waiting import takes_ctrl_c, wait_for


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = set(multiprocessing.active_children())  # workers of a data loader, of other tests
    yield
    assert set(multiprocessing.active_children()) <= before


def say_who(folder, factor):
    """Of each process, what it is told and what it can do."""
    total = torch.tensor(factor * (dist.get_rank() + 1))
    dist.all_reduce(total)
    who = {
        "rank": dist.get_rank(),
        "size": dist.get_world_size(),
        "local": [int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")],
        "total": total.item(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(who))


def said(folder):
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    for pid in {who.pop("pid") for who in found}:
        assert pid != os.getpid() and not Path(f"/proc/{pid}").exists()
    return found


def abort_when_done(folder):
    """One process is through, and aborts as it ends; the other has still to save."""
    pid = torch.tensor(os.getpid() if dist.get_rank() else 0)
    dist.all_reduce(pid)
    if dist.get_rank():
        atexit.register(os.abort)
    else:
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), 60)
        (Path(folder) / "model.pth").touch()


def test_a_process_that_aborts_when_it_is_through(tmp_path):
    launch(abort_when_done, (str(tmp_path),), 2, device="cpu")
    assert (tmp_path / "model.pth").exists()


def test_one_process_is_this_one():
    pids = []
    launch(lambda pid: pids.append((pid, os.getpid(), dist.is_initialized())), (3,), 1)
    assert pids == [(3, os.getpid(), False)]


@pytest.mark.slow
def test_two_machines_of_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    url = f"tcp://127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as machines:
        done = [
            machines.submit(launch, say_who, (str(tmp_path), 10), 2, 2, k, url, "cpu")
            for k in (1, 0)
        ]
        assert [d.result(120) for d in done] == [None, None]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert said(tmp_path) == [
        {"rank": 2 * m + k, "size": 4, "local": [k, 2], "total": 100, "threads": share}
        for m in range(2)
        for k in range(2)
    ]


def fail(how):
    """Rank 1 fails, after a collective; rank 0 waits for it, or for nothing."""
    dist.barrier()
    if dist.get_rank() == 0:
        if how == "raise":
            time.sleep(600)
        dist.barrier()
    elif how == "raise":
        raise ArithmeticError("this is what went wrong")
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", r"(?s)rank 1 raised:\nTraceback.*in fail\n.*this is what went wrong"),
        ("kill", "^rank 1 was killed by SIGKILL$"),
    ],
)
def test_a_rank_that_fails_ends_all(how, message):
    with pytest.raises(RankError, match=message):
        launch(fail, (how,), 2, device="cpu")


@pytest.mark.parametrize(
    "reported, ended, error, message",
    [
        # The other ranks' loss of connection is reported later, or the only report there is.
        (
            [(8.1, 0, "", "lost"), (8.0, 1, "", "why")],
            {0: 1, 1: 1},
            RankError,
            "rank 1 raised:\nwhy",
        ),
        ([(8.1, 0, "", "lost")], {0: 1, 1: -9}, RankError, "rank 1 was killed by SIGKILL"),
        ([(8.0, 1, "", "why")], {0: -6}, RankError, "rank 1 raised:\nwhy"),
        ([], {0: -6}, RankError, "rank 0 was killed by SIGABRT"),
        ([], {2: 3}, RankError, "rank 2 ended with exit code 3"),
        ([(8.0, 1, "InputError", "KEY: 'value'")], {}, InputError, "KEY: 'value'"),
    ],
)
def test_what_began_it_is_raised(reported, ended, error, message):
    with pytest.raises(error) as e:
        _raise_first(reported, ended)
    assert str(e.value) == message


def say_and_sleep(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def say_and_be_busy(folder):
    """In a call that keeps the interpreter; no signal but SIGKILL ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(folder) / str(os.getpid())).touch()
    ctypes.PyDLL(None).sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn, how",
    [
        (say_and_sleep, signal.SIGKILL),
        (say_and_be_busy, signal.SIGKILL),
        (say_and_be_busy, signal.SIGINT),
    ],
)
def test_no_rank_survives_its_parent(fn, how, tmp_path):
    lines = [
        "from bn_det.commands.launch import launch",
        f"from test_launch import {fn.__name__} as fn",
        "if __name__ == '__main__':",
        f"    launch(fn, ({str(tmp_path)!r},), 2, device='cpu')",
    ]
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}

    def ranks():
        return [p.name for p in tmp_path.iterdir() if p.name.isdigit()]

    process = subprocess.Popen([sys.executable, str(script)], env=env, preexec_fn=takes_ctrl_c)
    try:
        wait_for(lambda: len(ranks()) == 2, 60)
        process.send_signal(how)
        process.wait(60)
    finally:
        process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks()), 60)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_processes": 0}, ["--num-gpus: 0", "1 or more"]),
        ({"num_processes": 10**6}, ["--num-gpus: 1000000 is not accepted; use 1 to "]),
        ({"num_machines": 0}, ["--num-machines: 0", "1 or more"]),
        ({"num_machines": 2}, ["--dist-url: 'auto'", "--num-machines 2", "tcp://ADDRESS:PORT"]),
        ({"num_machines": 2, "machine_rank": 2}, ["--machine-rank: 2", "0 to 1"]),
        ({"num_processes": 1, "machine_rank": 3}, ["--machine-rank: 3", "0 to 0"]),
        ({"dist_url": "file:///x"}, ["--dist-url: 'file:///x'", "auto or tcp://ADDRESS:PORT"]),
        ({"dist_url": "tcp://a:port"}, ["--dist-url: 'tcp://a:port'"]),
        ({"device": "cpu:0"}, ["MODEL.DEVICE: 'cpu:0'", "'cpu'"]),
    ],
)
def test_what_is_not_accepted(arguments, words):
    with pytest.raises(InputError) as e:
        launch(say_who, (), **{"num_processes": 2, "device": "cpu", **arguments})
    for word in words:
        assert word in str(e.value)


def test_a_port_that_is_taken():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--dist-url: '{url}'.*port.*already in use"):
            launch(say_who, (), 2, dist_url=url, device="cpu")


def test_world_size(monkeypatch):
    assert world_size(3, 2) == 6
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert world_size(3, 2) == 5
