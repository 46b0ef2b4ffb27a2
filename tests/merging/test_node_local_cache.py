"""The nodes' own disks, and who tidies them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import patience, token, until, within  # noqa: F401 (fixtures that every test has)

from mergelab.core.errors import InputError, StepError
from mergelab.merging import node_local_cache

OURS = node_local_cache.own_name("task-")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(1000))
    os.utime(folder / "weights", (1_000_000_000, 1_000_000_000))
    return folder


def left_on(disk: Path) -> list[str]:
    return sorted(
        str(p.relative_to(disk)) for p in disk.rglob("*") if p.name != node_local_cache.own_name("models")
    )


def test_a_copy_is_the_model_with_its_times(disk: Path, model: Path) -> None:
    with node_local_cache.for_task(str(disk), "57-0"):
        copy = node_local_cache.copy_of(model)
        assert disk in copy.parents and node_local_cache.copy_of(model) == copy
        assert (copy / "weights").read_bytes() == bytes(1000)
        assert (copy / "weights").stat().st_mtime == 1_000_000_000
        assert {p.name for p in copy.iterdir()} == {"config.json", "weights"}
        mine = node_local_cache.folder()
        assert mine is not None and mine.is_dir() and disk in mine.parents
        (mine / "written").touch()
    assert left_on(disk) == []
    assert node_local_cache.folder() is None and node_local_cache.copy_of(model) == model


def test_a_model_that_has_changed_is_another_copy(disk: Path, model: Path) -> None:
    with node_local_cache.for_task(str(disk), "57-0"):
        before = node_local_cache.copy_of(model)
        (model / "weights").write_bytes(bytes(1001))
        after = node_local_cache.copy_of(model)
    assert before != after


def test_a_links_target_is_copied(disk: Path, model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"  # as the hub's cache has them
    snapshot.mkdir()
    (snapshot / "weights").symlink_to(model / "weights")
    with node_local_cache.for_task(str(disk), "57-0"):
        assert not (node_local_cache.copy_of(snapshot) / "weights").is_symlink()


@pytest.mark.parametrize("nowhere", [None, ""])
def test_without_a_folder_everything_stays_where_it_is(model: Path, nowhere: str | None) -> None:
    with node_local_cache.for_task(nowhere, "57-0"):
        assert node_local_cache.copy_of(model) == model and node_local_cache.folder() is None


USER = """
import sys, time
from pathlib import Path
from mergelab.merging import node_local_cache
disk, model, go, name = sys.argv[1:]
with node_local_cache.for_task(disk, name):
    print(node_local_cache.copy_of(Path(model)), flush=True)
    (node_local_cache.folder() / "written").touch()
    while not Path(go).exists():
        time.sleep(0.02)
