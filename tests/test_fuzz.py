"""Whatever bytes a file or a request holds, it is read, or refused in one line.

Few inputs are drawn here. `make fuzz` draws thousands of each kind. Inputs that once failed stand here as
examples and in `TABLES`, and are read in every run.
"""

import csv
import io
import json
import os
import re
import warnings
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from netfission.classifier.folder import NetworkSpec
from netfission.cli import main
from netfission.config import RunConfig
from netfission.data import load_data
from netfission.data.label_files import read_label_file
from netfission.data.mask_folders import load_masks
from netfission.data.splits import CorruptImageError, FileRecords, decode
from netfission.data.targets import read_labels, read_numbers
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.reliability import ReliabilityReport
from netfission.experiments.grid_files import find_grid
from netfission.export.cascade import Plan
from netfission.models import create_model, read_weights
from netfission.runs.folder import RunFolder
from netfission.utils.json_files import read_json
from netfission.utils.outputs import ENVIRONMENT_MARK
from netfission.utils.text import printable

EXAMPLES = int(os.environ.get("NETFISSION_FUZZ", "8"))  # of each kind of input
LONGEST = 2000  # characters of a message

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="NETFISSION_FUZZ" not in os.environ,  # the suite draws the same inputs every time
    suppress_health_check=list(HealthCheck),
)


@st.composite
def damaged(draw, *contents):
    """One of some valid files, with bytes changed, removed, repeated or put in."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["change", "remove", "repeat", "insert", "cut"]))
        new = draw(st.binary(min_size=length, max_size=length))
        if kind == "change":
            content[at : at + length] = new[: len(content) - at]
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = new
        else:
            del content[at:]
    return bytes(content)


def read(reader, *arguments, errors=(ValueError, OSError)):
    """Call a reader; what it raises or warns of has to be one line that can be printed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = reader(*arguments)
        except errors as error:
            assert_one_line(str(error))
            return None
    for warning in caught:
        assert_one_line(str(warning.message))
    return result


def assert_one_line(message):
    assert 0 < len(message) < LONGEST, message
    assert "\n" not in message and printable(message) == message, message


@cache
def tables():
    rows = [["file_name", "label", "split"], ["a/1.png", "cat", "train"], ["a/2.png", "dog", "test"]]
    text = "\n".join(",".join(row) for row in rows)
    numbers = "file;width;height\n1.png;1.5;2\n2.png;3;4.25\n"
    several = "image\tlabels\n1.png\tcat dog\n2.png\t\n"
    parquet = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["1.png", "2.png"], "label": [3, 4], "cat": [0, 1]}), parquet)
    return text.encode(), text.encode("utf-16"), numbers.encode(), several.encode(), parquet.getvalue()


@pytest.mark.parametrize("reader", [read_label_file, read_labels, read_numbers])
@fuzzed
@given(data=st.data())
def test_tables(reader, data, tmp_path):
    content = data.draw(st.one_of(st.binary(max_size=200), damaged(*tables()), st.text().map(str.encode)))
    is_parquet = content[:4] == b"PAR1"
    path = tmp_path / (
        "table.parquet" if is_parquet else data.draw(st.sampled_from(["table.csv", "table.tsv"]))
    )
    path.write_bytes(content)
    read(reader, path)


# Tables whose refusals were several lines, or held characters that control a terminal.
TABLES = [
    "file,label\n\x1b[31m.png,nan\n",
    "file,\x1b]0;title\x07\na.png,x\n",
    'file,"two\nlines"\na.png,x\n',
    "\x1b[2Jfile,label\na.png,cat\n",
]


@pytest.mark.parametrize("table", TABLES)
def test_tables_that_were_refused_badly(table, tmp_path):
    (tmp_path / "table.csv").write_text(table, encoding="utf-8")
    refused = [read(reader, tmp_path / "table.csv") is None for reader in (read_label_file, read_numbers)]
    assert any(refused)


@fuzzed
@given(cells=st.lists(st.lists(st.text(), min_size=1, max_size=4), max_size=5))
def test_tables_of_any_cells(cells, tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([["file", "label", "split"], *cells])
    (tmp_path / "table.csv").write_text(text.getvalue(), encoding="utf-8", errors="surrogatepass", newline="")
    read(read_label_file, tmp_path / "table.csv")


@cache
def image_files():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    files = []
    for format_, mode in [
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
        ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("WEBP", "RGBA"), ("PPM", "RGB"),
        ("ICO", "RGBA"), ("TGA", "RGB"), ("JPEG2000", "RGB"),
    ]:  # fmt: skip
        file = io.BytesIO()
        image = Image.fromarray(pixels)
        (image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(file, format_)
        files.append(file.getvalue())
    return files


@fuzzed
@given(content=st.one_of(st.binary(max_size=100), damaged(*image_files())))
def test_images(content, tmp_path):
    (tmp_path / "image.png").write_bytes(content)
    records = FileRecords([str(tmp_path / "image.png")], np.zeros(1, np.int64))
    pixels = read(decode, records, 0, (4, 4), errors=CorruptImageError)
    assert pixels is None or pixels.shape[1:] == (4, 4)


@fuzzed
@given(photograph=st.one_of(damaged(*image_files())), mask=damaged(*image_files()[:3]))
def test_masks(photograph, mask, tmp_path):
    for name, content in (("photographs", photograph), ("masks", mask)):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.png").write_bytes(content)
    read(load_masks, str(tmp_path / "data"))


@cache
def weights_files():
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"epoch": 3, "state_dict": state}, zipped)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return save(dict(state)), zipped.getvalue(), old.getvalue()


