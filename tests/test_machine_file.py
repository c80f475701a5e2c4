"""A machine's file: whatever is written is read back equal, and whatever is wrong is refused by its name."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from outsize.errors import OptionError
from outsize.machine.file import read_machine, write_machine
from outsize.machine.find import DESCRIBED, described_machines, find_machine
from outsize.machine.machine import Capacity, Close, Limit, Link, Machine, Nodes, Processor, Rate, Spread, steady

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
RATES = st.floats(1e-3, 1e18)
SIZES = st.integers(1, 2**59)
SECONDS = st.just(0.0) | st.floats(1e-12, 1e3)
CURVES = RATES.map(steady) | st.dictionaries(st.integers(1, 2**39), RATES, min_size=2, max_size=4).map(
    lambda points: Rate(tuple(sorted((float(size), rate) for size, rate in points.items())))
)
SPREADS = st.builds(
    Spread, NAMES, st.sampled_from(["B/s", "FLOP/s", "param/s", "s"]), RATES, RATES, RATES, st.integers(1, 99)
)


def processors(tier: str) -> st.SearchStrategy[Processor]:
    matmul = st.dictionaries(st.sampled_from(["fp32", "bf16", "fp16"]), CURVES).map(lambda rates: tuple(rates.items()))
    counts = st.integers(1, 64)
    return st.builds(Processor, st.just(tier), NAMES, matmul, CURVES, RATES, RATES, st.floats(1e-9, 1), counts, counts)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    others = draw(st.lists(NAMES.filter(lambda name: name not in ("host", "device")), max_size=3, unique=True))
    tiers = ["host", *(["device"] if draw(st.booleans()) else []), *others]
    limits = draw(st.lists(NAMES, max_size=2, unique=True))
    pairs = draw(st.lists(st.tuples(st.sampled_from(tiers), st.sampled_from(tiers)), max_size=4, unique=True))
    shared = st.sampled_from([None, *limits])
    return Machine(
        draw(NAMES),
        tuple(Capacity(tier, draw(SIZES)) for tier in tiers),
        tuple(
            Link(source, target, draw(RATES), draw(SECONDS), draw(shared), draw(st.none() | RATES))
            for source, target in pairs
        ),
        tuple(draw(processors(tier)) for tier in tiers[:2] if tier in ("host", "device")),
        tuple(Limit(name, draw(RATES)) for name in limits),
        draw(st.builds(Nodes, st.integers(1, 99), RATES, SECONDS)),
        draw(st.builds(Close, st.integers(1, 99), RATES, SECONDS)),
        draw(NAMES),
        tuple(draw(st.lists(NAMES, max_size=2))),
        tuple(draw(st.lists(SPREADS, max_size=2))),
    )


@settings(max_examples=150, deadline=None, phases=[Phase.generate])
@given(machines())
def test_what_is_written_is_read_back_equal(machine: Machine) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "machine.toml"
        write_machine(machine, path)
        assert read_machine(path) == machine
        assert os.listdir(path.parent) == ["machine.toml"]


SMALL = """
name = "small"
[capacities]
host = "8GiB"
disk = "1TB"
[limits]
disk = "1.5GB/s"
[[links]]
source = "disk"
target = "host"
bytes_per_second = "1.2GB/s"
latency = "100us"
shared = "disk"
[[processors]]
tier = "host"
name = "two cores"
cores = 2
elementwise = { 1MiB = "80GB/s", 1GiB = "20GB/s" }
copy = "10GB/s"
update = "2.5Gparam/s"
operation_seconds = "2us"
matmul = { fp32 = "200GFLOP/s", bf16 = { 1 = "20GFLOP/s", 512 = "900GFLOP/s" } }
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "mine.toml").write_text(text)
        return tmp_path / "mine.toml"

    return write


def test_figures_are_read_in_bytes_seconds_and_flops(file: Callable[[str], Path]) -> None:
    machine = read_machine(file(SMALL))
    assert machine.capacity("host") == 8 * 2**30 and machine.capacity("disk") == 10**12
    assert machine.link("disk", "host") == Link("disk", "host", 1.2e9, 1e-4, "disk")
    assert machine.limit("disk") == 1.5e9
    host = machine.compute
    assert (host.matmul_rate("fp32", 7), host.matmul_rate("bf16", 1), host.matmul_rate("bf16", 4096)) == (
        2e11,
        2e10,
        9e11,
    )
    assert 2e10 < host.matmul_rate("bf16", 32) < 9e11
    assert host.elementwise.at(2**30) == 2e10 and host.update == 2.5e9 and host.operation_seconds == 2e-6


