"""Where a source tree of vLLM comes from: what is installed, a folder, a wheel or sdist, or a version to be fetched.

Of a wheel that is not here only the files that are looked at are read, by ranges of bytes: a CUDA wheel has hundreds of
megabytes. pip says where it is.
"""

from __future__ import annotations

import http
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from urllib.response import addinfourl

from vllm_adrenaline.errors import AdrenalineError

PACKAGE = "vllm"
CHUNK = 1 << 20
"""Bytes that are read at once of what is not here."""
TIMEOUT_S = 120


class Files(Mapping[str, str]):
    """The texts of Python files by path, each read when it is asked for.

    Attributes:
        paths: the path within the tree, such as "vllm/…", and what `read` takes for it.
    """

    def __init__(self, paths: Mapping[str, str], read: Callable[[str], bytes]) -> None:
        self.paths, self._read = paths, read

    def __getitem__(self, path: str) -> str:
        return self._read(self.paths[path]).decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def installed() -> Mapping[str, str]:
    """Return the installed vLLM. It is found without being imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise AdrenalineError("no vLLM is installed here: name a version, or a folder, wheel or sdist of one")
    return folder(Path(spec.origin).parent.parent)


def folder(path: Path) -> Mapping[str, str]:
    """Return the tree in a folder that has the folder `vllm`."""
    return _checked(python_files(path, PACKAGE), str(path))


def python_files(path: Path, package: str) -> Files:
    """Return the files of a package in a folder."""
    files = {str(each.relative_to(path)): str(each) for each in (path / package).rglob("*.py")}
    return Files(files, lambda name: Path(name).read_bytes())


def wheel(file: Path | io.RawIOBase, name: str) -> Mapping[str, str]:
    """Return the tree in a wheel."""
    archive = zipfile.ZipFile(io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file)
    names = [each for each in archive.namelist() if each.endswith(".py")]
    return _checked(Files({each: each for each in names}, archive.read), name)


def sdist(path: Path) -> Mapping[str, str]:
    """Return the tree in an sdist."""
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            _, _, inner = member.name.partition("/")
            if inner.startswith(f"{PACKAGE}/") and inner.endswith(".py") and (file := archive.extractfile(member)):
                texts[inner] = file.read().decode()
    return _checked(texts, str(path))


def _checked(files: Mapping[str, str], name: str) -> Mapping[str, str]:
    if f"{PACKAGE}/__init__.py" not in files:
        raise AdrenalineError(f"{name} has no {PACKAGE}/__init__.py: it is no source tree of vLLM")
    return files


def local(path: Path) -> Mapping[str, str]:
    """Return the tree in a folder, wheel or sdist, whichever is at `path`."""
    if path.is_dir():
        return folder(path)
    return wheel(path, str(path)) if path.suffix in (".whl", ".zip") else sdist(path)


def fetched(version: str) -> Mapping[str, str]:
    """Return the tree of a version that pip finds. Of a wheel only what is looked at is read.

    Raises:
        AdrenalineError: pip finds none, or it cannot be read.
    """
    wanted = f"{PACKAGE}=={version}" if version.count(".") > 1 else f"{PACKAGE}=={version}.*"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", "--no-deps"]
    command += ["--ignore-installed", "--only-binary", ":all:", wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10 * TIMEOUT_S)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise AdrenalineError(f"pip finds no wheel of {wanted}: {reason[-1] if reason else 'it does not say why'}")
    found = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    try:
        return wheel(Remote(found), found)
    except (OSError, zipfile.BadZipFile) as error:
        raise AdrenalineError(f"{found} cannot be read ({error}): download it, and name the file") from None


class Remote(io.RawIOBase):
    """A file on a server, read in chunks when they are needed.

    Attributes:
        url: where it is.
        size: in bytes.
        fetched: bytes that were read of it.
    """

    def __init__(self, url: str) -> None:
        self.url, self.fetched, self._at = url, 0, 0
        self._chunk = lru_cache(maxsize=64)(self._fetch)
        if not url.startswith(("https://", "http://")):
            raise OSError("it is at no address of a server")
        with self._ask(0, 0) as answer:
            self.size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _ask(self, first: int, last: int) -> addinfourl:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"})
        answer: addinfourl = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            answer.close()
            raise OSError("the server gives no parts of it")
        return answer

    def _fetch(self, index: int) -> bytes:
        with self._ask(index * CHUNK, min((index + 1) * CHUNK, self.size) - 1) as answer:
            data: bytes = answer.read()
        self.fetched += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self.size:
            return 0
        index, offset = divmod(self._at, CHUNK)
        data = self._chunk(index)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
