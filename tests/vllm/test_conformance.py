"""vLLM with the plugin gives the log-probabilities of the patched transformers model."""

from __future__ import annotations

import pytest

from tests.vllm import served
from tests.vllm.served import SETTINGS, Judge, ask, engine, layers_of, make_prompts

pytest.importorskip("vllm")

# As the released checkpoints, but for lengths; the normaliser of the other settings is coarse.
MINICPM_SETTINGS = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 128,
    "topk": 4,
    "dense_len": 512,
}
# The second is scored as `patch_model` scores models without a `sparse_config`.
EVERY_KEY = {**SETTINGS, "kernel_size": 1, "kernel_stride": 1, "pool_queries": True}
SLOWEST = {**EVERY_KEY, "score_dims": 8, "score_dtype": "float8"}
WHOLE, CHUNKS = 8192, 200  # tokens of a step; chunks end within pages and blocks

LLAMA = "llama", SETTINGS
LLAMA_EXACT = "llama", {**SETTINGS, "lse": "exact", "dense_len": 128}
MINICPM = "minicpm", MINICPM_SETTINGS
ALWAYS_SPARSE = "minicpm", {**MINICPM_SETTINGS, "dense_len": -1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": served.write_llama(folder / "llama"),
        "minicpm": served.write_minicpm(folder / "minicpm"),
    }


def prompts_around(dense_len: int) -> list[list[int]]:
    """Shorter and longer prompts; one passes ``dense_len`` while it is answered."""
    lengths = (3, dense_len - 5, dense_len, dense_len + 1, 333, 900)
    return make_prompts(*(n for n in lengths if n > 0))