# Each row: a piece of the file above, what stands there instead, and what the message must name.
WRONG = [
    ('name = "small"', "nam = 3", ["nam", "name, origin"]),
    ('name = "small"', 'name = ""', ["name = ''", "text"]),
    ('name = "small"\n', "", ["the file lacks name"]),
    ('host = "8GiB"', 'host = "8GIB/s"', ["capacities.host = '8GIB/s'", "24GiB"]),
    ('host = "8GiB"', 'host = "-8GiB"', ["capacities.host = '-8GiB'", "above 0"]),
    ('host = "8GiB"', "host = 8", ["capacities.host = 8", "24GiB"]),
    ('host = "8GiB"', 'ram = "8GiB"', ["no tier 'host'", "ram, disk"]),
    ('[limits]\ndisk = "1.5GB/s"', "", ["no limit 'disk'", "none"]),
    ('disk = "1.5GB/s"', 'disk = "1.5GB"', ["limits.disk = '1.5GB'", "1.3GB/s"]),
    ('source = "disk"', 'source = "tape"', ["no tier 'tape'", "host, disk"]),
    ('source = "disk"', 'from = "disk"', ["links[0].from", "source, target"]),
    ('target = "host"\n', "", ["links[0] lacks target"]),
    ('bytes_per_second = "1.2GB/s"', 'bytes_per_second = "-1.2GB/s"', ["links[0].bytes_per_second = '-1.2GB/s'"]),
    ('bytes_per_second = "1.2GB/s"', 'bytes_per_second = "0GB/s"', ["links[0].bytes_per_second", "above 0"]),
    ('bytes_per_second = "1.2GB/s"', 'bytes_per_second = "1.2Gb"', ["links[0].bytes_per_second", "1.3GB/s"]),
    ('bytes_per_second = "1.2GB/s"', 'bytes_per_second = "1.2QB/s"', ["'1.2QB/s'"]),
    ('bytes_per_second = "1.2GB/s"', "bytes_per_second = 1.2e9", ["1200000000.0", "its unit"]),
    ('latency = "100us"', 'latency = "-1us"', ["links[0].latency", "from 0 on"]),
    ("[[links]]", "[links]", ["links = ", "[[links]]"]),
    ("cores = 2", "cores = -2", ["processors[0].cores = -2", "from 1 on"]),
    ("cores = 2", "cores = true", ["processors[0].cores = True"]),
    ('tier = "host"', 'tier = "device"', ["no processor 'host'"]),
    ('fp32 = "200GFLOP/s"', 'fp32 = "200GFLOPS"', ["processors[0].matmul.fp32 = '200GFLOPS'", "312TFLOP/s"]),
    ('1 = "20GFLOP/s"', '0 = "20GFLOP/s"', ["processors[0].matmul.bf16", "rows"]),
    ('1MiB = "80GB/s"', 'many = "80GB/s"', ["processors[0].elementwise", "24GiB"]),
    ('copy = "10GB/s"', 'copies = "10GB/s"', ["processors[0].copies", "copy"]),
    ('copy = "10GB/s"', "", ["processors[0] lacks copy"]),
    ("[limits]", "[nodes]\ncount = 4\n[limits]", ["4 nodes need bytes_per_second"]),
    ("[limits]", "[close]\ncount = 2\n[limits]", ["2 devices that are close need bytes_per_second"]),
    ("[limits]", "[close]\nsize = 2\n[limits]", ["close.size", "count"]),
    ("[limits]", "[[unlike]]\nhost = '5GiB'\n[limits]", ["of 1 nodes 1 cannot be unlike the first one"]),
    ("[limits]", "[[limits]]", ["limits", "a table"]),
    ("[limits]", "[limits", ["is not a TOML file", "line"]),
]


@pytest.mark.parametrize(("there", "instead", "named"), WRONG, ids=[row[1].strip() or row[0] for row in WRONG])
def test_what_is_wrong_is_refused_by_name(
    there: str, instead: str, named: list[str], file: Callable[[str], Path]
) -> None:
    assert there in SMALL
    path = file(SMALL.replace(there, instead, 1))
    with pytest.raises(OptionError) as refused:
        read_machine(path)
    for words in [str(path), *named]:
        assert words in str(refused.value)


def test_a_link_that_is_described_twice_is_refused(file: Callable[[str], Path]) -> None:
    link = SMALL[SMALL.index("[[links]]") : SMALL.index("[[processors]]")]
    with pytest.raises(OptionError, match="two of 'disk to host'"):
        read_machine(file(SMALL.replace(link, link + link)))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.toml cannot be read: No such file"):
        read_machine(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(OptionError, match=r"bytes\.toml is not a TOML file"):
        read_machine(tmp_path / "bytes.toml")


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OptionError, match="taken cannot be written"):
        write_machine(find_machine("laptop"), tmp_path / "taken")
    with pytest.raises(OptionError, match=r"machine\.toml cannot be written"):
        write_machine(find_machine("laptop"), Path("/dev/null/machine.toml"))
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize("name", described_machines())
def test_every_described_machine_can_train_from_its_disk(name: str) -> None:
    machine = find_machine(name)
    assert machine.origin == "described" and machine.name
    assert machine.link("disk", "host") and machine.link("host", "disk") and machine.limit("disk") > 0
    if "device" in machine.tiers:
        assert machine.link("host", "device") and machine.link("device", "host")
        assert machine.compute.elementwise.at(2**30) > machine.processor("host").elementwise.at(2**30)
        assert machine.capacity("device") < machine.capacity("host")
    for processor in machine.processors:
        half = max(processor.matmul_rate(dtype, 4096) for dtype in ("bf16", "fp16") if dtype in dict(processor.matmul))
        assert half >= processor.matmul_rate("fp32", 4096)
        assert processor.copy <= processor.elementwise.best
    if machine.compute.count > 1:
        assert machine.link("device", "device")


def test_every_figure_of_a_described_machine_has_a_source() -> None:
    for name in described_machines():
        lines = (DESCRIBED / f"{name}.toml").read_text().splitlines()
        bare = [line for line in lines if '/s"' in line or 'iB"' in line or 'TB"' in line]
        assert [line for line in bare if "#" not in line] == [], name


def test_a_machine_is_found_by_name_or_by_its_file(file: Callable[[str], Path]) -> None:
    path = file(SMALL)
    assert find_machine(str(path)) == read_machine(path)
    assert find_machine("rtx-4090") != find_machine("rtx-3090")
    with pytest.raises(OptionError, match=r"'rtx-9999'.*dgx-2.*rtx-4090"):
        find_machine("rtx-9999")