"""


@pytest.fixture
def user(disk: Path, model: Path, tmp_path: Path) -> Iterator[Callable[[str], tuple[Any, Path, Path]]]:
    """`user("58-0")`: another process that uses the disk; its copy, and the file that ends it."""
    processes = []

    def start(name: str) -> tuple[Any, Path, Path]:
        go = tmp_path / f"go-{name}"
        process = subprocess.Popen(
            [sys.executable, "-c", USER, str(disk), str(model), str(go), name],
            text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        copy = Path(process.stdout.readline().strip())
        until((disk / f"{OURS}{name}" / "written").exists)
        return process, copy, go

    yield start
    for process in processes:
        process.kill()
        process.communicate()


User = Callable[[str], tuple[Any, Path, Path]]


def test_two_users_share_a_copy_and_the_last_one_out_removes_it(disk: Path, model: Path, user: User) -> None:
    process, theirs, go = user("58-0")
    with within(5), node_local_cache.for_task(str(disk), "57-0"):
        copy = node_local_cache.copy_of(model)
        assert copy == theirs
        go.touch()
        assert process.wait(30) == 0
        assert (copy / "weights").exists()  # they are gone, we are not
        assert not (disk / f"{OURS}58-0").exists()
    assert left_on(disk) == []


def test_the_first_one_out_leaves_the_copy(disk: Path, model: Path, user: User) -> None:
    process, theirs, go = user("58-0")
    with within(5), node_local_cache.for_task(str(disk), "57-0"):
        node_local_cache.copy_of(model)
    assert (theirs / "weights").exists() and (disk / f"{OURS}58-0" / "written").exists()
    go.touch()
    assert process.wait(30) == 0
    assert left_on(disk) == []


@pytest.mark.parametrize("by", ["the next task", "the batch script"])
def test_what_a_killed_process_leaves_is_removed(disk: Path, user: User, by: str) -> None:
    process, theirs, _ = user("58-0")
    process.kill()
    process.wait(30)
    assert (theirs / "weights").exists() and (disk / f"{OURS}58-0").exists()
    if by == "the next task":
        with node_local_cache.for_task(str(disk), "59-0"):
            assert left_on(disk) == [f"{OURS}59-0", f"{OURS}59-0{node_local_cache.LOCK}"]
    else:
        subprocess.run([sys.executable, "-m", "mergelab.merging.node_local_cache", str(disk)], check=True)
    assert left_on(disk) == []


def test_half_a_copy_is_no_copy_and_is_tidied_away(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, to: Path) -> None:
        Path(to).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copy2", broken)
    with pytest.raises(KeyboardInterrupt), node_local_cache.for_task(str(disk), "57-0"):
        node_local_cache.copy_of(model)
    assert not [p for p in (disk / node_local_cache.own_name("models")).iterdir() if p.suffix == ""]


def test_somebody_elses_files_are_left_alone(disk: Path, model: Path) -> None:
    (disk / "thesis.tex").write_text("all my work")
    (disk / "mergelab-thesis").mkdir()
    with node_local_cache.for_task(str(disk), "57-0"):
        node_local_cache.copy_of(model)
    assert left_on(disk) == ["mergelab-thesis", "thesis.tex"]


def test_variables_of_the_node_are_filled_in(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODES_OWN_DISK", str(disk))
    with node_local_cache.for_task("$NODES_OWN_DISK", "57-0"):
        assert disk in node_local_cache.copy_of(model).parents


@pytest.mark.parametrize("name", ["nowhere", "model/weights"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, model: Path, name: str) -> None:
    with (
        pytest.raises(InputError, match=rf"hardware\.scratch: {tmp_path / name} is not a folder"),
        node_local_cache.for_task(str(tmp_path / name), "57-0"),
    ):
        raise AssertionError


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(node_local_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_room_is_told_before_anything_is_copied(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 1001)
    with (
        node_local_cache.for_task(str(disk), "57-0"),
        pytest.raises(StepError, match=r"hardware\.scratch: a copy needs 1\.0 kB, but"),
    ):
        node_local_cache.copy_of(model)
    assert not list(disk.rglob("weights"))


def test_just_enough_room_is_enough(disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 1002)
    with node_local_cache.for_task(str(disk), "57-0"):
        assert node_local_cache.copy_of(model) != model


AGAIN = """
import shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
from mergelab.core.errors import StepError
from mergelab.merging import node_local_cache
shutil.disk_usage = lambda path: SimpleNamespace(free=0)
with node_local_cache.for_task(sys.argv[1], "57-0"):
    for _ in range(2):
        signal.alarm(3)
        try:
            node_local_cache.copy_of(Path(sys.argv[2]))
        except StepError:
            print("no room", flush=True)
"""


def test_too_little_room_is_told_to_the_next_candidate_of_the_task_too(disk: Path, model: Path) -> None:
    command = [sys.executable, "-c", AGAIN, str(disk), str(model)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("no room\n" * 2, 0)


OTHER = """
import os, sys
from pathlib import Path
from mergelab.merging import node_local_cache
os.setgid(65534), os.setuid(65534)
with node_local_cache.for_task(sys.argv[1], "58-0"):
    print(node_local_cache.copy_of(Path(sys.argv[2])))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
def test_two_users_of_the_node_do_not_get_into_each_others_way() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to others
        top, disk, model = Path(name), Path(name) / "disk", Path(name) / "model"
        top.chmod(0o755)
        model.mkdir()
        (model / "weights").touch()
        disk.mkdir()
        disk.chmod(0o1777)
        with node_local_cache.for_task(str(disk), "57-0"):
            node_local_cache.copy_of(model)
            subprocess.run([sys.executable, "-c", OTHER, str(disk), str(model)], check=True,
                           stderr=subprocess.DEVNULL)  # fmt: skip