@pytest.mark.parametrize("step", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("case", [LLAMA, MINICPM], ids=lambda case: case[0])
def test_prompts_and_answers_have_the_patched_models_log_probabilities(folders, case, page, step):
    name, settings = case
    arguments = {"block_size": page, "max_num_batched_tokens": step}
    with engine(folders[name], settings, **arguments) as llm:
        answers = ask(llm, prompts_around(settings["dense_len"]), of_prompt=True)
    Judge(folders[name], settings).check(answers)


@pytest.mark.parametrize("case", [LLAMA_EXACT, ALWAYS_SPARSE], ids=["exact", "always_sparse"])
def test_other_settings_are_served_alike(folders, case):
    name, settings = case
    with engine(folders[name], settings, block_size=64, max_num_batched_tokens=CHUNKS) as llm:
        answers = ask(llm, prompts_around(settings["dense_len"]), of_prompt=True)
    Judge(folders[name], settings).check(answers)


@pytest.mark.parametrize("step", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_a_cached_prefix_changes_nothing(folders, page, step):
    prompts = prompts_around(SETTINGS["dense_len"])
    long, tails = prompts[-1], make_prompts(7, 150, seed=1)
    # Ends within a window, a block and a page; what follows is other than the first time.
    branches = [long[:777] + tail for tail in tails] + [long[:180] + tails[1]]
    arguments = {"block_size": page, "max_num_batched_tokens": step, "enable_prefix_caching": True}
    with engine(folders["llama"], SETTINGS, **arguments) as llm:
        first = ask(llm, prompts)
        again = ask(llm, [*prompts, *branches])
    assert not any(answer.num_cached for answer in first)
    hits = [answer.num_cached for answer in again]
    assert hits[len(prompts) - 1] >= 768  # the long prompt, again
    assert [hit // page for hit in hits[-3:]] == [777 // page, 777 // page, 180 // page]
    Judge(folders["llama"], SETTINGS).check(first + again)


@pytest.mark.parametrize(
    ("settings", "page", "step"),
    [
        (EVERY_KEY, 16, CHUNKS),
        (EVERY_KEY, 64, WHOLE),
        (EVERY_KEY, 128, CHUNKS),
        (SLOWEST, 16, CHUNKS),
    ],
)
def test_every_key_scored_is_served_alike(folders, settings, page, step):
    prompts = prompts_around(settings["dense_len"])
    branch = prompts[-1][:777] + make_prompts(150, seed=1)[0]
    arguments = {"block_size": page, "max_num_batched_tokens": step, "enable_prefix_caching": True}
    with engine(folders["llama"], settings, **arguments) as llm:
        for layer in layers_of(llm).values():
            # Pages are as long as without the plugin, unless they keep a copy of some dims.
            assert layer.kv_cache.is_contiguous() == ("score_dims" not in settings)
        answers = ask(llm, prompts, of_prompt=True)
        hits = ask(llm, [branch, prompts[-1]])
    assert [answer.num_cached // page for answer in hits] == [777 // page, 899 // page]
    Judge(folders["llama"], settings).check(answers + hits)


@pytest.mark.parametrize(
    ("settings", "prefix_caching"),
    [(SETTINGS, False), (SETTINGS, True), (EVERY_KEY, True)],
    ids=["plain", "prefix_caching", "every_key"],
)
def test_preempted_requests_are_answered_alike(folders, settings, prefix_caching):
    prompts = make_prompts(300, 310, 320, 330)
    arguments = {
        "block_size": 16,
        "num_gpu_blocks_override": 90,  # 1440 tokens, for 1260 and 4 times 60 new ones
        "max_num_batched_tokens": CHUNKS,
        "enable_prefix_caching": prefix_caching,
        "disable_log_stats": False,
    }
    with engine(folders["llama"], settings, **arguments) as llm:
        answers = ask(llm, prompts, num_new=60)
        counts = {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        }
    assert counts["vllm:num_preemptions"] > 0
    Judge(folders["llama"], settings).check(answers)


def test_a_full_batch_of_mixed_lengths_is_answered_as_its_rows_are(folders):
    prompts = make_prompts(*range(150, 950, 50), seed=2)
    with engine(folders["llama"], SETTINGS, block_size=64, max_num_batched_tokens=CHUNKS) as llm:
        answers = ask(llm, prompts)  # twice as many as rows in a step
    Judge(folders["llama"], SETTINGS).check(answers)


def test_settings_in_the_folder_are_served(tmp_path):
    folder = served.write_minicpm(tmp_path, sparse_config=MINICPM_SETTINGS)
    with engine(folder) as llm:
        answers = ask(llm, prompts_around(MINICPM_SETTINGS["dense_len"]))
    Judge(folder, MINICPM_SETTINGS).check(answers)


@pytest.mark.parametrize(("block", "stride"), [(48, 12), (40, 8)])
def test_pages_fit_any_settings_where_the_user_names_no_page_size(folders, block, stride):
    windows = {"kernel_size": 2 * stride, "kernel_stride": stride}
    settings = {**SETTINGS, "block_size": block, "window_size": block, **windows}
    with engine(folders["llama"], settings, max_num_batched_tokens=CHUNKS) as llm:
        (page,) = {layer.kv_cache.shape[2] for layer in layers_of(llm).values()}
        answers = ask(llm, make_prompts(100, 700), of_prompt=True)
    assert page >= 128
    assert page % block == page % stride == 0
    Judge(folders["llama"], settings).check(answers)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_answer_alike(folders, workers, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    arguments = {"tensor_parallel_size": workers, "max_num_batched_tokens": CHUNKS}
    with engine(folders["llama"], SETTINGS, enable_prefix_caching=True, **arguments) as llm:
        answers = [answer for _ in range(2) for answer in ask(llm, prompts_around(192))]
    assert answers[-1].num_cached >= 768
    Judge(folders["llama"], SETTINGS).check(answers)


def test_models_in_transformers_code_are_served_alike(folders, monkeypatch):
    # vLLM changes classes of transformers, which is why it gets a process of its own.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(folders["llama"], SETTINGS, model_impl="transformers", block_size=64) as llm:
        answers = ask(llm, prompts_around(SETTINGS["dense_len"]), of_prompt=True)
    Judge(folders["llama"], SETTINGS).check(answers)


def test_rejected_drafts_leave_nothing_behind(folders, monkeypatch):
    # The next engine in a process that has drafted fails, on an object of numba's.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # Prompts that repeat themselves make drafts; a model of random weights mostly rejects them.
    prompts = [make_prompts(150)[0] * 5, make_prompts(60, seed=5)[0] * 3]
    method = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    drafts = {"speculative_config": method | {"prompt_lookup_min": 1}, "disable_log_stats": False}
    with engine(folders["llama"], SETTINGS, block_size=64, **drafts) as llm:
        answers = ask(llm, prompts, num_new=60)
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    proposed = counts["vllm:spec_decode_num_draft_tokens"]
    assert proposed - counts["vllm:spec_decode_num_accepted_tokens"] > 60
    Judge(folders["llama"], SETTINGS).check(answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served_near_the_patched_model_in_float32(folders, dtype):
    with engine(folders["llama"], SETTINGS, dtype=dtype, block_size=64) as llm:
        (answer,) = ask(llm, make_prompts(900), of_prompt=True)
    sparse, dense = Judge(folders["llama"], SETTINGS).mean_distances(answer)
    assert sparse < dense / 5
