"""Every Python block of the documentation runs, page by page, with a tiny model for every model."""

from __future__ import annotations

import pytest
import torch

from tests.documentation.pages import PAGES, blocks, name_of
from tests.tiny_model import SPARSE_CONFIG, byte_tokenizer, tiny_config

pytest.importorskip("transformers")

_LONGEST = 600  # characters of a prompt that are read


class ShortReader:
    """A tokenizer that reads the first characters of a text."""

    def __init__(self):
        self._tokenizer = byte_tokenizer()
        self.decode = self._tokenizer.decode

    def __call__(self, text, **options):
        return self._tokenizer(text[:_LONGEST], **options)


@pytest.fixture
def tiny_models(monkeypatch):
    """Let from_pretrained return a tiny model, and a tokenizer that cuts long texts short."""
    import transformers

    def read_model(name, *args, attn_implementation="sdpa", **kwargs):
        config = tiny_config(sparse_config=SPARSE_CONFIG)
        return transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation
        )

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: ShortReader())


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_there_are_pages_with_python():
    assert {"README.md", "docs/getting-started.md"} <= {name_of(page) for page in WITH_PYTHON}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever a block writes
    names = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        if block.is_run:
            lines = "\n" * (block.line - 1) + block.text  # line numbers as in the page
            exec(compile(lines, str(page), "exec"), names)


def test_a_comment_with_a_reason_exempts_the_block_below_it(tmp_path):
    page = tmp_path / "page.md"
    fence = "```"
    page.write_text(
        f"Text.\n\n{fence}python\na = 1\n{fence}\n\n<!-- not run: needs two GPUs -->\n"
        f"{fence}python\nb = 2\n{fence}\n\n{fence}\nshown\n{fence}\n{fence}bash\nls\n{fence}\n"
    )
    found = [(block.text, block.line, block.is_run) for block in blocks(page, "python")]
    assert found == [("a = 1", 4, True), ("b = 2", 9, False)]
    assert [block.text for block in blocks(page, "bash")] == ["ls"]
