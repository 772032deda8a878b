"""One process per folder; locks and temporaries of dead processes."""

import json
import os
import signal
import socket
import threading

import pytest
from processes import forked

from prfl_fast.utils.folder_lock import LOCK, FolderInUseError, hold_folder
from prfl_fast.utils.io import clean_temporaries, write_atomic

NO_PROCESS = 99_999_999  # above the largest number that Linux gives


def try_to_hold(folder):
    try:
        with hold_folder(folder):
            return 0
    except FolderInUseError as error:
        who = f"in use by process {os.getppid()} on host {socket.gethostname()}"
        return 2 if who in str(error) else 3


def test_another_process_is_refused_and_told_by_whom(tmp_path):
    with hold_folder(tmp_path / "a"):
        with hold_folder(tmp_path / "a"):  # the same thread may
            assert forked(lambda: try_to_hold(tmp_path / "a")) == 2
        assert forked(lambda: try_to_hold(tmp_path / "a")) == 2
        assert forked(lambda: try_to_hold(tmp_path / "b")) == 0
    assert forked(lambda: try_to_hold(tmp_path / "a")) == 0
    assert list(tmp_path.iterdir()) == []  # no lock, and no folder that holds nothing


def test_another_thread_is_refused(tmp_path):
    found = []
    with hold_folder(tmp_path):
        thread = threading.Thread(target=lambda: found.append(refused(tmp_path)))
        thread.start()
        thread.join()
    assert found == [True] and tmp_path.is_dir()


def refused(folder):
    try:
        with hold_folder(folder):
            return False
    except FolderInUseError:
        return True


def test_a_killed_process_leaves_no_lock(tmp_path):
    def killed():
        with hold_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with hold_folder(tmp_path):
        assert f'"pid": {os.getpid()},' in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_survives_its_parent_holds_nothing(tmp_path):
    with hold_folder(tmp_path):
        wait, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(wait, 1)
            os._exit(0)
    with hold_folder(tmp_path):
        pass
    os.close(go)
    os.waitpid(child, 0)


@pytest.mark.parametrize(("host", "pid", "free"), [("here", NO_PROCESS, True), ("far", 1, False)])
def test_without_locks_of_the_file_system_the_content_decides(
    tmp_path, monkeypatch, host, pid, free
):
    def fails(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fails)
    name = socket.gethostname() if host == "here" else host
    (tmp_path / LOCK).write_text(f'{{"pid": {pid}, "host": "{name}"}}')
    assert refused(tmp_path) is not free


def test_temporaries_of_live_processes_are_kept(tmp_path):
    live = tmp_path / f"step-00000001.tmp-{os.getppid()}-0123abcd"
    dead = tmp_path / f"step-00000002.tmp-{NO_PROCESS}-0123abcd"
    older = tmp_path / f"step-00000003.tmp-{os.getppid()}-0123abcd"
    recycled = tmp_path / f"step-00000004.tmp-{os.getpid()}-0123abcd"
    for path in (live, dead, older, recycled):
        path.mkdir()
    os.utime(older, (1, 1))  # written before the process of that number began
    with write_atomic(tmp_path / "mine") as temporary:
        temporary.write_text("x")
        assert clean_temporaries(tmp_path) == [dead, older, recycled]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", live.name]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with write_atomic(tmp_path / "a") as temporary:
            temporary.touch(mode=0o600)
        with write_atomic(tmp_path / "b") as temporary:
            temporary.mkdir(mode=0o700)
            (temporary / "c").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "b/c")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask]


def test_a_folder_moved_away_leaves_its_place_to_another_run(tmp_path):
    out = tmp_path / "out"
    with hold_folder(out):
        out.rename(tmp_path / "moved")
        with hold_folder(out):  # no other run began: the same one goes on
            assert not (out / LOCK).exists()
        (out / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
        with pytest.raises(FolderInUseError, match="process 1 on host elsewhere"):
            with hold_folder(out):
                pass
    assert (out / LOCK).exists()
