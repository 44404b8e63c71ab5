"""The embedded corpus: source files of the running Python's standard library. No download, 11 to 12 MB."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from .sources import SourceFile, describe

# Test suites are three times as large as the library and say little about it; the others are not the library.
LEFT_OUT = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


def standard_library_files() -> list[SourceFile]:
    """Python files of the standard library in the order of their names.

    Left out are test suites, installed packages, files that are not UTF-8, and build settings of this very
    interpreter (they hold local paths). The character tables in encodings/ are near copies of one another, so they are
    only trained on: a table in the validation text would measure memory.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            path = Path(folder) / name
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and _is_utf8(path):
                relative = path.relative_to(root).as_posix()
                files.append(describe(path, relative, "text", train_only=relative.startswith("encodings/")))
    return sorted(files, key=lambda file: file.name)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True
