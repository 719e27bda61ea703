"""Importing is silent and light; the public names are these."""

import subprocess
import sys
import textwrap
import zipfile

import pytest

import infllm_flex
from tests.checkout import ROOT, environment


def run(code: str) -> str:
    """Run code in a fresh interpreter; return its output, of both streams."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment(),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout


def test_public_names():
    assert infllm_flex.__all__ == [
        "CompressedKeys",
        "InfLLMConfig",
        "UnsupportedModelError",
        "build_block_mask",
        "decode_attention",
        "dense",
        "describe",
        "infllm_attention",
        "patch_model",
        "select_blocks",
        "unpatch_model",
    ]
    assert all(hasattr(infllm_flex, name) for name in infllm_flex.__all__)


def test_version_is_that_of_the_package():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert infllm_flex.__version__ == version("infllm-flex")
    except PackageNotFoundError:
        pytest.skip("infllm-flex is not installed here")


def test_import_is_silent_and_light():
    heavy = ("transformers", "torchao", "triton", "matplotlib", "torch._inductor", "torch._dynamo")
    assert (
        run(
            f"""
            import sys, torch
            before = set(sys.modules)
            import infllm_flex
            loaded = [name for name in {heavy} if name in sys.modules]
            added = set(sys.modules) - before
            others = {{name.split(".")[0] for name in added}} - {{"infllm_flex", "infllm_flex_ops"}}
            others -= set(sys.stdlib_module_names)
            if loaded or len(added) > 150 or others - {{"torch"}}:
                print("imported:", loaded, len(added), "modules, of", others)
            """
        )
        == ""
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.modeling_utils, infllm_flex",
        # Looking for the module is not importing it.
        "import infllm_flex, transformers; from importlib.util import find_spec; "
        "find_spec('transformers.modeling_utils')",
    ],
)
def test_the_implementation_is_known_in_whatever_order_one_imports(imports):
    pytest.importorskip("transformers")
    assert run(
        f"""
        import os, sys
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        {imports}
        config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
                                          num_hidden_layers=1, num_attention_heads=2)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="infllm_flex")
        print(model.config._attn_implementation)
        print([finder for finder in sys.meta_path if "infllm_flex" in type(finder).__module__])
        """
    ).endswith("infllm_flex\n[]\n")


def test_without_transformers_patching_still_says_why_not():
    assert run(
        """
        import sys, torch
        sys.modules["transformers"] = None
        import infllm_flex
        try:
            infllm_flex.patch_model(torch.nn.Linear(2, 2))
        except infllm_flex.UnsupportedModelError as error:
            print(error)
        """
    ).startswith("Linear cannot be patched: found no attention layer (")


def test_the_wheel_ships_two_packages_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"infllm_flex", "infllm_flex_ops"}
    assert all(name.endswith((".py", ".typed")) for name in names if ".dist-info/" not in name)
    assert {"infllm_flex/py.typed", "infllm_flex_ops/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
