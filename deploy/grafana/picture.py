"""Draws the dashboard's panels from what a Prometheus has, where there is no Grafana; needs matplotlib.

    python deploy/grafana/picture.py http://127.0.0.1:9090 [--minutes 5] [--rows "Does it help,Host memory"] \
        --out docs/pictures/dashboard.svg

Same queries, titles, units and places as in `dashboard.json`; Grafana's own look is another.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from dashboard import resolve
from matplotlib.ticker import EngFormatter, FuncFormatter, MultipleLocator, PercentFormatter

DASHBOARD = Path(__file__).with_name("dashboard.json")
WIDE, HIGH, COLUMNS = 4.6, 2.5, 3  # inches of a panel; panels side by side
POINTS = 150
FORMATS = {
    "percentunit": PercentFormatter(1.0, decimals=0), "bytes": EngFormatter("B"),
    "Bps": EngFormatter("B/s"), "s": EngFormatter("s"),
}  # fmt: skip
Series = tuple[str, list[float], list[float]]  # legend, seconds before the end, values


def panels(rows: list[str]) -> list[dict[str, Any]]:
    """Those of the named rows, or of all."""
    found, row = [], ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        elif not rows or row in rows:
            found.append(panel)
    return found


def ask(url: str, query: str, minutes: float, legend: str) -> list[Series]:
    """What a query gave over the last minutes."""
    end = time.time()
    values = {"query": query, "start": end - minutes * 60, "end": end, "step": max(1.0, minutes * 60 / POINTS)}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/api/v1/query_range?{urllib.parse.urlencode(values)}", timeout=30) as answer:
        result = json.load(answer)["data"]["result"]
    lines = []
    for entry in result:
        name = legend
        for label, value in entry["metric"].items():
            name = name.replace(f"{{{{{label}}}}}", value)
        points = [(float(at) - end, float(value)) for at, value in entry["values"] if value != "NaN"]
        if points:
            lines.append((name, [at for at, _ in points], [value for _, value in points]))
    return lines


def draw(url: str, minutes: float, rows: list[str], interval: str, out: Path) -> None:
    """One picture of all panels."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lmcache-ext"}  # text as text; the same names each time
    chosen = panels(rows)
    high = -(-len(chosen) // COLUMNS)
    figure, axes = plt.subplots(high, COLUMNS, figsize=(WIDE * COLUMNS, HIGH * high), squeeze=False)
    for panel, axis in zip(chosen, axes.flat, strict=False):
        defaults = panel["fieldConfig"]["defaults"]
        lines = [
            line
            for target in panel["targets"]
            for line in ask(url, resolve(target["expr"], interval), minutes, target["legendFormat"])
        ]
        for name, at, values in lines:
            axis.plot(at, values, label=name, linewidth=1.2)
        axis.set_title(panel["title"], fontsize=10, loc="left")
        axis.set_xlim(-minutes * 60, 0)
        most = defaults.get("max") or max((max(values) for _, _, values in lines), default=0) or 1
        axis.set_ylim(0, most * 1.06)
        axis.xaxis.set_major_locator(MultipleLocator(60 * max(1, round(minutes / 5))))
        axis.yaxis.set_major_formatter(FORMATS.get(defaults.get("unit", ""), EngFormatter()))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / 60:g} min" if seconds else "now"))
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, linewidth=0.3)
        if lines:
            axis.legend(fontsize=7, loc="best", framealpha=0.5)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("--minutes", type=float, default=5, help="until now")
    parser.add_argument("--rows", default="", help="titles of rows, with commas; default: all")
    parser.add_argument("--interval", default="20s", help="that rates are taken over: four scrapes at least")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for row in options.rows.split(",") if row]
    draw(options.url.rstrip("/"), options.minutes, rows, options.interval, options.out)


if __name__ == "__main__":
    main()
