"""The OpenAI-style endpoint, started by the command of docs/serving.md."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.vllm import served
from tests.vllm.served import NEW_TOKENS, SETTINGS, Answer, Judge, make_prompts

pytest.importorskip("vllm")

SECONDS_TO_START = 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, address: str) -> None:
    for _ in range(SECONDS_TO_START):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"the server was not ready in {SECONDS_TO_START} s")


def complete(address: str, model: Path, prompt: list[int]) -> Answer:
    question = {
        "model": str(model),
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        (choice,) = json.load(response)["choices"]
    log_probs = torch.tensor(choice["logprobs"]["token_logprobs"])
    return Answer([*prompt, *choice["token_ids"]], log_probs, 0)


def test_the_endpoint_completes_as_the_patched_model_does(tmp_path, monkeypatch):
    folder = served.write_minicpm(tmp_path, sparse_config=SETTINGS)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # as users start it
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(64 << 20)]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*command, *options])
    try:
        wait_until_ready(server, address)
        answers = [complete(address, folder, prompt) for prompt in make_prompts(50, 185, 700)]
    finally:
        server.terminate()
        server.wait(timeout=60)
    Judge(folder, SETTINGS).check(answers)
