"""What benchmarks of memory share: an arm in a process of its own, where nothing that came before is held."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def in_fresh_process(script: str, arm: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """Return the JSON object in the last line of `script --arm ARM`, run in a process of its own.

    Args:
        script: the benchmark's file.
        arm: what it is to do, as JSON.
        environment: what is set for it beside this process's.
    """
    command = [sys.executable, script, "--arm", json.dumps(arm)]
    ended = subprocess.run(command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(f"the arm {arm} failed with code {ended.returncode}; its own words are above.")
    return json.loads(ended.stdout.splitlines()[-1])
