"""docs/private-apis.md: the private APIs, from the docstrings of the modules that hold them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from generated_docs.docstrings import paragraphs

_ROOT = Path(__file__).parents[2]
# A file or a folder of files; every public function in it stands for one API.
_MODULES = {
    "PyTorch": "custom_ops/infllm_flex_ops/torch_private",
    "transformers": "infllm_flex/patch/huggingface/transformers_private.py",
}
_FIELD = re.compile(r"^(API|If it goes|Instead): ", re.M)
_ABOUT = """
This project uses some parts of PyTorch, Triton and transformers that their authors do not promise
to keep. An upgrade of one of them should start here.

Those of PyTorch and of transformers have one module each. Every function there stands for one API,
and its docstring says what this page shows. `tests/test_private_apis.py` and
`tests/patch/test_transformers_private.py` have a test for each, and `scripts/test_private_apis`
runs them with another version:
"""
_COMMANDS = """
```bash
scripts/test_private_apis transformers   # the newest
scripts/test_private_apis torch==2.11.0
```
"""
# The API of Triton, its use, the consequence if it goes, and the public way.
_TRITON = [
    (
        "`triton.experimental.gluon`",
        "Two kernels on Hopper.",
        "used with Triton 3.6 to 3.8; else Triton kernels run, and one warning says so",
        "nothing needed",
    ),
    (
        "`JITFunction.fn`",
        "Share three helpers with Gluon kernels.",
        "an error on Hopper",
        "write the helpers twice",
    ),
    (
        "`triton.tools.tensor_descriptor.TensorDescriptor`",
        "TMA on Hopper.",
        "an error on Hopper",
        "nothing public",
    ),
]
_OTHERS = """
The adapters read the code of users' modules (`co_names`, `co_freevars`, the syntax tree) and swap
the class of a module for a subclass (`copyreg.__newobj__` when it is pickled). A change there
shows in pickling, or as an attention layer that is no longer recognised.

Training uses parts of `torch.distributed` that are documented as experimental: the safetensors
storage of DCP (`torch.distributed.checkpoint.hf_storage`), `PrefixStore`, `rendezvous` and
`TORCHELASTIC_RESTART_COUNT`.

`tests/flex_kernels/pretended_gpu.py` and `scripts/benchmarking/ahead_of_time.py` reach into
Inductor, Dynamo and Triton's compiler to work without a GPU, and
`tests/custom_ops/quick_interpreter.py` into Triton's interpreter to be quick. A new release may
break them without a fault of the package.
"""


def private_apis_page() -> str:
    """Describe the private APIs that the package uses."""
    parts = ["# Private APIs", *paragraphs(_ABOUT), _COMMANDS.strip()]
    for library, module in _MODULES.items():
        rows = [(f"`{f.name}`", *_read(ast.get_docstring(f) or "")) for f in _functions(module)]
        head: Sequence[str] = ("function", "for", "API", "if it goes", "instead")
        parts += [f"## {library}", f"Module: `{module}`.", _table(head, rows)]
    head = ("API", "for", "if it goes", "instead")
    parts += ["## Triton", "Used in kernel files.", _table(head, _TRITON)]
    parts += ["## Others", *paragraphs(_OTHERS)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _functions(module: str) -> list[ast.FunctionDef]:
    path = _ROOT / module
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if not function.name.startswith("_")]


def _read(docstring: str) -> list[str]:
    """The purpose of a function, and its three fields, each on one line of Markdown."""
    purpose = docstring.split("\n", 1)[0]
    body = docstring.split("\n\nArgs:", 1)[0]
    fields = dict(zip(*[iter(_FIELD.split(body)[1:])] * 2, strict=True))
    texts = [purpose, *(fields.get(name, "") for name in ("API", "If it goes", "Instead"))]
    return [" ".join(text.replace("``", "`").replace("|", "\\|").split()) for text in texts]
