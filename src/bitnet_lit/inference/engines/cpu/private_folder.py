"""Whether a folder holds only what this user put there.

Code that is loaded from a folder runs with the rights of who loads it. So the folder must belong to the user, nobody
else may write there, and nobody else may put another folder in its place: each folder above belongs to the user or to
root, and is written by its owner alone, or lets only owners rename what lies in it (the sticky bit of /tmp).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def _users_own_group(gid: int) -> bool:
    """Whether a group is the user's private one, which many systems make for each user: by its name, without other
    members. Folders that its group can write are common there."""
    try:
        name, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


def why_not_private(folder: Path) -> str | None:
    """The reason why others can change what lies in `folder`; None where they cannot.

    Args:
        folder: exists, and holds no symbolic link: see `Path.resolve`.

    Raises:
        OSError: it cannot be looked at.
    """
    user = os.getuid()
    for place in (folder, *folder.parents):
        status = place.stat()
        if status.st_uid != user and (place == folder or status.st_uid != 0):
            return f"{place} belongs to another user"
        by_group = status.st_mode & stat.S_IWGRP and not _users_own_group(status.st_gid)
        sticky = place != folder and status.st_mode & stat.S_ISVTX
        if (by_group or status.st_mode & stat.S_IWOTH) and not sticky:
            return f"{place} can be written by others (chmod go-w {place})"
    return None


def make_private(folder: Path) -> Path:
    """Make `folder`, and what is missing above it, for the user alone; returns its path without symbolic links.

    Raises:
        OSError: it cannot be made there.
    """
    folder = folder.resolve()
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)
    return folder
