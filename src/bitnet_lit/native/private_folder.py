"""Whether a folder holds only what this user put there.

Code that is loaded from a folder runs with the rights of the user who loads it. So the folder must belong to that user,
and nobody else may write in it or put another folder in its place. The second holds if each folder above belongs to the
user or to root, and either only its owner can write in it or only owners can rename its entries (the sticky bit, as
in /tmp).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def _users_own_group(gid: int) -> bool:
    """Whether a group is the user's private one: it has the user's name and no other members. Many systems make such a
    group for each user, and folders that the group can write are common there."""
    try:
        name, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


def why_not_private(folder: Path) -> str | None:
    """The reason why other users can change what is in `folder`; None where they cannot.

    Args:
        folder: an existing folder, as a path without symbolic links: see `Path.resolve`.

    Raises:
        OSError: the status of the folder, or of one above, cannot be read.
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
    """Make `folder`, and missing folders above it, with access for the user alone.

    Returns:
        The path of the folder without symbolic links.

    Raises:
        OSError: it cannot be made there.
    """
    folder = folder.resolve()
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)
    return folder
