"""The file that holds how fast machines are, so that every process decides alike.

`$ZIPVL_CACHE_DIR/machines.json`, or `zipvl/machines.json` in `$XDG_CACHE_HOME` or `~/.cache`. One entry for each device
and dtype, set of versions, and number of threads; `zipvl measure` shows and renews it. Processes that start at once
agree: one holds the lock and measures, the others wait and read what it wrote. So do the ranks of one node, and of a
cluster whose nodes share the folder; where they do not, copy the file or set `min_tokens`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from zipvl_compile.passes.cost_model import Machine

log = logging.getLogger("zipvl_compile")
#: To be raised whenever other things are measured, or in another way: older entries are measured anew.
MEASURING = 2
WAIT = 300.0  # seconds for another process that measures


class NoPlace(OSError):
    """The file can neither be read nor written."""


@dataclass(frozen=True)
class Key:
    """What a speed depends on: where one of these differs, it is measured anew.

    Attributes:
        device: name of the GPU, or of the CPU.
        host: of a GPU, the name of the CPU that feeds it; empty for a CPU.
        capability: compute capability of a GPU, or the vector instructions of a CPU.
        cores, threads: of the CPU, and those that PyTorch uses; 0 for a GPU.
        dtype: such as "bfloat16".
        torch, triton: versions.
        measuring: version of the way of measuring.
    """

    device: str
    host: str
    capability: str
    cores: int
    threads: int
    dtype: str
    torch: str
    triton: str
    measuring: int = MEASURING

    def __str__(self) -> str:
        size = f", {self.cores} cores, {self.threads} threads" if self.cores else ""
        return f"{self.device}{size}, {self.dtype}"


@dataclass(frozen=True)
class Entry:
    """One speed of the file, and where it comes from: "measured 2026-11-27", or why it was not."""

    speed: Machine
    origin: str


def key_of(device: torch.device, dtype: torch.dtype) -> Key:
    """Return what the speed of a device for tensors of a dtype depends on."""
    name, cpu = str(dtype).removeprefix("torch."), _cpu()
    versions = (torch.__version__, _version("triton"))
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return Key(cpu, "", capability, os.cpu_count() or 1, torch.get_num_threads(), name, *versions)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Key(torch.cuda.get_device_name(device), cpu, capability, 0, 0, name, *versions)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def path() -> Path:
    """Return where the file is, or would be.

    Raises:
        NoPlace: no folder is named, and the user has no home.
    """
    if folder := os.environ.get("ZIPVL_CACHE_DIR"):
        return Path(folder) / "machines.json"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise NoPlace(f"{error} Set ZIPVL_CACHE_DIR.") from error
    return base / "zipvl" / "machines.json"


def read(key: Key) -> Entry | None:
    """Return what the file says of a machine; None, with a warning, where it cannot be understood."""
    return _load(log.warning)[0].get(key)


def agree(key: Key, measure: Callable[[], Entry], renew: bool = False) -> Entry:
    """Return what the file says of a machine; where it says nothing yet, measure and write.

    Args:
        key: of the machine.
        measure: called by one process at a time.
        renew: measure whatever the file says.

    Raises:
        NoPlace: the file cannot be written; then nothing is measured.
    """
    entry = None if renew else read(key)
    if entry is not None:
        return entry
    with _locked() as file:
        entry = None if renew else _load()[0].get(key)  # another process may have written it meanwhile
        if entry is None:
            entry = measure()
            entries, others = _load()
            _write(file, entries | {key: entry}, others)
    return entry


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    file = path()
    lock = FileLock(f"{file}.lock", timeout=WAIT)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # before the seconds of measuring, not after them
            pass
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:
        raise NoPlace(f"{file} cannot be written ({str(error).partition(chr(10))[0]})") from error
    try:
        yield file
    finally:
        lock.release()


def _write(file: Path, entries: dict[Key, Entry], others: list[Any]) -> None:
    """Write everything at once: readers see the old file or the new one, never a part."""
    rows = [asdict(key) | {"origin": entry.origin, "speed": asdict(entry.speed)} for key, entry in entries.items()]
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False, encoding="utf-8") as new:
            json.dump({"machines": [*others, *rows]}, new, indent=1)
        os.chmod(new.name, 0o644)  # a temporary file is its owner's alone
        os.replace(new.name, file)
    except OSError as error:
        raise NoPlace(f"{file} cannot be written ({error})") from error


def _load(say: Callable[..., None] = log.debug) -> tuple[dict[Key, Entry], list[Any]]:
    """Return the entries of the file, and the rows of other versions of this package, which stay as they are."""
    file = path()
    entries: dict[Key, Entry] = {}
    others: list[Any] = []
    try:
        for row in json.loads(file.read_text(encoding="utf-8"))["machines"]:
            if row["measuring"] != MEASURING:
                others.append(row)
                continue
            key, entry = _entry(row)
            entries[key] = entry
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say("zipvl cannot understand %s (%s: %s), and measures anew", file, type(error).__name__, error)
    return entries, others


def _entry(row: dict[str, Any]) -> tuple[Key, Entry]:
    speed = {field.name: float(row["speed"][field.name]) for field in fields(Machine)}
    if not all(math.isfinite(x) and x >= 0 for x in speed.values()) or speed["attend"] == 0:
        raise ValueError(f"no speed: {speed}")
    return Key(**{field.name: row[field.name] for field in fields(Key)}), Entry(Machine(**speed), str(row["origin"]))


def today() -> str:
    """Return the origin of what is measured now."""
    return f"measured {datetime.date.today().isoformat()}"


def rounded(speed: Machine) -> Machine:
    """Return a speed with numbers of two binary digits: 1, 1.5, 2, 3, 4, 6, ... times a power of two."""
    return Machine(**{name: _two_digits(value) for name, value in asdict(speed).items()})


def _two_digits(value: float) -> float:
    if value <= 0:
        return 0.0
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    return math.ldexp(min((0.5, 0.75, 1.0), key=lambda step: abs(math.log(mantissa / step))), exponent)
