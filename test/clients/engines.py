"""Runs a client program in the environment of its engine and reads its answer.

Environments are virtual ones under `$CLIENTS_ROOT/venvs` (made by `tools/clients.sh`); the tests' own interpreter
serves the clients that need none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matrix import Client
from workshop import NEW_TOKENS

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("CLIENTS_ROOT", "~/.cache/auto_round_clients")).expanduser()
_EXCEPTION = re.compile(r"(^|[\s.])[A-Z]\w*(Error|Exception): ")
TIMEOUT = 300  # seconds for one client: vLLM needs about 15, of which most is its start


class ClientError(RuntimeError):
    """A client did not load an artifact, or failed on it; the message ends with what it printed last."""


@dataclass(frozen=True)
class Answer:
    """What a client computed: scores [prompts · positions, vocabulary], greedy tokens, and facts about itself."""

    scores: np.ndarray
    tokens: list[list[int]]
    versions: dict[str, str]
    layers: dict[str, int]


def interpreter(client: Client) -> Path | None:
    """The Python of a client's environment, or None where it is not installed."""
    if client.environment is None:
        return Path(sys.executable)
    python = ROOT / "venvs" / client.environment / "bin" / "python"
    return python if python.exists() else None


def ask(client: Client, artifact: Path, prompts: list[list[int]], scratch: Path, timeout: float = TIMEOUT) -> Answer:
    """Let a client compute the prompts on an artifact.

    Raises:
        ClientError: it is not installed, failed or took too long.
    """
    python = interpreter(client)
    if python is None:
        raise ClientError(
            f"there is no environment for {client.environment}: run tools/clients.sh {client.environment}"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    request: dict[str, Any] = {"artifact": str(artifact), "prompts": prompts, "new_tokens": NEW_TOKENS}
    request |= {"option": client.option, "answer": str(answer)}
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [str(python), str(HERE / client.program), str(scratch / "request.json")]
    try:
        done = subprocess.run(
            command, env=_environment(client), cwd=scratch, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"{client.program} took more than {timeout:.0f} seconds on {artifact}") from error
    if done.returncode != 0 or not answer.exists():
        raise ClientError(f"{client.program} failed on {artifact}: {last_error(done.stderr or done.stdout)}")
    found = json.loads(answer.read_text(encoding="utf-8"))
    return Answer(np.load(answer.with_suffix(".npy")), found["tokens"], found["versions"], found["layers"])


def last_error(output: str) -> str:
    """The last line that names an exception, and what follows it; engines print much after the cause."""
    lines = [line for line in output.splitlines() if line.strip()]
    named = [index for index, line in enumerate(lines) if _EXCEPTION.search(line)]
    return " ".join(line.strip() for line in lines[named[-1] if named else -3 :])[:400]


def _environment(client: Client) -> dict[str, str]:
    """No network, and no import path of ours where the engine has an environment of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if client.environment is not None:
        env.pop("PYTHONPATH", None)
    return env
