"""The fault table: what Opsin's dataset and stock Streaming's make of each fault, measured on real servers.

    python benchmarks/faults.py                       # all of it; writes docs/faults.md and results/faults.json
    python benchmarks/faults.py --only opsin --case "full disk"     # a part, put in its place among the rest

Needs Linux, ``localbucket`` and, for wrong credentials, SeaweedFS (both are in the ``dev`` extra).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)

from fault_data import Stores  # noqa: E402
from fault_trials import LIMIT, Outcome, Setting  # noqa: E402
from fault_zygote import LOADER_TIMEOUT  # noqa: E402
from faults import BY_NAME, CASES, Case, run_case  # noqa: E402
from stores import weed_binary  # noqa: E402

RESULTS, PAGE = HERE / "results" / "faults.json", HERE.parent / "docs" / "faults.md"
WORKERS = ((0, False), (1, False), (1, True), (2, False), (2, True), (4, False), (4, True))
USERS_CODE = "unreadable image"
"""A case that is not about stock Streaming: there decoding is the user's code."""


def plain(text: str) -> str:
    """A message without what differs from run to run: ports, processes, temporary folders."""
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(re.escape(tempfile.gettempdir()) + r"\S*?/(cache|disk)\b", r"/\1", text)
    return re.sub(r"process \d+|pid\(s\) \d+|pid \d+", "process N", text)


def measure(
    cases: list[Case], classes: list[str], workers: list[tuple[int, bool]], jobs: int
) -> list[dict[str, Any]]:
    """All trials, many at once: most of their time they wait."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="opsin-faults-", ignore_cleanup_errors=True) as folder:
        stores = Stores(Path(folder))
        with ThreadPoolExecutor(jobs) as pool:
            wanted = {
                pool.submit(run_case, stores, case, Setting(cls, *each)): (case, Setting(cls, *each))
                for case in cases
                for cls in classes
                for each in workers
                if each[0] >= case.least
                and not (cls == "stock" and case.name == USERS_CODE)
                and (weed_binary() or case.name != "wrong credentials")
            }
            for done in as_completed(wanted):
                case, setting = wanted[done]
                if done.exception() is not None:  # of the trial itself
                    print(
                        f"{case.name} | {setting} | not run: {done.exception()}", file=sys.stderr, flush=True
                    )
                    continue
                for run, outcome in enumerate(done.result(), 1):
                    found.append(row(case, setting, run, outcome))
                    print(f"{case.name} | {setting} | run {run} | {outcome}", flush=True)
        stores.close()
    return found


def row(case: Case, setting: Setting, run: int, outcome: Outcome) -> dict[str, Any]:
    wanted = case.first if run == 1 else case.second
    return {
        "case": case.name, "class": setting.cls, "workers": setting.workers, "persistent": setting.persistent,
        "run": run, "outcome": outcome.kind, "wanted": outcome.kind in wanted,
        "seconds": round(outcome.seconds, 1), "line": plain(outcome.line), "served": outcome.detail,
    }  # fmt: skip


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["class"], row["workers"], row["persistent"]


# --- the page


def settings(rows: Iterable[dict[str, Any]]) -> dict[int, set[bool]]:
    """Numbers of workers, and whether they were persistent."""
    found: dict[int, set[bool]] = {}
    for one in rows:
        found.setdefault(one["workers"], set()).add(one["persistent"])
    return found


def where(rows: list[dict[str, Any]], all_: list[dict[str, Any]]) -> str:
    """With how many workers: `` (2, 4 workers)``; nothing where it is so with any."""
    mine, theirs = settings(rows), settings(all_)
    if mine == theirs:
        return ""
    kinds = {True: " persistent", False: " not persistent"}
    names = [f"{n}{kinds[min(mine[n])] if mine[n] != theirs[n] else ''}" for n in sorted(mine)]
    return f" ({', '.join(names)} worker{'' if names == ['1'] else 's'})"


def covered(rows: list[dict[str, Any]]) -> str:
    """The settings of some trials, in words."""
    return ", ".join(
        f"{n}{' (persistent)' if kinds == {True} else ' (persistent and not)' if len(kinds) > 1 else ''}"
        for n, kinds in sorted(settings(rows).items())
    )


def cell(rows: list[dict[str, Any]]) -> str:
    """Outcomes of a case in one class: by run, by workers where these differ."""
    said = []
    for run in (1, 2):
        of_run = [r for r in rows if r["run"] == run]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for one in of_run:
            kinds.setdefault(one["outcome"], []).append(one)
        said.append("; ".join(kind + where(some, of_run) for kind, some in sorted(kinds.items())))
    return said[0] if said[0] == said[1] else f"{said[0]}<br>run 2: {said[1]}"


def page(rows: list[dict[str, Any]], command: str) -> str:
    lines, messages = [], []
    for case in CASES:
        opsin, stock = (
            [r for r in rows if r["case"] == case.name and r["class"] == c] for c in ("opsin", "stock")
        )
        if not opsin:
            continue
        seconds = max(r["seconds"] for r in opsin)
        theirs = cell(stock) if stock else "user's code" if case.name == USERS_CODE else "not run"
        lines.append(f"| {case.name} | {cell(opsin)} | {seconds:.0f} | {theirs} |")
        for line in sorted({r["line"] for r in opsin if r["line"]}):
            line = re.sub(
                r"worker process N", "worker process N", re.sub(r"shard\.\d{5}", "shard.00009", line)
            )
            if (case.name, line) not in messages:
                messages.append((case.name, line))
    seen, told = set(), []
    for name, line in messages:
        if line not in seen:
            seen.add(line)
            told.append(f"- *{name}*: `{line}`")
    ours, others, mixed = ([r for r in rows if r["class"] == c] for c in ("opsin", "stock", "mixed"))
    right = sum(r["wanted"] for r in ours)
    return f"""# What becomes of a run when something breaks

