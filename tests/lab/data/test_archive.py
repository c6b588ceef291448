from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from intrafusion.lab.data.archive import find_archive, is_archive, unpack
from intrafusion.lab.data.images import locate
from intrafusion.lab.errors import LabError


def test_unpacks_once_and_again_after_a_change(image_root: Path, make_archive, own_cache: Path) -> None:
    archive = make_archive(image_root)
    folder = unpack(archive)
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train"]
    assert own_cache in folder.parents
    (folder / "mark").touch()
    assert unpack(archive) == folder
    assert (folder / "mark").exists()
    os.utime(archive, (1, 1))
    assert unpack(archive) != folder


@pytest.mark.parametrize("prefix", ["", "./", "cifar10/"])
def test_located_from_folder_archive_and_folder_of_archive(image_root: Path, make_archive, prefix: str) -> None:
    archive = make_archive(image_root, prefix)
    assert locate(image_root) == image_root
    found = locate(archive)
    assert locate(archive.parent) == found
    assert sorted(path.name for path in (found / "train").iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize("name", ["../evil", "train/../../evil", "../../../../../../tmp/evil"])
def test_a_path_out_of_the_folder_is_refused(make_archive, own_cache: Path, name: str) -> None:
    archive = make_archive(members={"train/cat/1.txt": b"x", name: b"evil"})
    with pytest.raises(LabError, match=rf"^{archive} is not safe to unpack: .*outside the destination"):
        unpack(archive)
    assert not list(own_cache.rglob("evil"))
    assert not list((own_cache / "unpacked").iterdir())


def test_an_absolute_path_lands_inside(make_archive, own_cache: Path) -> None:
    folder = unpack(make_archive(members={"/intrafusion_test_absolute": b"x"}))
    assert (folder / "intrafusion_test_absolute").exists()
    assert not Path("/intrafusion_test_absolute").exists()


def test_a_link_out_of_the_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    for kind, target in ((tarfile.SYMTYPE, "../../outside"), (tarfile.LNKTYPE, "/etc/passwd"), (tarfile.CHRTYPE, "")):
        path = tmp_path / "bad.tar"
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, target
            tar.addfile(info)
        with pytest.raises(LabError, match=r"is not safe to unpack|is truncated or not a tar archive"):
            unpack(path)


def test_truncated_and_fake_archives(image_root: Path, make_archive, own_cache: Path, tmp_path: Path) -> None:
    whole = make_archive(image_root).read_bytes()
    for name, content in (
        ("short.tar.gz", whole[: len(whole) // 2]),
        ("fake.tar.gz", b"hello"),
        ("empty.tar", b""),
        ("flipped.tar.gz", whole[:2000] + b"\0" * 200 + whole[2200:]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(LabError, match=rf"^{path} is (truncated|damaged)"):
            unpack(path)
    assert not list((own_cache / "unpacked").iterdir())


def test_several_archives_are_not_guessed_between(make_archive, tmp_path: Path) -> None:
    make_archive(members={"x": b""}, name="one.tar.gz")
    folder = make_archive(members={"x": b""}, name="two.tgz").parent
    with pytest.raises(LabError, match=r"holds several archives \(one.tar.gz, two.tgz\); give the path of one"):
        find_archive(folder)
    assert is_archive(folder / "two.tgz")
    assert not is_archive(folder)


def test_root_without_anything(tmp_path: Path, make_archive) -> None:
    with pytest.raises(LabError, match="does not exist"):
        locate(tmp_path / "nowhere")
    with pytest.raises(LabError, match=r"holds neither the folders train/ and test/ nor a \.tar"):
        locate(tmp_path)
    with pytest.raises(LabError, match="does not hold the folders train/ and test/"):
        locate(make_archive(members={"readme": b"x"}))
    (tmp_path / "file.txt").write_bytes(io.BytesIO(b"x").read())
    with pytest.raises(LabError, match="holds neither"):
        locate(tmp_path / "file.txt")
