"""The command: see the docstring of the package."""

import argparse
import json
import os
import sys
from importlib import metadata
from pathlib import Path

# Before torch is imported here or in a worker: each process computes with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.exactness.checks import Result
from benchmarks.exactness.ours import Ours, OursOnNF4
from benchmarks.exactness.suites import SUITES, library
from benchmarks.exactness.sweep import Job, sweep
from benchmarks.exactness.table import markdown

PACKAGES = ("torch", "timm", "torchvision", "transformers", "diffusers")


def main(arguments: list[str] | None = None) -> int:
    """Runs the sweep; returns 0 if every model passed with lora_plugins."""
    options = _parser().parse_args(arguments)
    ours = OursOnNF4.name if options.nf4 else Ours.name
    libraries = [ours, *options.peer]
    jobs = [
        job for job in _jobs(options.suite, libraries) if not options.only or any(o in job[1] for o in options.only)
    ]
    lines_file = options.output.with_suffix(".jsonl")
    results = _passed_before(lines_file, jobs) if options.resume else []
    done = {(result.suite, result.name, result.library) for result in results}
    with lines_file.open("a" if options.resume else "w") as lines:
        for result in sweep([job for job in jobs if job not in done], options.jobs, options.timeout):
            results.append(result)
            lines.write(_line(result))
            lines.flush()
            verdict = "pass" if result.passed else f"FAIL {result.failures}"
            print(f"{len(results)}/{len(jobs)} {result.library} {result.suite} {result.name}: {verdict}", flush=True)
    results.sort(key=lambda result: (list(SUITES).index(result.suite), result.name))
    versions = {name: metadata.version(name) for name in (*PACKAGES, *options.peer)}
    command = f"python -m benchmarks.exactness {' '.join(arguments or sys.argv[1:])}"
    options.output.write_text(markdown(results, ours, [library(name) for name in options.peer], versions, command))
    return int(any(not result.passed for result in results if result.library == ours))


def _jobs(suites: list[str], libraries: list[str]) -> list[Job]:
    return [(suite, case.name, name) for suite in suites for case in SUITES[suite]() for name in libraries]


def _passed_before(lines_file: Path, jobs: list[Job]) -> list[Result]:
    """Reads the jobs that an earlier call finished and that passed; those that failed run again."""
    if not lines_file.exists():
        return []
    results = [Result(**json.loads(line)) for line in lines_file.read_text().splitlines()]
    return [r for r in results if r.passed and (r.suite, r.name, r.library) in jobs]


def _line(result: Result) -> str:
    return json.dumps(result.to_dict()) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="which suites to run")
    parser.add_argument("--nf4", action="store_true", help="store all weights of the base in 4 bits")
    parser.add_argument("--peer", nargs="*", choices=["peft"], default=[], help="libraries to run beside ours")
    parser.add_argument("--only", nargs="*", default=[], help="run only cases whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model and library")
    parser.add_argument("--resume", action="store_true", help="keep what has passed by the JSON lines of before")
    parser.add_argument("--output", type=Path, default=Path("exactness.md"), help="the page; JSON lines go next to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
