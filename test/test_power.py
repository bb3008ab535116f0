"""A power cut at any moment: of what was written, the disk has only what was flushed.

The disk is modelled as strictly as POSIX allows. A file has the bytes that it had at its last fsync, and none before
the first. A folder has either the names that it had at its last fsync, or, since a disk may be quicker than asked,
those that it has now.
"""

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from mishaps import complete, content, ended, quantize, start
from tiny import save_tiny, tiny_llama


class Disk:
    """Records what is flushed under a folder, and the names in it before every change that is not flushed at once."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.moments = root, []
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._open: list[int] = []  # keeps the numbers of removed files from being used again
        monkeypatch.setattr(os, "fsync", self._watch(os.fsync, self._flushed))
        for name in ("rename", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watch(getattr(os, name), None))

    def _watch(self, real, after):
        def called(*args, **kwargs):
            self.moments.append((self._living(), dict(self._names), dict(self._bytes)))
            result = real(*args, **kwargs)
            if after is not None:
                after(*args)
            return result

        return called

    def _flushed(self, handle: int) -> None:
        self._open.append(os.dup(handle))
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = names(handle)
        else:
            with open(f"/proc/self/fd/{handle}", "rb") as file:
                self._bytes[found.st_ino] = file.read()

    def _living(self) -> dict[int, dict[str, int]]:
        """Folder → names of everything that there is now."""
        found = {os.stat(folder).st_ino: names(folder) for folder, _, _ in os.walk(self.root)}
        for folder, _, files in os.walk(self.root):
            self._open += [os.open(Path(folder) / name, os.O_RDONLY) for name in files]
        return found

    def after_cut(self, moment: int, strict: bool, target: Path) -> Path:
        """What is on the disk, as a folder."""
        living, flushed, data = self.moments[moment]
        self._restore(os.stat(self.root).st_ino, flushed if strict else living, data, living, target)
        return target

    def _restore(self, number: int, listed: dict, data: dict, living: dict, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for name, child in listed.get(number, {}).items():
            if child in self._folders:
                self._restore(child, listed, data, living, target / name)
            else:
                (target / name).write_bytes(data.get(child, b""))

    @property
    def _folders(self) -> set[int]:
        return {number for living, flushed, _ in self.moments for number in (*living, *flushed)}

    def close(self) -> None:
        for handle in self._open:
            os.close(handle)


def names(folder) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """An undisturbed run over an older artifact, recorded: (model, older, newer, disk)."""
    folder = tmp_path_factory.mktemp("power")
    model = save_tiny(tiny_llama(), folder / "tiny")
    root = folder / "disk"
    root.mkdir()
    older = content(quantize(model, root / "out", seed=1))
    with pytest.MonkeyPatch.context() as patched:
        disk = Disk(root, patched)
        for parent, _, files in os.walk(root, topdown=False):  # what the earlier run left is on the disk by now
            for path in (*(Path(parent) / name for name in files), Path(parent)):
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        disk.moments.clear()
        newer = content(quantize(model, root / "out"))
        disk._watch(lambda: None, None)()
    yield model, older, newer, disk
    disk.close()


@pytest.mark.parametrize("strict", [True, False])
def test_what_looks_complete_is_complete(cut, tmp_path, strict):
    _, older, newer, disk = cut
    seen = []
    for moment in range(len(disk.moments)):
        found = complete(disk.after_cut(moment, strict, tmp_path / "disk"))
        seen += [content(folder) for folder in found]
        assert all(now in (older, newer) for now in seen[-1:]), moment
        assert found or (tmp_path / "disk/out/tiny-w2g32.replaced").exists(), moment
        shutil.rmtree(tmp_path / "disk")
    assert older != newer and seen[0] == older and seen[-1] == newer and len(disk.moments) > 20


@pytest.mark.parametrize("strict", [True, False])
def test_a_run_goes_on_after_the_cut(cut, tmp_path, strict):
    model, _, newer, disk = cut
    total = len(disk.moments)
    for moment in (total // 8, total // 3, total * 2 // 3, total - 3, total - 1):
        out = disk.after_cut(moment, strict, tmp_path / str(moment)) / "out"
        assert content(quantize(model, out)) == newer
        assert [folder.name for folder in complete(out)] == ["tiny-w2g32"]


def test_a_first_run_is_on_the_disk_when_it_ends(cut, tmp_path, monkeypatch):
    """With all the folders above it that it made."""
    model, _, newer, _ = cut
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", monkeypatch)
    folder = quantize(model, tmp_path / "disk/a/b/out")
    disk._watch(lambda: None, None)()
    monkeypatch.undo()
    left = disk.after_cut(-1, True, tmp_path / "left") / "a/b/out"
    disk.close()
    assert content(left / folder.name) == newer and (left / folder.name / "report.html").stat().st_size


def test_killed_while_it_writes(cut, tmp_path, monkeypatch):
    """The same for a process alone, whose files the system keeps: at every flush of the export."""
    model, _, newer, disk = cut
    real, total = os.fsync, len(disk.moments)
    for last in (total // 4, total // 3, total // 2):
        calls = []

        def kill(handle, calls=calls, last=last):
            calls.append(handle)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        monkeypatch.setattr(os, "fsync", kill)
        code = ended(start(lambda: quantize(model, tmp_path / "out") and 0))
        assert code in (0, -signal.SIGKILL)
        assert all(content(folder) == newer for folder in complete(tmp_path / "out"))
    monkeypatch.undo()
    assert content(quantize(model, tmp_path / "out")) == newer
