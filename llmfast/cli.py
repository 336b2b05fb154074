"""python -m llmfast info | check"""

import argparse
import json

from . import info


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmfast", description="Fused attention and softmax for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what this machine has and which backends can run")
    command.add_argument("--json", action="store_true", help="as JSON")
    chosen = parser.parse_args(arguments)
    show_info(chosen.json)


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
