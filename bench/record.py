"""Files of results: what was measured, by which command, on which machine, with which versions."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe


def write_results(
    folder: Path, kind: str, device: torch.device, head: str, table: str, **found: Any
) -> Path:
    """`KIND-DEVICE-NAME-DATE.json` with all of `found` and `.md` with `head` and `table`, in
    `folder`. Returns their path without its suffix."""
    machine, date = describe(device), time.strftime("%Y-%m-%d")
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine["device"]).strip("-")
    path = folder / f"{kind}-{device.type}-{name}-{date}"
    folder.mkdir(parents=True, exist_ok=True)
    every = {"command": command, "date": date, "machine": machine, **found}
    Path(f"{path}.json").write_text(json.dumps(every, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    made = f"`{command}`, {date}: {machine['device']}{threads}; {versions}."
    Path(f"{path}.md").write_text(f"{head}\n\n{made}\n\n{table}")
    return path
