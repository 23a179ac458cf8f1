"""Images per second of `netfission serve`, over those of the bare network in a loop.

Both run the same network, deployed, on the same processor cores. The bare one runs on pixels in memory, in
batches of the server's largest size and as many at once. The server answers clients over HTTP; they run in a
process of their own on the same cores, and each sends one PNG file after another. Server and bare network
take turns, round by round, so that drift of the machine affects both equally. The weights are random, which
changes no time.

Prints images per second of both, their ratios (median, range), processor time per image, the clients' waiting
time, the number of failed answers, and the server's memory. Writes results/benchmark_serving.json.

    .venv/bin/python benchmarks/serving.py --models cifar-resnet18,wrn-16-4 --clients 64 --requests 5000
"""

import argparse
import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

import netfission as nf
from netfission.classifier import Classifier
from netfission.models import create_model
from netfission.runs.folder import environment
from netfission.serve.server import deploy_classifier

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_serving.json"
CLASSES = 100
BATCH = 32
BATCHES_AT_ONCE = 2


@dataclass
class Load:
    """The requests of all clients, and what came of them.

    Attributes:
        request: bytes of a request.
        remaining: requests still to be sent.
        failed: answers whose status was not 200, and lost connections.
        waits: seconds until each answer.
    """

    request: bytes
    remaining: int
    failed: int = 0
    waits: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """Sends a request as soon as the last one is answered; it needs no HTTP library, and so little time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.ended = asyncio.get_running_loop().create_future()
        self.received = b""
        self.sent: float | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.load.remaining == 0:
            self.transport.close()
            return
        self.load.remaining -= 1
        self.sent = time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator or len(body) < int(re.findall(rb"(?i)content-length: (\d+)", head)[0]):
            return
        assert self.sent is not None
        self.load.waits.append(time.perf_counter() - self.sent)
        self.load.failed += not head.startswith(b"HTTP/1.1 200 ")
        self.received, self.sent = b"", None
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.failed += self.sent is not None
        self.ended.set_result(None)


async def ask(port: int, clients: int, load: Load) -> float:
    """Send all requests; return the seconds until the last answer."""
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    pairs = [await loop.create_connection(lambda: Client(load), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.ended for _, client in pairs))
    return time.perf_counter() - start


class Process:
    """A process of this benchmark or of the command, which prints a line when it is ready."""

    def __init__(self, *command: str) -> None:
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.line()

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.popen.pid}/status").read_text("utf-8")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def end(self) -> None:
        self.popen.terminate()
        self.popen.communicate()


def main() -> None:
    """Measure, print and record."""
    arguments = _arguments()
    if arguments.bare:
        _bare(arguments.bare)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    cells = [_cell(model, arguments) for model in arguments.models.split(",")]
    record = {
        "benchmark": "serving",
        "cores": arguments.cores,
        "clients": arguments.clients,
        "max_batch": BATCH,
        "batches_at_once": BATCHES_AT_ONCE,
        "networks": cells,
        "command": "python benchmarks/serving.py " + " ".join(sys.argv[1:]),
        "load_average": os.getloadavg(),
        "environment": environment(),
    }
    Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {arguments.out}")


def _cell(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _make(model, arguments.side, folder)
        bare = Process(sys.executable, __file__, "--bare", folder)
        limits = ("--threads", str(BATCHES_AT_ONCE), "--max-batch", str(BATCH))
        served = Process(sys.executable, "-m", "netfission", "serve", folder, "--port", "0", *limits)
        try:
            cell = {"model": model, **_measure(bare, served, arguments)}
        finally:
            bare.end()
            served.end()
    low, high = cell["ratio_range"]
    waits = cell["wait_seconds"]
    print(
        f"{model}, 3 exits by channels, {arguments.side}×{arguments.side} pixels, "
        f"{arguments.clients} clients, n = {arguments.rounds} rounds\n"
        f"served {median(cell['served_images_per_second']):8.1f} images/s   "
        f"{1000 * cell['served_cpu_seconds']:.2f} ms of processor time each\n"
        f"bare   {median(cell['bare_images_per_second']):8.1f} images/s   "
        f"{1000 * cell['bare_cpu_seconds']:.2f} ms\n"
        f"ratio  {cell['ratio_median']:8.3f} (range {low:.3f}–{high:.3f})   "
        f"of processor time {cell['cpu_ratio']:.3f}\n"
        f"waiting: median {1000 * waits['median']:.0f} ms, 99 % within {1000 * waits['p99']:.0f} ms; "
        f"{cell['failed']} of {cell['requests']} answers failed\n"
        f"memory over {cell['requests']} requests: "
        + ", ".join(f"{mib:.0f}" for mib in cell["resident_mib"])
        + " MiB\n",
        flush=True,
    )
    return cell


def _measure(bare: Process, served: Process, arguments: argparse.Namespace) -> dict[str, Any]:
    port = int(re.findall(r":(\d+) ", served.ready)[0])
    request = _request(arguments.side)
    load = Load(request, 0)

    def ask_for(images: int) -> float:
        load.remaining = images
        return asyncio.run(ask(port, arguments.clients, load))

    def bare_for(images: int) -> tuple[float, float]:
        bare.tell(str(images))
        seconds, cpu = map(float, bare.line().split())
        return seconds, cpu

    ask_for(4 * BATCH)  # both warm up
    if load.failed:
        raise RuntimeError(f"{load.failed} of {4 * BATCH} answers failed before the first round")
    bare_for(4 * BATCH)
    load.waits.clear()
    images = -(-arguments.requests // arguments.rounds)
    before = served.cpu_seconds()
    memory = [served.resident_mib()]
    pairs, bare_cpu = [], 0.0
    for _ in range(arguments.rounds):
        seconds, cpu = bare_for(images)
        pairs.append((images / seconds, images / ask_for(images)))
        bare_cpu += cpu
        memory.append(served.resident_mib())
    total = images * arguments.rounds
    served_cpu = (served.cpu_seconds() - before) / total
    waits = sorted(load.waits)
    ratios = [served_rate / bare_rate for bare_rate, served_rate in pairs]
    return {
        "requests": total,
        "failed": load.failed,
        "bare_images_per_second": [bare_rate for bare_rate, _ in pairs],
        "served_images_per_second": [served_rate for _, served_rate in pairs],
        "ratio_median": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "bare_cpu_seconds": bare_cpu / total,
        "served_cpu_seconds": served_cpu,
        "cpu_ratio": bare_cpu / total / served_cpu,
        "wait_seconds": {"median": median(waits), "p99": waits[int(0.99 * len(waits))], "max": waits[-1]},
        "resident_mib": memory,
    }


def _make(model: str, side: int, folder: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side)
    network = nf.fission(create_model(model, CLASSES), exits=3, grouping="channels", example_input=images)
    names = [f"class {number}" for number in range(CLASSES)]
    shape = [3, side, side]
    Classifier.from_network(
        network, model=model, classes=names, shape=shape, mean=[0.5] * 3, std=[0.25] * 3
    ).save_pretrained(folder)


def _request(side: int) -> bytes:
    file = io.BytesIO()
    pixels = torch.randint(
        256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    content = file.getvalue()
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(content)
    return head + content


def _bare(folder: str) -> None:
    """Run as many images as each line of the input says; print seconds, and seconds of processor time."""
    torch.set_num_threads(1)
    network = deploy_classifier(Classifier.from_pretrained(folder))
    pixels = torch.zeros(BATCH, *network.spec.shape, dtype=torch.uint8)
    print("ready", flush=True)
    for line in sys.stdin:
        batches = iter(range(-(-int(line) // BATCH)))

        def work(batches: Any = batches) -> None:
            for _ in batches:
                network.logits(pixels)

        start, cpu = time.perf_counter(), time.process_time()
        threads = [threading.Thread(target=work) for _ in range(BATCHES_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whole batches ran; the images asked for are a share of them.
        share = int(line) / (-(-int(line) // BATCH) * BATCH)
        print(share * (time.perf_counter() - start), share * (time.process_time() - cpu), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default="cifar-resnet18,wrn-16-4,wrn-10-1",
        help="default: %(default)s",
    )
    parser.add_argument("--side", type=int, default=32, help="height and width of the images in pixels")
    parser.add_argument("--clients", type=int, default=64, help="number of clients at once")
    parser.add_argument("--requests", type=int, default=5000, help="number of requests to each network")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each, in turn")
    parser.add_argument("--cores", type=int, default=2, help="processor cores, which all of them share")
    parser.add_argument("--out", default=str(RESULTS), help="file to write (default: %(default)s)")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