Made by `{command}` from real jobs on real servers ([cases](../tests/faults.py), [all trials](../benchmarks/results/faults.json)).
Each case is run twice on one cache, with Opsin's `StreamingVLMDataset` and `build_loader`, and with stock
`streaming.StreamingDataset` 0.13.0 in a `torch` `DataLoader`. Workers, Opsin: {covered(ours)}; stock: {covered(others)};
not every row of stock's has all of these (see the trials). A cell that names no workers is the same with all of its
own; `run 2` is said where the second run on the same cache ends otherwise. {right} of {len(ours)} of
Opsin's trials end as they should; with a schedule of streams (`mixture`) switched on, {sum(r["wanted"] for r in mixed)} of {len(mixed)}.

- *all, each once*: two epochs, every sample in each exactly once, with the bytes that were written.
- *one clear error*: one line that names the shard or the address and the cause, and the process ends by itself.
- *error, unclear*: it ends, with an error that names no place, or another cause than the real one.
- *short epoch, silent*: an epoch ends before its samples do and nothing is raised (a traceback may be logged).
- *wrong bytes, silent*; *repeats, silent*: samples that were never written, or twice in an epoch, and nothing is raised.
- *hang*: nothing new came for {LIMIT:.0f} s, and it was killed.

| fault | Opsin | most s | stock Streaming |
| --- | --- | --- | --- |
{chr(10).join(lines)}

**Settings.** 96 samples in 16 shards, batches of 2, shuffled, `num_canonical_nodes: 1`, `predownload: 2`,
`prefetch_factor: 1`, for both alike; `download_retry: 2` (5 where the store comes back within retries),
`download_timeout: 2` s (1 where the endpoint stalls). Stock checks `xxh64`, where a row does not say *default arguments*.
Opsin's DataLoader has `timeout: {LOADER_TIMEOUT:.0f}` (default 300) and its first look at a store waits 2 s (default 10 and 20), twice;
stock's DataLoader has no timeout, which is torch's default. Errors come once the retries that were asked for are used
up: Streaming tries `download_retry` times, boto3 itself three to five times in each. Seconds are of processes that share
two cores with up to {"{jobs}"} others: they show that nothing waits for ever, not how fast it is.

With two or more workers stock's rows also have what its workers do to each other over one shared S3 connection, as in
*nothing wrong*; that is chance, and may differ from run to run. So is whether two stock jobs take one number.

**The faults.** Corrupt: one byte of a picture differs. Truncated, missing: half a shard, none; neither the first nor the
last, which Opsin looks at when it opens a dataset. Worker killed, store killed: SIGKILL in mid-epoch; in run 2 all is well
again. Job killed: SIGKILL to the process group; a new job with another number of workers goes on from the last state, and
both together count as run 1. Full disk: another file takes all room in mid-epoch. Two jobs: they start in one instant;
Opsin's take their caches by themselves, stock's were given one each. Unreadable image: its sample keeps its place as a
blank row, which is counted and named; what stock users do then is their own code.

**Not covered.** A corrupt shard in a local folder that is read in place: its size is checked, its hash is not. A shard
whose bytes change in the cache after it was found right. Stores other than S3. Faults on several machines
(without faults: `tests/data/test_caches.py`).

## What Opsin says

{chr(10).join(told)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["opsin", "mixed", "stock"], help="one class")
    parser.add_argument(
        "--case", action="append", choices=list(BY_NAME), help="a case; may be given several times"
    )
    parser.add_argument("--workers", help="such as 0,1,2p,4p; p: persistent; default: all")
    parser.add_argument("--jobs", type=int, default=12, help="trials at once")
    parser.add_argument("--page", action="store_true", help="only write the page anew from the results")
    given = parser.parse_args()
    fresh: list[dict[str, Any]] = []
    if not given.page:
        cases = [BY_NAME[name] for name in given.case] if given.case else CASES
        classes = [given.only] if given.only else ["opsin", "mixed", "stock"]
        workers = list(WORKERS)
        if given.workers:
            workers = [(int(name.rstrip("p")), name.endswith("p")) for name in given.workers.split(",")]
        fresh = measure(cases, classes, workers, given.jobs)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"jobs": given.jobs, "trials": []}
    if fresh:
        anew = {key(r) for r in fresh}
        order = [case.name for case in CASES]
        rows = [*(r for r in kept["trials"] if key(r) not in anew), *fresh]
        rows.sort(key=lambda r: (order.index(r["case"]), r["class"], r["workers"], r["persistent"], r["run"]))
        kept = {"jobs": max(given.jobs, kept["jobs"]), "trials": rows}
        lines = ",\n".join(json.dumps(r) for r in rows)
        RESULTS.write_text(f'{{"jobs": {kept["jobs"]}, "trials": [\n{lines}\n]}}\n')
    text = page(kept["trials"], "python benchmarks/faults.py").replace("{jobs}", str(kept["jobs"] - 1))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