# The end of an archive that says it has several disks.
DISKS = b"PK\6\7" + bytes(12) + b"\2\0\0\0" + b"PK\5\6" + bytes(18)


@example(content=weights_files()[1] + DISKS)
@fuzzed
@given(content=st.one_of(st.binary(max_size=100), damaged(*weights_files())))
def test_weights(content, tmp_path):
    (tmp_path / "weights.bin").write_bytes(content)
    read(read_weights, tmp_path / "weights.bin")


@fuzzed
@given(
    header=st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.text(), st.sampled_from(["F32", "BF16", "I64"])
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(
                    st.sampled_from(["__metadata__", "dtype", "shape", "data_offsets", "w"]), st.text()
                ),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    ),
    body=st.binary(max_size=16),
)
def test_headers_of_safetensors(header, body, tmp_path):
    text = json.dumps(header if isinstance(header, dict) else {"w": header}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    read(read_weights, tmp_path / "model.safetensors")


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.one_of(st.sampled_from(sorted(RunConfig().to_dict())), st.text(max_size=8))


@fuzzed
@given(content=st.dictionaries(names, values, max_size=4))
def test_settings(content):
    config = read(RunConfig.from_dict, content)
    if config is not None:  # what is accepted is written and read again
        assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


DEEP = b"[" * 100_000  # more than Python nests


@example(content=DEEP[:2000])
@fuzzed
@given(content=st.one_of(st.binary(max_size=80), damaged(RunConfig().to_yaml().encode())))
def test_files_of_settings(content, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(content)
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "none"), "--out", str(out)]
    assert main(["train", "--config", str(tmp_path / "config.yaml"), *flags]) == 2
    assert_one_line(capsys.readouterr().err.rstrip("\n").split("\n")[-1])
    assert not out.exists()


@fuzzed
@given(data=st.data())
def test_files_of_a_run(data, finished_run, tmp_path):
    readers = {
        "config.json": NetworkSpec,
        "calibration.json": Calibration,
        "reliability.json": ReliabilityReport,
    }
    name = data.draw(st.sampled_from(sorted(readers)))
    valid = json.loads((finished_run / name).read_bytes())
    keys = list(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        valid[data.draw(st.sampled_from(keys))] = data.draw(values)
    valid.pop("sha256", None)
    (tmp_path / name).write_text(json.dumps(valid))
    read(read_json, tmp_path / name, readers[name])


def test_nesting_without_end(tmp_path):
    for name in ("config.json", "cascade.json"):
        (tmp_path / name).write_bytes(DEEP)
    (tmp_path / "grid.yaml").write_bytes(DEEP[:2000])
    (tmp_path / "config.yaml").write_text(f"{ENVIRONMENT_MARK}\n# {'[' * 2000}")
    readers = [
        lambda: read_json(tmp_path / "config.json", NetworkSpec),
        RunFolder(tmp_path).load_environment,
        lambda: read_weights(tmp_path),
        lambda: Plan.read(tmp_path / "cascade.json", ""),
        lambda: find_grid(str(tmp_path / "grid.yaml")),
    ]
    for reader in readers:
        assert read(reader, errors=ValueError) is None


@fuzzed
@given(name=st.one_of(st.text(), st.text().map("timm/{}".format), st.text().map("hf/{}".format)))
def test_names_of_models(name):
    read(create_model, name, 10)


@example(name="\x1b[31m/images")
@example(name="\x1b[31m.csv")
@fuzzed
@given(name=st.text(max_size=30))
def test_names_of_data_sets(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(load_data, name)


PATHS = ["/predict", "/", "/model", "/metrics", "/health"]  # of a server
HEAD = re.compile(r"[^\x21-\x7e]")


@fuzzed
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    path=st.one_of(st.sampled_from(PATHS), st.text()),
    query=st.text(),
    kind=st.one_of(
        st.sampled_from(["image/png", "multipart/form-data; boundary=x", "application/json"]), st.text()
    ),
    body=st.one_of(st.binary(max_size=200), damaged(*image_files())),
)
def test_requests(method, path, query, kind, body, fuzzed_server):
    clean = "/" + HEAD.sub("", path.lstrip("/")), HEAD.sub("", query), HEAD.sub("", kind)
    status, _, answer = fuzzed_server.ask(method, f"{clean[0]}?{clean[1]}", body, {"Content-Type": clean[2]})
    assert status < 500
    if status >= 400 and isinstance(answer, dict):
        assert_one_line(answer["error"])


@pytest.fixture(scope="module")
def fuzzed_server(finished_run):
    from tests.serve.conftest import running

    with running(finished_run) as server:
        assert all(server.ask("GET", path)[0] != 404 for path in PATHS)  # as what is not there is not tested
        yield server


def test_what_is_damaged_above_is_read_when_it_is_whole(finished_run, tmp_path):
    for content in image_files():
        (tmp_path / "image.png").write_bytes(content)
        records = FileRecords([str(tmp_path / "image.png")], np.zeros(1, np.int64))
        assert decode(records, 0, (4, 4)).shape[1:] == (4, 4)
    for content in weights_files():
        (tmp_path / "weights.bin").write_bytes(content)
        assert len(read_weights(tmp_path / "weights.bin").tensors) == 7
    for at, content in enumerate(tables()):
        path = tmp_path / ("table.parquet" if content[:4] == b"PAR1" else "table.csv")
        path.write_bytes(content)
        assert (read_numbers if at == 2 else read_label_file)(path)
    assert RunFolder(finished_run).load_spec().classes
