"""Paths that people give, and files that appear whole or not at all. Text is UTF-8, whatever the locale."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

from jaxdqn.errors import UserError

LONGEST = 3_800  # bytes of a directory's path: files in it have longer ones, and 4,096 is the system's limit
HALF_WRITTEN = (".writing-", ".part-")  # how names of files begin that a killed process may leave; once the second
MAX_SUFFIX = 16


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path` with the home directory for a leading ~. Raises `UserError` where there is none, and for what no file of
    every library that we write with can be called."""
    path = pathlib.Path(path)
    if "\0" in str(path):
        raise UserError(f"the path {str(path)!r} has a null character.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {str(path)!r} is not UTF-8; rename it.") from None
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home directory is known for {path.parts[0]}; give an absolute path.") from None


def make(path: pathlib.Path) -> list[pathlib.Path]:
    """Makes a directory, and its parents; returns those that were not there, the outermost first.

    Raises OSError, and leaves nothing behind then.
    """
    made: list[pathlib.Path] = []
    try:
        for folder in [*(parent for parent in reversed(path.parents) if not parent.exists()), path]:
            try:
                folder.mkdir()
                made.append(folder)
            except FileExistsError:  # perhaps because another process was quicker
                if not folder.is_dir():
                    raise
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(made: Sequence[pathlib.Path]) -> None:
    """Removes directories, the innermost of which comes last, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()


def flat(name: str) -> str:
    """The name of an environment as that of a folder, or as a part of it: octax/brix as octax-brix."""
    return name.replace("/", "-")


@contextlib.contextmanager
def fresh(stem: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a directory that was not there: `stem`, or where that is taken (by a process of the same second, say)
    `stem`-2, and so on. It is removed again where it stays empty."""
    made = make(stem.parent)
    path, number = stem, 1
    while True:
        try:
            path.mkdir()
            break
        except FileExistsError:
            number += 1
            path = stem.with_name(f"{stem.name}-{number}")
    try:
        yield path
    finally:
        remove_empty([*made, path])


def check_file(path: pathlib.Path) -> None:
    """Raises `UserError` where a file cannot be written at `path`, which may be there; call it before the work."""
    _check_kind(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: {path.parent} is no directory.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write in {path.parent}.")


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls write(temporary path) and moves the result to `path`: readers see the old file or the new one.

    Only a regular file is replaced, or a link itself: where it leads to is for its owner to say, see `followed`. Raises
    `UserError` for anything else.
    """
    _check_kind(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= MAX_SUFFIX else ""
    handle, name = tempfile.mkstemp(prefix=HALF_WRITTEN[0], suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    umask = os.umask(0)
    os.umask(umask)
    try:
        temporary.chmod(0o666 & ~umask)  # mkstemp's are private
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_atomically` of text."""
    # Names of files may hold bytes that are no text.
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def remove_half_written(folder: pathlib.Path) -> None:
    """Removes what processes that were killed left in `folder`; for who alone may write there."""
    for name in os.listdir(folder) if folder.is_dir() else []:
        if name.startswith(HALF_WRITTEN) and (folder / name).is_file():
            (folder / name).unlink(missing_ok=True)


def followed(path: pathlib.Path) -> pathlib.Path:
    """Where a path that a person gave leads to: of a link, what it points to. Raises `UserError` as `check_file`."""
    _check_kind(path)
    return pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path


def _check_kind(path: pathlib.Path) -> None:
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or pipe"
        raise UserError(f"cannot write {path}: it is {kind}. Give the name of a file.")
    target = path.parent / os.readlink(path) if path.is_symlink() else path
    # /dev/stdout, where that goes to a file, which must not be exchanged for another.
    if any(os.path.realpath(place.parent).startswith("/proc/") for place in (path, target)):
        raise UserError(f"cannot write {path}: it is an open stream. Give the name of a file.")
