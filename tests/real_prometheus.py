"""A real Prometheus, with the configuration of the compose file, and what it answers."""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from helm_render import REPOSITORY, board
from programs import require
from server_process import reserved_port

CONFIG = REPOSITORY / "deploy" / "prometheus.yml"
LABELS = {"namespace": "llm", "pod": "demo-sliceserve-5d9c7b-x2x4z"}
PATIENCE_S = 60


@contextmanager
def scraping(
    address: str, rules: dict[str, Any], work: Path, labels: dict[str, str] = LABELS
) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes an address each second and has some rules; a client of its API.

    What it scrapes gets labels, by default those that Kubernetes' discovery gives.
    """
    found = shutil.which("prometheus", path=str(Path(sys.executable).parent))
    binary = require(found, "no prometheus: apt gave no package to `make install`")
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    ((target,),) = (scraped["static_configs"] for scraped in config["scrape_configs"])
    target |= {"targets": [address], "labels": labels}
    (work / "rules.yml").write_text(yaml.safe_dump(rules))
    (work / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": ["rules.yml"]}))
    command = [binary, f"--config.file={work / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={work / 'data'}"]
    with (
        reserved_port() as port,
        (work / "log").open("wb") as log,
        subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as api,
    ):
        try:
            yield api
        finally:
            process.terminate()


def answer_of(api: httpx.Client, path: str, wanted: Callable[[Any], bool], **query: str) -> Any:
    """The data of Prometheus' answer, once it is as wanted."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        data = None
        with suppress(httpx.TransportError):
            answer = api.get(path, params=query)
            # While it starts it answers 503, in plain text.
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                data = answer.json().get("data")
        if data and wanted(data):
            return data
        assert time.monotonic() < deadline, (query, data)
        time.sleep(0.2)


def filled_in(query: str, **values: str) -> str:
    """A query of the board with a value for each of its variables."""
    for name, value in values.items():
        query = query.replace(f"${name}", value)
    assert "$" not in query
    return query


def answers_to_the_board(api: httpx.Client, **values: str) -> int:
    """Have every query of the board answered with numbers, but those of GPUs; how many there are.

    Of GPUs' memory and utilization there is nothing where there are none.
    """
    asked = 0
    for panel in board()["panels"]:
        title, targets = panel["title"], panel.get("targets", [])
        empty = title.startswith(("GPU memory", "GPU utilization"))
        for target in targets:
            query = filled_in(target["expr"], __rate_interval="1m", **values)
            found = answer_of(
                api, "/query", lambda data, empty=empty: empty or numbers(data), query=query
            )
            assert empty == (not found["result"]), title
            asked += 1
    return asked


def numbers(data: Any) -> bool:
    """Whether an answer has values, each of them finite."""
    values = [float(series["value"][1]) for series in data["result"]]
    return bool(values) and all(map(math.isfinite, values))
