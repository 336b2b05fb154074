"""python -m llmfast info | check | inspect | tune | train | generate | classify | translate | answer | chat |
evaluate | attention-map"""

import argparse
import json
import os
import sys

from . import backends, check, info
from .text import commands as text


def main(arguments: list[str] | None = None) -> None:
    try:
        try:
            run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what read us, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="llmfast", description="Fused attention and softmax for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what this machine has and which backends can run")
    command.add_argument("--json", action="store_true", help="as JSON")
    command = commands.add_parser("check", help="the case table on this machine, and what each backend supports")
    command.add_argument("--backend", choices=backends.ORDER, action="append", help="only this one; may be repeated")
    command.add_argument("--markdown", action="store_true", help="print the support table as the README has it")
    commands.add_parser(
        "inspect", add_help=False, help="registers, spills, shared memory of each Triton or CUDA kernel on each GPU"
    )
    commands.add_parser("tune", add_help=False, help="measures the tiles of the Triton kernels on this machine's GPU")
    text.add(commands)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "inspect":
        from .inspect_kernels import main as inspect

        inspect(rest)
        return
    if chosen.command == "tune":
        from .tune import main as tune

        sys.exit(tune(rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(chosen, "run"):
        sys.exit(text.main(chosen))
    if chosen.command == "info":
        show_info(chosen.json)
    else:
        sys.exit(show_check(chosen.backend or backends.ORDER, chosen.markdown))


def show_info(as_json: bool) -> None:
    found = info()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    backends, environment = found.pop("backends"), found.pop("environment")
    for key, value in found.items():
        print(f"{key:13s} {value}")
    for name, why in backends.items():
        print(f"{'backend':13s} {name}: {why or 'available'}")
    for key, value in environment.items():
        print(f"{'environment':13s} {key}={value}")


def show_check(names, as_markdown: bool) -> int:
    """Runs the case table; the number of wrong results, at most 100."""
    names, failed = list(names), []

    def one(case, dtype, backend):
        try:
            return check.check_case(case, dtype, backend)
        except RuntimeError as problem:
            failed.append(str(problem))
            return "no"

    rows = check.support_table(one, names)
    if as_markdown:
        print(check.markdown(rows))
    else:
        widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
        for row in rows:
            print("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for problem in failed:
        print("WRONG:", problem, file=sys.stderr)
    if not as_markdown:
        print(f"{len(failed)} wrong" if failed else "everything that ran agrees with float64")
    return min(len(failed), 100)
