"""The probe as a person runs it: a real process, on a real disk, quick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outsize.errors import OptionError
from outsize.machine.describe import describe
from outsize.machine.file import read_machine
from outsize.machine.find import DESCRIBED, HOLDS, machine_file, this_machine
from outsize.machine.machine import Machine
from outsize.machine.probe import ASSUMED_DISK


def environment(file: Path) -> dict[str, str]:
    return {**os.environ, "OUTSIZE_MACHINE": str(file), "OMP_NUM_THREADS": "1"}


def command(directory: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "outsize", "probe", "--directory", str(directory), *more]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The file of a quick probe, and what it printed; the probed directory was empty before."""
    folder = tmp_path_factory.mktemp("probe")
    disk = folder / "disk"
    disk.mkdir()
    file = folder / "kept" / "machine.toml"
    line = subprocess.check_output(command(disk, "--quick", "--json"), text=True, env=environment(file))
    assert list(disk.iterdir()) == []
    return file, json.loads(line)


def test_what_is_printed_is_what_is_kept(probed: tuple[Path, dict]) -> None:
    file, printed = probed
    machine = read_machine(file)
    assert printed["file"] == str(file)
    assert printed["name"] == machine.name and len(printed["spreads"]) == len(machine.spreads)
    assert machine.origin.startswith("probed quickly")


def test_every_figure_is_positive_and_in_order(probed: tuple[Path, dict]) -> None:
    machine = read_machine(probed[0])
    assert machine.spreads
    for seen in machine.spreads:
        assert 0 < seen.lowest <= seen.median <= seen.highest and seen.times >= 3, seen
    host = machine.processor("host")
    for dtype in ("fp32", "bf16"):
        assert [rows for rows, _ in dict(host.matmul)[dtype].points] == [1, 8, 32, 128, 512, 2048]
        # A product with many rows uses a weight that was fetched once many times over.
        assert host.matmul_rate(dtype, 512) > 2 * host.matmul_rate(dtype, 1)
    assert host.operation_seconds < 1e-3


def test_a_machines_figures_are_the_medians_that_were_seen(probed: tuple[Path, dict]) -> None:
    machine = read_machine(probed[0])
    seen = {one.figure: one.median for one in machine.spreads}
    assert machine.link("disk", "host").bytes_per_second == seen["disk to host"]
    assert machine.link("host", "disk").latency == seen["disk, a small write"]
    assert machine.link("host", "disk").bytes_per_core_second == seen["host to disk, in a second of a core"]
    assert machine.limit("disk") == seen["disk, both ways at once"]
    assert machine.processor("host").matmul_rate("bf16", 32) == seen["host bf16 matmul 32 rows"]
    assert machine.processor("host").update == seen["host fused AdamW"]


def test_the_notes_say_what_was_measured_and_what_cannot_be_seen(probed: tuple[Path, dict]) -> None:
    notes = " ".join(read_machine(probed[0]).notes)
    assert "disk on " in notes and "page cache" in notes and "cannot be seen" in notes


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    disk, file = tmp_path / "disk", tmp_path / "machine.toml"
    disk.mkdir()
    process = subprocess.Popen(command(disk), stderr=subprocess.PIPE, text=True, env=environment(file))
    try:
        wait_for_scratch(process.pid, disk)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said
    assert list(disk.iterdir()) == [] and not file.exists()


def wait_for_scratch(process: int, disk: Path) -> None:
    """Wait until the process has a file of at least 32 MiB open in `disk`; it has no name there."""
    for _ in range(1200):
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                if str(disk) in os.readlink(link) and os.stat(link).st_size >= 32 << 20:
                    return
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError("the probe never wrote to its directory")


def test_a_directory_that_cannot_be_probed_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    done = subprocess.run(
        command(missing, "--quick"), text=True, capture_output=True, env=environment(tmp_path / "machine.toml")
    )
    assert done.returncode == 1 and str(missing) in done.stderr and "--directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_this_machine_is_the_probed_one_with_what_there_is_now(
    probed: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIZE_MACHINE", str(probed[0]))
    machine, kept, now = this_machine(tmp_path), read_machine(probed[0]), describe(tmp_path)
    assert machine.origin == kept.origin and machine.links == kept.links and machine.processors == kept.processors
    assert machine.capacity("host") == now.memory_bytes
    assert abs(machine.capacity("disk") - now.disk_free_bytes) < 4 << 30  # others use this disk too


@pytest.fixture
def unprobed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTSIZE_MACHINE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("unprobed")
def test_without_a_probe_this_machine_is_estimated(tmp_path: Path) -> None:
    assert machine_file() == tmp_path / "outsize" / "machine.toml"
    machine: Machine = this_machine(tmp_path)
    assert machine.origin.startswith("estimated") and "outsize probe" in machine.origin
    assert (
        machine.compute.matmul_rate("bf16", 512) > 0 and machine.link("disk", "host").bytes_per_second != ASSUMED_DISK
    )
    assert not any(path.is_file() and path.stat().st_size > 1 << 20 for path in tmp_path.rglob("*"))
    again = this_machine(tmp_path)  # rates that are measured twice are not the same
    assert (again.links, again.processors, again.origin) == (machine.links, machine.processors, machine.origin)
    (kept,) = (tmp_path / "cache" / "outsize").glob("estimate-*")
    long_ago = time.time() - 2 * HOLDS
    os.utime(kept, (long_ago, long_ago))
    anew = this_machine(tmp_path)
    assert anew.links != machine.links and kept.stat().st_mtime > long_ago
    kept.write_text("[links]")
    assert this_machine(tmp_path).links != anew.links


@pytest.mark.usefixtures("unprobed")
def test_a_disk_that_cannot_be_written_is_assumed(tmp_path: Path) -> None:
    machine = this_machine(Path("/proc"))
    assert not list((tmp_path / "cache").rglob("estimate-*"))
    assert "its disk assumed" in machine.origin and machine.link("disk", "host").bytes_per_second == ASSUMED_DISK


def test_a_file_that_was_asked_for_must_be_there_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIZE_MACHINE", str(tmp_path / "none.toml"))
    with pytest.raises(OptionError, match=r"none\.toml cannot be read"):
        this_machine(tmp_path)
    monkeypatch.setenv("OUTSIZE_MACHINE", str(DESCRIBED / "cxl.toml"))
    with pytest.raises(OptionError, match=r"cxl.*Run `outsize probe` again"):
        this_machine(tmp_path)
