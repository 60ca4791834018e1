"""Atomic replacement of a whole folder: a save is there in full, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from jaxmodel.errors import InputError
from jaxmodel.files import check_writable

# the file that identifies a folder of weights, or of adapters alone
BUNDLE = "config.json"
ADAPTERS = "adapter_config.json"

# The files that a folder may contain if a save replaces it: those of a bundle, as we or
# transformers write them.
_REPLACED = re.compile(
    r"(config|jaxmodel|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|merges\.txt|vocab\.txt|chat_template\.jinja"
    r"|spiece\.model|adapter_config\.json|adapter_model\.safetensors|\.DS_Store"
    r"|tokenizer\.model|chat_template\.json|additional_chat_templates"
    r"|modules\.json|1_Pooling|2_Normalize|sentence_bert_config\.json|config_sentence_transformers\.json"
)


def check_target(folder: str | Path, kind: str = BUNDLE) -> Path:
    """Return the path of a bundle saved to `folder`; call it before the expensive work.

    Args:
      folder: where to save.
      kind: the file that identifies what is saved and what may be replaced: a bundle, or adapters
        alone.

    Raises:
      InputError: a file, or a folder with something other than a bundle (or adapters alone).
    """
    target = Path(os.path.realpath(folder))  # a link stays one
    if target.exists() and not target.is_dir():
        raise InputError(f"out: {str(folder)!r} is a file; allowed: a folder")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    other = [name for name in there if not _REPLACED.fullmatch(name)]
    if kind == ADAPTERS and BUNDLE in there:
        other = [BUNDLE]
    if other or (there and kind not in there):
        what = "a bundle" if kind == BUNDLE else "adapters alone"
        what = (
            f"{other[0]!r}, which is not a file of {what}"
            if other
            else f"no {kind}, so no {what.removeprefix('a ')}"
        )
        raise InputError(f"out: {str(folder)!r} holds {what}; choose an empty or new folder")
    try:
        check_writable(target.parent)
    except OSError as error:
        raise InputError(
            f"out: {str(folder)!r} cannot be made ({error.strerror}); choose a place in a "
            f"writable folder"
        ) from None
    return target


@contextlib.contextmanager
def replacing(folder: Path, kind: str = BUNDLE) -> Iterator[Path]:
    """Yield a new folder, which replaces `folder` if the block succeeds, else is removed."""
    beside = None
    try:
        target = check_target(folder, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        beside = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}")
        beside.mkdir()
        mode = beside.stat().st_mode & 0o666  # the permissions that the umask gives a new file
        yield beside
        for path in beside.iterdir():
            path.chmod(mode)  # safetensors makes its files readable by their owner alone
        if target.is_dir():
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        for path in [*beside.iterdir(), beside]:
            _sync(path)
        if target.is_dir():
            _exchange(beside, target)  # now the old folder is the one beside
        else:
            beside.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"out: {str(folder)!r} cannot be written: {error}; its content is unchanged"
        ) from error
    finally:
        if beside is not None and beside.exists():
            shutil.rmtree(beside, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.new-{platform.node()}-{os.getpid()}-"


def _clear_abandoned(target: Path) -> None:
    """Remove what earlier saves to this place left behind when killed on this machine."""
    for path in target.parent.glob(
        f".{glob.escape(target.name)}.new-{glob.escape(platform.node())}-*"
    ):
        process = path.name.rsplit("-", 2)[1]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):
            continue  # owned by someone else


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders, on Linux atomically, so that a crash leaves one of them."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError, TypeError):
        if ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
            return
    aside = one.with_name(f"{one.name}-old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)
