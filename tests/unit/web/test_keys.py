"""The key of a dashboard's cookies outlives the process, and is nobody else's."""

from __future__ import annotations

import os
import stat

import pytest

from koan_ray.config import Settings
from koan_ray.web.keys import session_key


def settings(path, **more):
    return Settings(web={"session_key_file": str(path), **more}).web


def test_the_next_process_finds_the_key_of_the_one_before(tmp_path):
    web = settings(tmp_path / "new" / "session.key")
    key = session_key(web)
    assert len(key) == 32
    assert session_key(web) == key
    assert stat.S_IMODE(os.stat(web.session_key_file).st_mode) == 0o600
    assert os.listdir(tmp_path / "new") == ["session.key"]


def test_a_key_of_the_settings_needs_no_file(tmp_path):
    web = settings(tmp_path / "session.key", session_key="k" * 30)
    assert session_key(web) == b"k" * 30
    assert os.listdir(tmp_path) == []


def test_without_a_file_each_process_has_its_own():
    web = settings("")
    assert session_key(web) != session_key(web)


@pytest.mark.parametrize("spoil", ["readable", "short", "link", "directory"])
def test_a_file_that_cannot_be_trusted_is_left_alone(tmp_path, spoil):
    path = tmp_path / "session.key"
    if spoil == "directory":
        path.mkdir()
    elif spoil == "link":
        (tmp_path / "other").write_bytes(b"x" * 32)
        path.symlink_to(tmp_path / "other")
    else:
        path.write_bytes(b"x" * (32 if spoil == "readable" else 5))
        path.chmod(0o644 if spoil == "readable" else 0o600)
    web = settings(path)
    assert session_key(web) != session_key(web)
    assert path.exists()
