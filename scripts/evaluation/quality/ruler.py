"""RULER by ``lm-eval``: the tasks that need no download."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from evaluation.quality.arms import AttentionMode
from evaluation.quality.base import load_tokenizer
from evaluation.quality.parts import SkippedError
from evaluation.quality.settings import QualitySettings
from infllm_flex.training.model import load_model

_NEEDED = ("lm_eval", "nltk", "wonderwords", "scipy")

# The sizes that lm-eval gives to the task on variables, in tokens and in repeats of its filler.
_EXAMPLE_TOKENS, _EXAMPLE_REPEATS, _PROMPT_REPEATS, _ANSWER_TOKENS = 500, 5, 10, 30


def judge_ruler(
    settings: QualitySettings, model: Path, mode: AttentionMode, device: torch.device, seed: int
) -> dict[str, Any]:
    """Generate answers to RULER's prompts.

    Args:
        settings: All settings.
        model: Folder of the model.
        mode: The model's attention.
        device: Device of the model; weights are in bfloat16 on a GPU.
        seed: Seed of the prompts.

    Returns:
        By ``task@length``: ``hits``, for each prompt a list with the fraction of correct answers.

    Raises:
        SkippedError: A package is missing, or a task cannot make prompts as short.
    """
    if reason := missing_packages():
        raise SkippedError(reason)
    if "ruler_vt" in settings.judge.ruler_tasks:
        check_variable_tracking(load_tokenizer(model), min(settings.judge.ruler_lengths))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = load_model(model, dtype).to(device).eval()
    # Random blocks are a function of positions, which padding would shift.
    batch = settings.judge.ruler_batch if mode.attend is None else 1
    tasks: dict[str, Any] = {}
    with mode.on(network), no_sentences():
        for length in settings.judge.ruler_lengths:
            samples = _evaluate(settings, network, model, length, seed, batch)
            for task, some in samples.items():
                scores = [[float(sample[str(length)])] for sample in some]
                tasks[f"{task}@{length}"] = {"hits": scores}
    return {"tasks": tasks}


def missing_packages() -> str:
    """Return what RULER lacks and how to install it; empty if nothing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"RULER needs {', '.join(missing)}: pip install '.[quality]'" if missing else ""


def check_variable_tracking(tokenizer: Any, length: int) -> None:
    """Refuse a length for which lm-eval 0.4.13 looks for a prompt of ``ruler_vt`` without end."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    def count(repeats: int, is_example: bool) -> int:
        prompt, answer = generate_input_output(repeats, 1, 4, is_icl=is_example)
        return len(tokenizer(f"{prompt} {' '.join(answer)}").input_ids)

    example = count(_EXAMPLE_REPEATS, True)
    prompt = example + count(_PROMPT_REPEATS, False) + _ANSWER_TOKENS
    tokenized = "with this tokenizer: leave ruler_vt out"
    if example + _ANSWER_TOKENS > _EXAMPLE_TOKENS:
        raise SkippedError(
            f"the example of ruler_vt has {example + _ANSWER_TOKENS} tokens, more than the "
            f"{_EXAMPLE_TOKENS} that lm-eval allows, {tokenized}"
        )
    if prompt > length:
        raise SkippedError(
            f"the shortest prompt of ruler_vt has {prompt} tokens, more than {length}, {tokenized} "
            "or make prompts longer"
        )


def _evaluate(
    settings: QualitySettings, network: Any, model: Path, length: int, seed: int, batch: int
) -> dict[str, list[dict[str, Any]]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    judge = settings.judge
    base = settings.run.folder / "base"  # all models have its tokenizer
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(
            lm=HFLM(
                pretrained=network,
                tokenizer=load_tokenizer(model),
                max_length=network.config.max_position_embeddings,
                batch_size=batch,
            ),
            task_dict=make_prompts(judge.ruler_tasks, length, str(base), seed, judge.ruler_items),
            limit=judge.ruler_items,
            bootstrap_iters=0,
        )
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return {task: sorted(some, key=lambda s: s["doc_id"]) for task, some in samples.items()}


@functools.cache
def make_prompts(tasks: tuple[str, ...], length: int, tokenizer: str, seed: int, items: int) -> Any:
    """Make the prompts of the tasks once for all models, the first ``items`` of each.

    Args:
        tasks: Names of the tasks.
        length: Most tokens of a prompt and its answer.
        tokenizer: Folder of the tokenizer.
        seed: Seed of the prompts.
        items: Prompts of each task.

    Returns:
        What ``lm_eval.evaluator.evaluate`` takes; ``tasks`` has the tasks by name.
    """
    import numpy
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.ruler import cwe_utils

    random.seed(seed)
    numpy.random.seed(seed)
    cwe_utils.RNG.seed(seed)
    manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": tokenizer})
    with _loops_of(items):
        return manager.load(list(tasks))


@contextlib.contextmanager
def _loops_of(items: int) -> Any:
    """End the loops in which lm-eval makes prompts after ``items`` turns.

    The tasks make 500 prompts each in loops that show progress by tqdm, whatever the limit of the
    evaluation: minutes at 32K tokens. Some modules of lm-eval are imported once and keep the tqdm
    that they got, others are loaded again for every use.
    """
    import tqdm

    def some(loop: Any, *_: Any, **__: Any) -> Any:
        return itertools.islice(loop, items)

    def exchange(old: Any, new: Any) -> None:
        for name, module in list(sys.modules.items()):
            known = name == "tqdm" or name.startswith("lm_eval.tasks.ruler.")
            if known and getattr(module, "tqdm", None) is old:
                module.tqdm = new  # type: ignore[attr-defined]

    whole = tqdm.tqdm
    exchange(whole, some)
    try:
        yield
    finally:
        exchange(some, whole)


@contextlib.contextmanager
def no_sentences() -> Any:
    """Prevent the download of a sentence tokenizer, which only the tasks on essays use."""
    import nltk

    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.insert(0, aside)
        try:
            yield
        finally:
            nltk.data.path.remove(aside)
